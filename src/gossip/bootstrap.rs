//! Finds the first peers: looks the configured names up, asks whoever answers there for its name, and hands it over to
//! be introduced to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use rand::seq::SliceRandom;
use tokio::sync::{mpsc, watch};

use crate::swarm::membership::PeerBook;
use crate::transport::{OpenError, PeerAddr, Transport};

use super::Config;

/// Peers introduced to in one round. One would do; three survive two that are just starting as well.
const PEERS_PER_ROUND: usize = 3;

/// Addresses asked in one round, all at once: enough to find three among a Service's stale records, bounded for a
/// name that stands for thousands.
const ADDRESSES_PER_ROUND: usize = 16;

/// A name server that does not answer within this long is asked again in the next round.
const LOOKUP_DEADLINE: Duration = Duration::from_secs(2);

/// Rounds are this much rarer once somebody is known.
const COMPANY_FACTOR: u32 = 10;

pub(super) struct Bootstrap {
    pub(super) transport: Arc<dyn Transport>,
    pub(super) book: watch::Receiver<PeerBook>,
    pub(super) found: mpsc::Sender<PeerAddr>,
}

impl Bootstrap {
    /// Never returns; drop it to stop.
    pub(super) async fn run(self, config: Config) {
        if config.peers.is_empty() {
            return std::future::pending().await;
        }
        let mut said = None;
        loop {
            let refusal = self.round(&config.peers).await;
            if refusal != said {
                if let Some(reason) = &refusal {
                    tracing::warn!(reason, "gossip.peers: somebody answers there who is no peer");
                }
                said = refusal;
            }
            let alone = self.book.borrow().members.len() < 2;
            let pause = Duration::from_millis(config.bootstrap_interval_ms);
            tokio::time::sleep(if alone { pause } else { pause * COMPANY_FACTOR }).await;
        }
    }

    /// Returns why somebody who answered is no peer: a node with a wrong certificate would else only seem alone.
    async fn round(&self, names: &[String]) -> Option<String> {
        let mut addresses = Vec::new();
        for name in names {
            match tokio::time::timeout(LOOKUP_DEADLINE, tokio::net::lookup_host(name)).await {
                Ok(Ok(found)) => addresses.extend(found),
                Ok(Err(error)) => tracing::warn!(name, %error, "gossip.peers: name not found"),
                Err(_) => tracing::warn!(name, "gossip.peers: the name server does not answer"),
            }
        }
        addresses.shuffle(&mut rand::rng());
        addresses.truncate(ADDRESSES_PER_ROUND);
        self.ask(addresses).await
    }

    async fn ask(&self, addresses: Vec<SocketAddr>) -> Option<String> {
        let answers =
            addresses.into_iter().map(|addr| async move { (addr, self.transport.resolve(addr).await) });
        let mut answers: FuturesUnordered<_> = answers.collect();
        let mut found = 0;
        let mut refusal = None;
        while let Some((addr, answer)) = answers.next().await {
            match answer {
                Ok(peer) if peer.node == self.transport.local() => {}
                Ok(peer) => {
                    found += 1;
                    // The task being gone means shutdown.
                    let _ = self.found.send(peer).await;
                }
                Err(error) => {
                    tracing::debug!(%addr, %error, "peer not reached");
                    if let OpenError::NotAuthentic { reason, .. } = error {
                        refusal = Some(reason);
                    }
                }
            }
            if found == PEERS_PER_ROUND {
                break;
            }
        }
        refusal
    }
}

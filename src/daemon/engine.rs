//! The parts behind the faces: the peers' transport, the store, the membership and the cache.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::metrics::EngineMetrics;
use super::peers::{Desk, join};
use super::{DaemonError, Life};
use crate::cache::{self, Cache};
use crate::config::Config;
use crate::gossip::Gossip;
use crate::provider::Provider;
use crate::store::{self, Store};
use crate::swarm::Swarm;
use crate::swarm::membership::NodeIdentity;
use crate::transport::{Incoming, QuicTransport, Transport};

/// What runs, and has to be closed in order.
pub(super) struct Engine {
    pub(super) cache: Cache,
    pub(super) gossip: Gossip,
    pub(super) store: Store,
    transport: Arc<QuicTransport>,
}

/// Takes the data directory and finds out what is in it, which may take seconds after a crash.
pub(super) async fn open_store(config: &Config, metrics: store::Metrics) -> Result<Store, DaemonError> {
    let config = config.store.clone();
    Ok(spawn_blocking(move || Store::open(config, metrics)).await??)
}

impl Engine {
    /// Starts working with the peers. Nothing in here can fail any more.
    pub(super) fn start(
        config: &Config,
        identity: NodeIdentity,
        transport: Arc<QuicTransport>,
        incoming: mpsc::Receiver<Incoming>,
        store: Store,
        metrics: EngineMetrics,
        life: &Life,
    ) -> Self {
        let gossip = join(config, identity, transport.clone(), metrics.gossip, life);
        let cache = Cache::start(cache::Parts {
            config: config.cache.clone(),
            swarm: Swarm::new(transport.local(), config.swarm.clone(), rand::random()),
            store: store.clone(),
            transport: transport.clone(),
            peers: gossip.book(),
            metrics: metrics.cache,
            shutdown: life.halt.clone(),
        });
        let desk = Desk {
            gossip: gossip.clone(),
            cache: cache.clone(),
            provider: Provider::new(cache.clone(), &config.provider, metrics.provider),
            uploads: life.uploads.clone(),
            refuse: life.refuse.clone(),
        };
        life.background.spawn(desk.run(incoming));
        Self { cache, gossip, store, transport }
    }

    /// Ends the engine once its clients are gone, then tells the peers, then leaves the store clean.
    pub(super) async fn close(self, life: Life) {
        life.halt.cancel();
        self.cache.stopped().await;
        life.leave().await;
        self.transport.close().await;
        life.end().await;
        let store = self.store;
        match spawn_blocking(move || store.close()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(%error, "the store was not closed cleanly: the next start scans it")
            }
            Err(error) => {
                tracing::error!(%error, "the store was not closed cleanly: the next start scans it")
            }
        }
    }
}

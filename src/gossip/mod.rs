//! Drives the membership: delivers its packets over the transport, wakes it in time, finds the first peers, and publishes
//! who is there.
//!
//! Invariant: what is published is what SWIM believes; nothing here adds or removes a member on its own.
//! Refuses to invent addresses: it dials what the configuration names and what authenticated members say of themselves.

mod bootstrap;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::content::NodeId;
use crate::swarm::membership::{Membership, MembershipAction, NodeIdentity, PeerBook};
use crate::swarm::{DEFAULT_CAPACITY, Time, Zone};
use crate::transport::{PeerAddr, Transport};

use bootstrap::Bootstrap;

/// Packets that may wait for the task; more are lost, as SWIM expects of a network. 2,000 members send this node some
/// 15 a second each way.
const PACKETS_MAX: usize = 1_024;

/// `[gossip]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where other nodes may be found, as `host:port`: a headless Service's DNS name, or nodes by name or address. Each
    /// name may stand for many addresses. Empty means that this node waits for others to come, or is alone.
    pub peers: Vec<String>,
    /// How often the names are looked up again while nobody is known, in milliseconds; ten times that otherwise, so
    /// that two halves of a cluster that lost each other meet again.
    pub bootstrap_interval_ms: u64,
    /// A node that finds nobody for this long takes itself to be alone and starts to work, in milliseconds.
    pub alone_after_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            peers: Vec::new(),
            bootstrap_interval_ms: 3_000,
            // A Service's DNS answers, and a QUIC handshake is done, well within a second.
            alone_after_ms: 3_000,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Clone, Debug, Default)]
pub struct Metrics {
    peers: Family<StateLabel, Gauge>,
    packets_dropped: Counter,
    packets_refused: Counter,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let this = Self::default();
        registry.register("peers", "Other members of the cluster, by state", this.peers.clone());
        registry.register(
            "gossip_packets_dropped",
            "Membership packets dropped because the task or the transport was behind",
            this.packets_dropped.clone(),
        );
        registry.register(
            "gossip_packets_refused",
            "Membership packets that did not parse or came in another node's name",
            this.packets_refused.clone(),
        );
        this
    }
}

/// Where packets from the transport go; cheap to clone.
#[derive(Clone)]
pub struct Gossip {
    packets: mpsc::Sender<(NodeId, Bytes)>,
    book: watch::Receiver<PeerBook>,
    metrics: Metrics,
}

impl Gossip {
    /// The handle and the task to spawn; the task ends after `shutdown`, when it has told the others.
    pub fn new(
        config: Config,
        membership: Membership,
        transport: Arc<dyn Transport>,
        metrics: Metrics,
        shutdown: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (packets, inbox) = mpsc::channel(PACKETS_MAX);
        let (publish, book) = watch::channel(PeerBook::default());
        let (found, peers) = mpsc::channel(1);
        let bootstrap = Bootstrap { transport: Arc::clone(&transport), book: book.clone(), found };
        let task = Task {
            started: Instant::now(),
            alone_after: Duration::from_millis(config.alone_after_ms),
            synced: config.peers.is_empty(),
            membership,
            transport,
            publish,
            metrics: metrics.clone(),
        };
        task.publish();
        let run = async move {
            tokio::select! {
                () = task.run(inbox, peers, shutdown) => {}
                () = bootstrap.run(config) => {}
            }
        };
        (Self { packets, book, metrics }, run)
    }

    /// A datagram that the transport authenticated as coming from `from`.
    pub fn datagram(&self, from: NodeId, bytes: Bytes) {
        if self.packets.try_send((from, bytes)).is_err() {
            self.metrics.packets_dropped.inc();
        }
    }

    /// Who is there, now and whenever it changes.
    #[must_use]
    pub fn book(&self) -> watch::Receiver<PeerBook> {
        self.book.clone()
    }
}

struct Task {
    started: Instant,
    membership: Membership,
    transport: Arc<dyn Transport>,
    alone_after: Duration,
    synced: bool,
    publish: watch::Sender<PeerBook>,
    metrics: Metrics,
}

impl Task {
    async fn run(
        mut self,
        mut inbox: mpsc::Receiver<(NodeId, Bytes)>,
        mut peers: mpsc::Receiver<PeerAddr>,
        shutdown: CancellationToken,
    ) {
        let alone = tokio::time::sleep(self.alone_after);
        tokio::pin!(alone);
        loop {
            self.act();
            tokio::select! {
                () = shutdown.cancelled() => break,
                Some((from, bytes)) = inbox.recv() => self.packet(from, &bytes),
                Some(peer) = peers.recv() => self.introduce(&peer),
                () = sleep_until(self.next_timeout()) => {
                    let now = self.now();
                    self.membership.handle_timeout(now);
                }
                () = &mut alone, if !self.synced => self.found_nobody(),
            }
        }
        let now = self.now();
        self.membership.leave(now);
        self.act();
    }

    fn now(&self) -> Time {
        Time(u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.membership.poll_timeout().map(|at| self.started + Duration::from_micros(at.0))
    }

    fn packet(&mut self, from: NodeId, bytes: &[u8]) {
        let now = self.now();
        if let Err(error) = self.membership.handle_datagram(now, from, bytes) {
            self.metrics.packets_refused.inc();
            tracing::debug!(peer = %from, %error, "membership packet refused");
        }
    }

    fn introduce(&mut self, peer: &PeerAddr) {
        // The rest of its identity is unknown, and an introduction needs none of it.
        match NodeIdentity::new(&peer.name, peer.addr, 0, Zone::default(), false, DEFAULT_CAPACITY) {
            Ok(identity) => {
                let now = self.now();
                self.membership.announce(now, identity);
            }
            Err(error) => tracing::warn!(addr = %peer.addr, %error, "peer not introduced to"),
        }
    }

    fn found_nobody(&mut self) {
        tracing::warn!("no peer answered: this node works alone until one does");
        self.synced = true;
        self.publish();
    }

    fn act(&mut self) {
        let mut changed = false;
        while let Some(action) = self.membership.poll_action() {
            match action {
                MembershipAction::Changed => changed = true,
                MembershipAction::Send { to, bytes } => {
                    if self.transport.send_datagram(&address(&to), bytes).is_err() {
                        self.metrics.packets_dropped.inc();
                    }
                }
            }
        }
        if changed {
            self.synced |= self.membership.has_company();
            self.publish();
        }
    }

    fn publish(&self) {
        let known = self.membership.members();
        let others = known.iter().filter(|m| m.identity.id() != self.membership.local().id());
        let (settled, settling): (Vec<_>, Vec<_>) = others.partition(|member| member.settled);
        for (state, members) in [("settled", settled), ("settling", settling)] {
            let count = i64::try_from(members.len()).unwrap_or(i64::MAX);
            self.metrics.peers.get_or_create(&StateLabel { state }).set(count);
        }
        tracing::debug!(members = known.len(), synced = self.synced, "membership");
        self.publish.send_replace(PeerBook::new(known, self.synced));
    }
}

fn address(identity: &NodeIdentity) -> PeerAddr {
    PeerAddr { node: identity.id(), name: identity.name().to_owned(), addr: identity.addr }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

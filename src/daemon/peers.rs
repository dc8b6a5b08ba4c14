//! This node among the others: who it says it is, and where what they send goes.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::address::advertised;
use super::{DaemonError, Life};
use crate::cache::Cache;
use crate::config::Config;
use crate::content::NodeId;
use crate::gossip::{self, Gossip};
use crate::http::admin::{Condition, Readiness};
use crate::provider::Provider;
use crate::swarm::membership::{Membership, NodeIdentity};
use crate::swarm::{Time, Zone};
use crate::transport::{Incoming, QuicTransport, RecvStream, SendStream, Transport};
use crate::wire;

/// The identity that this node goes by until it ends.
///
/// # Errors
/// When the name or the zone does not fit, or no address can be told.
pub(super) async fn introduce(
    config: &Config,
    transport: &QuicTransport,
) -> Result<NodeIdentity, DaemonError> {
    let listened = transport.local_addr().unwrap_or(config.transport.listen);
    let (configured, peers) = (config.node.address, config.gossip.peers.clone());
    let address = tokio::task::spawn_blocking(move || advertised(configured, listened, &peers)).await??;
    tracing::info!(%address, "other nodes reach this one here");
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let boot_ms = u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX);
    let zone = Zone::new(&config.node.zone)?;
    // The name that the certificate proves, which the configuration agrees with.
    let name = transport.identity().name().node();
    Ok(NodeIdentity::new(name, address, boot_ms, zone, config.node.seed, config.node.capacity)?)
}

/// Starts the membership: it tells the others when this node leaves, and ends.
pub(super) fn join(
    config: &Config,
    identity: NodeIdentity,
    transport: Arc<dyn Transport>,
    metrics: gossip::Metrics,
    life: &Life,
) -> Gossip {
    let membership = Membership::new(Time(0), config.membership.clone(), identity, rand::random());
    let (gossip, task) =
        Gossip::new(config.gossip.clone(), membership, transport, metrics, life.leave.clone());
    life.membership.spawn(task);
    life.membership.spawn(report_sync(gossip.clone(), life.readiness.clone()));
    gossip
}

/// Reports once that the membership is in sync.
async fn report_sync(gossip: Gossip, readiness: Readiness) {
    // An error means that the membership has ended, and with it the daemon.
    if gossip.book().wait_for(|book| book.synced).await.is_ok() {
        readiness.report(Condition::MembershipSynced);
    }
}

/// Where what peers send goes.
pub(super) struct Desk {
    pub(super) gossip: Gossip,
    pub(super) cache: Cache,
    pub(super) provider: Provider,
    /// Transfers to peers, each a task.
    pub(super) uploads: TaskTracker,
    /// No new transfers from then on.
    pub(super) refuse: CancellationToken,
}

impl Desk {
    /// Hands over what arrives, until the transport closes.
    pub(super) async fn run(self, mut incoming: mpsc::Receiver<Incoming>) {
        while let Some(arrived) = incoming.recv().await {
            match arrived {
                Incoming::Datagram { from, bytes } => self.gossip.datagram(from, bytes),
                Incoming::Message { from, bytes } => self.cache.message(from, bytes).await,
                Incoming::Disconnected { from } => self.cache.disconnected(from).await,
                Incoming::Stream { from, send, recv } => self.serve(from, send, recv),
            }
        }
    }

    fn serve(&self, from: NodeId, mut send: SendStream, recv: RecvStream) {
        if self.refuse.is_cancelled() {
            send.reset(wire::code::SHUTDOWN);
            return;
        }
        let provider = self.provider.clone();
        self.uploads.spawn(async move { provider.serve(from, send, recv).await });
    }
}

//! The transport over QUIC (RFC 9000), with mutual TLS.
//!
//! One UDP port carries everything in both directions. Invariant: no byte is taken from or given to a connection
//! before its certificate proved a node of this cluster; every queue is bounded; every task belongs to
//! [`QuicTransport::close`].

mod connection;
mod dial;
mod halves;
mod metrics;
mod peer;
mod settings;
mod socket;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use quinn::Endpoint;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::tls::Identity;
use super::{
    Incoming, MAX_DATAGRAM_BYTES, MAX_MESSAGE_BYTES, OpenError, PeerAddr, RecvStream, SendError, SendStream,
    Transport,
};
use crate::content::NodeId;
use connection::{CloseCode, Connection};
use peer::{Peer, Posted, Thrown};

pub use metrics::Metrics;
pub use settings::Config;

/// How often metrics are brought up to date and peers that are gone are forgotten.
const TEND_INTERVAL: Duration = Duration::from_secs(5);

/// How often the certificate files are looked at.
const REFRESH_INTERVAL: Duration = Duration::from_secs(60);

/// How long closing waits for queued messages to arrive, and then for the last packets to leave.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// Refused strangers are logged once in this time; the metric counts all.
const WARN_INTERVAL: Duration = Duration::from_secs(10);

/// Why the transport did not start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("cannot listen on UDP {addr}: {source}; is another windlass running, or set transport.listen")]
    Socket { addr: SocketAddr, source: io::Error },
    #[error("the transport cannot start with these settings: {0}")]
    Settings(String),
}

/// The state of one connection, for people and `doctor`.
#[derive(Clone, Debug)]
pub struct PathStats {
    pub peer: NodeId,
    pub name: String,
    pub addr: SocketAddr,
    pub rtt: Duration,
    /// UDP payload in bytes that the path carries now; 1200 on a path that should carry more is a fault.
    pub current_mtu: u16,
    pub congestion_window_bytes: u64,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    pub sent_packets: u64,
    pub lost_packets: u64,
    /// Times that the path stopped carrying packets it had carried.
    pub black_holes: u64,
    /// Packets per send call. Near 1 under load, segmentation offload (GSO) is off and speed is a fraction.
    pub packets_per_send: f64,
}

/// The peer network over QUIC. See [`Transport`].
pub struct QuicTransport {
    shared: Arc<Shared>,
}

/// What the transport's tasks share.
struct Shared {
    node: NodeId,
    identity: Arc<Identity>,
    config: Config,
    metrics: Metrics,
    endpoint: Endpoint,
    client: quinn::ClientConfig,
    peers: Mutex<HashMap<NodeId, Arc<Peer>>>,
    /// Taken when the transport closes, so that the owner sees the end.
    incoming: Mutex<Option<mpsc::Sender<Incoming>>>,
    /// Handshakes under way that others began.
    handshakes: AtomicUsize,
    warned: Mutex<Option<Instant>>,
    /// Nothing new is begun.
    closing: CancellationToken,
    /// Everything ends now.
    stopped: CancellationToken,
    tasks: TaskTracker,
    /// One token for each connection whose messages may still be on their way.
    flushing: TaskTracker,
}

impl QuicTransport {
    /// Listens. The receiver yields what peers send. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the address cannot be bound or a setting is out of range.
    pub fn bind(
        config: Config,
        identity: Identity,
        metrics: Metrics,
    ) -> Result<(Arc<Self>, mpsc::Receiver<Incoming>), BindError> {
        config.check().map_err(BindError::Settings)?;
        let identity = Arc::new(identity);
        let client = settings::client(&config, &identity).map_err(BindError::Settings)?;
        let server = settings::server(&config, &identity).map_err(BindError::Settings)?;
        let settings =
            settings::endpoint(&config, &identity).map_err(|e| BindError::Settings(e.to_string()))?;
        let failed = |source| BindError::Socket { addr: config.listen, source };
        let socket = socket::bind(config.listen, config.socket_buffer_bytes).map_err(failed)?;
        let endpoint =
            Endpoint::new_with_abstract_socket(settings, Some(server), socket, Arc::new(quinn::TokioRuntime))
                .map_err(failed)?;
        let (sender, receiver) = mpsc::channel(config.incoming_queue);
        let shared = Arc::new(Shared {
            node: identity.node_id(),
            identity,
            config,
            metrics,
            endpoint,
            client,
            peers: Mutex::default(),
            incoming: Mutex::new(Some(sender)),
            handshakes: AtomicUsize::new(0),
            warned: Mutex::new(None),
            closing: CancellationToken::new(),
            stopped: CancellationToken::new(),
            tasks: TaskTracker::new(),
            flushing: TaskTracker::new(),
        });
        shared.tasks.spawn(Arc::clone(&shared).accept());
        shared.tasks.spawn(Arc::clone(&shared).tend());
        shared.tasks.spawn(Arc::clone(&shared).refresh());
        Ok((Arc::new(Self { shared }), receiver))
    }

    /// The address that is listened on, with the port that the kernel chose if it was 0.
    ///
    /// # Errors
    /// When the socket is broken.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.shared.endpoint.local_addr()
    }

    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.shared.identity
    }

    /// Every open connection.
    #[must_use]
    pub fn connections(&self) -> Vec<PathStats> {
        self.shared.live().iter().filter(|c| c.is_open()).map(|c| path_stats(c)).collect()
    }
}

impl Drop for QuicTransport {
    /// An owner that does not call `close` still leaves no task behind.
    fn drop(&mut self) {
        self.shared.closing.cancel();
        self.shared.stopped.cancel();
        CloseCode::Shutdown.close_endpoint(&self.shared.endpoint);
        self.shared.incoming.lock().take();
    }
}

impl Transport for QuicTransport {
    fn resolve(&self, addr: SocketAddr) -> BoxFuture<'_, Result<PeerAddr, OpenError>> {
        Box::pin(async move {
            if self.shared.closing.is_cancelled() {
                return Err(OpenError::Closed);
            }
            self.shared.resolve(addr).await
        })
    }

    fn local(&self) -> NodeId {
        self.shared.node
    }

    fn send_datagram(&self, to: &PeerAddr, bytes: Bytes) -> Result<(), SendError> {
        let shared = &self.shared;
        shared.check(bytes.len(), MAX_DATAGRAM_BYTES)?;
        let Some(peer) = shared.peer(to.node) else {
            shared.metrics.dropped(metrics::DropReason::NotConnected, 1);
            return Ok(());
        };
        match peer.throw(to.addr, bytes) {
            Thrown::Sent | Thrown::Held { dial: false } => {}
            Thrown::Held { dial: true } => shared.dial(&peer, to),
            Thrown::Dropped(reason) => shared.metrics.dropped(reason, 1),
        }
        Ok(())
    }

    fn send_message(&self, to: &PeerAddr, bytes: Bytes) -> Result<(), SendError> {
        let shared = &self.shared;
        shared.check(bytes.len(), MAX_MESSAGE_BYTES)?;
        let peer = shared.peer(to.node).ok_or(SendError::Unreachable(to.node))?;
        match peer.post(to.addr, bytes, shared.config.message_queue) {
            Posted::Queued { dial: false } => Ok(()),
            Posted::Queued { dial: true } => {
                shared.dial(&peer, to);
                Ok(())
            }
            Posted::Full => {
                shared.metrics.messages_refused.inc();
                Err(SendError::QueueFull(to.node))
            }
            Posted::Unreachable => Err(SendError::Unreachable(to.node)),
        }
    }

    fn open<'a>(&'a self, to: &'a PeerAddr) -> BoxFuture<'a, Result<(SendStream, RecvStream), OpenError>> {
        let shared = &self.shared;
        Box::pin(async move {
            let attempt = async {
                loop {
                    if shared.closing.is_cancelled() {
                        return Err(OpenError::Closed);
                    }
                    let connection = shared.connection(to).await?;
                    // An error means that it was lost this instant: the next turn makes another.
                    if let Ok((send, recv)) = connection.quic.open_bi().await {
                        return Ok(halves::wrap(&connection, send, recv));
                    }
                }
            };
            let limit = shared.config.connect_timeout();
            match timeout(limit, attempt).await {
                Ok(outcome) => outcome,
                Err(_) => {
                    let reason = format!("no stream within {} ms", limit.as_millis());
                    Err(shared.unreachable(&to.name, to.addr, &reason))
                }
            }
        })
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        let shared = &self.shared;
        Box::pin(async move {
            shared.closing.cancel();
            shared.flushing.close();
            // Late messages are lost, as they would be with the node.
            let _ = timeout(FLUSH_TIMEOUT, shared.flushing.wait()).await;
            CloseCode::Shutdown.close_endpoint(&shared.endpoint);
            shared.stopped.cancel();
            shared.tasks.close();
            shared.tasks.wait().await;
            // A peer that does not acknowledge the end learns it from its own timer.
            let _ = timeout(CLOSE_TIMEOUT, shared.endpoint.wait_idle()).await;
            shared.incoming.lock().take();
        })
    }
}

impl Shared {
    fn check(&self, len: usize, max: usize) -> Result<(), SendError> {
        if self.closing.is_cancelled() {
            return Err(SendError::Closed);
        }
        if len > max { Err(SendError::TooLarge { len, max }) } else { Ok(()) }
    }

    /// The record of a peer, made when it is new; `None` when there are too many to remember another.
    fn peer(&self, node: NodeId) -> Option<Arc<Peer>> {
        let mut peers = self.peers.lock();
        if let Some(peer) = peers.get(&node) {
            return Some(Arc::clone(peer));
        }
        // Twice the connections: peers that do not answer are remembered for their back-off.
        if peers.len() >= 2 * self.config.max_connections as usize {
            return None;
        }
        Some(Arc::clone(peers.entry(node).or_default()))
    }

    fn live(&self) -> Vec<Arc<Connection>> {
        self.peers.lock().values().flat_map(|peer| peer.connections()).collect()
    }

    fn incoming(&self) -> Option<mpsc::Sender<Incoming>> {
        self.incoming.lock().clone()
    }

    fn may_warn(&self) -> bool {
        let mut warned = self.warned.lock();
        let may = warned.is_none_or(|last| last.elapsed() >= WARN_INTERVAL);
        if may {
            *warned = Some(Instant::now());
        }
        may
    }

    async fn tend(self: Arc<Self>) {
        loop {
            for connection in self.live() {
                self.count(&connection);
            }
            let waiting: usize = {
                let mut peers = self.peers.lock();
                // Nobody else holds it, so nobody is about to use it.
                peers.retain(|_, peer| Arc::strong_count(peer) > 1 || !peer.is_forgettable());
                peers.values().map(|peer| peer.outbox_bytes()).sum()
            };
            self.metrics.message_queue_bytes.set(gauge(waiting as u64));
            let queued = self.incoming().map_or(0, |sender| sender.max_capacity() - sender.capacity());
            self.metrics.incoming_queue.set(gauge(queued as u64));
            tokio::select! {
                () = tokio::time::sleep(TEND_INTERVAL) => {}
                () = self.stopped.cancelled() => return,
            }
        }
    }

    /// Keeps the certificate fresh while cert-manager rotates it.
    async fn refresh(self: Arc<Self>) {
        loop {
            self.metrics.certificate_expiry.set(gauge(self.identity.expires_unix_s()));
            tokio::select! {
                () = tokio::time::sleep(REFRESH_INTERVAL) => {}
                () = self.stopped.cancelled() => return,
            }
            let identity = Arc::clone(&self.identity);
            match tokio::task::spawn_blocking(move || identity.refresh()).await {
                Ok(Ok(true)) => info!("this node's certificate was renewed"),
                Ok(Ok(false)) | Err(_) => {}
                Ok(Err(error)) => {
                    self.metrics.certificate_refresh_failures.inc();
                    warn!(%error, "the certificate files changed but cannot be used; the old certificate stays");
                }
            }
        }
    }

    /// Adds what a connection did since the last time to the metrics.
    fn count(&self, connection: &Connection) {
        let stats = connection.quic.stats();
        let counted = &mut *connection.counted.lock();
        let metrics = &self.metrics;
        for (counter, seen, now) in [
            (&metrics.sent_bytes, &mut counted.sent_bytes, stats.udp_tx.bytes),
            (&metrics.received_bytes, &mut counted.received_bytes, stats.udp_rx.bytes),
            (&metrics.sent_packets, &mut counted.sent_packets, stats.path.sent_packets),
            (&metrics.lost_packets, &mut counted.lost_packets, stats.path.lost_packets),
        ] {
            counter.inc_by(now.saturating_sub(*seen));
            *seen = now;
        }
    }
}

fn path_stats(connection: &Connection) -> PathStats {
    let stats = connection.quic.stats();
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
    let packets_per_send = stats.udp_tx.datagrams as f64 / stats.udp_tx.ios.max(1) as f64;
    PathStats {
        peer: connection.node,
        name: connection.name.node().to_owned(),
        addr: connection.quic.remote_address(),
        rtt: stats.path.rtt,
        current_mtu: stats.path.current_mtu,
        congestion_window_bytes: stats.path.cwnd,
        sent_bytes: stats.udp_tx.bytes,
        received_bytes: stats.udp_rx.bytes,
        sent_packets: stats.path.sent_packets,
        lost_packets: stats.path.lost_packets,
        black_holes: stats.path.black_holes_detected,
        packets_per_send,
    }
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

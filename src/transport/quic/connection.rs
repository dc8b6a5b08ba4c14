//! One connection to one peer, from greeting to end.
//!
//! Each side opens one stream for messages when the connection is made and sends an empty frame on it, the
//! greeting: a dial has succeeded when the other side's greeting arrived, so a refusal is never mistaken for a
//! connection that broke. Frames are a big-endian u32 length and that many bytes.
//!
//! Invariant: everything read here is attributed to the node that the certificate proved.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use quinn::{ConnectionError, VarInt};
use tokio::sync::{Notify, mpsc};

use super::Shared;
use super::halves;
use super::metrics::DropReason;
use super::peer::Peer;
use crate::content::NodeId;
use crate::transport::tls::PeerName;
use crate::transport::{Incoming, MAX_MESSAGE_BYTES};

/// An empty frame.
const GREETING: [u8; 4] = [0; 4];

/// Claims go ahead of chunks on the same connection.
const MESSAGE_PRIORITY: i32 = 1;

/// How long a connection that a newer one replaced may be silent before it is closed, and how often connections
/// are looked at for it. Long enough for what was finished on it to arrive.
const REPLACED_LINGER: Duration = Duration::from_secs(10);

/// Why a connection is closed on purpose, as the peer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum CloseCode {
    Shutdown = 0,
    /// Both dialled at once; the other connection wins.
    Duplicate = 1,
    Unused = 2,
    Limit = 3,
    /// A node dialled itself.
    Ourselves = 4,
    /// The peer broke the protocol of this module.
    Protocol = 5,
}

impl CloseCode {
    const fn reason(self) -> &'static [u8] {
        match self {
            Self::Shutdown => b"shutting down",
            Self::Duplicate => b"another connection between the two is being made",
            Self::Unused => b"unused",
            Self::Limit => b"too many connections; raise transport.max_connections",
            Self::Ourselves => b"a node dialled itself",
            Self::Protocol => b"protocol broken",
        }
    }

    pub(super) fn close(self, connection: &quinn::Connection) {
        connection.close(self.code(), self.reason());
    }

    pub(super) fn close_endpoint(self, endpoint: &quinn::Endpoint) {
        endpoint.close(self.code(), self.reason());
    }

    /// Whether the peer closed the connection for this reason.
    pub(super) fn is(self, error: &ConnectionError) -> bool {
        matches!(error, ConnectionError::ApplicationClosed(close) if close.error_code == self.code())
    }

    const fn code(self) -> VarInt {
        VarInt::from_u32(self as u32)
    }
}

/// An authenticated connection and who uses it.
pub(super) struct Connection {
    pub(super) quic: quinn::Connection,
    pub(super) name: PeerName,
    pub(super) node: NodeId,
    /// Woken when there are messages for the peer or when this connection becomes the current one.
    pub(super) outbox: Notify,
    pub(super) counted: Mutex<Counted>,
    made: Instant,
    halves: AtomicUsize,
    last_use_ms: AtomicU64,
}

/// What of the connection's statistics is in the metrics already.
#[derive(Default)]
pub(super) struct Counted {
    pub(super) sent_bytes: u64,
    pub(super) received_bytes: u64,
    pub(super) sent_packets: u64,
    pub(super) lost_packets: u64,
}

/// Held by each half of a stream: the connection is in use.
pub(super) struct InUse(Arc<Connection>);

impl InUse {
    pub(super) fn new(connection: &Arc<Connection>) -> Self {
        connection.halves.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(connection))
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.touch();
        self.0.halves.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The two streams of messages.
pub(super) struct Greeted {
    send: quinn::SendStream,
    recv: quinn::RecvStream,
}

impl Connection {
    pub(super) fn new(quic: quinn::Connection, name: PeerName) -> Arc<Self> {
        Arc::new(Self {
            node: name.node_id(),
            quic,
            name,
            outbox: Notify::new(),
            counted: Mutex::default(),
            made: Instant::now(),
            halves: AtomicUsize::new(0),
            last_use_ms: AtomicU64::new(0),
        })
    }

    pub(super) fn is_open(&self) -> bool {
        self.quic.close_reason().is_none()
    }

    pub(super) fn touch(&self) {
        let now = u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_use_ms.store(now, Ordering::Relaxed);
    }

    /// Exchanges greetings.
    ///
    /// # Errors
    /// When the peer refuses us, or breaks the protocol.
    pub(super) async fn greet(&self) -> Result<Greeted, ConnectionError> {
        self.try_greet().await.map_err(|error| match self.quic.close_reason() {
            Some(reason) => reason,
            None => {
                CloseCode::Protocol.close(&self.quic);
                error
            }
        })
    }

    async fn try_greet(&self) -> Result<Greeted, ConnectionError> {
        let mut send = self.quic.open_uni().await?;
        // It fails only on a closed stream, which the write reports.
        let _ = send.set_priority(MESSAGE_PRIORITY);
        let sent = send.write_all(&GREETING).await;
        let mut recv = self.quic.accept_uni().await?;
        let mut greeting = [1; GREETING.len()];
        let received = recv.read_exact(&mut greeting).await;
        if sent.is_ok() && received.is_ok() && greeting == GREETING {
            return Ok(Greeted { send, recv });
        }
        Err(ConnectionError::LocallyClosed)
    }

    /// Nothing has used it for `limit`.
    fn unused_for(&self, limit: Duration) -> bool {
        let last = Duration::from_millis(self.last_use_ms.load(Ordering::Relaxed));
        self.halves.load(Ordering::Relaxed) == 0 && self.made.elapsed().saturating_sub(last) >= limit
    }
}

/// Everything that happens on a connection until it ends or the transport stops.
pub(super) async fn run(shared: &Shared, peer: &Peer, connection: &Arc<Connection>, greeted: Greeted) {
    let Some(incoming) = shared.incoming() else { return };
    let work = async {
        tokio::join!(
            receive_messages(connection, greeted.recv, &incoming),
            send_messages(shared, peer, connection, greeted.send),
            accept_streams(connection, &incoming),
            receive_datagrams(shared, connection, &incoming),
            close_unused(shared, peer, connection),
        )
    };
    tokio::select! {
        _ = work => {}
        () = shared.stopped.cancelled() => {}
    }
}

async fn receive_messages(
    connection: &Connection,
    mut stream: quinn::RecvStream,
    incoming: &mpsc::Sender<Incoming>,
) {
    loop {
        match read_frame(&mut stream).await {
            Ok(Some(bytes)) => {
                connection.touch();
                let message = Incoming::Message { from: connection.node, bytes };
                if incoming.send(message).await.is_err() {
                    return;
                }
            }
            // The peer shuts down, or the connection is lost: either way its end is near.
            Ok(None) | Err(None) => return,
            Err(Some(code)) => return code.close(&connection.quic),
        }
    }
}

/// `Ok(None)` at the end of the stream, `Err(None)` when the connection is lost.
async fn read_frame(stream: &mut quinn::RecvStream) -> Result<Option<Bytes>, Option<CloseCode>> {
    let mut head = [0; 4];
    match stream.read_exact(&mut head).await {
        Ok(()) => {}
        Err(quinn::ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(quinn::ReadExactError::FinishedEarly(_)) => return Err(Some(CloseCode::Protocol)),
        Err(quinn::ReadExactError::ReadError(_)) => return Err(None),
    }
    let len = u32::from_be_bytes(head) as usize;
    if len > MAX_MESSAGE_BYTES {
        return Err(Some(CloseCode::Protocol));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await.map_err(|_| None)?;
    Ok(Some(body.into()))
}

/// Writes what waits for the peer while this is its current connection. When the transport closes, writes the
/// rest and waits until the peer has it.
async fn send_messages(shared: &Shared, peer: &Peer, connection: &Connection, mut stream: quinn::SendStream) {
    let _flushing = shared.flushing.token();
    loop {
        let mut frames = peer.next_frames(connection);
        if !frames.is_empty() {
            connection.touch();
            if stream.write_all_chunks(&mut frames).await.is_err() {
                return;
            }
        } else if shared.closing.is_cancelled() {
            // Both fail only when the connection is lost.
            let _ = stream.finish();
            let _ = stream.stopped().await;
            return;
        } else {
            tokio::select! {
                () = connection.outbox.notified() => {}
                () = shared.closing.cancelled() => {}
                _ = connection.quic.closed() => return,
            }
        }
    }
}

async fn accept_streams(connection: &Arc<Connection>, incoming: &mpsc::Sender<Incoming>) {
    while let Ok((send, recv)) = connection.quic.accept_bi().await {
        let (send, recv) = halves::wrap(connection, send, recv);
        if incoming.send(Incoming::Stream { from: connection.node, send, recv }).await.is_err() {
            return;
        }
    }
}

async fn receive_datagrams(shared: &Shared, connection: &Connection, incoming: &mpsc::Sender<Incoming>) {
    while let Ok(bytes) = connection.quic.read_datagram().await {
        connection.touch();
        let datagram = Incoming::Datagram { from: connection.node, bytes };
        if incoming.try_send(datagram).is_err() {
            shared.metrics.dropped(DropReason::IncomingFull, 1);
        }
    }
}

async fn close_unused(shared: &Shared, peer: &Peer, connection: &Arc<Connection>) {
    let unused_close = shared.config.unused_close();
    let pause = REPLACED_LINGER.min(unused_close);
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = connection.quic.closed() => return,
        }
        let limit = if peer.is_current(connection) { unused_close } else { pause };
        if connection.unused_for(limit) {
            CloseCode::Unused.close(&connection.quic);
        }
    }
}

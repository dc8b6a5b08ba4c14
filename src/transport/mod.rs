//! Authenticated streams, messages and datagrams between peers.
//!
//! Invariant: `from` is the node that the other side's certificate proves, never what a message says.
//! This module refuses to know what the bytes mean, and to dial anything but the address it is given.
//!
//! Three services over one connection per pair of nodes:
//! datagrams (gossip: lossy, small, never blocks), messages (claims: reliable and in order while the connection
//! lasts, bounded queue), streams (chunks: bidirectional, flow-controlled).

mod memory;
mod quic;
mod stream;
pub mod tls;

use std::net::SocketAddr;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::content::NodeId;

pub use memory::{MemoryNetwork, MemoryTransport};
pub use quic::{BindError, Config, Metrics, PathStats, QuicTransport};
pub use stream::{DROPPED, FrameError, RecvStream, SendStream, StreamError};

/// Longest datagram in bytes: fits the 1,200-byte packets that every new connection starts with (RFC 9000,
/// section 14), less what QUIC and AEAD add. The same on every path, so that a sender never has to ask.
pub const MAX_DATAGRAM_BYTES: usize = 1_150;

/// Longest message in bytes. Claims are far smaller; a peer that says more is broken or hostile.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// What may wait for one peer in bytes, whatever the number of messages.
const MAX_QUEUED_BYTES: usize = 4 << 20;

/// How to reach a peer. `name` is what its certificate must prove; `node` is `NodeId::from_name(name)`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerAddr {
    pub node: NodeId,
    pub name: String,
    pub addr: SocketAddr,
}

/// What peers send. The transport's owner receives these over one bounded queue: while it is full, datagrams are
/// dropped and counted, streams and messages wait and hold the sender back.
pub enum Incoming {
    Datagram {
        from: NodeId,
        bytes: Bytes,
    },
    Message {
        from: NodeId,
        bytes: Bytes,
    },
    Stream {
        from: NodeId,
        send: SendStream,
        recv: RecvStream,
    },
    /// No connection to this peer is left, and none is being made: the last one ended, or an attempt to make one
    /// failed. Messages that were queued for it are gone. Comes after everything the peer sent before.
    Disconnected {
        from: NodeId,
    },
}

/// The peer network. Two implementations, QUIC and memory, behind one conformance suite
/// (`tests/transport_conformance.rs`).
pub trait Transport: Send + Sync + 'static {
    fn local(&self) -> NodeId;

    /// Best effort. Connects in the background when there is no connection yet.
    ///
    /// # Errors
    /// When the datagram is longer than [`MAX_DATAGRAM_BYTES`] or the transport is closed. Loss is not an error.
    fn send_datagram(&self, to: &PeerAddr, bytes: Bytes) -> Result<(), SendError>;

    /// Queues a message; connects when there is no connection yet. When no connection can be made, the owner
    /// hears [`Incoming::Disconnected`].
    ///
    /// # Errors
    /// [`SendError::QueueFull`] when the peer does not keep up, [`SendError::Unreachable`] when it did not answer
    /// a moment ago, [`SendError::TooLarge`] beyond [`MAX_MESSAGE_BYTES`].
    fn send_message(&self, to: &PeerAddr, bytes: Bytes) -> Result<(), SendError>;

    /// Opens a stream, connecting first if need be, within the transport's connect deadline. The peer hears of the
    /// stream when the first bytes are written.
    ///
    /// # Errors
    /// See [`OpenError`]. A peer that did not answer a moment ago fails at once, without a new attempt.
    fn open<'a>(&'a self, to: &'a PeerAddr) -> BoxFuture<'a, Result<(SendStream, RecvStream), OpenError>>;

    /// Learns who lives at `addr` by connecting to it: for the first contact with a cluster. Any node of this cluster
    /// may answer, also this node itself; nobody else.
    ///
    /// # Errors
    /// See [`OpenError`].
    fn resolve(&self, addr: SocketAddr) -> BoxFuture<'_, Result<PeerAddr, OpenError>>;

    /// Sends what messages are queued (for a second at most), tells peers, closes every connection and returns
    /// when the last packet is out. Streams that are still open are cut. The queue of [`Incoming`] ends.
    fn close(&self) -> BoxFuture<'_, ()>;
}

/// Why nothing was queued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    #[error("the queue to {0} is full")]
    QueueFull(NodeId),
    /// A connection attempt failed and the next one is not due yet.
    #[error("{0} did not answer and is not tried again yet")]
    Unreachable(NodeId),
    #[error("{len} bytes are too many; at most {max} can be sent at once")]
    TooLarge { len: usize, max: usize },
    #[error("the transport is shut down")]
    Closed,
}

/// Why no stream was opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Nobody answers there.
    #[error("{peer} at {addr} cannot be reached: {reason}")]
    Unreachable { peer: String, addr: SocketAddr, reason: String },
    /// Somebody answers who cannot prove to be `peer`, or who does not accept this node's proof.
    #[error("{addr} is not {peer} of this cluster: {reason}")]
    NotAuthentic { peer: String, addr: SocketAddr, reason: String },
    #[error("the transport is shut down")]
    Closed,
}

//! What is known of one peer: its connections, the dial that is under way, what waits for it.
//!
//! Normally there is one connection. When both sides dial at once there may be two for a while: the newest is the
//! current one, the other stays until nothing uses it.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::connection::Connection;
use super::metrics::DropReason;
use crate::transport::{MAX_QUEUED_BYTES, OpenError};

/// Connections to one peer at once: two from dialling at once, two from before the peer restarted.
const MAX_CONNECTIONS: usize = 4;

/// Datagrams that wait for a connection: gossip's first words to a peer, which would otherwise be lost.
const MAX_WAITING_DATAGRAMS: usize = 16;

/// What is taken from the outbox for one write.
const MAX_WRITE_BYTES: usize = 128 << 10;

/// Pauses between failed dials double from the first to the last.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LAST_BACKOFF: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct Peer {
    state: Mutex<State>,
    /// A dial ended or a connection was made.
    pub(super) changed: Notify,
}

#[derive(Default)]
struct State {
    /// Newest last.
    live: Vec<Arc<Connection>>,
    dial: Option<SocketAddr>,
    failure: Option<Failure>,
    failures: u32,
    outbox: VecDeque<Bytes>,
    outbox_bytes: usize,
    datagrams: VecDeque<Bytes>,
}

struct Failure {
    error: OpenError,
    retry_at: Instant,
}

/// How the peer can be reached now.
pub(super) enum Link {
    Up(Arc<Connection>),
    /// A dial is under way; `true` when the caller is to make it.
    Dialling {
        yours: bool,
    },
    /// It failed a moment ago.
    Failed(OpenError),
}

/// What became of a message.
pub(super) enum Posted {
    /// `dial`: the caller is to make the connection.
    Queued {
        dial: bool,
    },
    Full,
    Unreachable,
}

/// What became of a datagram.
pub(super) enum Thrown {
    Sent,
    /// It waits; `dial`: the caller is to make the connection.
    Held {
        dial: bool,
    },
    Dropped(DropReason),
}

/// What became of what waited for a peer.
pub(super) struct Abandoned {
    pub(super) messages: usize,
    pub(super) datagrams: usize,
    /// No connection is left.
    pub(super) disconnected: bool,
}

impl Peer {
    /// The current connection, or the dial that will make one.
    pub(super) fn link(&self, addr: SocketAddr) -> Link {
        self.state.lock().link(addr)
    }

    /// Queues a message and says who must dial, in one step: no dial can end between the two.
    pub(super) fn post(&self, addr: SocketAddr, bytes: Bytes, max_messages: usize) -> Posted {
        let mut state = self.state.lock();
        if state.outbox.len() >= max_messages || state.outbox_bytes + bytes.len() > MAX_QUEUED_BYTES {
            return Posted::Full;
        }
        let posted = match state.link(addr) {
            Link::Failed(_) => return Posted::Unreachable,
            Link::Up(current) => {
                current.outbox.notify_one();
                Posted::Queued { dial: false }
            }
            Link::Dialling { yours } => Posted::Queued { dial: yours },
        };
        state.outbox_bytes += bytes.len();
        state.outbox.push_back(bytes);
        posted
    }

    /// Sends a datagram, or keeps it for the connection that is being made, in one step.
    pub(super) fn throw(&self, addr: SocketAddr, bytes: Bytes) -> Thrown {
        let mut state = self.state.lock();
        match state.link(addr) {
            Link::Failed(_) => Thrown::Dropped(DropReason::NotConnected),
            Link::Up(current) => {
                current.touch();
                current
                    .quic
                    .send_datagram(bytes)
                    .map_or(Thrown::Dropped(DropReason::Refused), |()| Thrown::Sent)
            }
            Link::Dialling { .. } if state.datagrams.len() >= MAX_WAITING_DATAGRAMS => {
                Thrown::Dropped(DropReason::NotConnected)
            }
            Link::Dialling { yours } => {
                state.datagrams.push_back(bytes);
                Thrown::Held { dial: yours }
            }
        }
    }

    /// A connection that this node made: any dial has ended. Never refused, the caller asked for it.
    pub(super) fn dialled(&self, connection: &Arc<Connection>) {
        let mut state = self.state.lock();
        state.dial = None;
        self.add(&mut state, connection);
    }

    /// A connection that the peer made. `false` when there are too many.
    pub(super) fn accepted(&self, connection: &Arc<Connection>) -> bool {
        let mut state = self.state.lock();
        let admitted = state.live.len() < MAX_CONNECTIONS;
        if admitted {
            self.add(&mut state, connection);
        }
        admitted
    }

    fn add(&self, state: &mut State, connection: &Arc<Connection>) {
        state.live.push(Arc::clone(connection));
        state.failure = None;
        state.failures = 0;
        for bytes in state.datagrams.drain(..) {
            // Refused only when the connection has ended already; datagrams may be lost.
            let _ = connection.quic.send_datagram(bytes);
        }
        connection.outbox.notify_one();
        self.changed.notify_waiters();
    }

    /// Whether a dial of ours to `addr` is under way.
    pub(super) fn is_dialling(&self, addr: SocketAddr) -> bool {
        self.state.lock().dial.is_some_and(|to| same_address(to, addr))
    }

    /// Ends a dial that brought no connection, because the peer's own is to be used. `true` when it is there.
    pub(super) fn dial_superseded(&self) -> bool {
        let mut state = self.state.lock();
        let superseded = state.current().is_some();
        if superseded {
            state.dial = None;
        }
        superseded
    }

    /// Ends a dial that failed: what waited is given up, and the next dial has to wait.
    pub(super) fn dial_failed(&self, error: OpenError) -> Abandoned {
        let mut state = self.state.lock();
        state.dial = None;
        let doubled = FIRST_BACKOFF.saturating_mul(1 << state.failures.min(16)).min(LAST_BACKOFF);
        // Up to half less, so that many nodes do not come back to one at the same instant.
        let backoff = doubled.mul_f64(1.0 - rand::random::<f64>() / 2.0);
        state.failures += 1;
        state.failure = Some(Failure { error, retry_at: Instant::now() + backoff });
        self.changed.notify_waiters();
        if state.current().is_some() {
            return Abandoned { messages: 0, datagrams: 0, disconnected: false };
        }
        state.abandon()
    }

    /// Forgets a connection that ended. What waits goes to another one, if there is one or will be.
    pub(super) fn ended(&self, connection: &Arc<Connection>) -> Abandoned {
        let mut state = self.state.lock();
        state.live.retain(|live| !Arc::ptr_eq(live, connection));
        if let Some(current) = state.current() {
            current.outbox.notify_one();
        }
        if state.live.is_empty() && state.dial.is_none() {
            return state.abandon();
        }
        Abandoned { messages: 0, datagrams: 0, disconnected: false }
    }

    /// Takes messages as frames, if `connection` is the one to carry them.
    pub(super) fn next_frames(&self, connection: &Connection) -> Vec<Bytes> {
        let mut state = self.state.lock();
        let mut frames = Vec::new();
        if !state.is_current(connection) {
            return frames;
        }
        let mut taken = 0;
        while taken < MAX_WRITE_BYTES {
            let Some(message) = state.outbox.pop_front() else { break };
            let len = u32::try_from(message.len()).expect("messages are limited to 1 MiB when queued");
            taken += message.len();
            frames.push(Bytes::copy_from_slice(&len.to_be_bytes()));
            frames.push(message);
        }
        state.outbox_bytes -= taken;
        frames
    }

    pub(super) fn is_current(&self, connection: &Connection) -> bool {
        self.state.lock().is_current(connection)
    }

    pub(super) fn connections(&self) -> Vec<Arc<Connection>> {
        self.state.lock().live.clone()
    }

    pub(super) fn outbox_bytes(&self) -> usize {
        self.state.lock().outbox_bytes
    }

    /// Nothing worth remembering is left.
    pub(super) fn is_forgettable(&self) -> bool {
        let state = self.state.lock();
        let waiting = state.failure.as_ref().is_some_and(|f| f.retry_at + LAST_BACKOFF > Instant::now());
        state.live.is_empty() && state.dial.is_none() && !waiting
    }
}

impl State {
    fn link(&mut self, addr: SocketAddr) -> Link {
        if let Some(current) = self.current() {
            return Link::Up(Arc::clone(current));
        }
        if self.dial.is_some() {
            return Link::Dialling { yours: false };
        }
        if let Some(failure) = self.failure.as_ref().filter(|f| f.retry_at > Instant::now()) {
            return Link::Failed(failure.error.clone());
        }
        self.dial = Some(addr);
        Link::Dialling { yours: true }
    }

    fn current(&self) -> Option<&Arc<Connection>> {
        self.live.iter().rfind(|connection| connection.is_open())
    }

    fn is_current(&self, connection: &Connection) -> bool {
        self.current().is_some_and(|current| std::ptr::eq(Arc::as_ptr(current), connection))
    }

    fn abandon(&mut self) -> Abandoned {
        let abandoned =
            Abandoned { messages: self.outbox.len(), datagrams: self.datagrams.len(), disconnected: true };
        self.outbox.clear();
        self.outbox_bytes = 0;
        self.datagrams.clear();
        abandoned
    }
}

/// A socket for both families shows IPv4 peers as mapped IPv6 addresses.
pub(super) fn same_address(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port() && a.ip().to_canonical() == b.ip().to_canonical()
}

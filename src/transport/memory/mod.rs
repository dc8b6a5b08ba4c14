//! The transport inside one process: for tests of everything that talks to peers, and for simulations that want
//! tasks instead of states. Same rules as QUIC (sizes, bounds, back-pressure, order), no cryptography, and a network
//! that can lose datagrams and be cut.
//!
//! Invariant: the same seed and the same calls in the same order lose the same datagrams.

mod link;
mod pipe;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{
    Incoming, MAX_DATAGRAM_BYTES, MAX_MESSAGE_BYTES, OpenError, PeerAddr, RecvStream, SendError, SendStream,
    Transport,
};
use crate::content::NodeId;
use link::Link;

/// How long closing waits for queued messages, as with QUIC.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Nodes that can reach each other, unless a link is cut.
pub struct MemoryNetwork {
    state: Mutex<State>,
}

struct State {
    members: HashMap<SocketAddr, Arc<Member>>,
    links: HashMap<(SocketAddr, SocketAddr), Arc<Link>>,
    cut: HashSet<(NodeId, NodeId)>,
    loss: f64,
    rng: StdRng,
    joined: u32,
}

/// A node while it lives.
struct Member {
    addr: PeerAddr,
    incoming: Mutex<Option<mpsc::Sender<Incoming>>>,
    /// Peers whose failed dial the owner has not heard of yet.
    failed: Mutex<HashSet<NodeId>>,
    closed: CancellationToken,
    tasks: TaskTracker,
}

/// One node's end of a [`MemoryNetwork`].
pub struct MemoryTransport {
    network: Arc<MemoryNetwork>,
    member: Arc<Member>,
}

impl MemoryNetwork {
    #[must_use]
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                members: HashMap::new(),
                links: HashMap::new(),
                cut: HashSet::new(),
                loss: 0.0,
                rng: StdRng::seed_from_u64(seed),
                joined: 0,
            }),
        })
    }

    /// Adds a node at an address of its own. `incoming_queue`: what may wait for its owner. Call inside a tokio
    /// runtime.
    pub fn join(
        self: &Arc<Self>,
        name: &str,
        incoming_queue: usize,
    ) -> (Arc<MemoryTransport>, mpsc::Receiver<Incoming>) {
        let (sender, receiver) = mpsc::channel(incoming_queue.max(1));
        let mut state = self.state.lock();
        state.joined += 1;
        let [_, high, middle, low] = state.joined.to_be_bytes();
        let addr = PeerAddr {
            node: NodeId::from_name(name),
            name: name.to_owned(),
            addr: SocketAddr::from(([10, high, middle, low], 5103)),
        };
        let member = Arc::new(Member {
            addr: addr.clone(),
            incoming: Mutex::new(Some(sender)),
            failed: Mutex::default(),
            closed: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        state.members.insert(addr.addr, Arc::clone(&member));
        (Arc::new(MemoryTransport { network: Arc::clone(self), member }), receiver)
    }

    /// Share of datagrams that are lost from now on, 0 to 1.
    pub fn set_loss(&self, share: f64) {
        self.state.lock().loss = share.clamp(0.0, 1.0);
    }

    /// Cuts the link between two nodes: what is under way is lost, and neither reaches the other.
    pub fn cut(&self, a: NodeId, b: NodeId) {
        let mut state = self.state.lock();
        state.cut.insert(pair(a, b));
        state.lose(|x, y| pair(x, y) == pair(a, b));
    }

    /// Cuts every link between `island` and the other nodes that are there now.
    pub fn partition(&self, island: &[NodeId]) {
        let mut state = self.state.lock();
        let nodes: Vec<NodeId> = state.members.values().map(|member| member.addr.node).collect();
        for inside in &nodes {
            for outside in &nodes {
                if island.contains(inside) && !island.contains(outside) {
                    state.cut.insert(pair(*inside, *outside));
                }
            }
        }
        state.lose(|x, y| island.contains(&x) != island.contains(&y));
    }

    /// Mends every link.
    pub fn heal(&self) {
        self.state.lock().cut.clear();
    }

    /// The link from `from` to `to`, made now if need be.
    fn link(&self, from: &Arc<Member>, to: &PeerAddr) -> Result<Arc<Link>, OpenError> {
        let unreachable = |reason: &str| OpenError::Unreachable {
            peer: to.name.clone(),
            addr: to.addr,
            reason: reason.to_owned(),
        };
        let mut state = self.state.lock();
        if from.closed.is_cancelled() {
            return Err(OpenError::Closed);
        }
        let there = state.members.get(&to.addr).cloned().ok_or_else(|| unreachable("nobody is there"))?;
        if state.cut.contains(&pair(from.addr.node, to.node)) {
            return Err(unreachable("the link is cut"));
        }
        if (there.addr.node, &there.addr.name) != (to.node, &to.name) || there.addr.node == from.addr.node {
            return Err(OpenError::NotAuthentic {
                peer: to.name.clone(),
                addr: to.addr,
                reason: format!("{} answers there", there.addr.name),
            });
        }
        let ends = [Arc::clone(from), there];
        let link = state.links.entry(pair(from.addr.addr, to.addr)).or_insert_with(|| Link::make(ends));
        Ok(Arc::clone(link))
    }

    /// Takes a node off the network; yields its links.
    fn leave(&self, member: &Member) -> Vec<Arc<Link>> {
        let mut state = self.state.lock();
        state.members.remove(&member.addr.addr);
        let addr = member.addr.addr;
        state.links.extract_if(|(a, b), _| *a == addr || *b == addr).map(|(_, link)| link).collect()
    }
}

impl State {
    fn lose(&mut self, is_cut: impl Fn(NodeId, NodeId) -> bool) {
        self.links.retain(|_, link| {
            let cut = is_cut(link.ends[0].addr.node, link.ends[1].addr.node);
            if cut {
                link.lost.cancel();
            }
            !cut
        });
    }
}

impl Member {
    /// Waits while the owner's queue is full.
    async fn tell(&self, incoming: Incoming) {
        let sender = self.incoming.lock().clone();
        if let Some(sender) = sender {
            tokio::select! {
                // A node that closes hears nothing more, not even that its links end.
                biased;
                () = self.closed.cancelled() => {}
                // Nobody listens any more: nobody needs to know.
                _ = sender.send(incoming) => {}
            }
        }
    }

    /// Tells the owner that `peer` could not be reached, once until it has taken notice.
    fn dial_failed(self: &Arc<Self>, peer: NodeId) {
        if self.failed.lock().insert(peer) {
            let member = Arc::clone(self);
            self.tasks.spawn(async move {
                member.tell(Incoming::Disconnected { from: peer }).await;
                member.failed.lock().remove(&peer);
            });
        }
    }
}

impl MemoryTransport {
    /// Where this node can be reached.
    #[must_use]
    pub fn addr(&self) -> PeerAddr {
        self.member.addr.clone()
    }

    fn check(&self, len: usize, max: usize) -> Result<(), SendError> {
        if self.member.closed.is_cancelled() {
            return Err(SendError::Closed);
        }
        if len > max { Err(SendError::TooLarge { len, max }) } else { Ok(()) }
    }
}

impl Transport for MemoryTransport {
    fn local(&self) -> NodeId {
        self.member.addr.node
    }

    fn send_datagram(&self, to: &PeerAddr, bytes: Bytes) -> Result<(), SendError> {
        self.check(bytes.len(), MAX_DATAGRAM_BYTES)?;
        let Ok(link) = self.network.link(&self.member, to) else {
            self.member.dial_failed(to.node);
            return Ok(());
        };
        let lost = {
            let mut state = self.network.state.lock();
            let loss = state.loss;
            state.rng.random_bool(loss)
        };
        if !lost {
            let there = &link.ends[1 - link.side(&self.member)];
            let sender = there.incoming.lock().clone();
            // A full queue drops datagrams.
            let _ = sender.map(|s| s.try_send(Incoming::Datagram { from: self.member.addr.node, bytes }));
        }
        Ok(())
    }

    fn send_message(&self, to: &PeerAddr, bytes: Bytes) -> Result<(), SendError> {
        self.check(bytes.len(), MAX_MESSAGE_BYTES)?;
        if self.member.failed.lock().contains(&to.node) {
            return Err(SendError::Unreachable(to.node));
        }
        let Ok(link) = self.network.link(&self.member, to) else {
            self.member.dial_failed(to.node);
            return Ok(());
        };
        let outbox = &link.directions[link.side(&self.member)].outbox;
        if outbox.push_message(bytes) { Ok(()) } else { Err(SendError::QueueFull(to.node)) }
    }

    fn open<'a>(&'a self, to: &'a PeerAddr) -> BoxFuture<'a, Result<(SendStream, RecvStream), OpenError>> {
        Box::pin(async move {
            let link = self.network.link(&self.member, to).inspect_err(|error| {
                if !matches!(error, OpenError::Closed) {
                    self.member.dial_failed(to.node);
                }
            })?;
            let direction = &link.directions[link.side(&self.member)];
            let permit =
                Arc::clone(&direction.streams).acquire_owned().await.map_err(|_| OpenError::Closed)?;
            Ok(pipe::stream(&link.lost, Arc::clone(&direction.outbox), permit))
        })
    }

    fn resolve(&self, addr: SocketAddr) -> BoxFuture<'_, Result<PeerAddr, OpenError>> {
        Box::pin(async move {
            let there = self.network.state.lock().members.get(&addr).map(|member| member.addr.clone());
            let to = there.ok_or_else(|| OpenError::Unreachable {
                peer: "some node".into(),
                addr,
                reason: "nobody is there".into(),
            })?;
            if to.node != self.local() {
                self.network.link(&self.member, &to)?;
            }
            Ok(to)
        })
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let links = self.network.leave(&self.member);
            let flushed = async {
                for link in &links {
                    link.closing.cancel();
                    link.delivering.close();
                    link.delivering.wait().await;
                }
            };
            // Late messages are lost, as they would be with the node.
            let _ = timeout(FLUSH_TIMEOUT, flushed).await;
            self.member.closed.cancel();
            // Links that this node's own tasks made while the messages were flushed.
            let late = self.network.leave(&self.member);
            links.iter().chain(&late).for_each(|link| link.lost.cancel());
            self.member.tasks.close();
            self.member.tasks.wait().await;
            self.member.incoming.lock().take();
        })
    }
}

impl Drop for MemoryTransport {
    /// Without `close` the node is gone as if it had been killed.
    fn drop(&mut self) {
        self.member.closed.cancel();
        self.network.leave(&self.member).iter().for_each(|link| link.lost.cancel());
        self.member.incoming.lock().take();
    }
}

/// Both orders of two are the same pair.
fn pair<T: Ord>(a: T, b: T) -> (T, T) {
    if a <= b { (a, b) } else { (b, a) }
}

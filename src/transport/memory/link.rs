//! The connection between two nodes of a memory network, and what waits to cross it.
//!
//! Invariant: each direction is carried by one task, so messages and streams arrive in the order they were sent,
//! and the disconnection after them.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Member;
use crate::transport::{Incoming, MAX_QUEUED_BYTES, RecvStream, SendStream};

/// Messages that may wait for one peer, as QUIC's default.
const MAX_QUEUED_MESSAGES: usize = 1_024;

/// Streams that one side may have open, as with QUIC.
const MAX_STREAMS: usize = 256;

pub(super) enum Item {
    Message(Bytes),
    Stream(SendStream, RecvStream),
}

/// What waits to cross in one direction. Streams are bounded by their permits.
#[derive(Default)]
pub(super) struct Outbox {
    queue: Mutex<Queue>,
    ready: Notify,
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Item>,
    messages: usize,
    bytes: usize,
}

impl Outbox {
    /// `false` when it is full.
    pub(super) fn push_message(&self, bytes: Bytes) -> bool {
        let mut queue = self.queue.lock();
        if queue.messages >= MAX_QUEUED_MESSAGES || queue.bytes + bytes.len() > MAX_QUEUED_BYTES {
            return false;
        }
        queue.messages += 1;
        queue.bytes += bytes.len();
        queue.items.push_back(Item::Message(bytes));
        self.ready.notify_one();
        true
    }

    pub(super) fn push_stream(&self, stream: Item) {
        self.queue.lock().items.push_back(stream);
        self.ready.notify_one();
    }

    fn pop(&self) -> Option<Item> {
        let mut queue = self.queue.lock();
        let item = queue.items.pop_front();
        if let Some(Item::Message(bytes)) = &item {
            queue.messages -= 1;
            queue.bytes -= bytes.len();
        }
        item
    }
}

/// One direction of a link.
pub(super) struct Direction {
    pub(super) outbox: Arc<Outbox>,
    pub(super) streams: Arc<Semaphore>,
}

/// Both directions; `ends[i]` sends with `directions[i]`.
pub(super) struct Link {
    pub(super) ends: [Arc<Member>; 2],
    pub(super) directions: [Direction; 2],
    /// Deliver what is queued; nothing new comes.
    pub(super) closing: CancellationToken,
    pub(super) lost: CancellationToken,
    /// Tokens of directions that still deliver.
    pub(super) delivering: TaskTracker,
}

impl Link {
    pub(super) fn make(ends: [Arc<Member>; 2]) -> Arc<Self> {
        let direction =
            || Direction { outbox: Arc::default(), streams: Arc::new(Semaphore::new(MAX_STREAMS)) };
        let link = Arc::new(Self {
            ends,
            directions: [direction(), direction()],
            closing: CancellationToken::new(),
            lost: CancellationToken::new(),
            delivering: TaskTracker::new(),
        });
        for sender in [0, 1] {
            let receiver = Arc::clone(&link.ends[1 - sender]);
            receiver.tasks.spawn(Arc::clone(&link).carry(sender));
        }
        link
    }

    /// Which end `member` is.
    pub(super) fn side(&self, member: &Arc<Member>) -> usize {
        usize::from(!Arc::ptr_eq(&self.ends[0], member))
    }

    async fn carry(self: Arc<Self>, sender: usize) {
        let (from, to) = (self.ends[sender].addr.node, &self.ends[1 - sender]);
        let delivering = self.delivering.token();
        tokio::select! {
            () = self.deliver(sender) => {}
            () = self.lost.cancelled() => {}
        }
        drop(delivering);
        self.lost.cancelled().await;
        to.tell(Incoming::Disconnected { from }).await;
    }

    /// Ends when everything was delivered that was queued before closing.
    async fn deliver(&self, sender: usize) {
        let (from, to) = (self.ends[sender].addr.node, &self.ends[1 - sender]);
        let outbox = &self.directions[sender].outbox;
        loop {
            match outbox.pop() {
                Some(Item::Message(bytes)) => to.tell(Incoming::Message { from, bytes }).await,
                Some(Item::Stream(send, recv)) => to.tell(Incoming::Stream { from, send, recv }).await,
                None if self.closing.is_cancelled() => return,
                None => tokio::select! {
                    () = outbox.ready.notified() => {}
                    () = self.closing.cancelled() => {}
                },
            }
        }
    }
}

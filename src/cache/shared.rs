//! What every part of the cache can reach.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::content::{ContentKey, NodeId};
use crate::store::Store;
use crate::swarm::membership::PeerBook;
use crate::transport::{PeerAddr, Transport};

use super::Config;
use super::driver::Command;
use super::metrics::Metrics;
use super::open::Open;
use super::take::{JUDGED_MAX, Takings};

/// Owned by the [`Cache`](super::Cache) handles, the driver and every open content.
pub(super) struct Shared {
    pub(super) config: Config,
    pub(super) store: Store,
    pub(super) transport: Arc<dyn Transport>,
    pub(super) peers: watch::Receiver<PeerBook>,
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) metrics: Metrics,
    pub(super) tasks: TaskTracker,
    pub(super) shutdown: CancellationToken,
    contents: Mutex<BTreeMap<ContentKey, Weak<Open>>>,
    /// Contents whose demand changed since the driver last looked. At most one entry per open content.
    dirty: Mutex<BTreeSet<ContentKey>>,
    /// Uploads that ended since the driver last looked.
    ended_uploads: AtomicU32,
    /// Something above is not empty.
    pub(super) dirtied: Notify,
    /// This node leaves: it takes over nothing.
    parting: AtomicBool,
    pub(super) takings: Takings,
    pub(super) judging: Arc<Semaphore>,
}

impl Shared {
    pub(super) fn new(
        config: Config,
        store: Store,
        transport: Arc<dyn Transport>,
        peers: watch::Receiver<PeerBook>,
        commands: mpsc::Sender<Command>,
        metrics: Metrics,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            config,
            store,
            transport,
            peers,
            commands,
            metrics,
            tasks: TaskTracker::new(),
            shutdown,
            contents: Mutex::default(),
            dirty: Mutex::default(),
            ended_uploads: AtomicU32::new(0),
            dirtied: Notify::new(),
            parting: AtomicBool::new(false),
            takings: Takings::default(),
            judging: Arc::new(Semaphore::new(JUDGED_MAX)),
        }
    }

    pub(super) fn mark_dirty(&self, key: ContentKey) {
        self.dirty.lock().insert(key);
        self.dirtied.notify_one();
    }

    pub(super) fn take_dirty(&self) -> BTreeSet<ContentKey> {
        std::mem::take(&mut *self.dirty.lock())
    }

    pub(super) fn end_upload(&self) {
        self.ended_uploads.fetch_add(1, Ordering::AcqRel);
        self.dirtied.notify_one();
    }

    pub(super) fn take_ended_uploads(&self) -> u32 {
        self.ended_uploads.swap(0, Ordering::AcqRel)
    }

    pub(super) fn begin_parting(&self) {
        self.parting.store(true, Ordering::Release);
    }

    pub(super) fn is_parting(&self) -> bool {
        self.parting.load(Ordering::Acquire)
    }

    pub(super) fn opened(&self, key: ContentKey) -> Option<Arc<Open>> {
        self.contents.lock().get(&key).and_then(Weak::upgrade)
    }

    /// The content under `key`, made by `make` when nobody has it open.
    pub(super) fn open_with(&self, key: ContentKey, make: impl FnOnce() -> Arc<Open>) -> Arc<Open> {
        let mut contents = self.contents.lock();
        if let Some(open) = contents.get(&key).and_then(Weak::upgrade) {
            return open;
        }
        let open = make();
        contents.insert(key, Arc::downgrade(&open));
        open
    }

    /// Forgets a content that nobody has open any more.
    pub(super) fn forget(&self, key: ContentKey) {
        let mut contents = self.contents.lock();
        if contents.get(&key).is_some_and(|open| open.strong_count() == 0) {
            contents.remove(&key);
        }
    }

    /// The zone of a peer, for metrics: zones are few, names of nodes are not.
    pub(super) fn zone_of(&self, node: NodeId) -> String {
        let peers = self.peers.borrow();
        peers.identities.get(&node).map_or_else(String::new, |identity| identity.zone.to_string())
    }

    pub(super) fn all_open(&self) -> Vec<Arc<Open>> {
        self.contents.lock().values().filter_map(Weak::upgrade).collect()
    }

    pub(super) fn address(&self, node: NodeId) -> Option<PeerAddr> {
        let peers = self.peers.borrow();
        let identity = peers.identities.get(&node)?;
        Some(PeerAddr { node, name: identity.name().to_owned(), addr: identity.addr })
    }
}

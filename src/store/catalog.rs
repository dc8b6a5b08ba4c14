//! Which contents there are, who is using them, and which one has to go.
//!
//! A content is *warm* while somebody holds its entry and for a while after; else *cold*: a row without a file
//! descriptor. Invariant: an `Arc<Entry>` is handed out only under the catalog's lock, so an entry whose only
//! `Arc` is the catalog's is used by nobody, and only such a content is evicted; nor is one that a peer is fetching and
//! that nobody else is known to have.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::broadcast;

use super::disk;
use super::elsewhere::{Does, Elsewhere};
use super::entry::{Entry, LoadError};
use super::error::CreateError;
use super::index::Row;
use super::room::{Reservation, Shortage};
use super::shared::Shared;
use super::{Summary, now_ms};
use crate::content::{ChunkSet, ContentId, ContentKey, Layout, NodeId};

/// An entry that nobody has used for so long gives its file descriptor and its attestations back.
const IDLE: Duration = Duration::from_secs(60);

/// After an eviction that freed nothing on the file system (its blocks are shared with a placed file, or somebody
/// else fills the disk faster) the floor evicts nothing for so long: it would empty the cache in vain.
const FUTILE_PAUSE: Duration = Duration::from_secs(10);

/// Losses a subscriber may lag behind before it is told to look at the whole list instead.
const LOSSES_MAX: usize = 1_024;

/// Larger contents are evicted by parts: an image layer is of little use without its end, most of a checkpoint is.
const WHOLE_MAX_BYTES: u64 = 1 << 30;

/// A part is this fraction of [`WHOLE_MAX_BYTES`]: one sync for 256 MiB.
const PARTS: u64 = 4;

/// What is no longer here, for withdrawing announcements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loss {
    /// All of it: evicted, or found unusable.
    Content(ContentKey),
    /// These chunks: evicted, or found corrupt.
    Chunks(ContentKey, ChunkSet),
}

/// All contents.
#[derive(Debug)]
pub(super) struct Catalog {
    slots: Mutex<HashMap<ContentKey, Slot>>,
    /// Of contents that peers were seen with; locked after `slots`.
    elsewhere: Mutex<HashMap<ContentKey, Elsewhere>>,
    /// One evicts at a time, so that several writers do not each free what one of them needs.
    evicting: Mutex<Option<Instant>>,
    losses: broadcast::Sender<Loss>,
    /// A content of more bytes than this is evicted by parts.
    pub(super) whole_max_bytes: AtomicU64,
}

#[derive(Debug)]
enum Slot {
    Cold(Cold),
    Warm(Arc<Entry>),
}

/// A content that nobody uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cold {
    pub row: Row,
    /// Chunks whose digest was not checked since the start.
    pub unverified: ChunkSet,
    /// Bytes of chunks that an earlier run wrote and did not see durable.
    pub doubtful_bytes: u64,
}

impl Cold {
    /// As a start finds it. Whatever vouches for the row, no chunk is served in this run before its digest was checked.
    pub(super) fn found(row: Row, doubtful_bytes: u64) -> Self {
        Self { unverified: row.have.clone(), row, doubtful_bytes }
    }

    pub(super) fn stored_bytes(&self) -> u64 {
        self.row.have.bytes(&self.row.layout) + self.doubtful_bytes
    }

    /// Whether forgetting it would lose anything.
    fn stores_something(&self) -> bool {
        self.row.stores_something() || self.doubtful_bytes > 0
    }
}

impl Slot {
    fn last_used_ms(&self) -> u64 {
        match self {
            Self::Cold(cold) => cold.row.last_used_ms,
            Self::Warm(entry) => entry.last_used_ms(),
        }
    }

    fn stored_bytes(&self) -> u64 {
        match self {
            Self::Cold(cold) => cold.stored_bytes(),
            Self::Warm(entry) => entry.stored_bytes(),
        }
    }

    fn is_in_doubt(&self) -> bool {
        match self {
            Self::Cold(cold) => cold.doubtful_bytes > 0,
            Self::Warm(entry) => entry.is_in_doubt(),
        }
    }

    fn may_go(&self) -> bool {
        match self {
            Self::Cold(cold) => !cold.row.is_pinned(now_ms()),
            Self::Warm(entry) => Arc::strong_count(entry) == 1 && !entry.is_pinned(),
        }
    }
}

impl Catalog {
    pub(super) fn new(found: impl IntoIterator<Item = (ContentKey, Cold)>) -> Self {
        let slots = found.into_iter().map(|(key, cold)| (key, Slot::Cold(cold))).collect();
        Self {
            slots: Mutex::new(slots),
            elsewhere: Mutex::default(),
            evicting: Mutex::new(None),
            losses: broadcast::channel(LOSSES_MAX).0,
            whole_max_bytes: AtomicU64::new(WHOLE_MAX_BYTES),
        }
    }

    pub(super) fn losses(&self) -> broadcast::Receiver<Loss> {
        self.losses.subscribe()
    }

    pub(super) fn lose(&self, loss: Loss) {
        // Nobody may be listening.
        let _ = self.losses.send(loss);
    }

    /// The contents' rows as the index should have them.
    pub(super) fn rows(&self) -> Vec<(ContentKey, Row)> {
        let slots = self.slots.lock();
        let row = |slot: &Slot| match slot {
            Slot::Cold(cold) => cold.row.clone(),
            Slot::Warm(entry) => entry.row(),
        };
        slots.iter().map(|(key, slot)| (*key, row(slot))).filter(|(_, row)| row.stores_something()).collect()
    }

    /// Contents with chunks in doubt.
    pub(super) fn in_doubt(&self) -> Vec<ContentKey> {
        let slots = self.slots.lock();
        slots.iter().filter(|(_, slot)| slot.is_in_doubt()).map(|(key, _)| *key).collect()
    }

    pub(super) fn warm(&self) -> Vec<Arc<Entry>> {
        let slots = self.slots.lock();
        slots
            .values()
            .filter_map(|slot| match slot {
                Slot::Warm(entry) => Some(Arc::clone(entry)),
                Slot::Cold(_) => None,
            })
            .collect()
    }

    /// Lets go of every entry: they hold the store, and the catalog is in it.
    pub(super) fn clear(&self) {
        self.slots.lock().clear();
    }

    pub(super) fn keys(&self) -> Vec<ContentKey> {
        self.slots.lock().keys().copied().collect()
    }

    /// `peer` was seen to ask for a chunk of a stored content, or to give one.
    pub(super) fn note_peer(&self, key: &ContentKey, peer: NodeId, does: Does) {
        let slots = self.slots.lock();
        if slots.contains_key(key) {
            self.elsewhere.lock().entry(*key).or_default().note(peer, does, now_ms());
        }
    }

    /// The content that is given up next, and how many bytes it has: by how long nobody used it, and how many others
    /// have it.
    fn victim(&self) -> Option<(ContentKey, u64)> {
        let now_ms = now_ms();
        let (slots, elsewhere) = (self.slots.lock(), self.elsewhere.lock());
        let weighed = slots.iter().filter(|(_, slot)| slot.may_go() && slot.stored_bytes() > 0).filter_map(
            |(key, slot)| {
                let idle_ms = now_ms.saturating_sub(slot.last_used_ms());
                match elsewhere.get(key) {
                    Some(known) if known.needs_us(now_ms) => None,
                    Some(known) => Some((known.weight(idle_ms, now_ms), key, slot)),
                    None => Some((idle_ms, key, slot)),
                }
            },
        );
        let (_, key, slot) = weighed.max_by_key(|(weight, ..)| *weight)?;
        Some((*key, slot.stored_bytes()))
    }

    /// The entry if it is warm, else what is needed to warm it.
    fn look_up(&self, key: &ContentKey) -> Option<Result<Arc<Entry>, Cold>> {
        match self.slots.lock().get(key)? {
            Slot::Warm(entry) => Some(Ok(Arc::clone(entry))),
            Slot::Cold(cold) => Some(Err(cold.clone())),
        }
    }
}

impl Shared {
    /// The content's entry, read from its sidecar if it was cold.
    ///
    /// # Errors
    /// When the sidecar cannot be read now, though it may be there.
    pub(super) fn find(self: &Arc<Self>, key: &ContentKey) -> io::Result<Option<Arc<Entry>>> {
        loop {
            let cold = match self.catalog.look_up(key) {
                Some(Ok(entry)) => return Ok(Some(entry)),
                Some(Err(cold)) => cold,
                None => return Ok(None),
            };
            let loaded = Entry::load(self, key, &cold);
            let mut slots = self.catalog.slots.lock();
            let Some(slot) = slots.get_mut(key) else { return Ok(None) };
            match (&*slot, loaded) {
                (Slot::Cold(now), Ok(entry)) if *now == cold => {
                    self.room.release_stored(cold.stored_bytes());
                    self.room.add_stored(entry.stored_bytes());
                    let entry = Arc::new(entry);
                    *slot = Slot::Warm(Arc::clone(&entry));
                    return Ok(Some(entry));
                }
                (_, Err(LoadError::Disk(error))) => {
                    if self.load_warning.is_due() {
                        tracing::warn!(content = %key.hex(), %error, "a stored content cannot be read now");
                    }
                    return Err(error);
                }
                (Slot::Cold(now), Err(LoadError::Unusable(error))) if *now == cold => {
                    tracing::warn!(content = %key.hex(), error, "a stored content is unusable and is discarded");
                    let grave = self.take_out(&mut slots, key);
                    drop(slots);
                    if let Some(grave) = grave {
                        self.dir.delete(&grave);
                        return Ok(None);
                    }
                    return Err(io::Error::other("it is unusable and cannot be discarded"));
                }
                // Somebody was faster; look again.
                _ => {}
            }
        }
    }

    /// [`find`](Self::find) for who can do without.
    pub(super) fn get(self: &Arc<Self>, key: &ContentKey) -> Option<Arc<Entry>> {
        self.find(key).ok().flatten()
    }

    /// The content's entry; a fresh one if it is not stored.
    pub(super) fn create(
        self: &Arc<Self>,
        id: &ContentId,
        layout: Layout,
    ) -> Result<Arc<Entry>, CreateError> {
        let key = id.key(layout.chunk_bytes());
        loop {
            let found = self.find(&key).map_err(|source| CreateError::Io { name: id.to_string(), source })?;
            if let Some(entry) = found {
                if entry.layout() == layout {
                    return Ok(entry);
                }
                self.retire_wrong_size(entry, layout)?;
            }
            let mut slots = self.catalog.slots.lock();
            if slots.contains_key(&key) {
                continue;
            }
            let entry = Arc::new(Entry::fresh(self, id.clone(), key, layout));
            slots.insert(key, Slot::Warm(Arc::clone(&entry)));
            self.metrics.contents.set(slots.len() as u64);
            return Ok(entry);
        }
    }

    /// Everything that is stored. Reads the sidecars of cold contents.
    pub(super) fn list(self: &Arc<Self>) -> Vec<Summary> {
        let keys = self.catalog.keys();
        keys.iter().filter_map(|key| self.get(key)).map(|entry| entry.summary()).collect()
    }

    /// Sets `bytes` aside for writing, evicting what it takes.
    pub(super) fn reserve(self: &Arc<Self>, bytes: u64) -> Result<Reservation<'_>, String> {
        if bytes > self.room.usage().budget_bytes {
            return Err(format!("one chunk of {bytes} bytes is larger than store.budget; raise it"));
        }
        if let Ok(reservation) = self.room.reserve(bytes, self.free_bytes()?) {
            return Ok(reservation);
        }
        let mut futile_since = self.catalog.evicting.lock();
        loop {
            let free = self.free_bytes()?;
            let shortage = match self.room.reserve(bytes, free) {
                Ok(reservation) => return Ok(reservation),
                Err(shortage) => shortage,
            };
            let paused = futile_since.is_some_and(|since| since.elapsed() < FUTILE_PAUSE);
            if (shortage == Shortage::Floor && paused) || !self.evict_one() {
                return Err(self.explain(shortage, free));
            }
            if shortage == Shortage::Floor {
                *futile_since = (self.free_bytes()? <= free).then(Instant::now);
            }
        }
    }

    /// Makes entries cold that nobody has used for a while, and forgets those that store nothing.
    pub(super) fn cool_down(&self, now_ms: u64) {
        let mut graves = Vec::new();
        let mut slots = self.catalog.slots.lock();
        let idle: Vec<(ContentKey, Cold)> = slots
            .iter()
            .filter_map(|(key, slot)| match slot {
                Slot::Warm(entry) if entry.is_idle(now_ms, IDLE) && Arc::strong_count(entry) == 1 => {
                    Some((*key, entry.cold()))
                }
                _ => None,
            })
            .collect();
        for (key, cold) in idle {
            if cold.stores_something() {
                self.index.put(key, cold.row.clone());
                slots.insert(key, Slot::Cold(cold));
            } else {
                graves.extend(self.take_out(&mut slots, &key));
            }
        }
        drop(slots);
        graves.iter().for_each(|grave| self.dir.delete(grave));
    }

    fn free_bytes(&self) -> Result<u64, String> {
        disk::free_bytes(self.dir.root()).map_err(|error| format!("free space is unknown: {error}"))
    }

    fn explain(&self, shortage: Shortage, free: u64) -> String {
        match shortage {
            Shortage::Budget => format!(
                "all {} bytes of store.budget are in use and nothing can be evicted; raise it, or unpin contents",
                self.room.usage().budget_bytes
            ),
            Shortage::Floor => format!(
                "{free} bytes are free on the file system of {}, store.free_floor keeps {}, and evicting does not \
                 help; free some space",
                self.dir.root().display(),
                self.room.usage().free_floor_bytes
            ),
        }
    }

    /// Evicts the content that costs least to lose, or a part of it if it is large; false when there is none.
    pub(super) fn evict_one(self: &Arc<Self>) -> bool {
        let Some((key, bytes)) = self.catalog.victim() else { return false };
        let is_large = bytes > self.catalog.whole_max_bytes.load(Ordering::Relaxed);
        (is_large && self.evict_part(&key)) || self.evict_whole(&key)
    }

    fn evict_whole(&self, key: &ContentKey) -> bool {
        let mut slots = self.catalog.slots.lock();
        let Some(bytes) = slots.get(key).filter(|slot| slot.may_go()).map(Slot::stored_bytes) else {
            // Somebody began to use it; the next one will do.
            drop(slots);
            return self.catalog.victim().is_some();
        };
        let Some(grave) = self.take_out(&mut slots, key) else { return false };
        drop(slots);
        self.metrics.evictions.inc();
        self.metrics.evicted_bytes.inc_by(bytes);
        tracing::debug!(content = %key.hex(), bytes, "evicted");
        self.dir.delete(&grave);
        true
    }

    /// A checkpoint that lacks its last chunks is worth almost what it was; one that is gone is fetched again whole.
    fn evict_part(self: &Arc<Self>, key: &ContentKey) -> bool {
        let Some(entry) = self.get(key) else { return false };
        let part = self.catalog.whole_max_bytes.load(Ordering::Relaxed) / PARTS;
        match entry.give_up_tail(part) {
            Ok(0) => false,
            Ok(bytes) => {
                self.metrics.partial_evictions.inc();
                self.metrics.evicted_bytes.inc_by(bytes);
                tracing::debug!(content = %key.hex(), bytes, "evicted in part");
                true
            }
            Err(error) => {
                tracing::warn!(content = %key.hex(), %error, "a content could not be evicted in part");
                false
            }
        }
    }

    /// Removes a content from every list and from its place on disk; what is returned is to be deleted.
    fn take_out(&self, slots: &mut HashMap<ContentKey, Slot>, key: &ContentKey) -> Option<PathBuf> {
        // Under the lock, so that a new entry of the same name finds its place free.
        let grave = match self.dir.discard(&self.dir.content(key)) {
            Ok(grave) => grave,
            Err(error) => {
                tracing::warn!(content = %key.hex(), %error, "a content could not be discarded");
                return None;
            }
        };
        self.catalog.elsewhere.lock().remove(key);
        if let Some(slot) = slots.remove(key) {
            self.room.release_stored(slot.stored_bytes());
        }
        self.metrics.contents.set(slots.len() as u64);
        self.index.remove(*key);
        self.catalog.lose(Loss::Content(*key));
        Some(grave)
    }

    /// A content whose announced size changed: the partial one gives way, a sealed or used one does not.
    fn retire_wrong_size(&self, entry: Arc<Entry>, asked: Layout) -> Result<(), CreateError> {
        let conflict = CreateError::SizeConflict {
            name: entry.id().to_string(),
            held_bytes: entry.layout().size(),
            asked_bytes: asked.size(),
        };
        let key = *entry.key();
        let sealed = entry.is_sealed();
        drop(entry);
        let mut slots = self.catalog.slots.lock();
        match slots.get(&key) {
            Some(slot) if sealed || !slot.may_go() => Err(conflict),
            None => Ok(()),
            Some(_) => {
                let grave = self.take_out(&mut slots, &key);
                drop(slots);
                grave.map(|grave| self.dir.delete(&grave)).ok_or(conflict)
            }
        }
    }
}

//! Chunks on disk: one sparse file per content, a sidecar that describes it, an index that can be rebuilt.
//!
//! Invariants: no byte leaves that was not verified against its attestation, on its way in and at its first use after
//! a start. A chunk is durable before its sidecar says so, and its sidecar before the index. Neither the budget nor
//! the floor of free space is crossed. What the disk refuses is passed through, never an error that fails a pull.
//!
//! The rooms: `entry` is one content, `catalog` all of them; `sidecar` the format that outlives us, `scan` and `index`
//! two ways to find out what is there; `pool`, `syncer` and `scrub` the only threads; `pin` what stays, `elsewhere` what others have; `room` the account; `place` the way to a
//! user's path; `disk` and `data_dir` the system calls, `spare` the memory for what they read;
//! `shared` holds them together.
//!
//! This module refuses to fetch anything and to know peers: it is told bytes and asked for bytes.

mod catalog;
mod config;
mod data_dir;
mod disk;
mod elsewhere;
mod entry;
mod error;
mod index;
mod metrics;
mod pin;
mod place;
mod pool;
mod room;
mod scan;
mod scrub;
mod shared;
mod sidecar;
mod spare;
mod syncer;
#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use tokio::sync::broadcast;

pub use catalog::Loss;
pub use config::Config;
pub use entry::{Entry, Expect, READ_MAX_BYTES};
pub use error::{CreateError, InsertError, OpenError, PlaceError, ReadError, SealError};
pub use metrics::Metrics;
pub use pin::{Pin, PinName, PinNameError};
pub use place::{Method, Owner, PlaceOptions, Placement};

use self::disk::Disk;
use self::elsewhere::Does;
use self::metrics::Lane;
use self::shared::Shared;
use crate::content::{ChunkSet, ContentId, ContentKey, Layout, NodeId};

/// All contents on this node. Cloning shares it; [`close`](Self::close) it before the last clone goes.
#[derive(Clone, Debug)]
pub struct Store {
    handle: Arc<Handle>,
}

/// One content as [`Store::list`] shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    pub id: ContentId,
    pub key: ContentKey,
    pub layout: Layout,
    /// Chunks that can be read.
    pub have: ChunkSet,
    pub sealed: bool,
    /// By command or lease.
    pub pin: Pin,
    /// By `store.pins`.
    pub configured_pin: bool,
    /// Milliseconds since the Unix epoch.
    pub last_used_ms: u64,
}

/// The store's bytes and their bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub stored_bytes: u64,
    pub budget_bytes: u64,
    pub free_floor_bytes: u64,
}

impl Store {
    /// Takes the data directory and finds out what is in it. Blocking; after a crash it reads every sidecar.
    ///
    /// # Errors
    /// Each names the path and the cure.
    pub fn open(config: Config, metrics: Metrics) -> Result<Self, OpenError> {
        Self::open_on(Disk::default(), &config, metrics)
    }

    /// One pass of the scrubber, here and now.
    #[cfg(test)]
    pub(crate) fn scrub(&self) {
        self.handle.shared.scrub_all();
    }

    fn open_on(disk: Disk, config: &Config, metrics: Metrics) -> Result<Self, OpenError> {
        let shared = Shared::open(disk, config, metrics)?;
        Ok(Self { handle: Arc::new(Handle { shared, closed: AtomicBool::new(false) }) })
    }

    /// The content's entry, if anything of it is stored. While it is held the content is not evicted.
    ///
    /// A content not used since the start (or for long) has its sidecar read: one small file.
    #[must_use]
    pub fn get(&self, key: &ContentKey) -> Option<Arc<Entry>> {
        let entry = self.handle.shared.get(key)?;
        entry.touch();
        Some(entry)
    }

    /// The content's entry, empty if nothing of it is stored yet. Writes nothing.
    ///
    /// # Errors
    /// [`CreateError::SizeConflict`] when it is stored, or being read, with another size.
    pub fn create(&self, id: &ContentId, layout: Layout) -> Result<Arc<Entry>, CreateError> {
        if self.handle.closed.load(Ordering::Acquire) {
            return Err(CreateError::Closed);
        }
        let entry = self.handle.shared.create(id, layout)?;
        entry.touch();
        Ok(entry)
    }

    /// Everything that is stored, in no order. Reads the sidecars of contents not used lately: may block.
    #[must_use]
    pub fn list(&self) -> Vec<Summary> {
        self.handle.shared.list()
    }

    /// What is durably stored, as the memory has it: never blocks. A content whose files are gone shows up all the same.
    #[must_use]
    pub fn held(&self) -> Vec<(ContentKey, Layout, ChunkSet)> {
        let rows = self.handle.shared.catalog.rows().into_iter();
        rows.map(|(key, row)| (key, row.layout, row.have)).collect()
    }

    /// Contents with chunks that may be here although [`held`](Self::held) lacks them: a killed process wrote them and
    /// did not see them durable.
    #[must_use]
    pub fn in_doubt(&self) -> Vec<ContentKey> {
        self.handle.shared.catalog.in_doubt()
    }

    /// [`Entry::settle`] for a content of which nobody has the entry; returns that, if anything of it is stored.
    pub async fn settle(&self, key: &ContentKey) -> Option<Arc<Entry>> {
        let (shared, key) = (Arc::clone(&self.handle.shared), *key);
        let entry = self.handle.shared.pool.run(Lane::Read, move || shared.get(&key)).await.ok()??;
        entry.settle().await;
        Some(entry)
    }

    /// `peer` asks for a chunk of the content: while nobody else is known to have it, it is not evicted.
    pub fn peer_asks(&self, key: &ContentKey, peer: NodeId) {
        self.handle.shared.catalog.note_peer(key, peer, Does::Ask);
    }

    /// `peer` gave a chunk of the content: it costs less to lose than one that nobody else is known to have.
    pub fn peer_gave(&self, key: &ContentKey, peer: NodeId) {
        self.handle.shared.catalog.note_peer(key, peer, Does::Give);
    }

    /// What is evicted or found corrupt, as it happens. Who lags more than 1,024 behind gets an error and should
    /// compare with [`list`](Self::list).
    #[must_use]
    pub fn losses(&self) -> broadcast::Receiver<Loss> {
        self.handle.shared.catalog.losses()
    }

    #[must_use]
    pub fn usage(&self) -> Usage {
        self.handle.shared.room.usage()
    }

    /// Whether files can be placed in `dir`, and how: asks the file system by trying, before a byte is fetched.
    /// Creates `dir` if it is missing. `bytes` is the size of everything that is to be placed there.
    ///
    /// # Errors
    /// Says what is wrong with the directory. [`PlaceError::TooSmall`] only when a second copy would be needed.
    pub async fn check_destination(
        &self,
        dir: &Path,
        bytes: u64,
        options: PlaceOptions,
    ) -> Result<Method, PlaceError> {
        let (shared, dir) = (Arc::clone(&self.handle.shared), dir.to_owned());
        let job = move || shared.check_destination(&dir, bytes, options);
        self.handle.shared.pool.run(Lane::Write, job).await?
    }

    /// Makes everything written so far durable. Blocking.
    ///
    /// # Errors
    /// The first that the disk reported; all contents were tried.
    pub fn flush(&self) -> io::Result<()> {
        self.handle.shared.flush()
    }

    /// Finishes what is queued, makes everything durable and leaves the mark of a clean shutdown, so that the next
    /// start is fast. Entries still held answer `Closed` from now on. Blocking; a second call does nothing.
    ///
    /// # Errors
    /// When something could not be made durable. The store is closed all the same; the next start scans.
    pub fn close(&self) -> io::Result<()> {
        if self.handle.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.handle.shared.close()
    }
}

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    closed: AtomicBool,
}

/// Without [`Store::close`]: ends as a crash would, except that the threads are gone when this returns.
impl Drop for Handle {
    fn drop(&mut self) {
        if !*self.closed.get_mut() {
            self.shared.abandon();
        }
    }
}

fn now_ms() -> u64 {
    unix_ms(SystemTime::now())
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

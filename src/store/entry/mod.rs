//! One content: its chunks, who attested them, and the way from bytes in memory to bytes on disk.
//!
//! ```text
//! insert: claim the chunk → hash → reserve room → pwritev → note in the sidecar → readable
//!         → … → fdatasync data → held in the sidecar → index
//! ```
//!
//! Invariant: a chunk is in `have` only after its bytes were written with the attested digest; its sidecar says so
//! only after the bytes are durable, and the index only after the sidecar is. A chunk that leaves goes the other way.
//! Public methods are async and do nothing but queue work for the pool (or wait for the syncer).

mod doubt;
mod hash;
mod insert;
mod log;
mod read;
mod seal;
mod sync;

use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, oneshot};

pub use insert::Expect;
pub use read::READ_MAX_BYTES;
pub(super) use read::slices;

use self::hash::WholeHash;
use self::log::Log;
use super::Summary;
use super::catalog::{Cold, Loss};
use super::disk;
use super::index::Row;
use super::pin::Pin;
use super::shared::Shared;
use super::sidecar::{Claims, Record, Sidecar};
use crate::content::{Attestation, ChunkIndex, ChunkSet, ContentId, ContentKey, Layout};

/// A content in the store. While an `Arc` of it is held outside the store it counts as being read and is not evicted.
#[derive(Debug)]
pub struct Entry {
    shared: Arc<Shared>,
    id: ContentId,
    key: ContentKey,
    layout: Layout,
    dir: PathBuf,
    /// Pinned by the configuration.
    configured: bool,
    last_used_ms: AtomicU64,
    state: Mutex<State>,
    /// Somebody finished with a chunk that was being written or removed.
    settled: Notify,
    data: Mutex<DataFile>,
    /// Shared by those who write into the data file, exclusive for who replaces it.
    writing: RwLock<()>,
    log: Log,
    /// One sync at a time, so that records reach the log in the order in which they were taken.
    syncing: Mutex<()>,
    whole: Mutex<WholeHash>,
}

#[derive(Debug, Default)]
struct DataFile {
    open: Option<Arc<File>>,
    /// A file that once existed is not created again: its zeros would pass for stored bytes.
    exists: bool,
    /// It took another's name, and a crash may yet bring that one back.
    name_is_new: bool,
}

#[derive(Debug, Default)]
struct State {
    /// Readable now.
    have: ChunkSet,
    /// The part of `have` that the sidecar claims.
    durable: ChunkSet,
    /// The part of `have` whose digest was not checked since the start.
    unverified: ChunkSet,
    /// Chunks that an earlier run wrote and did not see durable: disjoint from `have`, not readable.
    doubts: HashMap<ChunkIndex, Attestation>,
    /// Being written or punched out; nobody else may touch these chunks' bytes.
    busy: ChunkSet,
    attestations: HashMap<ChunkIndex, Attestation>,
    sealed: bool,
    pin: Pin,
    /// Counts removals, so that who reads without the lock notices one.
    removals: u64,
    /// Records that the sidecar lacks, in order.
    pending: Vec<Record>,
    pending_bytes: u64,
    /// Value of `removals` when `Record::Sealed` went into `pending`.
    seal_pending: Option<u64>,
    waiters: Vec<oneshot::Sender<Result<(), Arc<io::Error>>>>,
}

/// Why a stored content cannot be used.
pub(super) enum LoadError {
    /// It never can again.
    Unusable(String),
    /// Not now: no descriptor, no memory, no permission.
    Disk(io::Error),
}

impl From<io::Error> for LoadError {
    fn from(error: io::Error) -> Self {
        let gone = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
        if gone || disk::is_lost(&error) { Self::Unusable(error.to_string()) } else { Self::Disk(error) }
    }
}

impl Entry {
    /// A content of which nothing is stored yet. Touches no disk.
    pub(super) fn fresh(shared: &Arc<Shared>, id: ContentId, key: ContentKey, layout: Layout) -> Self {
        Self::new(shared, id, key, layout, State::default(), super::now_ms(), 0)
    }

    /// A content that was stored before.
    pub(super) fn load(shared: &Arc<Shared>, key: &ContentKey, cold: &Cold) -> Result<Self, LoadError> {
        let dir = shared.dir.content(key);
        let bytes = shared.disk.read_file(&dir.join("sidecar"))?;
        let sidecar = Sidecar::parse(&bytes).map_err(|error| LoadError::Unusable(error.to_string()))?;
        if sidecar.key != *key || sidecar.layout != cold.row.layout {
            return Err(LoadError::Unusable("the sidecar is another content's".to_owned()));
        }
        let Claims { have, attestations, doubts, sealed, pin } = sidecar.claims;
        // A damaged log, or one that says more than the row, is not believed.
        let is_new = |chunk: &ChunkIndex| !cold.row.have.contains(*chunk);
        let doubtful =
            |chunk: &ChunkIndex| sidecar.damaged > 0 || is_new(chunk) || cold.unverified.contains(*chunk);
        let unverified = have.iter().filter(doubtful).collect();
        let state = State {
            durable: have.clone(),
            have,
            unverified,
            attestations,
            doubts,
            sealed,
            pin,
            ..State::default()
        };
        let (id, layout, end) = (sidecar.id, sidecar.layout, sidecar.end);
        Ok(Self::new(shared, id, *key, layout, state, cold.row.last_used_ms, end))
    }

    fn new(
        shared: &Arc<Shared>,
        id: ContentId,
        key: ContentKey,
        layout: Layout,
        state: State,
        last_used_ms: u64,
        sidecar_end: u64,
    ) -> Self {
        Self {
            dir: shared.dir.content(&key),
            configured: shared.pins.name(&id),
            whole: Mutex::new(WholeHash::of(&id)),
            log: Log::new(sidecar_end, !shared.after_crash),
            shared: Arc::clone(shared),
            id,
            key,
            layout,
            last_used_ms: AtomicU64::new(last_used_ms),
            state: Mutex::new(state),
            settled: Notify::new(),
            data: Mutex::new(DataFile { exists: sidecar_end > 0, ..DataFile::default() }),
            writing: RwLock::new(()),
            syncing: Mutex::new(()),
        }
    }

    #[must_use]
    pub const fn id(&self) -> &ContentId {
        &self.id
    }

    #[must_use]
    pub const fn key(&self) -> &ContentKey {
        &self.key
    }

    #[must_use]
    pub const fn layout(&self) -> Layout {
        self.layout
    }

    /// The chunks that can be read now.
    #[must_use]
    pub fn have(&self) -> ChunkSet {
        self.state.lock().have.clone()
    }

    /// Whether `chunk` can be read now.
    #[must_use]
    pub fn holds(&self, chunk: ChunkIndex) -> bool {
        self.state.lock().have.contains(chunk)
    }

    /// Whether every chunk is held, the whole was verified, and that is durable.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.state.lock().sealed
    }

    /// Whether eviction passes this content by just now.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.configured || self.pin().holds(super::now_ms())
    }

    /// What was asked of this content by command or lease.
    #[must_use]
    pub fn pin(&self) -> Pin {
        self.state.lock().pin
    }

    /// The digest of a held chunk and the node that vouched for it.
    #[must_use]
    pub fn attestation(&self, chunk: ChunkIndex) -> Option<Attestation> {
        self.state.lock().attestations.get(&chunk).copied()
    }

    /// When it was last handed out, read or written, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn last_used_ms(&self) -> u64 {
        self.last_used_ms.load(Ordering::Relaxed)
    }

    pub(super) fn touch(&self) {
        self.last_used_ms.store(super::now_ms(), Ordering::Relaxed);
    }

    pub(super) fn is_idle(&self, now_ms: u64, idle: Duration) -> bool {
        u128::from(now_ms.saturating_sub(self.last_used_ms())) >= idle.as_millis()
    }

    /// As [`Store::list`](super::Store::list) shows it.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let state = self.state.lock();
        Summary {
            id: self.id.clone(),
            key: self.key,
            layout: self.layout,
            have: state.have.clone(),
            sealed: state.sealed,
            pin: state.pin,
            configured_pin: self.configured,
            last_used_ms: self.last_used_ms(),
        }
    }

    /// What the index may say: durable chunks only.
    pub(super) fn row(&self) -> Row {
        let state = self.state.lock();
        Row {
            layout: self.layout,
            have: state.durable.clone(),
            sealed: state.sealed,
            pin: state.pin,
            configured: self.configured,
            last_used_ms: self.last_used_ms(),
        }
    }

    pub(super) fn cold(&self) -> Cold {
        let (row, doubtful_bytes) = (self.row(), self.doubtful_bytes());
        Cold { row, unverified: self.state.lock().unverified.clone(), doubtful_bytes }
    }

    /// Bytes of chunks that lie on the disk, in doubt or not.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.have().bytes(&self.layout) + self.doubtful_bytes()
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(super) fn data_path(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The data file, opened, and created sparse at its full size if it never existed.
    pub(super) fn data(&self) -> io::Result<Arc<File>> {
        let mut data = self.data.lock();
        if let Some(file) = &data.open {
            return Ok(Arc::clone(file));
        }
        let path = self.data_path();
        if !data.exists {
            self.shared.disk.make_dir(&self.dir)?;
        } else if !path.exists() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let file = match self.shared.disk.open(&path) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && data.exists => {
                open_placed(&path)?
            }
            opened => opened?,
        };
        if !data.exists {
            self.shared.disk.resize(&file, self.layout.size())?;
        }
        let file = Arc::new(file);
        *data = DataFile { open: Some(Arc::clone(&file)), exists: true, name_is_new: false };
        Ok(file)
    }

    /// Puts `file`, already under the data file's name, in the old one's place. Nothing is written into it before
    /// [`name_data`](Self::name_data) succeeded.
    fn replace_data(&self, file: File) {
        *self.data.lock() = DataFile { open: Some(Arc::new(file)), exists: true, name_is_new: true };
    }

    /// Makes the data file's name durable, if that is still to be done.
    fn name_data(&self) -> io::Result<()> {
        if self.data.lock().name_is_new {
            self.shared.disk.sync_dir(&self.dir)?;
            self.data.lock().name_is_new = false;
        }
        Ok(())
    }

    fn dir(&self) -> &Path {
        &self.dir
    }

    /// Takes `chunk` out of what is held because its stored bytes are not what they should be. The room its bytes
    /// take is given back once the sidecar no longer claims them.
    fn drop_chunk(self: &Arc<Self>, chunk: ChunkIndex) {
        if self.state.lock().take_out(chunk) {
            self.shared.room.release_stored(self.layout.chunk_range(chunk).len());
            self.shared.catalog.lose(Loss::Chunks(self.key, [chunk].into_iter().collect()));
            self.shared.syncer.soon(self);
        }
    }
}

/// A file that was placed by hard link is read-only, for us too unless we are root. Writable again once it is ours
/// alone; until then nobody writes into it.
fn open_placed(path: &Path) -> io::Result<File> {
    if fs::metadata(path)?.nlink() > 1 {
        return File::open(path);
    }
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    File::options().read(true).write(true).open(path)
}

impl State {
    /// Makes `chunk` readable and plans its record. Returns how many bytes wait for a sync.
    fn hold(&mut self, chunk: ChunkIndex, attestation: Attestation, bytes: u64) -> u64 {
        self.have.insert(chunk);
        self.attestations.insert(chunk, attestation);
        self.pending.push(Record::Held(chunk, attestation));
        self.pending_bytes += bytes;
        self.pending_bytes
    }

    /// `true` when the chunk was held, or in doubt. Records the removal for the sidecar.
    fn take_out(&mut self, chunk: ChunkIndex) -> bool {
        if self.doubts.remove(&chunk).is_some() {
            self.pending.push(Record::Dropped(chunk));
            return true;
        }
        if !self.have.remove(chunk) {
            return false;
        }
        self.durable.remove(chunk);
        self.unverified.remove(chunk);
        self.attestations.remove(&chunk);
        self.sealed = false;
        self.removals += 1;
        self.pending.retain(|record| !matches!(record, Record::Held(held, _) if *held == chunk));
        self.pending.push(Record::Dropped(chunk));
        true
    }
}

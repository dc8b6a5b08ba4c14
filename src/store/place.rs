//! From the store to a path a user named: one copy on disk where the file system can, and never a half file.
//!
//! The bytes take the name at the destination only by a rename, once all of them are there and durable. Methods are
//! tried in the order of what they cost: reflink (shares blocks, stays independent), hard link (shares the file,
//! hence read-only), a copy inside the kernel, a copy through memory.
//! This module refuses to place what is not sealed.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::disk;
use super::entry::{Entry, slices};
use super::error::{PlaceError, ReadError};
use super::metrics::Lane;
use super::shared::Shared;
use crate::content::ByteRange;

/// Copied, or verified, in one go before other jobs get the thread.
const TURN_BYTES: u64 = 64 << 20;

/// How a file is placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlaceOptions {
    /// Permission bits of the placed file; a hard link loses the write bits.
    pub mode: u32,
    /// Whom the placed file belongs to; this process unless given. A file that is somebody else's is never a hard
    /// link: its owner could make it writable, and change the store's copy.
    pub owner: Option<Owner>,
    /// Whether the destination may be the same file as the store's. It is made read-only then; who may write it all
    /// the same (root) would change the store's copy too, which the store notices only at the next start.
    pub allow_hard_link: bool,
}

/// Numeric, for the daemon may have no list of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

impl PlaceOptions {
    fn may_hard_link(&self) -> bool {
        self.allow_hard_link && self.owner.is_none()
    }
}

impl Default for PlaceOptions {
    fn default() -> Self {
        Self { mode: 0o644, owner: None, allow_hard_link: true }
    }
}

/// How the bytes came to their destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Shares blocks with the store, takes no further room.
    Reflink,
    /// Is the store's file, takes no further room.
    HardLink,
    /// `copy_file_range`: a second copy, made inside the kernel.
    KernelCopy,
    /// A second copy, through memory.
    Copy,
}

impl Method {
    /// Whether the bytes are on disk once more.
    #[must_use]
    pub const fn takes_room(self) -> bool {
        matches!(self, Self::KernelCopy | Self::Copy)
    }
}

/// A placed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    pub method: Method,
    /// Size of the file.
    pub bytes: u64,
}

impl Entry {
    /// Places the sealed content at `destination`, replacing a file there; missing directories are created.
    ///
    /// # Errors
    /// The destination is as it was, and nothing is left beside it.
    pub async fn place(
        self: &Arc<Self>,
        destination: &Path,
        options: PlaceOptions,
    ) -> Result<Placement, PlaceError> {
        self.touch();
        let busy = Busy::claim(self.shared(), destination)?;
        let turns = self.shared().place_turns.acquire().await.map_err(|_| PlaceError::Closed)?;
        self.verify_before_placing().await?;
        let job = Job { entry: Arc::clone(self), destination: destination.to_owned(), options };
        let mut step = self.on_pool(move || job.start()).await?;
        let placement = loop {
            match step {
                Step::Copying(copy) => step = self.on_pool(move || copy.turn()).await?,
                Step::Placed(placement) => break placement,
            }
        };
        drop((turns, busy));
        Ok(placement)
    }

    async fn on_pool<T: Send + 'static>(
        self: &Arc<Self>,
        job: impl FnOnce() -> Result<T, PlaceError> + Send + 'static,
    ) -> Result<T, PlaceError> {
        self.shared().pool.run(Lane::Write, job).await?
    }

    /// After a clean shutdown the disk is believed; after a crash every chunk is hashed once more first.
    async fn verify_before_placing(self: &Arc<Self>) -> Result<(), PlaceError> {
        if !self.is_sealed() {
            return Err(PlaceError::NotSealed);
        }
        while self.shared().after_crash {
            let entry = Arc::clone(self);
            let turn = self.shared().pool.run(Lane::Write, move || entry.verify_some(TURN_BYTES)).await?;
            match turn {
                Ok(true) => break,
                Ok(false) => {}
                Err(ReadError::Corrupt(chunk)) => return Err(PlaceError::Corrupt(chunk)),
                Err(ReadError::Io { path, source }) => return Err(io_error("reading", &path, source)),
                Err(_) => return Err(PlaceError::NotSealed),
            }
        }
        Ok(())
    }
}

impl Shared {
    /// See [`Store::check_destination`](super::Store::check_destination).
    pub(super) fn check_destination(
        &self,
        dir: &Path,
        bytes: u64,
        options: PlaceOptions,
    ) -> Result<Method, PlaceError> {
        make_destination(dir)?;
        let probe = Temporary::in_dir(dir, Path::new("probe"));
        let there = probe.create()?;
        give_away(&there, dir, options.owner)?;
        let method = self.probe_method(&probe, &there, options).map_err(|error| explain(dir, error))?;
        if method.takes_room() {
            check_room(dir, bytes)?;
        }
        Ok(method)
    }

    fn probe_method(&self, there: &Temporary, file: &File, options: PlaceOptions) -> io::Result<Method> {
        let source = self.dir.root().join("format");
        let here = File::open(&source)?;
        if rustix::fs::ioctl_ficlone(file, &here).is_ok() {
            return Ok(Method::Reflink);
        }
        fs::remove_file(&there.path)?;
        if options.may_hard_link() && fs::hard_link(&source, &there.path).is_ok() {
            return Ok(Method::HardLink);
        }
        let same = here.metadata()?.dev() == file.metadata()?.dev();
        Ok(if same { Method::KernelCopy } else { Method::Copy })
    }
}

/// One placement.
struct Job {
    entry: Arc<Entry>,
    destination: PathBuf,
    options: PlaceOptions,
}

enum Step {
    Copying(Box<Copying>),
    Placed(Placement),
}

impl Job {
    fn start(self) -> Result<Step, PlaceError> {
        let dir = parent(&self.destination)?;
        if self.destination.is_dir() {
            return Err(bad(&self.destination, "it is a directory; name the file"));
        }
        make_destination(dir)?;
        let temporary = Temporary::in_dir(dir, &self.destination);
        let source =
            self.entry.data().map_err(|error| io_error("opening", &self.entry.data_path(), error))?;
        let target = temporary.create()?;
        if rustix::fs::ioctl_ficlone(&target, &*source).is_ok() {
            return self.finish(Method::Reflink, &target, &temporary).map(Step::Placed);
        }
        if self.options.may_hard_link() && self.hard_link(&temporary) {
            return self.finish(Method::HardLink, &source, &temporary).map(Step::Placed);
        }
        check_room(dir, self.entry.layout().size())?;
        // An attempt to link may have taken the file away.
        let target = temporary.create()?;
        let copying = Copying { job: self, temporary, source, target, at: 0, method: Method::KernelCopy };
        Ok(Step::Copying(Box::new(copying)))
    }

    fn hard_link(&self, temporary: &Temporary) -> bool {
        fs::remove_file(&temporary.path).is_ok()
            && fs::hard_link(self.entry.data_path(), &temporary.path).is_ok()
    }

    fn finish(&self, method: Method, file: &File, temporary: &Temporary) -> Result<Placement, PlaceError> {
        let mode = match method {
            Method::HardLink => self.options.mode & !0o222,
            _ => self.options.mode,
        };
        give_away(file, &self.destination, self.options.owner)?;
        let durable = file
            .set_permissions(Permissions::from_mode(mode & 0o7777))
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&temporary.path, &self.destination))
            .and_then(|()| File::open(&temporary.dir)?.sync_all());
        durable.map_err(|error| explain(&self.destination, error))?;
        Ok(Placement { method, bytes: self.entry.layout().size() })
    }
}

/// A copy under way.
struct Copying {
    job: Job,
    temporary: Temporary,
    source: Arc<File>,
    target: File,
    at: u64,
    method: Method,
}

impl Copying {
    fn turn(mut self: Box<Self>) -> Result<Step, PlaceError> {
        let size = self.job.entry.layout().size();
        let turn = ByteRange::new(self.at, (self.at + TURN_BYTES).min(size));
        if self.method == Method::KernelCopy && !self.copy_in_kernel(turn)? {
            self.method = Method::Copy;
        }
        if self.method == Method::Copy {
            self.copy_through_memory(turn)?;
        }
        // Synced turn by turn, so that no turn holds its thread for the whole file's write-back.
        self.target.sync_data().map_err(|error| explain(&self.job.destination, error))?;
        self.at = turn.end();
        if self.at < size {
            return Ok(Step::Copying(self));
        }
        self.job.finish(self.method, &self.target, &self.temporary).map(Step::Placed)
    }

    /// False when the kernel does not copy between these two files; a part may have been copied then.
    fn copy_in_kernel(&self, range: ByteRange) -> Result<bool, PlaceError> {
        let (mut from, mut to) = (range.start(), range.start());
        while from < range.end() {
            let left = usize::try_from(range.end() - from).unwrap_or(usize::MAX);
            let copied = rustix::fs::copy_file_range(
                &*self.source,
                Some(&mut from),
                &self.target,
                Some(&mut to),
                left,
            );
            match copied {
                Ok(0) => return Ok(false),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) => {
                    return Ok(false);
                }
                Err(errno) => return Err(explain(&self.job.destination, errno.into())),
            }
        }
        Ok(true)
    }

    fn copy_through_memory(&self, range: ByteRange) -> Result<(), PlaceError> {
        for slice in slices(range) {
            let bytes = self.job.entry.read_now(slice).map_err(|error| match error {
                ReadError::Corrupt(chunk) => PlaceError::Corrupt(chunk),
                ReadError::Io { path, source } => io_error("reading", &path, source),
                _ => PlaceError::NotSealed,
            })?;
            self.target
                .write_all_at(&bytes, slice.start())
                .map_err(|error| explain(&self.job.destination, error))?;
        }
        Ok(())
    }
}

/// A file under a name that nobody looks for, gone when this is dropped (unless it was renamed).
struct Temporary {
    dir: PathBuf,
    path: PathBuf,
}

impl Temporary {
    /// The same destination always gets the same name, so that what a killed daemon left is found and replaced.
    fn in_dir(dir: &Path, destination: &Path) -> Self {
        let name = blake3::hash(destination.as_os_str().as_encoded_bytes()).to_hex();
        Self { dir: dir.to_owned(), path: dir.join(format!(".windlass-{}.tmp", &name[..16])) }
    }

    fn create(&self) -> Result<File, PlaceError> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(explain(&self.dir, error)),
            _ => {}
        }
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.path)
            .map_err(|error| explain(&self.dir, error))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Renamed away in the good case.
        let _ = fs::remove_file(&self.path);
    }
}

/// One placement per destination at a time.
struct Busy {
    shared: Arc<Shared>,
    destination: PathBuf,
}

impl Busy {
    fn claim(shared: &Arc<Shared>, destination: &Path) -> Result<Self, PlaceError> {
        if !shared.placing.lock().insert(destination.to_owned()) {
            return Err(PlaceError::Busy { path: destination.to_owned() });
        }
        Ok(Self { shared: Arc::clone(shared), destination: destination.to_owned() })
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.shared.placing.lock().remove(&self.destination);
    }
}

fn parent(destination: &Path) -> Result<&Path, PlaceError> {
    if !destination.is_absolute() {
        return Err(bad(destination, "it is not an absolute path"));
    }
    if destination.file_name().is_none() {
        return Err(bad(destination, "it does not end in a file name"));
    }
    destination.parent().ok_or_else(|| bad(destination, "it has no directory"))
}

fn make_destination(dir: &Path) -> Result<(), PlaceError> {
    if dir.exists() && !dir.is_dir() {
        return Err(bad(dir, "it is not a directory"));
    }
    fs::create_dir_all(dir).map_err(|error| explain(dir, error))
}

fn check_room(dir: &Path, needed_bytes: u64) -> Result<(), PlaceError> {
    let free_bytes = disk::free_bytes(dir).map_err(|error| io_error("looking at", dir, error))?;
    if free_bytes < needed_bytes {
        return Err(PlaceError::TooSmall { path: dir.to_owned(), needed_bytes, free_bytes });
    }
    Ok(())
}

fn give_away(file: &File, path: &Path, owner: Option<Owner>) -> Result<(), PlaceError> {
    let Some(Owner { uid, gid }) = owner else { return Ok(()) };
    std::os::unix::fs::fchown(file, Some(uid), Some(gid)).map_err(|source| PlaceError::NotOwner {
        path: path.to_owned(),
        uid,
        gid,
        source,
    })
}

fn bad(path: &Path, reason: &'static str) -> PlaceError {
    PlaceError::BadDestination { path: path.to_owned(), reason }
}

fn io_error(doing: &'static str, path: &Path, source: io::Error) -> PlaceError {
    PlaceError::Io { doing, path: path.to_owned(), source }
}

fn explain(path: &Path, source: io::Error) -> PlaceError {
    match source.kind() {
        io::ErrorKind::NotADirectory => bad(path, "a part of it is not a directory"),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            PlaceError::NotWritable { path: path.to_owned(), source }
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            let free_bytes = path.ancestors().find_map(|dir| disk::free_bytes(dir).ok()).unwrap_or(0);
            PlaceError::Full { path: path.to_owned(), free_bytes }
        }
        _ => io_error("placing at", path, source),
    }
}

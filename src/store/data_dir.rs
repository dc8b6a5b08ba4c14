//! The data directory: who may use it, where things lie in it, and whether it was left in order.
//!
//! ```text
//! <data_dir>/format                      version of everything below, in text
//! <data_dir>/lock                        flock of the daemon that uses it
//! <data_dir>/clean                       present only after a clean shutdown: generation of the index
//! <data_dir>/index/                      sled; may be deleted at any time
//! <data_dir>/trash/                      contents on their way out
//! <data_dir>/contents/<2 hex>/<key hex>/data      sparse file, each chunk at its own offset
//! <data_dir>/contents/<2 hex>/<key hex>/sidecar   what is in `data`, see `sidecar`
//! ```
//!
//! Invariant: at most one process changes the directory; a content leaves it by one rename.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::disk::{self, Disk};
use super::error::OpenError;
use crate::content::ContentKey;

/// Raised when an older program could misread what a newer one wrote.
pub(super) const FORMAT_VERSION: u32 = 1;

/// What the mark of a clean shutdown says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CleanMark {
    /// Of the index.
    pub generation: u64,
    /// Fingerprint of the configured pins; none in a mark of 0.1.0.
    pub pins: Option<u64>,
}

/// An open, locked data directory.
#[derive(Debug)]
pub(super) struct DataDir {
    root: PathBuf,
    lock: File,
    trashed: AtomicU64,
    disk: Disk,
}

impl DataDir {
    /// Creates what is missing, takes the lock, and refuses what it should not touch.
    pub(super) fn open(root: &Path, disk: Disk) -> Result<Self, OpenError> {
        make_dirs(root).map_err(|error| explain(root, error))?;
        let dir = Self { root: root.to_owned(), lock: lock(root)?, trashed: AtomicU64::new(0), disk };
        dir.check_format()?;
        dir.make_rooms().map_err(|error| explain(root, error))?;
        Ok(dir)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn index(&self) -> PathBuf {
        self.root.join("index")
    }

    pub(super) fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    /// The 256 directories that hold the contents.
    pub(super) fn shelves(&self) -> impl Iterator<Item = PathBuf> + use<'_> {
        let contents = self.root.join("contents");
        (0..=u8::MAX).map(move |first| contents.join(hex::encode([first])))
    }

    /// Directory of one content.
    pub(super) fn content(&self, key: &ContentKey) -> PathBuf {
        let name = key.hex();
        self.root.join("contents").join(&name[..2]).join(&name)
    }

    /// Takes a content out of the way at once, so that its name is free again; [`delete`](Self::delete) of what is returned
    /// gives the room back.
    pub(super) fn discard(&self, content: &Path) -> io::Result<PathBuf> {
        let number = self.trashed.fetch_add(1, Ordering::Relaxed);
        let grave = self.trash().join(number.to_string());
        match self.disk.rename(content, &grave) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(grave),
            other => other.map(|()| grave),
        }
    }

    /// Gives a discarded content's room back. What cannot be deleted now is tried again at the next start.
    pub(super) fn delete(&self, grave: &Path) {
        delete(&self.disk, grave);
    }

    pub(super) const fn disk(&self) -> &Disk {
        &self.disk
    }

    /// What earlier runs had discarded and not deleted; pass it to [`delete`](Self::delete). Call before the first discard.
    pub(super) fn old_graves(&self) -> io::Result<Vec<PathBuf>> {
        let mut graves = Vec::new();
        for grave in fs::read_dir(self.trash())? {
            let grave = grave?;
            // New graves get higher numbers than the old ones, which may outlive this run.
            let number = grave.file_name().to_str().and_then(|name| name.parse::<u64>().ok());
            self.trashed.fetch_max(number.map_or(0, |n| n.saturating_add(1)), Ordering::Relaxed);
            graves.push(grave.path());
        }
        Ok(graves)
    }

    /// Reads and removes the mark of a clean shutdown: from here on a crash must not find it.
    pub(super) fn take_clean_mark(&self) -> io::Result<Option<CleanMark>> {
        let path = self.root.join("clean");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        self.disk.remove_file(&path)?;
        self.disk.sync_dir(&self.root)?;
        let mut words = text.split_whitespace().map(|word| u64::from_str_radix(word, 16).ok());
        let generation = words.next().flatten();
        Ok(generation.map(|generation| CleanMark { generation, pins: words.next().flatten() }))
    }

    /// Says that the index of this `generation` is complete and everything in it is durable.
    /// `pins` is the fingerprint of the configured pins that its rows know.
    pub(super) fn leave_clean_mark(&self, generation: u64, pins: u64) -> io::Result<()> {
        self.write_small("clean", &format!("{generation:016x} {pins:016x}\n"))
    }

    /// Lets another process in. Only when no thread of this store runs any more.
    pub(super) fn unlock(&self) {
        // The descriptor's end unlocks too; there is nothing to do about a failure here.
        let _ = rustix::fs::flock(&self.lock, FlockOperation::Unlock);
    }

    fn check_format(&self) -> Result<(), OpenError> {
        let path = self.root.join("format");
        match fs::read_to_string(&path) {
            Ok(text) => match text.trim().rsplit(' ').next().and_then(|word| word.parse().ok()) {
                Some(found) if found > FORMAT_VERSION => {
                    Err(OpenError::NewerFormat { path: self.root.clone(), found, known: FORMAT_VERSION })
                }
                Some(_) => Ok(()),
                // Torn or garbage: each sidecar carries the version too.
                None => self.write_format(),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.write_format(),
            Err(source) => Err(OpenError::Io { doing: "reading", path, source }),
        }
    }

    fn write_format(&self) -> Result<(), OpenError> {
        self.write_small("format", &format!("windlass store format {FORMAT_VERSION}\n"))
            .map_err(|error| explain(&self.root, error))
    }

    /// All shelves exist and are durable from the start, so that a new content needs to sync only its own.
    fn make_rooms(&self) -> io::Result<()> {
        self.disk.make_dir(&self.trash())?;
        let contents = self.root.join("contents");
        self.disk.make_dir(&contents)?;
        let mut fresh = false;
        for shelf in self.shelves() {
            if !shelf.exists() {
                self.disk.make_dir(&shelf)?;
                fresh = true;
            }
        }
        if fresh {
            self.disk.sync_dir(&contents)?;
            self.disk.sync_dir(&self.root)?;
        }
        Ok(())
    }

    fn write_small(&self, name: &str, text: &str) -> io::Result<()> {
        let fresh = self.root.join(format!("{name}.new"));
        let file = self.disk.open(&fresh)?;
        self.disk.resize(&file, 0)?;
        self.disk.write_at(&file, 0, text.as_bytes())?;
        self.disk.sync_data(&file)?;
        self.disk.rename(&fresh, &self.root.join(name))?;
        self.disk.sync_dir(&self.root)
    }
}

/// See [`DataDir::delete`]; for a thread that must not keep the directory.
pub(super) fn delete(disk: &Disk, grave: &Path) {
    match disk.remove_tree(grave) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %grave.display(), %error, "a discarded content could not be deleted");
        }
        _ => {}
    }
}

/// Private to the daemon, as everything below it is.
fn make_dirs(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn lock(root: &Path) -> Result<File, OpenError> {
    let path = root.join("lock");
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|error| explain(root, error))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(OpenError::Locked { path: root.to_owned() }),
        Err(errno) => Err(OpenError::Io { doing: "locking", path, source: errno.into() }),
    }
}

fn explain(path: &Path, source: io::Error) -> OpenError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => OpenError::NotADirectory { path },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            OpenError::NotWritable { path, source }
        }
        _ if disk::is_full(&source) => OpenError::Full { path },
        _ => OpenError::Io { doing: "preparing data directory", path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> Result<DataDir, OpenError> {
        DataDir::open(path, Disk::default())
    }

    #[test]
    fn a_second_user_is_told_who_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path()).unwrap();
        let error = open(dir.path()).unwrap_err();
        assert!(matches!(error, OpenError::Locked { .. }), "{error}");
        assert!(error.to_string().contains("another windlass"), "{error}");
        drop(first);
        open(dir.path()).unwrap();
    }

    #[test]
    fn a_newer_format_is_refused_with_the_cure() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()).unwrap());
        fs::write(dir.path().join("format"), "windlass store format 7\n").unwrap();
        let error = open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("format 7") && error.contains("delete the directory"), "{error}");
        fs::write(dir.path().join("format"), "garb").unwrap();
        open(dir.path()).unwrap();
    }

    #[test]
    fn a_file_in_the_way_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "x").unwrap();
        for path in [path.clone(), path.join("below")] {
            let error = open(&path).unwrap_err();
            assert!(matches!(error, OpenError::NotADirectory { .. }), "{error}");
        }
    }

    #[test]
    fn a_clean_mark_is_found_once() {
        let dir = tempfile::tempdir().unwrap();
        let data = open(dir.path()).unwrap();
        assert_eq!(data.take_clean_mark().unwrap(), None);
        data.leave_clean_mark(42, 7).unwrap();
        assert_eq!(data.take_clean_mark().unwrap(), Some(CleanMark { generation: 42, pins: Some(7) }));
        assert_eq!(data.take_clean_mark().unwrap(), None);
    }
}

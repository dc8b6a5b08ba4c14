//! The directory that a run leaves no trace of, and the room it needs.
//!
//! Invariant: what is removed is the directory that this run created, nothing above or beside it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Logs, certificates and the daemons' indexes, beside the contents.
const OVERHEAD_BYTES: u64 = 256 << 20;
/// A Unix socket's path has 104 bytes on macOS and 108 on Linux, and ours end in `/node-00/windlass.sock`.
const SOCKET_PATH_BYTES_MAX: usize = 103;

/// A temporary directory, removed when dropped unless told to stay.
pub(super) struct Scratch {
    path: PathBuf,
    keep: bool,
}

/// Why there is no place to work.
#[derive(Debug, thiserror::Error)]
pub(super) enum ScratchError {
    #[error("{dir} cannot be used: {source}; choose another directory with --dir", dir = dir.display())]
    Unusable { dir: PathBuf, source: io::Error },
    #[error(
        "{dir} has {free} MiB free and {nodes} nodes need {need} MiB; use a smaller --size, fewer --nodes, or --dir",
        dir = dir.display(), free = free >> 20, need = need >> 20
    )]
    TooSmall { dir: PathBuf, nodes: usize, free: u64, need: u64 },
    #[error("{dir} is too long a path for the Unix sockets in it; choose a shorter one with --dir", dir = dir.display())]
    TooLong { dir: PathBuf },
}

impl Scratch {
    /// Creates a directory of this run's own in `parent`, which must have room for `nodes` times `bytes_per_node`.
    ///
    /// # Errors
    /// When `parent` cannot be written, is too small or has too long a path.
    pub(super) fn create(
        parent: &Path,
        nodes: usize,
        bytes_per_node: u64,
        keep: bool,
    ) -> Result<Self, ScratchError> {
        let unusable = |source| ScratchError::Unusable { dir: parent.to_owned(), source };
        // Absolute, because the daemons are told where to work.
        let parent = parent.canonicalize().map_err(unusable)?;
        let stat = rustix::fs::statvfs(&parent).map_err(|errno| unusable(errno.into()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        let need = bytes_per_node.saturating_mul(nodes as u64).saturating_add(OVERHEAD_BYTES);
        if free < need {
            return Err(ScratchError::TooSmall { dir: parent, nodes, free, need });
        }
        let path = parent.join(format!("windlass-demo-{}", std::process::id()));
        if path.join("node-00/windlass.sock").as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(ScratchError::TooLong { dir: parent });
        }
        // Fails when it exists: what is there is not this run's.
        fs::create_dir(&path).map_err(unusable)?;
        Ok(Self { path, keep })
    }

    #[must_use]
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            anstream::eprintln!("{} could not be removed: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_gone_afterwards_unless_kept() {
        let parent = tempfile::tempdir().unwrap();
        let scratch = Scratch::create(parent.path(), 1, 0, false).unwrap();
        let path = scratch.path().to_owned();
        fs::write(path.join("file"), "x").unwrap();
        assert!(Scratch::create(parent.path(), 1, 0, false).is_err(), "one run, one directory");
        drop(scratch);
        assert!(!path.exists());
        drop(Scratch::create(parent.path(), 1, 0, true).unwrap());
        assert!(path.exists());
    }

    #[test]
    fn what_cannot_work_is_said_before_it_starts() {
        let parent = tempfile::tempdir().unwrap();
        let error = Scratch::create(parent.path(), 4, 1 << 60, false).err().unwrap();
        assert!(error.to_string().contains("4 nodes need"), "{error}");
        let long = parent.path().join("x".repeat(90));
        fs::create_dir(&long).unwrap();
        assert!(matches!(Scratch::create(&long, 1, 0, false), Err(ScratchError::TooLong { .. })));
        let missing = parent.path().join("missing");
        assert!(matches!(Scratch::create(&missing, 1, 0, false), Err(ScratchError::Unusable { .. })));
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1, "nothing is left behind");
    }
}

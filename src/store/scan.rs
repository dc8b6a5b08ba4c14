//! Finds out what is stored by reading every sidecar: what a start does when the index cannot be believed.
//!
//! Invariant: afterwards each directory under `contents/` is either in the result or in the trash.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::catalog::Cold;
use super::data_dir::{DataDir, FORMAT_VERSION};
use super::disk::{self, Disk};
use super::error::OpenError;
use super::index::Row;
use super::pin::Pins;
use super::sidecar::{Sidecar, SidecarError};
use crate::content::ContentKey;

/// A scan waits for the disk, not for a core, so it uses more threads than there may be cores.
const SCAN_THREADS: usize = 8;

/// What a scan found.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub contents: Vec<(ContentKey, Cold)>,
    /// Directories without a usable sidecar, now in the trash.
    pub discarded: Vec<PathBuf>,
}

/// Reads all sidecars.
pub(super) fn scan(dir: &DataDir, pins: &Pins) -> Result<Scan, OpenError> {
    let shelves: Vec<PathBuf> = dir.shelves().collect();
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Ok(Scan::default()));
    std::thread::scope(|scope| {
        for _ in 0..SCAN_THREADS {
            scope.spawn(|| {
                while let Some(shelf) = shelves.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let part = scan_shelf(dir, pins, shelf);
                    let mut found = found.lock();
                    match (part, &mut *found) {
                        (Ok(part), Ok(all)) => {
                            all.contents.extend(part.contents);
                            all.discarded.extend(part.discarded);
                        }
                        (Err(error), Ok(_)) => *found = Err(error),
                        (_, Err(_)) => return,
                    }
                }
            });
        }
    });
    found.into_inner()
}

fn scan_shelf(dir: &DataDir, pins: &Pins, shelf: &Path) -> Result<Scan, OpenError> {
    let io = |source| OpenError::Io { doing: "scanning", path: shelf.to_owned(), source };
    let mut found = Scan::default();
    for content in fs::read_dir(shelf).map_err(io)? {
        let content = content.map_err(io)?.path();
        match read_content(dir.disk(), pins, &content) {
            Ok((key, cold)) if dir.content(&key) == content => found.contents.push((key, cold)),
            Err(Unusable::Newer(version)) => {
                let (path, found, known) = (dir.root().to_owned(), version, FORMAT_VERSION);
                return Err(OpenError::NewerFormat { path, found, known });
            }
            Ok(_) | Err(Unusable::Broken) => found.discarded.push(dir.discard(&content).map_err(io)?),
            Err(Unusable::Lost(error)) => {
                tracing::warn!(path = %content.display(), %error, "a stored content cannot be read and is discarded");
                found.discarded.push(dir.discard(&content).map_err(io)?);
            }
            // No descriptor, no memory, no permission: the content may be sound, and is not ours to throw away.
            Err(Unusable::Disk(source)) => {
                return Err(OpenError::Io { doing: "reading", path: content, source });
            }
        }
    }
    Ok(found)
}

enum Unusable {
    Newer(u32),
    /// Never got so far, or was on its way out, when the last run ended.
    Broken,
    /// The medium does not give it back any more.
    Lost(io::Error),
    Disk(io::Error),
}

impl From<io::Error> for Unusable {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Self::Broken,
            _ if disk::is_lost(&error) => Self::Lost(error),
            _ => Self::Disk(error),
        }
    }
}

fn read_content(disk: &Disk, pins: &Pins, content: &Path) -> Result<(ContentKey, Cold), Unusable> {
    let bytes = disk.read_file(&content.join("sidecar"))?;
    let sidecar = Sidecar::parse(&bytes).map_err(|error| match error {
        SidecarError::Newer(version) => Unusable::Newer(version),
        SidecarError::Header => Unusable::Broken,
    })?;
    let data = fs::metadata(content.join("data"))?;
    let doubts = sidecar.claims.doubts.keys();
    let doubtful_bytes = doubts.map(|chunk| sidecar.layout.chunk_range(*chunk).len()).sum();
    let row = Row {
        layout: sidecar.layout,
        have: sidecar.claims.have,
        sealed: sidecar.claims.sealed,
        pin: sidecar.claims.pin,
        configured: pins.name(&sidecar.id),
        last_used_ms: data.modified().map_or(0, super::unix_ms),
    };
    Ok((sidecar.key, Cold::found(row, doubtful_bytes)))
}

//! The directory that files are placed in, and the ledger that says which of them are whole.
//!
//! The ledger is a file of JSON lines, appended to after each placement. A file counts as whole when its last line
//! names the version that is wanted and the file still has the size and modification time that it was placed with:
//! whoever writes to it changes them. A line that is missing or torn costs a placement, never a wrong file.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::plan::PlannedFile;
use crate::content::ObjectVersion;

/// Name of the ledger in the destination.
pub(super) const LEDGER: &str = ".windlass-fetch.jsonl";

/// A longer ledger is begun anew: 200 bytes a file, [`crate::origin::s3::MAX_LISTED`] files, placed three times each.
const LEDGER_BYTES_MAX: u64 = 64 << 20;

/// Bytes read before they are hashed: few system calls, and no more than the processor's cache holds.
const HASHED_AT_ONCE: usize = 256 << 10;

/// A directory that files can be placed in.
pub(super) struct Destination {
    root: PathBuf,
    records: HashMap<String, Record>,
    ledger: Mutex<File>,
}

/// A file that was placed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    path: String,
    version: ObjectVersion,
    modified_ns: i64,
}

/// Why nothing can be placed there.
#[derive(Debug, thiserror::Error)]
pub(super) enum DestinationError {
    #[error(
        "cannot write to {}: {source}; the path is the daemon's, which needs it mounted, writable and not \
         read-only", path.display()
    )]
    NotWritable { path: PathBuf, source: io::Error },
}

impl Destination {
    /// Makes the directory and opens its ledger, which proves that it can be written to. Blocks.
    pub(super) fn open(root: &Path) -> Result<Self, DestinationError> {
        let not_writable = |source| DestinationError::NotWritable { path: root.to_owned(), source };
        fs::create_dir_all(root).map_err(not_writable)?;
        let path = root.join(LEDGER);
        let open = || OpenOptions::new().read(true).append(true).create(true).open(&path);
        let mut ledger = open().map_err(not_writable)?;
        if ledger.metadata().map_err(not_writable)?.len() > LEDGER_BYTES_MAX {
            ledger.set_len(0).map_err(not_writable)?;
        }
        let records = read_records(&ledger).map_err(not_writable)?;
        // Ends a line that a crash tore, so that the next one stands alone.
        ledger.write_all(b"\n").map_err(not_writable)?;
        Ok(Self { root: root.to_owned(), records, ledger: Mutex::new(ledger) })
    }

    /// The directory itself.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Where a file goes.
    pub(super) fn target(&self, file: &PlannedFile) -> PathBuf {
        self.root.join(&file.path)
    }

    /// Whether the file lies there as it was placed, in the version that is wanted. Blocks.
    pub(super) fn is_whole(&self, file: &PlannedFile) -> bool {
        let Some(record) = self.records.get(&file.path) else { return false };
        let Ok(metadata) = fs::symlink_metadata(self.target(file)) else { return false };
        record.version == file.version
            && metadata.is_file()
            && metadata.len() == file.version.size
            && modified_ns(&metadata) == record.modified_ns
    }

    /// Whether the file that lies there has the bytes that the caller says it has. Reads it whole; blocks.
    pub(super) fn is_as_said(&self, file: &PlannedFile) -> bool {
        let Some(said) = &file.sha256 else { return true };
        sha256_of(&self.target(file)).is_ok_and(|is| is[..] == *said.as_bytes())
    }

    /// Remembers that the file was placed just now. Blocks.
    pub(super) fn record(&self, file: &PlannedFile) -> io::Result<()> {
        let metadata = fs::symlink_metadata(self.target(file))?;
        let record = Record {
            path: file.path.clone(),
            version: file.version.clone(),
            modified_ns: modified_ns(&metadata),
        };
        let mut line = serde_json::to_vec(&record)?;
        line.push(b'\n');
        self.ledger.lock().write_all(&line)
    }
}

fn sha256_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut reader = BufReader::with_capacity(HASHED_AT_ONCE, File::open(path)?);
    let mut hasher = Sha256::new();
    loop {
        let read = reader.fill_buf()?;
        if read.is_empty() {
            return Ok(hasher.finalize().to_vec());
        }
        hasher.update(read);
        let read = read.len();
        reader.consume(read);
    }
}

/// The last record of each path; lines that are none are skipped.
fn read_records(ledger: &File) -> io::Result<HashMap<String, Record>> {
    let mut records = HashMap::new();
    for line in BufReader::new(ledger).split(b'\n') {
        if let Ok(record) = serde_json::from_slice::<Record>(&line?) {
            records.insert(record.path.clone(), record);
        }
    }
    Ok(records)
}

fn modified_ns(metadata: &fs::Metadata) -> i64 {
    metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::ETag;

    fn file(path: &str, etag: &str) -> PlannedFile {
        let version =
            ObjectVersion { bucket: "models".into(), key: path.into(), etag: ETag(etag.into()), size: 5 };
        PlannedFile { version, version_id: None, is_fixed: false, path: path.into(), sha256: None }
    }

    fn placed(root: &Path, name: &str) -> PlannedFile {
        let destination = Destination::open(root).unwrap();
        fs::write(root.join(name), b"12345").unwrap();
        let file = file(name, "\"1\"");
        destination.record(&file).unwrap();
        file
    }

    fn is_whole(root: &Path, file: &PlannedFile) -> bool {
        Destination::open(root).unwrap().is_whole(file)
    }

    #[test]
    fn only_what_was_placed_and_left_alone_is_whole() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let kept = placed(root, "a");
        assert!(is_whole(root, &kept));
        assert!(!is_whole(root, &file("a", "\"2\"")), "another version");
        fs::write(root.join("b"), b"12345").unwrap();
        assert!(!is_whole(root, &file("b", "\"1\"")), "right size, but nobody vouches for it");
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
        File::options().write(true).open(root.join("a")).unwrap().set_modified(later).unwrap();
        assert!(!is_whole(root, &kept), "touched");
        let gone = placed(root, "c");
        fs::remove_file(root.join("c")).unwrap();
        assert!(!is_whole(root, &gone));
    }

    #[test]
    fn a_torn_or_foreign_ledger_loses_no_later_record() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::write(root.join(LEDGER), b"\xff\xfe nonsense\n{\"path\":\"a\",\"ver").unwrap();
        let kept = placed(root, "a");
        assert!(is_whole(root, &kept));
    }

    #[test]
    fn a_destination_that_cannot_be_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let occupied = directory.path().join("file");
        fs::write(&occupied, b"").unwrap();
        let error = Destination::open(&occupied.join("sub")).err().unwrap().to_string();
        assert!(error.contains("file/sub") && error.contains("daemon's"), "{error}");
    }
}

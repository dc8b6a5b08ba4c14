//! The content's sidecar as it grows: who writes which slot, and where.
//!
//! Slots come from two sides. Whoever wrote a chunk notes it at once, unsynced, for a process that is killed a moment
//! later; a sync records what has become durable. Each takes its place under a short lock and writes outside of it, so
//! that a writer never waits for a sync.
//!
//! Invariant: no two write to the same place, and places are given out in the order of events. A place whose write
//! failed stays behind as a damaged slot. This module refuses to decide what is true: it writes what it is told.

use std::fs::File;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use super::Entry;
use crate::content::{Attestation, ChunkIndex};
use crate::store::sidecar::{self, Record};

/// Where the log ends, and what is known of its file.
#[derive(Debug)]
pub(super) struct Log {
    tail: Mutex<Tail>,
}

#[derive(Debug)]
struct Tail {
    file: Option<Arc<File>>,
    /// The next slot goes here; 0 while there is no sidecar.
    end: u64,
    /// The header and the names of the content's files are durable.
    is_named: bool,
}

impl Log {
    /// The log of a sidecar that was parsed up to `end`, or none yet if that is 0. `is_named` when it is known to
    /// outlive a power cut.
    pub(super) const fn new(end: u64, is_named: bool) -> Self {
        Self { tail: Mutex::new(Tail { file: None, end, is_named: is_named && end > 0 }) }
    }
}

impl Entry {
    /// Notes that the bytes of `chunk` were given to the kernel. Without it a kill before the next sync costs the
    /// chunk and nothing else, so a failure is not the writer's.
    pub(super) fn note_written(&self, chunk: ChunkIndex, attestation: Attestation) {
        if let Err(error) = self.append(&[Record::Written(chunk, attestation)]) {
            tracing::debug!(content = %self.id, chunk = chunk.0, %error, "a written chunk could not be noted");
        }
    }

    /// Appends `records` and returns when they are durable.
    pub(super) fn append_durably(&self, records: &[Record]) -> io::Result<()> {
        let file = self.append(records)?;
        let disk = &self.shared.disk;
        let is_named = self.log.tail.lock().is_named;
        if !is_named {
            // An earlier attempt may have failed after the kernel forgot the page that the header is in.
            disk.write_at(&file, 0, &sidecar::header(&self.id, &self.layout))?;
        }
        disk.sync_data(&file)?;
        if !is_named {
            disk.sync_dir(self.dir())?;
            disk.sync_dir(self.dir().parent().unwrap_or_else(|| self.dir()))?;
            self.log.tail.lock().is_named = true;
        }
        Ok(())
    }

    /// Whether the next [`append_durably`](Self::append_durably) makes the content's names durable.
    pub(super) fn is_named(&self) -> bool {
        self.log.tail.lock().is_named
    }

    fn append(&self, records: &[Record]) -> io::Result<Arc<File>> {
        let mut slots = Vec::with_capacity(records.len() * sidecar::SLOT);
        let (file, at) = self.take_place(records.len())?;
        for record in records {
            sidecar::append(&mut slots, at, &self.key, record);
        }
        self.shared.disk.write_at(&file, at, &slots)?;
        Ok(file)
    }

    /// The sidecar, made or opened if need be, and the offset of `slots` slots in it that nobody else writes to.
    fn take_place(&self, slots: usize) -> io::Result<(Arc<File>, u64)> {
        let mut tail = self.log.tail.lock();
        let file = match &tail.file {
            Some(file) => Arc::clone(file),
            None => {
                let file = Arc::new(self.open_sidecar(&mut tail.end)?);
                tail.file = Some(Arc::clone(&file));
                file
            }
        };
        let at = tail.end;
        tail.end += (slots * sidecar::SLOT) as u64;
        Ok((file, at))
    }

    fn open_sidecar(&self, end: &mut u64) -> io::Result<File> {
        let disk = &self.shared.disk;
        let file = disk.open(&self.dir().join("sidecar"))?;
        // What lies behind is the torn tail of an earlier run, and must not look like slots after ours.
        disk.resize(&file, *end)?;
        if *end == 0 {
            let header = sidecar::header(&self.id, &self.layout);
            disk.write_at(&file, 0, &header)?;
            *end = header.len() as u64;
        }
        Ok(file)
    }
}

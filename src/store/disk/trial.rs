//! What a test knows of the disk: it fails calls by plan, and writes down every act in its order.

use std::io::{self, IoSlice};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use parking_lot::{Mutex, MutexGuard};
use rustix::io::Errno;

use super::{Act, Op};
use crate::content::ByteRange;

/// The plan of faults, and the record of what was done.
#[derive(Debug, Default)]
pub(in crate::store) struct Trial {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    fault: Option<Fault>,
    /// Calls so far, of all kinds.
    calls: u64,
    faults_injected: u64,
    record: Option<Vec<Event>>,
}

#[derive(Debug)]
struct Fault {
    /// None: any.
    op: Option<Op>,
    after: u64,
    times: u64,
    errno: Errno,
}

/// An [`Act`] that outlives its call; files go by their inode.
#[derive(Clone, Debug)]
pub(in crate::store) enum Event {
    Opened { path: PathBuf, inode: u64 },
    Wrote { inode: u64, at: u64, bytes: Vec<u8> },
    Resized { inode: u64, bytes: u64 },
    Punched { inode: u64, range: ByteRange },
    Synced { inode: u64 },
    SyncedDir { path: PathBuf },
    MadeDir { path: PathBuf },
    Renamed { from: PathBuf, to: PathBuf },
    Removed { path: PathBuf },
}

impl Trial {
    /// Fails every call of kind `op` from the `after`-th on.
    pub(in crate::store) fn fail(&self, op: Op, after: u64, errno: Errno) {
        self.inner.lock().fault = Some(Fault { op: Some(op), after, times: u64::MAX, errno });
    }

    /// Fails `times` calls of any kind from the `after`-th on.
    pub(in crate::store) fn fail_any(&self, after: u64, times: u64, errno: Errno) {
        self.inner.lock().fault = Some(Fault { op: None, after, times, errno });
    }

    pub(in crate::store) fn clear(&self) {
        self.inner.lock().fault = None;
    }

    pub(in crate::store) fn calls(&self) -> u64 {
        self.inner.lock().calls
    }

    pub(in crate::store) fn faults_injected(&self) -> u64 {
        self.inner.lock().faults_injected
    }

    /// Writes everything down from here on.
    pub(in crate::store) fn start_record(&self) {
        self.inner.lock().record = Some(Vec::new());
    }

    /// Events so far.
    pub(in crate::store) fn recorded(&self) -> usize {
        self.inner.lock().record.as_ref().map_or(0, Vec::len)
    }

    pub(in crate::store) fn take_record(&self) -> Vec<Event> {
        self.inner.lock().record.take().unwrap_or_default()
    }

    pub(super) fn turn(&self, op: Op) -> io::Result<Turn<'_>> {
        let mut inner = self.inner.lock();
        inner.calls += 1;
        if let Some(fault) = &mut inner.fault
            && fault.op.is_none_or(|planned| planned == op)
        {
            if fault.after > 0 {
                fault.after -= 1;
            } else if fault.times > 0 {
                fault.times -= 1;
                let errno = fault.errno;
                inner.faults_injected += 1;
                return Err(errno.into());
            }
        }
        Ok(Turn(inner))
    }
}

/// See the one that is not for tests.
pub(super) struct Turn<'a>(MutexGuard<'a, Inner>);

impl Turn<'_> {
    pub(super) fn done(mut self, act: Act<'_>) {
        if let Some(record) = &mut self.0.record {
            record.push(Event::from(act));
        }
    }
}

impl From<Act<'_>> for Event {
    fn from(act: Act<'_>) -> Self {
        let inode = |file: &std::fs::File| file.metadata().expect("an open file has metadata").ino();
        match act {
            Act::Opened { path, file } => Self::Opened { path: path.to_owned(), inode: inode(file) },
            Act::Wrote { file, at, pieces, bytes } => {
                Self::Wrote { inode: inode(file), at, bytes: joined(pieces, bytes) }
            }
            Act::Resized { file, bytes } => Self::Resized { inode: inode(file), bytes },
            Act::Punched { file, range } => Self::Punched { inode: inode(file), range },
            Act::Synced { file } => Self::Synced { inode: inode(file) },
            Act::SyncedDir { path } => Self::SyncedDir { path: path.to_owned() },
            Act::MadeDir { path } => Self::MadeDir { path: path.to_owned() },
            Act::Renamed { from, to } => Self::Renamed { from: from.to_owned(), to: to.to_owned() },
            Act::Removed { path } => Self::Removed { path: path.to_owned() },
        }
    }
}

fn joined(pieces: &[IoSlice<'_>], bytes: usize) -> Vec<u8> {
    let mut joined: Vec<u8> = pieces.iter().flat_map(|piece| piece.iter().copied()).collect();
    joined.truncate(bytes);
    joined
}

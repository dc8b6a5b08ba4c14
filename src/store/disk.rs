//! Every system call that reads, writes or makes durable goes through [`Disk`], so that a test can fail the n-th.
//!
//! Invariant: a call returns only when all its bytes are moved; short transfers and interruptions stay in here.
//! This module refuses to know what the bytes mean.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use bytes::Bytes;
use rustix::fs::{FallocateFlags, StatVfs};
use rustix::io::Errno;

use crate::content::ByteRange;

/// Linux takes at most this many slices per `pwritev` (`IOV_MAX`).
const WRITE_SLICES_MAX: usize = 1024;

/// Kinds of call, as a fault plan tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Read,
    Write,
    Sync,
}

/// The way to the disk; cloning shares the fault plan.
#[derive(Clone, Debug, Default)]
pub(super) struct Disk {
    #[cfg(test)]
    pub(super) faults: std::sync::Arc<faults::Faults>,
}

impl Disk {
    #[cfg(not(test))]
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "tests inject faults here")]
    const fn gate(&self, _: Op) -> io::Result<()> {
        Ok(())
    }

    #[cfg(test)]
    fn gate(&self, op: Op) -> io::Result<()> {
        self.faults.gate(op)
    }

    /// Opens for reading and writing, creating the file where it is missing.
    pub(super) fn open(&self, path: &Path) -> io::Result<File> {
        self.gate(Op::Write)?;
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
    }

    /// Writes all pieces one behind the other from `offset` on, in as few calls as the kernel allows.
    pub(super) fn write_pieces(&self, file: &File, mut offset: u64, pieces: &[Bytes]) -> io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> =
            pieces.iter().filter(|piece| !piece.is_empty()).map(|piece| IoSlice::new(piece)).collect();
        let mut left = &mut slices[..];
        while !left.is_empty() {
            self.gate(Op::Write)?;
            let batch = left.len().min(WRITE_SLICES_MAX);
            let written = rustix::io::retry_on_intr(|| rustix::io::pwritev(file, &left[..batch], offset))?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            offset += written as u64;
            IoSlice::advance_slices(&mut left, written);
        }
        Ok(())
    }

    pub(super) fn write_at(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.gate(Op::Write)?;
        file.write_all_at(bytes, offset)
    }

    /// The bytes of `range`, without zeroing the buffer first.
    ///
    /// `UnexpectedEof` when the file ends before the range does.
    pub(super) fn read(&self, file: &File, range: ByteRange) -> io::Result<Vec<u8>> {
        let len = usize::try_from(range.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut bytes = Vec::with_capacity(len.max(1));
        while bytes.len() < len {
            self.gate(Op::Read)?;
            let at = range.start() + bytes.len() as u64;
            let got = rustix::io::retry_on_intr(|| {
                rustix::io::pread(file, rustix::buffer::spare_capacity(&mut bytes), at)
            })?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        bytes.truncate(len);
        Ok(bytes)
    }

    pub(super) fn read_file(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.gate(Op::Read)?;
        fs::read(path)
    }

    /// Contents, and the metadata needed to reach them, are on the medium when this returns.
    pub(super) fn sync_data(&self, file: &File) -> io::Result<()> {
        self.gate(Op::Sync)?;
        file.sync_data()
    }

    /// The names in `dir` are on the medium when this returns.
    pub(super) fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.gate(Op::Sync)?;
        File::open(dir)?.sync_all()
    }

    /// Gives the bytes of `range` back to the file system; they read as zeros afterwards.
    pub(super) fn punch_hole(&self, file: &File, range: ByteRange) -> io::Result<()> {
        self.gate(Op::Write)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(file, flags, range.start(), range.len()) {
            // Without hole punching the bytes merely stay until the content is evicted.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            other => other.map_err(Into::into),
        }
    }
}

/// Bytes an unprivileged writer may still take from the file system of `path`.
pub(super) fn free_bytes(path: &Path) -> io::Result<u64> {
    let StatVfs { f_bavail, f_frsize, .. } = rustix::fs::statvfs(path)?;
    Ok(f_bavail.saturating_mul(f_frsize))
}

/// Whether the file system, a quota or a limit on it is full.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}

/// Whether the medium says that the bytes themselves cannot be had, as opposed to "not now".
pub(super) fn is_lost(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::UnexpectedEof
        || error.raw_os_error() == Some(Errno::IO.raw_os_error())
        || error.raw_os_error() == Some(Errno::BADMSG.raw_os_error())
}

#[cfg(test)]
pub(super) mod faults {
    use super::{Op, io};
    use parking_lot::Mutex;
    use rustix::io::Errno;

    /// Fails calls of one kind from the n-th on, until cleared.
    #[derive(Debug, Default)]
    pub(in crate::store) struct Faults {
        plan: Mutex<Option<(Op, u32, Errno)>>,
    }

    impl Faults {
        pub(in crate::store) fn fail(&self, op: Op, after: u32, errno: Errno) {
            *self.plan.lock() = Some((op, after, errno));
        }

        pub(in crate::store) fn clear(&self) {
            *self.plan.lock() = None;
        }

        pub(super) fn gate(&self, op: Op) -> io::Result<()> {
            match &mut *self.plan.lock() {
                Some((planned, 0, errno)) if *planned == op => Err((*errno).into()),
                Some((planned, left, _)) if *planned == op => {
                    *left -= 1;
                    Ok(())
                }
                _ => Ok(()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_small_pieces_arrive_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::default();
        let file = disk.open(&dir.path().join("f")).unwrap();
        let pieces: Vec<Bytes> =
            (0..3_000u32).map(|i| Bytes::from(i.to_le_bytes()[..(i % 4) as usize].to_vec())).collect();
        let whole: Vec<u8> = pieces.iter().flatten().copied().collect();
        disk.write_pieces(&file, 5, &pieces).unwrap();
        let range = ByteRange::new(5, 5 + whole.len() as u64);
        assert_eq!(disk.read(&file, range).unwrap(), whole);
        let past = ByteRange::new(5, 6 + whole.len() as u64);
        assert_eq!(disk.read(&file, past).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}

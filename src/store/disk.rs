//! Every system call that reads, writes, names or makes durable goes through [`Disk`], so that a test can fail the n-th,
//! and can know at any instant what was written and what of it would outlive a power cut.
//!
//! Invariant: a call returns only when all its bytes are moved; short transfers and interruptions stay in here.
//! This module refuses to know what the bytes mean.

#[cfg(test)]
pub(super) mod trial;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;

use bytes::Bytes;
use rustix::fs::{Advice, FallocateFlags, OFlags, StatVfs};
use rustix::io::{Errno, ReadWriteFlags};

use crate::content::ByteRange;

/// Linux takes at most this many slices per `pwritev` (`IOV_MAX`).
const WRITE_SLICES_MAX: usize = 1024;

/// Offsets, lengths and memory of direct reads: the largest logical block in use.
pub(super) const DIRECT_ALIGN: usize = 4096;

/// Kinds of call, as a fault plan tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Read,
    Write,
    /// A name that changes or goes, which takes no room.
    Name,
    Sync,
}

/// A call that changed something or made it durable.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(test), expect(dead_code, reason = "only a trial looks inside"))]
pub(super) enum Act<'a> {
    /// Created, if nothing had that name.
    Opened {
        path: &'a Path,
        file: &'a File,
    },
    Wrote {
        file: &'a File,
        at: u64,
        pieces: &'a [IoSlice<'a>],
        bytes: usize,
    },
    Resized {
        file: &'a File,
        bytes: u64,
    },
    Punched {
        file: &'a File,
        range: ByteRange,
    },
    Synced {
        file: &'a File,
    },
    SyncedDir {
        path: &'a Path,
    },
    MadeDir {
        path: &'a Path,
    },
    Renamed {
        from: &'a Path,
        to: &'a Path,
    },
    /// A file or an empty directory.
    Removed {
        path: &'a Path,
    },
}

/// The way to the disk; cloning shares the trial.
#[derive(Clone, Debug, Default)]
pub(super) struct Disk {
    #[cfg(test)]
    pub(super) trial: std::sync::Arc<trial::Trial>,
}

/// The right to do one call; in a trial calls happen one at a time, so that it knows their order.
#[cfg(not(test))]
struct Turn;

#[cfg(not(test))]
impl Turn {
    #[expect(clippy::unused_self, reason = "a trial notes the act here")]
    const fn done(self, _: Act<'_>) {}
}

impl Disk {
    #[cfg(not(test))]
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "a trial injects faults here")]
    const fn turn(&self, _: Op) -> io::Result<Turn> {
        Ok(Turn)
    }

    #[cfg(test)]
    fn turn(&self, op: Op) -> io::Result<trial::Turn<'_>> {
        self.trial.turn(op)
    }

    /// Opens for reading and writing, creating the file where it is missing.
    pub(super) fn open(&self, path: &Path) -> io::Result<File> {
        let turn = self.turn(Op::Write)?;
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        turn.done(Act::Opened { path, file: &file });
        Ok(file)
    }

    /// Writes all pieces one behind the other from `offset` on, in as few calls as the kernel allows.
    pub(super) fn write_pieces(&self, file: &File, mut offset: u64, pieces: &[Bytes]) -> io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> =
            pieces.iter().filter(|piece| !piece.is_empty()).map(|piece| IoSlice::new(piece)).collect();
        let mut left = &mut slices[..];
        while !left.is_empty() {
            let turn = self.turn(Op::Write)?;
            let batch = &left[..left.len().min(WRITE_SLICES_MAX)];
            let written = rustix::io::retry_on_intr(|| rustix::io::pwritev(file, batch, offset))?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            turn.done(Act::Wrote { file, at: offset, pieces: batch, bytes: written });
            offset += written as u64;
            IoSlice::advance_slices(&mut left, written);
        }
        Ok(())
    }

    pub(super) fn write_at(&self, file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let turn = self.turn(Op::Write)?;
        file.write_all_at(bytes, offset)?;
        turn.done(Act::Wrote { file, at: offset, pieces: &[IoSlice::new(bytes)], bytes: bytes.len() });
        Ok(())
    }

    /// Cuts the file, or lengthens it by a hole.
    pub(super) fn resize(&self, file: &File, bytes: u64) -> io::Result<()> {
        let turn = self.turn(Op::Write)?;
        file.set_len(bytes)?;
        turn.done(Act::Resized { file, bytes });
        Ok(())
    }

    /// The bytes of `range`, without zeroing the buffer first.
    ///
    /// `UnexpectedEof` when the file ends before the range does.
    pub(super) fn read(&self, file: &File, range: ByteRange) -> io::Result<Vec<u8>> {
        let len = usize::try_from(range.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut bytes = Vec::with_capacity(len.max(1));
        while bytes.len() < len {
            let _turn = self.turn(Op::Read)?;
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

    /// Fills `buffer` with what the page cache has from `offset` on; false where it lacks some of it, or the file system
    /// cannot tell. Never waits for the medium.
    pub(super) fn read_cached(&self, file: &File, offset: u64, buffer: &mut [u8]) -> bool {
        let Ok(_turn) = self.turn(Op::Read) else { return false };
        let len = buffer.len();
        let mut slices = [IoSliceMut::new(buffer)];
        let got = rustix::io::retry_on_intr(|| {
            rustix::io::preadv2(file, &mut slices, offset, ReadWriteFlags::NOWAIT)
        });
        got == Ok(len)
    }

    /// `file` opened once more, for [`read_from_medium`](Self::read_from_medium); none where the file system has no such way.
    pub(super) fn open_uncached(&self, path: &Path) -> io::Result<Option<File>> {
        let _turn = self.turn(Op::Read)?;
        let direct = i32::try_from(OFlags::DIRECT.bits()).unwrap_or(0);
        match OpenOptions::new().read(true).custom_flags(direct).open(path) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(None),
            other => other.map(Some),
        }
    }

    /// The bytes of `range`, not from the page cache and without leaving any in it. `range` starts at a multiple of
    /// [`DIRECT_ALIGN`] of a file from [`open_uncached`](Self::open_uncached); `sink` gets them.
    pub(super) fn read_from_medium(
        &self,
        file: &File,
        range: ByteRange,
        sink: &mut impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let len = usize::try_from(range.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let padded = len.next_multiple_of(DIRECT_ALIGN);
        let mut buffer = vec![0; padded + DIRECT_ALIGN];
        let start = buffer.as_ptr().align_offset(DIRECT_ALIGN);
        let aligned = buffer.get_mut(start..start + padded).ok_or(io::ErrorKind::InvalidInput)?;
        let _turn = self.turn(Op::Read)?;
        let got = rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut *aligned, range.start()))?;
        // Direct reads are short only at the end of the file.
        if got < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        sink(&aligned[..len]);
        Ok(())
    }

    /// Lets the page cache forget `range`, where it is clean.
    pub(super) fn forget_cached(file: &File, range: ByteRange) {
        let len = NonZeroU64::new(range.len());
        // An advice; there is nothing to do when it is not taken.
        let _ = rustix::fs::fadvise(file, range.start(), len, Advice::DontNeed);
    }

    /// The whole file. A medium that fails is asked a second time before it is believed.
    pub(super) fn read_file(&self, path: &Path) -> io::Result<Vec<u8>> {
        let read = || {
            let _turn = self.turn(Op::Read)?;
            fs::read(path)
        };
        read().or_else(|error| if is_lost(&error) { read() } else { Err(error) })
    }

    /// Contents, and the metadata needed to reach them, are on the medium when this returns.
    pub(super) fn sync_data(&self, file: &File) -> io::Result<()> {
        let turn = self.turn(Op::Sync)?;
        file.sync_data()?;
        turn.done(Act::Synced { file });
        Ok(())
    }

    /// The names in `dir` are on the medium when this returns.
    pub(super) fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let turn = self.turn(Op::Sync)?;
        File::open(path)?.sync_all()?;
        turn.done(Act::SyncedDir { path });
        Ok(())
    }

    /// Gives the bytes of `range` back to the file system; they read as zeros afterwards.
    pub(super) fn punch_hole(&self, file: &File, range: ByteRange) -> io::Result<()> {
        let turn = self.turn(Op::Write)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(file, flags, range.start(), range.len()) {
            // Without hole punching the bytes merely stay until the content is evicted.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            other => {
                turn.done(Act::Punched { file, range });
                other.map_err(Into::into)
            }
        }
    }

    /// One directory, private to the daemon: cached contents may be confidential. Nothing to do where it exists.
    pub(super) fn make_dir(&self, path: &Path) -> io::Result<()> {
        let turn = self.turn(Op::Write)?;
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            Err(error) => Err(error),
            Ok(()) => {
                turn.done(Act::MadeDir { path });
                Ok(())
            }
        }
    }

    pub(super) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let turn = self.turn(Op::Name)?;
        fs::rename(from, to)?;
        turn.done(Act::Renamed { from, to });
        Ok(())
    }

    pub(super) fn remove_file(&self, path: &Path) -> io::Result<()> {
        let turn = self.turn(Op::Name)?;
        fs::remove_file(path)?;
        turn.done(Act::Removed { path });
        Ok(())
    }

    /// A file, or a directory with everything below it. Follows no link.
    pub(super) fn remove_tree(&self, path: &Path) -> io::Result<()> {
        if !fs::symlink_metadata(path)?.is_dir() {
            return self.remove_file(path);
        }
        for child in fs::read_dir(path)? {
            self.remove_tree(&child?.path())?;
        }
        let turn = self.turn(Op::Name)?;
        fs::remove_dir(path)?;
        turn.done(Act::Removed { path });
        Ok(())
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

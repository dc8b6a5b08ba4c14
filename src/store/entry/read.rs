//! The way out: bytes of held chunks, and the check that they still are what they were.

use std::io;
use std::sync::Arc;

use bytes::Bytes;

use super::Entry;
use crate::content::{ByteRange, ChunkDigest, ChunkIndex};
use crate::store::disk;
use crate::store::error::ReadError;
use crate::store::metrics::Lane;
use crate::store::spare::SPARE_BYTES;

/// Most bytes of one read: a longer one would hold a thread of the pool, and memory, for too long.
pub const READ_MAX_BYTES: u64 = 1 << 20;

impl Entry {
    /// The bytes of `range`, which lies in held chunks and is at most [`READ_MAX_BYTES`] long.
    ///
    /// The first read of a chunk after a start checks its digest, so that neither a crash nor a tired disk can make
    /// us serve a wrong byte.
    ///
    /// # Errors
    /// [`ReadError::NotHeld`] and [`ReadError::Corrupt`] mean: fetch the chunk and ask again.
    pub async fn read(self: &Arc<Self>, range: ByteRange) -> Result<Bytes, ReadError> {
        if range.len() > READ_MAX_BYTES || range.end() > self.layout.size() {
            return Err(ReadError::OutOfBounds {
                asked_bytes: range.len(),
                end: range.end(),
                size: self.layout.size(),
                limit_bytes: READ_MAX_BYTES,
            });
        }
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        self.touch();
        let bytes = match self.read_cached(range) {
            Some(bytes) => bytes,
            None => {
                let entry = Arc::clone(self);
                self.shared.pool.run(Lane::Read, move || entry.read_now(range)).await??
            }
        };
        self.shared.metrics.read_bytes.inc_by(range.len());
        Ok(bytes)
    }

    /// The bytes of `range` if they are checked and in memory. On the caller's thread, for to hand 256 KiB over from
    /// another one takes as long as to copy them, some 30 µs.
    fn read_cached(&self, range: ByteRange) -> Option<Bytes> {
        let len = usize::try_from(range.len()).ok().filter(|len| *len <= SPARE_BYTES)?;
        let removals = {
            let state = self.state.lock();
            let is_ready = |chunk| state.have.contains(chunk) && !state.unverified.contains(chunk);
            self.layout.chunks_of(range).all(is_ready).then_some(state.removals)?
        };
        // Whoever opens the file now may wait for the disk.
        let file = self.data.try_lock()?.open.clone()?;
        let mut buffer = self.shared.spares.take(len);
        let is_read = self.shared.disk.read_cached(&file, range.start(), buffer.as_mut());
        // Without a removal in between nobody wrote where we read.
        (is_read && self.state.lock().removals == removals).then(|| buffer.into())
    }

    /// [`read`](Self::read) on a thread that may block.
    pub(in crate::store) fn read_now(self: &Arc<Self>, range: ByteRange) -> Result<Bytes, ReadError> {
        let mut failures = 0;
        loop {
            let removals = self.ready_to_read(range)?;
            let bytes = match self.data().and_then(|file| self.shared.disk.read(&file, range)) {
                Ok(bytes) => bytes,
                // Every chunk has its digest after all: the medium had a moment.
                Err(error) if failures == 0 && disk::is_lost(&error) => {
                    self.find_culprit(range)?;
                    failures += 1;
                    continue;
                }
                Err(source) => return Err(ReadError::Io { path: self.data_path(), source }),
            };
            // Without a removal in between nobody wrote where we read.
            if self.state.lock().removals == removals {
                return Ok(Bytes::from(bytes));
            }
        }
    }

    /// Checks the digest of every chunk not checked since the start, up to `bytes_max`; false while some are left.
    pub(in crate::store) fn verify_some(self: &Arc<Self>, bytes_max: u64) -> Result<bool, ReadError> {
        let mut left = bytes_max;
        loop {
            let Some(chunk) = self.state.lock().unverified.iter().next() else { return Ok(true) };
            if left == 0 {
                return Ok(false);
            }
            self.verify(chunk)?;
            left = left.saturating_sub(self.layout.chunk_range(chunk).len());
        }
    }

    /// All chunks of `range` are held and checked; returns the number of removals so far.
    fn ready_to_read(self: &Arc<Self>, range: ByteRange) -> Result<u64, ReadError> {
        loop {
            let state = self.state.lock();
            let mut chunks = self.layout.chunks_of(range);
            if let Some(missing) = chunks.find(|chunk| !state.have.contains(*chunk)) {
                return Err(ReadError::NotHeld(missing));
            }
            let mut chunks = self.layout.chunks_of(range);
            let Some(unverified) = chunks.find(|chunk| state.unverified.contains(*chunk)) else {
                return Ok(state.removals);
            };
            drop(state);
            self.verify(unverified)?;
        }
    }

    /// [`verify`](Self::verify), but what the medium has is read and not what memory remembers of it.
    pub(in crate::store) fn scrub(self: &Arc<Self>, chunk: ChunkIndex) -> Result<(), ReadError> {
        self.verify_by(chunk, Self::digest_on_medium)
    }

    /// Reads `chunk` and compares its digest; drops it when it is not what was attested.
    fn verify(self: &Arc<Self>, chunk: ChunkIndex) -> Result<(), ReadError> {
        self.verify_by(chunk, Self::digest_on_disk)
    }

    fn verify_by(
        self: &Arc<Self>,
        chunk: ChunkIndex,
        digest_of: impl Fn(&Self, ChunkIndex) -> io::Result<ChunkDigest>,
    ) -> Result<(), ReadError> {
        let (attestation, removals) = {
            let state = self.state.lock();
            let Some(attestation) = state.attestations.get(&chunk) else {
                return Err(ReadError::NotHeld(chunk));
            };
            (*attestation, state.removals)
        };
        // A medium that fails is asked a second time before its chunk is given up.
        let digest = digest_of(self, chunk)
            .or_else(|error| if disk::is_lost(&error) { digest_of(self, chunk) } else { Err(error) });
        match digest {
            // It may have been removed and written again under our eyes: the caller looks again.
            _ if self.state.lock().removals != removals => Ok(()),
            Ok(digest) if digest == attestation.digest => {
                self.state.lock().unverified.remove(chunk);
                Ok(())
            }
            Ok(_) => Err(self.corrupt(chunk, "its digest is wrong")),
            Err(error) if disk::is_lost(&error) => Err(self.corrupt(chunk, &error.to_string())),
            Err(source) => Err(ReadError::Io { path: self.data_path(), source }),
        }
    }

    pub(super) fn digest_on_disk(&self, chunk: ChunkIndex) -> io::Result<ChunkDigest> {
        let file = self.data()?;
        let mut hasher = blake3::Hasher::new();
        for range in slices(self.layout.chunk_range(chunk)) {
            hasher.update(&self.shared.disk.read(&file, range)?);
        }
        Ok(ChunkDigest(*hasher.finalize().as_bytes()))
    }

    fn digest_on_medium(&self, chunk: ChunkIndex) -> io::Result<ChunkDigest> {
        let range = self.layout.chunk_range(chunk);
        let disk = &self.shared.disk;
        let is_aligned = range.start().is_multiple_of(disk::DIRECT_ALIGN as u64);
        let uncached = if is_aligned { disk.open_uncached(&self.data_path())? } else { None };
        let Some(file) = uncached else {
            let digest = self.digest_on_disk(chunk)?;
            disk::Disk::forget_cached(&*self.data()?, range);
            return Ok(digest);
        };
        let mut hasher = blake3::Hasher::new();
        for slice in slices(range) {
            disk.read_from_medium(&file, slice, &mut |bytes| {
                hasher.update(bytes);
            })?;
        }
        Ok(ChunkDigest(*hasher.finalize().as_bytes()))
    }

    /// The disk did not give the bytes: finds out which chunk is to blame, if any.
    fn find_culprit(self: &Arc<Self>, range: ByteRange) -> Result<(), ReadError> {
        self.layout.chunks_of(range).try_for_each(|chunk| self.verify(chunk))
    }

    fn corrupt(self: &Arc<Self>, chunk: ChunkIndex, reason: &str) -> ReadError {
        self.shared.metrics.corrupt_chunks.inc();
        if self.shared.corrupt_warning.is_due() {
            let path = self.data_path();
            tracing::error!(
                content = %self.id, chunk = chunk.0, path = %path.display(), reason,
                "a stored chunk is corrupt and is fetched again; check this disk"
            );
        }
        self.drop_chunk(chunk);
        ReadError::Corrupt(chunk)
    }
}

/// `range` in reads of at most [`READ_MAX_BYTES`].
pub(in crate::store) fn slices(range: ByteRange) -> impl Iterator<Item = ByteRange> {
    let count = range.len().div_ceil(READ_MAX_BYTES);
    (0..count).map(move |n| {
        let start = range.start() + n * READ_MAX_BYTES;
        ByteRange::new(start, (start + READ_MAX_BYTES).min(range.end()))
    })
}

//! Digests: of a chunk as it comes in, and of the whole, which runs ahead in order while chunks arrive.

use std::sync::Arc;

use bytes::Bytes;
use sha2::{Digest as _, Sha256, Sha512};

use super::Entry;
use super::read::slices;
use crate::content::{Algorithm, ByteRange, ChunkIndex, ContentId, Digest};
use crate::store::error::ReadError;
use crate::store::metrics::Lane;

/// Bytes hashed in one go before other jobs get the thread: about 32 ms of SHA-256.
const TURN_BYTES: u64 = 64 << 20;

/// The running hash over the chunks from the first on.
#[derive(Debug, Default)]
pub(super) struct WholeHash {
    running: Option<Running>,
    next: u32,
    /// Value of the entry's removal count that the hash belongs to: what was hashed may since have been replaced.
    removals: u64,
}

#[derive(Clone, Debug)]
enum Running {
    Sha256(Sha256),
    Sha512(Sha512),
}

/// How far a turn got.
pub(super) enum Progress {
    /// All chunks are hashed; the second value is the removal count that the digest belongs to.
    Done(Digest, u64),
    /// More held chunks follow.
    More,
    /// The next chunk is not held, or there is nothing to hash for.
    Waiting,
}

impl WholeHash {
    /// Blobs are named by the digest of their whole; an object's name says nothing about its bytes.
    pub(super) fn of(id: &ContentId) -> Self {
        let mut hash = Self::default();
        if let ContentId::Blob(digest) = id {
            hash.restart(digest.algorithm(), 0);
        }
        hash
    }

    /// Makes sure that the hash for `algorithm` is the one that runs.
    pub(super) fn want(&mut self, algorithm: Algorithm) {
        let same = self.running.as_ref().is_some_and(|running| running.algorithm() == algorithm);
        if !same {
            self.restart(algorithm, 0);
        }
    }

    fn restart(&mut self, algorithm: Algorithm, removals: u64) {
        let running = match algorithm {
            Algorithm::Sha256 => Running::Sha256(Sha256::new()),
            Algorithm::Sha512 => Running::Sha512(Sha512::new()),
        };
        *self = Self { running: Some(running), next: 0, removals };
    }
}

impl Running {
    const fn algorithm(&self) -> Algorithm {
        match self {
            Self::Sha256(_) => Algorithm::Sha256,
            Self::Sha512(_) => Algorithm::Sha512,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    fn digest(&self) -> Digest {
        let bytes = match self {
            Self::Sha256(hasher) => hasher.clone().finalize().to_vec(),
            Self::Sha512(hasher) => hasher.clone().finalize().to_vec(),
        };
        Digest::from_bytes(self.algorithm(), &bytes)
            .expect("a hasher returns as many bytes as its algorithm has")
    }
}

impl Entry {
    /// Carries the whole's hash on as far as chunks are held, starting with `fresh` if it is the next one.
    ///
    /// Does nothing while another thread is at it; that one, a later chunk, or the seal takes it from there.
    pub(super) fn hash_ahead(self: &Arc<Self>, fresh: Option<(ChunkIndex, &[Bytes])>) {
        let Some(mut whole) = self.whole.try_lock() else { return };
        if let (Some((chunk, pieces)), Some(running)) = (fresh, &whole.running)
            && chunk.0 == whole.next
            && self.removals() == whole.removals
        {
            let mut running = running.clone();
            pieces.iter().for_each(|piece| running.update(piece));
            whole.running = Some(running);
            whole.next += 1;
        }
        let more = matches!(self.turn(&mut whole), Ok(Progress::More));
        drop(whole);
        if more {
            let entry = Arc::clone(self);
            // With a full queue the next chunk or the seal carries on.
            self.shared.pool.try_submit(Lane::Write, move || entry.hash_ahead(None));
        }
    }

    /// One turn of hashing held chunks, waiting for another thread that is at it.
    pub(super) fn hash_turn(self: &Arc<Self>, algorithm: Algorithm) -> Result<Progress, ReadError> {
        let mut whole = self.whole.lock();
        whole.want(algorithm);
        self.turn(&mut whole)
    }

    /// Throws the running hash away: something in it was wrong.
    pub(super) fn forget_whole_hash(&self) {
        *self.whole.lock() = WholeHash::of(&self.id);
    }

    fn turn(self: &Arc<Self>, whole: &mut WholeHash) -> Result<Progress, ReadError> {
        let mut left = TURN_BYTES;
        loop {
            let removals = self.removals();
            let Some(running) = &mut whole.running else { return Ok(Progress::Waiting) };
            if removals != whole.removals {
                let algorithm = running.algorithm();
                whole.restart(algorithm, removals);
                continue;
            }
            if whole.next == self.layout.chunk_count() {
                return Ok(Progress::Done(running.digest(), removals));
            }
            let chunk = ChunkIndex(whole.next);
            if !self.holds(chunk) {
                return Ok(Progress::Waiting);
            }
            if left == 0 {
                return Ok(Progress::More);
            }
            let range = self.layout.chunk_range(chunk);
            let mut ahead = running.clone();
            self.hash_range(&mut ahead, range)?;
            *running = ahead;
            whole.next += 1;
            left = left.saturating_sub(range.len());
        }
    }

    fn hash_range(self: &Arc<Self>, running: &mut Running, range: ByteRange) -> Result<(), ReadError> {
        slices(range).try_for_each(|slice| self.read_now(slice).map(|bytes| running.update(&bytes)))
    }

    fn removals(&self) -> u64 {
        self.state.lock().removals
    }
}

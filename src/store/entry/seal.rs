//! The word that a content is whole: all chunks held, the whole's digest checked where there is one, and durable.

use std::sync::Arc;

use super::Entry;
use super::hash::Progress;
use crate::content::{ContentId, Digest};
use crate::store::error::{ReadError, SealError};
use crate::store::metrics::Lane;
use crate::store::sidecar::Record;

impl Entry {
    /// Verifies the whole and seals the content; Ok means that this is durable.
    ///
    /// A blob must have the digest that names it; the hash ran ahead while chunks came in, so that little is left to
    /// do. An object has no digest of its own: its chunks are all there is to check.
    ///
    /// # Errors
    /// [`SealError::Mismatch`]: at least one chunk was attested wrongly; remove the chunks in doubt, fetch them
    /// again, and seal again.
    pub async fn seal(self: &Arc<Self>) -> Result<(), SealError> {
        if self.is_sealed() {
            return Ok(());
        }
        match &self.id {
            ContentId::Blob(digest) => self.seal_matching(digest).await,
            ContentId::Object(_) => {
                let removals = self.state.lock().removals;
                self.record_seal(removals).await
            }
        }
    }

    /// Checks the whole as [`seal`](Self::seal) does and records nothing: what readers wait for, who do not wait for the
    /// disk. A seal that follows does not hash again.
    ///
    /// # Errors
    /// As for [`seal`](Self::seal).
    pub async fn verify_whole(self: &Arc<Self>) -> Result<(), SealError> {
        match &self.id {
            ContentId::Blob(digest) if !self.is_sealed() => self.matches(digest).await.map(|_| ()),
            _ => self.check_complete(),
        }
    }

    /// Like [`seal`](Self::seal), but the whole must have `expected`: for an object whose digest somebody supplied.
    ///
    /// # Errors
    /// As for [`seal`](Self::seal). A content that was sealed stays so.
    pub async fn seal_matching(self: &Arc<Self>, expected: &Digest) -> Result<(), SealError> {
        let removals = self.matches(expected).await?;
        if self.is_sealed() {
            return Ok(());
        }
        self.record_seal(removals).await
    }

    /// The removal count for which the whole has the digest `expected`.
    async fn matches(self: &Arc<Self>, expected: &Digest) -> Result<u64, SealError> {
        let (actual, removals) = self.whole_digest(expected).await?;
        if actual != *expected {
            self.shared.metrics.seal_mismatches.inc();
            self.forget_whole_hash();
            return Err(SealError::Mismatch { expected: expected.clone(), actual });
        }
        Ok(removals)
    }

    /// The whole's digest by `expected`'s algorithm, and the removal count that it belongs to.
    async fn whole_digest(self: &Arc<Self>, expected: &Digest) -> Result<(Digest, u64), SealError> {
        let algorithm = expected.algorithm();
        loop {
            self.check_complete()?;
            let entry = Arc::clone(self);
            let turn = self.shared.pool.run(Lane::Write, move || entry.hash_turn(algorithm)).await?;
            match turn.map_err(|error| self.seal_error(error))? {
                Progress::Done(digest, removals) => return Ok((digest, removals)),
                // Waiting: a chunk was removed meanwhile, which the check at the top reports.
                Progress::More | Progress::Waiting => {}
            }
        }
    }

    async fn record_seal(self: &Arc<Self>, removals: u64) -> Result<(), SealError> {
        let layout = self.layout;
        let recorded = self
            .record(|state| {
                if !state.have.is_full(&layout) || state.removals != removals {
                    let missing = layout.chunk_count() - state.have.len();
                    return Err(SealError::Incomplete { missing });
                }
                state.seal_pending = Some(removals);
                state.pending.push(Record::Sealed);
                Ok(())
            })
            .await?;
        recorded.map_err(|error| SealError::Io {
            path: self.data_path(),
            source: std::io::Error::new(error.kind(), error),
        })?;
        // A chunk can turn out bad between the record and here.
        if self.is_sealed() { Ok(()) } else { self.check_complete() }
    }

    fn check_complete(&self) -> Result<(), SealError> {
        let missing = self.layout.chunk_count() - self.state.lock().have.len();
        if missing > 0 { Err(SealError::Incomplete { missing }) } else { Ok(()) }
    }

    fn seal_error(&self, error: ReadError) -> SealError {
        match error {
            ReadError::Corrupt(chunk) => SealError::Corrupt(chunk),
            ReadError::Io { path, source } => SealError::Io { path, source },
            ReadError::Closed => SealError::Closed,
            // A chunk left between two turns.
            ReadError::NotHeld(_) | ReadError::OutOfBounds { .. } => {
                let missing = self.layout.chunk_count() - self.state.lock().have.len();
                SealError::Incomplete { missing }
            }
        }
    }
}

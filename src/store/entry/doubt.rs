//! Chunks that a killed process had written and not seen durable: believed once their bytes were hashed.
//!
//! Invariant: a chunk in doubt is not in `have`, so it is neither read nor announced; its bytes count as stored all the
//! while, because they lie on the disk. This module refuses to fetch what turns out not to be there.

use std::sync::Arc;

use super::Entry;
use crate::content::ChunkIndex;
use crate::store::metrics::Lane;
use crate::store::sidecar::Record;

impl Entry {
    /// Whether chunks may be here that [`have`](Self::have) lacks until they were [settled](Self::settle).
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        !self.state.lock().doubts.is_empty()
    }

    /// Hashes every chunk in doubt. What has its digest is held from then on and made durable soon; the rest is gone.
    ///
    /// There is something to do only after a crash, and only for what was written in the second before it.
    pub async fn settle(self: &Arc<Self>) {
        while let Some(chunk) = self.next_doubt() {
            // Written again meanwhile, and so no longer in doubt.
            let Ok(claim) = self.claim(chunk).await else { continue };
            let entry = Arc::clone(self);
            let job = move || {
                entry.settle_chunk(chunk);
                drop(claim);
            };
            if self.shared.pool.run(Lane::Read, job).await.is_err() {
                return;
            }
        }
    }

    /// Bytes of chunks in doubt.
    pub(in crate::store) fn doubtful_bytes(&self) -> u64 {
        let state = self.state.lock();
        state.doubts.keys().map(|chunk| self.layout.chunk_range(*chunk).len()).sum()
    }

    fn next_doubt(&self) -> Option<ChunkIndex> {
        self.state.lock().doubts.keys().min().copied()
    }

    fn settle_chunk(self: &Arc<Self>, chunk: ChunkIndex) {
        let Some(attestation) = self.state.lock().doubts.get(&chunk).copied() else { return };
        let bytes = self.layout.chunk_range(chunk).len();
        // A file that takes the data file's place holds no chunk in doubt: what was hashed must still be there.
        let unreplaced = self.writing.read();
        let is_intact = self.digest_on_disk(chunk).is_ok_and(|digest| digest == attestation.digest);
        let mut state = self.state.lock();
        if state.doubts.remove(&chunk).is_none() {
            return; // removed while it was hashed
        }
        if is_intact {
            let pending_bytes = state.hold(chunk, attestation, bytes);
            drop((state, unreplaced));
            self.shared.metrics.recovered_bytes.inc_by(bytes);
            self.shared.syncer.after_write(self, pending_bytes);
        } else {
            state.pending.push(Record::Dropped(chunk));
            drop((state, unreplaced));
            tracing::debug!(content = %self.id, chunk = chunk.0, "a chunk did not outlive the crash");
            self.shared.room.release_stored(bytes);
            self.shared.syncer.soon(self);
        }
    }
}

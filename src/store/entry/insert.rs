//! The way in: hash, compare, reserve, write.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::Entry;
use crate::content::{Attestation, ByteRange, ChunkDigest, ChunkIndex, NodeId};
use crate::store::disk;
use crate::store::error::InsertError;
use crate::store::metrics::{InsertFailure, Lane};

/// What a chunk's bytes are compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// They came from a peer: they must have this digest.
    Attested(Attestation),
    /// The caller has just hashed these very bytes to the attested digest, to pass them on before the disk has them;
    /// they are not hashed twice.
    Verified(Attestation),
    /// They came from the origin: this node, the one named, attests whatever they hash to.
    Attest(NodeId),
}

/// A chunk whose bytes nobody else may touch until this is dropped.
pub(super) struct Claim {
    entry: Arc<Entry>,
    chunk: ChunkIndex,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.entry.state.lock().busy.remove(self.chunk);
        self.entry.settled.notify_waiters();
    }
}

impl Entry {
    /// Verifies and writes one chunk; when this returns the chunk can be read, and it is made durable soon after.
    ///
    /// `pieces`, one behind the other, are the chunk's bytes. A chunk that is already held is left as it is and its
    /// attestation returned. Once queued the work is done even when the future is dropped.
    ///
    /// # Errors
    /// [`InsertError::Mismatch`] names the node that attested something else;
    /// [`InsertError::NoSpace`] means that nothing is stored and nothing is lost.
    pub async fn insert(
        self: &Arc<Self>,
        chunk: ChunkIndex,
        pieces: Vec<Bytes>,
        expect: Expect,
    ) -> Result<Attestation, InsertError> {
        self.check_length(chunk, &pieces)?;
        self.touch();
        let claim = match self.claim(chunk).await {
            Ok(claim) => claim,
            Err(held) => return Ok(held),
        };
        let (answer, answered) = oneshot::channel();
        let job = move || {
            let entry = Arc::clone(&claim.entry);
            let outcome = entry.write_chunk(chunk, &pieces, expect);
            let stored = outcome.is_ok();
            drop(claim);
            // The caller may have gone.
            let _ = answer.send(outcome);
            if stored {
                // The pieces are still in this core's cache: now is the cheapest moment for the whole's hash.
                entry.hash_ahead(Some((chunk, &pieces)));
            }
        };
        self.shared.pool.submit(Lane::Write, job).await?;
        answered.await.map_err(|_| InsertError::Closed)?
    }

    fn check_length(&self, chunk: ChunkIndex, pieces: &[Bytes]) -> Result<(), InsertError> {
        let expected_bytes = self.layout.chunk_range(chunk).len();
        let got_bytes = pieces.iter().map(|piece| piece.len() as u64).sum();
        if expected_bytes == 0 || expected_bytes != got_bytes {
            return Err(InsertError::WrongLength { chunk, expected_bytes, got_bytes });
        }
        Ok(())
    }

    /// The right to write `chunk`, or the attestation under which it is held already.
    pub(super) async fn claim(self: &Arc<Self>, chunk: ChunkIndex) -> Result<Claim, Attestation> {
        loop {
            let mut settled = std::pin::pin!(self.settled.notified());
            // From here on no notification is missed.
            settled.as_mut().enable();
            {
                let mut state = self.state.lock();
                if let Some(held) = state.attestations.get(&chunk) {
                    return Err(*held);
                }
                if state.busy.insert(chunk) {
                    return Ok(Claim { entry: Arc::clone(self), chunk });
                }
            }
            settled.await;
        }
    }

    fn write_chunk(
        self: &Arc<Self>,
        chunk: ChunkIndex,
        pieces: &[Bytes],
        expect: Expect,
    ) -> Result<Attestation, InsertError> {
        let attestation = match expect {
            Expect::Verified(attestation) => attestation,
            Expect::Attest(attester) => Attestation { digest: ChunkDigest::of_pieces(pieces), attester },
            Expect::Attested(attestation) if attestation.digest == ChunkDigest::of_pieces(pieces) => {
                attestation
            }
            Expect::Attested(Attestation { attester, .. }) => {
                self.shared.metrics.count_insert_failure(InsertFailure::Mismatch);
                return Err(InsertError::Mismatch { chunk, attester });
            }
        };
        let range = self.layout.chunk_range(chunk);
        let room = self.shared.reserve(range.len()).map_err(|reason| self.passed_through(reason))?;
        self.write_or_evict(range, pieces).map_err(|error| self.passed_through(error.to_string()))?;
        room.commit();
        self.shared.metrics.inserted_bytes.inc_by(range.len());
        self.note_written(chunk, attestation);
        let mut state = self.state.lock();
        let was_in_doubt = state.doubts.remove(&chunk).is_some();
        let pending_bytes = state.hold(chunk, attestation, range.len());
        drop(state);
        if was_in_doubt {
            // Its old bytes, which lay where the new ones do, were counted too.
            self.shared.room.release_stored(range.len());
        }
        self.shared.syncer.after_write(self, pending_bytes);
        Ok(attestation)
    }

    /// Whatever the disk says, the caller still has the bytes and the content is as it was.
    fn passed_through(&self, reason: String) -> InsertError {
        let metrics = &self.shared.metrics;
        metrics.count_insert_failure(InsertFailure::NoSpace);
        metrics.pass_throughs.inc();
        if self.shared.no_space_warning.is_due() {
            tracing::warn!(content = %self.id, reason, "chunks are passed through without being stored");
        }
        InsertError::NoSpace { reason }
    }

    /// A disk or quota that is full before our own bounds are reached is answered like them: something old goes.
    fn write_or_evict(&self, range: ByteRange, pieces: &[Bytes]) -> io::Result<()> {
        match self.write_pieces(range, pieces) {
            Err(error) if disk::is_full(&error) && self.shared.evict_one() => {
                self.write_pieces(range, pieces)
            }
            other => other,
        }
    }

    fn write_pieces(&self, range: ByteRange, pieces: &[Bytes]) -> io::Result<()> {
        if self.data()?.metadata()?.nlink() > 1 {
            self.part_from_placed_file()?;
        }
        self.name_data()?;
        let _writing = self.writing.read();
        self.shared.disk.write_pieces(&*self.data()?, range.start(), pieces)
    }

    /// A sealed content was placed by hard link and has since lost a chunk: what is placed must not change, so the
    /// held chunks move into a file of our own before anything is written.
    fn part_from_placed_file(&self) -> io::Result<()> {
        let _alone = self.writing.write();
        let old = self.data()?;
        if old.metadata()?.nlink() == 1 {
            return Ok(());
        }
        let disk = &self.shared.disk;
        let fresh_path = self.dir().join("data.new");
        let fresh: File = disk.open(&fresh_path)?;
        disk.resize(&fresh, 0)?;
        disk.resize(&fresh, self.layout.size())?;
        for chunk in self.have().iter() {
            let range = self.layout.chunk_range(chunk);
            disk.write_at(&fresh, range.start(), &disk.read(&old, range)?)?;
        }
        disk.sync_data(&fresh)?;
        disk.rename(&fresh_path, &self.data_path())?;
        // At once: the old file is the placed one's alone now, and looks like ours.
        self.replace_data(fresh);
        Ok(())
    }
}

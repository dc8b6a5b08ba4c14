//! From written to durable: `fdatasync` the data, then say so in the sidecar, then in the index.
//!
//! Several chunks share one sync. The order of records in the log is the order of events, whatever fails in between.

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Entry, State};
use crate::content::{ChunkIndex, ChunkSet};
use crate::store::catalog::Loss;
use crate::store::error::Closed;
use crate::store::pin::Pin;
use crate::store::sidecar::Record;

/// What failed decides what can still be believed.
enum SyncFailure {
    /// After a failed `fdatasync` the kernel may have dropped the pages: nothing written since the last good one
    /// is safe, and a second attempt would succeed without writing it.
    Data(io::Error),
    /// The records can be written again.
    Sidecar(io::Error),
}

impl Entry {
    /// Takes `chunks` out of the content, on disk too; a sealed content is no longer sealed. Chunks that are not held
    /// are passed over.
    ///
    /// Returns when the sidecar no longer claims them (or the disk refused to say so: they are not served either way,
    /// and a chunk that a later start finds again is checked before it is served).
    pub async fn remove(self: &Arc<Self>, chunks: &ChunkSet) {
        let mut released = 0;
        let outcome = self
            .record(|state| {
                let taken = chunks.iter().filter(|chunk| state.take_out(*chunk));
                released = taken.map(|chunk| self.layout.chunk_range(chunk).len()).sum();
                Ok::<(), Closed>(())
            })
            .await;
        self.shared.room.release_stored(released);
        if let Ok(Err(error)) = outcome {
            tracing::warn!(content = %self.id, %error, "removing chunks could not be recorded yet");
        }
    }

    /// Takes the last held chunks out, `bytes_min` of them or a chunk more, and gives their room back to the file
    /// system. Blocking. Returns how many bytes that were: none when a placed file shares them.
    pub(in crate::store) fn give_up_tail(self: &Arc<Self>, bytes_min: u64) -> io::Result<u64> {
        if self.data()?.metadata()?.nlink() > 1 {
            return Ok(0);
        }
        let (mut given_up, mut bytes) = (ChunkSet::new(), 0);
        let mut state = self.state.lock();
        let held: Vec<ChunkIndex> = state.have.iter().collect();
        for chunk in held.into_iter().rev() {
            if bytes >= bytes_min {
                break;
            }
            if !state.busy.contains(chunk) && state.take_out(chunk) {
                given_up.insert(chunk);
                bytes += self.layout.chunk_range(chunk).len();
            }
        }
        drop(state);
        self.shared.room.release_stored(bytes);
        self.shared.catalog.lose(Loss::Chunks(self.key, given_up));
        self.sync()?;
        Ok(bytes)
    }

    /// Exempts the content from eviction for as long as `pin` says, whatever was said before. Survives restarts.
    ///
    /// # Errors
    /// When the disk does not take the record; it is tried again in the background.
    pub async fn set_pin(self: &Arc<Self>, pin: Pin) -> io::Result<()> {
        let outcome = self
            .record(|state| {
                state.pin = pin;
                state.pending.push(Record::Pinned(pin));
                Ok::<(), Closed>(())
            })
            .await;
        match outcome {
            Ok(recorded) => recorded.map_err(|error| io::Error::new(error.kind(), error)),
            Err(Closed) => Err(io::Error::other("the store is closed")),
        }
    }

    /// [`set_pin`](Self::set_pin), unless the content is pinned for longer already.
    ///
    /// # Errors
    /// As for [`set_pin`](Self::set_pin).
    pub async fn pin_at_least(self: &Arc<Self>, pin: Pin) -> io::Result<()> {
        if self.pin() >= pin { Ok(()) } else { self.set_pin(pin).await }
    }

    /// Lets `change` push records, and waits until they are durable.
    pub(super) async fn record<E: From<Closed>>(
        self: &Arc<Self>,
        change: impl FnOnce(&mut State) -> Result<(), E>,
    ) -> Result<Result<(), Arc<io::Error>>, E> {
        let (durable, is_durable) = oneshot::channel();
        {
            let mut state = self.state.lock();
            change(&mut state)?;
            state.waiters.push(durable);
        }
        if !self.shared.syncer.now(self) {
            self.dismiss_waiters();
        }
        is_durable.await.map_err(|_| Closed.into())
    }

    /// Makes everything written so far durable. Blocking.
    pub(in crate::store) fn sync(self: &Arc<Self>) -> io::Result<()> {
        let in_turn = self.syncing.lock();
        let (records, waiters) = {
            let mut state = self.state.lock();
            state.pending_bytes = 0;
            (std::mem::take(&mut state.pending), std::mem::take(&mut state.waiters))
        };
        let outcome = match self.write_records(&records) {
            Ok(()) => {
                self.recorded(&records);
                Ok(())
            }
            Err(failure) => Err(self.not_recorded(records, failure)),
        };
        drop(in_turn);
        let told = outcome.map_err(Arc::new);
        for waiter in waiters {
            // Whoever asked may have gone.
            let _ = waiter.send(told.clone());
        }
        told.map_err(|error| io::Error::new(error.kind(), error))
    }

    /// Tells those who wait for a sync that there will be none: the store has ended.
    pub(in crate::store) fn dismiss_waiters(&self) {
        self.state.lock().waiters.clear();
    }

    pub(in crate::store) fn has_pending(&self) -> bool {
        let state = self.state.lock();
        !state.pending.is_empty() || !state.waiters.is_empty()
    }

    fn write_records(&self, records: &[Record]) -> Result<(), SyncFailure> {
        if records.is_empty() {
            return Ok(());
        }
        let holds = records.iter().any(|record| matches!(record, Record::Held(..)));
        if holds || !self.is_named() {
            let disk = &self.shared.disk;
            self.data().and_then(|file| disk.sync_data(&file)).map_err(SyncFailure::Data)?;
        }
        self.append_durably(records).map_err(SyncFailure::Sidecar)
    }

    fn recorded(self: &Arc<Self>, records: &[Record]) {
        let mut dropped = Vec::new();
        let mut state = self.state.lock();
        let dropped_since: HashSet<ChunkIndex> = state.pending_drops().collect();
        for record in records {
            match record {
                Record::Held(chunk, _) if state.have.contains(*chunk) && !dropped_since.contains(chunk) => {
                    state.durable.insert(*chunk);
                }
                Record::Dropped(chunk) => dropped.push(*chunk),
                Record::Sealed => {
                    // Void when a chunk was taken out after the whole was verified. There may be a second record: of a
                    // seal that could not be written and was tried again.
                    if let Some(removals) = state.seal_pending.take() {
                        state.sealed = removals == state.removals;
                    }
                }
                _ => {}
            }
        }
        drop(state);
        dropped.into_iter().for_each(|chunk| self.punch_out(chunk));
        if !records.is_empty() {
            self.shared.index.put(self.key, self.row());
        }
    }

    fn not_recorded(self: &Arc<Self>, mut records: Vec<Record>, failure: SyncFailure) -> io::Error {
        self.shared.metrics.sync_failures.inc();
        let (error, lost) = match failure {
            SyncFailure::Sidecar(error) => (error, Vec::new()),
            SyncFailure::Data(error) => {
                let is_held = |record: &Record| matches!(record, Record::Held(..));
                let lost = records.extract_if(.., |record| is_held(record)).collect();
                (error, lost)
            }
        };
        let mut state = self.state.lock();
        records.append(&mut state.pending);
        state.pending = records;
        let mut released = 0;
        for record in &lost {
            if let Record::Held(chunk, _) = record
                && state.take_out(*chunk)
            {
                released += self.layout.chunk_range(*chunk).len();
            }
        }
        drop(state);
        self.shared.room.release_stored(released);
        if self.shared.sync_warning.is_due() {
            let path = self.dir.display().to_string();
            tracing::error!(path, %error, lost_chunks = lost.len(), "chunks could not be made durable; check this disk");
        }
        self.shared.syncer.retry(self);
        error
    }

    /// Gives a removed chunk's room back, unless it is being written again or the bytes are a placed file's too.
    fn punch_out(&self, chunk: ChunkIndex) {
        {
            let mut state = self.state.lock();
            if state.have.contains(chunk) || !state.busy.insert(chunk) {
                return;
            }
        }
        let outcome = self.data().and_then(|file| {
            if file.metadata()?.nlink() > 1 {
                return Ok(());
            }
            self.shared.disk.punch_hole(&file, self.layout.chunk_range(chunk))
        });
        if let Err(error) = outcome {
            tracing::debug!(content = %self.id, chunk = chunk.0, %error, "a removed chunk keeps its room on disk");
        }
        self.state.lock().busy.remove(chunk);
        self.settled.notify_waiters();
    }
}

impl State {
    fn pending_drops(&self) -> impl Iterator<Item = ChunkIndex> + '_ {
        self.pending.iter().filter_map(|record| match record {
            Record::Dropped(chunk) => Some(*chunk),
            _ => None,
        })
    }
}

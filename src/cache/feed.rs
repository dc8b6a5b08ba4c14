//! The bytes of one chunk, in order, from wherever they are: the store, or the flight that is bringing them.
//!
//! A client's reader and the provider that answers peers both walk chunks through this, so there is one place that
//! moves from the air to the disk without losing or repeating a byte.
//! Refuses to start a fetch for a peer: a peer is served what is here or on its way here.

use std::sync::Arc;

use bytes::Bytes;

use crate::content::{Attestation, ByteRange, ChunkIndex, ChunkSet, ContentKey, Layout};
use crate::store::{self, Entry};

use super::driver::Command;
use super::error::ReadError;
use super::flight::{Flight, Glimpse, Trust};
use super::open::Open;
use super::shared::Shared;

/// 256 KiB: frames of 128 to 256 KiB were the fastest to serve (`facts/limits.md` section 3).
const PIECE_BYTES: u32 = 256 << 10;

/// A chunk that turns out corrupt or evicted under a reader is looked for again this often before the read fails.
const RETRIES_MAX: u32 = 3;

/// Walks one chunk.
pub struct Feed {
    shared: Arc<Shared>,
    entry: Option<Arc<Entry>>,
    open: Option<Arc<Open>>,
    layout: Layout,
    chunk: ChunkIndex,
    trust: Trust,
    retries: u32,
}

impl Feed {
    /// For a client of this node: chunks that are missing are in demand.
    pub(super) fn checked(open: &Arc<Open>, chunk: ChunkIndex) -> Self {
        Self {
            shared: Arc::clone(&open.shared),
            entry: open.entry.clone(),
            open: Some(Arc::clone(open)),
            layout: open.layout,
            chunk,
            trust: Trust::Checked,
            retries: 0,
        }
    }

    /// For a peer: `None` when the chunk is neither held nor in the air.
    pub(super) fn unchecked(shared: &Arc<Shared>, key: ContentKey, chunk: ChunkIndex) -> Option<Self> {
        let open = shared.opened(key);
        if open.as_ref().is_some_and(|open| open.is_quarantined()) {
            return None;
        }
        let entry = open.as_ref().map_or_else(|| shared.store.get(&key), |open| open.entry.clone());
        let held = entry.as_ref().is_some_and(|entry| entry.holds(chunk));
        if !held {
            let flight = open.as_ref()?.existing_flight(chunk)?;
            if !flight.is_filling() && !flight.is_kept() {
                return None;
            }
        }
        let layout = open.as_ref().map(|open| open.layout).or_else(|| entry.as_ref().map(|e| e.layout()))?;
        (chunk.0 < layout.chunk_count()).then(|| Self {
            shared: Arc::clone(shared),
            entry,
            open,
            layout,
            chunk,
            trust: Trust::Unchecked,
            retries: 0,
        })
    }

    /// Length of the chunk in bytes.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.layout.chunk_len(self.chunk)
    }

    /// A chunk is never empty; here for the lint that wants it beside `len`.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next bytes from `offset`, at most to `end`, both within the chunk. Waits for bytes in the air.
    ///
    /// # Errors
    /// When nobody brings the chunk, or nothing of it arrives for the configured stall time.
    pub async fn next(&mut self, offset: u32, end: u32) -> Result<Bytes, ReadError> {
        let limit = PIECE_BYTES.min(end.saturating_sub(offset));
        loop {
            if let Some(bytes) = self.read_store(offset, limit).await? {
                return Ok(bytes);
            }
            let Some(flight) = self.flight()? else { continue };
            let mut changed = flight.subscribe();
            match flight.look(offset, limit as usize, self.trust) {
                Glimpse::Piece(bytes) => return Ok(bytes),
                Glimpse::Failed(error) => return Err(error),
                // Stored and gone again: evicted, or found corrupt on its first read.
                Glimpse::Stored if !self.held() => {
                    self.retry("the chunk left the store while it was read")?
                }
                Glimpse::Stored => {}
                // Stored and landed since the store was asked: this flight is a new one that nobody will fill.
                Glimpse::Pending if self.held() => {}
                Glimpse::Pending => self.wait(&flight, &mut changed).await?,
            }
        }
    }

    /// Who vouches for the chunk, once it is whole and checked. Waits for that.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub async fn attestation(&mut self) -> Result<Attestation, ReadError> {
        loop {
            if let Some(known) = self.entry.as_ref().and_then(|entry| entry.attestation(self.chunk)) {
                return Ok(known);
            }
            let Some(flight) = self.flight()? else { continue };
            let mut changed = flight.subscribe();
            match flight.look(u32::MAX, 0, self.trust) {
                Glimpse::Failed(error) => return Err(error),
                Glimpse::Stored if !self.held() => {
                    self.retry("the chunk left the store while it was read")?
                }
                Glimpse::Stored | Glimpse::Piece(_) => {}
                Glimpse::Pending if self.held() => {}
                Glimpse::Pending => match flight.attestation() {
                    Some(attestation) => return Ok(attestation),
                    None => self.wait(&flight, &mut changed).await?,
                },
            }
        }
    }

    fn held(&self) -> bool {
        self.entry.as_ref().is_some_and(|entry| entry.holds(self.chunk))
    }

    async fn read_store(&mut self, offset: u32, limit: u32) -> Result<Option<Bytes>, ReadError> {
        let Some(entry) = self.entry.as_ref().filter(|entry| entry.holds(self.chunk)) else {
            return Ok(None);
        };
        let start = self.layout.chunk_range(self.chunk).start() + u64::from(offset);
        match entry.read(ByteRange::new(start, start + u64::from(limit))).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) => {
                let again = matches!(error, store::ReadError::NotHeld(_) | store::ReadError::Corrupt(_));
                if again {
                    self.lost(*entry.key()).await;
                    self.retry(&error.to_string())?;
                    return Ok(None);
                }
                Err(self.store_error(&error.to_string()))
            }
        }
    }

    /// The chunk is no longer on disk: the swarm must know before it is asked to bring it again.
    async fn lost(&self, key: ContentKey) {
        if let Some(open) = &self.open {
            open.unseal();
        }
        let chunks = ChunkSet::from_iter([self.chunk]);
        // The driver being gone means shutdown.
        let _ = self.shared.commands.send(Command::Dropped { key, chunks }).await;
        self.shared.mark_dirty(key);
    }

    /// `None` when the chunk has landed since the store was asked.
    fn flight(&self) -> Result<Option<Arc<Flight>>, ReadError> {
        let open =
            self.open.as_ref().ok_or_else(|| self.store_error("it left the store while it was served"))?;
        match self.trust {
            Trust::Checked => Ok(Some(open.flight(self.chunk))),
            Trust::Unchecked => match open.existing_flight(self.chunk) {
                None if !self.held() => Err(self.store_error("it is no longer on its way to this node")),
                flight => Ok(flight),
            },
        }
    }

    /// Until something happened to `flight`. A failure is told here, because a flight that failed is no longer the
    /// chunk's: the next look would be at its successor.
    async fn wait(
        &self,
        flight: &Flight,
        changed: &mut tokio::sync::watch::Receiver<()>,
    ) -> Result<(), ReadError> {
        let stall = self.shared.config.stall_timeout();
        tokio::select! {
            outcome = tokio::time::timeout(stall, changed.changed()) => match outcome {
                Ok(_) => flight.failure().map_or(Ok(()), Err),
                Err(_) => Err(ReadError::Stalled { content: self.name(), waited: stall }),
            },
            () = self.shared.shutdown.cancelled() => Err(ReadError::Shutdown),
        }
    }

    fn retry(&mut self, reason: &str) -> Result<(), ReadError> {
        self.retries += 1;
        if self.retries > RETRIES_MAX { Err(self.store_error(reason)) } else { Ok(()) }
    }

    fn store_error(&self, reason: &str) -> ReadError {
        ReadError::Store { content: self.name(), reason: reason.to_owned() }
    }

    fn name(&self) -> String {
        let content = self
            .open
            .as_ref()
            .map(|open| open.id.to_string())
            .or_else(|| self.entry.as_ref().map(|entry| entry.id().to_string()));
        format!("chunk {} of {}", self.chunk.0, content.unwrap_or_default())
    }
}

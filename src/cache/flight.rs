//! One chunk in the air: the bytes so far, who may already see them, and how it ended.
//!
//! Exists so that a chunk is fetched once however many readers and peers wait for it, and so that they need not wait
//! for it to be whole. Invariant: a client sees bytes only from an origin or from a chunk whose digest was checked;
//! peers may see unchecked bytes, because the trailer makes them check for themselves.
//! Refuses to fetch: flows put bytes in, feeds take them out.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::content::Attestation;

use super::error::ReadError;

/// Where the bytes of a flow come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Provenance {
    Origin,
    Peer,
}

/// Who asks to see the bytes of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// A client of this node: origin bytes as they come, peer bytes once checked.
    Checked,
    /// A peer, which checks for itself.
    Unchecked,
}

/// What a look at a flight shows.
pub(super) enum Glimpse {
    Piece(Bytes),
    /// Nothing to see yet: wait for a change.
    Pending,
    /// The chunk is in the store now.
    Stored,
    Failed(ReadError),
}

/// Shared by the flow that fills it and the feeds that drain it.
pub(super) struct Flight {
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

#[derive(Default)]
struct State {
    /// Pieces with the offset of their first byte, contiguous from 0.
    pieces: Vec<(u32, Bytes)>,
    received: u32,
    /// Flows that are filling it now: one, or two for a moment when a slow one is being replaced.
    flows: u32,
    /// Some byte came from a peer and the digest has not been checked.
    unchecked: bool,
    /// Set once the chunk is whole and its digest was checked, or made.
    attestation: Option<Attestation>,
    end: Option<End>,
}

/// A flow is filling the flight while this lives.
pub(super) struct Filling(Arc<Flight>);

impl Drop for Filling {
    fn drop(&mut self) {
        self.0.state.lock().flows -= 1;
    }
}

impl State {
    fn clear(&mut self) {
        self.pieces = Vec::new();
        self.received = 0;
        self.unchecked = false;
        self.attestation = None;
    }
}

enum End {
    Stored,
    /// Checked, but the store had no room: served from memory while somebody wants it.
    Kept,
    Failed(ReadError),
}

impl Flight {
    pub(super) fn new() -> Self {
        Self { state: Mutex::default(), changed: watch::Sender::new(()) }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Bytes received so far, contiguous from the start of the chunk.
    pub(super) fn received(&self) -> u32 {
        self.state.lock().received
    }

    /// Whether the chunk is whole, checked and held here because the store had no room.
    pub(super) fn is_kept(&self) -> bool {
        matches!(self.state.lock().end, Some(End::Kept))
    }

    /// Who vouches for the chunk, once it is whole and checked, whether or not the disk has it yet.
    pub(super) fn attestation(&self) -> Option<Attestation> {
        self.state.lock().attestation
    }

    /// Begins a flow from `provenance`; it asks for the rest from [`Self::received`]. An origin flow never continues
    /// peer bytes: this node will attest the whole chunk.
    pub(super) fn begin_flow(self: &Arc<Self>, provenance: Provenance) -> Filling {
        let mut state = self.state.lock();
        if provenance == Provenance::Origin && state.unchecked {
            state.clear();
        }
        state.flows += 1;
        Filling(Arc::clone(self))
    }

    /// Whether some flow is bringing bytes now.
    pub(super) fn is_filling(&self) -> bool {
        self.state.lock().flows > 0
    }

    /// Adds the bytes at `offset`. Bytes that another flow already brought are dropped; a gap is a bug in the flow
    /// and is refused. Returns the bytes received in all.
    pub(super) fn append(&self, provenance: Provenance, offset: u32, mut piece: Bytes) -> u32 {
        let mut state = self.state.lock();
        let known = state.received.saturating_sub(offset) as usize;
        if state.end.is_some() || offset > state.received || known >= piece.len() {
            return state.received;
        }
        let piece = piece.split_off(known);
        let start = state.received;
        state.unchecked |= provenance == Provenance::Peer;
        // A chunk is at most 4 GiB long, and flows never append past its end.
        state.received = start.saturating_add(u32::try_from(piece.len()).unwrap_or(u32::MAX));
        state.pieces.push((start, piece));
        let received = state.received;
        drop(state);
        self.changed.send_replace(());
        received
    }

    /// The pieces received so far, for the store.
    pub(super) fn pieces(&self) -> Vec<Bytes> {
        self.state.lock().pieces.iter().map(|(_, piece)| piece.clone()).collect()
    }

    /// Forgets every byte: their digest was wrong.
    pub(super) fn restart(&self) {
        self.state.lock().clear();
        self.changed.send_replace(());
    }

    /// The chunk is checked and stored.
    pub(super) fn stored(&self) {
        let mut state = self.state.lock();
        state.end = Some(End::Stored);
        state.pieces = Vec::new();
        drop(state);
        self.changed.send_replace(());
    }

    /// The chunk is whole and `attestation` is true of it: everybody may see it, while the disk takes its time.
    pub(super) fn checked(&self, attestation: Attestation) {
        let mut state = self.state.lock();
        state.unchecked = false;
        state.attestation = Some(attestation);
        drop(state);
        self.changed.send_replace(());
    }

    /// There is no room for the chunk, which is checked.
    pub(super) fn kept(&self) {
        let mut state = self.state.lock();
        state.end = Some(End::Kept);
        drop(state);
        self.changed.send_replace(());
    }

    /// Nobody will bring this chunk.
    pub(super) fn failed(&self, error: ReadError) {
        let mut state = self.state.lock();
        if state.end.is_none() {
            state.end = Some(End::Failed(error));
        }
        drop(state);
        self.changed.send_replace(());
    }

    /// Why it ended without the chunk, if it did.
    pub(super) fn failure(&self) -> Option<ReadError> {
        match &self.state.lock().end {
            Some(End::Failed(error)) => Some(error.clone()),
            _ => None,
        }
    }

    /// At most `limit` bytes from `offset`, as far as `trust` may see them.
    pub(super) fn look(&self, offset: u32, limit: usize, trust: Trust) -> Glimpse {
        let state = self.state.lock();
        match &state.end {
            Some(End::Stored) => return Glimpse::Stored,
            Some(End::Failed(error)) => return Glimpse::Failed(error.clone()),
            Some(End::Kept) | None => {}
        }
        if offset >= state.received || (state.unchecked && trust == Trust::Checked) {
            return Glimpse::Pending;
        }
        let index = state.pieces.partition_point(|(start, _)| *start <= offset) - 1;
        let (start, piece) = &state.pieces[index];
        let from = (offset - start) as usize;
        Glimpse::Piece(piece.slice(from..piece.len().min(from + limit)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(flight: &Flight, offset: u32, trust: Trust) -> Option<Vec<u8>> {
        match flight.look(offset, 100, trust) {
            Glimpse::Piece(bytes) => Some(bytes.to_vec()),
            _ => None,
        }
    }

    #[test]
    fn origin_bytes_are_seen_at_once_and_peer_bytes_only_by_peers() {
        let flight = Flight::new();
        flight.append(Provenance::Origin, 0, Bytes::from_static(b"abc"));
        assert_eq!(seen(&flight, 1, Trust::Checked), Some(b"bc".to_vec()));
        flight.append(Provenance::Peer, 3, Bytes::from_static(b"def"));
        assert_eq!(seen(&flight, 1, Trust::Checked), None);
        assert_eq!(seen(&flight, 4, Trust::Unchecked), Some(b"ef".to_vec()));
    }

    #[test]
    fn overlap_is_dropped_and_gaps_are_refused() {
        let flight = Flight::new();
        assert_eq!(flight.append(Provenance::Peer, 0, Bytes::from_static(b"abc")), 3);
        assert_eq!(flight.append(Provenance::Peer, 1, Bytes::from_static(b"bcde")), 5);
        assert_eq!(flight.append(Provenance::Peer, 9, Bytes::from_static(b"x")), 5);
        assert_eq!(flight.pieces().concat(), b"abcde");
    }

    #[test]
    fn an_origin_flow_starts_over_after_peer_bytes() {
        let flight = Arc::new(Flight::new());
        let begin = |provenance| {
            drop(flight.begin_flow(provenance));
            flight.received()
        };
        flight.append(Provenance::Origin, 0, Bytes::from_static(b"abc"));
        assert_eq!(begin(Provenance::Origin), 3);
        flight.append(Provenance::Peer, 3, Bytes::from_static(b"d"));
        assert_eq!(begin(Provenance::Peer), 4);
        assert_eq!(begin(Provenance::Origin), 0);
        assert!(!flight.is_filling());
    }
}

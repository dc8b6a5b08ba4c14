//! The state of one content while somebody has it open: its entry in the store, its flights, and who wants what.
//!
//! Invariant: what is wanted is derived from the readers and fills that are alive, never remembered beside them.
//! Refuses to decide who fetches: the driver asks the swarm.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::Span;
use tracing::field::Empty;

use crate::content::{ByteRange, ChunkIndex, ChunkSet, ContentId, ContentKey, Layout};
use crate::origin::{OriginError, Source};
use crate::store::Entry;

use super::error::ReadError;
use super::flight::{Flight, Provenance};
use super::shared::Shared;

/// Shared by every handle, reader and flow of a content.
pub(super) struct Open {
    pub(super) shared: Arc<Shared>,
    pub(super) id: ContentId,
    pub(super) key: ContentKey,
    pub(super) layout: Layout,
    /// Where to fetch what nobody has; nothing while only a leaving node's offer has it open.
    source: OnceLock<Arc<dyn Source>>,
    /// `None` when the store could not even make the file: everything passes through memory.
    pub(super) entry: Option<Arc<Entry>>,
    flights: Mutex<BTreeMap<ChunkIndex, Arc<Flight>>>,
    demands: Mutex<Demands>,
    outcome: watch::Sender<Outcome>,
    sealing: AtomicBool,
    /// The disk had no room for some chunk: what cannot be kept passes through memory.
    unstorable: AtomicBool,
    /// Its chunks are being replaced with the origin's: the swarm is not asked, peers are not served.
    quarantined: AtomicBool,
    tally: Tally,
}

/// What became of a content as a whole. Failures so far are counted, so that a later fill does not take an earlier one's
/// for its own.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    Pending(u64),
    /// The whole was compared with its name; the disk is still to have that in writing.
    Verified(u64),
    Sealed,
    Failed(u64, ReadError),
}

impl Outcome {
    pub(super) const fn failures(&self) -> u64 {
        match self {
            Self::Pending(count) | Self::Verified(count) | Self::Failed(count, _) => *count,
            Self::Sealed => 0,
        }
    }
}

#[derive(Default)]
struct Demands {
    next_id: u64,
    windows: BTreeMap<u64, Window>,
    /// Those who want everything, and their spans.
    fills: BTreeMap<u64, Span>,
    /// Chunks that a leaving node offered, by taking.
    takings: BTreeMap<u64, ChunkSet>,
}

impl Demands {
    const fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

/// Chunks `from..to` that one reader wants next.
struct Window {
    from: u32,
    to: u32,
    span: Span,
}

#[derive(Default)]
struct Tally {
    local: AtomicU64,
    from_peers: AtomicU64,
    from_origin: AtomicU64,
    /// Bytes that came in, of chunks that are whole or not.
    taken_in: AtomicU64,
    provenance: Mutex<BTreeMap<ChunkIndex, Provenance>>,
}

/// Bytes of a content by where this node got them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Progress {
    pub total: u64,
    /// Held before the content was opened.
    pub local: u64,
    pub from_peers: u64,
    pub from_origin: u64,
}

impl Progress {
    /// Bytes held, wherever they came from.
    #[must_use]
    pub const fn done(&self) -> u64 {
        self.local + self.from_peers + self.from_origin
    }
}

/// What the content's readers want, for the swarm.
pub(super) struct Wanted {
    pub(super) chunks: ChunkSet,
    pub(super) cursors: Vec<ChunkIndex>,
}

impl Open {
    pub(super) fn new(shared: Arc<Shared>, id: ContentId, layout: Layout, entry: Option<Arc<Entry>>) -> Self {
        let key = id.key(layout.chunk_bytes());
        let sealed = entry.as_ref().is_some_and(|entry| entry.is_sealed());
        let local = entry.as_ref().map_or(0, |entry| entry.have().bytes(&layout));
        let tally = Tally { local: local.into(), ..Tally::default() };
        let outcome = watch::Sender::new(if sealed { Outcome::Sealed } else { Outcome::Pending(0) });
        Self {
            shared,
            id,
            key,
            layout,
            source: OnceLock::new(),
            entry,
            flights: Mutex::default(),
            demands: Mutex::default(),
            outcome,
            sealing: AtomicBool::new(false),
            unstorable: AtomicBool::new(false),
            quarantined: AtomicBool::new(false),
            tally,
        }
    }

    /// Fetches from `source` what nobody has, from now on; the first counts.
    pub(super) fn adopt(&self, source: Arc<dyn Source>) {
        let _ = self.source.set(source);
    }

    /// # Errors
    /// When nobody here ever named the content's origin. It passes: whoever wants the content names it.
    pub(super) fn source(&self) -> Result<&dyn Source, OriginError> {
        self.source.get().map(AsRef::as_ref).ok_or_else(|| OriginError::Failed {
            origin: "no origin".into(),
            reason: "it was taken over from a node that left, and nobody here has asked for it since".into(),
        })
    }

    /// Bounded label of the source, for errors and metrics.
    pub(super) fn source_label(&self) -> String {
        self.source().map_or_else(|_| String::new(), |source| source.label().to_owned())
    }

    pub(super) fn have(&self) -> ChunkSet {
        self.entry.as_ref().map(|entry| entry.have()).unwrap_or_default()
    }

    /// The flight of a chunk, made when there is none.
    pub(super) fn flight(&self, chunk: ChunkIndex) -> Arc<Flight> {
        Arc::clone(self.flights.lock().entry(chunk).or_insert_with(|| Arc::new(Flight::new())))
    }

    pub(super) fn existing_flight(&self, chunk: ChunkIndex) -> Option<Arc<Flight>> {
        self.flights.lock().get(&chunk).map(Arc::clone)
    }

    /// Takes a flight that has ended off the board, so that a later demand starts a new one.
    pub(super) fn land(&self, chunk: ChunkIndex) {
        self.flights.lock().remove(&chunk);
    }

    /// Drops flights that nobody fills and nobody waits for.
    pub(super) fn sweep_flights(&self) {
        let demands = self.demands.lock();
        let wanted = !demands.fills.is_empty() || !demands.windows.is_empty() || !demands.takings.is_empty();
        drop(demands);
        self.flights
            .lock()
            .retain(|_, flight| Arc::strong_count(flight) > 1 || (wanted && flight.received() > 0));
    }

    /// Wants every chunk until the token is dropped.
    pub(super) fn demand_all(self: &Arc<Self>) -> WantToken {
        let span = tracing::info_span!(target: "windlass::trace", "fill", content = %self.id);
        self.want(|demands, id| drop(demands.fills.insert(id, span)))
    }

    /// Wants `chunks`, after all that readers want, until the token is dropped.
    pub(super) fn demand_chunks(self: &Arc<Self>, chunks: ChunkSet) -> WantToken {
        self.want(|demands, id| drop(demands.takings.insert(id, chunks)))
    }

    fn want(self: &Arc<Self>, note: impl FnOnce(&mut Demands, u64)) -> WantToken {
        let mut demands = self.demands.lock();
        let id = demands.new_id();
        note(&mut demands, id);
        drop(demands);
        self.shared.mark_dirty(self.key);
        WantToken { open: Arc::clone(self), id }
    }

    /// Wants the chunks of `range` next, within `ahead` chunks of its start, until the token is dropped.
    pub(super) fn demand(self: &Arc<Self>, range: ByteRange, ahead: u32) -> ReadToken {
        let id = self.demands.lock().new_id();
        let span = tracing::info_span!(
            target: "windlass::trace", "read",
            content = %self.id, from = range.start(), to = range.end(),
            local = Empty, peers = Empty, origin = Empty,
        );
        let token = ReadToken { open: Arc::clone(self), id, ahead, span };
        token.advance(range);
        token
    }

    /// A span for a transfer of `chunk`, under one of those that want it.
    pub(super) fn flow_span(&self, chunk: ChunkIndex, source: &str) -> Span {
        let demands = self.demands.lock();
        let reading = demands.windows.values().map(|window| &window.span);
        let parent = reading.chain(demands.fills.values()).next().cloned().unwrap_or_else(Span::none);
        drop(demands);
        tracing::info_span!(
            target: "windlass::trace", parent: &parent, "chunk",
            chunk = chunk.0, source, received = Empty, outcome = Empty,
        )
    }

    /// What the readers and fills of this moment want, less what is held.
    pub(super) fn wanted(&self) -> Wanted {
        let have = self.have();
        let flights = self.flights.lock();
        let missing =
            |chunk: &ChunkIndex| !have.contains(*chunk) && !flights.get(chunk).is_some_and(|f| f.is_kept());
        let demands = self.demands.lock();
        // A blob is verified as a whole, and containerd always wants all of it: any reader means everything, as
        // long as there is a disk to put it on.
        let whole_blob =
            matches!(self.id, ContentId::Blob(_)) && !self.is_unstorable() && !demands.windows.is_empty();
        let chunks = if !demands.fills.is_empty() || whole_blob {
            self.layout.chunks().filter(missing).collect()
        } else {
            let read = demands.windows.values().flat_map(|w| (w.from..w.to).map(ChunkIndex));
            let taken = demands.takings.values().flat_map(ChunkSet::iter);
            read.chain(taken).filter(missing).collect()
        };
        Wanted { chunks, cursors: demands.windows.values().map(|w| ChunkIndex(w.from)).collect() }
    }

    /// Whether some chunk found no room on the disk since the content was opened.
    pub(super) fn is_unstorable(&self) -> bool {
        self.entry.is_none() || self.unstorable.load(Ordering::Acquire)
    }

    /// The disk had no room for a chunk: readers are no longer held back for a seal that cannot come.
    pub(super) fn set_unstorable(&self) {
        self.unstorable.store(true, Ordering::Release);
        self.outcome.send_modify(|_| ());
        self.shared.mark_dirty(self.key);
    }

    pub(super) fn is_quarantined(&self) -> bool {
        self.quarantined.load(Ordering::Acquire)
    }

    pub(super) fn set_quarantined(&self, quarantined: bool) {
        self.quarantined.store(quarantined, Ordering::Release);
        self.shared.mark_dirty(self.key);
    }

    /// A reader is past a chunk that only memory holds.
    pub(super) fn release_kept(&self, chunk: ChunkIndex) {
        let mut flights = self.flights.lock();
        // One owner: the board. Feeds hold a flight only while they look at it.
        if flights.get(&chunk).is_some_and(|flight| flight.is_kept() && Arc::strong_count(flight) == 1) {
            flights.remove(&chunk);
        }
    }

    pub(super) fn outcome(&self) -> watch::Receiver<Outcome> {
        self.outcome.subscribe()
    }

    /// Counts bytes that a flow brought, before their chunk is whole.
    pub(super) fn took_in(&self, bytes: usize) {
        self.tally.taken_in.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes that came in since the content was opened. Grows with every one of them, where [`Progress`] grows by chunks.
    pub(super) fn taken_in(&self) -> u64 {
        self.tally.taken_in.load(Ordering::Relaxed)
    }

    /// A flow begins to bring a chunk.
    pub(super) fn departs(&self, chunk: ChunkIndex, provenance: Provenance) {
        self.tally.provenance.lock().insert(chunk, provenance);
    }

    /// Counts a chunk that arrived.
    pub(super) fn arrived(&self, chunk: ChunkIndex, provenance: Provenance) {
        let bytes = u64::from(self.layout.chunk_len(chunk));
        match provenance {
            Provenance::Origin => &self.tally.from_origin,
            Provenance::Peer => &self.tally.from_peers,
        }
        .fetch_add(bytes, Ordering::Relaxed);
        self.departs(chunk, provenance);
    }

    /// Where a chunk came from since the content was opened; `None` means it was here before.
    pub(super) fn provenance(&self, chunk: ChunkIndex) -> Option<Provenance> {
        self.tally.provenance.lock().get(&chunk).copied()
    }

    pub(super) fn progress(&self) -> Progress {
        Progress {
            total: self.layout.size(),
            local: self.tally.local.load(Ordering::Relaxed),
            from_peers: self.tally.from_peers.load(Ordering::Relaxed),
            from_origin: self.tally.from_origin.load(Ordering::Relaxed),
        }
    }

    /// A chunk turned out bad: what was whole is compared again once the chunk is back.
    pub(super) fn unseal(&self) {
        self.outcome.send_if_modified(|outcome| {
            let was_whole = matches!(outcome, Outcome::Sealed | Outcome::Verified(_));
            if was_whole {
                *outcome = Outcome::Pending(outcome.failures());
            }
            was_whole
        });
    }

    /// `true` once, for the caller who shall seal.
    pub(super) fn begin_sealing(&self) -> bool {
        self.entry.is_some()
            && !matches!(*self.outcome.borrow(), Outcome::Sealed)
            && self.have().is_full(&self.layout)
            && !self.sealing.swap(true, Ordering::AcqRel)
    }

    /// Readers need not wait for the disk to have it in writing.
    pub(super) fn verified(&self) {
        self.outcome.send_modify(|outcome| *outcome = Outcome::Verified(outcome.failures()));
    }

    /// `false` when a chunk was lost meanwhile.
    pub(super) fn end_sealing(&self, sealed: Result<bool, ReadError>) {
        // First, so that who is told below may begin again.
        self.sealing.store(false, Ordering::Release);
        match sealed {
            Ok(true) => drop(self.outcome.send_replace(Outcome::Sealed)),
            Ok(false) => {
                self.outcome.send_modify(|outcome| *outcome = Outcome::Pending(outcome.failures()));
                self.shared.mark_dirty(self.key);
            }
            Err(error) => self.fail(&error),
        }
    }

    /// Tells everyone who waits for this content that it will not come.
    pub(super) fn fail(&self, error: &ReadError) {
        let flights = std::mem::take(&mut *self.flights.lock());
        for flight in flights.values() {
            flight.failed(error.clone());
        }
        self.outcome.send_modify(|outcome| *outcome = Outcome::Failed(outcome.failures() + 1, error.clone()));
    }
}

/// Everything, or what a leaving node offered, is wanted while this lives.
pub(super) struct WantToken {
    open: Arc<Open>,
    id: u64,
}

impl Drop for WantToken {
    fn drop(&mut self) {
        let mut demands = self.open.demands.lock();
        // Ids are given out once, so only one of the two has it.
        demands.fills.remove(&self.id);
        demands.takings.remove(&self.id);
        drop(demands);
        self.open.shared.mark_dirty(self.open.key);
    }
}

/// One reader's window is wanted while this lives.
pub(super) struct ReadToken {
    open: Arc<Open>,
    id: u64,
    ahead: u32,
    pub(super) span: Span,
}

impl ReadToken {
    /// The reader still needs `rest`.
    pub(super) fn advance(&self, rest: ByteRange) {
        let layout = &self.open.layout;
        let mut demands = self.open.demands.lock();
        let moved = if rest.is_empty() {
            demands.windows.remove(&self.id).is_some()
        } else {
            let from = layout.chunk_at(rest.start()).0;
            let to = (layout.chunk_at(rest.end() - 1).0 + 1).min(from.saturating_add(self.ahead));
            let before = demands.windows.insert(self.id, Window { from, to, span: self.span.clone() });
            before.is_none_or(|window| window.from != from)
        };
        drop(demands);
        if moved {
            self.open.shared.mark_dirty(self.open.key);
        }
    }
}

impl Drop for ReadToken {
    fn drop(&mut self) {
        self.advance(ByteRange::new(0, 0));
    }
}

/// The last handle is gone: the driver withdraws the interest.
impl Drop for Open {
    fn drop(&mut self) {
        self.shared.mark_dirty(self.key);
    }
}

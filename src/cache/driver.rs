//! The task that owns the [`Swarm`]: tells it what happened, does what it says, and nothing else.
//!
//! Invariant: the swarm is touched by this task only, and an action is started before the next event is handled, so that
//! a chunk which an upload was admitted for is in the store or in a flight.
//! Refuses to wait: flows run in tasks of their own and report through the bounded inbox.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::content::{Attestation, ChunkIndex, ChunkSet, ContentKey, NodeId, StripeIndex};
use crate::origin::OriginError;
use crate::store::{Entry, Loss};
use crate::swarm::membership::PeerBook;
use crate::swarm::{Action, Admission, Claim, Event, FlowFailure, FlowId, Swarm, Time};
use crate::wire::{self, Inventory, MAX_INVENTORY_STRIPES, Parting, StripeChunks};

use super::clock::Clock;
use super::error::ReadError;
use super::flow::{Flow, FlowError, Origin};
use super::meter::Meter;
use super::open::Open;
use super::parting::{self, Heard};
use super::shared::Shared;
use super::{seal, take};

/// Origin failures in a row, over all chunks of a content, before its readers are told, and how long they must have
/// lasted: a node has many chunks in the air, so that one bad second of an origin's is a dozen failures at once. The
/// swarm's back-off doubles from 100 ms; the readers' own deadlines run beside.
const ORIGIN_FAILURES_MAX: u32 = 7;
const ORIGIN_FAILURES_FOR: Duration = Duration::from_secs(13);

/// Who may listen at a time: the leaving node, and a few commands.
const LISTENERS_MAX: usize = 16;

/// How often counters are copied into the metrics, and the clock is looked at, at least.
const EXPORT_INTERVAL: Duration = Duration::from_secs(1);

/// What others ask of the driver.
pub(super) enum Command {
    /// A claim message, encoded.
    Message {
        from: NodeId,
        bytes: Bytes,
    },
    PeerLost {
        peer: NodeId,
    },
    /// May `peer` have this chunk now?
    Admit {
        peer: NodeId,
        key: ContentKey,
        chunk: ChunkIndex,
        reply: oneshot::Sender<Admission>,
    },
    /// The store lost chunks it had.
    Dropped {
        key: ContentKey,
        chunks: ChunkSet,
    },
    /// Chunks that a killed process left are held after all, or are known not to be.
    Settled(Arc<Entry>),
    /// So many bytes of the chunk are here.
    Progress {
        flow: FlowId,
        received: u32,
    },
    /// The peer that serves the flow has these chunks too.
    SourceHolds {
        flow: FlowId,
        also: Vec<(StripeIndex, u64)>,
    },
    Ended {
        flow: FlowId,
        received: u32,
        outcome: Result<Attestation, FlowError>,
    },
    /// Somebody here offers contents, and listens there to what is said.
    Listen(mpsc::Sender<Heard>),
    /// Have the homes say what nobody else holds, and say who is there.
    AskHomes(Vec<StripeChunks>),
}

/// Runs until shutdown.
pub(super) async fn run(shared: Arc<Shared>, swarm: Swarm, mut inbox: mpsc::Receiver<Command>) {
    let mut losses = shared.store.losses();
    let mut peers = shared.peers.clone();
    let mut driver = Driver {
        clock: Clock::new(EXPORT_INTERVAL),
        shared,
        swarm,
        flows: BTreeMap::new(),
        open: BTreeSet::new(),
        origin_failures: BTreeMap::new(),
        leaving: BTreeSet::new(),
        listeners: Vec::new(),
    };
    driver.begin();
    let mut export = tokio::time::interval(EXPORT_INTERVAL);
    let shutdown = driver.shared.shutdown.clone();
    loop {
        driver.act();
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(command) = inbox.recv() => driver.obey(command),
            () = driver.shared.dirtied.notified() => driver.look_around(),
            Ok(()) = peers.changed() => driver.members(),
            lost = losses.recv() => driver.lost(lost),
            () = sleep_until(driver.next_timeout()) => driver.timeout(),
            _ = export.tick() => driver.export(inbox.len()),
        }
    }
    driver.stop();
}

struct Driver {
    shared: Arc<Shared>,
    swarm: Swarm,
    clock: Clock,
    flows: BTreeMap<FlowId, Running>,
    /// Contents the swarm was told are open.
    open: BTreeSet<ContentKey>,
    /// Failures of the origin in a row, and since when, by content.
    origin_failures: BTreeMap<ContentKey, (u32, Instant)>,
    /// Members that said that they leave: what they hold counts for nothing.
    leaving: BTreeSet<NodeId>,
    /// Those here who offer contents: this node when it leaves, and commands that warm others. At most
    /// [`LISTENERS_MAX`].
    listeners: Vec<mpsc::Sender<Heard>>,
}

struct Running {
    key: ContentKey,
    open: Arc<Open>,
    chunk: ChunkIndex,
    stop: CancellationToken,
}

impl Driver {
    fn now(&mut self) -> Time {
        if let Some(slept) = self.clock.look(Instant::now()) {
            tracing::warn!(
                ?slept,
                "this process did not run: it was stopped, or the machine is far too busy"
            );
            let now = self.clock.time();
            self.swarm.handle_event(now, Event::Slept);
        }
        self.clock.time()
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.swarm.poll_timeout().map(|at| self.clock.instant(at))
    }

    fn tell(&mut self, event: Event) {
        let now = self.now();
        self.swarm.handle_event(now, event);
    }

    fn timeout(&mut self) {
        let now = self.now();
        self.swarm.handle_timeout(now);
    }

    fn begin(&mut self) {
        self.members();
        for (content, layout, have) in self.shared.store.held() {
            self.tell(Event::Stored { content, layout, have });
        }
        self.settle_doubts();
    }

    /// Has the chunks checked that the last run was killed over, beside everything else; who opens one of their
    /// contents before its turn does not wait for the others.
    fn settle_doubts(&self) {
        let doubts = self.shared.store.in_doubt();
        if doubts.is_empty() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        self.shared.tasks.spawn(async move {
            let settling = async {
                for key in doubts {
                    if let Some(entry) = shared.store.settle(&key).await {
                        // The driver being gone means shutdown.
                        let _ = shared.commands.send(Command::Settled(entry)).await;
                    }
                }
            };
            shared.shutdown.run_until_cancelled(settling).await;
        });
    }

    fn members(&mut self) {
        let PeerBook { members, synced, .. } = self.shared.peers.borrow().clone();
        self.leaving.retain(|node| members.iter().any(|member| member.id == *node));
        self.tell(Event::Members { members, synced });
    }

    fn lost(&mut self, lost: Result<Loss, broadcast::error::RecvError>) {
        match lost {
            Ok(Loss::Content(content)) => self.tell(Event::Evicted { content }),
            Ok(Loss::Chunks(content, chunks)) => {
                self.tell(Event::Dropped { content, chunks });
                if let Some(open) = self.shared.opened(content) {
                    open.unseal();
                }
                // Who has it open may want them again.
                self.shared.mark_dirty(content);
            }
            // Told too much at once: peers that ask for what is gone hear "not found", which corrects the homes.
            Err(error) => tracing::debug!(%error, "losses not announced"),
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Message { from, bytes } => match wire::decode(&bytes) {
                Ok(wire::Message::Parting(parting)) => self.heard(from, parting),
                Ok(message) => {
                    tracing::trace!(peer = %from, ?message, "claim message received");
                    self.tell(Event::Message { from, message });
                }
                Err(error) => tracing::warn!(peer = %from, %error, "message dropped"),
            },
            Command::PeerLost { peer } => self.tell(Event::PeerLost(peer)),
            Command::Admit { peer, key, chunk, reply } => {
                let now = self.now();
                let admission = self.swarm.upload_requested(now, peer, key, chunk);
                if let Err(Admission::Serve { .. }) = reply.send(admission) {
                    self.swarm.upload_ended(now);
                }
            }
            Command::Dropped { key, chunks } => self.tell(Event::Dropped { content: key, chunks }),
            Command::Settled(entry) => {
                let (content, layout, have) = (*entry.key(), entry.layout(), entry.have());
                self.tell(Event::Stored { content, layout, have });
            }
            Command::Progress { flow, received } => {
                if self.flows.contains_key(&flow) {
                    self.tell(Event::FlowProgress { flow, received });
                }
            }
            Command::SourceHolds { flow, also } => {
                if self.flows.contains_key(&flow) {
                    self.tell(Event::SourceHolds { flow, also });
                }
            }
            Command::Ended { flow, received, outcome } => self.ended(flow, received, outcome),
            Command::Listen(listener) => self.listen(listener),
            Command::AskHomes(questions) => self.ask_homes(questions),
        }
    }

    /// What is said when a node leaves.
    fn heard(&mut self, from: NodeId, parting: Parting) {
        match parting {
            Parting::Leaving(inventory) => {
                let is_member = self.shared.address(from).is_some();
                if is_member {
                    self.leaving.insert(from);
                }
                let unshared = self.unshared(&inventory.stripes);
                parting::send(&self.shared, from, Parting::Unshared(unshared));
            }
            Parting::Take(take) => take::answer(&self.shared, from, take),
            said @ (Parting::Unshared(_) | Parting::Took(_)) => {
                self.tell_listeners(&Heard::Said { from, parting: said });
            }
        }
    }

    /// Of what a leaving node holds, what nobody who stays holds.
    fn unshared(&self, held: &[StripeChunks]) -> Inventory {
        let left = |held: &StripeChunks| StripeChunks {
            chunks: self.swarm.unshared(held.content, held.stripe, held.chunks, &self.leaving),
            ..*held
        };
        Inventory { stripes: held.iter().map(left).collect() }
    }

    fn ask_homes(&mut self, questions: Vec<StripeChunks>) {
        let me = self.shared.transport.local();
        self.leaving.insert(me);
        let staying = self.swarm.others().filter(|member| !self.leaving.contains(&member.id));
        self.tell_listeners(&Heard::Members(staying.cloned().collect()));
        let mut by_home = BTreeMap::<NodeId, Vec<StripeChunks>>::new();
        for question in questions {
            by_home.entry(self.swarm.home_of(question.content, question.stripe)).or_default().push(question);
        }
        for (home, stripes) in by_home {
            for part in stripes.chunks(MAX_INVENTORY_STRIPES) {
                if home == me {
                    let parting = Parting::Unshared(self.unshared(part));
                    self.tell_listeners(&Heard::Said { from: me, parting });
                } else {
                    let inventory = Inventory { stripes: part.to_vec() };
                    parting::send(&self.shared, home, Parting::Leaving(inventory));
                }
            }
        }
    }

    fn listen(&mut self, listener: mpsc::Sender<Heard>) {
        self.listeners.retain(|listener| !listener.is_closed());
        // One too many hears nothing, and sees its channel closed.
        if self.listeners.len() < LISTENERS_MAX {
            self.listeners.push(listener);
        }
    }

    /// What a listener has no room to hear now, it asks again.
    fn tell_listeners(&self, heard: &Heard) {
        for listener in self.listeners.iter().filter(|listener| !listener.is_closed()) {
            if listener.try_send(heard.clone()).is_err() {
                self.shared.metrics.messages_dropped.inc();
            }
        }
    }

    /// Looks at everything that changed without a command: demand, and uploads that ended.
    fn look_around(&mut self) {
        let now = self.now();
        for _ in 0..self.shared.take_ended_uploads() {
            self.swarm.upload_ended(now);
        }
        for key in self.shared.take_dirty() {
            match self.shared.opened(key) {
                Some(open) if !open.is_quarantined() => self.demand(&open),
                _ => self.close(key),
            }
        }
    }

    fn demand(&mut self, open: &Arc<Open>) {
        let (content, layout) = (open.key, open.layout);
        if self.open.insert(content) {
            let have = open.have();
            self.tell(Event::Stored { content, layout, have: have.clone() });
            self.tell(Event::Open { content, layout, have });
        }
        open.sweep_flights();
        let wanted = open.wanted();
        self.tell(Event::Demand { content, wanted: wanted.chunks, cursors: wanted.cursors });
        seal::begin(open);
    }

    fn close(&mut self, key: ContentKey) {
        if self.open.remove(&key) {
            self.tell(Event::Close { content: key });
        }
        self.origin_failures.remove(&key);
        self.shared.forget(key);
    }

    fn act(&mut self) {
        while let Some(action) = self.swarm.poll_action() {
            match action {
                Action::Send { to, message } => {
                    tracing::trace!(peer = %to, ?message, "claim message to send");
                    self.send(to, &message);
                }
                Action::FetchFromPeer { flow, peer, content, chunk, expect, .. } => {
                    let source = self.shared.address(peer).map(|peer| Origin::Peer { peer, expect });
                    self.fetch(flow, content, chunk, source);
                }
                Action::FetchFromOrigin { flow, content, chunk, claim, .. } => {
                    if claim == Claim::LastResort {
                        self.warn_of_last_resort(content, chunk);
                    }
                    self.fetch(flow, content, chunk, Some(Origin::Source));
                }
                Action::Cancel { flow } => {
                    if let Some(running) = self.flows.remove(&flow) {
                        running.stop.cancel();
                    }
                }
            }
        }
    }

    fn send(&self, to: NodeId, message: &wire::Message) {
        let sent = self
            .shared
            .address(to)
            .map(|peer| self.shared.transport.send_message(&peer, wire::encode(message)));
        if !matches!(sent, Some(Ok(()))) {
            self.shared.metrics.messages_dropped.inc();
            tracing::debug!(peer = %to, ?sent, "claim message not sent");
        }
    }

    fn fetch(&mut self, flow: FlowId, key: ContentKey, chunk: ChunkIndex, source: Option<Origin>) {
        let (Some(open), Some(source)) = (self.shared.opened(key), source) else {
            // Closed a moment ago, or the peer left: the swarm hears the rest from the next demand or membership.
            self.tell(Event::FlowFailed { flow, received: 0, reason: FlowFailure::Broken });
            return;
        };
        let flight = open.flight(chunk);
        tracing::trace!(content = %open.id, chunk = chunk.0, flow = flow.0, from = %source, "flow begins");
        let filling = flight.begin_flow(source.provenance());
        open.departs(chunk, source.provenance());
        let stop = CancellationToken::new();
        let work = Flow {
            open: Arc::clone(&open),
            flight: Arc::clone(&flight),
            chunk,
            stop: stop.clone(),
            meter: Meter::new(flow, self.shared.commands.clone()),
        };
        let commands = self.shared.commands.clone();
        let span = open.flow_span(chunk, &source.name(&open));
        let run = async move {
            let _filling = filling;
            let outcome = work.run(source).await;
            let received = flight.received();
            let span = tracing::Span::current();
            span.record("received", received)
                .record("outcome", if outcome.is_ok() { "kept" } else { "failed" });
            // The driver being gone means shutdown.
            let _ = commands.send(Command::Ended { flow, received, outcome }).await;
        };
        let mut run = Box::pin(run.instrument(span));
        // The first step, up to the request, is taken here: requests leave in the order in which the swarm gave them
        // out, the reader's chunk first. The runtime begins with the task that was spawned last.
        if (&mut run).now_or_never().is_none() {
            self.shared.tasks.spawn(run);
        }
        self.flows.insert(flow, Running { key, open, chunk, stop });
    }

    fn warn_of_last_resort(&self, key: ContentKey, chunk: ChunkIndex) {
        if let Some(open) = self.shared.opened(key) {
            tracing::warn!(content = %open.id, chunk = chunk.0, "no peer brought it in time: asking the origin without a claim");
        }
    }

    fn ended(&mut self, flow: FlowId, received: u32, outcome: Result<Attestation, FlowError>) {
        let Some(running) = self.flows.remove(&flow) else {
            return self.ended_after_cancel(&outcome);
        };
        tracing::trace!(content = %running.open.id, chunk = running.chunk.0, flow = flow.0, received, "flow ended");
        match outcome {
            Ok(attestation) => {
                self.origin_failures.remove(&running.key);
                self.tell(Event::FlowDone { flow, attestation, kept: true });
                seal::begin(&running.open);
            }
            Err(FlowError::NotKept(attestation)) => {
                self.tell(Event::FlowDone { flow, attestation, kept: false });
            }
            Err(error) => {
                tracing::debug!(content = %running.open.id, chunk = running.chunk.0, %error, "flow failed");
                if let FlowError::Origin(origin) = &error {
                    self.origin_failed(&running, origin);
                }
                self.tell(Event::FlowFailed { flow, received, reason: reason(&error) });
            }
        }
    }

    /// The chunk arrived although the swarm had given the flow up: it is told what the store holds.
    fn ended_after_cancel(&mut self, outcome: &Result<Attestation, FlowError>) {
        if outcome.is_err() {
            return;
        }
        for open in self.open.iter().filter_map(|key| self.shared.opened(*key)).collect::<Vec<_>>() {
            self.tell(Event::Stored { content: open.key, layout: open.layout, have: open.have() });
            seal::begin(&open);
        }
    }

    fn origin_failed(&mut self, running: &Running, error: &OriginError) {
        let (failures, since) =
            self.origin_failures.entry(running.key).or_insert_with(|| (0, Instant::now()));
        *failures += 1;
        let has_lasted = *failures >= ORIGIN_FAILURES_MAX && since.elapsed() >= ORIGIN_FAILURES_FOR;
        if !error.is_transient() || has_lasted {
            self.origin_failures.remove(&running.key);
            tracing::warn!(content = %running.open.id, %error, "the origin does not deliver");
            running.open.fail(&ReadError::Origin(error.clone()));
        }
    }

    fn export(&mut self, queued: usize) {
        self.now();
        self.shared.metrics.export(&self.swarm.stats(), self.flows.len(), self.open.len(), queued);
    }

    fn stop(self) {
        for running in self.flows.into_values() {
            running.stop.cancel();
        }
        for open in self.shared.all_open() {
            open.fail(&ReadError::Shutdown);
        }
    }
}

const fn reason(error: &FlowError) -> FlowFailure {
    match error {
        FlowError::Busy => FlowFailure::Busy,
        FlowError::NotFound => FlowFailure::NotFound,
        FlowError::Broken(_) | FlowError::Cancelled | FlowError::NotKept(_) => FlowFailure::Broken,
        FlowError::Corrupt(_) => FlowFailure::Corrupt,
        FlowError::Origin(OriginError::Throttled { .. }) => FlowFailure::OriginThrottled,
        FlowError::Origin(_) => FlowFailure::OriginFailed,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

//! The loop: events in their order, and steps in which bytes move.
//!
//! While bytes move, time goes in steps of `Scenario::step`, and events are taken in between; while none can, it
//! jumps to the next event. A node passes on what it had at the last step.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use windlass::content::{ChunkIndex, ChunkSet, ContentKey, Layout, NodeId};
use windlass::swarm::{Action, Event, FlowFailure, FlowId, Swarm, Time};
use windlass::wire::{Message, encode};

use super::invariants::Ledger;
use super::links::{Demand, Links};
use super::outcome::Outcome;
use super::scenario::{Fault, Random, SECOND, Scenario};
use super::transfers::Flow;
use super::views::Gossip;

/// Waiting nodes and bounds are looked at this often.
const CHECK: u64 = SECOND / 4;
/// Of every so many messages one is encoded to learn its size.
const SIZED_EVERY: u64 = 16;
/// Dialling a node that does not answer takes this long (`transport.connect_timeout_ms`).
const DIAL: u64 = 3 * SECOND;

/// What is going to happen.
#[derive(Debug)]
pub(super) enum Happening {
    Deliver {
        from: usize,
        to: usize,
        message: Message,
    },
    Packet {
        from: usize,
        to: usize,
        bytes: bytes::Bytes,
    },
    Timer(usize),
    Boot(usize),
    Pull(usize),
    View(usize),
    Gossip(usize),
    Introduce {
        node: usize,
        incarnation: u32,
    },
    Alone {
        node: usize,
        incarnation: u32,
    },
    Fault(usize),
    /// The dead node's connections break, unless it lives again.
    Broken {
        node: usize,
        incarnation: u32,
    },
    /// The paused node's connections break, unless it runs again.
    Stalled {
        node: usize,
        pauses: u32,
    },
    /// Connections between the parts break, unless they are healed.
    Severed {
        partitions: u32,
    },
    PeerLost {
        at: usize,
        who: usize,
    },
    /// A chunk request reaches the source.
    Request {
        flow: usize,
    },
    /// The first bytes may move.
    Begin {
        flow: usize,
    },
    Fail {
        flow: usize,
        reason: FlowFailure,
    },
}

/// One node's part in one content.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    /// Somebody reads it since.
    pub(super) opened: Option<u64>,
    pub(super) finished: Option<u64>,
    pub(super) held: u32,
    /// Where the reader waits.
    pub(super) cursor: u32,
    /// When it last went on.
    pub(super) read_at: Option<u64>,
}

pub(super) struct Node {
    pub(super) swarm: Swarm,
    pub(super) up: bool,
    pub(super) paused: bool,
    pub(super) pauses: u32,
    pub(super) paused_at: u64,
    /// Time it did not run.
    pub(super) slept: u64,
    /// Its connections are known to be gone.
    pub(super) severed: bool,
    pub(super) incarnation: u32,
    pub(super) booted: u64,
    pub(super) died: Option<u64>,
    pub(super) speed: f64,
    /// Bytes of each chunk that are here, all contents one after the other.
    pub(super) received: Vec<u32>,
    /// [`FETCHING`], [`TAINTED`], [`STORED`] for each chunk.
    pub(super) flags: Vec<u8>,
    pub(super) flows: HashMap<FlowId, usize>,
    pub(super) progress: Vec<Progress>,
    pub(super) last_byte: u64,
    /// Uploads that ran when somebody here last began to read.
    pub(super) uploads_before: u64,
    /// When its next wake-up is queued.
    pub(super) timer: Option<u64>,
    pub(super) inbox: (u64, u32),
}

pub(super) const FETCHING: u8 = 1;
pub(super) const TAINTED: u8 = 2;
pub(super) const STORED: u8 = 4;

pub(crate) struct World {
    pub(super) scenario: Scenario,
    pub(super) layouts: Vec<Layout>,
    /// Where each content's chunks begin in the nodes' arrays.
    pub(super) first: Vec<usize>,
    pub(super) nodes: Vec<Node>,
    pub(super) ids: HashMap<NodeId, usize>,
    pub(super) now: u64,
    sequence: u64,
    queue: BinaryHeap<Reverse<(u64, u64, usize)>>,
    happenings: Vec<Option<Happening>>,
    free: Vec<usize>,
    pub(super) flows: Vec<Flow>,
    pub(super) moving: Vec<usize>,
    pub(super) demands: Vec<Demand>,
    pub(super) links: Links,
    pub(super) random: Random,
    pub(super) gossip: Option<Gossip>,
    pub(super) parts: Option<Vec<u8>>,
    pub(super) partitions: u32,
    pub(super) parts_severed: bool,
    /// What waits for a partition to heal or a node to run on.
    pub(super) held: Vec<Happening>,
    dialling: HashSet<(usize, usize)>,
    pub(super) throttle: u32,
    pub(super) break_percent: u32,
    pub(super) ledger: Ledger,
    pub(super) outcome: Outcome,
    pub(super) origin_bytes: f64,
    unfinished: usize,
    next_check: u64,
    next_sample: u64,
}

pub(crate) fn node_id(n: usize) -> NodeId {
    NodeId::from_name(&node_name(n))
}

pub(super) fn node_name(n: usize) -> String {
    format!("node-{n}")
}

pub(super) fn content_key(blob: usize) -> ContentKey {
    let mut key = [42; 32];
    key[..8].copy_from_slice(&(blob as u64).to_le_bytes());
    ContentKey(key)
}

impl World {
    pub(crate) fn new(scenario: Scenario) -> Self {
        let blobs = &scenario.blobs;
        let layouts: Vec<_> = blobs
            .iter()
            .map(|b| Layout::new(u64::from(b.chunks) * u64::from(b.chunk_bytes), b.chunk_bytes).unwrap())
            .collect();
        let mut first = vec![0];
        blobs.iter().for_each(|blob| first.push(first[first.len() - 1] + blob.chunks as usize));
        let nodes: Vec<_> =
            (0..scenario.nodes()).map(|n| Node::new(&scenario, n, first[blobs.len()])).collect();
        let ledger = Ledger::new(&scenario, first[blobs.len()]);
        let mut world = Self {
            layouts,
            ids: (0..nodes.len()).map(|n| (node_id(n), n)).collect(),
            now: 0,
            sequence: 0,
            queue: BinaryHeap::new(),
            happenings: Vec::new(),
            free: Vec::new(),
            flows: Vec::new(),
            moving: Vec::new(),
            demands: Vec::new(),
            links: Links::default(),
            random: Random::new(scenario.seed.wrapping_mul(0x9E37_79B9)),
            gossip: Gossip::of(&scenario),
            parts: None,
            partitions: 0,
            parts_severed: false,
            held: Vec::new(),
            dialling: HashSet::new(),
            throttle: 0,
            break_percent: 0,
            ledger,
            outcome: Outcome { sent: vec![0.0; nodes.len()], ..Outcome::default() },
            origin_bytes: 0.0,
            unfinished: scenario.pulls.len(),
            next_check: CHECK,
            next_sample: 0,
            nodes,
            first,
            scenario,
        };
        world.prepare();
        world
    }

    /// Runs until every pull of a live node has ended.
    ///
    /// # Panics
    /// When an invariant is broken, or that does not happen within the scenario's limit.
    pub(crate) fn run(mut self) -> Outcome {
        while self.unfinished > 0 {
            let next = self.queue.peek().map(|Reverse((at, ..))| *at);
            if self.moving.is_empty() {
                let at = next.unwrap_or_else(|| self.fail_run("nothing is left to happen"));
                self.happen_until(at);
            } else {
                let until = self.now + self.scenario.step;
                self.happen_until(until);
                if !self.step() {
                    // Whoever could send has nothing to send: only an event changes that.
                    let next = self.queue.peek().map_or(until, |Reverse((at, ..))| (*at).max(until));
                    self.happen_until(next);
                }
            }
            self.look();
        }
        self.finish()
    }

    fn prepare(&mut self) {
        for n in 0..self.nodes.len() {
            self.at(self.scenario.boots[n], Happening::Boot(n));
        }
        for (index, pull) in self.scenario.pulls.clone().into_iter().enumerate() {
            self.at(pull.at, Happening::Pull(index));
        }
        for index in 0..self.scenario.faults.len() {
            self.at(self.scenario.faults[index].0, Happening::Fault(index));
        }
        for (node, blob) in self.scenario.warm.clone() {
            let chunks = self.chunks_of(blob);
            for g in chunks.clone() {
                self.nodes[node].received[g] = self.scenario.blobs[blob].chunk_bytes;
                self.nodes[node].flags[g] |= STORED;
                if !self.is_rotten(node, g) {
                    self.ledger.gained(g);
                }
            }
            self.nodes[node].progress[blob].held = chunks.len() as u32;
        }
    }

    fn happen_until(&mut self, until: u64) {
        while let Some(Reverse((at, _, slot))) =
            self.queue.peek().copied().filter(|Reverse((at, ..))| *at <= until)
        {
            self.queue.pop();
            self.free.push(slot);
            self.now = self.now.max(at);
            let happening = self.happenings[slot].take().expect("queued once");
            self.happen(happening);
        }
        self.now = self.now.max(until);
    }

    fn look(&mut self) {
        if self.now >= self.next_check {
            self.next_check = self.now + CHECK;
            self.check();
        }
        if self.scenario.sample > 0 && self.now >= self.next_sample {
            self.next_sample = self.now + self.scenario.sample;
            let chunks = self.first[self.scenario.blobs.len()] as f32;
            let shares =
                self.nodes.iter().map(|n| n.progress.iter().map(|p| p.held as f32).sum::<f32>() / chunks);
            self.outcome.samples.push((self.now as f64 / 1e6, shares.collect()));
        }
        if self.now > self.scenario.limit {
            self.fail_run("not finished in time");
        }
    }

    fn finish(mut self) -> Outcome {
        self.check();
        let begin = self.scenario.pulls.iter().map(|pull| pull.at).min().unwrap_or(0);
        for pull in &self.scenario.pulls {
            let node = &self.nodes[pull.node];
            let ended = node.progress[pull.blob].finished.filter(|_| node.up);
            self.outcome.seconds.push(ended.map(|at| at.saturating_sub(pull.at) as f64 / 1e6));
            let last = ended.map_or(0.0, |at| at.saturating_sub(begin) as f64 / 1e6);
            self.outcome.last_s = self.outcome.last_s.max(last);
        }
        let bytes: f64 = (0..self.scenario.blobs.len()).map(|blob| self.scenario.bytes(blob)).sum();
        self.outcome.origin_ratio = self.origin_bytes / bytes;
        self.outcome.stats = self.nodes.iter().map(|node| node.swarm.stats()).collect();
        self.outcome.last_resorts = self.outcome.stats.iter().map(|stats| stats.last_resort_flows).sum();
        self.outcome.steals = self.outcome.stats.iter().map(|stats| stats.leases_stolen).sum();
        self.outcome.took_s = self.now as f64 / 1e6;
        self.close_ledger();
        self.outcome
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Deliver { from, to, message } => self.deliver(from, to, message),
            Happening::Packet { from, to, bytes } => self.packet(from, to, &bytes),
            Happening::Timer(n) => self.wake(n),
            Happening::Boot(n) => self.boot(n),
            Happening::Pull(index) => self.pull(index),
            Happening::View(n) => self.tell_members(n),
            Happening::Gossip(n) => self.wake_gossip(n),
            Happening::Introduce { node, incarnation } => self.introduce(node, incarnation),
            Happening::Alone { node, incarnation } => self.found_nobody(node, incarnation),
            Happening::Fault(index) => self.fault(index),
            Happening::Broken { node, incarnation } => self.broken(node, incarnation),
            Happening::Stalled { node, pauses } => self.stalled(node, pauses),
            Happening::Severed { partitions } => self.sever_parts(partitions),
            Happening::PeerLost { at, who } => self.peer_lost(at, who),
            Happening::Request { flow } => self.request(flow),
            Happening::Begin { flow } => self.begin(flow),
            Happening::Fail { flow, reason } => self.fail(flow, reason),
        }
    }

    fn deliver(&mut self, from: usize, to: usize, message: Message) {
        match self.path(from, to) {
            Path::Open => {
                let node = &mut self.nodes[to];
                let second = self.now / SECOND;
                node.inbox = if node.inbox.0 == second { (second, node.inbox.1 + 1) } else { (second, 1) };
                self.outcome.peak_messages = self.outcome.peak_messages.max(node.inbox.1);
                self.event(to, Event::Message { from: node_id(from), message });
            }
            Path::Waiting => self.held.push(Happening::Deliver { from, to, message }),
            Path::Silent => {}
            Path::Gone => {
                if self.dialling.insert((from, to)) {
                    self.after(DIAL, Happening::PeerLost { at: from, who: to });
                }
            }
        }
    }

    fn peer_lost(&mut self, at: usize, who: usize) {
        self.dialling.remove(&(at, who));
        if self.nodes[at].up && !self.nodes[at].paused && !matches!(self.path(at, who), Path::Open) {
            self.event(at, Event::PeerLost(node_id(who)));
        }
    }

    /// Somebody starts to read.
    fn pull(&mut self, index: usize) {
        let pull = self.scenario.pulls[index];
        let node = &mut self.nodes[pull.node];
        if node.paused {
            self.held.push(Happening::Pull(index));
            return;
        }
        node.progress[pull.blob].opened = Some(self.now);
        node.last_byte = self.now;
        if node.up {
            self.open(pull.node, pull.blob);
        } else {
            // The reader asks again when the daemon lives again.
            self.recount();
        }
    }

    pub(super) fn open(&mut self, n: usize, blob: usize) {
        let (content, layout) = (content_key(blob), self.layouts[blob]);
        let have = self.stored(n, blob);
        self.nodes[n].uploads_before = self.nodes[n].swarm.stats().uploads;
        self.event(n, Event::Open { content, layout, have });
        self.read_on(n, blob);
        if self.nodes[n].progress[blob].held == self.scenario.blobs[blob].chunks {
            self.finished(n, blob);
        }
    }

    /// The reader waits for the first chunk that is not here.
    pub(super) fn read_on(&mut self, n: usize, blob: usize) {
        let chunks = self.chunks_of(blob);
        let node = &mut self.nodes[n];
        let from = node.progress[blob].cursor as usize;
        let passed =
            node.flags[chunks.start + from..chunks.end].iter().take_while(|flags| **flags & STORED != 0);
        let cursor = (from + passed.count()) as u32;
        node.progress[blob].cursor = cursor;
        if cursor as usize > from {
            let before = node.progress[blob].read_at.replace(self.now).unwrap_or(self.now);
            let gap_s = (self.now - before) as f64 / 1e6;
            self.outcome.longest_read_gap_s = self.outcome.longest_read_gap_s.max(gap_s);
        }
        let wanted = ChunkSet::full(&self.layouts[blob]);
        let cursors = if (cursor as usize) < chunks.len() { vec![ChunkIndex(cursor)] } else { Vec::new() };
        self.event(n, Event::Demand { content: content_key(blob), wanted, cursors });
    }

    pub(super) fn finished(&mut self, n: usize, blob: usize) {
        let progress = &mut self.nodes[n].progress[blob];
        if progress.finished.is_none() {
            progress.finished = Some(self.now);
            self.unfinished -= 1;
        }
        self.event(n, Event::Close { content: content_key(blob) });
    }

    /// Pulls that nobody waits for any longer, and those that somebody waits for again.
    pub(super) fn recount(&mut self) {
        let pulls = self.scenario.pulls.iter();
        let waits = pulls.filter(|pull| {
            let node = &self.nodes[pull.node];
            let lives = node.up || self.scenario.boots[pull.node] > self.now || self.will_restart(pull.node);
            lives && node.progress[pull.blob].finished.is_none()
        });
        self.unfinished = waits.count();
    }

    fn will_restart(&self, n: usize) -> bool {
        let later = self.scenario.faults.iter().filter(|(at, _)| *at > self.now);
        later.into_iter().any(|(_, fault)| matches!(fault, Fault::Restart { node, .. } if *node == n))
    }

    /// The node's own time: that in which it ran, as the engine counts it.
    pub(super) fn clock(&self, n: usize) -> Time {
        let node = &self.nodes[n];
        Time(if node.paused { node.paused_at } else { self.now } - node.slept)
    }

    pub(super) fn event(&mut self, n: usize, event: Event) {
        let now = self.clock(n);
        self.nodes[n].swarm.handle_event(now, event);
        self.drain(n);
    }

    fn wake(&mut self, n: usize) {
        if self.nodes[n].timer != Some(self.now) {
            return;
        }
        self.nodes[n].timer = None;
        if self.nodes[n].up && !self.nodes[n].paused {
            let now = self.clock(n);
            if self.nodes[n].swarm.poll_timeout().is_some_and(|at| at <= now) {
                self.nodes[n].swarm.handle_timeout(now);
            }
            self.drain(n);
        }
    }

    pub(super) fn drain(&mut self, n: usize) {
        while let Some(action) = self.nodes[n].swarm.poll_action() {
            self.act(n, action);
        }
        // A wake-up that comes too early does nothing, so only an earlier one needs to be queued.
        let slept = self.nodes[n].slept;
        let due = self.nodes[n].swarm.poll_timeout().map(|at| (at.0 + slept).max(self.now));
        if let Some(at) = due.filter(|at| self.nodes[n].timer.is_none_or(|queued| *at < queued)) {
            self.nodes[n].timer = Some(at);
            self.at(at, Happening::Timer(n));
        }
    }

    fn act(&mut self, n: usize, action: Action) {
        match action {
            Action::Send { to, message } => self.send(n, to, message),
            Action::FetchFromPeer { flow, peer, content, chunk, .. } => {
                let from = self.ids[&peer];
                self.fetch_from_peer(n, from, flow, content, chunk);
            }
            Action::FetchFromOrigin { flow, content, chunk, claim, .. } => {
                self.fetch_from_origin(n, flow, content, chunk, claim);
            }
            Action::Cancel { flow } => {
                if let Some(flow) = self.nodes[n].flows.get(&flow).copied() {
                    self.end_flow(flow);
                }
            }
        }
    }

    fn send(&mut self, from: usize, to: NodeId, message: Message) {
        self.outcome.messages += 1;
        if self.outcome.messages.is_multiple_of(SIZED_EVERY) {
            self.outcome.message_bytes += SIZED_EVERY * encode(&message).len() as u64;
        }
        if self.scenario.loss > 0 && self.random.below(10_000) < u64::from(self.scenario.loss) {
            self.ledger.message_lost(&message);
            return;
        }
        let latency = self.scenario.latency + self.random.below(self.scenario.jitter + 1);
        let to = self.ids[&to];
        self.after(latency, Happening::Deliver { from, to, message });
    }

    /// Whether what leaves `from` arrives at `to`.
    pub(super) fn path(&self, from: usize, to: usize) -> Path {
        let apart = self.parts.as_ref().is_some_and(|parts| parts[from] != parts[to]);
        let target = &self.nodes[to];
        match (target.up, target.paused || self.nodes[from].paused, apart) {
            (false, ..) if target.severed => Path::Gone,
            (false, ..) => Path::Silent,
            (true, true, _) if target.severed || self.nodes[from].severed => Path::Gone,
            (true, _, true) if self.parts_severed => Path::Gone,
            (true, false, false) => Path::Open,
            (true, ..) => Path::Waiting,
        }
    }

    /// What the node's store holds of a content.
    pub(super) fn stored(&self, n: usize, blob: usize) -> ChunkSet {
        let mut have = ChunkSet::new();
        for (index, g) in (0..).zip(self.chunks_of(blob)) {
            if self.nodes[n].flags[g] & STORED != 0 {
                have.insert(ChunkIndex(index));
            }
        }
        have
    }

    pub(super) fn chunks_of(&self, blob: usize) -> std::ops::Range<usize> {
        self.first[blob]..self.first[blob + 1]
    }

    pub(super) fn after(&mut self, wait: u64, happening: Happening) {
        self.at(self.now + wait, happening);
    }

    pub(super) fn at(&mut self, at: u64, happening: Happening) {
        self.sequence += 1;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.happenings.push(None);
            self.happenings.len() - 1
        });
        self.happenings[slot] = Some(happening);
        self.queue.push(Reverse((at, self.sequence, slot)));
    }
}

/// What becomes of what is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    Open,
    /// It arrives when the partition heals or the node runs on, if the connection lasts.
    Waiting,
    /// The node is dead and nobody has noticed.
    Silent,
    /// There is no connection, and none can be made.
    Gone,
}

impl Node {
    pub(super) fn new(scenario: &Scenario, n: usize, chunks: usize) -> Self {
        Self {
            swarm: Self::machine(scenario, n, 0),
            up: false,
            paused: false,
            pauses: 0,
            paused_at: 0,
            slept: 0,
            severed: false,
            incarnation: 0,
            booted: 0,
            died: None,
            speed: scenario.speed[n],
            received: vec![0; chunks],
            flags: vec![0; chunks],
            flows: HashMap::new(),
            progress: vec![Progress::default(); scenario.blobs.len()],
            last_byte: 0,
            uploads_before: 0,
            timer: None,
            inbox: (0, 0),
        }
    }

    pub(super) fn machine(scenario: &Scenario, n: usize, incarnation: u32) -> Swarm {
        let seed = scenario.seed * 10_007 + n as u64 + u64::from(incarnation) * 1_000_003;
        Swarm::new(node_id(n), scenario.config.clone(), seed)
    }
}

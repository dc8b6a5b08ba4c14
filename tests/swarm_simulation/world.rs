//! A cluster in virtual time: the shipped state machine on every node, a fluid model of the links between them.
//!
//! Each node has an uplink and a downlink; the origin has a cap per node and a cap in total. Every step of a
//! millisecond the capacities are shared out among the transfers that have something to move, three rounds of equal
//! shares, which comes close to max-min fairness. A node passes on what it received up to the step before, so each
//! hop of a tree adds a millisecond. Messages take their latency, and are neither lost nor reordered.
//! One seed, one history.

use std::collections::{BTreeMap, VecDeque};

use windlass::content::{Attestation, ChunkDigest, ChunkIndex, ChunkSet, ContentKey, Layout, NodeId};
use windlass::swarm::{
    Action, Admission, Claim, Config, DEFAULT_CAPACITY, Event, FlowFailure, FlowId, Member, Stats, Swarm,
    Time, Zone,
};
use windlass::wire::{Message, encode};

pub(crate) const CONTENT: ContentKey = ContentKey([42; 32]);
const CHUNK_BYTES: u32 = 8 << 20;
const STEP_US: u64 = 1_000;
/// Bounds are checked this often: a look at everything costs more than a step.
const CHECK_US: u64 = 50_000;
/// A crashed peer's connections break after this.
const BREAK_US: u64 = 500_000;
/// Views change in steps of this.
const VIEW_STEP_US: u64 = 20_000;
/// A member is settled after this.
const SETTLE_US: u64 = 2_000_000;
/// A crashed peer leaves the views after this.
const DETECT_US: u64 = 4_000_000;

/// What a run is made of. Rates in Gbit/s, times in microseconds.
#[derive(Clone)]
pub(crate) struct Scenario {
    pub(crate) nodes: usize,
    pub(crate) chunks: u32,
    pub(crate) link_gbps: f64,
    pub(crate) origin_node_gbps: f64,
    pub(crate) origin_total_gbps: f64,
    pub(crate) latency_us: u64,
    /// A join is seen by the others after up to this long. Zero: everybody knows everybody from the start.
    pub(crate) view_lag_us: u64,
    /// When each node's daemon starts (with a view lag) and pulls begin.
    pub(crate) joins_us: Vec<u64>,
    /// Nodes that hold everything from the start; the first ones.
    pub(crate) warm: usize,
    pub(crate) crashes: Vec<(usize, u64)>,
    pub(crate) seed: u64,
}

impl Scenario {
    pub(crate) fn burst(nodes: usize, chunks: u32) -> Self {
        Self {
            nodes,
            chunks,
            link_gbps: 25.0,
            origin_node_gbps: 5.0,
            origin_total_gbps: 1e6,
            latency_us: 250,
            view_lag_us: 0,
            joins_us: vec![0; nodes],
            warm: 0,
            crashes: Vec::new(),
            seed: 1,
        }
    }

    fn bytes(&self) -> f64 {
        f64::from(self.chunks) * f64::from(CHUNK_BYTES)
    }

    /// Seconds that the last node needs at least when all start together (`facts/swarm.md` section 1).
    pub(crate) fn bound_s(&self) -> f64 {
        let (bits, n) = (self.bytes() * 8.0 / 1e9, self.nodes as f64);
        let warm = self.warm as f64;
        let origin = self.origin_total_gbps.min((n - warm) * self.origin_node_gbps);
        let source = origin + warm * self.link_gbps;
        let relay = (n - warm - if self.warm == 0 { 1.0 } else { 0.0 }) * bits / (n * self.link_gbps);
        (bits / self.link_gbps).max(bits / source).max(relay)
    }
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Seconds from each node's join to its last chunk; `None` for crashed ones.
    pub(crate) seconds: Vec<Option<f64>>,
    pub(crate) last_s: f64,
    pub(crate) origin_fetches: Vec<u32>,
    pub(crate) origin_ratio: f64,
    pub(crate) last_resorts: u64,
    pub(crate) messages: u64,
    pub(crate) message_bytes: u64,
    pub(crate) sent_by_warm: f64,
    pub(crate) stats: Vec<Stats>,
}

enum Happening {
    Deliver {
        from: usize,
        to: usize,
        message: Message,
    },
    Timer(usize),
    Join(usize),
    View(usize),
    Crash(usize),
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
    PeerLost {
        at: usize,
        who: usize,
    },
}

struct Flow {
    id: FlowId,
    to: usize,
    /// `None` is the origin.
    from: Option<usize>,
    chunk: u32,
    moving: bool,
    admitted: bool,
    over: bool,
    reported: u32,
}

struct Node {
    swarm: Swarm,
    alive: bool,
    joined: Option<u64>,
    finished: Option<u64>,
    received: Vec<u32>,
    held: u32,
    flows: BTreeMap<FlowId, usize>,
    by_chunk: BTreeMap<u32, usize>,
    /// When this node learns of each other, and that it is gone.
    learns: Vec<u64>,
    timer: Option<u64>,
}

pub(crate) struct World {
    scenario: Scenario,
    config: Config,
    layout: Layout,
    nodes: Vec<Node>,
    ids: BTreeMap<NodeId, usize>,
    now: u64,
    next: u64,
    queue: BTreeMap<(u64, u64), Happening>,
    flows: Vec<Flow>,
    moving: Vec<usize>,
    random: u64,
    outcome: Outcome,
    origin_bytes: f64,
}

pub(crate) fn node_id(n: usize) -> NodeId {
    NodeId::from_name(&format!("node-{n}"))
}

impl World {
    pub(crate) fn new(scenario: Scenario, config: &Config) -> Self {
        let layout = Layout::new(u64::from(scenario.chunks) * u64::from(CHUNK_BYTES), CHUNK_BYTES).unwrap();
        let node = |n: usize| Node {
            swarm: Swarm::new(node_id(n), config.clone(), scenario.seed * 10_007 + n as u64),
            alive: true,
            joined: None,
            finished: None,
            received: vec![0; scenario.chunks as usize],
            held: 0,
            flows: BTreeMap::new(),
            by_chunk: BTreeMap::new(),
            learns: vec![0; scenario.nodes],
            timer: None,
        };
        let outcome = Outcome {
            seconds: vec![None; scenario.nodes],
            last_s: 0.0,
            origin_fetches: vec![0; scenario.chunks as usize],
            origin_ratio: 0.0,
            last_resorts: 0,
            messages: 0,
            message_bytes: 0,
            sent_by_warm: 0.0,
            stats: Vec::new(),
        };
        let nodes: Vec<_> = (0..scenario.nodes).map(node).collect();
        let mut world = Self {
            config: config.clone(),
            layout,
            nodes,
            ids: (0..scenario.nodes).map(|n| (node_id(n), n)).collect(),
            now: 0,
            next: 0,
            queue: BTreeMap::new(),
            flows: Vec::new(),
            moving: Vec::new(),
            random: scenario.seed,
            outcome,
            origin_bytes: 0.0,
            scenario,
        };
        world.prepare();
        world
    }

    /// Runs until every live node has everything.
    ///
    /// # Panics
    /// When that does not happen within `limit_s` virtual seconds.
    pub(crate) fn run(mut self, limit_s: u64) -> Outcome {
        while !self.is_finished() {
            assert!(
                self.now < limit_s * 1_000_000,
                "seed {}: not finished after {limit_s} s; held {:?}; {:?}",
                self.scenario.seed,
                self.nodes.iter().map(|node| node.held).collect::<Vec<_>>(),
                self.nodes.iter().map(|node| node.swarm.stats()).take(3).collect::<Vec<_>>(),
            );
            let until = self.now + STEP_US;
            while let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 <= until) {
                let ((at, _), happening) = entry.remove_entry();
                self.now = self.now.max(at);
                self.happen(happening);
            }
            self.now = until;
            self.step();
        }
        self.finish()
    }

    fn is_finished(&self) -> bool {
        self.nodes.iter().all(|node| !node.alive || node.finished.is_some())
    }

    fn finish(mut self) -> Outcome {
        for (n, node) in self.nodes.iter().enumerate() {
            let times = node.joined.zip(node.finished).filter(|_| node.alive);
            self.outcome.seconds[n] = times.map(|(from, to)| (to - from) as f64 / 1e6);
            self.outcome.last_s = self.outcome.last_s.max(times.map_or(0.0, |(_, to)| to as f64 / 1e6));
            self.outcome.stats.push(node.swarm.stats());
        }
        self.outcome.origin_ratio = self.origin_bytes / self.scenario.bytes();
        self.outcome.last_resorts = self.outcome.stats.iter().map(|stats| stats.last_resort_flows).sum();
        self.outcome
    }

    fn prepare(&mut self) {
        let joins = self.scenario.joins_us.clone();
        for (n, at) in joins.iter().enumerate() {
            self.after(*at, Happening::Join(n));
            let lagging = self.scenario.view_lag_us > 0;
            for (other, other_at) in joins.iter().enumerate() {
                let lag = self.random_below(self.scenario.view_lag_us.max(1));
                self.nodes[n].learns[other] = if lagging { (*at).max(*other_at) + lag } else { 0 };
            }
        }
        for (n, at) in self.scenario.crashes.clone() {
            self.after(at, Happening::Crash(n));
        }
        if self.scenario.view_lag_us == 0 {
            (0..self.scenario.nodes).for_each(|n| self.tell_members(n));
        }
        for n in 0..self.scenario.warm {
            self.nodes[n].received.fill(CHUNK_BYTES);
            self.nodes[n].held = self.scenario.chunks;
            self.nodes[n].finished = Some(0);
            let have = ChunkSet::full(&self.layout);
            self.event(n, Event::Stored { content: CONTENT, layout: self.layout, have });
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Deliver { from, to, message } => {
                if self.nodes[to].alive {
                    self.event(to, Event::Message { from: node_id(from), message });
                }
            }
            Happening::Timer(n) => {
                if self.nodes[n].alive && self.nodes[n].timer == Some(self.now) {
                    self.nodes[n].timer = None;
                    self.nodes[n].swarm.handle_timeout(Time(self.now));
                    self.drain(n);
                }
            }
            Happening::Join(n) => self.join(n),
            Happening::View(n) => {
                if self.nodes[n].alive {
                    self.tell_members(n);
                }
            }
            Happening::Crash(n) => self.crash(n),
            Happening::Request { flow } => self.request(flow),
            Happening::Begin { flow } => {
                if !self.flows[flow].over {
                    self.flows[flow].moving = true;
                    self.moving.push(flow);
                }
            }
            Happening::Fail { flow, reason } => self.fail(flow, reason),
            Happening::PeerLost { at, who } => {
                if self.nodes[at].alive {
                    self.event(at, Event::PeerLost(node_id(who)));
                }
            }
        }
    }

    fn join(&mut self, n: usize) {
        if self.scenario.view_lag_us > 0 {
            self.tell_members(n);
            let mut moments: Vec<u64> = (0..self.scenario.nodes)
                .flat_map(|other| {
                    let learns = self.nodes[n].learns[other];
                    [learns, learns + SETTLE_US]
                })
                .filter(|at| *at > self.now)
                .map(|at| at.next_multiple_of(VIEW_STEP_US))
                .collect();
            moments.sort_unstable();
            moments.dedup();
            for at in moments {
                self.after(at - self.now, Happening::View(n));
            }
        }
        if n < self.scenario.warm {
            return;
        }
        self.nodes[n].joined = Some(self.now);
        let (layout, have) = (self.layout, ChunkSet::new());
        self.event(n, Event::Open { content: CONTENT, layout, have });
        let wanted = ChunkSet::full(&self.layout);
        self.event(n, Event::Demand { content: CONTENT, wanted, cursors: vec![ChunkIndex(0)] });
    }

    /// What `n` knows of the others. Who started two seconds before it is settled at once;
    /// others two seconds after `n` learnt of them.
    fn tell_members(&mut self, n: usize) {
        let lagging = self.scenario.view_lag_us > 0;
        let joins = &self.scenario.joins_us;
        let learns = |other: usize| self.nodes[n].learns[other].next_multiple_of(VIEW_STEP_US);
        let first = (0..joins.len()).filter(|other| *other != n).map(learns).min().unwrap_or(0);
        let gone = |other: usize| {
            self.scenario.crashes.iter().any(|(who, at)| *who == other && *at + DETECT_US <= self.now)
        };
        let knows = |other: usize| !gone(other) && (other == n || !lagging || learns(other) <= self.now);
        let settled = |other: usize| {
            let known = if other == n { joins[n] } else { learns(other) };
            !lagging || joins[other] + SETTLE_US <= joins[n] || known + SETTLE_US <= self.now
        };
        let members = (0..self.scenario.nodes)
            .filter(|other| knows(*other))
            .map(|other| Member {
                id: node_id(other),
                zone: Zone::default(),
                seed: false,
                settled: settled(other),
                capacity: DEFAULT_CAPACITY,
            })
            .collect();
        self.event(n, Event::Members { members, synced: !lagging || first <= self.now });
    }

    fn crash(&mut self, n: usize) {
        self.nodes[n].alive = false;
        for flow in 0..self.flows.len() {
            let broken = !self.flows[flow].over && self.flows[flow].from == Some(n);
            if !self.flows[flow].over && self.flows[flow].to == n {
                self.end_flow(flow);
            } else if broken {
                self.flows[flow].moving = false;
                self.after(BREAK_US, Happening::Fail { flow, reason: FlowFailure::Broken });
            }
        }
        for at in 0..self.scenario.nodes {
            if at != n {
                self.after(BREAK_US, Happening::PeerLost { at, who: n });
                self.after(DETECT_US, Happening::View(at));
            }
        }
    }

    fn request(&mut self, flow: usize) {
        let Flow { to, from: Some(from), chunk, over: false, .. } = self.flows[flow] else { return };
        if !self.nodes[from].alive {
            self.after(BREAK_US, Happening::Fail { flow, reason: FlowFailure::Broken });
            return;
        }
        let now = Time(self.now);
        let admission = self.nodes[from].swarm.upload_requested(now, node_id(to), CONTENT, ChunkIndex(chunk));
        let latency = self.scenario.latency_us;
        match admission {
            Admission::Serve => {
                self.flows[flow].admitted = true;
                self.after(latency, Happening::Begin { flow });
            }
            Admission::Busy => self.after(latency, Happening::Fail { flow, reason: FlowFailure::Busy }),
            Admission::NotFound => {
                self.after(latency, Happening::Fail { flow, reason: FlowFailure::NotFound })
            }
        }
    }

    fn fail(&mut self, flow: usize, reason: FlowFailure) {
        let Flow { id, to, chunk, over: false, .. } = self.flows[flow] else { return };
        self.end_flow(flow);
        let received = self.nodes[to].received[chunk as usize];
        self.event(to, Event::FlowFailed { flow: id, received, reason });
    }

    fn end_flow(&mut self, flow: usize) {
        let (id, to, chunk) = (self.flows[flow].id, self.flows[flow].to, self.flows[flow].chunk);
        self.flows[flow].over = true;
        self.nodes[to].flows.remove(&id);
        if self.nodes[to].by_chunk.get(&chunk) == Some(&flow) {
            self.nodes[to].by_chunk.remove(&chunk);
        }
        if let Some(from) = self.flows[flow].from.filter(|_| self.flows[flow].admitted) {
            self.nodes[from].swarm.upload_ended(Time(self.now));
        }
    }

    fn event(&mut self, n: usize, event: Event) {
        self.nodes[n].swarm.handle_event(Time(self.now), event);
        self.drain(n);
    }

    fn drain(&mut self, n: usize) {
        while let Some(action) = self.nodes[n].swarm.poll_action() {
            self.act(n, action);
        }
        let due = self.nodes[n].swarm.poll_timeout().map(|at| at.0.max(self.now));
        if due != self.nodes[n].timer {
            self.nodes[n].timer = due;
            if let Some(at) = due {
                self.after(at - self.now, Happening::Timer(n));
            }
        }
    }

    fn act(&mut self, n: usize, action: Action) {
        match action {
            Action::Send { to, message } => {
                self.outcome.messages += 1;
                self.outcome.message_bytes += encode(&message).len() as u64;
                let latency = self.scenario.latency_us + self.random_below(self.scenario.latency_us / 4 + 1);
                let to = self.ids[&to];
                self.after(latency, Happening::Deliver { from: n, to, message });
            }
            Action::FetchFromPeer { flow, peer, chunk, .. } => {
                let from = self.ids[&peer];
                let flow = self.start(n, flow, Some(from), chunk.0);
                self.after(self.scenario.latency_us, Happening::Request { flow });
            }
            Action::FetchFromOrigin { flow, chunk, claim, .. } => {
                self.outcome.origin_fetches[chunk.0 as usize] += 1;
                if claim == Claim::LastResort {
                    self.outcome.last_resorts += 1;
                }
                let flow = self.start(n, flow, None, chunk.0);
                let first_byte = 15_000 + self.random_below(30_000);
                self.after(first_byte, Happening::Begin { flow });
            }
            Action::Cancel { flow } => {
                if let Some(flow) = self.nodes[n].flows.get(&flow).copied() {
                    self.end_flow(flow);
                }
            }
        }
    }

    fn start(&mut self, to: usize, id: FlowId, from: Option<usize>, chunk: u32) -> usize {
        let index = self.flows.len();
        self.flows.push(Flow {
            id,
            to,
            from,
            chunk,
            moving: false,
            admitted: false,
            over: false,
            reported: 0,
        });
        self.nodes[to].flows.insert(id, index);
        let before = self.nodes[to].by_chunk.insert(chunk, index);
        assert!(before.is_none(), "seed {}: two flows for chunk {chunk} at node {to}", self.scenario.seed);
        index
    }

    /// No queue grows beyond what it is for.
    fn check_bounds(&self) {
        for node in self.nodes.iter().filter(|node| node.alive) {
            let stats = node.swarm.stats();
            // Leases start whatever else is in the air.
            let leases = u64::from(self.config.origin_flows) * u64::from(CHUNK_BYTES);
            assert!(stats.inflight_bytes <= self.config.inflight_bytes + leases, "{stats:?}");
            assert!(stats.queued_assignments <= 64, "{stats:?}");
            assert!(stats.uploads <= u64::from(self.config.upload_slots), "{stats:?}");
        }
    }

    /// Moves the bytes of one step.
    fn step(&mut self) {
        if self.now.is_multiple_of(CHECK_US) {
            self.check_bounds();
        }
        self.moving.retain(|flow| !self.flows[*flow].over && self.flows[*flow].moving);
        let step_bytes = |gbps: f64| gbps * 1e9 / 8.0 * STEP_US as f64 / 1e6;
        let nodes = self.scenario.nodes;
        let mut up = vec![step_bytes(self.scenario.link_gbps); nodes];
        let mut down = vec![step_bytes(self.scenario.link_gbps); nodes];
        let mut origin = vec![step_bytes(self.scenario.origin_node_gbps); nodes];
        let mut total = step_bytes(self.scenario.origin_total_gbps);
        let mut need: Vec<f64> = self.moving.iter().map(|flow| self.available(*flow)).collect();
        let mut moved = vec![0.0; need.len()];
        for _ in 0..3 {
            let (mut ups, mut downs, mut origins, mut all) =
                (vec![0u32; nodes], vec![0u32; nodes], vec![0u32; nodes], 0u32);
            for (at, flow) in self.moving.iter().enumerate().filter(|(at, _)| need[*at] > 0.5) {
                let _ = at;
                let flow = &self.flows[*flow];
                downs[flow.to] += 1;
                match flow.from {
                    Some(from) => ups[from] += 1,
                    None => {
                        origins[flow.to] += 1;
                        all += 1;
                    }
                }
            }
            let (up0, down0, origin0, total0) = (up.clone(), down.clone(), origin.clone(), total);
            for (at, flow) in self.moving.iter().enumerate() {
                if need[at] <= 0.5 {
                    continue;
                }
                let flow = &self.flows[*flow];
                let mut share = down0[flow.to] / f64::from(downs[flow.to]);
                match flow.from {
                    Some(from) => share = share.min(up0[from] / f64::from(ups[from])),
                    None => {
                        share = share
                            .min(origin0[flow.to] / f64::from(origins[flow.to]))
                            .min(total0 / f64::from(all));
                    }
                }
                let bytes = share.min(need[at]);
                need[at] -= bytes;
                moved[at] += bytes;
                down[flow.to] -= bytes;
                match flow.from {
                    Some(from) => up[from] -= bytes,
                    None => {
                        origin[flow.to] -= bytes;
                        total -= bytes;
                    }
                }
            }
        }
        self.book(&moved);
    }

    /// Bytes that the source has and the destination lacks.
    fn available(&self, flow: usize) -> f64 {
        let flow = &self.flows[flow];
        let here = self.nodes[flow.to].received[flow.chunk as usize];
        let there = flow.from.map_or(CHUNK_BYTES, |from| self.nodes[from].received[flow.chunk as usize]);
        f64::from(there.saturating_sub(here))
    }

    fn book(&mut self, moved: &[f64]) {
        let mut reports = VecDeque::new();
        for (at, bytes) in moved.iter().enumerate() {
            let index = self.moving[at];
            let (to, chunk, from) = (self.flows[index].to, self.flows[index].chunk, self.flows[index].from);
            let here = &mut self.nodes[to].received[chunk as usize];
            let whole = CHUNK_BYTES - *here;
            *here += (bytes.round() as u32).min(whole);
            match from {
                None => self.origin_bytes += bytes.round(),
                Some(from) if from < self.scenario.warm => self.outcome.sent_by_warm += bytes.round(),
                Some(_) => {}
            }
            if *here == CHUNK_BYTES || *here - self.flows[index].reported >= CHUNK_BYTES / 8 {
                self.flows[index].reported = *here;
                reports.push_back((index, *here));
            }
        }
        for (index, received) in reports {
            let Flow { id, to, chunk, over: false, .. } = self.flows[index] else { continue };
            if received < CHUNK_BYTES {
                self.event(to, Event::FlowProgress { flow: id, received });
                continue;
            }
            self.end_flow(index);
            self.nodes[to].held += 1;
            let attestation = Attestation { digest: ChunkDigest([chunk as u8; 32]), attester: node_id(to) };
            self.event(to, Event::FlowDone { flow: id, attestation, kept: true });
            if self.nodes[to].held == self.scenario.chunks {
                self.nodes[to].finished = Some(self.now);
                self.event(to, Event::Close { content: CONTENT });
            }
        }
    }

    fn after(&mut self, wait_us: u64, happening: Happening) {
        self.next += 1;
        self.queue.insert((self.now + wait_us, self.next), happening);
    }

    fn random_below(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.random;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (x ^ (x >> 31)) % bound.max(1)
    }
}

//! What a run is made of, and the least time that physics allows it.

use windlass::swarm::Config;

/// Simulated contents are cut into chunks of this many bytes unless a scenario says otherwise.
pub(crate) const CHUNK_BYTES: u32 = 8 << 20;
/// A second in the world's time unit.
pub(crate) const SECOND: u64 = 1_000_000;
/// A cluster whose daemons all started long before its pulls has settled by then.
pub(crate) const SETTLED_BY: u64 = 10 * SECOND;

/// One content.
#[derive(Clone, Debug)]
pub(crate) struct Blob {
    pub(crate) chunks: u32,
    pub(crate) chunk_bytes: u32,
}

/// One node reads one content from its beginning.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pull {
    pub(crate) node: usize,
    pub(crate) blob: usize,
    pub(crate) at: u64,
}

/// How nodes learn of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Views {
    /// Everybody knows everybody from the start.
    Known,
    /// Each node learns of each start and crash after a random time of up to this many microseconds.
    Lag(u64),
    /// The shipped membership, its packets delivered and lost like everything else.
    Gossip,
}

/// Something that goes wrong.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// SIGKILL.
    Crash(usize),
    /// The same, of the node that keeps the most leases then.
    CrashHome,
    /// The daemon starts again, with the chunks it had stored or with an empty disk, and its readers with it.
    Restart {
        node: usize,
        keep: bool,
    },
    /// SIGSTOP and SIGCONT.
    Pause(usize),
    Resume(usize),
    /// Nodes of different parts do not reach each other; the origin is reached by all.
    Partition(Vec<u8>),
    Heal,
    /// The origin answers this many of 100 requests with 503.
    Throttle(u32),
    /// It answers this many of 100 with an error that is no request to slow down.
    Break(u32),
    /// The store drops the content.
    Evict {
        node: usize,
        blob: usize,
    },
    /// The node's links run at this share of their rate.
    Slow {
        node: usize,
        percent: u32,
    },
}

/// What a run is made of. Rates in Gbit/s, times in microseconds.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) seed: u64,
    pub(crate) config: Config,
    pub(crate) blobs: Vec<Blob>,
    pub(crate) pulls: Vec<Pull>,
    /// Who holds what from the start.
    pub(crate) warm: Vec<(usize, usize)>,
    /// When each node's daemon starts; as many as there are nodes.
    pub(crate) boots: Vec<u64>,
    pub(crate) views: Views,
    pub(crate) link_gbps: f64,
    /// Share of `link_gbps` that each node has.
    pub(crate) speed: Vec<f64>,
    /// What each node says of its capacity, 10 being usual.
    pub(crate) capacity: Vec<u16>,
    pub(crate) seeds: Vec<bool>,
    pub(crate) zones: usize,
    pub(crate) origin_node_gbps: f64,
    pub(crate) origin_total_gbps: f64,
    /// From 1x to 3x this passes until the origin's first byte.
    pub(crate) origin_first_byte: u64,
    /// Of messages and of a chunk request.
    pub(crate) latency: u64,
    /// Messages take up to this much longer, and so overtake each other.
    pub(crate) jitter: u64,
    /// Messages lost, of 10,000. The transport loses none while a connection lasts; this is harsher than it.
    pub(crate) loss: u32,
    /// A dead node's connections break after this.
    pub(crate) break_after: u64,
    /// Nodes whose uploads of a chunk turn out wrong, of 100.
    pub(crate) corrupt: Vec<u32>,
    pub(crate) faults: Vec<(u64, Fault)>,
    /// Bytes move in steps of this while they move; each hop of a tree takes one.
    pub(crate) step: u64,
    /// A live node that waits must receive a byte at least this often.
    pub(crate) stall_limit: u64,
    /// Virtual time after which a run has failed.
    pub(crate) limit: u64,
    /// How often the progress of all nodes is noted; 0 is never.
    pub(crate) sample: u64,
}

impl Scenario {
    /// `nodes` that have known each other for long start to pull one content in the same instant.
    pub(crate) fn burst(nodes: usize, chunks: u32) -> Self {
        Self {
            seed: 1,
            config: Config::default(),
            blobs: vec![Blob { chunks, chunk_bytes: CHUNK_BYTES }],
            pulls: (0..nodes).map(|node| Pull { node, blob: 0, at: 0 }).collect(),
            warm: Vec::new(),
            boots: vec![0; nodes],
            views: Views::Known,
            link_gbps: 25.0,
            speed: vec![1.0; nodes],
            capacity: vec![10; nodes],
            seeds: vec![false; nodes],
            zones: 1,
            origin_node_gbps: 5.0,
            origin_total_gbps: f64::INFINITY,
            origin_first_byte: 15_000,
            latency: 500,
            jitter: 125,
            loss: 0,
            break_after: SECOND / 2,
            corrupt: vec![0; nodes],
            faults: Vec::new(),
            step: 1_000,
            stall_limit: 20 * SECOND,
            limit: 600 * SECOND,
            sample: 0,
        }
    }

    /// The first `warm` nodes hold everything, the others pull.
    pub(crate) fn warm(warm: usize, pulling: usize, chunks: u32) -> Self {
        let mut scenario = Self::burst(warm + pulling, chunks);
        scenario.warm = (0..warm).map(|node| (node, 0)).collect();
        scenario.pulls.retain(|pull| pull.node >= warm);
        scenario
    }

    /// Daemons that start a second before their pull, spread at random over `spread`.
    pub(crate) fn joins(nodes: usize, chunks: u32, spread: u64, seed: u64) -> Self {
        let mut scenario = Self::burst(nodes, chunks);
        let mut random = Random::new(seed);
        for pull in &mut scenario.pulls {
            pull.at = SECOND + random.below(spread.max(1));
            scenario.boots[pull.node] = pull.at - SECOND;
        }
        scenario.views = Views::Lag(SECOND / 2);
        scenario.limit += spread;
        scenario.seed = seed;
        scenario
    }

    /// Daemons that start in the same instant as their pulls: nobody knows anybody.
    pub(crate) fn same_instant(nodes: usize, chunks: u32) -> Self {
        let mut scenario = Self::burst(nodes, chunks);
        scenario.views = Views::Lag(SECOND / 2);
        scenario
    }

    pub(crate) fn nodes(&self) -> usize {
        self.boots.len()
    }

    pub(crate) fn bytes(&self, blob: usize) -> f64 {
        f64::from(self.blobs[blob].chunks) * f64::from(self.blobs[blob].chunk_bytes)
    }

    pub(crate) fn down_gbps(&self, node: usize) -> f64 {
        self.link_gbps * self.speed[node]
    }

    /// Seconds that the last of `pullers` of the first content needs at least when all start together (Kumar and
    /// Ross 2006, with each byte leaving the origin once): what the source gives, what the slowest link takes, and
    /// what all uplinks together pass on.
    pub(crate) fn bound_s(&self) -> f64 {
        let gbit = self.bytes(0) * 8.0 / 1e9;
        let pullers: Vec<usize> = self.pulls.iter().map(|pull| pull.node).collect();
        let warm: Vec<usize> = self.warm.iter().map(|(node, _)| *node).collect();
        let slowest = pullers.iter().map(|node| self.down_gbps(*node)).fold(f64::INFINITY, f64::min);
        let warm_gbps: f64 = warm.iter().map(|node| self.down_gbps(*node)).sum();
        let origin = if warm.is_empty() {
            self.origin_total_gbps.min(pullers.len() as f64 * self.origin_node_gbps)
        } else {
            0.0
        };
        let uplinks: f64 = pullers.iter().map(|node| self.down_gbps(*node)).sum::<f64>() + warm_gbps;
        let relayed = pullers.len() as f64 - f64::from(u8::from(warm.is_empty()));
        (gbit / slowest).max(gbit / (origin + warm_gbps)).max(relayed * gbit / uplinks)
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        scramble(self.0)
    }

    /// A number below `bound`; 0 when that is 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

pub(crate) const fn scramble(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

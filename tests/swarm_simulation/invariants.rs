//! What must hold in every history.
//!
//! - Every interested live node finishes, and receives a byte at least every `stall_limit` (`look_for_stalls`).
//! - A node keeps only chunks that are right (`transfers` checks what a source sent, `check_store` what was kept).
//! - A chunk is fetched from the origin once, and again only for a [`Cause`] that the history names; how often each
//!   cause may is bounded too (`close_ledger`).
//! - Every queue within its bound (`check_bounds`).
//! - No message storm (`close_ledger`).
//!
//! Each failure prints the seed that repeats the history.

use std::collections::{BTreeMap, BTreeSet};

use windlass::swarm::{Claim, Scope};
use windlass::wire::Message;

use super::scenario::{Fault, SECOND, Scenario, Views};
use super::transfers::Flow;
use super::world::{STORED, TAINTED, World};

/// A fault explains what it disturbs for this long after it is over: a connection takes 10 s to break, membership
/// some 5 s to notice, a node that is passed over stays so for 5 s, and then the homes have to hear of it.
const AFTERMATH: u64 = 25 * SECOND;
/// Views of a cluster in which somebody appeared have converged after this: the lag, and settling.
const CONVERGENCE: u64 = 6 * SECOND;

/// Why a chunk was fetched from the origin although it had been before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cause {
    /// Nobody alive had it or fetched it: whoever had died, evicted it, was refused or gave up.
    Lost,
    /// Everybody who has or fetches it is paused or in another part.
    OutOfReach,
    /// Everybody who has or fetches it is in another zone, and the scope is the zone.
    OtherZone,
    /// The one who fetches it is paused, slow, or gets nothing, and lost its lease.
    Stolen,
    /// A damaged disk's copies were refused, and with them what others had of them half-way.
    Rotten,
    /// Membership had not converged: somebody had just started.
    Converging,
    /// A home or a message was lost to a fault that is not long over.
    Disturbed,
}

/// The books of the origin's side.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// Live nodes that hold a right copy.
    holders: Vec<u32>,
    /// Who fetches it now.
    fetching: Vec<Vec<usize>>,
    fetches: Vec<u32>,
    again: BTreeMap<Cause, u32>,
    pub(super) disturbed_until: u64,
    pub(super) converging_until: u64,
    pub(super) crashes: u32,
    pub(super) partitions: u32,
    pub(super) pauses: u32,
    /// Chunks that only paused nodes had or fetched just after a fault.
    out_of_reach: BTreeSet<usize>,
    /// Chunks in announcements that were lost: said once, because a connection loses nothing while it lasts.
    unheard: u32,
}

impl Ledger {
    pub(super) fn new(scenario: &Scenario, chunks: usize) -> Self {
        Self {
            holders: vec![0; chunks],
            fetching: vec![Vec::new(); chunks],
            fetches: vec![0; chunks],
            again: BTreeMap::new(),
            disturbed_until: if scenario.loss > 0 || scenario.jitter > scenario.latency {
                u64::MAX
            } else {
                0
            },
            converging_until: 0,
            crashes: 0,
            partitions: 0,
            pauses: 0,
            out_of_reach: BTreeSet::new(),
            unheard: 0,
        }
    }

    pub(super) fn message_lost(&mut self, message: &Message) {
        if let Message::Announce(announce) = message {
            self.unheard += announce.stripes.iter().map(|(_, have)| have.count_ones()).sum::<u32>();
        }
    }

    pub(super) fn gained(&mut self, g: usize) {
        self.holders[g] += 1;
    }

    pub(super) fn lost(&mut self, g: usize) {
        self.holders[g] -= 1;
    }

    pub(super) fn fetch_ended(&mut self, g: usize, node: usize) {
        if let Some(at) = self.fetching[g].iter().position(|who| *who == node) {
            self.fetching[g].swap_remove(at);
        }
    }

    /// A fault happens now; what it disturbs it explains.
    pub(super) fn disturb(&mut self, now: u64) {
        self.disturbed_until = self.disturbed_until.max(now + AFTERMATH);
    }

    pub(super) fn started(&mut self, now: u64) {
        self.converging_until = self.converging_until.max(now + CONVERGENCE);
    }
}

impl World {
    /// The origin is asked for a chunk: for the first time, or for a reason.
    pub(super) fn note_fetch(&mut self, flow: usize, claim: Claim) {
        let Flow { to, g, .. } = self.flows[flow];
        if self.ledger.fetches[g] > 0 || self.ledger.holders[g] > 0 {
            let Some(cause) = self.cause(to, g) else {
                self.fail_run(&format!(
                    "chunk {g} is fetched again by node {to} ({claim:?}) and nothing explains it; {} hold it, {:?} fetch it",
                    self.ledger.holders[g], self.ledger.fetching[g],
                ))
            };
            *self.ledger.again.entry(cause).or_default() += 1;
        }
        self.ledger.fetches[g] += 1;
        self.ledger.fetching[g].push(to);
    }

    fn cause(&self, to: usize, g: usize) -> Option<Cause> {
        let ledger = &self.ledger;
        if ledger.holders[g] == 0 && ledger.fetching[g].is_empty() {
            return Some(Cause::Lost);
        }
        let holds = |n: &usize| self.nodes[*n].up && self.nodes[*n].flags[g] & STORED != 0;
        let zones = self.scenario.zones;
        let inside = |n: usize| self.scenario.config.scope == Scope::Cluster || n % zones == to % zones;
        if !(0..self.nodes.len()).filter(holds).chain(ledger.fetching[g].iter().copied()).any(inside) {
            return Some(Cause::OtherZone);
        }
        let near = |n: usize| !self.nodes[n].paused && self.parts.as_ref().is_none_or(|p| p[n] == p[to]);
        let in_reach =
            (0..self.nodes.len()).filter(holds).any(near) || ledger.fetching[g].iter().any(|n| near(*n));
        if !in_reach {
            return Some(Cause::OutOfReach);
        }
        let hindered = |n: usize| {
            self.nodes[n].paused || self.nodes[n].speed < 0.5 || self.now - self.nodes[n].last_byte > SECOND
        };
        let stolen = ledger.holders[g] == 0 && ledger.fetching[g].iter().any(|n| hindered(*n));
        if stolen {
            Some(Cause::Stolen)
        } else if self.now < ledger.disturbed_until {
            Some(Cause::Disturbed)
        } else if self.scenario.views != Views::Known && self.now < ledger.converging_until {
            Some(Cause::Converging)
        } else if self.scenario.corrupt.iter().any(|percent| *percent > 0) {
            Some(Cause::Rotten)
        } else {
            None
        }
    }

    /// Notes the chunks that a fault, which has just happened, leaves with paused nodes alone: they may be fetched again.
    pub(super) fn note_out_of_reach(&mut self) {
        let up = (0..self.nodes.len()).filter(|n| self.nodes[*n].up);
        let (paused, running): (Vec<usize>, Vec<usize>) = up.partition(|n| self.nodes[*n].paused);
        let has = |nodes: &[usize], g: usize| {
            let holds = nodes.iter().any(|n| self.nodes[*n].flags[g] & STORED != 0);
            holds || self.ledger.fetching[g].iter().any(|n| nodes.contains(n))
        };
        let chunks = 0..self.ledger.fetches.len();
        let alone: Vec<usize> = chunks.filter(|g| has(&paused, *g) && !has(&running, *g)).collect();
        self.ledger.out_of_reach.extend(alone);
    }

    pub(super) fn check(&mut self) {
        self.look_for_stalls();
        self.check_bounds();
    }

    fn look_for_stalls(&mut self) {
        let refused = self.throttle + self.break_percent > 0;
        let waits = |n: &usize| {
            let node = &self.nodes[*n];
            let reads = |p: &super::world::Progress| p.opened.is_some() && p.finished.is_none();
            node.up && !node.paused && node.progress.iter().any(reads)
        };
        let waiting: Vec<usize> = (0..self.nodes.len()).filter(waits).collect();
        for n in waiting {
            if refused {
                self.nodes[n].last_byte = self.now;
            }
            let stall = self.now - self.nodes[n].last_byte;
            self.outcome.longest_stall_s = self.outcome.longest_stall_s.max(stall as f64 / 1e6);
            if stall > self.scenario.stall_limit {
                self.fail_run(&format!("node {n} has waited for {:.1} s", stall as f64 / 1e6));
            }
        }
    }

    /// No queue grows beyond what it is for.
    fn check_bounds(&mut self) {
        let config = &self.scenario.config;
        let largest = self.scenario.blobs.iter().map(|blob| u64::from(blob.chunk_bytes)).max().unwrap_or(0);
        let readers = self.scenario.blobs.len() as u64;
        // Leases start whatever else is in the air, and each content may have one chunk whatever the others do.
        let inflight = config.inflight_bytes + (u64::from(config.origin_flows) + readers) * largest;
        let (mut rows, mut leases) = (0, 0);
        for (n, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.up) {
            let stats = node.swarm.stats();
            let reads = node.progress.iter().any(|p| p.opened.is_some() && p.finished.is_none());
            let slots = u64::from(config.upload_slots * u32::from(self.scenario.capacity[n]) / 10).max(1);
            // Twice as many where nothing is read, and these may end after somebody has begun to.
            let uploads = if reads { slots.max(node.uploads_before) } else { 2 * slots };
            rows = rows.max(stats.home_rows);
            leases += stats.leases;
            let within = stats.inflight_bytes <= inflight
                && stats.queued_assignments <= 64 * readers
                && stats.uploads <= uploads
                && stats.home_stripes <= config.max_home_stripes as u64;
            if !within {
                self.fail_run(&format!("node {n} is out of bounds: {stats:?}"));
            }
        }
        self.outcome.peak_rows = self.outcome.peak_rows.max(rows);
        self.outcome.peak_leases = self.outcome.peak_leases.max(leases);
    }

    /// What can only be said at the end.
    pub(super) fn close_ledger(&mut self) {
        self.outcome.fetches.clone_from(&self.ledger.fetches);
        self.outcome.again.clone_from(&self.ledger.again);
        self.check_store();
        self.check_again();
        self.check_messages();
    }

    fn check_store(&self) {
        for (n, node) in self.nodes.iter().enumerate() {
            for (g, flags) in node.flags.iter().enumerate() {
                if flags & STORED != 0 && flags & TAINTED != 0 {
                    self.fail_run(&format!("node {n} keeps a wrong chunk {g}"));
                }
            }
        }
    }

    /// Fetches beyond the first, by cause, against what each fault may cost.
    fn check_again(&self) {
        let count = |cause| self.ledger.again.get(&cause).copied().unwrap_or(0);
        let chunks = self.ledger.fetches.len() as u32;
        let of = |percent: u32| chunks * percent / 100 + 4;
        // A node's claims in flight, its home's stripe, and half a percent of what was fetched through it.
        let per_node = self.scenario.config.origin_flows + chunks / 200;
        let faults = self.ledger.crashes + self.ledger.pauses;
        let parts = self.ledger.partitions * chunks;
        let alone = (self.ledger.out_of_reach.len() as u32).min(self.ledger.pauses * per_node);
        let disturbed = if self.ledger.disturbed_until == u64::MAX { of(5) + self.ledger.unheard } else { 0 };
        let limits = [
            (Cause::OtherZone, (self.scenario.zones as u32 - 1) * chunks),
            (Cause::Converging, of(1)),
            (Cause::Rotten, of(10)),
            (Cause::OutOfReach, parts + alone + disturbed),
            (Cause::Stolen, faults * per_node + of(5)),
            (Cause::Disturbed, (faults + 4 * self.ledger.partitions) * per_node + disturbed),
        ];
        for (cause, limit) in limits {
            if count(cause) > limit {
                self.fail_run(&format!(
                    "{} fetches are explained by {cause:?}; at most {limit} can be",
                    count(cause)
                ));
            }
        }
    }

    /// Messages per chunk and node, and with each fault's share of questions and of repetitions while it lasts.
    fn check_messages(&self) {
        let chunks: f64 =
            self.scenario.pulls.iter().map(|p| f64::from(self.scenario.blobs[p.blob].chunks)).sum();
        let stripes: f64 = self.scenario.blobs.iter().map(|b| f64::from(b.chunks.div_ceil(64))).sum();
        let nodes = self.nodes.len() as f64;
        let faults = self.scenario.faults.len() as f64;
        // A stripe's home asks 32 nodes at most while the cluster changes, all when a home died; waiting nodes repeat
        // themselves twice a second for each of the stripes in their window.
        let asked = stripes * (4.0 * 32.0 + faults * nodes * 4.0);
        let waited = nodes * self.scenario.blobs.len() as f64 * 24.0 * self.now as f64 / 1e6;
        let limit = 6.0 * chunks + asked + waited + 1_000.0;
        if self.outcome.messages as f64 > limit {
            self.fail_run(&format!("{} messages; at most {limit:.0} are needed", self.outcome.messages));
        }
    }

    /// A node's part of the story, for who debugs a seed.
    fn story(&self, n: usize) -> String {
        let node = &self.nodes[n];
        let missing: Vec<usize> =
            (0..node.flags.len()).filter(|g| node.flags[*g] & STORED == 0).take(16).collect();
        let mut flows: Vec<&Flow> = node.flows.values().map(|flow| &self.flows[*flow]).collect();
        flows.sort_by_key(|flow| flow.g);
        let flows: Vec<_> =
            flows.iter().take(16).map(|f| (f.g, f.from, f.admitted, node.received[f.g])).collect();
        format!(
            "node {n}: up {} paused {} missing {missing:?}, transfers (chunk, from, admitted, received) {flows:?}\n    {:?}",
            node.up,
            node.paused,
            node.swarm.stats(),
        )
    }

    /// Ends a run that broke an invariant.
    pub(super) fn fail_run(&self, what: &str) -> ! {
        let held: Vec<_> =
            self.nodes.iter().map(|n| n.progress.iter().map(|p| p.held).sum::<u32>()).collect();
        let faults: Vec<&(u64, Fault)> =
            self.scenario.faults.iter().filter(|(at, _)| *at <= self.now).collect();
        let unfinished =
            |n: &usize| self.nodes[*n].progress.iter().any(|p| p.opened.is_some() && p.finished.is_none());
        let stories: Vec<_> =
            (0..self.nodes.len()).filter(unfinished).take(4).map(|n| self.story(n)).collect();
        panic!(
            "seed {} at {:.3} s: {what}\n  {} nodes, {} contents, faults so far {faults:?}\n  held {held:?}\n  {}\n  \
             replay: cargo bench --bench swarm -- replay {}",
            self.scenario.seed,
            self.now as f64 / 1e6,
            self.nodes.len(),
            self.scenario.blobs.len(),
            stories.join("\n  "),
            self.scenario.seed,
        )
    }
}

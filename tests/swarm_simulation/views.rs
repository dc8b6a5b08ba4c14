//! Who knows whom.
//!
//! A model with a lag, or the shipped membership: one [`Membership`] on each node, its packets lost in partitions
//! and at the dead, introduced to three nodes that live, as a headless Service's DNS names would.

use std::net::SocketAddr;

use bytes::Bytes;
use windlass::swarm::membership::{self, Membership, MembershipAction, NodeIdentity, PeerBook};
use windlass::swarm::{Event, Member, Time, Zone};

use super::scenario::{SECOND, Scenario, Views, scramble};
use super::world::{Happening, Path, World, node_id, node_name};

/// Without membership a dead node is forgotten after this, and a new one settles after [`SETTLE`].
const DETECT: u64 = 5 * SECOND;
const SETTLE: u64 = 2 * SECOND;
/// `gossip.bootstrap_interval_ms`, alone and in company, and `gossip.alone_after_ms`.
const INTRODUCE_ALONE: u64 = 3 * SECOND;
const INTRODUCE: u64 = 30 * SECOND;
const ALONE_AFTER: u64 = 3 * SECOND;
const INTRODUCED_TO: usize = 3;

pub(super) struct Gossip {
    members: Vec<Option<Membership>>,
    synced: Vec<bool>,
    timers: Vec<Option<u64>>,
}

impl Gossip {
    pub(super) fn of(scenario: &Scenario) -> Option<Self> {
        let nodes = scenario.nodes();
        (scenario.views == Views::Gossip).then(|| Self {
            members: (0..nodes).map(|_| None).collect(),
            synced: vec![false; nodes],
            timers: vec![None; nodes],
        })
    }
}

pub(super) fn zone(scenario: &Scenario, n: usize) -> Zone {
    if scenario.zones > 1 {
        Zone::new(&format!("zone-{}", n % scenario.zones)).unwrap()
    } else {
        Zone::default()
    }
}

impl World {
    /// The daemon starts to hear of others.
    pub(super) fn meet(&mut self, n: usize) {
        match self.scenario.views {
            Views::Known => self.tell_members(n),
            Views::Lag(lag) => {
                self.tell_members(n);
                self.plan_views(n, lag);
            }
            Views::Gossip => self.begin_gossip(n),
        }
    }

    /// Views change together, so that a large cluster's do not change with each single start.
    fn view_step(&self) -> u64 {
        if self.nodes.len() > 256 { SECOND / 10 } else { SECOND / 50 }
    }

    fn plan_views(&mut self, n: usize, lag: u64) {
        let step = self.view_step();
        // Whoever finds nobody by then is alone.
        let mut moments = std::collections::BTreeSet::from([(self.now + ALONE_AFTER).next_multiple_of(step)]);
        for other in 0..self.nodes.len() {
            let learns = self.learns(n, other, lag);
            moments.insert(learns.next_multiple_of(step));
            moments.insert((learns + SETTLE).next_multiple_of(step));
        }
        let now = self.now;
        for at in moments.into_iter().filter(|at| *at > now) {
            self.at(at, Happening::View(n));
        }
    }

    /// The others forget a dead node in their own time; the shipped membership finds out by itself.
    pub(super) fn plan_detection(&mut self, dead: usize) {
        if let Views::Lag(lag) = self.scenario.views {
            for n in (0..self.nodes.len()).filter(|n| *n != dead) {
                self.after(DETECT + self.lag(n, dead, lag), Happening::View(n));
            }
        }
    }

    fn lag(&self, n: usize, other: usize, lag: u64) -> u64 {
        scramble(self.scenario.seed ^ (n as u64) << 32 ^ (other as u64) << 8) % lag.max(1)
    }

    fn learns(&self, n: usize, other: usize, lag: u64) -> u64 {
        let both = self.scenario.boots[n].max(self.scenario.boots[other]);
        if n == other { both } else { both + self.lag(n, other, lag) }
    }

    /// What `n` knows of the others. Who started two seconds before it is settled at once, others two seconds after
    /// `n` learnt of them.
    pub(super) fn tell_members(&mut self, n: usize) {
        if !self.nodes[n].up {
            return;
        }
        if self.nodes[n].paused {
            self.held.push(Happening::View(n));
            return;
        }
        let (boots, step) = (&self.scenario.boots, self.view_step());
        let Views::Lag(lag) = self.scenario.views else {
            let members = (0..self.nodes.len()).map(|other| self.member(other, true)).collect();
            self.event(n, Event::Members { members, synced: true });
            return;
        };
        let learns = |other| self.learns(n, other, lag).next_multiple_of(step);
        let gone = |other: usize| {
            self.nodes[other].died.is_some_and(|at| at + DETECT + self.lag(n, other, lag) <= self.now)
        };
        let knows = |other: &usize| *other == n || (!gone(*other) && learns(*other) <= self.now);
        let settled = |other: usize| {
            boots[other] + SETTLE <= boots[n]
                || self.learns(n, other, lag).next_multiple_of(step) + SETTLE <= self.now
        };
        let members: Vec<Member> =
            (0..self.nodes.len()).filter(knows).map(|other| self.member(other, settled(other))).collect();
        let synced = members.len() > 1 || self.now >= boots[n] + ALONE_AFTER;
        self.event(n, Event::Members { members, synced });
    }

    fn member(&self, n: usize, settled: bool) -> Member {
        let (seed, capacity) = (self.scenario.seeds[n], self.scenario.capacity[n]);
        Member { id: node_id(n), zone: zone(&self.scenario, n), seed, settled, capacity }
    }

    fn identity(&self, n: usize, boot: u64) -> NodeIdentity {
        let addr = SocketAddr::from(([10, 0, (n / 250) as u8, (n % 250) as u8], 5_103));
        let (seed, capacity) = (self.scenario.seeds[n], self.scenario.capacity[n]);
        NodeIdentity::new(&node_name(n), addr, 1 + boot / 1_000, zone(&self.scenario, n), seed, capacity)
            .unwrap()
    }

    fn begin_gossip(&mut self, n: usize) {
        let identity = self.identity(n, self.now);
        let seed = scramble(self.scenario.seed ^ (n as u64) << 20 ^ u64::from(self.nodes[n].incarnation));
        let membership = Membership::new(Time(self.now), membership::Config::default(), identity, seed);
        let Some(gossip) = &mut self.gossip else { return };
        gossip.members[n] = Some(membership);
        gossip.synced[n] = false;
        self.publish(n);
        let incarnation = self.nodes[n].incarnation;
        self.after(0, Happening::Introduce { node: n, incarnation });
        self.after(ALONE_AFTER, Happening::Alone { node: n, incarnation });
    }

    pub(super) fn introduce(&mut self, n: usize, incarnation: u32) {
        if self.nodes[n].incarnation != incarnation || !self.nodes[n].up {
            return;
        }
        let mut reached: Vec<usize> =
            (0..self.nodes.len()).filter(|other| *other != n && self.path(n, *other) == Path::Open).collect();
        for _ in 0..INTRODUCED_TO.min(reached.len()) {
            let at = self.random.below(reached.len() as u64) as usize;
            let peer = self.identity_of(reached.swap_remove(at));
            if let Some(membership) = self.gossip.as_mut().and_then(|gossip| gossip.members[n].as_mut()) {
                membership.announce(Time(self.now), peer);
            }
        }
        self.drain_gossip(n);
        let company =
            self.gossip.as_ref().and_then(|g| g.members[n].as_ref()).is_some_and(Membership::has_company);
        let wait = if company { INTRODUCE } else { INTRODUCE_ALONE };
        self.after(wait, Happening::Introduce { node: n, incarnation });
    }

    /// Only its name and address are known to who introduces itself.
    fn identity_of(&self, n: usize) -> NodeIdentity {
        let full = self.identity(n, 0);
        NodeIdentity::new(full.name(), full.addr, 0, Zone::default(), false, 10).unwrap()
    }

    pub(super) fn found_nobody(&mut self, n: usize, incarnation: u32) {
        if self.nodes[n].incarnation == incarnation && self.nodes[n].up {
            if let Some(gossip) = &mut self.gossip {
                gossip.synced[n] = true;
            }
            self.publish(n);
        }
    }

    pub(super) fn packet(&mut self, from: usize, to: usize, bytes: &Bytes) {
        if self.path(from, to) != Path::Open {
            return;
        }
        let Some(membership) = self.gossip.as_mut().and_then(|gossip| gossip.members[to].as_mut()) else {
            return;
        };
        if let Err(error) = membership.handle_datagram(Time(self.now), node_id(from), bytes) {
            self.fail_run(&format!("node {to} refuses a packet of node {from}: {error}"));
        }
        self.drain_gossip(to);
    }

    pub(super) fn wake_gossip(&mut self, n: usize) {
        let Some(gossip) = &mut self.gossip else { return };
        if gossip.timers[n] != Some(self.now) {
            return;
        }
        gossip.timers[n] = None;
        if let Some(membership) =
            gossip.members[n].as_mut().filter(|_| self.nodes[n].up && !self.nodes[n].paused)
        {
            membership.handle_timeout(Time(self.now));
            self.drain_gossip(n);
        }
    }

    pub(super) fn drain_gossip(&mut self, n: usize) {
        let (mut changed, mut packets) = (false, Vec::new());
        let Some(membership) = self.gossip.as_mut().and_then(|gossip| gossip.members[n].as_mut()) else {
            return;
        };
        while let Some(action) = membership.poll_action() {
            match action {
                MembershipAction::Changed => changed = true,
                MembershipAction::Send { to, bytes } => packets.push((to.id(), bytes)),
            }
        }
        let due = membership.poll_timeout();
        let company = membership.has_company();
        for (to, bytes) in packets {
            let lost = self.scenario.loss > 0 && self.random.below(10_000) < u64::from(self.scenario.loss);
            if !lost {
                let to = self.ids[&to];
                let wait = self.scenario.latency + self.random.below(self.scenario.jitter + 1);
                self.after(wait, Happening::Packet { from: n, to, bytes });
            }
        }
        if let Some(gossip) = &mut self.gossip {
            gossip.synced[n] |= changed && company;
            if let Some(at) =
                due.map(|at| at.0.max(self.now)).filter(|at| gossip.timers[n].is_none_or(|t| *at < t))
            {
                gossip.timers[n] = Some(at);
                self.at(at, Happening::Gossip(n));
            }
        }
        if changed {
            self.publish(n);
        }
    }

    fn publish(&mut self, n: usize) {
        let Some(gossip) = &self.gossip else { return };
        let Some(membership) = &gossip.members[n] else { return };
        let book = PeerBook::new(membership.members(), gossip.synced[n]);
        self.event(n, Event::Members { members: book.members, synced: book.synced });
    }

    /// A restarted membership starts from nothing; a paused one finds its timers overdue.
    pub(super) fn resume_gossip(&mut self, n: usize) {
        if let Some(gossip) = &mut self.gossip {
            gossip.timers[n] = None;
        }
        self.drain_gossip(n);
    }

    pub(super) fn stop_gossip(&mut self, n: usize) {
        if let Some(gossip) = &mut self.gossip {
            gossip.members[n] = None;
            gossip.timers[n] = None;
        }
    }
}

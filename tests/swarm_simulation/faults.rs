//! Things that go wrong, and how the transport tells the machines of it.
//!
//! A process that is killed takes its connections with it, unnoticed until they break; a restarted one answers old
//! packets with a reset. A paused process and a partition keep connections for `IDLE`: what was sent meanwhile
//! arrives afterwards; later it is lost, and both sides hear of it.

use std::collections::BTreeSet;

use windlass::swarm::{Event, FlowFailure};

use super::scenario::{Fault, SECOND};
use super::transfers::Flow;
use super::world::{Happening, Node, Path, Progress, STORED, TAINTED, World, content_key, node_id};

/// `transport.idle_timeout_ms`.
const IDLE: u64 = 10 * SECOND;
/// A longer pause is noticed: what the engine looks at its clock for (`cache::clock`).
const OVERSLEPT: u64 = SECOND;

impl World {
    pub(super) fn fault(&mut self, index: usize) {
        let fault = self.scenario.faults[index].1.clone();
        if !matches!(fault, Fault::Evict { .. }) {
            self.ledger.disturb(self.now);
        }
        match fault {
            Fault::Crash(n) => self.crash(n),
            Fault::CrashHome => {
                let leases = |n: &usize| self.nodes[*n].swarm.stats().leases;
                if let Some(home) = (0..self.nodes.len()).filter(|n| self.nodes[*n].up).max_by_key(leases) {
                    self.crash(home);
                }
            }
            Fault::Restart { node, keep } => self.restart(node, keep),
            Fault::Pause(n) => self.pause(n),
            Fault::Resume(n) => self.resume(n),
            Fault::Partition(parts) => self.partition(parts),
            Fault::Heal => self.heal(),
            Fault::Throttle(percent) => self.throttle = percent,
            Fault::Break(percent) => self.break_percent = percent,
            Fault::Evict { node, blob } => self.evict(node, blob),
            Fault::Slow { node, percent } => self.nodes[node].speed = f64::from(percent) / 100.0,
        }
        self.note_out_of_reach();
    }

    pub(super) fn boot(&mut self, n: usize) {
        self.nodes[n].up = true;
        self.nodes[n].severed = false;
        self.nodes[n].booted = self.now;
        self.ledger.started(self.now);
        for blob in 0..self.scenario.blobs.len() {
            let have = self.stored(n, blob);
            if !have.is_empty() {
                let (content, layout) = (content_key(blob), self.layouts[blob]);
                self.event(n, Event::Stored { content, layout, have });
            }
        }
        self.meet(n);
    }

    fn crash(&mut self, n: usize) {
        if !self.nodes[n].up {
            return;
        }
        self.ledger.crashes += 1;
        let mine: Vec<usize> =
            (0..self.flows.len()).filter(|f| !self.flows[*f].over && self.flows[*f].to == n).collect();
        for flow in mine {
            self.end_flow(flow);
        }
        let node = &mut self.nodes[n];
        node.up = false;
        node.paused = false;
        node.severed = false;
        node.died = Some(self.now);
        node.incarnation += 1;
        let incarnation = node.incarnation;
        for g in 0..self.nodes[n].flags.len() {
            if self.nodes[n].flags[g] & STORED != 0 && !self.is_rotten(n, g) {
                self.ledger.lost(g);
            }
        }
        self.stop_gossip(n);
        self.plan_detection(n);
        self.after(self.scenario.break_after, Happening::Broken { node: n, incarnation });
        self.recount();
    }

    fn restart(&mut self, n: usize, keep: bool) {
        if self.nodes[n].up {
            return;
        }
        if !self.nodes[n].severed {
            self.sever(n);
        }
        let mut fresh = Node::new(&self.scenario, n, self.nodes[n].flags.len());
        let old = &self.nodes[n];
        fresh.incarnation = old.incarnation + 1;
        fresh.pauses = old.pauses + 1;
        fresh.speed = old.speed;
        fresh.swarm = Node::machine(&self.scenario, n, fresh.incarnation);
        let finished: Vec<_> = old.progress.iter().map(|p| (p.opened, p.finished)).collect();
        for (blob, (opened, finished)) in finished.into_iter().enumerate() {
            let chunks = self.chunks_of(blob);
            let mut progress = Progress { opened, finished, ..Progress::default() };
            for g in chunks.filter(|_| keep) {
                if self.nodes[n].flags[g] & STORED != 0 {
                    fresh.flags[g] = STORED;
                    fresh.received[g] = self.nodes[n].received[g];
                    progress.held += 1;
                }
            }
            fresh.progress[blob] = progress;
        }
        fresh.last_byte = self.now;
        self.nodes[n] = fresh;
        for g in 0..self.nodes[n].flags.len() {
            if self.nodes[n].flags[g] & STORED != 0 && !self.is_rotten(n, g) {
                self.ledger.gained(g);
            }
        }
        self.boot(n);
        for blob in 0..self.scenario.blobs.len() {
            let Progress { opened, finished, .. } = self.nodes[n].progress[blob];
            if opened.is_some() && finished.is_none() {
                self.open(n, blob);
            }
        }
        self.recount();
    }

    fn pause(&mut self, n: usize) {
        if !self.nodes[n].up || self.nodes[n].paused {
            return;
        }
        self.ledger.pauses += 1;
        self.nodes[n].paused = true;
        self.nodes[n].pauses += 1;
        self.nodes[n].paused_at = self.now;
        let pauses = self.nodes[n].pauses;
        self.after(IDLE, Happening::Stalled { node: n, pauses });
    }

    fn resume(&mut self, n: usize) {
        if !self.nodes[n].up || !self.nodes[n].paused {
            return;
        }
        let lost = self.nodes[n].severed;
        self.nodes[n].paused = false;
        self.nodes[n].severed = false;
        self.nodes[n].pauses += 1;
        self.nodes[n].timer = None;
        self.nodes[n].last_byte = self.now;
        self.wake_up(n);
        self.resume_gossip(n);
        self.drop_orphans(n);
        self.release();
        if lost {
            for other in (0..self.nodes.len()).filter(|other| *other != n) {
                self.lose(n, other);
            }
        }
        self.drain(n);
    }

    /// The engine looks at the clock: time in which nothing could arrive is left out of it.
    fn wake_up(&mut self, n: usize) {
        let slept = self.now - self.nodes[n].paused_at;
        if slept > OVERSLEPT {
            self.nodes[n].slept += slept;
            self.event(n, Event::Slept);
        }
    }

    /// Streams from a source that has died meanwhile: the new process knows nothing of them.
    fn drop_orphans(&mut self, n: usize) {
        let mut flows: Vec<usize> = self.nodes[n].flows.values().copied().collect();
        flows.sort_unstable();
        for flow in flows {
            let Flow { from, source, .. } = self.flows[flow];
            if from.is_some_and(|from| !self.nodes[from].up || self.nodes[from].incarnation != source) {
                self.fail(flow, FlowFailure::Broken);
            }
        }
    }

    fn partition(&mut self, parts: Vec<u8>) {
        let distinct: BTreeSet<u8> = parts.iter().copied().collect();
        self.ledger.partitions += distinct.len() as u32 - 1;
        self.parts = Some(parts);
        self.partitions += 1;
        self.parts_severed = false;
        self.after(IDLE, Happening::Severed { partitions: self.partitions });
    }

    fn heal(&mut self) {
        self.parts = None;
        self.partitions += 1;
        self.parts_severed = false;
        self.ledger.started(self.now);
        self.release();
    }

    fn evict(&mut self, n: usize, blob: usize) {
        let reading =
            self.nodes[n].progress[blob].opened.is_some() && self.nodes[n].progress[blob].finished.is_none();
        if !self.nodes[n].up || reading || self.nodes[n].progress[blob].held == 0 {
            return;
        }
        for g in self.chunks_of(blob) {
            if self.nodes[n].flags[g] & STORED != 0 {
                if !self.is_rotten(n, g) {
                    self.ledger.lost(g);
                }
                self.nodes[n].flags[g] &= !(STORED | TAINTED);
                self.nodes[n].received[g] = 0;
                self.cut_followers(n, g);
            }
        }
        self.nodes[n].progress[blob].held = 0;
        self.event(n, Event::Evicted { content: content_key(blob) });
    }

    pub(super) fn broken(&mut self, n: usize, incarnation: u32) {
        if self.nodes[n].incarnation == incarnation && !self.nodes[n].up {
            self.sever(n);
        }
    }

    pub(super) fn stalled(&mut self, n: usize, pauses: u32) {
        if self.nodes[n].pauses == pauses && self.nodes[n].paused {
            self.sever(n);
        }
    }

    /// The others lose `n`. What they sent to it waits in its socket, and is the first that it reads should it run on.
    fn sever(&mut self, n: usize) {
        self.nodes[n].severed = true;
        let process_lives = self.nodes[n].up;
        self.held.retain(|happening| match happening {
            Happening::Deliver { from, to, .. } => *from != n && (*to != n || process_lives),
            _ => true,
        });
        for at in (0..self.nodes.len()).filter(|at| *at != n) {
            self.lose(at, n);
        }
    }

    pub(super) fn sever_parts(&mut self, partitions: u32) {
        if self.partitions != partitions {
            return;
        }
        self.parts_severed = true;
        let Some(parts) = self.parts.clone() else { return };
        self.held.retain(|happening| match happening {
            Happening::Deliver { from, to, .. } => parts[*from] == parts[*to],
            _ => true,
        });
        for at in 0..self.nodes.len() {
            for who in (0..self.nodes.len()).filter(|who| parts[*who] != parts[at]) {
                self.lose(at, who);
            }
        }
    }

    /// The connection from `at` to `who` breaks: streams fail, and the machine hears of it.
    fn lose(&mut self, at: usize, who: usize) {
        if !self.nodes[at].up || self.nodes[at].paused {
            return;
        }
        let broken = |flow: &Flow| !flow.over && flow.to == at && flow.from == Some(who);
        let mut flows: Vec<usize> =
            self.nodes[at].flows.values().copied().filter(|f| broken(&self.flows[*f])).collect();
        flows.sort_unstable();
        for flow in flows {
            self.fail(flow, FlowFailure::Broken);
        }
        self.event(at, Event::PeerLost(node_id(who)));
    }

    /// What waited arrives.
    fn release(&mut self) {
        for happening in std::mem::take(&mut self.held) {
            if let Happening::Request { flow } = happening
                && let Flow { to, from: Some(from), .. } = self.flows[flow]
                && self.path(to, from) == Path::Waiting
            {
                self.held.push(Happening::Request { flow });
                continue;
            }
            self.after(self.scenario.latency, happening);
        }
    }
}

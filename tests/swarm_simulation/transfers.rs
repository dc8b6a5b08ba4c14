//! A chunk's way from a source to a node: asked for, admitted, moved step by step, checked, stored.

use windlass::content::{Attestation, ChunkDigest, ChunkIndex, ContentKey, StripeIndex};
use windlass::swarm::{Admission, Claim, Event, FlowFailure, FlowId, Time};

use super::links::{Demand, ORIGIN};
use super::scenario::{SECOND, scramble};
use super::world::{FETCHING, Happening, Path, STORED, TAINTED, World, content_key, node_id};

/// How often a transfer's bytes are told to the machine, which asks for at least every 100 ms.
const REPORT: u64 = SECOND / 20;
/// Dialling a node that is known not to answer fails after this: the transport remembers.
const REFUSED_AFTER: u64 = SECOND;

pub(super) struct Flow {
    pub(super) id: FlowId,
    pub(super) to: usize,
    /// `None` is the origin.
    pub(super) from: Option<usize>,
    /// Which run of the source's daemon serves it.
    pub(super) source: u32,
    pub(super) blob: usize,
    /// The chunk, counted over all contents.
    pub(super) g: usize,
    pub(super) admitted: bool,
    pub(super) over: bool,
    reported: (u32, u64),
    /// What the source says, with the first byte, that it has too.
    also: Vec<(StripeIndex, u64)>,
}

impl World {
    pub(super) fn fetch_from_peer(
        &mut self,
        to: usize,
        from: usize,
        id: FlowId,
        key: ContentKey,
        chunk: ChunkIndex,
    ) {
        let flow = self.start(to, Some(from), id, key, chunk);
        self.after(self.scenario.latency, Happening::Request { flow });
    }

    pub(super) fn fetch_from_origin(
        &mut self,
        to: usize,
        id: FlowId,
        key: ContentKey,
        chunk: ChunkIndex,
        claim: Claim,
    ) {
        let flow = self.start(to, None, id, key, chunk);
        let first_byte = self.scenario.origin_first_byte;
        let wait = first_byte + self.random.below(2 * first_byte + 1);
        let refusal = if self.random.chance(u64::from(self.throttle)) {
            Some(FlowFailure::OriginThrottled)
        } else if self.random.chance(u64::from(self.break_percent)) {
            Some(FlowFailure::OriginFailed)
        } else {
            None
        };
        match refusal {
            Some(reason) => self.after(wait, Happening::Fail { flow, reason }),
            None => {
                self.note_fetch(flow, claim);
                self.after(wait, Happening::Begin { flow });
            }
        }
    }

    fn start(
        &mut self,
        to: usize,
        from: Option<usize>,
        id: FlowId,
        key: ContentKey,
        chunk: ChunkIndex,
    ) -> usize {
        let mut head = [0; 8];
        head.copy_from_slice(&key.0[..8]);
        let blob = u64::from_le_bytes(head) as usize;
        let g = self.first[blob] + chunk.0 as usize;
        let index = self.flows.len();
        let reported = (0, self.now);
        let source = from.map_or(0, |from| self.nodes[from].incarnation);
        self.flows.push(Flow {
            id,
            to,
            from,
            source,
            blob,
            g,
            admitted: false,
            over: false,
            reported,
            also: Vec::new(),
        });
        self.nodes[to].flows.insert(id, index);
        if self.nodes[to].flags[g] & FETCHING != 0 {
            self.fail_run(&format!("two transfers of chunk {g} at node {to}"));
        }
        self.nodes[to].flags[g] |= FETCHING;
        index
    }

    pub(super) fn request(&mut self, flow: usize) {
        let Flow { to, from: Some(from), blob, g, over: false, .. } = self.flows[flow] else { return };
        match self.path(to, from) {
            Path::Open => {}
            Path::Waiting => {
                self.held.push(Happening::Request { flow });
                return;
            }
            Path::Silent => return,
            Path::Gone => {
                self.after(REFUSED_AFTER, Happening::Fail { flow, reason: FlowFailure::Broken });
                return;
            }
        }
        let chunk = ChunkIndex((g - self.first[blob]) as u32);
        let now = self.clock(from);
        let verdict = self.nodes[from].swarm.upload_requested(now, node_id(to), content_key(blob), chunk);
        let latency = self.scenario.latency;
        match verdict {
            Admission::Serve { also } => {
                self.flows[flow].admitted = true;
                self.flows[flow].also = also;
                self.after(latency, Happening::Begin { flow });
            }
            Admission::Busy => self.after(latency, Happening::Fail { flow, reason: FlowFailure::Busy }),
            Admission::NotFound => {
                self.after(latency, Happening::Fail { flow, reason: FlowFailure::NotFound })
            }
        }
    }

    pub(super) fn begin(&mut self, flow: usize) {
        let Flow { id, to, over: false, .. } = self.flows[flow] else { return };
        let also = std::mem::take(&mut self.flows[flow].also);
        if !also.is_empty() {
            self.event(to, Event::SourceHolds { flow: id, also });
        }
        self.moving.push(flow);
    }

    pub(super) fn fail(&mut self, flow: usize, reason: FlowFailure) {
        let Flow { id, to, g, over: false, .. } = self.flows[flow] else { return };
        if self.nodes[to].paused {
            self.held.push(Happening::Fail { flow, reason });
            return;
        }
        if reason == FlowFailure::Corrupt {
            self.nodes[to].received[g] = 0;
            self.nodes[to].flags[g] &= !TAINTED;
        }
        self.end_flow(flow);
        let received = self.nodes[to].received[g];
        self.event(to, Event::FlowFailed { flow: id, received, reason });
    }

    /// The transfer is over; its bytes stay.
    pub(super) fn end_flow(&mut self, flow: usize) {
        let Flow { id, to, from, g, admitted, .. } = self.flows[flow];
        self.flows[flow].over = true;
        self.nodes[to].flows.remove(&id);
        self.nodes[to].flags[g] &= !FETCHING;
        match from {
            Some(from) if admitted && self.nodes[from].up => {
                let now = self.clock(from);
                self.nodes[from].swarm.upload_ended(now);
                self.drain(from);
            }
            Some(_) => {}
            None => self.ledger.fetch_ended(g, to),
        }
    }

    /// Moves the bytes of one step; `false` when none could.
    pub(super) fn step(&mut self) -> bool {
        let (flows, mut demands) = (&self.flows, std::mem::take(&mut self.demands));
        self.moving.retain(|flow| !flows[*flow].over);
        demands.clear();
        for flow in &self.moving {
            let need = self.available(*flow);
            if need > 0 {
                let Flow { from, to, .. } = self.flows[*flow];
                let from = from.map_or(ORIGIN, |from| from as u32);
                demands.push(Demand {
                    flow: *flow as u32,
                    from,
                    to: to as u32,
                    need: f64::from(need),
                    moved: 0.0,
                });
            }
        }
        let bytes = |gbps: f64| gbps * 1e9 / 8.0 * self.scenario.step as f64 / 1e6;
        let link = bytes(self.scenario.link_gbps);
        let nodes = &self.nodes;
        self.links.share(
            &mut demands,
            |n| link * nodes[n].speed,
            nodes.len(),
            bytes(self.scenario.origin_node_gbps),
            bytes(self.scenario.origin_total_gbps),
        );
        let moved = !demands.is_empty();
        self.book(&demands);
        self.demands = demands;
        moved
    }

    /// Bytes that the source has, the destination lacks, and nothing keeps from moving.
    fn available(&self, flow: usize) -> u32 {
        let Flow { to, from, blob, g, .. } = self.flows[flow];
        let here = self.nodes[to].received[g];
        let there = match from {
            None if self.nodes[to].paused => 0,
            None => self.scenario.blobs[blob].chunk_bytes,
            Some(from) if self.path(from, to) == Path::Open && self.nodes[from].up => {
                self.nodes[from].received[g]
            }
            Some(_) => 0,
        };
        there.saturating_sub(here)
    }

    fn book(&mut self, demands: &[Demand]) {
        let mut reports = Vec::new();
        for demand in demands {
            let flow = demand.flow as usize;
            let Flow { to, from, blob, g, reported, .. } = self.flows[flow];
            let bytes = demand.moved.round() as u32;
            let len = self.scenario.blobs[blob].chunk_bytes;
            if let Some(from) = from {
                self.outcome.sent[from] += f64::from(bytes);
                let zones = self.scenario.zones;
                if from % zones != to % zones {
                    self.outcome.cross_zone += f64::from(bytes);
                }
                if self.nodes[from].flags[g] & TAINTED != 0 || self.is_rotten(from, g) {
                    self.nodes[to].flags[g] |= TAINTED;
                }
            } else {
                self.origin_bytes += f64::from(bytes);
            }
            self.outcome.moved += f64::from(bytes);
            let node = &mut self.nodes[to];
            node.received[g] = (node.received[g] + bytes).min(len);
            node.last_byte = self.now;
            let here = node.received[g];
            // Seven eighths free the room for the next chunk.
            let nearly = |bytes: u32| bytes >= len / 8 * 7;
            let due = nearly(here) && !nearly(reported.0) || self.now - reported.1 >= REPORT;
            if here == len || (due && here > reported.0) {
                self.flows[flow].reported = (here, self.now);
                reports.push((flow, here));
            }
        }
        for (flow, received) in reports {
            let Flow { id, to, blob, over: false, .. } = self.flows[flow] else { continue };
            if received < self.scenario.blobs[blob].chunk_bytes {
                self.event(to, Event::FlowProgress { flow: id, received });
            } else {
                self.arrived(flow);
            }
        }
    }

    /// Every byte is here: the engine checks the chunk before it keeps it.
    fn arrived(&mut self, flow: usize) {
        let Flow { id, to, blob, g, .. } = self.flows[flow];
        if self.nodes[to].flags[g] & TAINTED != 0 {
            self.fail(flow, FlowFailure::Corrupt);
            self.cut_followers(to, g);
            return;
        }
        self.end_flow(flow);
        let chunk = (g - self.first[blob]) as u32;
        self.nodes[to].flags[g] |= STORED;
        self.nodes[to].progress[blob].held += 1;
        if !self.is_rotten(to, g) {
            self.ledger.gained(g);
        }
        let attestation = Attestation { digest: ChunkDigest([g as u8; 32]), attester: node_id(to) };
        self.event(to, Event::FlowDone { flow: id, attestation, kept: true });
        let (held, chunks) = (self.nodes[to].progress[blob].held, self.scenario.blobs[blob].chunks);
        if held == chunks {
            self.finished(to, blob);
        } else if self.nodes[to].progress[blob].cursor == chunk {
            self.read_on(to, blob);
        }
        if held == chunks.div_ceil(2) {
            self.outcome.prefixes.push(f64::from(self.nodes[to].progress[blob].cursor) / f64::from(chunks));
        }
    }

    /// The node's disk damaged this chunk after it was checked.
    pub(super) fn is_rotten(&self, n: usize, g: usize) -> bool {
        let percent = self.scenario.corrupt[n];
        let stored = self.nodes[n].flags[g] & STORED != 0;
        percent > 0 && stored && scramble((n as u64) << 32 | g as u64) % 100 < u64::from(percent)
    }

    /// Whoever follows a chunk that turned out wrong is cut off.
    pub(super) fn cut_followers(&mut self, n: usize, g: usize) {
        let followers = |flow: &Flow| !flow.over && flow.from == Some(n) && flow.g == g && flow.admitted;
        let flows: Vec<usize> = (0..self.flows.len()).filter(|flow| followers(&self.flows[*flow])).collect();
        for flow in flows {
            self.after(self.scenario.latency, Happening::Fail { flow, reason: FlowFailure::Broken });
        }
    }
}

//! Every wait ends: stalled flows are moved, and when no home and no peer helps, the origin is asked without a lease.

use std::time::Duration;

use super::Requester;
use super::flows::From;
use super::wants::bit_of;
use crate::content::{ChunkIndex, ContentKey, StripeIndex};
use crate::swarm::core::{Core, millis};
use crate::swarm::event::{Claim, FlowId};
use crate::swarm::view::StripeKey;
use crate::wire::{LEASE_ARRIVED, LeaseProgress, Leases, Message};

/// A disk that has not taken a chunk after this long is broken, not slow.
const STORE_PATIENCE: Duration = Duration::from_secs(30);
/// A node that received nothing at all for this long is not busy but stuck.
const NODE_MOVES: Duration = Duration::from_secs(1);
/// How often an open content is looked after: a fraction of its shortest deadline.
pub(super) const WATCH_INTERVAL: Duration = Duration::from_millis(100);
/// A home that answered within this time is on it: twice the time after which a waiting requester repeats itself.
const VOUCHED_FOR: Duration = Duration::from_secs(1);
/// Origin flows without a lease at a time in one content, one more for each second without progress. Few: when the
/// whole cluster is lost to each of its nodes, the origin meets them all.
const MAX_LAST_RESORTS: u64 = 4;
/// Whoever gave a source up has this long to hear of another before it runs to the origin: many give one up in the same
/// moment, and their home may know of whole copies.
const ASKING_ANEW: Duration = Duration::from_secs(1);
/// A whole copy slower than the median flow by this factor is exchanged for another.
const SLOW_FACTOR: u64 = 4;
/// Fewer flows than this have no median worth the name.
const MIN_MEDIAN_OF: usize = 4;

impl Requester {
    pub(super) fn watch(&mut self, core: &mut Core, key: ContentKey) {
        self.credit_own_delays(core, key);
        self.report_leases(core, key);
        for flow in self.hopeless(core, key) {
            self.give_up(core, flow);
        }
        self.fall_back(core, key);
        self.fill_room(core);
        self.refresh(core, key);
    }

    /// What waits for this node itself is progress, for no other source would be faster: chunks that wait for the
    /// disk, and assignments that wait for room while other contents fill it.
    fn credit_own_delays(&mut self, core: &Core, key: ContentKey) {
        let node_moves = core.now.since(self.progressed) < NODE_MOVES;
        let Some(content) = self.contents.get_mut(&key) else { return };
        let mut flows = content.flights.values().filter_map(|flight| self.flows.get(&flight.flow));
        let stores = flows.any(|flow| flow.has_arrived() && core.now.since(flow.grew) < STORE_PATIENCE);
        if stores || (node_moves && !content.queued.is_empty()) {
            content.progressed = core.now;
        }
        if let Some((head, since)) = &mut content.head
            && node_moves
            && content.queued.contains_key(head)
        {
            *since = core.now;
        }
    }

    /// Tells homes how far running leases are, so that they are not taken for stalled.
    fn report_leases(&mut self, core: &mut Core, key: ContentKey) {
        let Some(content) = self.contents.get_mut(&key) else { return };
        if core.now.since(content.reported) < millis(core.config.progress_interval_ms) {
            return;
        }
        content.reported = core.now;
        let mut stripes = std::collections::BTreeMap::<StripeIndex, Vec<LeaseProgress>>::new();
        for (chunk, flight) in content.flights.iter().filter(|(_, flight)| flight.from_origin) {
            let Some(flow) = self.flows.get(&flight.flow) else { continue };
            if core.now.since(flow.started) >= millis(core.config.progress_interval_ms) {
                let received = if flow.has_arrived() { LEASE_ARRIVED } else { flow.received };
                let progress = LeaseProgress { bit: bit_of(*chunk), received };
                stripes.entry(chunk.stripe()).or_default().push(progress);
            }
        }
        for (stripe, progress) in stripes {
            let home = content.asking.get(&stripe).and_then(super::content::Asking::current_home);
            let home = home.unwrap_or_else(|| core.view.home(StripeKey { content: key, stripe }));
            core.send(home, Message::Leases(Leases { content: key, stripe, progress }));
        }
    }

    /// Flows from peers that stand still, or crawl although they come from a whole copy.
    fn hopeless(&self, core: &Core, key: ContentKey) -> Vec<FlowId> {
        let Some(content) = self.contents.get(&key) else { return Vec::new() };
        let flows =
            || content.flights.values().filter_map(|f| self.flows.get(&f.flow).map(|flow| (f.flow, flow)));
        let rate = |flow: &super::flows::Flow| {
            let age = core.now.since(flow.started);
            let bytes = u64::from(flow.received - flow.offset);
            (age >= millis(core.config.lease_slow_ms))
                .then(|| bytes * 1_000 / u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
        };
        let mut rates: Vec<u64> = flows()
            .filter(|(_, f)| matches!(f.from, From::Peer { .. }))
            .filter_map(|(_, f)| rate(f))
            .collect();
        let middle = rates.len() / 2;
        let median = (rates.len() >= MIN_MEDIAN_OF).then(|| *rates.select_nth_unstable(middle).1);
        let stall = millis(core.config.flow_stall_ms);
        flows()
            .filter(|(_, flow)| !flow.has_arrived())
            .filter(|(_, flow)| {
                let From::Peer { source, .. } = &flow.from else { return false };
                // One that is itself receiving needs time to find another source first. If it never sent a byte, two
                // homes that did not know of each other may have closed a circle, in which nobody ever will.
                let patience = if source.complete || !flow.has_begun() { stall } else { stall * 2 };
                let crawls = source.complete
                    && matches!((rate(flow), median), (Some(rate), Some(median)) if rate * SLOW_FACTOR < median);
                core.now.since(flow.grew) >= patience || crawls
            })
            .map(|(id, _)| id)
            .collect()
    }

    fn fall_back(&mut self, core: &mut Core, key: ContentKey) {
        let Some(content) = self.contents.get(&key) else { return };
        let asks_anew = content.given_up.is_some_and(|at| core.now.since(at) < ASKING_ANEW);
        if !content.is_hungry() || core.now < content.origin_after || asks_anew {
            return;
        }
        let patience = |ms: u64| millis(ms) * content.patience_percent / 100;
        let idle = core.now.since(content.progressed);
        let vouched = core.now.since(content.vouched) < VOUCHED_FOR;
        let limit =
            patience(if vouched { core.config.hard_fallback_ms } else { core.config.origin_fallback_ms });
        let running = self.last_resorts(key);
        let chunk = if idle >= limit {
            let due = 1 + (idle - limit).as_secs();
            (running < due.min(MAX_LAST_RESORTS)).then(|| self.first_grounded(core, key)).flatten()
        } else {
            let (head, since) = content.head.unwrap_or((ChunkIndex(0), core.now));
            let stuck = core.now.since(since) >= patience(core.config.hard_fallback_ms);
            let grounded = content.is_wanted(head) && !content.flights.contains_key(&head);
            (stuck && grounded && running == 0).then_some(head)
        };
        if let Some(chunk) = chunk {
            if let Some(content) = self.contents.get_mut(&key) {
                content.queued.remove(&chunk);
            }
            self.start(core, key, chunk, From::Origin(Claim::LastResort));
        }
    }

    fn last_resorts(&self, key: ContentKey) -> u64 {
        let Some(content) = self.contents.get(&key) else { return 0 };
        let flows = content.flights.values().filter_map(|flight| self.flows.get(&flight.flow));
        flows.filter(|flow| matches!(flow.from, From::Origin(Claim::LastResort))).count() as u64
    }

    /// The most important missing chunk that is not in the air.
    fn first_grounded(&self, core: &Core, key: ContentKey) -> Option<ChunkIndex> {
        let content = self.contents.get(&key)?;
        let chunks =
            content.windows(core.config.window(content.crowd)).into_iter().flat_map(|(stripe, window)| {
                crate::swarm::home::bits(window.want).map(move |bit| stripe.chunk(u32::from(bit)))
            });
        chunks.into_iter().find(|chunk| !content.flights.contains_key(chunk))
    }
}

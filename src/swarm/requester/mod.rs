//! The node as a requester: what it holds, wants and receives.
//!
//! Invariants: at most one flow per chunk; bytes in the air stay within the configured bound, except that leases that
//! were asked for are started whatever else is in the air; every wait has a deadline, and behind the last stands the
//! origin.

mod announce;
mod content;
mod deadlines;
mod flows;
mod wants;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use self::announce::Announcer;
use self::content::{Content, Status, Window};
use self::flows::Flow;
use super::core::Core;
use super::event::{Action, FlowId};
use super::stats::Stats;
use super::time::Time;
use super::timers::Timer;
use super::view::{Change, StripeKey};
use crate::content::{ChunkIndex, ChunkSet, ContentKey, Layout, NodeId, StripeIndex};
use crate::wire::{MAX_ALSO_STRIPES, Redirect, TableRow};

/// A node's patience with the last deadlines lies in this range, in percent of the configured one.
const PATIENCE_PERCENT: RangeInclusive<usize> = 100..=150;
/// Redirects followed before this node waits for the views to agree.
const MAX_HOPS: u8 = 4;

#[derive(Debug, Default)]
pub(crate) struct Requester {
    contents: BTreeMap<ContentKey, Content>,
    /// Those that are read, so that nothing walks over the thousands that are only stored.
    open: BTreeSet<ContentKey>,
    flows: BTreeMap<FlowId, Flow>,
    next_flow: u64,
    inflight_bytes: u64,
    origin_flows: u32,
    per_peer: BTreeMap<NodeId, u32>,
    /// Last time a byte of any content came.
    progressed: Time,
    announcer: Announcer,
}

impl Requester {
    pub(crate) fn on_stored(&mut self, core: &mut Core, key: ContentKey, layout: Layout, have: ChunkSet) {
        let content = self.contents.entry(key).or_insert_with(|| Content::new(layout, ChunkSet::new()));
        content.have = have;
        let stripes: Vec<_> = content.stripes().filter(|stripe| content.have.stripe(*stripe) != 0).collect();
        for stripe in stripes {
            self.announcer.announce(core, StripeKey { content: key, stripe });
        }
        self.refresh(core, key);
    }

    pub(crate) fn on_dropped(&mut self, core: &mut Core, key: ContentKey, chunks: &ChunkSet) {
        let Some(content) = self.contents.get_mut(&key) else { return };
        for chunk in chunks.iter() {
            if content.have.remove(chunk) && !content.asking.contains_key(&chunk.stripe()) {
                self.announcer.announce(core, StripeKey { content: key, stripe: chunk.stripe() });
            }
        }
        self.refresh(core, key);
    }

    pub(crate) fn on_evicted(&mut self, core: &mut Core, key: ContentKey) {
        let Some(content) = self.contents.get_mut(&key) else { return };
        for stripe in content.stripes() {
            if content.have.stripe(stripe) != 0 {
                self.announcer.announce(core, StripeKey { content: key, stripe });
            }
        }
        content.have = ChunkSet::new();
        if content.open || !content.flights.is_empty() {
            self.refresh(core, key);
        } else {
            self.contents.remove(&key);
        }
    }

    pub(crate) fn on_open(&mut self, core: &mut Core, key: ContentKey, layout: Layout, have: ChunkSet) {
        let content = self.contents.entry(key).or_insert_with(|| Content::new(layout, ChunkSet::new()));
        content.have = have;
        if !content.open {
            content.open = true;
            self.open.insert(key);
            content.progressed = core.now;
            let spread = PATIENCE_PERCENT.end() - PATIENCE_PERCENT.start();
            let percent = PATIENCE_PERCENT.start() + core.rng.below(spread);
            content.patience_percent = u32::try_from(percent).unwrap_or(100);
        }
    }

    pub(crate) fn on_demand(
        &mut self,
        core: &mut Core,
        key: ContentKey,
        wanted: ChunkSet,
        cursors: Vec<ChunkIndex>,
    ) {
        let Some(content) = self.contents.get_mut(&key).filter(|content| content.open) else { return };
        if !content.is_hungry() {
            content.progressed = core.now;
        }
        content.wanted = wanted;
        content.cursors = cursors;
        self.drop_unwanted(core, key);
        self.fill_room(core);
        self.refresh(core, key);
    }

    pub(crate) fn on_close(&mut self, core: &mut Core, key: ContentKey) {
        let Some(content) = self.contents.get_mut(&key) else { return };
        content.open = false;
        self.open.remove(&key);
        content.wanted = ChunkSet::new();
        content.cursors.clear();
        content.head = None;
        self.drop_unwanted(core, key);
        self.fill_room(core);
        self.refresh(core, key);
    }

    pub(crate) fn on_redirect(&mut self, core: &mut Core, redirect: Redirect) {
        let key = StripeKey { content: redirect.content, stripe: redirect.stripe };
        let asking =
            self.contents.get_mut(&key.content).and_then(|content| content.asking.get_mut(&key.stripe));
        if core.view.member(redirect.home).is_none() {
            // Membership will tell of it soon: asked again then, or with the next repetition.
            core.stats.messages_ignored += 1;
            asking.into_iter().for_each(|asking| asking.deadline = None);
            return;
        }
        let Some(asking) = asking else {
            self.announcer.redirect(core, key, redirect.home);
            return;
        };
        asking.hops = asking.hops.saturating_add(1);
        if asking.hops > MAX_HOPS {
            // The views disagree: the next want goes out when its answer is overdue.
            return;
        }
        core.view.heard_from(redirect.home);
        asking.move_to(redirect.home, core.view.epoch());
        self.refresh(core, key.content);
    }

    pub(crate) fn on_view_change(&mut self, core: &mut Core, change: &Change) {
        let keys: Vec<_> = self.contents.keys().copied().collect();
        for key in keys {
            self.refresh(core, key);
        }
        let contents = &self.contents;
        let asked = |key: &StripeKey| {
            contents.get(&key.content).is_some_and(|content| content.asking.contains_key(&key.stripe))
        };
        self.announcer.on_view_change(core, change, asked);
    }

    /// A home may be passed over now.
    pub(crate) fn on_peer_lost(&mut self, core: &mut Core) {
        let keys: Vec<_> = self.contents.keys().copied().collect();
        for key in keys {
            self.refresh(core, key);
        }
    }

    pub(crate) fn on_timer(&mut self, core: &mut Core, timer: Timer) {
        match timer {
            Timer::Want(key) => self.refresh(core, key.content),
            Timer::Content(key) => self.watch(core, key),
            Timer::Announce => {
                let contents = &self.contents;
                self.announcer.send(core, |key| {
                    contents.get(&key.content).map_or(0, |content| content.have.stripe(key.stripe))
                });
            }
            Timer::Stripe(_) => {}
        }
    }

    /// Whether nothing is read here.
    pub(crate) fn is_idle(&self) -> bool {
        self.open.is_empty()
    }

    /// Whether the chunk can be served, whole or as it arrives.
    pub(crate) fn can_serve(&self, key: ContentKey, chunk: ChunkIndex) -> bool {
        self.contents
            .get(&key)
            .is_some_and(|content| content.have.contains(chunk) || content.flights.contains_key(&chunk))
    }

    /// What a peer that is sent this chunk may take besides, without asking a home: chunks held here of the stripes that a
    /// window touches. Nothing of a content that is not being read here: of that each chunk should leave once.
    pub(crate) fn holds_around(&self, key: ContentKey, chunk: ChunkIndex) -> Vec<(StripeIndex, u64)> {
        let Some(content) = self.contents.get(&key).filter(|content| content.is_hungry()) else {
            return Vec::new();
        };
        let first = chunk.stripe().0.saturating_sub(1);
        let stripes = (first..content.layout.stripe_count()).map(StripeIndex).take(MAX_ALSO_STRIPES);
        stripes.map(|stripe| (stripe, content.have.stripe(stripe))).filter(|(_, have)| *have != 0).collect()
    }

    /// Whether a chunk that cannot be served is on its way here; if so its home hears when it has begun.
    pub(crate) fn asked_too_early(&mut self, key: ContentKey, chunk: ChunkIndex) -> bool {
        let content = self.contents.get_mut(&key).filter(|content| content.is_wanted(chunk));
        let asking = content.and_then(|content| content.asking.get_mut(&chunk.stripe()));
        let Some(asking) = asking else { return false };
        asking.early |= 1 << chunk.bit();
        true
    }

    /// What this node holds and fetches of a stripe, as a home's table has it.
    pub(crate) fn row(&self, me: NodeId, key: ContentKey, stripe: StripeIndex) -> TableRow {
        let status = self.contents.get(&key).map(|content| content.status(stripe, Window::default()));
        let Status { have, pulling, leased, .. } = status.unwrap_or_default();
        TableRow { node: me, have, pulling, leased }
    }

    /// Gauges into the statistics.
    pub(crate) fn count(&self, stats: &mut Stats) {
        stats.contents = self.contents.len() as u64;
        stats.flows = self.flows.len() as u64;
        stats.inflight_bytes = self.inflight_bytes;
        stats.queued_assignments = self.contents.values().map(|content| content.queued.len() as u64).sum();
        stats.announcements_pending = self.announcer.pending() as u64;
    }

    fn opened(&self) -> impl Iterator<Item = (ContentKey, &Content)> {
        self.open.iter().filter_map(|key| self.contents.get(key).map(|content| (*key, content)))
    }

    /// Cancels pulls, and forgets assignments, of chunks that nobody here wants any longer.
    fn drop_unwanted(&mut self, core: &mut Core, key: ContentKey) {
        let Some(content) = self.contents.get_mut(&key) else { return };
        let unwanted: Vec<FlowId> = content
            .flights
            .iter()
            .filter(|(chunk, flight)| !flight.from_origin && !content.is_wanted(**chunk))
            .map(|(_, flight)| flight.flow)
            .collect();
        let queued = std::mem::take(&mut content.queued);
        content.queued = queued.into_iter().filter(|(chunk, _)| content.is_wanted(*chunk)).collect();
        for flow in unwanted {
            self.remove_flow(flow);
            core.act(Action::Cancel { flow });
        }
    }

    /// A closed content whose last flow has ended: its homes know what it holds, nothing else is left to remember.
    fn put_away(&mut self, core: &mut Core, key: ContentKey) {
        let Some(content) = self.contents.get_mut(&key) else { return };
        core.timers.cancel(Timer::Content(key));
        for (stripe, asking) in std::mem::take(&mut content.asking) {
            let key = StripeKey { content: key, stripe };
            core.timers.cancel(Timer::Want(key));
            if let Some(home) = asking.current_home() {
                self.announcer.is_known_to(key, home);
            }
        }
        content.received.clear();
        if content.have.is_empty() {
            self.contents.remove(&key);
        }
    }
}

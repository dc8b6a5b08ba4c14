//! The node as a home: keeps the claims of the stripes it wins, and tells requesters where to get their chunks.
//!
//! Invariants: a chunk has at most one lease in a table; nothing is leased before the nodes that may have been home
//! before were asked and had their time to answer; all of it can be rebuilt from the requesters' wants.

mod assign;
mod budget;
mod by_bit;
mod handover;
mod leases;
mod stripe;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

pub(crate) use self::assign::scaled;
use self::assign::{Assigned, Grants, assign};
use self::budget::Budget;
use self::handover::{Promise, Recovery};
pub(crate) use self::stripe::bits;
use self::stripe::{RowId, Stripe};
use super::core::{Core, millis};
use super::time::Time;
use super::timers::Timer;
use super::view::{StripeKey, View};
use crate::content::{ContentKey, NodeId, StripeIndex};
use crate::wire::{Announce, Answer, Assignment, Failure, LeaseEnd, Message, Redirect, Trouble, Want};

/// How often a stripe with leases is looked after: half of the shortest lease deadline.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);
/// How often all rows of a table are looked through.
const COMB_INTERVAL: Duration = Duration::from_secs(1);
/// An answer that a node has not confirmed for this long is lost. Longer than a node may be late: what was leased in it
/// is leased again. Where messages are lost, the next answer tells, long before.
const ANSWER_LIFETIME: Duration = Duration::from_secs(3);
/// A message is not overtaken by one that came so much earlier: many round trips, and less than any repetition takes.
const REORDERED: Duration = Duration::from_millis(100);
/// A source that was busy or broken is not offered again for this long: several chunk times of a fast node.
const SOUR: Duration = Duration::from_millis(50);
/// Doublings of that for a source found broken again and again without speaking itself: up to 12.8 s, by when
/// membership knows whether it is dead.
const MAX_SOUR_DOUBLINGS: u32 = 8;

/// A stripe this node is home of.
#[derive(Debug)]
struct Known {
    stripe: Stripe,
    recovery: Recovery,
    /// Since when somebody wants something.
    opened: Time,
    served: Time,
    used: Time,
    /// Who is home of it by the view of that epoch.
    home: (u64, NodeId),
    /// When pulls that nobody speaks of any more were last looked for.
    combed: Time,
    /// Who asked to be home and was told that this node is, and when.
    refused: BTreeMap<NodeId, Time>,
}

#[derive(Debug, Default)]
pub(crate) struct Home {
    stripes: BTreeMap<StripeKey, Known>,
    budgets: BTreeMap<ContentKey, Budget>,
    promises: BTreeMap<StripeKey, Promise>,
}

impl Home {
    pub(crate) fn on_want(&mut self, core: &mut Core, from: NodeId, want: Want) {
        let key = StripeKey { content: want.content, stripe: want.stripe };
        let home = self.answering_home(core, key, &want.suspects);
        let home = if home == core.me { self.left_to(core, key, from).unwrap_or(home) } else { home };
        if home != core.me {
            core.stats.redirects += 1;
            core.send(from, Message::Redirect(Redirect { content: key.content, stripe: key.stripe, home }));
            return;
        }
        self.make_known(core, key);
        self.begin_recovery(core, key, &want.suspects);
        self.take_in(core, key, from, &want);
        self.answer(core, key, from, want.want != 0);
        self.serve_soon(core, key);
    }

    pub(crate) fn on_announce(&mut self, core: &mut Core, from: NodeId, announce: &Announce) {
        for (stripe, have) in &announce.stripes {
            let key = StripeKey { content: announce.content, stripe: *stripe };
            let home = self.answering_home(core, key, &[]);
            if home != core.me {
                if *have != 0 && home != from {
                    let redirect = Redirect { content: key.content, stripe: key.stripe, home };
                    core.send(from, Message::Redirect(redirect));
                }
                continue;
            }
            if *have == 0 && !self.stripes.contains_key(&key) {
                continue;
            }
            self.make_known(core, key);
            let Some(known) = self.stripes.get_mut(&key) else { continue };
            let row = known.stripe.ensure(from);
            known.stripe.row_mut(row).heard = core.now;
            known.stripe.set_have(row, *have);
            self.serve_soon(core, key);
        }
    }

    pub(crate) fn on_timer(&mut self, core: &mut Core, key: StripeKey) {
        let Some(known) = self.stripes.get(&key) else { return };
        if !known.stripe.waiting.is_empty() {
            self.begin_recovery(core, key, &[]);
        }
        self.finish_recovery(core, key);
        self.watch_leases(core, key);
        self.comb(core, key);
        self.serve(core, key);
    }

    /// Forgets pulls whose end was said and lost: who wants nothing more does not repeat itself, and its source, a seed for
    /// instance, would be taken for busy with it for ever.
    fn comb(&mut self, core: &Core, key: StripeKey) {
        let Some(known) = self.stripes.get_mut(&key) else { return };
        if core.now.since(known.combed) >= COMB_INTERVAL {
            known.combed = core.now;
            known.stripe.end_silent_pulls(core.now, millis(core.config.flow_stall_ms) * 2);
        }
    }

    /// The node's connection failed: what it fetches, others may fetch now.
    pub(crate) fn on_peer_lost(&mut self, core: &mut Core, node: NodeId) {
        for key in self.keys() {
            self.await_no_longer(core, key, node);
            let Some(known) = self.stripes.get_mut(&key) else { continue };
            let Some(row) = known.stripe.find(node) else { continue };
            core.stats.leases_stolen += u64::from(known.stripe.row(row).leased.count_ones());
            known.stripe.interrupt(row);
            self.serve_soon(core, key);
        }
    }

    /// Chunks of a stripe that somebody outside `leaving` holds and can be reached for.
    pub(crate) fn held_by_others(&self, view: &View, key: StripeKey, leaving: &BTreeSet<NodeId>) -> u64 {
        let Some(known) = self.stripes.get(&key) else { return 0 };
        let stays = |node: NodeId| !leaving.contains(&node) && view.is_reachable(node);
        let staying = known.stripe.rows().filter(|row| stays(row.node));
        staying.fold(0, |held, row| held | row.have)
    }

    /// Gauges into the statistics.
    pub(crate) fn count(&self, stats: &mut super::Stats) {
        stats.home_stripes = self.stripes.len() as u64;
        let stripes = || self.stripes.values().map(|known| &known.stripe);
        stats.home_rows = stripes().map(|stripe| stripe.len() as u64).sum();
        stats.leases = stripes().map(|stripe| u64::from(stripe.leased.count_ones())).sum();
        stats.waiting = stripes().map(|stripe| stripe.waiting.len() as u64).sum();
    }

    fn keys(&self) -> Vec<StripeKey> {
        self.stripes.keys().copied().collect()
    }

    fn answering_home(&mut self, core: &Core, key: StripeKey, passed_over: &[NodeId]) -> NodeId {
        let epoch = core.view.epoch();
        let home = match self.stripes.get_mut(&key) {
            Some(known) if known.home.0 == epoch => known.home.1,
            Some(known) => {
                known.home = (epoch, core.view.answering_home(key, &[]));
                known.home.1
            }
            None => core.view.answering_home(key, &[]),
        };
        if passed_over.contains(&home) { core.view.answering_home(key, passed_over) } else { home }
    }

    fn make_known(&mut self, core: &Core, key: StripeKey) {
        if !self.stripes.contains_key(&key) && self.stripes.len() >= core.config.max_home_stripes.max(1) {
            self.forget_the_stalest();
        }
        let now = core.now;
        let known = self.stripes.entry(key).or_insert_with(|| Known {
            stripe: Stripe::new(),
            recovery: Recovery::Due,
            opened: now,
            served: Time::default(),
            used: now,
            home: (core.view.epoch(), core.view.answering_home(key, &[])),
            combed: now,
            refused: BTreeMap::new(),
        });
        known.used = now;
    }

    /// Holders announce again when they are asked in vain, so what is forgotten costs little.
    fn forget_the_stalest(&mut self) {
        let idle = self.stripes.iter().filter(|(_, known)| known.stripe.interested() == 0);
        let stalest = idle.min_by_key(|(_, known)| known.used).map(|(key, _)| *key);
        let stalest = stalest.or_else(|| self.stripes.keys().next().copied());
        if let Some(key) = stalest {
            self.drop_stripe(key);
        }
    }

    fn drop_stripe(&mut self, key: StripeKey) {
        self.stripes.remove(&key);
        if self.stripes_of(key.content).next().is_none() {
            self.budgets.remove(&key.content);
        }
    }

    fn stripes_of(&self, content: ContentKey) -> impl Iterator<Item = &Stripe> {
        let first = StripeKey { content, stripe: StripeIndex(0) };
        let stripes = self.stripes.range(first..).take_while(move |(key, _)| key.content == content);
        stripes.map(|(_, known)| &known.stripe)
    }

    /// Leases of one content, over all its stripes that this node is home of.
    fn leases_of(&self, content: ContentKey) -> u32 {
        self.stripes_of(content).map(|stripe| stripe.leased.count_ones()).sum()
    }

    fn budget(&mut self, core: &Core, content: ContentKey) -> &mut Budget {
        self.budgets.entry(content).or_insert_with(|| Budget::new(core.config.origin_flows_per_content))
    }

    /// Replaces what is known of the sender by what it says, keeping what was assigned to it since.
    fn take_in(&mut self, core: &mut Core, key: StripeKey, from: NodeId, want: &Want) {
        for end in &want.ended {
            self.end_lease(core, key, from, want.seen, end);
        }
        let Some(known) = self.stripes.get_mut(&key) else { return };
        let (stripe, now) = (&mut known.stripe, core.now);
        if stripe.interested() == 0 && want.want != 0 {
            known.opened = now;
        }
        want.failures.iter().for_each(|failure| blame(stripe, failure, now));
        let id = stripe.ensure(from);
        stripe.row_mut(id).breaks = 0;
        if is_overtaken(stripe, id, want, now) {
            core.stats.messages_ignored += 1;
            return;
        }
        stripe.row_mut(id).heard = now;
        stripe.row_mut(id).wants = want.number;
        let pending = confirm(stripe, id, want.seen, now);
        reconcile(stripe, id, want, pending, now);
        for failure in &want.failures {
            failure.instead.into_iter().for_each(|source| stripe.move_pull(failure.bit, id, source));
        }
    }

    /// A lessee's word on how its lease ended, which had seen answers up to that number. When it comes late, the chunk may be
    /// leased to it anew: it does not mean that lease.
    fn end_lease(&mut self, core: &mut Core, key: StripeKey, from: NodeId, seen: u32, end: &LeaseEnd) {
        let Some(known) = self.stripes.get_mut(&key) else { return };
        let bit = end.bit();
        let mine = known.stripe.find(from);
        let held = known.stripe.chunk(bit).lease.is_some_and(|lease| Some(lease.row) == mine);
        let means_another = mine.is_some_and(|id| known.stripe.row(id).is_unseen(bit, seen));
        if held && !means_another {
            known.stripe.end_lease(bit);
        }
        if let LeaseEnd::Done { attestation, .. } = end {
            known.stripe.chunk_mut(bit).digest = Some(attestation.digest);
        }
        let budget = self.budget(core, key.content);
        match end {
            LeaseEnd::Done { .. } => budget.succeeded(),
            LeaseEnd::Throttled { .. } => budget.throttled(core.now),
            LeaseEnd::Failed { .. } | LeaseEnd::Released { .. } => {}
        }
    }

    /// Assigns what can be assigned to one node, and tells it; `always` also tells it that there is nothing.
    fn answer(&mut self, core: &mut Core, key: StripeKey, node: NodeId, always: bool) {
        let allowed = self.may_grant(core, key);
        let leases = self.leases_of(key.content);
        let ceiling = core.config.origin_flows_per_content;
        let Some(known) = self.stripes.get_mut(&key) else { return };
        let Some(id) = known.stripe.find(node) else { return };
        let grants = Grants { allowed, opened: known.opened };
        let budget = self.budgets.entry(key.content).or_insert_with(|| Budget::new(ceiling));
        budget.leases = leases;
        let Assigned { assignments, more_at } = assign(&mut known.stripe, core, budget, &grants, id);
        let paused_until = budget.paused_until();
        if let Some(at) = more_at {
            core.timers.set_by(Timer::Stripe(key), at);
        }
        if paused_until > core.now {
            core.timers.set_by(Timer::Stripe(key), paused_until);
        }
        // Before the first sync there is nothing to vouch for.
        if (always && core.view.synced().is_some()) || !assignments.is_empty() {
            tell(known, core, key, id, assignments);
        }
    }

    /// Serves those who wait, but not more often than wants come: so that answers go out in batches.
    fn serve_soon(&mut self, core: &mut Core, key: StripeKey) {
        let Some(known) = self.stripes.get(&key) else { return };
        if known.stripe.waiting.is_empty() {
            return;
        }
        let due = known.served + core.config.want_interval(known.stripe.interested());
        if due <= core.now {
            self.serve(core, key);
        } else {
            core.timers.set_by(Timer::Stripe(key), due);
        }
    }

    fn serve(&mut self, core: &mut Core, key: StripeKey) {
        let Some(known) = self.stripes.get_mut(&key) else { return };
        known.served = core.now;
        let mut waiting: Vec<NodeId> =
            known.stripe.waiting.iter().map(|id| known.stripe.row(*id).node).collect();
        if !waiting.is_empty() {
            let first = core.rng.below(waiting.len());
            waiting.rotate_left(first);
        }
        let busy = !waiting.is_empty() || known.stripe.leased != 0;
        for node in waiting {
            self.answer(core, key, node, false);
        }
        if busy {
            core.timers.set_by(Timer::Stripe(key), core.now + WATCH_INTERVAL);
        }
    }
}

fn tell(known: &mut Known, core: &mut Core, key: StripeKey, id: RowId, assignments: Vec<Assignment>) {
    let interested = known.stripe.interested();
    let row = known.stripe.row_mut(id);
    row.answers = row.answers.wrapping_add(1);
    let answer =
        Answer { content: key.content, stripe: key.stripe, number: row.answers, interested, assignments };
    let node = row.node;
    core.send(node, Message::Answer(answer));
}

/// A requester's complaint about a source.
fn blame(stripe: &mut Stripe, failure: &Failure, now: Time) {
    let Some(id) = stripe.find(failure.node) else { return };
    match failure.trouble {
        Trouble::Lacks => stripe.lacks(failure.bit, failure.node),
        Trouble::NotBegun => stripe.has_not_begun(failure.bit, failure.node),
        Trouble::Busy => stripe.row_mut(id).sour_until = now + SOUR,
        Trouble::Broken => {
            let row = stripe.row_mut(id);
            row.sour_until = now + SOUR * (1 << row.breaks.min(MAX_SOUR_DOUBLINGS));
            row.breaks += 1;
            stripe.end_pulls(id);
        }
    }
}

/// Whether a later want was here first: what this one says of the sender's state is the past, and its silence about a
/// lease that the later one confirmed would end that lease, its word of one that is over begin it again. A requester that
/// starts afresh counts from zero; the first of its wants may be lost, so that a number counts for a moment only.
fn is_overtaken(stripe: &Stripe, id: RowId, want: &Want, now: Time) -> bool {
    let row = stripe.row(id);
    want.number != 0 && want.number <= row.wants && now.since(row.heard) < REORDERED
}

/// Drops the assignments that the node has taken in, or that were lost on the way; returns those still on the way.
fn confirm(stripe: &mut Stripe, id: RowId, seen: u32, now: Time) -> u64 {
    let row = stripe.row_mut(id);
    // A number ahead of ours is from the time before this table was rebuilt: counting goes on from there, because
    // the node takes a lower one for late and drops it.
    row.answers = row.answers.max(seen);
    row.sent.retain(|sent| sent.number > seen && now.since(sent.at) < ANSWER_LIFETIME);
    row.sent.iter().fold(0, |bits, sent| bits | 1 << sent.bit)
}

fn reconcile(stripe: &mut Stripe, id: RowId, want: &Want, pending: u64, now: Time) {
    stripe.set_have(id, want.have);
    let row = stripe.row(id);
    let (pulling, leased) = (row.pulling, row.leased);
    for bit in bits(pulling & !want.pulling & !pending) {
        stripe.end_pull(bit, id);
    }
    for bit in bits(leased & !want.leased & !pending) {
        stripe.end_lease(bit);
    }
    for bit in bits(want.pulling & !want.have) {
        if want.queued >> bit & 1 == 1 {
            stripe.postpone_pull(bit, id);
        } else {
            stripe.confirm_pull(bit, id);
        }
    }
    for bit in bits(want.leased & leased & !want.have) {
        stripe.confirm_lease(bit, id);
    }
    for bit in bits(want.leased & !leased & !want.have) {
        // It fetches under the claim of a previous home, or as a last resort.
        if stripe.chunk(bit).lease.is_none() {
            stripe.begin_lease(bit, id, now);
        }
    }
    let on_the_way = u8::try_from(pending.count_ones()).unwrap_or(u8::MAX);
    stripe.update(id, |row| {
        row.want = want.want & !pending & !want.have & !row.pulling & !row.leased;
        row.urgent = want.urgent;
        row.room = want.room.saturating_sub(on_the_way);
        row.grants = want.grants;
    });
}

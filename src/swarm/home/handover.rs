//! How a stripe's table moves from home to home, so that two homes never grant the same chunk.
//!
//! A home that hears of a stripe for the first time asks the nodes that rank best among all others, settled or not:
//! whoever was home before is among them, unless it is dead. A previous home that ranks lower than a settled asker
//! gives the table away and grants no more; any other remains home, and the asker sends its requesters there. So of
//! two nodes that know each other only one is home, whatever the others believe.
//!
//! Two nodes that do not know each other yet may both believe that they are home. Whoever they both ask is their
//! witness: it remembers whom it left a stripe to, and names that one to the second asker, which then waits for
//! membership to tell it of the first.
//!
//! Whoever asked and was told that another is home sends there whoever comes to it, without asking anew. So a home that
//! leaves the stripe later tells those whom it told that, and with the table, because one of them may be the home to which
//! its successor sends everybody. Otherwise requesters would be sent round in a circle until that is forgotten.
//! For the same reason two that tell each other that they are home do not both believe it: the lower rank does.
//!
//! A previous home that does not answer is slow or dead. It is waited for until it answers, or its connection breaks,
//! or `mute_wait_ms` are over. When a better home has died, its table lives on in those it served: the new home asks
//! every member what it holds and fetches, and goes on when all have answered or `recovery_wait_ms` are over. It asks
//! them too when it has waited that long for one that may have died unnoticed. So nobody waits for a clock while
//! everybody is prompt.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Home, Known, REORDERED};
use crate::content::NodeId;
use crate::swarm::core::{Core, millis};
use crate::swarm::time::Time;
use crate::swarm::timers::Timer;
use crate::swarm::view::{Change, StripeKey};
use crate::wire::{Ask, MAX_TABLE_ROWS, Message, Redirect, Table, TableRow};

/// Previous homes asked: the best ranks. Between two views that differ by a few members, the home of one is within
/// the first three of the other.
const ASKED: usize = 3;
/// The same while members come: a scale-up may put as many newcomers above the previous home.
const ASKED_IN_FLUX: usize = 32;
/// Who has not answered is asked again this often: a few times within `recovery_wait_ms`. The transport loses nothing while
/// a connection lasts, but a full queue and a new connection do.
const ASK_AGAIN: Duration = Duration::from_millis(300);
/// Stripes left to others that are remembered as a witness: 2,000 nodes that start on 16 GiB each ask of 32.
const MAX_PROMISES: usize = 4_096;

/// Where a home stands in learning what was before it.
#[derive(Debug)]
pub(super) enum Recovery {
    /// Nobody has wanted anything yet.
    Due,
    Waiting(Inquiry),
    Done,
}

/// Questions to those who may have been home before.
#[derive(Debug)]
pub(super) struct Inquiry {
    /// Who was asked.
    asked: BTreeMap<NodeId, Asked>,
    /// Who of these asked too, ranks below this node, and was told so, and when.
    outranked: BTreeMap<NodeId, Time>,
    /// Somebody named a home that this node has not heard of yet.
    stranger: bool,
    /// Those who need not have been home are waited for no longer than that.
    until: Time,
    /// Nobody is waited for any longer.
    at_last: Time,
    /// Who has not answered is asked again then.
    again: Time,
    /// Everybody was asked.
    wide: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// It was home by all this node knows, or by the word of those who could not reach it.
    Awaited,
    Open,
    Answered,
}

impl Inquiry {
    fn awaits(&self) -> bool {
        self.asked.values().any(|asked| *asked == Asked::Awaited)
    }

    fn is_over(&self, now: Time) -> bool {
        let awaited = self.awaits();
        let open = awaited || self.asked.values().any(|asked| *asked == Asked::Open);
        let complete = !open && !self.stranger;
        complete || now >= self.at_last || (now >= self.until && !awaited)
    }

    fn next(&self, now: Time) -> Time {
        let over = if self.until > now { self.until } else { self.at_last };
        over.min(self.again)
    }

    /// A lost question or answer must not be taken for "nobody was home".
    fn repeat(&mut self, core: &mut Core, key: StripeKey) {
        if core.now < self.again {
            return;
        }
        self.again = core.now + ASK_AGAIN;
        for node in self.asked.iter().filter(|(_, asked)| **asked != Asked::Answered).map(|(node, _)| *node) {
            core.send(node, Message::Ask(Ask { content: key.content, stripe: key.stripe }));
        }
    }
}

/// Whom this node, having no table, left a stripe to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Promise {
    to: NodeId,
    at: Time,
    /// That one said that it is home.
    claimed: bool,
}

impl Promise {
    fn is_kept(&self, core: &Core) -> bool {
        core.now.since(self.at) < millis(core.config.mute_wait_ms) && core.view.is_reachable(self.to)
    }
}

impl Home {
    /// Whether claims on this stripe may be granted now.
    pub(super) fn may_grant(&self, core: &Core, key: StripeKey) -> bool {
        let recovered = self.stripes.get(&key).is_some_and(|known| matches!(known.recovery, Recovery::Done));
        recovered && core.view.may_grant_from().is_some_and(|from| from <= core.now)
    }

    /// Asks around, once granting is allowed: before, the view may lack whom to ask.
    pub(super) fn begin_recovery(&mut self, core: &mut Core, key: StripeKey, passed_over: &[NodeId]) {
        let Some(known) = self.stripes.get_mut(&key) else { return };
        if !matches!(known.recovery, Recovery::Due) {
            return;
        }
        let Some(allowed) = core.view.may_grant_from() else { return };
        if allowed > core.now {
            core.timers.set_by(Timer::Stripe(key), allowed);
            return;
        }
        let at_most = match (core.view.is_orphaned(core.now, key), core.view.is_in_flux(core.now)) {
            (true, _) => MAX_TABLE_ROWS,
            (false, true) => ASKED_IN_FLUX,
            (false, false) => ASKED,
        };
        let likely = core.view.likely_homes(key, ASKED, at_most);
        if likely.is_empty() {
            known.recovery = Recovery::Done;
            return;
        }
        core.stats.takeovers += 1;
        let until = core.now + millis(core.config.recovery_wait_ms);
        let at_last = core.now + millis(core.config.mute_wait_ms);
        let again = core.now + ASK_AGAIN;
        let (asked, outranked) = (BTreeMap::new(), BTreeMap::new());
        let mut inquiry = Inquiry { asked, outranked, stranger: false, until, at_last, again, wide: false };
        for (rank, node) in likely.into_iter().enumerate() {
            // The next in rank was home until this node rose above it.
            let was_home = rank == 0 || passed_over.contains(&node) || core.view.outranks(node, core.me, key);
            inquiry.ask(core, key, node, if was_home { Asked::Awaited } else { Asked::Open });
        }
        core.timers.set_by(Timer::Stripe(key), inquiry.next(core.now));
        known.recovery = Recovery::Waiting(inquiry);
    }

    pub(super) fn finish_recovery(&mut self, core: &mut Core, key: StripeKey) {
        let Some(known) = self.stripes.get_mut(&key) else { return };
        let Recovery::Waiting(inquiry) = &mut known.recovery else { return };
        if inquiry.is_over(core.now) {
            known.recovery = Recovery::Done;
            // Answers are paced for those who ask often; who has waited for this one is not made to wait on.
            known.served = Time::default();
        } else {
            if core.now >= inquiry.until && inquiry.awaits() {
                // It may have died unnoticed.
                inquiry.widen(core, key);
            }
            inquiry.repeat(core, key);
            core.timers.set_by(Timer::Stripe(key), inquiry.next(core.now));
        }
    }

    /// `mine` is what this node itself holds and fetches of the stripe.
    pub(crate) fn on_ask(&mut self, core: &mut Core, from: NodeId, ask: Ask, mine: TableRow) {
        let key = StripeKey { content: ask.content, stripe: ask.stripe };
        let home = self.answering_home(core, key, &[]);
        let left = self.claimed(core, key).filter(|_| home == core.me);
        if let Some(promise) = left.filter(|promise| promise.to != from) {
            self.send_table(core, key, from, promise.to, Some(mine));
            return;
        }
        // What was told of a stripe that was left to the asker does not make this node home again: both would have left it
        // to each other.
        if home == core.me
            && left.is_none()
            && let Some(known) = self.stripes.get_mut(&key).filter(|known| keeps(core, known, key, from))
        {
            known.refuse(from, core.now);
            self.send_table(core, key, from, core.me, Some(mine));
            return;
        }
        // Without a table this node is nobody's home yet, and leaves it to the asker, or to whom it left it before.
        let home = if home == core.me || home == from { self.promise(core, key, from) } else { home };
        self.send_table(core, key, from, home, Some(mine));
        if self.stripes.contains_key(&key) {
            self.leave_to(core, key, from);
        }
    }

    /// Whom this node leaves a stripe to that it has no table of: the first who asked, while that one may live.
    fn promise(&mut self, core: &Core, key: StripeKey, asker: NodeId) -> NodeId {
        if self.stripes.contains_key(&key)
            && self.promises.get(&key).is_some_and(|promise| promise.to != asker)
        {
            // What it had goes to the asker: whoever comes next is sent there.
            self.promises.remove(&key);
        }
        if let Some(promise) = self.promises.get(&key).filter(|promise| promise.is_kept(core)) {
            return promise.to;
        }
        self.remember_left(core, key, asker, false);
        asker
    }

    fn remember_left(&mut self, core: &Core, key: StripeKey, to: NodeId, claimed: bool) {
        if self.promises.len() >= MAX_PROMISES {
            self.promises.retain(|_, promise| promise.is_kept(core));
        }
        if self.promises.len() < MAX_PROMISES {
            self.promises.insert(key, Promise { to, at: core.now, claimed });
        }
    }

    /// Who has a stripe that this node would be home of, had it not left it to that one a moment ago: whoever asks for it
    /// is sent there, without another round of questions.
    pub(super) fn left_to(&mut self, core: &Core, key: StripeKey, asker: NodeId) -> Option<NodeId> {
        let to = self.claimed(core, key)?.to;
        if to == asker {
            // It may have lost what it was left: sent back to itself it would go round in a circle.
            self.promises.remove(&key);
            return None;
        }
        Some(to)
    }

    /// Whom this node left a stripe to that said since that it is home. What others tell of the stripe meanwhile, in answers
    /// that were on their way and in announcements, is kept, but makes no home of this node: it would ask them anew.
    fn claimed(&self, core: &Core, key: StripeKey) -> Option<Promise> {
        let promise = self.promises.get(&key).filter(|promise| promise.claimed && promise.is_kept(core))?;
        let is_home = self.stripes.get(&key).is_some_and(|known| !matches!(known.recovery, Recovery::Due));
        (!is_home).then_some(*promise)
    }

    pub(crate) fn on_table(&mut self, core: &mut Core, from: NodeId, table: &Table) {
        let key = StripeKey { content: table.content, stripe: table.stripe };
        if table.home != from && self.promises.get(&key).is_some_and(|promise| promise.to == from) {
            // It gives back what this node had left to it, or has left it to another.
            self.promises.remove(&key);
        }
        if !self.stripes.contains_key(&key) && self.answering_home(core, key, &[from]) != core.me {
            core.stats.messages_ignored += 1;
            return;
        }
        let crossed =
            table.home == from && self.stripes.get(&key).is_some_and(|known| known.crossed(from, core.now));
        if table.home == from && !crossed {
            self.leave_to(core, key, from);
            self.remember_left(core, key, from, true);
            return;
        }
        if !table.rows.is_empty() {
            self.make_known(core, key);
        }
        let Some(known) = self.stripes.get_mut(&key) else { return };
        for row in &table.rows {
            merge(&mut known.stripe, row, from, core.now);
        }
        if let Recovery::Waiting(inquiry) = &mut known.recovery {
            inquiry.answered(core, key, from, if crossed { core.me } else { table.home });
        }
        self.finish_recovery(core, key);
        self.serve_soon(core, key);
    }

    /// Forgets who is gone, and hands over what another is home of now.
    pub(crate) fn on_view_change(&mut self, core: &mut Core, change: &Change) {
        for key in self.keys() {
            for node in &change.gone {
                self.await_no_longer(core, key, *node);
                self.forget(core, key, *node);
            }
            let may_have_moved =
                change.upheaval || change.risen.iter().any(|node| core.view.outranks(*node, core.me, key));
            let home = if may_have_moved { core.view.answering_home(key, &[]) } else { core.me };
            if home == core.me {
                self.ask_strangers(core, key);
                self.wake(core, key);
            } else {
                self.send_table(core, key, home, home, None);
                self.leave_to(core, key, home);
            }
        }
    }

    /// After a silence in which others may have taken over and granted what was granted here, the claims are the past:
    /// whoever wants something has this node ask for the present, as any new home does. What was held is held still:
    /// the holders of what nobody asks for will not say it again.
    pub(crate) fn on_slept(&mut self, core: &mut Core) {
        for (key, known) in &mut self.stripes {
            core.timers.cancel(Timer::Stripe(*key));
            known.stripe = known.stripe.held_only();
            known.recovery = Recovery::Due;
        }
        self.promises.clear();
    }

    /// The node cannot answer any more; all whom it may have served have to be heard.
    pub(super) fn await_no_longer(&mut self, core: &mut Core, key: StripeKey, node: NodeId) {
        let Some(known) = self.stripes.get_mut(&key) else { return };
        let Recovery::Waiting(inquiry) = &mut known.recovery else { return };
        let before = inquiry.asked.insert(node, Asked::Answered);
        if before == Some(Asked::Awaited) {
            inquiry.widen(core, key);
            inquiry.until = core.now + millis(core.config.recovery_wait_ms);
            inquiry.at_last = inquiry.at_last.max(inquiry.until);
        }
        core.timers.set_by(Timer::Stripe(key), core.now);
    }

    fn forget(&mut self, core: &mut Core, key: StripeKey, node: NodeId) {
        let Some(known) = self.stripes.get_mut(&key) else { return };
        known.refused.remove(&node);
        let Some(row) = known.stripe.find(node) else { return };
        core.stats.leases_stolen += u64::from(known.stripe.row(row).leased.count_ones());
        known.stripe.remove(node);
    }

    /// The home that others named may be known now.
    fn ask_strangers(&mut self, core: &mut Core, key: StripeKey) {
        let Some(known) = self.stripes.get_mut(&key) else { return };
        if matches!(&known.recovery, Recovery::Waiting(inquiry) if inquiry.stranger) {
            known.recovery = Recovery::Due;
            self.begin_recovery(core, key, &[]);
        }
    }

    /// Serves those who wait once granting is allowed, which a new view may have changed.
    fn wake(&self, core: &mut Core, key: StripeKey) {
        let waits = self.stripes.get(&key).is_some_and(|known| !known.stripe.waiting.is_empty());
        if let (true, Some(from)) = (waits, core.view.may_grant_from()) {
            core.timers.set_by(Timer::Stripe(key), from.max(core.now));
        }
    }

    fn send_table(&self, core: &mut Core, key: StripeKey, to: NodeId, home: NodeId, mine: Option<TableRow>) {
        let known = self.stripes.get(&key).into_iter().flat_map(|known| known.stripe.export());
        let mine = mine.filter(|row| row.have | row.pulling | row.leased != 0);
        let rows = known.filter(|row| mine.is_none_or(|mine| mine.node != row.node));
        let rows = mine.into_iter().chain(rows).take(MAX_TABLE_ROWS).collect();
        core.send(to, Message::Table(Table { content: key.content, stripe: key.stripe, home, rows }));
    }

    /// Sends everybody who wants something to the new home, and forgets the stripe.
    fn leave_to(&mut self, core: &mut Core, key: StripeKey, home: NodeId) {
        self.tell_refused(core, key, home);
        let Some(known) = self.stripes.get(&key) else { return };
        let interested: Vec<NodeId> =
            known.stripe.rows().filter(|row| row.is_interested()).map(|row| row.node).collect();
        for node in interested.into_iter().filter(|node| *node != home) {
            core.stats.redirects += 1;
            core.send(node, Message::Redirect(Redirect { content: key.content, stripe: key.stripe, home }));
        }
        core.timers.cancel(Timer::Stripe(key));
        self.drop_stripe(key);
    }

    /// Whoever was told lately that this node is home sends its requesters here, and may itself be the home that others
    /// send them to. With the table it can be, without the claims being lost on the way.
    fn tell_refused(&self, core: &mut Core, key: StripeKey, home: NodeId) {
        let Some(known) = self.stripes.get(&key) else { return };
        let lately = |at: Time| core.now.since(at) < millis(core.config.mute_wait_ms);
        let refused = known.refused.iter().filter(|(node, at)| **node != home && lately(**at));
        let refused: Vec<NodeId> =
            refused.map(|(node, _)| *node).filter(|node| core.view.is_reachable(*node)).collect();
        for node in refused {
            self.send_table(core, key, node, home, None);
        }
    }
}

impl Known {
    /// The asker is told that this node is home.
    fn refuse(&mut self, asker: NodeId, now: Time) {
        self.refused.insert(asker, now);
        if let Recovery::Waiting(inquiry) = &mut self.recovery
            && inquiry.asked.contains_key(&asker)
        {
            inquiry.outranked.insert(asker, now);
        }
    }

    /// Whether a word of that node, that it is home, crossed this node's to it, or was overtaken by its own question:
    /// were both believed, each would send requesters to the other.
    fn crossed(&self, node: NodeId, now: Time) -> bool {
        let Recovery::Waiting(inquiry) = &self.recovery else { return false };
        inquiry.outranked.get(&node).is_some_and(|at| now.since(*at) < REORDERED)
    }
}

impl Inquiry {
    /// Asks all who were not asked yet, once: what a dead home knew, those know whom it served.
    fn widen(&mut self, core: &mut Core, key: StripeKey) {
        if std::mem::replace(&mut self.wide, true) {
            return;
        }
        for node in core.view.likely_homes(key, ASKED, MAX_TABLE_ROWS) {
            if !self.asked.contains_key(&node) {
                self.ask(core, key, node, Asked::Open);
            }
        }
    }

    fn ask(&mut self, core: &mut Core, key: StripeKey, node: NodeId, asked: Asked) {
        self.asked.insert(node, asked);
        core.send(node, Message::Ask(Ask { content: key.content, stripe: key.stripe }));
    }

    /// `from` says that `home` is; that one is asked next, or waited for until membership tells of it.
    fn answered(&mut self, core: &mut Core, key: StripeKey, from: NodeId, home: NodeId) {
        self.asked.insert(from, Asked::Answered);
        if home == core.me {
            return;
        }
        if core.view.member(home).is_none() {
            self.stranger = true;
        } else if !self.asked.contains_key(&home) && self.asked.len() < 2 * ASKED_IN_FLUX {
            self.ask(core, key, home, Asked::Awaited);
        }
        let until = core.now + millis(core.config.stranger_wait_ms);
        if self.stranger && self.until < until && self.until < self.at_last {
            self.until = until.min(self.at_last);
            core.timers.set_by(Timer::Stripe(key), self.until);
        }
    }
}

/// Whether this node remains home although another asks to be.
fn keeps(core: &Core, known: &Known, key: StripeKey, asker: NodeId) -> bool {
    let ranks_above = core.view.outranks(core.me, asker, key);
    if matches!(&known.recovery, Recovery::Waiting(inquiry) if inquiry.asked.contains_key(&asker)) {
        // Both are asking, so neither has granted: rank alone decides, for that is the same on both sides.
        return ranks_above;
    }
    // A home that is not settled here would not be found by those who share this view.
    let settled = core.view.member(asker).is_some_and(|member| core.view.is_settled(member));
    !settled || ranks_above
}

/// Takes in a row of the table of `teller`. Whoever has spoken for itself is not spoken for by others; what it says in a
/// table of its own is news, and it may have spoken before a silence.
fn merge(stripe: &mut super::Stripe, row: &TableRow, teller: NodeId, now: Time) {
    let spoke = stripe.find(row.node).is_some_and(|id| stripe.row(id).answers > 0);
    if spoke && row.node != teller {
        return;
    }
    let id = stripe.ensure(row.node);
    let have = stripe.row(id).have | row.have;
    stripe.set_have(id, have);
    for bit in super::bits(row.leased & !have) {
        if stripe.chunk(bit).lease.is_none() {
            stripe.begin_lease(bit, id, now);
        }
    }
    for bit in super::bits(row.pulling & !have & !row.leased) {
        stripe.confirm_pull(bit, id);
    }
}

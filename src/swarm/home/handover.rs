//! How a stripe's table moves from home to home, so that two homes never grant the same chunk.
//!
//! A home that hears of a stripe for the first time asks the nodes that rank best among all others, settled or not:
//! whoever was home before is among them, unless it is dead. A previous home that ranks lower than a settled asker
//! gives the table away and grants no more; any other remains home, and the asker sends its requesters there. So of
//! two nodes that know each other only one is home, whatever the others believe. When a better home has died or does not
//! answer, nobody is left to ask, and the new one waits for holders and fetchers to announce themselves.

use std::time::Duration;

use super::Home;
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
/// Wait for membership to tell of a home that others name: news takes some 500 ms through a cluster.
const STRANGER_WAIT: Duration = Duration::from_millis(600);

/// Where a home stands in learning what was before it.
#[derive(Debug)]
pub(super) enum Recovery {
    /// Nobody has wanted anything yet.
    Due,
    Waiting {
        asked: Vec<NodeId>,
        orphaned: bool,
        /// Somebody named a home that this node has not heard of yet.
        stranger: bool,
        until: Time,
    },
    Done,
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
        let at_most = if core.view.is_in_flux(core.now) { ASKED_IN_FLUX } else { ASKED };
        let asked = core.view.likely_homes(key, ASKED, at_most);
        let until = core.now + millis(core.config.recovery_wait_ms);
        let orphaned = core.view.is_orphaned(core.now, key) || !passed_over.is_empty();
        known.recovery = if asked.is_empty() && !orphaned {
            Recovery::Done
        } else {
            core.stats.takeovers += 1;
            Recovery::Waiting { asked: asked.clone(), orphaned, stranger: false, until }
        };
        for node in asked {
            core.send(node, Message::Ask(Ask { content: key.content, stripe: key.stripe }));
        }
        core.timers.set_by(Timer::Stripe(key), until);
    }

    pub(super) fn finish_recovery(&mut self, core: &Core, key: StripeKey) {
        let Some(known) = self.stripes.get_mut(&key) else { return };
        if let Recovery::Waiting { asked, orphaned, stranger, until } = &known.recovery
            && (*until <= core.now || (asked.is_empty() && !orphaned && !stranger))
        {
            known.recovery = Recovery::Done;
        }
    }

    pub(crate) fn on_ask(&mut self, core: &mut Core, from: NodeId, ask: Ask) {
        let key = StripeKey { content: ask.content, stripe: ask.stripe };
        // A home that is not settled here would not be found by those who share this view.
        let settled = core.view.member(from).is_some_and(|member| core.view.is_settled(member));
        let ranks_above = !settled || core.view.outranks(core.me, from, key);
        let home = self.answering_home(core, key, &[]);
        if self.stripes.contains_key(&key) && ranks_above && home == core.me {
            self.send_table(core, key, from, core.me);
            return;
        }
        // Without a table this node is nobody's home yet, and leaves it to the asker.
        let home = if home == core.me { from } else { home };
        self.send_table(core, key, from, home);
        self.leave_to(core, key, from);
    }

    pub(crate) fn on_table(&mut self, core: &mut Core, from: NodeId, table: &Table) {
        let key = StripeKey { content: table.content, stripe: table.stripe };
        if !self.stripes.contains_key(&key) && self.answering_home(core, key, &[from]) != core.me {
            core.stats.messages_ignored += 1;
            return;
        }
        if table.home == from {
            self.leave_to(core, key, from);
            return;
        }
        if !table.rows.is_empty() {
            self.make_known(core, key);
        }
        let Some(known) = self.stripes.get_mut(&key) else { return };
        for row in &table.rows {
            merge(&mut known.stripe, row, core.now);
        }
        if let Recovery::Waiting { asked, stranger, until, .. } = &mut known.recovery {
            asked.retain(|node| *node != from);
            let third = table.home != core.me && core.view.member(table.home).is_none();
            if third && !*stranger {
                *stranger = true;
                *until = core.now + STRANGER_WAIT;
                core.timers.set_by(Timer::Stripe(key), *until);
            }
        }
        self.finish_recovery(core, key);
        self.serve_soon(core, key);
    }

    /// Forgets who is gone, and hands over what another is home of now.
    pub(crate) fn on_view_change(&mut self, core: &mut Core, change: &Change) {
        for key in self.keys() {
            for node in &change.gone {
                self.forget(core, key, *node);
            }
            let may_have_moved =
                change.upheaval || change.risen.iter().any(|node| core.view.outranks(*node, core.me, key));
            let home = if may_have_moved { core.view.answering_home(key, &[]) } else { core.me };
            if home == core.me {
                self.ask_strangers(core, key);
                self.wake(core, key);
            } else {
                self.send_table(core, key, home, home);
                self.leave_to(core, key, home);
            }
        }
    }

    fn forget(&mut self, core: &mut Core, key: StripeKey, node: NodeId) {
        let Some(known) = self.stripes.get_mut(&key) else { return };
        let Some(row) = known.stripe.find(node) else { return };
        core.stats.leases_stolen += u64::from(known.stripe.row(row).leased.count_ones());
        known.stripe.remove(node);
    }

    /// The home that others named may be known now.
    fn ask_strangers(&mut self, core: &mut Core, key: StripeKey) {
        let Some(known) = self.stripes.get_mut(&key) else { return };
        if matches!(known.recovery, Recovery::Waiting { stranger: true, .. }) {
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

    fn send_table(&self, core: &mut Core, key: StripeKey, to: NodeId, home: NodeId) {
        let known = self.stripes.get(&key);
        let rows = known.into_iter().flat_map(|known| known.stripe.export()).take(MAX_TABLE_ROWS).collect();
        core.send(to, Message::Table(Table { content: key.content, stripe: key.stripe, home, rows }));
    }

    /// Sends everybody who wants something to the new home, and forgets the stripe.
    fn leave_to(&mut self, core: &mut Core, key: StripeKey, home: NodeId) {
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
}

/// Takes in a row from another's table, unless the node has spoken for itself.
fn merge(stripe: &mut super::Stripe, row: &TableRow, now: Time) {
    let spoke = stripe.find(row.node).is_some_and(|id| stripe.row(id).answers > 0);
    if spoke {
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

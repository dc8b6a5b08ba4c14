//! The machine itself: takes events in, hands actions out.

use std::collections::BTreeSet;

use super::config::Config;
use super::core::Core;
use super::event::{Action, Admission, Event};
use super::home::{Home, scaled};
use super::member::Member;
use super::requester::Requester;
use super::stats::Stats;
use super::time::Time;
use super::timers::Timer;
use super::view::{Evidence, StripeKey};
use crate::content::{ChunkIndex, ContentKey, NodeId, StripeIndex};
use crate::wire::Message;

/// One node's part in the swarm. See the module documentation for how to drive it.
#[derive(Debug)]
pub struct Swarm {
    core: Core,
    requester: Requester,
    home: Home,
    uploads: u32,
}

impl Swarm {
    /// `seed` makes a run repeatable; give each node another.
    #[must_use]
    pub fn new(me: NodeId, config: Config, seed: u64) -> Self {
        Self {
            core: Core::new(me, config, seed),
            requester: Requester::default(),
            home: Home::default(),
            uploads: 0,
        }
    }

    /// Takes in what happened. `now` must not run backwards.
    pub fn handle_event(&mut self, now: Time, event: Event) {
        self.advance(now);
        self.take_in(event);
        self.settle();
    }

    /// Does what is due. Call when [`Self::poll_timeout`] is reached; too early does nothing.
    pub fn handle_timeout(&mut self, now: Time) {
        self.advance(now);
        while let Some(timer) = self.core.timers.pop_due(self.core.now) {
            match timer {
                Timer::Stripe(key) => self.home.on_timer(&mut self.core, key),
                timer => self.requester.on_timer(&mut self.core, timer),
            }
            self.settle();
        }
    }

    /// The next thing to do. Drain after each call that takes a time.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.core.take_action()
    }

    /// When to call [`Self::handle_timeout`] next. May change with every call.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        self.core.timers.next()
    }

    /// A peer asks for a chunk. After [`Admission::Serve`] call [`Self::upload_ended`] exactly once.
    pub fn upload_requested(
        &mut self,
        now: Time,
        from: NodeId,
        content: ContentKey,
        chunk: ChunkIndex,
    ) -> Admission {
        self.advance(now);
        self.core.view.heard_from(from);
        if !self.requester.can_serve(content, chunk) {
            self.core.stats.uploads_early += u64::from(self.requester.asked_too_early(content, chunk));
            return Admission::NotFound;
        }
        let myself = self.core.view.member(self.core.me);
        let slots = self.core.config.upload_slots;
        let slots = myself.map_or(slots, |myself| scaled(slots, myself));
        let slots = if self.requester.is_idle() { slots * 2 } else { slots };
        if self.uploads >= slots {
            self.core.stats.uploads_refused += 1;
            return Admission::Busy;
        }
        // A seed is an origin to the others: what leaves it, the homes decide.
        let is_seed = myself.is_some_and(|myself| myself.seed);
        let also = if is_seed { Vec::new() } else { self.requester.holds_around(content, chunk) };
        self.uploads += 1;
        Admission::Serve { also }
    }

    /// An admitted upload is over, however it ended.
    pub fn upload_ended(&mut self, now: Time) {
        self.advance(now);
        self.uploads = self.uploads.saturating_sub(1);
    }

    /// Who is home of a stripe, as this node sees it now.
    #[must_use]
    pub fn home_of(&self, content: ContentKey, stripe: StripeIndex) -> NodeId {
        self.core.view.home(StripeKey { content, stripe })
    }

    /// The members with whom this node shares, without itself.
    pub fn others(&self) -> impl Iterator<Item = &Member> {
        self.core.view.members().filter(|member| member.id != self.core.me)
    }

    /// Of the chunks `held` of a stripe, those that nobody but the nodes in `leaving` holds, as far as this node, asked as
    /// their home, knows. A stripe that it knows nothing of is held by nobody.
    #[must_use]
    pub fn unshared(
        &self,
        content: ContentKey,
        stripe: StripeIndex,
        held: u64,
        leaving: &BTreeSet<NodeId>,
    ) -> u64 {
        held & !self.home.held_by_others(&self.core.view, StripeKey { content, stripe }, leaving)
    }

    /// Counters and gauges. Costs a walk over the tables: for scrapes, not for the hot path.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let mut stats = self.core.stats;
        self.requester.count(&mut stats);
        self.home.count(&mut stats);
        stats.uploads = u64::from(self.uploads);
        stats
    }

    fn advance(&mut self, now: Time) {
        self.core.now = self.core.now.max(now);
        self.core.view.advance(now);
    }

    /// Takes in the messages this node sent to itself.
    fn settle(&mut self) {
        while let Some(message) = self.core.take_loopback() {
            self.take_in_message(self.core.me, message);
        }
    }

    fn take_in(&mut self, event: Event) {
        let core = &mut self.core;
        let requester = &mut self.requester;
        match event {
            Event::Members { members, synced } => {
                let change = core.view.replace(core.now, members, synced);
                self.home.on_view_change(core, &change);
                requester.on_view_change(core, &change);
            }
            Event::PeerLost(_) if core.is_waking() => {}
            Event::PeerLost(node) => {
                core.suspect(node, Evidence::Lost);
                self.home.on_peer_lost(core, node);
                requester.on_peer_lost(core);
            }
            Event::Slept => {
                core.wake_up();
                self.home.on_slept(core);
            }
            Event::Message { message, .. } if core.is_catching_up() && is_stale(&message) => {
                core.stats.messages_ignored += 1;
            }
            Event::Message { from, message } => {
                core.view.heard_from(from);
                self.take_in_message(from, message);
            }
            Event::Stored { content, layout, have } => requester.on_stored(core, content, layout, have),
            Event::Dropped { content, chunks } => requester.on_dropped(core, content, &chunks),
            Event::Evicted { content } => requester.on_evicted(core, content),
            Event::Open { content, layout, have } => requester.on_open(core, content, layout, have),
            Event::Demand { content, wanted, cursors } => requester.on_demand(core, content, wanted, cursors),
            Event::Close { content } => requester.on_close(core, content),
            Event::SourceHolds { flow, also } => requester.on_source_holds(flow, also),
            Event::FlowProgress { flow, received } => requester.on_flow_progress(core, flow, received),
            Event::FlowDone { flow, attestation, kept } => {
                requester.on_flow_done(core, flow, attestation, kept);
            }
            Event::FlowFailed { flow, received, reason } => {
                requester.on_flow_failed(core, flow, received, reason);
            }
        }
    }

    fn take_in_message(&mut self, from: NodeId, message: Message) {
        let core = &mut self.core;
        match message {
            Message::Want(want) => self.home.on_want(core, from, want),
            Message::Answer(answer) => self.requester.on_answer(core, from, answer),
            Message::Leases(leases) => self.home.on_leases(core, from, &leases),
            Message::Revoke(lease) => self.requester.on_revoke(core, lease),
            Message::Redirect(redirect) => self.requester.on_redirect(core, redirect),
            Message::Ask(ask) => {
                let mine = self.requester.row(core.me, ask.content, ask.stripe);
                self.home.on_ask(core, from, ask, mine);
            }
            Message::Table(table) => self.home.on_table(core, from, &table),
            Message::Announce(announce) => self.home.on_announce(core, from, &announce),
            // No claim is touched by it: the engine keeps it to itself.
            Message::Parting(_) => {}
        }
    }
}

/// Whether a message would do harm if it had been under way for seconds: a home would be answered for that is none any
/// more, claims taken up that others have by now. All of these are repeated by whoever still means them.
const fn is_stale(message: &Message) -> bool {
    matches!(message, Message::Want(_) | Message::Answer(_) | Message::Ask(_))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::{Attestation, ChunkDigest, ChunkSet, Layout};
    use crate::swarm::member::{DEFAULT_CAPACITY, Zone};
    use crate::wire::{
        Answer, Ask, Assignment, Candidate, LeaseEnd, Redirect, Source, Table, TableRow, Want,
    };

    const ME: NodeId = NodeId([1; 16]);
    const OTHER: NodeId = NodeId([2; 16]);

    fn member(id: NodeId) -> Member {
        Member { id, zone: Zone::default(), seed: false, settled: true, capacity: DEFAULT_CAPACITY }
    }

    fn at(ms: u64) -> Time {
        Time(ms * 1_000)
    }

    /// Two settled nodes and a content whose only stripe this one is home of.
    fn home_of_one_stripe(chunks: u64) -> (Swarm, ContentKey) {
        let mut swarm = Swarm::new(ME, Config::default(), 1);
        swarm.handle_event(at(0), Event::Members { members: vec![member(ME), member(OTHER)], synced: true });
        let mine = |n| {
            swarm.core.view.home(StripeKey { content: ContentKey([n; 32]), stripe: StripeIndex(0) }) == ME
        };
        let content = ContentKey([(0..=255).find(|n| mine(*n)).unwrap(); 32]);
        let layout = Layout::new(chunks * 8, 8).unwrap();
        swarm.handle_event(at(0), Event::Open { content, layout, have: ChunkSet::new() });
        let wanted = ChunkSet::full(&layout);
        swarm.handle_event(at(0), Event::Demand { content, wanted, cursors: vec![ChunkIndex(0)] });
        (swarm, content)
    }

    fn actions(swarm: &mut Swarm) -> (usize, usize) {
        let (mut asked, mut fetched) = (0, 0);
        while let Some(action) = swarm.poll_action() {
            match action {
                Action::Send { to: OTHER, message: Message::Ask(_) } => asked += 1,
                Action::FetchFromOrigin { .. } => fetched += 1,
                _ => {}
            }
        }
        (asked, fetched)
    }

    fn said(swarm: &mut Swarm, now: Time, from: NodeId, message: Message) {
        swarm.handle_event(now, Event::Message { from, message });
    }

    fn tables(swarm: &mut Swarm) -> usize {
        let actions = std::iter::from_fn(|| swarm.poll_action());
        actions.filter(|action| matches!(action, Action::Send { message: Message::Table(_), .. })).count()
    }

    fn wants(content: ContentKey, want: u64) -> Want {
        Want {
            content,
            stripe: StripeIndex(0),
            want,
            urgent: 0,
            have: 0,
            pulling: 0,
            queued: 0,
            leased: 0,
            room: 64,
            grants: 0,
            seen: 0,
            number: 0,
            suspects: Vec::new(),
            failures: Vec::new(),
            ended: Vec::new(),
        }
    }

    fn answer(swarm: &mut Swarm, now: Time, content: ContentKey) {
        let table = Table { content, stripe: StripeIndex(0), home: ME, rows: Vec::new() };
        said(swarm, now, OTHER, Message::Table(table));
    }

    #[test]
    fn a_home_that_slept_asks_again_before_it_grants() {
        let (mut swarm, content) = home_of_one_stripe(64);
        assert_eq!(actions(&mut swarm), (1, 0), "nothing is granted before the other has told what it knows");
        answer(&mut swarm, at(3), content);
        assert!(actions(&mut swarm).1 > 0);
        swarm.handle_event(at(3), Event::Slept);
        swarm.handle_timeout(at(600));
        assert_eq!(actions(&mut swarm), (1, 0));
        answer(&mut swarm, at(601), content);
        swarm.handle_timeout(at(700));
        assert!(actions(&mut swarm).1 > 0, "it goes on");
    }

    #[test]
    fn what_was_said_to_a_sleeper_is_not_answered_and_not_believed() {
        let (mut swarm, content) = home_of_one_stripe(64);
        answer(&mut swarm, at(3), content);
        swarm.handle_event(at(3), Event::Slept);
        actions(&mut swarm);
        let ask = || Message::Ask(Ask { content, stripe: StripeIndex(0) });
        said(&mut swarm, at(4), OTHER, ask());
        assert_eq!((tables(&mut swarm), swarm.stats().messages_ignored), (0, 1));
        said(&mut swarm, at(400), OTHER, ask());
        assert_eq!(tables(&mut swarm), 1, "those who still ask are heard");
    }

    #[test]
    fn a_node_that_speaks_for_itself_in_a_table_is_believed_whatever_it_said_before() {
        let (mut swarm, content) = home_of_one_stripe(4);
        said(&mut swarm, at(1), OTHER, Message::Want(wants(content, 0b1111)));
        let row = TableRow { node: OTHER, have: 0b1111, pulling: 0, leased: 0 };
        let table = Table { content, stripe: StripeIndex(0), home: ME, rows: vec![row] };
        said(&mut swarm, at(3), OTHER, Message::Table(table));
        swarm.handle_timeout(at(700));
        assert_eq!(actions(&mut swarm).1, 0, "all of it is fetched from the other");
    }

    #[test]
    fn what_a_node_holds_that_membership_has_not_told_of_is_waited_for_a_moment() {
        let (mut swarm, content) = home_of_one_stripe(4);
        let held = Want { have: 0b1111, ..wants(content, 0) };
        said(&mut swarm, at(1), NodeId([3; 16]), Message::Want(held));
        answer(&mut swarm, at(3), content);
        swarm.handle_timeout(at(900));
        assert_eq!(actions(&mut swarm).1, 0);
        swarm.handle_timeout(at(1_100));
        assert!(actions(&mut swarm).1 > 0, "and not for ever");
    }

    #[test]
    fn what_is_told_of_a_stripe_that_was_left_is_kept_but_makes_no_home() {
        let (mut swarm, content) = home_of_one_stripe(64);
        let third = NodeId([3; 16]);
        let table = |node, home| {
            let rows = vec![TableRow { node, have: 1, pulling: 0, leased: 0 }];
            Message::Table(Table { content, stripe: StripeIndex(0), home, rows })
        };
        said(&mut swarm, at(3), OTHER, table(OTHER, OTHER));
        assert_eq!(swarm.stats().home_stripes, 0, "the other is home");
        actions(&mut swarm);
        let before = swarm.stats().redirects;
        said(&mut swarm, at(4), third, table(third, ME));
        said(&mut swarm, at(5), third, Message::Want(wants(content, 2)));
        assert_eq!((swarm.stats().home_rows, swarm.stats().redirects - before), (1, 1));
        assert_eq!(actions(&mut swarm), (0, 0), "nobody is asked");
        said(&mut swarm, at(6), OTHER, Message::Want(wants(content, 2)));
        assert_eq!(actions(&mut swarm).0, 1, "unless the other itself does not know that it is home");
    }

    /// Two settled nodes, this one home of a stripe whose table it has, and a third that has only just come.
    fn home_that_a_newcomer_knows() -> (Swarm, ContentKey, NodeId) {
        let (mut swarm, content) = home_of_one_stripe(64);
        let third = NodeId([3; 16]);
        let members = vec![member(ME), member(OTHER), Member { settled: false, ..member(third) }];
        swarm.handle_event(at(1), Event::Members { members, synced: true });
        answer(&mut swarm, at(2), content);
        actions(&mut swarm);
        (swarm, content, third)
    }

    /// Who is home by the tables that are sent, and to whom they are.
    fn homes_told(swarm: &mut Swarm) -> Vec<(NodeId, NodeId)> {
        let actions = std::iter::from_fn(|| swarm.poll_action());
        let told = actions.filter_map(|action| match action {
            Action::Send { to, message: Message::Table(table) } => Some((to, table.home)),
            _ => None,
        });
        told.collect()
    }

    #[test]
    fn whoever_was_told_that_a_node_is_home_is_told_when_it_is_no_longer() {
        let (mut swarm, content, third) = home_that_a_newcomer_knows();
        said(&mut swarm, at(3), third, Message::Ask(Ask { content, stripe: StripeIndex(0) }));
        assert_eq!(homes_told(&mut swarm), [(third, ME)]);
        let table = Table { content, stripe: StripeIndex(0), home: OTHER, rows: Vec::new() };
        said(&mut swarm, at(4), OTHER, Message::Table(table));
        assert_eq!(homes_told(&mut swarm), [(third, OTHER)]);
    }

    #[test]
    fn nobody_is_sent_to_a_node_that_left_what_was_left_to_it() {
        let (mut swarm, content, third) = home_that_a_newcomer_knows();
        let table = |home| Message::Table(Table { content, stripe: StripeIndex(0), home, rows: Vec::new() });
        said(&mut swarm, at(3), OTHER, table(OTHER));
        actions(&mut swarm);
        let before = swarm.stats().redirects;
        said(&mut swarm, at(4), third, Message::Want(wants(content, 2)));
        assert_eq!((actions(&mut swarm).0, swarm.stats().redirects - before), (0, 1));
        said(&mut swarm, at(5), OTHER, table(third));
        said(&mut swarm, at(6), third, Message::Want(wants(content, 2)));
        assert_eq!((actions(&mut swarm).0, swarm.stats().redirects - before), (1, 1), "it asks anew");
    }

    #[test]
    fn two_nodes_do_not_leave_a_stripe_to_each_other() {
        let (mut swarm, content, third) = home_that_a_newcomer_knows();
        let table = |node, home| {
            let rows = vec![TableRow { node, have: 1, pulling: 0, leased: 0 }];
            Message::Table(Table { content, stripe: StripeIndex(0), home, rows })
        };
        said(&mut swarm, at(3), OTHER, table(OTHER, OTHER));
        said(&mut swarm, at(4), third, table(third, ME));
        homes_told(&mut swarm);
        // The other has the stripe and yet asks: it has not heard of what was before it.
        said(&mut swarm, at(5), OTHER, Message::Ask(Ask { content, stripe: StripeIndex(0) }));
        assert_eq!(homes_told(&mut swarm), [(OTHER, OTHER)]);
        let before = swarm.stats().redirects;
        said(&mut swarm, at(6), third, Message::Want(wants(content, 2)));
        assert_eq!((actions(&mut swarm).0, swarm.stats().redirects - before), (0, 1), "and is home still");
    }

    #[test]
    fn of_two_whose_claims_cross_the_higher_rank_stays_home() {
        for (claimed_at, stays) in [(5, true), (500, false)] {
            // It ranks above the other, and has asked it.
            let (mut swarm, content) = home_of_one_stripe(64);
            said(&mut swarm, at(4), OTHER, Message::Ask(Ask { content, stripe: StripeIndex(0) }));
            assert_eq!(homes_told(&mut swarm), [(OTHER, ME)]);
            let rows = vec![TableRow { node: OTHER, have: 1, pulling: 0, leased: 0 }];
            let table = Table { content, stripe: StripeIndex(0), home: OTHER, rows };
            said(&mut swarm, at(claimed_at), OTHER, Message::Table(table));
            swarm.handle_timeout(at(claimed_at + 100));
            assert_eq!(actions(&mut swarm).1 > 0, stays, "said after {claimed_at} ms");
        }
    }

    #[test]
    fn homes_that_send_a_node_to_and_fro_are_not_asked_for_ever() {
        let (mut swarm, content) = home_of_one_stripe(64);
        // Longer than a requester waits before it repeats itself.
        swarm.core.config.want_timeout_ms = 1_000;
        let table = |home| Message::Table(Table { content, stripe: StripeIndex(0), home, rows: Vec::new() });
        said(&mut swarm, at(3), OTHER, table(OTHER));
        let redirect = |home| Message::Redirect(Redirect { content, stripe: StripeIndex(0), home });
        said(&mut swarm, at(3), OTHER, redirect(OTHER));
        for ms in (4..8_000).step_by(10) {
            swarm.handle_timeout(at(ms));
            let actions = std::iter::from_fn(|| swarm.poll_action());
            let wants =
                actions.filter(|a| matches!(a, Action::Send { message: Message::Want(_), .. })).count();
            for _ in 0..wants {
                said(&mut swarm, at(ms + 1), OTHER, redirect(ME));
            }
        }
        assert!(swarm.stats().leases > 0, "it takes the stripe itself in the end");
    }

    #[test]
    fn a_silent_home_is_passed_over_however_often_it_is_asked() {
        let (mut swarm, content) = home_of_one_stripe(64);
        swarm.core.config.want_timeout_ms = 1_000;
        let redirect = Redirect { content, stripe: StripeIndex(0), home: OTHER };
        said(&mut swarm, at(3), OTHER, Message::Redirect(redirect));
        for ms in (4..1_500).step_by(10) {
            swarm.handle_timeout(at(ms));
        }
        assert_eq!(swarm.stats().want_timeouts, 1);
    }

    #[test]
    fn a_home_that_died_unnoticed_is_replaced_by_what_all_others_know() {
        let mut swarm = Swarm::new(ME, Config::default(), 1);
        let nodes: Vec<NodeId> = (1..=8).map(|n| NodeId([n; 16])).collect();
        let members = || nodes.iter().copied().map(member).collect();
        swarm.handle_event(at(0), Event::Members { members: members(), synced: true });
        let key = |n| StripeKey { content: ContentKey([n; 32]), stripe: StripeIndex(0) };
        let content = (0..=255).map(key).find(|key| swarm.core.view.home(*key) == ME).unwrap().content;
        let want = Want { suspects: vec![OTHER], ..wants(content, 1) };
        said(&mut swarm, at(10_000), NodeId([3; 16]), Message::Want(want));
        let asked = |swarm: &mut Swarm, now| {
            swarm.handle_timeout(now);
            let mut asked = BTreeSet::new();
            while let Some(action) = swarm.poll_action() {
                if let Action::Send { to, message: Message::Ask(_) } = action {
                    asked.insert(to);
                }
            }
            asked.len()
        };
        assert_eq!(asked(&mut swarm, at(10_000)), 3);
        assert_eq!(asked(&mut swarm, at(11_300)), 7);
    }

    #[test]
    fn a_lone_node_whose_transfers_are_as_good_as_done_takes_one_more_lease() {
        let mut swarm = Swarm::new(ME, Config::default(), 1);
        swarm.handle_event(at(0), Event::Members { members: vec![member(ME)], synced: true });
        let content = ContentKey([7; 32]);
        let layout = Layout::new(256 * 64, 64).unwrap();
        swarm.handle_event(at(0), Event::Open { content, layout, have: ChunkSet::new() });
        let wanted = ChunkSet::full(&layout);
        swarm.handle_event(at(0), Event::Demand { content, wanted, cursors: vec![ChunkIndex(0)] });
        let mut flows = Vec::new();
        let mut taken = |swarm: &mut Swarm| {
            let before = flows.len();
            while let Some(action) = swarm.poll_action() {
                if let Action::FetchFromOrigin { flow, .. } = action {
                    flows.push(flow);
                }
            }
            flows[before..].to_vec()
        };
        let first = taken(&mut swarm);
        assert_eq!(first.len(), 16);
        for flow in first {
            swarm.handle_event(at(1), Event::FlowProgress { flow, received: 60 });
        }
        assert_eq!(taken(&mut swarm).len(), 1);
    }

    #[test]
    fn leases_that_several_homes_granted_at_once_are_given_back() {
        let mut swarm = Swarm::new(ME, Config::default(), 1);
        swarm.handle_event(at(0), Event::Members { members: vec![member(ME), member(OTHER)], synced: true });
        let of_other = |n| {
            let home = |stripe| {
                swarm.core.view.home(StripeKey { content: ContentKey([n; 32]), stripe: StripeIndex(stripe) })
            };
            home(0) == OTHER && home(1) == OTHER
        };
        let content = ContentKey([(0..=255).find(|n| of_other(*n)).unwrap(); 32]);
        let layout = Layout::new(128 * 8, 8).unwrap();
        swarm.handle_event(at(0), Event::Open { content, layout, have: ChunkSet::new() });
        let wanted = ChunkSet::full(&layout);
        swarm.handle_event(at(0), Event::Demand { content, wanted, cursors: vec![ChunkIndex(60)] });
        let (mut fetched, mut released) = (0, 0);
        for stripe in [0, 1] {
            let bits = if stripe == 0 { 52..64 } else { 0..12 };
            let assignments = bits.map(|bit| Assignment { bit, source: Source::Origin }).collect();
            let answer =
                Answer { content, stripe: StripeIndex(stripe), number: 1, interested: 2, assignments };
            said(&mut swarm, at(1), OTHER, Message::Answer(answer));
        }
        swarm.handle_timeout(at(100));
        while let Some(action) = swarm.poll_action() {
            match action {
                Action::FetchFromOrigin { .. } => fetched += 1,
                Action::Send { message: Message::Want(want), .. } => released += want.ended.len(),
                _ => {}
            }
        }
        assert_eq!((fetched, released), (16, 8));
    }

    /// What this node, which reads four chunks that the other is home of, fetches when the first has come from a third that
    /// says it has two more.
    fn followed(third: &Member, interested: u16) -> Vec<(NodeId, ChunkIndex)> {
        let mut swarm = Swarm::new(ME, Config::default(), 1);
        let members = vec![member(ME), member(OTHER), third.clone()];
        swarm.handle_event(at(0), Event::Members { members, synced: true });
        let of_other = |n| swarm.home_of(ContentKey([n; 32]), StripeIndex(0)) == OTHER;
        let content = ContentKey([(0..=255).find(|n| of_other(*n)).unwrap(); 32]);
        let layout = Layout::new(4 * 8, 8).unwrap();
        swarm.handle_event(at(0), Event::Open { content, layout, have: ChunkSet::new() });
        let wanted = ChunkSet::full(&layout);
        swarm.handle_event(at(0), Event::Demand { content, wanted, cursors: vec![ChunkIndex(0)] });
        let candidates = vec![Candidate { node: third.id, complete: true }];
        let assignments = vec![Assignment { bit: 0, source: Source::Peers { candidates, digest: None } }];
        let answer = Answer { content, stripe: StripeIndex(0), number: 1, interested, assignments };
        said(&mut swarm, at(1), OTHER, Message::Answer(answer));
        let fetches = |swarm: &mut Swarm| {
            let actions = std::iter::from_fn(|| swarm.poll_action());
            let fetch = |action| match action {
                Action::FetchFromPeer { flow, peer, chunk, .. } => Some((flow, peer, chunk)),
                _ => None,
            };
            actions.filter_map(fetch).collect::<Vec<_>>()
        };
        let (flow, ..) = fetches(&mut swarm)[0];
        swarm.handle_event(at(2), Event::SourceHolds { flow, also: vec![(StripeIndex(0), 0b1101)] });
        let attestation = Attestation { digest: ChunkDigest([0; 32]), attester: third.id };
        swarm.handle_event(at(3), Event::FlowDone { flow, attestation, kept: true });
        fetches(&mut swarm).into_iter().map(|(_, peer, chunk)| (peer, chunk)).collect()
    }

    #[test]
    fn a_source_that_has_more_is_asked_on() {
        let third = member(NodeId([3; 16]));
        assert_eq!(followed(&third, 1_000), [(third.id, ChunkIndex(2))], "the first that a reader lacks");
        assert_eq!(followed(&third, 100), [], "the home can be asked at once");
        let elsewhere = Member { zone: Zone::new("b").unwrap(), ..third };
        assert_eq!(followed(&elsewhere, 1_000), [], "somebody in this zone may have it");
    }

    #[test]
    fn only_a_node_that_reads_says_what_else_it_has() {
        let (mut swarm, content) = home_of_one_stripe(4);
        let layout = Layout::new(4 * 8, 8).unwrap();
        let have: ChunkSet = [0, 2].map(ChunkIndex).into_iter().collect();
        swarm.handle_event(at(1), Event::Stored { content, layout, have });
        let said = |swarm: &mut Swarm| swarm.upload_requested(at(2), OTHER, content, ChunkIndex(0));
        assert_eq!(said(&mut swarm), Admission::Serve { also: vec![(StripeIndex(0), 0b101)] });
        swarm.handle_event(at(2), Event::Close { content });
        assert_eq!(said(&mut swarm), Admission::Serve { also: Vec::new() });
    }

    /// Number of the last answer to a want, and the leases in all of them.
    fn granted(swarm: &mut Swarm, now: Time, want: Want) -> (u32, u64) {
        said(swarm, now, OTHER, Message::Want(want));
        let (mut number, mut leases) = (0, 0);
        while let Some(action) = swarm.poll_action() {
            let Action::Send { to: OTHER, message: Message::Answer(answer) } = action else { continue };
            number = answer.number;
            let origin = answer.assignments.iter().filter(|given| given.source == Source::Origin);
            leases |= origin.fold(0, |bits, given| bits | 1 << given.bit);
        }
        (number, leases)
    }

    #[test]
    fn a_want_that_a_later_one_overtook_ends_no_lease() {
        let (mut swarm, content) = home_of_one_stripe(64);
        answer(&mut swarm, at(3), content);
        let (first, some) = granted(&mut swarm, at(10), Want { grants: 16, ..wants(content, u64::MAX) });
        let early = Want { grants: 16, leased: some, seen: first, number: 1, ..wants(content, !some) };
        let (second, more) = granted(&mut swarm, at(20), early.clone());
        let leased = some | more;
        let late = Want { leased, seen: second, number: 2, ..wants(content, !leased) };
        granted(&mut swarm, at(30), late);
        let leases = swarm.stats().leases;
        granted(&mut swarm, at(31), early);
        assert!(more != 0 && swarm.stats().leases == leases);
    }

    #[test]
    fn a_lease_given_back_late_ends_no_other() {
        let (mut swarm, content) = home_of_one_stripe(64);
        answer(&mut swarm, at(3), content);
        let (first, some) = granted(&mut swarm, at(10), Want { grants: 1, ..wants(content, u64::MAX) });
        let bit = u8::try_from(some.trailing_zeros()).unwrap();
        let ended = vec![LeaseEnd::Released { bit }];
        let late = Want { grants: 1, seen: first, number: 1, ended, ..wants(content, u64::MAX) };
        let next = Want { grants: 1, seen: first, number: 2, ..wants(content, u64::MAX) };
        assert_eq!(granted(&mut swarm, at(20), next).1, some, "it is granted again");
        let leases = swarm.stats().leases;
        granted(&mut swarm, at(21), late);
        assert_eq!(swarm.stats().leases, leases);
    }
}

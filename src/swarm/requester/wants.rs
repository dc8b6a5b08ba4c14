//! The conversation with homes: when a want is sent, and what an answer does.
//!
//! A want goes out when this node needs something that its home does not know of, at most one per stripe and
//! interval; mere news of what arrived waits longer and usually travels with the next need.

use std::time::Duration;

use super::Requester;
use super::content::{Asking, Content, Status, Window};
use crate::content::{ChunkIndex, ContentKey, NodeId, StripeIndex};
use crate::swarm::core::{Core, millis};
use crate::swarm::event::Action;
use crate::swarm::time::Time;
use crate::swarm::timers::Timer;
use crate::swarm::view::{Evidence, StripeKey};
use crate::wire::{Answer, LeaseEnd, LeaseRef, MAX_LEASES, MAX_SUSPECTS, Message, Source, Want};

/// News that nobody waits for may wait this many intervals.
const LAZY_INTERVALS: u32 = 8;
/// A home whose last answer is still to come has more to do than it can: it is asked so many times more seldom, so that what
/// waits there does not grow. It is asked all the same before the deadline: the answer may be lost.
const BEHIND_INTERVALS: u32 = 4;
/// A requester that waits repeats itself this often: the home's reply says that it is alive and on it.
const RENEW: Duration = Duration::from_millis(500);
/// A flow of which this share is here frees its room: the next assignment takes a round trip to come.
const NEARLY_DONE: (u64, u64) = (7, 8);

impl Asking {
    /// Whom the last want went to, or the next goes to.
    pub(super) fn current_home(&self) -> Option<NodeId> {
        self.redirect.or(self.home).map(|(_, home)| home)
    }

    /// Somebody said who is home: it knows nothing of this node.
    pub(super) fn move_to(&mut self, home: NodeId, epoch: u64) {
        self.redirect = Some((epoch, home));
        self.forget_told();
    }

    fn forget_told(&mut self) {
        self.told = Status::default();
        self.sent = None;
        self.deadline = None;
        self.seen = 0;
        self.wants = 0;
    }

    /// The home by the present view; starts afresh with a new one.
    fn settle_home(&mut self, core: &Core, key: StripeKey) -> NodeId {
        let epoch = core.view.epoch();
        let before = self.current_home();
        if self.redirect.is_some_and(|(at, _)| at != epoch) {
            self.redirect = None;
        }
        if self.home.is_none_or(|(at, _)| at != epoch) {
            self.home = Some((epoch, core.view.home(key)));
        }
        let home = self.current_home().unwrap_or(core.me);
        if before.is_some_and(|before| before != home) {
            self.forget_told();
        }
        home
    }

    /// When the next want is due: now, later, or not before something changes.
    fn due(&self, core: &Core, status: &Status, home: NodeId, interval: Duration) -> Option<Time> {
        let interval = if self.deadline.is_some() { interval * BEHIND_INTERVALS } else { interval };
        let after = |wait: Duration| self.sent.map_or(core.now, |sent| sent + wait);
        let reported = !self.ended.is_empty() || !self.failures.is_empty();
        let news = reported || status.is_news(&self.told) || self.early & status.begun() != 0;
        if news {
            let alone = home == core.me && core.view.is_alone();
            return Some(after(if alone { Duration::ZERO } else { interval }));
        }
        let lazy = status.differs(&self.told).then(|| after(interval * LAZY_INTERVALS));
        let renew = (status.want != 0).then(|| after(RENEW));
        [lazy, renew, self.deadline].into_iter().flatten().min()
    }
}

impl Requester {
    /// Sends the wants of a content that are due, and sets timers for those that will be.
    pub(super) fn refresh(&mut self, core: &mut Core, key: ContentKey) {
        let Some(content) = self.contents.get(&key) else { return };
        if !content.open && content.asking.is_empty() {
            return;
        }
        let windows = content.windows(core.config.window(content.crowd));
        let room = self.room(core, key);
        let grants = self.grants(core, key);
        let Some(content) = self.contents.get_mut(&key) else { return };
        content.note_head(core.now, windows.first());
        for (stripe, _) in &windows {
            content.asking.entry(*stripe).or_default();
        }
        let mut room_left = room;
        let windowless = content.asking.keys().filter(|stripe| !windows.iter().any(|(w, _)| w == *stripe));
        let rest: Vec<_> = windowless.map(|stripe| (*stripe, Window::default())).collect();
        for (stripe, window) in windows.into_iter().chain(rest) {
            let mut status = content.status(stripe, window);
            if status.want != 0 {
                (status.room, status.grants) = (room_left, grants);
                room_left -= content.promised(stripe, &status);
            }
            content.converse(core, StripeKey { content: key, stripe }, status);
        }
        if content.is_hungry() || !content.flights.is_empty() {
            core.timers.set_by(Timer::Content(key), core.now + super::deadlines::WATCH_INTERVAL);
        } else if !content.open {
            self.put_away(core, key);
        }
    }

    pub(crate) fn on_answer(&mut self, core: &mut Core, from: NodeId, answer: Answer) {
        let key = answer.content;
        let Some(content) = self.contents.get_mut(&key) else { return };
        content.vouched = core.now;
        let Some(asking) = content.asking.get_mut(&answer.stripe) else { return };
        if asking.current_home() == Some(from) {
            if answer.number <= asking.seen {
                // Overtaken by a later one: the home was told that what this one brings is lost.
                core.stats.messages_ignored += 1;
                return;
            }
            asking.seen = answer.number;
            asking.deadline = None;
            asking.hops = 0;
            content.interested = answer.interested.max(1);
            content.crowd = content.crowd.max(content.interested);
        }
        for assignment in answer.assignments {
            let chunk = answer.stripe.chunk(u32::from(assignment.bit));
            self.accept(core, key, chunk, assignment.source);
        }
        self.refresh(core, key);
    }

    /// The lease was given to another: ask again where to get the chunk.
    pub(crate) fn on_revoke(&mut self, core: &mut Core, revoked: LeaseRef) {
        let chunk = revoked.stripe.chunk(u32::from(revoked.bit));
        let Some(content) = self.contents.get(&revoked.content) else { return };
        let Some(flight) = content.flights.get(&chunk).copied().filter(|flight| flight.from_origin) else {
            return;
        };
        self.remove_flow(flight.flow);
        core.act(Action::Cancel { flow: flight.flow });
        self.fill_room(core);
        self.refresh(core, revoked.content);
    }

    fn accept(&mut self, core: &mut Core, key: ContentKey, chunk: ChunkIndex, source: Source) {
        let takes_lease = self.takes_lease(core, key);
        let Some(content) = self.contents.get_mut(&key) else { return };
        let wanted = content.is_wanted(chunk);
        let flight = content.flights.get(&chunk).copied();
        let Some(asking) = content.asking.get_mut(&chunk.stripe()) else { return };
        let leased = source == Source::Origin;
        if !wanted {
            if leased && flight.is_none_or(|flight| !flight.from_origin) {
                asking.end(LeaseEnd::Released { bit: bit_of(chunk) });
            }
            return;
        }
        asking.told.assigned(chunk, leased);
        if leased && !takes_lease {
            // Each home was told of all the room there is, and several granted at once.
            asking.end(LeaseEnd::Released { bit: bit_of(chunk) });
            return;
        }
        match flight {
            Some(flight) if leased && !flight.from_origin => {
                self.remove_flow(flight.flow);
                core.act(Action::Cancel { flow: flight.flow });
            }
            Some(_) => return,
            None => {}
        }
        if let Some(content) = self.contents.get_mut(&key) {
            content.queued.remove(&chunk);
        }
        self.start_or_queue(core, key, chunk, source);
    }

    /// Assignments this content can start now.
    fn room(&self, core: &Core, key: ContentKey) -> u8 {
        let Some(content) = self.contents.get(&key) else { return 0 };
        let started =
            self.free_bytes(core, content) / content.chunk_bytes() + self.nearly_done(content, false);
        let room = started.saturating_sub(content.queued.len() as u64);
        let starved = room == 0 && content.flights.is_empty() && content.queued.is_empty();
        u8::try_from(room.min(64)).unwrap_or(64).max(u8::from(starved))
    }

    /// Whether a transfer of this content can be started now at the cost of no other content.
    pub(super) fn has_room(&self, core: &Core, key: ContentKey) -> bool {
        self.contents.get(&key).is_some_and(|content| self.free_bytes(core, content) >= content.chunk_bytes())
    }

    /// Bytes that this content may still have in the air. Contents that are read at the same time share what is left.
    fn free_bytes(&self, core: &Core, content: &Content) -> u64 {
        let open = self.opened().map(|(_, content)| content);
        let hungry: Vec<&Content> = open.filter(|content| content.is_hungry()).collect();
        let share = core.config.inflight_bytes / (hungry.len() as u64).max(1);
        let free = core.config.inflight_bytes.saturating_sub(self.inflight_bytes);
        let reserved: u64 = hungry
            .iter()
            .filter(|other| !std::ptr::eq(**other, content))
            .map(|other| share.saturating_sub(other.inflight_bytes))
            .sum();
        let own_share = share.saturating_sub(content.inflight_bytes).min(free);
        free.saturating_sub(reserved).max(own_share)
    }

    /// How many leases this content can take now.
    fn grants(&self, core: &Core, key: ContentKey) -> u8 {
        let Some(content) = self.contents.get(&key) else { return 0 };
        if core.now < content.origin_after {
            return 0;
        }
        let fair = core.config.origin_flows_per_content / u32::from(content.interested.max(1));
        let mut limit = fair.min(core.config.origin_flows).max(1);
        let mut of_node = core.config.origin_flows;
        if content.interested > 1 {
            // The other half of the room, over all contents, is for what the others fetch.
            let slots = core.config.inflight_bytes / content.chunk_bytes();
            of_node = of_node.min(u32::try_from(slots / 2).unwrap_or(u32::MAX).max(1));
            limit = limit.min(of_node);
        }
        let flights = self.running_leases(content);
        let node = u64::from(of_node.saturating_sub(self.origin_flows)).max(u64::from(flights == 0));
        let free = u64::from(limit).saturating_sub(flights).min(node);
        u8::try_from(free.min(64)).unwrap_or(64)
    }

    /// Whether a lease can be started: always where [`Self::grants`] offers room for one, or it would be given back and
    /// granted again for ever.
    fn takes_lease(&self, core: &Core, key: ContentKey) -> bool {
        let is_full = self.origin_flows >= core.config.origin_flows;
        !is_full || self.contents.get(&key).is_some_and(|content| self.running_leases(content) == 0)
    }

    /// Transfers from the origin, but for those that are as good as done.
    fn running_leases(&self, content: &Content) -> u64 {
        let flights = content.flights.values().filter(|flight| flight.from_origin).count() as u64;
        flights.saturating_sub(self.nearly_done(content, true))
    }

    fn nearly_done(&self, content: &Content, origin_only: bool) -> u64 {
        let flights = content.flights.values().filter(|flight| flight.from_origin || !origin_only);
        let flows = flights.filter_map(|flight| self.flows.get(&flight.flow));
        flows.filter(|flow| is_nearly_done(flow.received, flow.len)).count() as u64
    }
}

impl Content {
    /// Sends this stripe's want if it is due, and otherwise sets the timer for it.
    fn converse(&mut self, core: &mut Core, key: StripeKey, status: Status) {
        let interested = self.interested;
        let closing = !self.open;
        let Some(asking) = self.asking.get_mut(&key.stripe) else { return };
        if asking.deadline.is_some_and(|deadline| deadline <= core.now) {
            asking.deadline = None;
            asking.hops = 0;
            core.stats.want_timeouts += 1;
            if let Some(home) = asking.current_home() {
                core.suspect(home, Evidence::Mute);
            }
        }
        let home = asking.settle_home(core, key);
        let interval = core.config.want_interval(interested);
        let parting = closing && (status.differs(&asking.told) || !asking.ended.is_empty());
        let due = if parting { Some(core.now) } else { asking.due(core, &status, home, interval) };
        match due {
            Some(due) if due <= core.now => {
                // What is only repeated does not put off the deadline of what it repeats, nor does a home that only names
                // others.
                let repeats = status == asking.told || asking.hops > super::MAX_HOPS;
                let want = asking.want(core, key, status);
                let overdue = core.now + millis(core.config.want_timeout_ms);
                let pending = asking.deadline.filter(|_| repeats);
                let waits = want.want != 0 && home != core.me;
                asking.deadline = waits.then(|| pending.unwrap_or(overdue));
                core.stats.wants += 1;
                core.send(home, Message::Want(want));
                let next = asking.deadline.unwrap_or(core.now + RENEW);
                core.timers.set(Timer::Want(key), next);
            }
            Some(due) => core.timers.set(Timer::Want(key), due),
            None => core.timers.cancel(Timer::Want(key)),
        }
    }

    /// Room that this stripe's home is likely to use. One that has us wait already will not.
    fn promised(&self, stripe: StripeIndex, status: &Status) -> u8 {
        let waits = self.asking.get(&stripe).is_some_and(|asking| {
            asking.sent.is_some() && asking.deadline.is_none() && asking.told.want == status.want
        });
        if waits {
            return 0;
        }
        let wanted = u8::try_from(status.want.count_ones()).unwrap_or(u8::MAX);
        wanted.min(status.room)
    }

    /// Remembers since when the first chunk that a reader misses has been missed. Without a reader none is: the rarest
    /// come first, and the first of a content may well be the last to come.
    fn note_head(&mut self, now: Time, first: Option<&(StripeIndex, Window)>) {
        let head = first
            .filter(|(_, window)| window.urgent != 0)
            .map(|(stripe, window)| stripe.chunk(window.urgent.trailing_zeros()));
        if self.head.map(|(chunk, _)| chunk) != head {
            self.head = head.map(|chunk| (chunk, now));
        }
    }
}

impl Asking {
    fn want(&mut self, core: &Core, key: StripeKey, status: Status) -> Want {
        self.told = status;
        self.early &= !status.begun();
        self.sent = Some(core.now);
        let number = self.wants;
        self.wants = self.wants.wrapping_add(1);
        Want {
            content: key.content,
            stripe: key.stripe,
            want: status.want,
            urgent: status.urgent,
            have: status.have,
            pulling: status.pulling,
            queued: status.queued,
            leased: status.leased,
            room: status.room,
            grants: status.grants,
            seen: self.seen,
            number,
            suspects: core.view.suspects_for(key, MAX_SUSPECTS),
            failures: std::mem::take(&mut self.failures),
            ended: std::mem::take(&mut self.ended),
        }
    }

    /// Tells the home with the next want; more than a stripe has chunks can only be repetitions.
    pub(super) fn end(&mut self, end: LeaseEnd) {
        if self.ended.len() < MAX_LEASES {
            self.ended.push(end);
        }
    }

    pub(super) fn complain(&mut self, failure: crate::wire::Failure) {
        if self.failures.len() < MAX_LEASES {
            self.failures.push(failure);
        }
    }
}

impl Status {
    /// What the home's books say after it assigned a chunk.
    const fn assigned(&mut self, chunk: ChunkIndex, leased: bool) {
        let bit = 1 << chunk.bit();
        self.want &= !bit;
        self.urgent &= !bit;
        self.room = self.room.saturating_sub(1);
        if leased {
            self.leased |= bit;
            self.pulling &= !bit;
            self.grants = self.grants.saturating_sub(1);
        } else {
            self.pulling |= bit;
        }
    }
}

pub(super) fn is_nearly_done(received: u32, len: u32) -> bool {
    u64::from(received) * NEARLY_DONE.1 >= u64::from(len) * NEARLY_DONE.0
}

pub(super) fn bit_of(chunk: ChunkIndex) -> u8 {
    u8::try_from(chunk.bit()).unwrap_or(0)
}

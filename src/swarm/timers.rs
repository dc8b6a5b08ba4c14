//! Deadlines of the machine: at most one per purpose, so their number is bounded by what they are for.

use std::collections::{BTreeMap, BTreeSet};

use super::time::Time;
use super::view::StripeKey;
use crate::content::ContentKey;

/// What a deadline is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    /// A want may be sent, or its answer is overdue.
    Want(StripeKey),
    /// Look after the flows and the progress of an open content.
    Content(ContentKey),
    /// As a home: serve those who wait, look after leases.
    Stripe(StripeKey),
    /// Send the next announcements.
    Announce,
}

#[derive(Debug, Default)]
pub(crate) struct Timers {
    due: BTreeMap<Timer, Time>,
    queue: BTreeSet<(Time, Timer)>,
}

impl Timers {
    /// Sets the deadline, replacing the previous one.
    pub(crate) fn set(&mut self, timer: Timer, at: Time) {
        if let Some(before) = self.due.insert(timer, at) {
            self.queue.remove(&(before, timer));
        }
        self.queue.insert((at, timer));
    }

    /// Sets the deadline unless an earlier one is set.
    pub(crate) fn set_by(&mut self, timer: Timer, at: Time) {
        if self.due.get(&timer).is_none_or(|before| at < *before) {
            self.set(timer, at);
        }
    }

    pub(crate) fn cancel(&mut self, timer: Timer) {
        if let Some(at) = self.due.remove(&timer) {
            self.queue.remove(&(at, timer));
        }
    }

    pub(crate) fn next(&self) -> Option<Time> {
        self.queue.first().map(|(at, _)| *at)
    }

    /// Takes out a deadline that has passed.
    pub(crate) fn pop_due(&mut self, now: Time) -> Option<Timer> {
        let (at, timer) = *self.queue.first()?;
        (at <= now).then(|| {
            self.cancel(timer);
            timer
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_comes_first_and_once() {
        let mut timers = Timers::default();
        let content = Timer::Content(ContentKey([1; 32]));
        timers.set(Timer::Announce, Time(5));
        timers.set(content, Time(3));
        timers.set_by(Timer::Announce, Time(9));
        assert_eq!(timers.next(), Some(Time(3)));
        timers.set_by(Timer::Announce, Time(2));
        assert_eq!(timers.pop_due(Time(4)), Some(Timer::Announce));
        assert_eq!(timers.pop_due(Time(4)), Some(content));
        assert_eq!(timers.pop_due(Time(9)), None);
    }
}

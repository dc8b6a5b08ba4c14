//! foca's timers, by time.

use std::collections::BTreeMap;

use foca::Timer;

use crate::swarm::Time;

use super::NodeIdentity;

/// Bounded by foca: a handful of periodic timers, and one or two per suspected or dead member.
#[derive(Default)]
pub(super) struct Timers {
    queue: BTreeMap<(Time, u64), Timer<NodeIdentity>>,
    pushed: u64,
}

impl Timers {
    pub(super) fn push(&mut self, at: Time, timer: Timer<NodeIdentity>) {
        self.pushed += 1;
        self.queue.insert((at, self.pushed), timer);
    }

    pub(super) fn pop_due(&mut self, now: Time) -> Option<Timer<NodeIdentity>> {
        let entry = self.queue.first_entry()?;
        (entry.key().0 <= now).then(|| entry.remove())
    }

    pub(super) fn next(&self) -> Option<Time> {
        self.queue.first_key_value().map(|((at, _), _)| *at)
    }
}

//! How many origin fetches of one content a home lets run, over all its stripes.
//!
//! Additive increase, multiplicative decrease: an origin that asks to slow down is asked half as much at once, and
//! one more with each success.

use std::time::Duration;

use crate::swarm::time::Time;

/// Pause after the origin said 429 or 503; doubled with each in a row.
const PAUSE: Duration = Duration::from_millis(100);
/// Doublings of the pause: 6.4 s, after which readers' own deadlines decide.
const MAX_DOUBLINGS: u32 = 6;

#[derive(Debug)]
pub(super) struct Budget {
    /// Leases now.
    pub(super) leases: u32,
    limit: u32,
    ceiling: u32,
    throttled_in_a_row: u32,
    paused_until: Time,
}

impl Budget {
    /// Starts at half the ceiling: two homes are usually busy at a time, because windows straddle stripes.
    pub(super) fn new(ceiling: u32) -> Self {
        let ceiling = ceiling.max(1);
        Self {
            leases: 0,
            limit: ceiling.div_ceil(2),
            ceiling,
            throttled_in_a_row: 0,
            paused_until: Time::default(),
        }
    }

    pub(super) fn has_room(&self, now: Time) -> bool {
        self.leases < self.limit && now >= self.paused_until
    }

    pub(super) const fn paused_until(&self) -> Time {
        self.paused_until
    }

    pub(super) fn succeeded(&mut self) {
        self.limit = (self.limit + 1).min(self.ceiling);
        self.throttled_in_a_row = 0;
    }

    pub(super) fn throttled(&mut self, now: Time) {
        if now < self.paused_until {
            // The others of the same burst: one signal.
            return;
        }
        self.limit = (self.limit / 2).max(1);
        self.paused_until = now + PAUSE * (1 << self.throttled_in_a_row.min(MAX_DOUBLINGS));
        self.throttled_in_a_row += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_once_per_burst_and_recovers() {
        let mut budget = Budget::new(64);
        for _ in 0..10 {
            budget.throttled(Time(1));
        }
        assert!(!budget.has_room(Time(50_000)));
        let later = Time(200_000);
        budget.leases = 15;
        assert!(budget.has_room(later));
        budget.leases = 16;
        assert!(!budget.has_room(later));
        budget.succeeded();
        assert!(budget.has_room(later));
    }
}

//! The swarm's time: that in which this process ran.
//!
//! A deadline says how long an answer may take to come; while nobody is there to take it, it does not pass. After a
//! SIGSTOP, a frozen cgroup or a suspended machine all deadlines would otherwise be over at once, before the first of
//! the answers that wait in the sockets is read, and everything would be asked for again, from the origin at last.
//! Refuses to say what a sleep means: the swarm is told of it.

use std::time::{Duration, Instant};

use crate::swarm::Time;

/// A look that comes so much later than it should means that the process did not run: far above what a busy machine has
/// been seen to do, hundreds of milliseconds, and below the patience of others with a home.
const OVERSLEPT: Duration = Duration::from_secs(1);

pub(super) struct Clock {
    started: Instant,
    looked: Instant,
    slept: Duration,
    interval: Duration,
}

impl Clock {
    /// Whoever makes it looks at it at least every `interval`.
    pub(super) fn new(interval: Duration) -> Self {
        let now = Instant::now();
        Self { started: now, looked: now, slept: Duration::ZERO, interval }
    }

    /// Says how long the process has slept since the last look, if it has.
    pub(super) fn look(&mut self, now: Instant) -> Option<Duration> {
        let gap = now.saturating_duration_since(self.looked);
        self.looked = now;
        let slept = gap.checked_sub(self.interval).filter(|slept| *slept > OVERSLEPT)?;
        self.slept += slept;
        Some(slept)
    }

    /// As of the last look.
    pub(super) fn time(&self) -> Time {
        let ran = self.looked.saturating_duration_since(self.started + self.slept);
        Time(u64::try_from(ran.as_micros()).unwrap_or(u64::MAX))
    }

    /// When it will be `time`, unless the process sleeps.
    pub(super) fn instant(&self, time: Time) -> Instant {
        self.started + self.slept + Duration::from_micros(time.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_nothing_ran_does_not_pass() {
        let mut clock = Clock::new(Duration::from_secs(1));
        let start = clock.started;
        let after = |ms: u64| start + Duration::from_millis(ms);
        assert_eq!(clock.look(after(1_900)), None, "a busy machine");
        assert_eq!(clock.time(), Time(1_900_000));
        assert_eq!(clock.look(after(9_900)), Some(Duration::from_secs(7)));
        assert_eq!(clock.time(), Time(2_900_000));
        assert_eq!(clock.instant(Time(3_000_000)), after(10_000));
        assert_eq!(clock.look(after(10_000)), None);
        assert_eq!(clock.time(), Time(3_000_000));
    }
}

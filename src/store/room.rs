//! How many bytes may still be stored: the budget, and the floor of free space on the file system.
//!
//! Invariant: stored and reserved bytes never exceed the budget, and a reservation is granted only if the file
//! system stays above the floor once every reservation is written. Pure arithmetic; who is evicted is decided in
//! `catalog`.

use parking_lot::Mutex;

use super::Usage;
use super::metrics::Metrics;

/// The account of a store's bytes.
#[derive(Debug)]
pub(super) struct Room {
    budget: u64,
    free_floor: u64,
    used: Mutex<Used>,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct Used {
    stored: u64,
    reserved: u64,
}

/// What stands in the way of a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shortage {
    /// More would be stored than allowed.
    Budget,
    /// The file system would be fuller than allowed.
    Floor,
}

/// Bytes that are about to be written; dropping it gives them back.
#[derive(Debug)]
pub(super) struct Reservation<'a> {
    room: &'a Room,
    bytes: u64,
}

impl Room {
    pub(super) fn new(budget: u64, free_floor: u64, metrics: Metrics) -> Self {
        metrics.budget_bytes.set(budget);
        Self { budget, free_floor, used: Mutex::default(), metrics }
    }

    /// Grants `bytes`, given that the file system has `free` left now.
    pub(super) fn reserve(&self, bytes: u64, free: u64) -> Result<Reservation<'_>, Shortage> {
        let mut used = self.used.lock();
        if used.stored.saturating_add(used.reserved).saturating_add(bytes) > self.budget {
            return Err(Shortage::Budget);
        }
        if free.saturating_sub(used.reserved).saturating_sub(bytes) < self.free_floor {
            return Err(Shortage::Floor);
        }
        used.reserved += bytes;
        Ok(Reservation { room: self, bytes })
    }

    /// Counts bytes found on disk at the start.
    pub(super) fn add_stored(&self, bytes: u64) {
        let mut used = self.used.lock();
        used.stored += bytes;
        self.metrics.bytes.set(used.stored);
    }

    /// Bytes that are gone from the disk, or as good as.
    pub(super) fn release_stored(&self, bytes: u64) {
        let mut used = self.used.lock();
        used.stored = used.stored.saturating_sub(bytes);
        self.metrics.bytes.set(used.stored);
    }

    pub(super) fn is_over_budget(&self) -> bool {
        self.used.lock().stored > self.budget
    }

    pub(super) fn usage(&self) -> Usage {
        let stored_bytes = self.used.lock().stored;
        Usage { stored_bytes, budget_bytes: self.budget, free_floor_bytes: self.free_floor }
    }
}

impl Reservation<'_> {
    /// The bytes are written: from now on they are stored.
    pub(super) fn commit(self) {
        self.room.add_stored(self.bytes);
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.room.used.lock().reserved -= self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservations_count_against_both_bounds() {
        let room = Room::new(100, 10, Metrics::default());
        room.add_stored(50);
        assert_eq!(room.reserve(51, 1_000).unwrap_err(), Shortage::Budget);
        assert_eq!(room.reserve(20, 29).unwrap_err(), Shortage::Floor);
        let first = room.reserve(20, 30).unwrap();
        assert_eq!(room.reserve(20, 49).unwrap_err(), Shortage::Floor);
        assert_eq!(room.reserve(31, 1_000).unwrap_err(), Shortage::Budget);
        first.commit();
        assert_eq!(room.usage().stored_bytes, 70);
        drop(room.reserve(30, 1_000).unwrap());
        drop(room.reserve(30, 1_000).unwrap());
        room.release_stored(70);
        assert_eq!((room.usage().stored_bytes, room.used.lock().reserved), (0, 0));
    }
}

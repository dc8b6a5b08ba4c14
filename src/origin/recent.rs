//! A small memory of the latest entries, for answers that are dear to ask for again and cheap to lose.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// At most `capacity` entries; the one inserted longest ago is forgotten first.
#[derive(Debug)]
pub struct Recent<K, V> {
    capacity: usize,
    entries: HashMap<K, (u64, V)>,
    order: VecDeque<(u64, K)>,
    insertions: u64,
}

impl<K: Clone + Eq + Hash, V> Recent<K, V> {
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { capacity, entries: HashMap::new(), order: VecDeque::new(), insertions: 0 }
    }

    #[must_use]
    pub fn get(&self, key: &K) -> Option<&V> {
        self.entries.get(key).map(|(_, value)| value)
    }

    /// Remembers, and forgets the oldest when there are too many.
    pub fn insert(&mut self, key: K, value: V) {
        self.insertions += 1;
        self.order.push_back((self.insertions, key.clone()));
        self.entries.insert(key, (self.insertions, value));
        // Entries replaced or removed leave their place in the order behind, hence the second condition.
        while self.entries.len() > self.capacity || self.order.len() > 2 * self.capacity {
            let Some((inserted, oldest)) = self.order.pop_front() else { return };
            if self.entries.get(&oldest).is_some_and(|(latest, _)| *latest == inserted) {
                self.entries.remove(&oldest);
            }
        }
    }

    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Forgets the entries that `keeps` does not hold for.
    pub fn retain(&mut self, mut keeps: impl FnMut(&V) -> bool) {
        self.entries.retain(|_, (_, value)| keeps(value));
    }

    pub fn remove(&mut self, key: &K) -> Option<V> {
        self.entries.remove(key).map(|(_, value)| value)
    }

    /// The value for `key`, made by `make` when there is none.
    pub fn get_or_insert_with(&mut self, key: &K, make: impl FnOnce() -> V) -> V
    where
        V: Clone,
    {
        if let Some(value) = self.get(key) {
            return value.clone();
        }
        let value = make();
        self.insert(key.clone(), value.clone());
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn stays_bounded_and_keeps_the_latest(ops in proptest::collection::vec((0u8..20, any::<bool>()), 0..200)) {
            let mut recent = Recent::new(4);
            for (n, (key, remove)) in ops.into_iter().enumerate() {
                if remove {
                    recent.remove(&key);
                    prop_assert_eq!(recent.get(&key), None);
                } else {
                    recent.insert(key, n);
                    prop_assert_eq!(recent.get(&key), Some(&n));
                }
                prop_assert!(recent.entries.len() <= 4 && recent.order.len() <= 8);
            }
        }
    }

    #[test]
    fn the_oldest_goes_first() {
        let mut recent = Recent::new(2);
        for key in [1, 2, 1, 3] {
            recent.insert(key, key);
        }
        assert_eq!((recent.get(&1), recent.get(&2), recent.get(&3)), (Some(&1), None, Some(&3)));
    }
}

//! Something for some chunks of a stripe: a bitmap and as many values, for rows of which a table has thousands.

/// A map from a chunk's bit, 0 to 63.
#[derive(Clone, Debug)]
pub(super) struct ByBit<T> {
    bits: u64,
    /// In the order of their bits.
    values: Vec<T>,
}

impl<T> Default for ByBit<T> {
    fn default() -> Self {
        Self { bits: 0, values: Vec::new() }
    }
}

impl<T: Copy> ByBit<T> {
    /// The chunks that have a value.
    pub(super) const fn bits(&self) -> u64 {
        self.bits
    }

    pub(super) fn get(&self, bit: u8) -> Option<T> {
        self.has(bit).then(|| self.values[self.rank(bit)])
    }

    pub(super) fn set(&mut self, bit: u8, value: T) {
        let rank = self.rank(bit);
        if self.has(bit) {
            self.values[rank] = value;
        } else {
            self.values.insert(rank, value);
            self.bits |= 1 << bit;
        }
    }

    pub(super) fn take(&mut self, bit: u8) -> Option<T> {
        self.has(bit).then(|| {
            self.bits &= !(1 << bit);
            self.values.remove(self.rank(bit))
        })
    }

    const fn has(&self, bit: u8) -> bool {
        self.bits >> bit & 1 == 1
    }

    const fn rank(&self, bit: u8) -> usize {
        (self.bits & ((1 << bit) - 1)).count_ones() as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn behaves_like_a_map(ops in proptest::collection::vec((any::<bool>(), 0u8..64, any::<u32>()), 0..300)) {
            let (mut map, mut model) = (ByBit::default(), BTreeMap::new());
            for (set, bit, value) in ops {
                if set {
                    map.set(bit, value);
                    model.insert(bit, value);
                } else {
                    prop_assert_eq!(map.take(bit), model.remove(&bit));
                }
                prop_assert_eq!(map.bits(), model.keys().fold(0, |bits, bit| bits | 1 << bit));
                prop_assert!((0..64).all(|bit| map.get(bit) == model.get(&bit).copied()));
            }
        }
    }
}

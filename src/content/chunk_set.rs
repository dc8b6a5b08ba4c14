//! A set of chunk numbers, held as the stripes' bitmaps.

use serde::{Deserialize, Serialize};

use super::layout::{ChunkIndex, Layout, STRIPE_CHUNKS, StripeIndex};

/// Chunks of one content. Grows as chunks are added; membership of a chunk never added is `false`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkSet {
    stripes: Vec<u64>,
}

impl ChunkSet {
    #[must_use]
    pub const fn new() -> Self {
        Self { stripes: Vec::new() }
    }

    /// Every chunk of `layout`.
    #[must_use]
    pub fn full(layout: &Layout) -> Self {
        Self { stripes: (0..layout.stripe_count()).map(|s| layout.stripe_mask(StripeIndex(s))).collect() }
    }

    #[must_use]
    pub fn contains(&self, chunk: ChunkIndex) -> bool {
        self.stripe(chunk.stripe()) >> chunk.bit() & 1 == 1
    }

    /// `true` when the chunk was not there before.
    pub fn insert(&mut self, chunk: ChunkIndex) -> bool {
        let stripe = chunk.stripe().0 as usize;
        if self.stripes.len() <= stripe {
            self.stripes.resize(stripe + 1, 0);
        }
        let bit = 1 << chunk.bit();
        let fresh = self.stripes[stripe] & bit == 0;
        self.stripes[stripe] |= bit;
        fresh
    }

    /// `true` when the chunk was there.
    pub fn remove(&mut self, chunk: ChunkIndex) -> bool {
        let Some(word) = self.stripes.get_mut(chunk.stripe().0 as usize) else { return false };
        let bit = 1 << chunk.bit();
        let held = *word & bit != 0;
        *word &= !bit;
        held
    }

    /// Bitmap of one stripe; bit i is chunk 64 · stripe + i.
    #[must_use]
    pub fn stripe(&self, stripe: StripeIndex) -> u64 {
        self.stripes.get(stripe.0 as usize).copied().unwrap_or(0)
    }

    /// Adds the chunks of a stripe's bitmap.
    pub fn insert_stripe(&mut self, stripe: StripeIndex, bits: u64) {
        let index = stripe.0 as usize;
        if bits != 0 && self.stripes.len() <= index {
            self.stripes.resize(index + 1, 0);
        }
        if let Some(word) = self.stripes.get_mut(index) {
            *word |= bits;
        }
    }

    /// Number of chunks in the set.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.stripes.iter().map(|word| word.count_ones()).sum()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.stripes.iter().all(|word| *word == 0)
    }

    /// Whether every chunk of `layout` is in the set.
    #[must_use]
    pub fn is_full(&self, layout: &Layout) -> bool {
        (0..layout.stripe_count()).map(StripeIndex).all(|s| self.stripe(s) == layout.stripe_mask(s))
    }

    /// Length in bytes of the chunks in the set.
    #[must_use]
    pub fn bytes(&self, layout: &Layout) -> u64 {
        self.iter().map(|chunk| u64::from(layout.chunk_len(chunk))).sum()
    }

    /// The chunks, ascending.
    pub fn iter(&self) -> impl Iterator<Item = ChunkIndex> + '_ {
        self.stripes
            .iter()
            .zip(0u32..)
            .flat_map(|(word, stripe)| bits(*word).map(move |bit| ChunkIndex(stripe * STRIPE_CHUNKS + bit)))
    }
}

impl FromIterator<ChunkIndex> for ChunkSet {
    fn from_iter<I: IntoIterator<Item = ChunkIndex>>(chunks: I) -> Self {
        let mut set = Self::new();
        for chunk in chunks {
            set.insert(chunk);
        }
        set
    }
}

fn bits(mut word: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        (word != 0).then(|| {
            let bit = word.trailing_zeros();
            word &= word - 1;
            bit
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_set(ops in proptest::collection::vec((any::<bool>(), 0u32..300), 0..200)) {
            let (mut set, mut model) = (ChunkSet::new(), BTreeSet::new());
            for (add, n) in ops {
                let chunk = ChunkIndex(n);
                if add {
                    prop_assert_eq!(set.insert(chunk), model.insert(chunk));
                } else {
                    prop_assert_eq!(set.remove(chunk), model.remove(&chunk));
                }
            }
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.len() as usize, model.len());
        }
    }

    #[test]
    fn full_is_full() {
        let layout = Layout::new(1_000, 7).unwrap();
        let set = ChunkSet::full(&layout);
        assert!(set.is_full(&layout));
        assert_eq!(set.bytes(&layout), 1_000);
    }
}

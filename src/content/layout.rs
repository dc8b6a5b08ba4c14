//! How a content is cut: fixed-size chunks, and stripes of chunks that share a home.

use serde::{Deserialize, Serialize};

use super::range::ByteRange;

/// Chunks per stripe: one `u64` bitmap says all there is to say about who has what of it.
pub const STRIPE_CHUNKS: u32 = 64;

/// 8 MiB: S3 advises ranges of 8 to 16 MB, and above 8 MiB the simulated completion time of a burst grows by more
/// than 1 % (`facts/swarm.md` section 4).
pub const DEFAULT_CHUNK_BYTES: u32 = 8 << 20;

/// Position of a chunk in its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ChunkIndex(pub u32);

/// Position of a stripe in its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct StripeIndex(pub u32);

impl ChunkIndex {
    #[must_use]
    pub const fn stripe(self) -> StripeIndex {
        StripeIndex(self.0 / STRIPE_CHUNKS)
    }

    /// Bit of this chunk in its stripe's bitmap, 0 to 63.
    #[must_use]
    pub const fn bit(self) -> u32 {
        self.0 % STRIPE_CHUNKS
    }
}

impl StripeIndex {
    /// The chunk at `bit` (0 to 63) of this stripe.
    #[must_use]
    pub const fn chunk(self, bit: u32) -> ChunkIndex {
        ChunkIndex(self.0 * STRIPE_CHUNKS + bit)
    }
}

/// Size of a content and of its chunks; every chunk but the last is exactly `chunk_bytes` long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Layout {
    size: u64,
    chunk_bytes: u32,
}

/// Why a content cannot be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    #[error("chunk size must not be zero")]
    ZeroChunk,
    #[error("a content of {size} bytes has more than 2^32 chunks of {chunk_bytes} bytes")]
    TooManyChunks { size: u64, chunk_bytes: u32 },
}

impl Layout {
    /// # Errors
    /// When the chunk size is zero or chunk numbers would not fit 32 bits.
    pub fn new(size: u64, chunk_bytes: u32) -> Result<Self, LayoutError> {
        if chunk_bytes == 0 {
            return Err(LayoutError::ZeroChunk);
        }
        if size.div_ceil(u64::from(chunk_bytes)) > u64::from(u32::MAX) {
            return Err(LayoutError::TooManyChunks { size, chunk_bytes });
        }
        Ok(Self { size, chunk_bytes })
    }

    /// Bytes in the content.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    #[must_use]
    pub const fn chunk_bytes(&self) -> u32 {
        self.chunk_bytes
    }

    /// Number of chunks; zero for an empty content.
    #[must_use]
    pub fn chunk_count(&self) -> u32 {
        // `new` proved that the quotient fits.
        u32::try_from(self.size.div_ceil(u64::from(self.chunk_bytes))).unwrap_or(u32::MAX)
    }

    /// Number of stripes; zero for an empty content.
    #[must_use]
    pub fn stripe_count(&self) -> u32 {
        self.chunk_count().div_ceil(STRIPE_CHUNKS)
    }

    /// All chunks, in order.
    pub fn chunks(&self) -> impl Iterator<Item = ChunkIndex> + use<> {
        (0..self.chunk_count()).map(ChunkIndex)
    }

    /// The bytes of one chunk. Empty for a chunk past the end.
    #[must_use]
    pub fn chunk_range(&self, chunk: ChunkIndex) -> ByteRange {
        let step = u64::from(self.chunk_bytes);
        let start = (u64::from(chunk.0) * step).min(self.size);
        ByteRange::new(start, (start + step).min(self.size))
    }

    /// Length of one chunk in bytes.
    #[must_use]
    pub fn chunk_len(&self, chunk: ChunkIndex) -> u32 {
        u32::try_from(self.chunk_range(chunk).len()).unwrap_or(self.chunk_bytes)
    }

    /// The chunk that holds the byte at `offset`.
    #[must_use]
    pub fn chunk_at(&self, offset: u64) -> ChunkIndex {
        ChunkIndex(u32::try_from(offset / u64::from(self.chunk_bytes)).unwrap_or(u32::MAX))
    }

    /// The chunks that `range` touches, in order; none for an empty range.
    pub fn chunks_of(&self, range: ByteRange) -> impl Iterator<Item = ChunkIndex> + use<> {
        let (first, end) = if range.is_empty() {
            (0, 0)
        } else {
            (self.chunk_at(range.start()).0, self.chunk_at(range.end() - 1).0 + 1)
        };
        (first..end.min(self.chunk_count())).map(ChunkIndex)
    }

    /// Bitmap of the chunks that exist in `stripe`.
    #[must_use]
    pub fn stripe_mask(&self, stripe: StripeIndex) -> u64 {
        let first = stripe.0.saturating_mul(STRIPE_CHUNKS);
        match self.chunk_count().saturating_sub(first) {
            0 => 0,
            n if n >= STRIPE_CHUNKS => u64::MAX,
            n => (1 << n) - 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chunks_tile_the_content(size in 0u64..10_000_000, chunk in 1u32..70_000) {
            let layout = Layout::new(size, chunk).unwrap();
            let mut at = 0;
            for index in layout.chunks() {
                let range = layout.chunk_range(index);
                prop_assert_eq!(range.start(), at);
                prop_assert!(!range.is_empty());
                at = range.end();
            }
            prop_assert_eq!(at, size);
            let bits: u32 = (0..layout.stripe_count())
                .map(|s| layout.stripe_mask(StripeIndex(s)).count_ones())
                .sum();
            prop_assert_eq!(bits, layout.chunk_count());
        }

        #[test]
        fn a_range_lies_inside_its_chunks(size in 1u64..1_000_000, chunk in 1u32..70_000, a in 0u64..1_000_000, n in 1u64..100_000) {
            let layout = Layout::new(size, chunk).unwrap();
            let start = a % size;
            let range = ByteRange::new(start, (start + n).min(size));
            let chunks: Vec<_> = layout.chunks_of(range).collect();
            let first = layout.chunk_range(chunks[0]);
            let last = layout.chunk_range(chunks[chunks.len() - 1]);
            prop_assert!(first.start() <= range.start() && range.start() < first.end());
            prop_assert!(last.start() < range.end() && range.end() <= last.end());
        }
    }

    #[test]
    fn an_empty_content_has_no_chunks() {
        let layout = Layout::new(0, 8).unwrap();
        assert_eq!(layout.chunk_count(), 0);
        assert_eq!(layout.stripe_mask(StripeIndex(0)), 0);
    }
}

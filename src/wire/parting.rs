//! What a node that leaves says, and hears: nobody else may have what it has. With the same offer a node warms others.

use serde::{Deserialize, Serialize};

use super::message::is_stripe;
use crate::content::{ContentId, ContentKey, Layout, StripeIndex};

/// Stripes in one inventory: 512 GiB of 8 MiB chunks, in at most 48 KiB.
pub const MAX_INVENTORY_STRIPES: usize = 1_024;
/// Stripes of one content that are offered: 2 TiB of 8 MiB chunks, in at most 64 KiB. Of a larger one the rest is not.
pub const MAX_TAKEN_STRIPES: usize = 4_096;
/// Longest names that S3 has: of a bucket (older ones are longer than today's 63), a key, and an entity tag with room.
const MAX_BUCKET_BYTES: usize = 255;
const MAX_KEY_BYTES: usize = 1_024;
const MAX_ETAG_BYTES: usize = 256;

/// The conversation of a node that leaves. A node of an older version drops these: it is then asked in vain, and the
/// leaver goes on to the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Parting {
    /// Leaver to home: "I leave, and hold this."
    Leaving(Inventory),
    /// The home's answer, stripe by stripe: "of that, nobody who stays holds this", as far as it knows.
    Unshared(Inventory),
    /// Leaver to a node that stays: "fetch these chunks from me, or nobody will have them." Also to warm a node. The same
    /// again asks how far it is.
    Take(Take),
    /// Its answer.
    Took(Took),
}

/// Chunks of stripes of any contents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    pub stripes: Vec<StripeChunks>,
}

/// Some chunks of one stripe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StripeChunks {
    pub content: ContentKey,
    pub stripe: StripeIndex,
    /// Bit i is chunk 64 · stripe + i.
    pub chunks: u64,
}

/// An offer of chunks of one content. It names no address and no origin: the receiver fetches from its peers by its own
/// rules, and derives the key from the name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Take {
    pub content: ContentId,
    /// Bytes of the whole content.
    pub size: u64,
    pub chunk_bytes: u32,
    pub stripes: Vec<(StripeIndex, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Took {
    pub content: ContentKey,
    /// It fetches them now, or has them; otherwise it has no room, or leaves too.
    pub accepted: bool,
    /// Chunks of the offer that are still to come.
    pub missing: u32,
}

impl Parting {
    pub(super) fn is_within_bounds(&self) -> bool {
        match self {
            Self::Leaving(inventory) | Self::Unshared(inventory) => {
                inventory.stripes.len() <= MAX_INVENTORY_STRIPES
                    && inventory.stripes.iter().all(|held| is_stripe(held.stripe))
            }
            Self::Take(take) => take.is_within_bounds(),
            Self::Took(_) => true,
        }
    }
}

impl Take {
    fn is_within_bounds(&self) -> bool {
        let has_bounded_name = match &self.content {
            ContentId::Blob(_) => true,
            ContentId::Object(object) => {
                object.size == self.size
                    && object.bucket.len() <= MAX_BUCKET_BYTES
                    && object.key.len() <= MAX_KEY_BYTES
                    && object.etag.0.len() <= MAX_ETAG_BYTES
            }
        };
        let Ok(layout) = Layout::new(self.size, self.chunk_bytes) else { return false };
        let exists = |stripe: StripeIndex, chunks: u64| {
            stripe.0 < layout.stripe_count() && chunks & !layout.stripe_mask(stripe) == 0
        };
        has_bounded_name
            && self.stripes.len() <= MAX_TAKEN_STRIPES
            && self.stripes.iter().all(|(stripe, chunks)| exists(*stripe, *chunks))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DecodeError, Message, decode, decode_body, encode};
    use super::*;
    use crate::content::{ETag, ObjectVersion, STRIPE_CHUNKS};
    use proptest::prelude::*;

    fn take(stripes: Vec<(StripeIndex, u64)>) -> Take {
        let content = ContentId::Object(ObjectVersion {
            bucket: "b".repeat(MAX_BUCKET_BYTES),
            key: "k".repeat(MAX_KEY_BYTES),
            etag: ETag("e".repeat(MAX_ETAG_BYTES)),
            size: u64::from(u32::MAX) * 8,
        });
        Take { content, size: u64::from(u32::MAX) * 8, chunk_bytes: 8, stripes }
    }

    fn survives(parting: Parting) -> Result<(), DecodeError> {
        let body = postcard::to_stdvec(&Message::Parting(parting.clone())).unwrap();
        assert_eq!(decode_body::<Message>(&body)?, Message::Parting(parting));
        Ok(())
    }

    #[test]
    fn the_largest_fit_and_what_is_larger_is_refused() {
        let held = StripeChunks {
            content: ContentKey([7; 32]),
            stripe: StripeIndex(u32::MAX / STRIPE_CHUNKS),
            chunks: u64::MAX,
        };
        let inventory = |stripes| Parting::Leaving(Inventory { stripes: vec![held; stripes] });
        survives(inventory(MAX_INVENTORY_STRIPES)).expect("fits");
        assert_eq!(survives(inventory(MAX_INVENTORY_STRIPES + 1)), Err(DecodeError::OutOfBounds));
        let stripes = vec![(StripeIndex(1 << 25), u64::MAX); MAX_TAKEN_STRIPES];
        survives(Parting::Take(take(stripes.clone()))).expect("fits");
        let one_more = [stripes, vec![(StripeIndex(0), 1)]].concat();
        assert_eq!(survives(Parting::Take(take(one_more))), Err(DecodeError::OutOfBounds));
    }

    #[test]
    fn chunks_past_the_end_and_objects_of_another_size_are_refused() {
        let past = Take { size: 8 * 3, ..take(vec![(StripeIndex(0), 0b1000)]) };
        assert_eq!(survives(Parting::Take(past)), Err(DecodeError::OutOfBounds));
        let no_chunks = Take { chunk_bytes: 0, ..take(Vec::new()) };
        assert_eq!(survives(Parting::Take(no_chunks)), Err(DecodeError::OutOfBounds));
        let other = Take { size: 1, ..take(Vec::new()) };
        assert_eq!(survives(Parting::Take(other)), Err(DecodeError::OutOfBounds));
    }

    proptest! {
        #[test]
        fn damaged_offers_never_panic(at in 0usize..400, value: u8) {
            let mut frame = encode(&Message::Parting(Parting::Take(take(vec![(StripeIndex(3), 9)])))).to_vec();
            let at = at % frame.len();
            frame[at] = value;
            let _ = decode::<Message>(&frame);
        }
    }
}

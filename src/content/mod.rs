//! What things are called and how they are cut: the vocabulary every other module shares.
//!
//! Invariant: a value of these types is valid. Parsing happens here, once, at the edge; nothing further in
//! handles a digest, a range or a chunk number as text or as a bare integer.
//! This module refuses to know where bytes come from or go to; it imports nothing of the crate.

mod chunk_set;
mod digest;
mod id;
mod layout;
mod range;

pub use chunk_set::ChunkSet;
pub use digest::{Algorithm, ChunkDigest, Digest, DigestError};
pub use id::{Attestation, ContentId, ContentKey, ETag, NodeId, ObjectVersion};
pub use layout::{ChunkIndex, DEFAULT_CHUNK_BYTES, Layout, LayoutError, STRIPE_CHUNKS, StripeIndex};
pub use range::{ByteRange, RangeError, RangeHeader};

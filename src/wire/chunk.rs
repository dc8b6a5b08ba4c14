//! The three frames of a chunk stream, and the codes with which either side gives it up.

use serde::{Deserialize, Serialize};

use super::frame::Frame;
use super::message::is_stripe;
use crate::content::{Attestation, ChunkIndex, ContentKey, StripeIndex};

/// Stripes of which a responder says what else it has: as many as a requester's window touches.
pub const MAX_ALSO_STRIPES: usize = 4;

/// First and only frame from the requester: "send me this chunk from `offset` on".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkRequest {
    pub content: ContentKey,
    pub chunk: ChunkIndex,
    /// Bytes of the chunk that the requester already has, counted from its start.
    pub offset: u32,
}

/// First frame from the responder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChunkResponse {
    /// Exactly `len` raw bytes follow, and then a [`ChunkTrailer`]. The responder may itself still be receiving
    /// them: they come as they arrive.
    Serving {
        /// Bytes from the requested offset to the end of the chunk.
        len: u32,
        /// What else the responder has whole and would send: stripes, and their chunks as bit i for chunk 64 · stripe + i.
        also: Vec<(StripeIndex, u64)>,
    },
    /// Every upload slot is taken; ask another holder.
    Busy,
    /// The responder neither has the chunk nor is fetching it.
    NotFound,
}

/// Last frame from the responder, after the bytes: who fetched the chunk from the origin, and its digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkTrailer {
    pub attestation: Attestation,
}

impl Frame for ChunkRequest {
    // 32 of key and two varints of at most 5.
    const MAX_BODY_BYTES: usize = 48;
}

impl Frame for ChunkResponse {
    // Two tags of one byte, a varint of at most 5, and four stripes of 5 and 10.
    const MAX_BODY_BYTES: usize = 72;

    fn is_within_bounds(&self) -> bool {
        let Self::Serving { also, .. } = self else { return true };
        also.len() <= MAX_ALSO_STRIPES && also.iter().all(|(stripe, _)| is_stripe(*stripe))
    }
}

impl Frame for ChunkTrailer {
    const MAX_BODY_BYTES: usize = 48;
}

/// Codes for QUIC's RESET_STREAM (responder) and STOP_SENDING (requester) on chunk streams.
pub mod code {
    /// The requester no longer wants the chunk.
    pub const NO_LONGER_WANTED: u32 = 1;
    /// The responder was itself still receiving the chunk, and that failed.
    pub const SOURCE_FAILED: u32 = 2;
    /// The responder could not read the chunk from its store, or evicted it.
    pub const LOST: u32 = 3;
    /// The other side broke the protocol.
    pub const PROTOCOL: u32 = 4;
    /// This side is shutting down.
    pub const SHUTDOWN: u32 = 5;
}

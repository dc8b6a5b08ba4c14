//! Bytes of the peer protocol `windlass/1`: what nodes say to each other about chunks.
//!
//! Two conversations use it. *Messages* are single frames between any two nodes and carry claims, and what
//! a node that leaves has to say: see [`Message`].
//! A *chunk stream* moves the bytes of one chunk: the requester opens a bidirectional stream and sends a
//! [`ChunkRequest`]; the responder sends a [`ChunkResponse`] and, when serving, the announced number of raw bytes
//! and a [`ChunkTrailer`].
//!
//! Invariant: decoding never panics, and allocates no more than a small multiple of the frame's bound whatever the
//! bytes are; a decoded value keeps every bound of this module. The sender's identity is the transport's business
//! and is never taken from a frame, except where a frame speaks about third nodes.
//! This module refuses to know what the messages mean; that is `swarm`.
//!
//! A frame is a little-endian `u32` length followed by that many bytes of postcard.

mod chunk;
mod frame;
mod message;
mod parting;

pub use chunk::{ChunkRequest, ChunkResponse, ChunkTrailer, MAX_ALSO_STRIPES, code};
pub use frame::{DecodeError, FRAME_PREFIX_BYTES, Frame, body_len, decode, decode_body, encode};
pub use message::{
    Announce, Answer, Ask, Assignment, Candidate, Failure, LEASE_ARRIVED, LeaseEnd, LeaseProgress, LeaseRef,
    Leases, MAX_ANNOUNCED_STRIPES, MAX_CANDIDATES, MAX_LEASES, MAX_SUSPECTS, MAX_TABLE_ROWS, Message,
    Redirect, Source, Table, TableRow, Trouble, Want,
};
pub use parting::{Inventory, MAX_INVENTORY_STRIPES, MAX_TAKEN_STRIPES, Parting, StripeChunks, Take, Took};

/// The application protocol that both ends of a peer connection must agree on.
pub const ALPN: &[u8] = b"windlass/1";

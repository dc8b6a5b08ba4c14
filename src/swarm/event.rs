//! What goes into the machine and what comes out.

use crate::content::{
    Attestation, ChunkDigest, ChunkIndex, ChunkSet, ContentKey, Layout, NodeId, StripeIndex,
};
use crate::wire::Message;

use super::member::Member;

/// One transfer of one chunk to this node. Never reused by a running machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowId(pub u64);

/// What happened, as far as it concerns the machine. Every event takes effect at once; drain
/// [`poll_action`](super::Swarm::poll_action) afterwards.
#[derive(Clone, Debug)]
pub enum Event {
    /// The membership, whole, this node included. Send one after every change, and one at the start.
    Members {
        members: Vec<Member>,
        /// The first membership sync has happened, or the configuration says that there is nobody to sync with.
        /// Nothing is granted before; never goes back to `false`.
        synced: bool,
    },
    /// The connection to this peer failed or was refused (not: was closed for being idle). Its leases end and it is
    /// no source until it is heard from again; its open flows still report their own failure.
    PeerLost(NodeId),
    /// This process did not run for a second or more: stopped, or starved. Leave that time out of `now`, for nothing could
    /// arrive in it; what others did meanwhile is another matter.
    Slept,
    /// A peer's message, `from` being whom the transport authenticated.
    Message { from: NodeId, message: Message },

    /// The store holds chunks of this content. At the start for every stored content; harmless to repeat.
    Stored { content: ContentKey, layout: Layout, have: ChunkSet },
    /// The store dropped these chunks (eviction, a failed whole-content check). They are announced no more.
    Dropped { content: ContentKey, chunks: ChunkSet },
    /// The store dropped the whole content, and nobody has it open.
    Evicted { content: ContentKey },

    /// Somebody reads the content here: chunks may be fetched and will be kept. `have` as of [`Event::Stored`].
    Open { content: ContentKey, layout: Layout, have: ChunkSet },
    /// What the readers of an open content want now; replaces the previous demand. Flows for chunks no longer
    /// wanted are cancelled, except leases, which others count on.
    Demand {
        content: ContentKey,
        /// Chunks wanted. Those that are held are ignored.
        wanted: ChunkSet,
        /// Where readers wait, in the order of their importance; only the first few count
        /// ([`MAX_CURSORS`](super::MAX_CURSORS)). Empty for a pure fill, which starts at the beginning.
        cursors: Vec<ChunkIndex>,
    },
    /// Nobody reads it any longer. Pulls are cancelled, leases in flight are finished.
    Close { content: ContentKey },

    /// The peer that serves the flow also has these chunks, as
    /// [`ChunkResponse::Serving`](crate::wire::ChunkResponse::Serving) says.
    SourceHolds { flow: FlowId, also: Vec<(StripeIndex, u64)> },
    /// `received` contiguous bytes of the chunk, from its start (not from the flow's offset), are here. Report at
    /// least every 100 ms while bytes arrive, and not more often than every 64 KiB.
    FlowProgress { flow: FlowId, received: u32 },
    /// The chunk is complete and verified.
    FlowDone {
        flow: FlowId,
        attestation: Attestation,
        /// It is in the store. `false` when it could not be kept (no space): readers got it, peers will not.
        kept: bool,
    },
    /// The flow ended without the chunk. `received` as in [`Event::FlowProgress`]: what the engine keeps for the next flow of the chunk,
    /// 0 when it threw the bytes away.
    FlowFailed { flow: FlowId, received: u32, reason: FlowFailure },
}

/// Why a flow ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowFailure {
    /// [`ChunkResponse::Busy`](crate::wire::ChunkResponse::Busy)
    Busy,
    /// [`ChunkResponse::NotFound`](crate::wire::ChunkResponse::NotFound)
    NotFound,
    /// No connection, a reset, a timeout, a protocol violation.
    Broken,
    /// The bytes are not what the attestation or `expect` says.
    Corrupt,
    /// The origin said 429 or 503, from a flow with a [`Claim`].
    OriginThrottled,
    /// Any other failure of the origin. The engine tells its readers itself when there is no point in going on.
    OriginFailed,
}

/// With what right a flow goes to the origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The chunk's home granted it.
    Leased,
    /// No home and no peer helped within the deadlines.
    LastResort,
}

/// What the engine must do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send, or drop when that is impossible: the protocol repeats what matters.
    Send { to: NodeId, message: Message },
    /// Start a flow from a peer. At most one flow of a (content, chunk) exists at any time.
    FetchFromPeer {
        flow: FlowId,
        peer: NodeId,
        content: ContentKey,
        chunk: ChunkIndex,
        /// Bytes of the chunk that are here already: ask for the rest. What the engine truly holds decides, if more.
        offset: u32,
        /// What the chunk must hash to, when the home knows it: anything else is [`FlowFailure::Corrupt`].
        expect: Option<ChunkDigest>,
    },
    /// Start a flow from the origin.
    FetchFromOrigin { flow: FlowId, content: ContentKey, chunk: ChunkIndex, offset: u32, claim: Claim },
    /// Stop the flow and forget it: no event about it may follow. Keep the bytes received as long as the content is
    /// open, the chunk's next flow continues there.
    Cancel { flow: FlowId },
}

/// Verdict on a peer's chunk request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Serve it, from the store or from the flow that is bringing it, and call
    /// [`upload_ended`](super::Swarm::upload_ended) once when done or failed.
    Serve {
        /// What to say that is here too.
        also: Vec<(StripeIndex, u64)>,
    },
    /// Answer [`ChunkResponse::Busy`](crate::wire::ChunkResponse::Busy).
    Busy,
    /// Answer [`ChunkResponse::NotFound`](crate::wire::ChunkResponse::NotFound).
    NotFound,
}

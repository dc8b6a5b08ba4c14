//! Messages between nodes about claims. The protocol they make up is described at [`crate::swarm`].

use serde::{Deserialize, Serialize};

use super::frame::Frame;
use super::parting::Parting;
use crate::content::{Attestation, ChunkDigest, ContentKey, NodeId, STRIPE_CHUNKS, StripeIndex};

/// Nodes a sender may name as unreachable: the homes it passed over. More than the three best ranks are never
/// asked, so more can never be passed over.
pub const MAX_SUSPECTS: usize = 4;
/// Sources named for one chunk: the chosen one and two to fall back on without asking again.
pub const MAX_CANDIDATES: usize = 3;
/// Leases spoken about in one message: a stripe has no more chunks than that.
pub const MAX_LEASES: usize = STRIPE_CHUNKS as usize;
/// Rows of a table: twice the 2,000 nodes that windlass is built for.
pub const MAX_TABLE_ROWS: usize = 4_096;
/// Stripes in one announcement: 512 chunks each of 8 MiB, 256 GiB at once.
pub const MAX_ANNOUNCED_STRIPES: usize = 512;

/// What travels as a transport message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    Want(Want),
    Answer(Answer),
    Leases(Leases),
    Revoke(LeaseRef),
    Redirect(Redirect),
    Ask(Ask),
    Table(Table),
    Announce(Announce),
    /// Not about claims: the engine's business.
    Parting(Parting),
}

/// Requester to home: all there is to say about the sender and one stripe. Each replaces the one before.
///
/// The bitmaps are disjoint, but for `urgent`, which is part of `want`, and `queued`, which is part of `pulling`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Want {
    pub content: ContentKey,
    pub stripe: StripeIndex,
    /// Chunks to be assigned a source. Remembered by the home until the next `Want`.
    pub want: u64,
    /// Those of `want` that a reader waits for: first and in order.
    pub urgent: u64,
    /// Chunks held, verified.
    pub have: u64,
    /// Chunks that arrive from a peer.
    pub pulling: u64,
    /// Those of `pulling` that wait for room: nothing of them can be passed on yet.
    pub queued: u64,
    /// Chunks that arrive from the origin.
    pub leased: u64,
    /// How many assignments the sender can start at once.
    pub room: u8,
    /// How many of these may be leases.
    pub grants: u8,
    /// Number of the last [`Answer`] taken in from this home.
    pub seen: u32,
    /// Counts the wants of this stripe to this home, from 0: of two that arrive in another order the earlier is void.
    pub number: u32,
    /// Nodes that the sender cannot reach, best rank first.
    pub suspects: Vec<NodeId>,
    /// Sources that did not serve since the last `Want`.
    pub failures: Vec<Failure>,
    /// Leases that ended since the last `Want`.
    pub ended: Vec<LeaseEnd>,
}

/// A source that did not deliver a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub bit: u8,
    pub node: NodeId,
    pub trouble: Trouble,
    /// Whom the chunk arrives from now: one of the whole copies that the answer named to fall back on.
    pub instead: Option<NodeId>,
}

/// What was wrong with a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Trouble {
    /// All its upload slots were taken.
    Busy,
    /// It has nothing of the chunk, or something wrong.
    Lacks,
    /// It could not be reached, broke off, or sent nothing for too long.
    Broken,
    /// It is to receive the chunk itself, and had nothing of it yet.
    NotBegun,
}

/// How a lease ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaseEnd {
    /// Fetched, verified and attested.
    Done { bit: u8, attestation: Attestation },
    /// The origin asked to slow down.
    Throttled { bit: u8 },
    /// The origin failed for this node.
    Failed { bit: u8 },
    /// The sender no longer wants it, or never could use it.
    Released { bit: u8 },
}

/// Home to requester: sources for some of the wanted chunks. What is not named waits; answers are also pushed
/// later, when a source appears or a lease comes free. An empty one says that the home is alive and remembers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    pub content: ContentKey,
    pub stripe: StripeIndex,
    /// Counts the answers of this home for this stripe to this node, from 1.
    pub number: u32,
    /// Nodes that currently want something of the stripe, the receiver included.
    pub interested: u16,
    pub assignments: Vec<Assignment>,
}

/// "Get this chunk there."
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    pub bit: u8,
    pub source: Source,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// From peers, best first. The digest, when the home knows it, is what the chunk must hash to.
    Peers { candidates: Vec<Candidate>, digest: Option<ChunkDigest> },
    /// From the origin: the receiver holds the lease now.
    Origin,
}

/// A peer that can serve a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    pub node: NodeId,
    /// It holds the whole chunk; otherwise it is still receiving it and passes the pieces on as they come.
    pub complete: bool,
}

/// Lessee to home, sparsely: a lease lives by the bytes it receives, not by time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leases {
    pub content: ContentKey,
    pub stripe: StripeIndex,
    pub progress: Vec<LeaseProgress>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseProgress {
    pub bit: u8,
    /// Bytes of the chunk received so far, counted from its start, or [`LEASE_ARRIVED`].
    pub received: u32,
}

/// Every byte of a leased chunk is here and is being checked and stored: however slow the disk, nobody else need
/// fetch it. Repeated while that lasts, so that silence still means that the lessee is gone.
pub const LEASE_ARRIVED: u32 = u32::MAX;

/// Home to a slow lessee: somebody else fetches this chunk now; ask again where to get it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRef {
    pub content: ContentKey,
    pub stripe: StripeIndex,
    pub bit: u8,
}

/// Not the home to requester: that one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redirect {
    pub content: ContentKey,
    pub stripe: StripeIndex,
    pub home: NodeId,
}

/// New home to the nodes that may have been home before: what do you know of this stripe?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    pub content: ContentKey,
    pub stripe: StripeIndex,
}

/// Answer to [`Ask`], and parting gift of a home that learns of a better one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    pub content: ContentKey,
    pub stripe: StripeIndex,
    /// Whom the sender sends requesters to from now on: itself, the receiver, or a third.
    pub home: NodeId,
    pub rows: Vec<TableRow>,
}

/// What a home knows of one node and one stripe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableRow {
    pub node: NodeId,
    pub have: u64,
    pub pulling: u64,
    pub leased: u64,
}

/// Holder to home, unasked: after a start, an eviction, or when the home moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announce {
    pub content: ContentKey,
    /// Held chunks by stripe; an empty bitmap withdraws.
    pub stripes: Vec<(StripeIndex, u64)>,
}

impl Frame for Message {
    // A full table: 4,096 rows of 16 bytes of identity and three varints of at most 10.
    const MAX_BODY_BYTES: usize = 256 << 10;

    fn is_within_bounds(&self) -> bool {
        match self {
            Self::Want(want) => want.is_within_bounds(),
            Self::Answer(answer) => answer.is_within_bounds(),
            Self::Leases(leases) => {
                leases.progress.len() <= MAX_LEASES
                    && is_stripe(leases.stripe)
                    && leases.progress.iter().all(|p| is_bit(p.bit))
            }
            Self::Revoke(lease) => is_stripe(lease.stripe) && is_bit(lease.bit),
            Self::Redirect(redirect) => is_stripe(redirect.stripe),
            Self::Ask(ask) => is_stripe(ask.stripe),
            Self::Table(table) => is_stripe(table.stripe) && table.rows.len() <= MAX_TABLE_ROWS,
            Self::Announce(announce) => {
                announce.stripes.len() <= MAX_ANNOUNCED_STRIPES
                    && announce.stripes.iter().all(|(stripe, _)| is_stripe(*stripe))
            }
            Self::Parting(parting) => parting.is_within_bounds(),
        }
    }
}

impl Want {
    fn is_within_bounds(&self) -> bool {
        is_stripe(self.stripe)
            && self.suspects.len() <= MAX_SUSPECTS
            && self.failures.len() <= MAX_LEASES
            && self.failures.iter().all(|failure| is_bit(failure.bit))
            && self.ended.len() <= MAX_LEASES
            && self.ended.iter().all(|end| is_bit(end.bit()))
    }
}

impl Answer {
    fn is_within_bounds(&self) -> bool {
        is_stripe(self.stripe)
            && self.assignments.len() <= STRIPE_CHUNKS as usize
            && self.assignments.iter().all(|assignment| {
                is_bit(assignment.bit)
                    && match &assignment.source {
                        Source::Peers { candidates, .. } => {
                            !candidates.is_empty() && candidates.len() <= MAX_CANDIDATES
                        }
                        Source::Origin => true,
                    }
            })
    }
}

impl LeaseEnd {
    /// The chunk's bit in its stripe.
    #[must_use]
    pub const fn bit(&self) -> u8 {
        match self {
            Self::Done { bit, .. }
            | Self::Throttled { bit }
            | Self::Failed { bit }
            | Self::Released { bit } => *bit,
        }
    }
}

const fn is_bit(bit: u8) -> bool {
    (bit as u32) < STRIPE_CHUNKS
}

/// Chunk numbers are 32 bits, so stripes past this one cannot exist.
pub(super) const fn is_stripe(stripe: StripeIndex) -> bool {
    stripe.0 <= u32::MAX / STRIPE_CHUNKS
}

#[cfg(test)]
mod tests {
    use super::super::{
        ChunkRequest, ChunkResponse, ChunkTrailer, DecodeError, MAX_ALSO_STRIPES, decode, encode,
    };
    use super::*;
    use crate::content::ChunkIndex;
    use proptest::prelude::*;

    const CONTENT: ContentKey = ContentKey([7; 32]);

    fn announce(stripes: usize) -> Message {
        let stripes = vec![(StripeIndex(u32::MAX / STRIPE_CHUNKS), u64::MAX); stripes];
        Message::Announce(Announce { content: CONTENT, stripes })
    }

    #[test]
    fn the_largest_messages_fit_their_bound() {
        let row = TableRow { node: NodeId([255; 16]), have: u64::MAX, pulling: u64::MAX, leased: u64::MAX };
        let table = Message::Table(Table {
            content: CONTENT,
            stripe: StripeIndex(0),
            home: NodeId([1; 16]),
            rows: vec![row; MAX_TABLE_ROWS],
        });
        for message in [table, announce(MAX_ANNOUNCED_STRIPES)] {
            assert_eq!(decode::<Message>(&encode(&message)), Ok(message));
        }
        let request = ChunkRequest { content: CONTENT, chunk: ChunkIndex(u32::MAX), offset: u32::MAX };
        assert_eq!(decode::<ChunkRequest>(&encode(&request)), Ok(request));
        let also = vec![(StripeIndex(u32::MAX / STRIPE_CHUNKS), u64::MAX); MAX_ALSO_STRIPES];
        let response = ChunkResponse::Serving { len: u32::MAX, also };
        assert_eq!(decode::<ChunkResponse>(&encode(&response)), Ok(response));
        let attestation = Attestation { digest: ChunkDigest([255; 32]), attester: NodeId([255; 16]) };
        assert_eq!(
            decode::<ChunkTrailer>(&encode(&ChunkTrailer { attestation })).unwrap().attestation,
            attestation
        );
    }

    #[test]
    fn what_is_out_of_bounds_is_refused() {
        let body = postcard::to_stdvec(&announce(MAX_ANNOUNCED_STRIPES + 1)).unwrap();
        assert_eq!(super::super::decode_body::<Message>(&body), Err(DecodeError::OutOfBounds));
        let lease = LeaseRef { content: CONTENT, stripe: StripeIndex(0), bit: 64 };
        let body = postcard::to_stdvec(&Message::Revoke(lease)).unwrap();
        assert_eq!(super::super::decode_body::<Message>(&body), Err(DecodeError::OutOfBounds));
    }

    #[test]
    fn a_frame_is_exactly_as_long_as_it_says() {
        let frame = encode(&announce(1));
        assert_eq!(decode::<Message>(&frame[..frame.len() - 1]), Err(DecodeError::WrongLength));
        assert_eq!(decode::<Message>(&frame[..3]), Err(DecodeError::WrongLength));
        let claims_a_gigabyte = [0, 0, 0, 64, 1];
        assert!(matches!(decode::<Message>(&claims_a_gigabyte), Err(DecodeError::TooLong { .. })));
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = super::super::decode_body::<Message>(&bytes);
            let _ = super::super::decode_body::<ChunkRequest>(&bytes);
            let _ = super::super::decode_body::<ChunkResponse>(&bytes);
            let _ = super::super::decode_body::<ChunkTrailer>(&bytes);
            let _ = decode::<Message>(&bytes);
        }

        #[test]
        fn damaged_frames_never_panic(at in 0usize..200, value: u8, stripes in 0usize..40) {
            let mut frame = encode(&announce(stripes)).to_vec();
            let at = at % frame.len();
            frame[at] = value;
            let _ = decode::<Message>(&frame);
        }

        #[test]
        fn what_is_encoded_decodes(want: u64, have: u64, room: u8, seen: u32, bit in 0u8..64) {
            let failures = vec![Failure { bit, node: NodeId([room; 16]), trouble: Trouble::Busy, instead: Some(NodeId([7; 16])) }];
            let ended = vec![LeaseEnd::Throttled { bit }];
            let message = Message::Want(Want {
                content: CONTENT, stripe: StripeIndex(seen % 1_000), want, urgent: want & 3, have,
                pulling: 6, queued: 2, leased: 0, room, grants: 1, seen, number: 9, suspects: vec![NodeId([1; 16])], failures, ended,
            });
            prop_assert_eq!(decode::<Message>(&encode(&message)), Ok(message));
        }
    }
}

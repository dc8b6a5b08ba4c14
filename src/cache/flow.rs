//! One transfer of one chunk: from a peer or from the origin into a flight, checked, stored.
//!
//! Refuses to choose: the swarm said from whom. Refuses to retry: the swarm hears how it ended and says what is next.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use tokio_util::sync::CancellationToken;

use crate::content::{Attestation, ByteRange, ChunkDigest, ChunkIndex};
use crate::origin::{OriginError, awake};
use crate::store::{Expect, InsertError};
use crate::transport::{PeerAddr, RecvStream};
use crate::wire::{self, ChunkRequest, ChunkResponse, ChunkTrailer};

use super::error::ReadError;
use super::flight::{Flight, Provenance};
use super::meter::Meter;
use super::open::Open;

/// A peer that has the chunk answers at once; it queues nothing. Two seconds are many round trips.
const ANSWER_DEADLINE: Duration = Duration::from_secs(2);

/// Bytes taken from a stream at a time: one pass through quinn's reassembly, small enough to forward early.
const READ_BYTES: usize = 256 << 10;

/// How a flow ended, when it did not bring the chunk.
#[derive(Debug, thiserror::Error)]
pub(super) enum FlowError {
    #[error("the peer has no upload to spare")]
    Busy,
    #[error("the peer does not have the chunk")]
    NotFound,
    /// The connection, the peer, or a deadline.
    #[error("{0}")]
    Broken(String),
    #[error("the bytes are not what {} attested", .0.attester)]
    Corrupt(Attestation),
    #[error(transparent)]
    Origin(OriginError),
    /// The swarm wants it no longer, or not by this way.
    #[error("it was cancelled")]
    Cancelled,
    /// The chunk arrived and is right: it lives in memory while readers want it.
    #[error("there is no room on the disk for the chunk")]
    NotKept(Attestation),
}

/// Where a flow goes.
pub(super) enum Origin {
    Peer {
        peer: PeerAddr,
        /// What the chunk must hash to, when its home knows.
        expect: Option<ChunkDigest>,
    },
    /// The content's own source.
    Source,
}

impl Origin {
    pub(super) const fn provenance(&self) -> Provenance {
        match self {
            Self::Peer { .. } => Provenance::Peer,
            Self::Source => Provenance::Origin,
        }
    }

    /// The peer's name, or the origin's.
    pub(super) fn name(&self, open: &Open) -> String {
        match self {
            Self::Peer { peer, .. } => peer.name.clone(),
            Self::Source => open.source_label(),
        }
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Peer { peer, .. } => f.write_str(&peer.name),
            Self::Source => f.write_str("the origin"),
        }
    }
}

/// Everything a flow needs.
pub(super) struct Flow {
    pub(super) open: Arc<Open>,
    pub(super) flight: Arc<Flight>,
    pub(super) chunk: ChunkIndex,
    pub(super) meter: Meter,
    /// Ends the transfer. A chunk that is checked is stored all the same, and whoever waits for it is told: a flow
    /// that was dropped between the two would leave a chunk in the store that nobody hears of.
    pub(super) stop: CancellationToken,
}

impl Flow {
    /// Brings the chunk, checks it and has it stored.
    pub(super) async fn run(self, origin: Origin) -> Result<Attestation, FlowError> {
        match origin {
            Origin::Peer { peer, expect } => self.fetch_from_peer(peer, expect).await,
            Origin::Source => self.fetch_from_origin().await,
        }
    }

    async fn fetch_from_peer(
        mut self,
        peer: PeerAddr,
        expect: Option<ChunkDigest>,
    ) -> Result<Attestation, FlowError> {
        let offset = self.flight.received();
        let deadline = self.open.shared.config.peer_idle_timeout();
        let (mut send, mut recv) = self
            .within(deadline, "connect", self.open.shared.transport.open(&peer))
            .await?
            .map_err(broken)?;
        let request = ChunkRequest { content: self.open.key, chunk: self.chunk, offset };
        self.within(deadline, "progress", send.write(wire::encode(&request))).await?.map_err(broken)?;
        send.finish().map_err(broken)?;
        let response = self
            .within(ANSWER_DEADLINE, "answer", recv.read_frame::<ChunkResponse>())
            .await?
            .map_err(broken)?;
        let len = match response {
            ChunkResponse::Serving { len, also } => {
                self.meter.source_holds(also);
                len
            }
            ChunkResponse::Busy => return Err(FlowError::Busy),
            ChunkResponse::NotFound => return Err(FlowError::NotFound),
        };
        if u64::from(offset) + u64::from(len) != u64::from(self.len()) {
            return Err(FlowError::Broken(format!("{} offers {len} bytes from {offset}", peer.name)));
        }
        self.drain(&mut recv, offset, len, deadline).await?;
        let trailer =
            self.within(deadline, "trailer", recv.read_frame::<ChunkTrailer>()).await?.map_err(broken)?;
        let attestation = trailer.attestation;
        if expect.is_some_and(|digest| digest != attestation.digest) {
            self.flight.restart();
            return Err(FlowError::Corrupt(attestation));
        }
        self.open.shared.store.peer_gave(&self.open.key, peer.node);
        self.open.shared.metrics.received_from_peer(&self.open.shared.zone_of(peer.node), u64::from(len));
        self.meter.arrived(self.len()).await;
        let pieces = self.flight.pieces();
        if self.digest(pieces.clone()).await? != attestation.digest {
            self.flight.restart();
            return Err(FlowError::Corrupt(attestation));
        }
        self.keep(Provenance::Peer, attestation, pieces).await
    }

    async fn fetch_from_origin(mut self) -> Result<Attestation, FlowError> {
        let offset = self.flight.received();
        let whole = self.open.layout.chunk_range(self.chunk);
        let range = ByteRange::new(whole.start() + u64::from(offset), whole.end());
        let mut at = offset;
        if !range.is_empty() {
            let open = Arc::clone(&self.open);
            let source = open.source().map_err(FlowError::Origin)?;
            let mut body = self.of_origin(source.read(range)).await?;
            while at < self.len() {
                let Some(piece) = self.of_origin(body.next().map(Option::transpose)).await? else { break };
                self.open.took_in(piece.len());
                at = self.flight.append(Provenance::Origin, at, piece);
                self.meter.received(at);
            }
        }
        if at != self.len() {
            return Err(FlowError::Origin(OriginError::Failed {
                origin: self.open.source_label(),
                reason: format!("the body ended after {at} of {} bytes", self.len()),
            }));
        }
        self.meter.arrived(at).await;
        let pieces = self.flight.pieces();
        let digest = self.digest(pieces.clone()).await?;
        let attestation = Attestation { digest, attester: self.open.shared.transport.local() };
        self.keep(Provenance::Origin, attestation, pieces).await
    }

    /// BLAKE3 of `pieces`, off the network's threads.
    async fn digest(&self, pieces: Vec<Bytes>) -> Result<ChunkDigest, FlowError> {
        let hashing = tokio::task::spawn_blocking(move || ChunkDigest::of_pieces(&pieces));
        match self.stop.run_until_cancelled(hashing).await {
            None => Err(FlowError::Cancelled),
            Some(hashed) => hashed.map_err(broken),
        }
    }

    fn len(&self) -> u32 {
        self.open.layout.chunk_len(self.chunk)
    }

    async fn drain(
        &mut self,
        recv: &mut RecvStream,
        offset: u32,
        len: u32,
        idle: Duration,
    ) -> Result<(), FlowError> {
        let end = offset + len;
        let mut at = offset;
        let mut pieces: Vec<Bytes> = Vec::with_capacity(32);
        while at < end {
            let limit = READ_BYTES.min((end - at) as usize);
            let read = self.within(idle, "progress", recv.read(&mut pieces, limit)).await?.map_err(broken)?;
            if read == 0 {
                return Err(FlowError::Broken("the stream ended early".into()));
            }
            self.open.took_in(read);
            for piece in pieces.drain(..) {
                let next = at.saturating_add(u32::try_from(piece.len()).unwrap_or(u32::MAX));
                self.flight.append(Provenance::Peer, at, piece);
                at = next;
            }
            self.meter.received(at);
        }
        Ok(())
    }

    /// What the origin answers, unless it stands still or the flow is cancelled.
    async fn of_origin<T>(
        &self,
        future: impl Future<Output = Result<T, OriginError>>,
    ) -> Result<T, FlowError> {
        let idle = self.open.shared.config.origin_idle_timeout();
        match self.stop.run_until_cancelled(awake::timeout(idle, future)).await {
            None => Err(FlowError::Cancelled),
            Some(Ok(answer)) => answer.map_err(FlowError::Origin),
            Some(Err(_)) => Err(FlowError::Origin(OriginError::Failed {
                origin: self.open.source_label(),
                reason: format!("no byte for {}", humantime::format_duration(idle)),
            })),
        }
    }

    async fn within<F: Future>(
        &self,
        deadline: Duration,
        what: &str,
        future: F,
    ) -> Result<F::Output, FlowError> {
        match self.stop.run_until_cancelled(awake::timeout(deadline, future)).await {
            None => Err(FlowError::Cancelled),
            Some(Ok(output)) => Ok(output),
            Some(Err(_)) => {
                Err(FlowError::Broken(format!("no {what} within {}", humantime::format_duration(deadline))))
            }
        }
    }

    /// Shows a chunk that is whole and checked to everybody who waits, and has it stored: exactly the `pieces` that
    /// were checked, for another flow may have begun to fill the flight anew. Not cancelled any more.
    async fn keep(
        &self,
        provenance: Provenance,
        attestation: Attestation,
        pieces: Vec<Bytes>,
    ) -> Result<Attestation, FlowError> {
        self.flight.checked(attestation);
        self.open.arrived(self.chunk, provenance);
        let Some(entry) = &self.open.entry else {
            return self.keep_in_memory(attestation);
        };
        match entry.insert(self.chunk, pieces, Expect::Verified(attestation)).await {
            Ok(held) => {
                self.flight.stored();
                self.open.land(self.chunk);
                Ok(held)
            }
            Err(InsertError::NoSpace { .. }) => self.keep_in_memory(attestation),
            Err(error) => {
                let reason = error.to_string();
                self.flight
                    .failed(ReadError::Store { content: self.open.id.to_string(), reason: reason.clone() });
                self.open.land(self.chunk);
                Err(FlowError::Broken(reason))
            }
        }
    }

    /// The disk will not have it: the chunk passes through memory to whoever waits for it.
    fn keep_in_memory(&self, attestation: Attestation) -> Result<Attestation, FlowError> {
        self.open.set_unstorable();
        self.flight.kept();
        Err(FlowError::NotKept(attestation))
    }
}

fn broken(error: impl std::fmt::Display) -> FlowError {
    FlowError::Broken(error.to_string())
}

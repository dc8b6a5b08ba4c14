//! Answers peers from what this node has or is receiving.
//!
//! Invariant: a peer's request starts no fetch and names nothing but a content key, a chunk and an offset: no path, no
//! URL, no address. So requests cannot loop, and cannot make this node open or dial anything.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use crate::cache::{Cache, Feed, ReadError, Refusal};
use crate::content::{NodeId, StripeIndex};
use crate::transport::{FrameError, RecvStream, SendStream};
use crate::wire::{self, ChunkRequest, ChunkResponse, ChunkTrailer};

/// `[provider]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Requests from peers handled at once; more are answered "busy". Each holds at most one 256 KiB piece.
    pub max_requests: usize,
    /// A peer that takes no bytes for this long loses its transfer, in milliseconds.
    pub idle_timeout_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        // 256 × 256 KiB = 64 MiB at the worst; the swarm's upload credits are reached far earlier.
        Self { max_requests: 256, idle_timeout_ms: 10_000 }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AnswerLabel {
    answer: &'static str,
}

#[derive(Clone, Debug, Default)]
pub struct Metrics {
    requests: Family<AnswerLabel, Counter>,
    serving: Gauge,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let this = Self::default();
        registry.register("provider_requests", "Chunk requests from peers, by answer", this.requests.clone());
        registry.register("provider_serving", "Chunk transfers under way to peers", this.serving.clone());
        this
    }

    fn count(&self, answer: &'static str) {
        self.requests.get_or_create(&AnswerLabel { answer }).inc();
    }
}

/// Serves chunk streams; cheap to clone.
#[derive(Clone)]
pub struct Provider {
    cache: Cache,
    metrics: Metrics,
    slots: Arc<Semaphore>,
    idle: Duration,
}

/// Why a transfer to a peer ended early. Logged at debug: peers come and go.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("the peer sent what is not a chunk request: {0}")]
    BadRequest(#[from] FrameError),
    #[error("the peer is gone: {0}")]
    Peer(#[from] crate::transport::StreamError),
    #[error("the peer took nothing for too long")]
    Idle,
    #[error(transparent)]
    Ours(#[from] ReadError),
}

impl ServeError {
    const fn code(&self) -> u32 {
        match self {
            Self::BadRequest(_) => wire::code::PROTOCOL,
            Self::Peer(_) | Self::Idle => wire::code::NO_LONGER_WANTED,
            Self::Ours(ReadError::Shutdown) => wire::code::SHUTDOWN,
            Self::Ours(ReadError::Store { .. }) => wire::code::LOST,
            Self::Ours(_) => wire::code::SOURCE_FAILED,
        }
    }
}

impl Provider {
    #[must_use]
    pub fn new(cache: Cache, config: &Config, metrics: Metrics) -> Self {
        Self {
            cache,
            metrics,
            slots: Arc::new(Semaphore::new(config.max_requests)),
            idle: Duration::from_millis(config.idle_timeout_ms),
        }
    }

    /// Answers one stream that `from` opened, to its end.
    pub async fn serve(&self, from: NodeId, mut send: SendStream, mut recv: RecvStream) {
        if let Err(error) = self.answer(from, &mut send, &mut recv).await {
            tracing::debug!(peer = %from, %error, "chunk not served to its end");
            send.reset(error.code());
        }
    }

    async fn answer(
        &self,
        from: NodeId,
        send: &mut SendStream,
        recv: &mut RecvStream,
    ) -> Result<(), ServeError> {
        let request: ChunkRequest =
            tokio::time::timeout(self.idle, recv.read_frame()).await.map_err(|_| ServeError::Idle)??;
        let Ok(_slot) = self.slots.try_acquire() else {
            return self.refuse(send, ChunkResponse::Busy, "busy").await;
        };
        let mut permit = match self.cache.admit(from, request.content, request.chunk).await {
            Ok(permit) => permit,
            Err(Refusal::Busy) => return self.refuse(send, ChunkResponse::Busy, "busy").await,
            Err(Refusal::NotFound) => return self.refuse(send, ChunkResponse::NotFound, "not_found").await,
        };
        let feed = self.cache.feed(request.content, request.chunk);
        let Some(feed) = feed.filter(|feed| request.offset <= feed.len()) else {
            return self.refuse(send, ChunkResponse::NotFound, "not_found").await;
        };
        self.metrics.count("serving");
        self.metrics.serving.inc();
        let outcome = self.stream(from, send, feed, request.offset, std::mem::take(&mut permit.also)).await;
        self.metrics.serving.dec();
        outcome
    }

    async fn stream(
        &self,
        from: NodeId,
        send: &mut SendStream,
        mut feed: Feed,
        offset: u32,
        also: Vec<(StripeIndex, u64)>,
    ) -> Result<(), ServeError> {
        let end = feed.len();
        self.write(send, wire::encode(&ChunkResponse::Serving { len: end - offset, also })).await?;
        let mut at = offset;
        while at < end {
            let piece = feed.next(at, end).await?;
            // A piece is at most 256 KiB.
            let len = u32::try_from(piece.len()).unwrap_or(u32::MAX);
            self.write(send, piece).await?;
            self.cache.sent(from, u64::from(len));
            at += len;
        }
        let attestation = feed.attestation().await?;
        self.write(send, wire::encode(&ChunkTrailer { attestation })).await?;
        Ok(send.finish()?)
    }

    async fn refuse(
        &self,
        send: &mut SendStream,
        response: ChunkResponse,
        answer: &'static str,
    ) -> Result<(), ServeError> {
        self.metrics.count(answer);
        self.write(send, wire::encode(&response)).await?;
        Ok(send.finish()?)
    }

    async fn write(&self, send: &mut SendStream, bytes: bytes::Bytes) -> Result<(), ServeError> {
        Ok(tokio::time::timeout(self.idle, send.write(bytes)).await.map_err(|_| ServeError::Idle)??)
    }
}

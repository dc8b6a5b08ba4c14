//! A client's walk over a range of a content, chunk by chunk, in order.
//!
//! Invariant: the last bytes of a blob go out only when the whole has been verified, so that a blob that does not match
//! its digest is never complete in anyone's hands (`facts/wire.md`, trap 4).

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, Stream};

use crate::content::{ByteRange, ContentId};

use super::error::ReadError;
use super::feed::Feed;
use super::flight::Provenance;
use super::open::{Open, ReadToken};
use super::seal::{self, Until};

/// Bytes of one read by where this node got them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    pub local: u64,
    pub peers: u64,
    pub origin: u64,
}

/// A stream of `Bytes` of at most 256 KiB. Dropping it withdraws its demand.
pub struct Reader {
    stream: BoxStream<'static, Result<Bytes, ReadError>>,
    served: Arc<Served>,
}

#[derive(Default)]
struct Served {
    local: AtomicU64,
    peers: AtomicU64,
    origin: AtomicU64,
}

struct Walk {
    open: Arc<Open>,
    token: ReadToken,
    rest: ByteRange,
    feed: Option<Feed>,
    served: Arc<Served>,
}

impl Reader {
    pub(super) fn new(open: &Arc<Open>, range: ByteRange) -> Self {
        let range = range.intersect(ByteRange::new(0, open.layout.size()));
        let served = Arc::<Served>::default();
        let walk = Walk {
            open: Arc::clone(open),
            token: open.demand(range, open.shared.config.read_ahead_chunks),
            rest: range,
            feed: None,
            served: Arc::clone(&served),
        };
        let stream =
            stream::try_unfold(
                walk,
                |mut walk| async move { Ok(walk.next().await?.map(|bytes| (bytes, walk))) },
            );
        Self { stream: Box::pin(stream), served }
    }

    /// What has been read so far, by source.
    #[must_use]
    pub fn sources(&self) -> Sources {
        Sources {
            local: self.served.local.load(Ordering::Relaxed),
            peers: self.served.peers.load(Ordering::Relaxed),
            origin: self.served.origin.load(Ordering::Relaxed),
        }
    }
}

impl Stream for Reader {
    type Item = Result<Bytes, ReadError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.stream.as_mut().poll_next(cx)
    }
}

/// The span of a read says in the end where its bytes came from.
impl Drop for Walk {
    fn drop(&mut self) {
        let span = &self.token.span;
        span.record("local", self.served.local.load(Ordering::Relaxed));
        span.record("peers", self.served.peers.load(Ordering::Relaxed));
        span.record("origin", self.served.origin.load(Ordering::Relaxed));
    }
}

impl Walk {
    async fn next(&mut self) -> Result<Option<Bytes>, ReadError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let layout = self.open.layout;
        let chunk = layout.chunk_at(self.rest.start());
        let whole = layout.chunk_range(chunk);
        let part = self.rest.intersect(whole);
        if self.must_be_sealed(part) {
            seal::wait(&self.open, Until::Verified).await?;
        }
        let feed = self.feed.get_or_insert_with(|| Feed::checked(&self.open, chunk));
        // Offsets within a chunk fit 32 bits because its length does.
        #[expect(clippy::cast_possible_truncation, reason = "chunk length is a u32")]
        let (from, to) = ((part.start() - whole.start()) as u32, (part.end() - whole.start()) as u32);
        let bytes = feed.next(from, to).await?;
        self.account(chunk, bytes.len() as u64);
        self.rest = ByteRange::new(self.rest.start() + bytes.len() as u64, self.rest.end());
        if self.rest.start() == whole.end() {
            tracing::trace!(content = %self.open.id, chunk = chunk.0, "read");
            self.feed = None;
            self.open.release_kept(chunk);
            self.token.advance(self.rest);
        }
        Ok(Some(bytes))
    }

    /// Whether `part` holds the last byte of a blob that the disk keeps.
    fn must_be_sealed(&self, part: ByteRange) -> bool {
        matches!(self.open.id, ContentId::Blob(_))
            && self.open.entry.is_some()
            && part.end() == self.open.layout.size()
    }

    fn account(&self, chunk: crate::content::ChunkIndex, bytes: u64) {
        match self.open.provenance(chunk) {
            None => &self.served.local,
            Some(Provenance::Peer) => &self.served.peers,
            Some(Provenance::Origin) => &self.served.origin,
        }
        .fetch_add(bytes, Ordering::Relaxed);
    }
}

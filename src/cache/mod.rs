//! The one door to bytes: whoever wants a content opens it here, and gets it from the disk, from peers or from the origin.
//!
//! Invariants:
//! - a chunk is in the air at most once on this node, whoever waits for it (`flight`);
//! - a client sees only bytes that came from an origin or whose digest was checked, and the end of a blob only after the
//!   whole was verified (`reader`, `seal`);
//! - every wait has a deadline (`feed`, `flow`), and behind the last one stands the origin (the swarm's last resort).
//!
//! This module refuses to know HTTP, and to decide who fetches what from whom: [`crate::swarm`] decides, `driver` obeys.
//!
//! The way of a chunk: a [`Reader`] or a fill marks demand (`open`); the driver tells the swarm; the swarm answers with
//! actions; `flow` carries one out into a `flight`; feeds drain the flight while it fills; the store checks and keeps it;
//! `seal` compares the whole.

mod clock;
mod driver;
mod error;
mod feed;
mod flight;
mod flow;
mod meter;
mod metrics;
mod offers;
mod open;
mod parting;
mod reader;
mod seal;
mod shared;
mod take;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::content::{ByteRange, ChunkIndex, ContentId, ContentKey, Layout, NodeId, StripeIndex};
use crate::origin::Source;
use crate::store::{Entry, Pin, PlaceError, PlaceOptions, Placement, Store, Summary};
use crate::swarm::membership::PeerBook;
use crate::swarm::{Admission, Swarm};
use crate::transport::Transport;

pub use error::{OpenError, ReadError};
pub use feed::Feed;
pub use metrics::Metrics;
pub use open::Progress;
pub use parting::Reply;
pub use reader::{Reader, Sources};

use driver::Command;
use open::Open;
use seal::Until;
use shared::Shared;

/// Commands the engine may fall behind by before senders wait; each is small, and 4,096 are a burst of 16 chunks'
/// progress reports from 256 flows.
const COMMANDS_MAX: usize = 4096;

/// Longest that an opening waits for chunks to be hashed which the last run was killed over: at most what a second
/// writes, so even a disk of 150 MB/s has 300 MB of them checked by then. What is late is fetched.
const SETTLE_DEADLINE: Duration = Duration::from_secs(2);

/// `[cache]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Size of a chunk in bytes. Nodes with different sizes do not share; change it on all at once.
    pub chunk_bytes: u32,
    /// Chunks a ranged S3 read may run ahead of its client.
    pub read_ahead_chunks: u32,
    /// A read fails when nothing of its chunk arrived for this long, from anywhere, in milliseconds.
    pub stall_timeout_ms: u64,
    /// A transfer from a peer is given up when it makes no progress for this long, in milliseconds.
    pub peer_idle_timeout_ms: u64,
    /// A transfer from the origin is given up when it makes no progress for this long, in milliseconds.
    pub origin_idle_timeout_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            chunk_bytes: crate::content::DEFAULT_CHUNK_BYTES,
            // 64 MiB: a client at 10 Gbit/s empties it in 50 ms, more than an origin's first byte takes.
            read_ahead_chunks: 8,
            // containerd gives a pull without progress up after 5 minutes; we want to fail long before, with a reason.
            stall_timeout_ms: 60_000,
            // A live peer that is merely busy moves a piece every few milliseconds.
            peer_idle_timeout_ms: 3_000,
            // S3 and registries answer within 200 ms; ten seconds of nothing is a dead connection.
            origin_idle_timeout_ms: 10_000,
        }
    }
}

impl Config {
    const fn stall_timeout(&self) -> Duration {
        Duration::from_millis(self.stall_timeout_ms)
    }

    const fn peer_idle_timeout(&self) -> Duration {
        Duration::from_millis(self.peer_idle_timeout_ms)
    }

    const fn origin_idle_timeout(&self) -> Duration {
        Duration::from_millis(self.origin_idle_timeout_ms)
    }
}

/// Handle to the engine; cheap to clone.
#[derive(Clone)]
pub struct Cache {
    shared: Arc<Shared>,
}

/// What the cache is built from.
pub struct Parts {
    pub config: Config,
    pub swarm: Swarm,
    pub store: Store,
    pub transport: Arc<dyn Transport>,
    /// Published by gossip.
    pub peers: watch::Receiver<PeerBook>,
    pub metrics: Metrics,
    pub shutdown: CancellationToken,
}

/// What is known of a content without asking anyone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Bytes.
    pub size: u64,
    pub sealed: bool,
    pub have_bytes: u64,
}

/// One line of `contents`.
#[derive(Clone, Debug, Serialize)]
pub struct ContentSummary {
    pub name: String,
    pub key: String,
    pub size: u64,
    pub have_bytes: u64,
    pub sealed: bool,
    /// Somebody on this node has it open.
    pub open: bool,
    /// Milliseconds since the Unix epoch.
    pub last_used_ms: u64,
}

impl Cache {
    /// Starts the engine. Its tasks end when `shutdown` is cancelled; [`Cache::stopped`] waits for them.
    pub fn start(parts: Parts) -> Self {
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let shared = Arc::new(Shared::new(
            parts.config,
            parts.store,
            parts.transport,
            parts.peers,
            commands,
            parts.metrics,
            parts.shutdown,
        ));
        shared.tasks.spawn(driver::run(Arc::clone(&shared), parts.swarm, inbox));
        Self { shared }
    }

    /// Waits until every task of the engine has ended; call after cancelling its token.
    pub async fn stopped(&self) {
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }

    #[must_use]
    pub fn chunk_bytes(&self) -> u32 {
        self.shared.config.chunk_bytes
    }

    #[must_use]
    pub fn stat(&self, content: &ContentId) -> Option<Stat> {
        let entry = self.shared.store.get(&content.key(self.chunk_bytes()))?;
        let layout = entry.layout();
        Some(Stat { size: layout.size(), sealed: entry.is_sealed(), have_bytes: entry.have().bytes(&layout) })
    }

    /// Opens `content` of `size` bytes; `source` is where to fetch what nobody has. The first opener's source is used
    /// while the content stays open.
    ///
    /// # Errors
    /// When the size cannot be cut into chunks, or at shutdown. A full disk is not an error: bytes then pass through.
    pub async fn open(
        &self,
        content: ContentId,
        size: u64,
        source: Arc<dyn Source>,
    ) -> Result<Content, OpenError> {
        self.open_with(&content, size, Some(source)).await
    }

    /// [`Self::open`]; without a source, chunks come from peers or not at all, until somebody opens it with one.
    async fn open_with(
        &self,
        content: &ContentId,
        size: u64,
        source: Option<Arc<dyn Source>>,
    ) -> Result<Content, OpenError> {
        if self.shared.shutdown.is_cancelled() {
            return Err(OpenError::Shutdown);
        }
        let layout = Layout::new(size, self.chunk_bytes())?;
        let key = content.key(layout.chunk_bytes());
        let open = match self.shared.opened(key) {
            Some(open) => open,
            None => {
                let entry = self.entry(content, layout).await;
                let made = || Arc::new(Open::new(Arc::clone(&self.shared), content.clone(), layout, entry));
                self.shared.open_with(key, made)
            }
        };
        if let Some(source) = source {
            open.adopt(source);
        }
        self.shared.mark_dirty(key);
        seal::begin(&open);
        Ok(Content { open })
    }

    /// The content's place in the store, with every chunk in `have` that is there, even if the last run was killed
    /// over it: what the store lacks is fetched at once.
    async fn entry(&self, content: &ContentId, layout: Layout) -> Option<Arc<Entry>> {
        let entry = self.shared.store.create(content, layout).inspect_err(|error| {
            tracing::warn!(%content, %error, "no room on disk: the content passes through memory");
        });
        let entry = entry.ok()?;
        if tokio::time::timeout(SETTLE_DEADLINE, entry.settle()).await.is_err() {
            tracing::warn!(%content, "the disk is slow: chunks are fetched again instead of being checked");
        }
        Some(entry)
    }

    /// Every content on disk.
    #[must_use]
    pub fn contents(&self) -> Vec<ContentSummary> {
        let summary = |s: Summary| ContentSummary {
            name: s.id.to_string(),
            key: s.key.hex(),
            size: s.layout.size(),
            have_bytes: s.have.bytes(&s.layout),
            sealed: s.sealed,
            open: self.shared.opened(s.key).is_some(),
            last_used_ms: s.last_used_ms,
        };
        self.shared.store.list().into_iter().map(summary).collect()
    }

    /// The chunk a peer asks for, if it is here or on its way here. Never starts a fetch.
    #[must_use]
    pub fn feed(&self, key: ContentKey, chunk: ChunkIndex) -> Option<Feed> {
        Feed::unchecked(&self.shared, key, chunk)
    }

    /// Asks the swarm whether `peer` may have an upload now. The upload ends when the permit is dropped.
    ///
    /// # Errors
    /// The answer to give the peer instead.
    pub async fn admit(
        &self,
        peer: NodeId,
        key: ContentKey,
        chunk: ChunkIndex,
    ) -> Result<UploadPermit, Refusal> {
        self.shared.store.peer_asks(&key, peer);
        let (reply, answer) = oneshot::channel();
        let asked = self.shared.commands.send(Command::Admit { peer, key, chunk, reply }).await;
        match asked.ok().and(answer.await.ok()) {
            Some(Admission::Serve { also }) => Ok(UploadPermit { shared: Arc::clone(&self.shared), also }),
            Some(Admission::NotFound) => Err(Refusal::NotFound),
            // No answer: the engine is shutting down.
            Some(Admission::Busy) | None => Err(Refusal::Busy),
        }
    }

    /// A claim message from `from`, still encoded.
    pub async fn message(&self, from: NodeId, bytes: bytes::Bytes) {
        // The engine being gone means shutdown: there is nobody to tell.
        let _ = self.shared.commands.send(Command::Message { from, bytes }).await;
    }

    /// No connection to `peer` is left.
    pub async fn disconnected(&self, peer: NodeId) {
        let _ = self.shared.commands.send(Command::PeerLost { peer }).await;
    }

    /// Offers what nobody else holds to those who stay, and returns when they have it, nobody is left to offer it to, or
    /// at the deadline. This node goes on to serve meanwhile; it takes no such offers from now on.
    pub async fn part(&self, deadline: Duration) {
        self.shared.begin_parting();
        parting::run(&self.shared, tokio::time::Instant::now() + deadline).await;
    }

    /// Offers to each of `nodes` what is held here of the contents that `is_meant`, and says what they answer; `None` is
    /// silence. Again is how to see how far they are. Who takes fetches by its own rules, into free room.
    pub async fn offer(
        &self,
        is_meant: impl Fn(&Summary) -> bool,
        nodes: &[NodeId],
    ) -> Vec<(ContentId, NodeId, Option<Reply>)> {
        parting::offer(&self.shared, is_meant, nodes).await
    }

    /// Counts bytes that left for `peer`.
    pub fn sent(&self, peer: NodeId, bytes: u64) {
        self.shared.metrics.sent_to_peer(&self.shared.zone_of(peer), bytes);
    }
}

/// One content, open. Keeps it from eviction while it lives; cheap to clone.
#[derive(Clone)]
pub struct Content {
    open: Arc<Open>,
}

impl Content {
    #[must_use]
    pub fn id(&self) -> &ContentId {
        &self.open.id
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.open.layout.size()
    }

    /// The bytes of `range`, clamped to the content.
    #[must_use]
    pub fn read(&self, range: ByteRange) -> Reader {
        Reader::new(&self.open, range)
    }

    /// Wants every chunk and returns when the whole is verified.
    ///
    /// # Errors
    /// When the content cannot be had, or the disk cannot hold it.
    pub async fn fill(&self) -> Result<(), ReadError> {
        let _demand = self.open.demand_all();
        seal::wait(&self.open, Until::Sealed).await?;
        if self.open.is_unstorable() {
            return Err(ReadError::Store {
                content: self.open.id.to_string(),
                reason: "there is no room on the disk within the budget; raise store.budget or free space"
                    .into(),
            });
        }
        Ok(())
    }

    /// [`Self::fill`] in a task of the cache's; a failure is logged, for whoever really needs the bytes will ask again.
    pub fn prefetch(&self) {
        let content = self.clone();
        self.open.shared.tasks.spawn(async move {
            if let Err(error) = content.fill().await {
                tracing::info!(content = %content.id(), %error, "prefetch ended early");
            }
        });
    }

    /// Fetches the chunks of `range` again from the origin, for they are not what they should be.
    ///
    /// # Errors
    /// When the origin does not deliver, or the disk cannot hold it.
    pub async fn redo(&self, range: ByteRange) -> Result<(), ReadError> {
        seal::redo(&self.open, self.open.layout.chunks_of(range).collect()).await
    }

    /// Drops the chunks of `range` from the store: they are wrong, and so is what the origin sends.
    pub async fn discard(&self, range: ByteRange) {
        seal::discard(&self.open, self.open.layout.chunks_of(range).collect()).await;
    }

    #[must_use]
    pub fn progress(&self) -> Progress {
        self.open.progress()
    }

    /// Bytes that came in since the content was opened, of whole chunks and of parts of chunks.
    #[must_use]
    pub fn taken_in(&self) -> u64 {
        self.open.taken_in()
    }

    /// Keeps the stored copy from eviction for `lease` from now on, if not longer already. Nothing to do for a content
    /// that the disk has no room for.
    ///
    /// # Errors
    /// When the disk does not take the record.
    pub async fn pin_for(&self, lease: Duration) -> std::io::Result<()> {
        let Some(entry) = &self.open.entry else { return Ok(()) };
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let end_ms = u64::try_from((since_1970 + lease).as_millis()).unwrap_or(u64::MAX - 1);
        entry.pin_at_least(Pin::Until(end_ms)).await
    }

    /// Puts the sealed content at `destination`.
    ///
    /// # Errors
    /// As the store's `place`.
    pub async fn place(&self, destination: &Path, options: PlaceOptions) -> Result<Placement, PlaceError> {
        match &self.open.entry {
            Some(entry) => entry.place(destination, options).await,
            None => Err(PlaceError::NotSealed),
        }
    }
}

/// An upload the swarm admitted.
pub struct UploadPermit {
    shared: Arc<Shared>,
    /// What else to tell the peer that is here.
    pub also: Vec<(StripeIndex, u64)>,
}

/// Why a peer does not get a chunk now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Ask another holder.
    Busy,
    /// This node neither has the chunk nor is receiving it.
    NotFound,
}

impl Drop for UploadPermit {
    fn drop(&mut self) {
        self.shared.end_upload();
    }
}

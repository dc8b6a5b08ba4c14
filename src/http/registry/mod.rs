//! The registry mirror: what containerd asks instead of the registry, through `hosts.toml`.
//!
//! Invariant: a response's headers go out when its first byte is in hand, and its body is right or ends early with
//! FIN; whatever cannot be served is a 404, on which containerd goes to its next host (`facts/wire.md` section 0).
//! This module refuses to fetch and to verify, which the cache does, to dial what a client names (`ns` is a key), and
//! to write: it is the pull half of the distribution specification.
//!
//! `access = "node"`: who reaches the listener may read what a registry lets this node read. `access = "caller"`: what
//! it lets that caller read ([`Callers`]).

mod ahead;
mod callers;
mod doubted;
mod known;
mod refusal;
mod response;
mod tags;
#[cfg(test)]
mod tests;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use http::header::{ACCEPT, USER_AGENT};
use http::{HeaderMap, Method, Request, Response, request};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha512};
use tokio::time::Instant;

use super::served::{Face, Metered, Served};
use crate::cache::{Cache, Content};
use crate::content::{Algorithm, ByteRange, ContentId, Digest};
use crate::oci::{self, Descriptor, MAX_MANIFEST_BYTES, Platform, Reference, RepositoryName, Route, Target};
use crate::origin::registry::{AGENT, Registry, RegistryConfig, RegistryOrigin};

pub use callers::Callers;
pub use response::MirrorBody;

use doubted::Doubted;
use known::Known;
use refusal::Refusal;
use response::{BLOB, Headers, wanted};
use tags::Tags;

/// Longest wait for a first byte while bytes of its content do arrive: containerd from 1.7 on cancels a pull that
/// received nothing for five minutes, and a body must have begun long before.
const FIRST_BYTE_PATIENCE: Duration = Duration::from_secs(60);

/// `[registry]`: the mirror and the registries behind it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where it listens. Where `access = "node"`, clients are not asked who they are: leave it on loopback.
    pub listen: SocketAddr,
    /// Longest wait for a response's first byte while nothing of its content arrives, in milliseconds; then 404, and
    /// containerd asks the registry itself. Too short a wait sends it there while a busy origin is merely slow.
    pub first_byte_deadline_ms: u64,
    /// How long what a tag stands for is remembered, in milliseconds: one pull asks twice. 0 asks each time.
    pub tag_ttl_ms: u64,
    /// While a registry cannot be reached, answer with what a tag last stood for.
    pub serve_stale_tags: bool,
    /// Layers that are started when their manifest is read, before containerd asks for them, at most; 0 starts none.
    pub prefetch_layers: usize,
    /// The registries that are mirrored.
    pub origins: Vec<RegistryConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 5100)),
            // Registries answer in a second; ten are what a queue behind a busy one may take.
            first_byte_deadline_ms: 10_000,
            tag_ttl_ms: 1_000,
            serve_stale_tags: false,
            // Container images have at most 127 layers, those of models a few large ones.
            prefetch_layers: 127,
            origins: Vec::new(),
        }
    }
}

impl Config {
    /// How long what a tag stands for is remembered.
    #[must_use]
    pub const fn tag_ttl(&self) -> Duration {
        Duration::from_millis(self.tag_ttl_ms)
    }
}

/// The mirror, ready to answer; cheap to clone.
#[derive(Clone)]
pub struct Mirror {
    shared: Arc<Shared>,
}

struct Shared {
    cache: Cache,
    origin: RegistryOrigin,
    callers: Arc<Callers>,
    tags: Tags,
    known: Known,
    doubted: Arc<Doubted>,
    platform: Platform,
    first_byte_deadline: Duration,
    prefetch_layers: usize,
    served: Served,
}

/// What matters of a request beside its route.
struct Asked<'a> {
    method: &'a Method,
    headers: &'a HeaderMap,
    /// When it came.
    at: Instant,
}

impl Mirror {
    #[must_use]
    pub fn new(
        config: &Config,
        cache: Cache,
        origin: RegistryOrigin,
        callers: Arc<Callers>,
        served: Served,
    ) -> Self {
        let tags = Tags::new(config.tag_ttl(), config.serve_stale_tags);
        let shared = Shared {
            cache,
            origin,
            callers,
            tags,
            known: Known::default(),
            doubted: Arc::default(),
            platform: Platform::of_this_build(),
            first_byte_deadline: Duration::from_millis(config.first_byte_deadline_ms),
            prefetch_layers: config.prefetch_layers,
            served,
        };
        Self { shared: Arc::new(shared) }
    }

    /// Answers one request; every failure is an error document of the distribution specification.
    pub async fn answer<B>(&self, request: Request<B>) -> Response<MirrorBody> {
        let (parts, _) = request.into_parts();
        let response = match self.shared.answer(&parts).await {
            Ok(response) => response,
            Err(refusal) => {
                refusal.log(&parts);
                refusal.into_response(&parts)
            }
        };
        self.shared.served.request(Face::Registry, response.status());
        response
    }
}

impl Shared {
    async fn answer(&self, parts: &request::Parts) -> Result<Response<MirrorBody>, Refusal> {
        let asked = Asked { method: &parts.method, headers: &parts.headers, at: Instant::now() };
        if is_own(asked.headers) {
            return Err(Refusal::Loop);
        }
        let route = Route::parse(&parts.method, parts.uri.path(), parts.uri.query())?;
        match route.target {
            Target::Base => Ok(response::base()),
            Target::Manifest { name, reference } => {
                let registry = self.registry(route.namespace.as_deref())?;
                self.manifest(&asked, registry, &name, &reference).await
            }
            Target::Blob { name, digest } => {
                let registry = self.registry(route.namespace.as_deref())?;
                self.in_time(self.callers.admit_to_blob(asked.headers, registry, &name, &digest)).await?;
                self.blob(&asked, registry, &name, &digest).await
            }
        }
    }

    /// The registry that a client means; without `ns`, the only one there is.
    fn registry(&self, namespace: Option<&str>) -> Result<&Arc<Registry>, Refusal> {
        let found = match namespace {
            Some(name) => self.origin.get(name),
            None => self.origin.only(),
        };
        found.ok_or_else(|| Refusal::Namespace {
            asked: namespace.map(str::to_owned),
            configured: self.origin.names().map(str::to_owned).collect(),
        })
    }

    async fn manifest(
        &self,
        asked: &Asked<'_>,
        registry: &Arc<Registry>,
        name: &RepositoryName,
        reference: &Reference,
    ) -> Result<Response<MirrorBody>, Refusal> {
        let described = self.in_time(self.describe_manifest(asked, registry, name, reference)).await?;
        let headers = Headers { descriptor: &described, namespace: registry.name() };
        if asked.method == Method::HEAD {
            return Ok(headers.head());
        }
        let (status, range) = wanted(asked.headers, described.size)?;
        let bytes = self.in_time(self.read_manifest(registry, name, &described)).await?;
        self.served.first_byte(Face::Registry, asked.at.elapsed());
        self.start_ahead(registry, name, &described.digest, &bytes).await;
        let (start, end) = (position(range.start()), position(range.end()));
        Ok(headers.with_bytes(status, range, bytes.slice(start..end)))
    }

    /// Digest, size and media type of the manifest that `reference` stands for.
    async fn describe_manifest(
        &self,
        asked: &Asked<'_>,
        registry: &Arc<Registry>,
        name: &RepositoryName,
        reference: &Reference,
    ) -> Result<Descriptor, Refusal> {
        let accept = accepted(asked.headers);
        let told =
            self.callers.admit_to_manifest(asked.headers, registry, name, reference, accept.as_deref());
        if let Some(described) = told.await? {
            self.known.remember(&described);
            return Ok(described);
        }
        let described = match reference {
            Reference::Tag(tag) => self.tags.resolve(registry, name, tag, accept.as_deref()).await?,
            Reference::Digest(digest) => match self.known.get(digest) {
                Some(known) => return Ok(known),
                None => self.describe_digest(registry, name, digest).await?,
            },
        };
        self.known.remember(&described);
        Ok(described)
    }

    /// A manifest that is all here describes itself; for any other the registry is asked.
    async fn describe_digest(
        &self,
        registry: &Arc<Registry>,
        name: &RepositoryName,
        digest: &Digest,
    ) -> Result<Descriptor, Refusal> {
        if let Some(size) = self.sealed_size(digest).filter(|size| *size <= MAX_MANIFEST_BYTES) {
            let mut described = Descriptor { digest: digest.clone(), size, media_type: BLOB.to_owned() };
            let bytes = self.read_manifest(registry, name, &described).await?;
            if let Some(media_type) = oci::media_type(&bytes) {
                described.media_type = media_type;
                return Ok(described);
            }
        }
        let resolved = registry.resolve(name, &Reference::Digest(digest.clone()), None).await?;
        Ok(Descriptor { digest: resolved.digest, size: resolved.size, media_type: resolved.media_type })
    }

    /// The whole manifest, verified: it is read to know what comes next, so it is taken into memory.
    async fn read_manifest(
        &self,
        registry: &Arc<Registry>,
        name: &RepositoryName,
        described: &Descriptor,
    ) -> Result<Bytes, Refusal> {
        match described.size {
            0 => return Err(Refusal::Empty),
            size if size > MAX_MANIFEST_BYTES => return Err(Refusal::ManifestTooLong { size }),
            _ => {}
        }
        let source = registry.manifest(name.clone(), described.digest.clone(), described.size);
        let id = ContentId::Blob(described.digest.clone());
        let content = self.cache.open(id, described.size, Arc::new(source)).await?;
        let reader = self.served.metered(Face::Registry, content.read(ByteRange::new(0, described.size)));
        let whole: Vec<u8> = reader.map_ok(|piece| piece.to_vec()).try_concat().await?;
        Ok(whole.into())
    }

    async fn blob(
        &self,
        asked: &Asked<'_>,
        registry: &Arc<Registry>,
        name: &RepositoryName,
        digest: &Digest,
    ) -> Result<Response<MirrorBody>, Refusal> {
        let size = self.in_time(self.blob_size(registry, name, digest)).await?;
        let described = Descriptor { digest: digest.clone(), size, media_type: BLOB.to_owned() };
        let headers = Headers { descriptor: &described, namespace: registry.name() };
        if asked.method == Method::HEAD {
            return Ok(headers.head());
        }
        let (status, range) = wanted(asked.headers, size)?;
        if range.is_empty() {
            return if is_of_nothing(digest) {
                Ok(headers.with_bytes(status, range, Bytes::new()))
            } else {
                Err(Refusal::Empty)
            };
        }
        if self.doubted.holds(digest) && self.sealed_size(digest).is_none() {
            return Err(Refusal::Doubted);
        }
        let source = registry.blob(name.clone(), digest.clone(), size);
        let content = self.cache.open(ContentId::Blob(digest.clone()), size, Arc::new(source)).await?;
        let mut reader = self.served.metered(Face::Registry, content.read(range));
        let first = self.first_piece(&content, &mut reader, asked.at).await.inspect_err(|refusal| {
            if let Refusal::Read(error) = refusal {
                self.doubted.note(digest, error);
            }
        })?;
        self.served.first_byte(Face::Registry, asked.at.elapsed());
        let (doubted, digest) = (Arc::clone(&self.doubted), digest.clone());
        let rest = reader.inspect_err(move |error| doubted.note(&digest, error));
        Ok(headers.with_stream(status, range, first, rest))
    }

    /// A blob's size: verified, else from its manifest, else as the registry says, else as the cache has it: of what is not
    /// verified the cache may know only what a node that left said.
    async fn blob_size(
        &self,
        registry: &Arc<Registry>,
        name: &RepositoryName,
        digest: &Digest,
    ) -> Result<u64, Refusal> {
        if let Some(size) = self.sealed_size(digest) {
            return Ok(size);
        }
        if let Some(known) = self.known.get(digest) {
            return Ok(known.size);
        }
        match registry.blob_size(name, digest).await {
            Ok(size) => {
                self.known.remember(&Descriptor {
                    digest: digest.clone(),
                    size,
                    media_type: BLOB.to_owned(),
                });
                Ok(size)
            }
            Err(error) => match self.cache.stat(&ContentId::Blob(digest.clone())) {
                Some(stat) => Ok(stat.size),
                None => Err(error.into()),
            },
        }
    }

    /// The size of a content that is all here and verified.
    fn sealed_size(&self, digest: &Digest) -> Option<u64> {
        let stat = self.cache.stat(&ContentId::Blob(digest.clone()))?;
        stat.sealed.then_some(stat.size)
    }

    /// The first bytes of a body. While bytes of its content come in, the wait goes on: a slow origin is not a dead one,
    /// what a peer sends is shown when its chunk is whole, and the last chunk of a blob waits for all before it.
    async fn first_piece(
        &self,
        content: &Content,
        reader: &mut Metered,
        asked_at: Instant,
    ) -> Result<Bytes, Refusal> {
        loop {
            let before = content.taken_in();
            match tokio::time::timeout(self.first_byte_deadline, reader.next()).await {
                Ok(Some(piece)) => return Ok(piece?),
                // A range that is not empty yields at least one piece.
                Ok(None) => return Err(Refusal::TooSlow { waited: asked_at.elapsed() }),
                Err(_) => {
                    let has_moved = content.taken_in() > before;
                    if !has_moved || asked_at.elapsed() > FIRST_BYTE_PATIENCE {
                        return Err(Refusal::TooSlow { waited: asked_at.elapsed() });
                    }
                }
            }
        }
    }

    async fn in_time<T>(&self, answer: impl Future<Output = Result<T, Refusal>>) -> Result<T, Refusal> {
        let deadline = self.first_byte_deadline;
        tokio::time::timeout(deadline, answer).await.unwrap_or(Err(Refusal::TooSlow { waited: deadline }))
    }
}

/// Whether this node's own registry client asks: its endpoint points at a mirror instead of a registry.
fn is_own(headers: &HeaderMap) -> bool {
    headers.get(USER_AGENT).is_some_and(|agent| agent == AGENT)
}

/// Whether no bytes at all have this digest: the one content that is verified without being read.
fn is_of_nothing(digest: &Digest) -> bool {
    match digest.algorithm() {
        Algorithm::Sha256 => digest.as_bytes() == Sha256::digest([]).as_slice(),
        Algorithm::Sha512 => digest.as_bytes() == Sha512::digest([]).as_slice(),
    }
}

/// The media types a client accepts, from all its `Accept` lines; `None` when it takes anything.
///
/// docker-registry does not understand `*/*` as anything, so a bare one is not passed on.
fn accepted(headers: &HeaderMap) -> Option<String> {
    let lines: Vec<_> = headers.get_all(ACCEPT).into_iter().filter_map(|line| line.to_str().ok()).collect();
    Some(lines.join(", ")).filter(|accepted| !matches!(accepted.as_str(), "" | "*/*"))
}

/// A position in a manifest, which is in memory.
fn position(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

//! OCI registries as origins: any that speaks the distribution specification.
//!
//! Invariant: a credential goes to the registry it is for, and to the token service that the registry names, and
//! to no other host; it is in no message and no log.
//! This module refuses to verify digests, to remember tags and to choose among registries: its callers do.

mod address;
mod authorizer;
mod caller;
mod challenge;
mod client;
mod config;
mod content;
mod credentials;
mod ecr;
mod exchange;
mod location;
#[cfg(test)]
pub mod stub;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use http::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, Method, StatusCode};
use sha2::{Digest as _, Sha256};
use url::Url;

pub use client::AGENT;
pub use config::{ConfigError, Credentials, RegistryConfig};
pub use content::Content;
pub use credentials::Credential;

use self::authorizer::Authorizer;
use self::client::Client;
use self::ecr::EcrTokens;
use self::exchange::{Answer, Question, ask};
use self::location::Locations;
use super::access::Access;
use super::{Kind, Metrics, OriginError};
use crate::content::{Algorithm, ByteRange, Digest};
use crate::oci::{self, MAX_MANIFEST_BYTES, Reference, RepositoryName};

const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// Every kind of manifest that containerd reads. A registry that is not told converts to the oldest.
const ANY_MANIFEST: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json, */*";

/// What a repository's blobs are under; manifests are under another name.
const BLOBS: &str = "blobs";

/// The registries that are configured, by the name under which clients know them.
#[derive(Clone, Debug)]
pub struct RegistryOrigin {
    registries: BTreeMap<String, Arc<Registry>>,
}

impl RegistryOrigin {
    /// Prepares a client for each registry; sends nothing.
    ///
    /// # Errors
    /// [`ConfigError`] on the first table that cannot be used.
    pub fn new(configs: Vec<RegistryConfig>, metrics: &Metrics) -> Result<Self, ConfigError> {
        let mut registries = BTreeMap::new();
        let ecr = EcrTokens::new();
        for config in configs {
            let registry = Arc::new(Registry::new(&config, &ecr, metrics)?);
            if registries.insert(config.name.clone(), registry).is_some() {
                return Err(ConfigError::Twice(config.name));
            }
        }
        Ok(Self { registries })
    }

    /// The registry of that name, as clients send it in `ns`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Arc<Registry>> {
        self.registries.get(name)
    }

    /// The registry, when exactly one is configured.
    #[must_use]
    pub fn only(&self) -> Option<&Arc<Registry>> {
        self.registries.values().next().filter(|_| self.registries.len() == 1)
    }

    /// The names, ascending.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.registries.keys().map(String::as_str)
    }
}

/// What a manifest reference stands for at this moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedManifest {
    pub digest: Digest,
    pub media_type: String,
    /// Bytes.
    pub size: u64,
}

/// One registry.
#[derive(Debug)]
pub struct Registry {
    client: Arc<Client>,
    authorizer: Authorizer,
    locations: Locations,
    access: Access,
}

impl Registry {
    fn new(config: &RegistryConfig, ecr: &Arc<EcrTokens>, metrics: &Metrics) -> Result<Self, ConfigError> {
        Ok(Self {
            client: Arc::new(Client::new(config, metrics.origin(&config.name))?),
            authorizer: Authorizer::new(config.credential_source(ecr)?),
            locations: Locations::default(),
            access: config.access,
        })
    }

    /// The name under which clients know it.
    #[must_use]
    pub fn name(&self) -> &str {
        self.client.name()
    }

    /// Asks what `reference` stands for now. `accept` is the client's `Accept`, which decides between an index
    /// and a manifest at registries that convert; by default every kind is accepted.
    ///
    /// # Errors
    /// [`OriginError`] when the registry does not say, or it has none.
    pub async fn resolve(
        &self,
        name: &RepositoryName,
        reference: &Reference,
        accept: Option<&str>,
    ) -> Result<ResolvedManifest, OriginError> {
        let url = self.content_url(name, "manifests", &reference.to_string())?;
        let accept = Some(accept.unwrap_or(ANY_MANIFEST));
        let question =
            Question { method: Method::HEAD, name, url, accept, range: None, kind: Kind::Metadata };
        let Answer { response, .. } = self.ask(&question).await?;
        let said = response.status().is_success().then(|| read_resolved(response.headers(), reference));
        match said.flatten() {
            Some(resolved) => Ok(resolved),
            None => self.resolve_by_reading(question, reference).await,
        }
    }

    /// Asks how long a blob is, in bytes.
    ///
    /// # Errors
    /// [`OriginError`] when the registry does not say, or does not have it.
    pub async fn blob_size(&self, name: &RepositoryName, digest: &Digest) -> Result<u64, OriginError> {
        let url = self.content_url(name, BLOBS, &digest.to_string())?;
        let mut question =
            Question { method: Method::HEAD, name, url, accept: None, range: None, kind: Kind::Metadata };
        match self.ask(&question).await {
            Ok(Answer { response, .. }) => {
                let is_said = response.status().is_success();
                if is_said && let Some(size) = number(response.headers(), &CONTENT_LENGTH) {
                    return Ok(size);
                }
            }
            Err(error @ (OriginError::NotFound { .. } | OriginError::Throttled { .. })) => return Err(error),
            // A presigned URL is signed for GET: HEAD is refused there.
            Err(_) => {}
        }
        question.method = Method::GET;
        question.range = Some(ByteRange::new(0, 1));
        let Answer { response, .. } = self.ask(&question).await?;
        let size = match response.status() {
            StatusCode::PARTIAL_CONTENT => total(response.headers()),
            _ => number(response.headers(), &CONTENT_LENGTH),
        };
        size.ok_or_else(|| self.client.failed(format!("it does not say how long {digest} is")))
    }

    /// The blob's bytes. Sends nothing until it is read.
    #[must_use]
    pub fn blob(self: &Arc<Self>, name: RepositoryName, digest: Digest, size: u64) -> Content {
        Content { registry: Arc::clone(self), name, digest, size, path: BLOBS, accept: None }
    }

    /// The manifest's bytes. Sends nothing until it is read.
    #[must_use]
    pub fn manifest(self: &Arc<Self>, name: RepositoryName, digest: Digest, size: u64) -> Content {
        let accept = Some(ANY_MANIFEST);
        Content { registry: Arc::clone(self), name, digest, size, path: "manifests", accept }
    }

    /// Learns from the manifest itself what a HEAD did not say.
    async fn resolve_by_reading(
        &self,
        mut question: Question<'_>,
        reference: &Reference,
    ) -> Result<ResolvedManifest, OriginError> {
        question.method = Method::GET;
        let Answer { response, .. } = self.ask(&question).await?;
        let headers = response.headers().clone();
        let limit = usize::try_from(MAX_MANIFEST_BYTES).unwrap_or(usize::MAX);
        let bytes = self.client.read_whole(response, limit).await?;
        let computed = || Digest::from_bytes(Algorithm::Sha256, &Sha256::digest(&bytes)).ok();
        let digest = match reference {
            Reference::Digest(digest) => Some(digest.clone()),
            Reference::Tag(_) => said_digest(&headers).or_else(computed),
        };
        let media_type = said_media_type(&headers).or_else(|| oci::media_type(&bytes));
        let (Some(digest), Some(media_type)) = (digest, media_type) else {
            return Err(self.client.failed(format!("{}:{reference} there is no manifest", question.name)));
        };
        Ok(ResolvedManifest { digest, media_type, size: bytes.len() as u64 })
    }

    async fn ask(&self, question: &Question<'_>) -> Result<Answer, OriginError> {
        // Boxed: tokens, redirects and retries lie so deep that every caller's future would hold all of it.
        self.client.care().ask(|| Box::pin(ask(&self.client, &self.authorizer, question, &|_| ()))).await
    }

    /// `kind` is `blobs` or `manifests`. Names, tags and digests obey grammars that need no escaping in a path.
    fn content_url(&self, name: &RepositoryName, kind: &str, reference: &str) -> Result<Url, OriginError> {
        self.client.url(&format!("v2/{name}/{kind}/{reference}"))
    }
}

/// What a HEAD said about a manifest; `None` unless it said everything.
fn read_resolved(headers: &HeaderMap, reference: &Reference) -> Option<ResolvedManifest> {
    let digest = match reference {
        Reference::Digest(digest) => digest.clone(),
        Reference::Tag(_) => said_digest(headers)?,
    };
    let size = number(headers, &CONTENT_LENGTH).filter(|size| *size > 0)?;
    Some(ResolvedManifest { digest, media_type: said_media_type(headers)?, size })
}

fn said_digest(headers: &HeaderMap) -> Option<Digest> {
    headers.get(DOCKER_CONTENT_DIGEST)?.to_str().ok()?.trim().parse().ok()
}

/// The media type without parameters; `None` for one that says nothing, which containerd takes for a blob.
fn said_media_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    let essence = value.split(';').next().unwrap_or_default().trim();
    let says_nothing = matches!(essence, "" | "application/octet-stream" | "text/plain" | "application/json");
    (!says_nothing).then(|| essence.to_owned())
}

fn number(headers: &HeaderMap, name: &HeaderName) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// The part behind the slash of `Content-Range`.
fn total(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_RANGE)?.to_str().ok()?.rsplit_once('/')?.1.trim().parse().ok()
}

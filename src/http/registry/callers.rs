//! Whose pull it is, where `access = "caller"`: the registry is asked in the caller's name, and its word is remembered.
//!
//! Invariant: a caller gets from a repository what the registry lets that caller get from that repository, blob by blob
//! and manifest by manifest; that the bytes are here already, or that the caller may read them in another repository,
//! changes nothing. Somebody without a credential is let in where the registry lets in anybody.
//! This module refuses to fetch with a caller's credential: bytes come with this node's own. A credential is in memory
//! while its question is asked and for at most [`access::Config::permit_ttl_ms`] after, then it is overwritten.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::refusal::Refusal;
use super::response::BLOB;
use crate::content::Digest;
use crate::oci::{Descriptor, Reference, RepositoryName};
use crate::origin::OriginError;
use crate::origin::access::{self, Access, CallerId, Fingerprints, Proofs};
use crate::origin::recent::Recent;
use crate::origin::registry::{Credential, Registry};

/// Callers whose credential and tokens are kept for their next question: one per pull secret in use on the node.
const REMEMBERED_CALLERS: usize = 256;

/// How often it is looked for credentials that are kept no longer.
const TIDY_PERIOD: Duration = Duration::from_secs(1);

/// What registries said of callers, and the callers themselves for as long as they are remembered.
pub struct Callers {
    proofs: Proofs<Wanted, Descriptor>,
    fingerprints: Fingerprints,
    views: Mutex<Recent<(String, CallerId), View>>,
    view_ttl: Duration,
    tag_ttl: Duration,
    metrics: access::Metrics,
}

/// What a caller wants to read.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Wanted {
    registry: String,
    name: RepositoryName,
    what: What,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum What {
    Blob(Digest),
    Manifest {
        reference: Reference,
        /// A registry may answer differently to a client that accepts other media types.
        accept: Option<String>,
    },
}

/// A registry in one caller's name.
#[derive(Clone)]
struct View {
    made: Instant,
    registry: Arc<Registry>,
}

impl Callers {
    /// Knows nobody yet. What a tag stands for is asked again after `tag_ttl`.
    #[must_use]
    pub fn new(config: &access::Config, tag_ttl: Duration, metrics: &access::Metrics) -> Self {
        Self {
            proofs: Proofs::new(config, "registry", metrics),
            fingerprints: Fingerprints::default(),
            views: Mutex::new(Recent::new(REMEMBERED_CALLERS)),
            view_ttl: config.permit_ttl(),
            tag_ttl,
            metrics: metrics.clone(),
        }
    }

    /// Whether the caller may read a manifest, and what the registry says of it; `None` where the node's right counts.
    pub(super) async fn admit_to_manifest(
        &self,
        headers: &HeaderMap,
        registry: &Arc<Registry>,
        name: &RepositoryName,
        reference: &Reference,
        accept: Option<&str>,
    ) -> Result<Option<Descriptor>, Refusal> {
        let is_tag = matches!(reference, Reference::Tag(_));
        let accept = accept.filter(|_| is_tag);
        let what = What::Manifest { reference: reference.clone(), accept: accept.map(str::to_owned) };
        let ask = async |view: Arc<Registry>| {
            let resolved = view.resolve(name, reference, accept).await?;
            Ok(Descriptor { digest: resolved.digest, size: resolved.size, media_type: resolved.media_type })
        };
        let fresh = is_tag.then_some(self.tag_ttl);
        self.admit(headers, registry, name, what, fresh, ask).await
    }

    /// Whether the caller may read a blob of the repository.
    pub(super) async fn admit_to_blob(
        &self,
        headers: &HeaderMap,
        registry: &Arc<Registry>,
        name: &RepositoryName,
        digest: &Digest,
    ) -> Result<(), Refusal> {
        let ask = async |view: Arc<Registry>| {
            let size = view.blob_size(name, digest).await?;
            Ok(Descriptor { digest: digest.clone(), size, media_type: BLOB.to_owned() })
        };
        self.admit(headers, registry, name, What::Blob(digest.clone()), None, ask).await.map(drop)
    }

    async fn admit<F>(
        &self,
        headers: &HeaderMap,
        registry: &Arc<Registry>,
        name: &RepositoryName,
        what: What,
        fresh: Option<Duration>,
        ask: impl FnOnce(Arc<Registry>) -> F,
    ) -> Result<Option<Descriptor>, Refusal>
    where
        F: Future<Output = Result<Descriptor, OriginError>>,
    {
        if registry.access() == Access::Node {
            return Ok(None);
        }
        let credential = headers.get(AUTHORIZATION).and_then(Credential::from_basic);
        let is_named = credential.is_some();
        let caller = match &credential {
            Some(credential) => {
                let [username, password] = credential.parts();
                self.fingerprints.of(&[registry.name().as_bytes(), username, password])
            }
            None => self.fingerprints.of(&[]),
        };
        let wanted = Wanted { registry: registry.name().to_owned(), name: name.clone(), what };
        let question = || ask(self.view(registry, caller, credential));
        match self.proofs.get(caller, wanted, fresh, question).await {
            Ok(descriptor) => Ok(Some(descriptor)),
            // Whatever the reason: only who brings a credential can be told it, or is known from before.
            Err(_) if !is_named => Err(Refusal::Unnamed { registry: registry.name().to_owned() }),
            Err(error @ OriginError::Denied { .. }) => Err(Refusal::Stranger(error)),
            Err(error) => Err(Refusal::Origin(error)),
        }
    }

    /// The registry in the caller's name, with the tokens of the caller's last questions.
    fn view(
        &self,
        registry: &Arc<Registry>,
        caller: CallerId,
        credential: Option<Credential>,
    ) -> Arc<Registry> {
        let now = Instant::now();
        let mut views = self.views.lock();
        let key = (registry.name().to_owned(), caller);
        if let Some(view) = views.get(&key)
            && self.is_kept(view, now)
        {
            return Arc::clone(&view.registry);
        }
        let view = View { made: now, registry: Arc::new(registry.seen_by(credential)) };
        views.insert(key, view.clone());
        self.metrics.callers(views.len());
        view.registry
    }

    /// How many callers' credentials are in memory.
    #[cfg(test)]
    pub(super) fn remembered(&self) -> usize {
        self.views.lock().len()
    }

    fn is_kept(&self, view: &View, now: Instant) -> bool {
        now.saturating_duration_since(view.made) < self.view_ttl
    }

    /// Overwrites credentials as their time ends, until `stop`.
    pub async fn tidy(&self, stop: CancellationToken) {
        let mut ticks = interval(TIDY_PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            let now = Instant::now();
            let mut views = self.views.lock();
            views.retain(|view| self.is_kept(view, now));
            self.metrics.callers(views.len());
        }
    }
}

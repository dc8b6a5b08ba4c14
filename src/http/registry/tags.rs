//! What tags stand for: asked at the registry, remembered for a moment.
//!
//! Invariant: a tag is asked for once at a time, and an answer older than the time to live is given only while the
//! registry cannot be reached and the configuration allows it.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::oci::{Descriptor, Reference, RepositoryName, Tag};
use crate::origin::OriginError;
use crate::origin::recent::Recent;
use crate::origin::registry::Registry;

/// Tags remembered: a node runs some dozens of images.
const REMEMBERED: usize = 1024;

/// The memory of tags.
pub(super) struct Tags {
    ttl: Duration,
    serve_stale: bool,
    slots: Mutex<Recent<Key, Slot>>,
}

/// A registry may answer differently to a client that accepts other media types.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    registry: String,
    name: RepositoryName,
    tag: Tag,
    accept: Option<String>,
}

/// Locked while the registry is asked.
type Slot = Arc<tokio::sync::Mutex<Option<Remembered>>>;

struct Remembered {
    at: Instant,
    manifest: Descriptor,
}

impl Tags {
    pub(super) fn new(ttl: Duration, serve_stale: bool) -> Self {
        Self { ttl, serve_stale, slots: Mutex::new(Recent::new(REMEMBERED)) }
    }

    /// The manifest that `tag` stands for.
    pub(super) async fn resolve(
        &self,
        registry: &Registry,
        name: &RepositoryName,
        tag: &Tag,
        accept: Option<&str>,
    ) -> Result<Descriptor, OriginError> {
        let slot = self.slot(registry, name, tag, accept);
        let mut held = slot.lock().await;
        if let Some(remembered) = &*held
            && remembered.at.elapsed() < self.ttl
        {
            return Ok(remembered.manifest.clone());
        }
        match registry.resolve(name, &Reference::Tag(tag.clone()), accept).await {
            Ok(resolved) => {
                let (digest, size) = (resolved.digest, resolved.size);
                let manifest = Descriptor { digest, size, media_type: resolved.media_type };
                *held = Some(Remembered { at: Instant::now(), manifest: manifest.clone() });
                Ok(manifest)
            }
            Err(error) if self.serve_stale && error.is_transient() => match &*held {
                Some(stale) => {
                    tracing::warn!(%name, %tag, %error, "answering with what the tag last stood for");
                    Ok(stale.manifest.clone())
                }
                None => Err(error),
            },
            Err(error) => {
                *held = None;
                Err(error)
            }
        }
    }

    fn slot(&self, registry: &Registry, name: &RepositoryName, tag: &Tag, accept: Option<&str>) -> Slot {
        let registry = registry.name().to_owned();
        let accept = accept.map(str::to_owned);
        let key = Key { registry, name: name.clone(), tag: tag.clone(), accept };
        self.slots.lock().get_or_insert_with(&key, Slot::default)
    }
}

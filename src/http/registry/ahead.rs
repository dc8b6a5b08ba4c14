//! Starts what a manifest names before containerd asks: it asks for three layers at a time, and finds the rest in
//! flight.

use std::sync::Arc;

use super::Shared;
use crate::content::{ContentId, Digest};
use crate::oci::{Descriptor, Manifest, RepositoryName};
use crate::origin::Source;
use crate::origin::registry::Registry;

impl Shared {
    /// Remembers what the manifest says of its parts and starts those that this node's platform needs. `ctr` reads the
    /// manifests of all platforms, and the layers of one.
    pub(super) async fn start_ahead(
        &self,
        registry: &Arc<Registry>,
        name: &RepositoryName,
        digest: &Digest,
        manifest: &[u8],
    ) {
        match Manifest::parse(manifest, &self.platform) {
            Ok(Manifest::Index { children, chosen }) => {
                self.known.remember_index(&children, chosen.as_ref());
                if let Some(child) = chosen.filter(|_| self.prefetch_layers > 0) {
                    let source = registry.manifest(name.clone(), child.digest.clone(), child.size);
                    self.start(child, Arc::new(source)).await;
                }
            }
            Ok(Manifest::Image { config, layers }) => {
                let parts = config.iter().chain(&layers);
                parts.for_each(|part| self.known.remember(part));
                if self.known.is_foreign(digest) {
                    return;
                }
                let started = layers.into_iter().take(self.prefetch_layers);
                let config = config.filter(|_| self.prefetch_layers > 0);
                for part in config.into_iter().chain(started) {
                    let source = registry.blob(name.clone(), part.digest.clone(), part.size);
                    self.start(part, Arc::new(source)).await;
                }
            }
            Err(error) => tracing::debug!(%name, %error, "nothing to start ahead"),
        }
    }

    /// Starts one content unless it is here, empty, or would be refused. Failing costs only the head start.
    async fn start(&self, part: Descriptor, source: Arc<dyn Source>) {
        if part.size == 0 || self.sealed_size(&part.digest).is_some() || self.doubted.holds(&part.digest) {
            return;
        }
        match self.cache.open(ContentId::Blob(part.digest), part.size, source).await {
            Ok(content) => content.prefetch(),
            Err(error) => tracing::debug!(%error, "cannot start a content ahead"),
        }
    }
}

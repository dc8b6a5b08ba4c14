//! What manifests said about the contents they name, so that a pull asks the registry once and not per layer.

use parking_lot::Mutex;

use crate::content::Digest;
use crate::oci::Descriptor;
use crate::origin::recent::Recent;

/// Descriptors remembered: some hundred images' worth, about 200 bytes each.
const REMEMBERED: usize = 8192;

/// Descriptors by digest.
pub(super) struct Known {
    descriptors: Mutex<Recent<Digest, Descriptor>>,
}

impl Default for Known {
    fn default() -> Self {
        Self { descriptors: Mutex::new(Recent::new(REMEMBERED)) }
    }
}

impl Known {
    pub(super) fn get(&self, digest: &Digest) -> Option<Descriptor> {
        self.descriptors.lock().get(digest).cloned()
    }

    pub(super) fn remember(&self, descriptor: &Descriptor) {
        self.descriptors.lock().insert(descriptor.digest.clone(), descriptor.clone());
    }
}

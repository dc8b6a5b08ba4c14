//! What manifests said about the contents they name, so that a pull asks the registry once and not per layer.

use parking_lot::Mutex;

use crate::content::Digest;
use crate::oci::Descriptor;
use crate::origin::recent::Recent;

/// Descriptors remembered: some hundred images' worth, about 200 bytes each.
const REMEMBERED: usize = 8192;

/// Descriptors by digest, and which of them are manifests for other platforms than this node's.
pub(super) struct Known {
    descriptors: Mutex<Recent<Digest, Descriptor>>,
    foreign: Mutex<Recent<Digest, ()>>,
}

impl Default for Known {
    fn default() -> Self {
        Self {
            descriptors: Mutex::new(Recent::new(REMEMBERED)),
            foreign: Mutex::new(Recent::new(REMEMBERED)),
        }
    }
}

impl Known {
    pub(super) fn get(&self, digest: &Digest) -> Option<Descriptor> {
        self.descriptors.lock().get(digest).cloned()
    }

    /// Whether an index says that this manifest is for another platform.
    pub(super) fn is_foreign(&self, manifest: &Digest) -> bool {
        self.foreign.lock().get(manifest).is_some()
    }

    /// Remembers an index: the child for this node's platform, and that the others are not for it.
    pub(super) fn remember_index(&self, children: &[Descriptor], chosen: Option<&Descriptor>) {
        children.iter().for_each(|child| self.remember(child));
        // Without a child for this platform, a client that wants one of these knows something that we do not.
        let Some(chosen) = chosen else { return };
        let mut foreign = self.foreign.lock();
        for child in children.iter().filter(|child| child.digest != chosen.digest) {
            foreign.insert(child.digest.clone(), ());
        }
        foreign.remove(&chosen.digest);
    }

    pub(super) fn remember(&self, descriptor: &Descriptor) {
        self.descriptors.lock().insert(descriptor.digest.clone(), descriptor.clone());
    }
}

//! Blobs that even straight from the registry were not what their name says, as when a proxy between it and this node
//! changes them.
//!
//! Invariant: such a blob is refused for a while instead of sent again. Its first bytes have reached a client before the
//! whole was compared, so that this one pull fails; the next one is containerd's own business with the registry.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::cache::ReadError;
use crate::content::Digest;
use crate::origin::recent::Recent;

/// Blobs remembered: there are few, or the way to the registry is broken for all.
const REMEMBERED: usize = 1024;

/// How long one is refused: longer than the longest pause between a kubelet's attempts, 5 minutes.
const DOUBT: Duration = Duration::from_mins(10);

/// Digests, and when each was last found to be of other bytes.
pub(super) struct Doubted {
    found: Mutex<Recent<Digest, Instant>>,
}

impl Default for Doubted {
    fn default() -> Self {
        Self { found: Mutex::new(Recent::new(REMEMBERED)) }
    }
}

impl Doubted {
    /// Takes note of how reading `digest` ended, if it tells of wrong bytes.
    pub(super) fn note(&self, digest: &Digest, error: &ReadError) {
        if matches!(error, ReadError::Verification { .. }) {
            self.found.lock().insert(digest.clone(), Instant::now());
        }
    }

    pub(super) fn holds(&self, digest: &Digest) -> bool {
        self.found.lock().get(digest).is_some_and(|found| found.elapsed() < DOUBT)
    }
}

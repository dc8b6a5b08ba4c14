//! How the daemon ends.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Section `[shutdown]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShutdownConfig {
    /// Milliseconds from the signal until transfers still in flight are cut. Keep it below the pod's
    /// `terminationGracePeriodSeconds`.
    pub drain_deadline_ms: u64,
    /// Until then, have seeds and other nodes take what only this node holds. For a node whose disk stays where it is,
    /// such as a seed with a volume, it is a waste.
    pub offer_sole_copies: bool,
    /// EC2's instance metadata, `http://169.254.169.254`, to be asked every five seconds whether the instance is about to
    /// be interrupted; sole copies are offered then, while the node goes on. Empty asks nobody.
    pub instance_metadata: String,
}

impl Default for ShutdownConfig {
    fn default() -> Self {
        // Kubernetes gives 30 s by default; 5 s are for flushing the store and closing.
        Self { drain_deadline_ms: 25_000, offer_sole_copies: true, instance_metadata: String::new() }
    }
}

impl ShutdownConfig {
    /// `drain_deadline_ms` as a duration.
    #[must_use]
    pub const fn drain_deadline(&self) -> Duration {
        Duration::from_millis(self.drain_deadline_ms)
    }
}

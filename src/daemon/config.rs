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
}

impl Default for ShutdownConfig {
    fn default() -> Self {
        // Kubernetes gives 30 s by default; 5 s are for flushing the store and closing.
        Self { drain_deadline_ms: 25_000 }
    }
}

impl ShutdownConfig {
    /// `drain_deadline_ms` as a duration.
    #[must_use]
    pub const fn drain_deadline(&self) -> Duration {
        Duration::from_millis(self.drain_deadline_ms)
    }
}

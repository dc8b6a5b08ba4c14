//! Reads from where the bytes come from: OCI registries and S3.
//!
//! Invariant: bytes come back exactly for the range that was asked, of exactly the version that was pinned, or an
//! error does. A credential is sent only to the host it is for.
//! This module refuses to keep bytes, to verify digests and to decide who fetches: it reads when told.

pub mod access;
pub mod awake;
mod aws;
mod care;
#[cfg(test)]
pub mod conformance;
mod delivery;
pub mod fake;
mod metrics;
pub mod recent;
pub mod registry;
pub mod s3;
mod spread;
mod trust;

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;

pub use delivery::Delivery;
pub use metrics::{Kind, Metrics, OriginMetrics, Outcome};

use crate::content::ByteRange;

/// Pieces of a body as the network delivers them; an error ends the stream.
pub type Body = BoxStream<'static, Result<Bytes, OriginError>>;

/// One content at its origin, pinned: the registry, repository and digest of a blob, or an S3 object version.
///
/// Implemented by the registry, by S3 and by a fake for tests; `conformance` runs on all three.
pub trait Source: Send + Sync + 'static {
    /// Opens the body of `range`, which is not empty and lies inside the content.
    ///
    /// The future resolves when the response's headers are in and right: the status, the range and the version.
    /// Dropping the future or the body stops the transfer.
    fn read(&self, range: ByteRange) -> BoxFuture<'_, Result<Body, OriginError>>;

    /// Bounded label for metrics: the configured registry's name, or `s3`.
    fn label(&self) -> &str;
}

/// Why an origin did not deliver. Display says what to do next.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OriginError {
    /// 404 and its kind.
    #[error("{what} does not exist at {origin}")]
    NotFound { origin: String, what: String },
    /// 401, 403: the message names the credential that was used, never its value.
    #[error("{origin} refused {what}: {reason}")]
    Denied { origin: String, what: String, reason: String },
    /// 429, 503 `SlowDown`: back off, cluster-wide.
    #[error("{origin} asks to slow down")]
    Throttled { origin: String, retry_after: Option<Duration> },
    /// 412: the object is no longer the version that was pinned.
    #[error("{what} changed at {origin} since it was listed; start again to get the new version")]
    Changed { origin: String, what: String },
    /// Refused, reset, timed out, 5xx, short body, a wrong `Content-Range`.
    #[error("{origin} failed: {reason}")]
    Failed { origin: String, reason: String },
    /// Our configuration or our own fault.
    #[error("{0}")]
    Ours(String),
}

impl OriginError {
    /// Whether asking again soon may help.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Throttled { .. } | Self::Failed { .. })
    }
}

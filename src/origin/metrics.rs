//! What is counted about origins, the same for registries and S3.
//!
//! Invariant: bytes are counted as they come off the socket, wanted or not, so that the counters agree with the
//! origin's own log.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::OriginError;

/// What a request was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Kind {
    /// Ranges of blobs, manifests and objects: the bytes that should leave the origin once.
    Content,
    /// Everything around them: HEAD, lists, redirects.
    Metadata,
    /// Questions to token services, ECR's included.
    Token,
}

/// How a request ended, as far as its response's headers tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Outcome {
    Ok,
    NotFound,
    Denied,
    Throttled,
    Changed,
    Failed,
}

impl Outcome {
    /// The outcome that a result stands for.
    #[must_use]
    pub const fn of<T>(result: &Result<T, OriginError>) -> Self {
        match result {
            Ok(_) => Self::Ok,
            Err(OriginError::NotFound { .. }) => Self::NotFound,
            Err(OriginError::Denied { .. }) => Self::Denied,
            Err(OriginError::Throttled { .. }) => Self::Throttled,
            Err(OriginError::Changed { .. }) => Self::Changed,
            Err(OriginError::Failed { .. } | OriginError::Ours(_)) => Self::Failed,
        }
    }
}

/// The families of all origins. Registered once, cloned into each origin.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    bytes: Family<ByteLabels, Counter>,
    requests: Family<RequestLabels, Counter>,
    wasted_bytes: Family<OriginLabels, Counter>,
    broken_bodies: Family<OriginLabels, Counter>,
    retries: Family<OriginLabels, Counter>,
    resumed_bodies: Family<OriginLabels, Counter>,
    hedges: Family<OriginLabels, Counter>,
    hedges_won: Family<OriginLabels, Counter>,
}

impl Metrics {
    /// Registers `origin_bytes{origin,kind}`, `origin_requests{origin,kind,outcome}`, and by origin
    /// `origin_wasted_bytes`, `origin_broken_bodies`, `origin_retries`, `origin_resumed_bodies`, `origin_hedges` and
    /// `origin_hedges_won`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("origin_bytes", "Body bytes received from the origin", metrics.bytes.clone());
        registry.register("origin_requests", "Requests sent to the origin", metrics.requests.clone());
        registry.register(
            "origin_wasted_bytes",
            "Part of origin_bytes that was not asked for: the origin ignored Range",
            metrics.wasted_bytes.clone(),
        );
        registry.register(
            "origin_broken_bodies",
            "Responses of the origin that began well and ended early or stalled",
            metrics.broken_bodies.clone(),
        );
        registry.register(
            "origin_retries",
            "Small requests that were sent again after a failure",
            metrics.retries.clone(),
        );
        registry.register(
            "origin_resumed_bodies",
            "Bodies that went on with a new request at the byte where they broke",
            metrics.resumed_bodies.clone(),
        );
        registry.register(
            "origin_hedges",
            "Second requests for ranges that brought nothing for a while",
            metrics.hedges.clone(),
        );
        registry.register(
            "origin_hedges_won",
            "Part of origin_hedges that brought bytes before the first request did",
            metrics.hedges_won.clone(),
        );
        metrics
    }

    /// The handle of one origin. `label` is its [`Source::label`](super::Source::label): bounded by configuration.
    #[must_use]
    pub fn origin(&self, label: &str) -> OriginMetrics {
        let origin = label.to_owned();
        let bytes = |kind| self.bytes.get_or_create_owned(&ByteLabels { origin: origin.clone(), kind });
        let labels = OriginLabels { origin: origin.clone() };
        OriginMetrics {
            content_bytes: bytes(Kind::Content),
            metadata_bytes: bytes(Kind::Metadata),
            wasted_bytes: self.wasted_bytes.get_or_create_owned(&labels),
            broken_bodies: self.broken_bodies.get_or_create_owned(&labels),
            retries: self.retries.get_or_create_owned(&labels),
            resumed_bodies: self.resumed_bodies.get_or_create_owned(&labels),
            hedges: self.hedges.get_or_create_owned(&labels),
            hedges_won: self.hedges_won.get_or_create_owned(&labels),
            requests: self.requests.clone(),
            origin,
        }
    }
}

/// The counters of one origin.
#[derive(Clone, Debug)]
pub struct OriginMetrics {
    origin: String,
    content_bytes: Counter,
    metadata_bytes: Counter,
    wasted_bytes: Counter,
    broken_bodies: Counter,
    retries: Counter,
    resumed_bodies: Counter,
    hedges: Counter,
    hedges_won: Counter,
    requests: Family<RequestLabels, Counter>,
}

impl OriginMetrics {
    /// The origin's label.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.origin
    }

    /// Counts a request when its response's headers are in, or when it failed before.
    pub fn request(&self, kind: Kind, outcome: Outcome) {
        let labels = RequestLabels { origin: self.origin.clone(), kind, outcome };
        self.requests.get_or_create(&labels).inc();
    }

    /// Counts body bytes that came off the socket.
    pub fn received(&self, kind: Kind, bytes: u64) {
        match kind {
            Kind::Content => self.content_bytes.inc_by(bytes),
            Kind::Metadata | Kind::Token => self.metadata_bytes.inc_by(bytes),
        };
    }

    /// Counts bytes, received already, that nobody asked for.
    pub fn wasted(&self, bytes: u64) {
        self.wasted_bytes.inc_by(bytes);
    }

    /// Bytes wasted so far.
    #[must_use]
    pub fn bytes_wasted(&self) -> u64 {
        self.wasted_bytes.get()
    }

    /// Counts a body that began and did not end well.
    pub fn broken_body(&self) {
        self.broken_bodies.inc();
    }

    /// Counts a small request that is sent again.
    pub fn retried(&self) {
        self.retries.inc();
    }

    /// Small requests sent again so far.
    #[must_use]
    pub fn retries(&self) -> u64 {
        self.retries.get()
    }

    /// Counts a body that goes on with a new request.
    pub fn resumed(&self) {
        self.resumed_bodies.inc();
    }

    /// Bodies resumed so far.
    #[must_use]
    pub fn resumed_bodies(&self) -> u64 {
        self.resumed_bodies.get()
    }

    /// Counts a second request beside a stalled one.
    pub fn hedged(&self) {
        self.hedges.inc();
    }

    /// Counts a second request that was the faster one.
    pub fn hedge_won(&self) {
        self.hedges_won.inc();
    }

    /// Second requests so far.
    #[must_use]
    pub fn hedges(&self) -> u64 {
        self.hedges.get()
    }

    /// Second requests that were the faster ones, so far.
    #[must_use]
    pub fn hedges_won(&self) -> u64 {
        self.hedges_won.get()
    }

    /// Requests of one kind with one outcome so far.
    #[must_use]
    pub fn requests(&self, kind: Kind, outcome: Outcome) -> u64 {
        let labels = RequestLabels { origin: self.origin.clone(), kind, outcome };
        self.requests.get_or_create(&labels).get()
    }

    /// Bytes of one kind received so far.
    #[must_use]
    pub fn bytes_received(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Content => self.content_bytes.get(),
            Kind::Metadata | Kind::Token => self.metadata_bytes.get(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OriginLabels {
    origin: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByteLabels {
    origin: String,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    origin: String,
    kind: Kind,
    outcome: Outcome,
}

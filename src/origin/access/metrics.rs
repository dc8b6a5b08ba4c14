//! What is counted about callers' rights.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// How one question about a caller's right ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Outcome {
    /// The origin was asked and lets the caller read.
    Permitted,
    /// The origin was asked and does not.
    Refused,
    /// The origin let the caller read a moment ago.
    Remembered,
    RememberedRefusal,
    /// The origin could not be asked; the caller is known.
    Known,
    /// The origin could not be asked, and nothing else speaks for the caller.
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CheckLabels {
    origin: &'static str,
    outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OriginLabels {
    origin: &'static str,
}

/// The families. Registered once, cloned into each memory.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    checks: Family<CheckLabels, Counter>,
    remembered: Family<OriginLabels, Gauge>,
    capacity: Family<OriginLabels, Gauge>,
    callers: Gauge,
}

impl Metrics {
    /// Registers `access_checks{origin,outcome}`, `access_remembered{origin}`, `access_capacity{origin}` and
    /// `access_callers`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "access_checks",
            "Questions whether a caller may read something, by how they ended",
            metrics.checks.clone(),
        );
        registry.register(
            "access_remembered",
            "Answers about callers' rights that are remembered",
            metrics.remembered.clone(),
        );
        registry.register("access_capacity", "How many may be", metrics.capacity.clone());
        registry.register(
            "access_callers",
            "Callers whose credential is in memory, to ask registries in their name",
            metrics.callers.clone(),
        );
        metrics
    }

    /// How many callers' credentials are in memory.
    pub fn callers(&self, count: usize) {
        self.callers.set(signed(count));
    }

    pub(super) fn memory(&self, origin: &'static str, capacity: usize) -> MemoryMetrics {
        self.capacity.get_or_create(&OriginLabels { origin }).set(signed(capacity));
        MemoryMetrics { metrics: self.clone(), origin }
    }
}

/// The handle of one memory.
#[derive(Clone, Debug)]
pub(super) struct MemoryMetrics {
    metrics: Metrics,
    origin: &'static str,
}

impl MemoryMetrics {
    pub(super) const fn origin(&self) -> &'static str {
        self.origin
    }

    pub(super) fn count(&self, outcome: Outcome) {
        self.metrics.checks.get_or_create(&CheckLabels { origin: self.origin, outcome }).inc();
    }

    pub(super) fn remembered(&self, count: usize) {
        self.metrics.remembered.get_or_create(&OriginLabels { origin: self.origin }).set(signed(count));
    }
}

fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

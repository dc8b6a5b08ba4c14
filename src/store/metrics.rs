//! What the store counts.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

type Bytes = Gauge<u64, AtomicU64>;

/// Kind of work that waits for a thread of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Lane {
    Read,
    Write,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct LaneLabels {
    lane: Lane,
}

/// Why a chunk was not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum InsertFailure {
    /// The bytes did not have the attested digest.
    Mismatch,
    /// Budget, free floor or the disk had no room, or the disk failed.
    NoSpace,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct InsertFailureLabels {
    reason: InsertFailure,
}

/// Counters and gauges; cloning shares them.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub(super) bytes: Bytes,
    pub(super) budget_bytes: Bytes,
    pub(super) contents: Bytes,
    pub(super) queue: Family<LaneLabels, Gauge>,
    pub(super) unsynced_contents: Gauge,
    pub(super) inserted_bytes: Counter,
    pub(super) recovered_bytes: Counter,
    pub(super) read_bytes: Counter,
    pub(super) evictions: Counter,
    pub(super) partial_evictions: Counter,
    pub(super) evicted_bytes: Counter,
    pub(super) pass_throughs: Counter,
    pub(super) insert_failures: Family<InsertFailureLabels, Counter>,
    pub(super) corrupt_chunks: Counter,
    pub(super) scrubbed_bytes: Counter,
    pub(super) scrub_passes: Counter,
    pub(super) sync_failures: Counter,
    pub(super) seal_mismatches: Counter,
    pub(super) index_rebuilds: Counter,
}

impl Metrics {
    /// Registers everything under `registry`'s prefix.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        registry.register("store_bytes", "Bytes of chunks on disk", m.bytes.clone());
        registry.register("store_budget_bytes", "Most bytes of chunks kept on disk", m.budget_bytes.clone());
        registry.register("store_contents", "Contents with at least a file on disk", m.contents.clone());
        registry.register("store_queue_jobs", "Jobs waiting for a thread of the store", m.queue.clone());
        let help = "Contents with chunks written but not yet durable";
        registry.register("store_unsynced_contents", help, m.unsynced_contents.clone());
        registry.register("store_inserted_bytes", "Bytes verified and written", m.inserted_bytes.clone());
        let help = "Bytes that a killed process had written, found intact at the start";
        registry.register("store_recovered_bytes", help, m.recovered_bytes.clone());
        registry.register("store_read_bytes", "Bytes read for clients and peers", m.read_bytes.clone());
        registry.register("store_evictions", "Contents evicted to make room", m.evictions.clone());
        let help = "Times a large content gave up a part of itself to make room";
        registry.register("store_partial_evictions", help, m.partial_evictions.clone());
        registry.register("store_evicted_bytes", "Bytes evicted to make room", m.evicted_bytes.clone());
        let help =
            "Chunks passed through without storing because nothing could be evicted or the disk failed";
        registry.register("store_pass_throughs", help, m.pass_throughs.clone());
        registry.register("store_insert_failures", "Chunks not stored, by reason", m.insert_failures.clone());
        let help = "Stored chunks that no longer had their digest and were dropped";
        registry.register("store_corrupt_chunks", help, m.corrupt_chunks.clone());
        registry.register(
            "store_sync_failures",
            "Failed attempts to make chunks durable",
            m.sync_failures.clone(),
        );
        registry.register(
            "store_scrubbed_bytes",
            "Bytes read again in the background",
            m.scrubbed_bytes.clone(),
        );
        let help = "Times all that is stored was read again in the background";
        registry.register("store_scrub_passes", help, m.scrub_passes.clone());
        let help = "Contents whose whole did not have the expected digest";
        registry.register("store_seal_mismatches", help, m.seal_mismatches.clone());
        let help = "Times the index was rebuilt, from the sidecars or from memory";
        registry.register("store_index_rebuilds", help, m.index_rebuilds.clone());
        m
    }

    pub(super) fn count_insert_failure(&self, reason: InsertFailure) {
        self.insert_failures.get_or_create(&InsertFailureLabels { reason }).inc();
    }

    pub(super) fn queue_gauge(&self, lane: Lane) -> Gauge {
        self.queue.get_or_create(&LaneLabels { lane }).clone()
    }
}

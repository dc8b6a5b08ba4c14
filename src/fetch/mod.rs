//! `windlass fetch`, the daemon's half: lists, pins, fetches through the cache and places files at a destination.
//!
//! Invariant: a file at the destination is whole: it appears there by a rename, after the cache verified its chunks and
//! `verify` its whole, as far as S3 or the caller can tell what that should be. What the
//! destination's ledger and the file itself do not both vouch for is placed again; a size alone proves nothing. No key
//! names a path outside the destination. Nothing is fetched before the plan is known to be possible.
//! This module refuses to move bytes itself: the cache fetches and the store places.

mod destination;
mod event;
mod handler;
mod plan;
mod posted;
mod request;
mod run;
mod verify;

use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use crate::cache::Cache;
use crate::origin::s3::{S3Callers, S3Origin};
use crate::store::Store;

pub use event::{Event, Shares, Summary, Verified};
pub use handler::ResponseBody;
pub use posted::{posted, text};
pub use request::{FetchRequest, S3Url, SumsError, UrlError, read_sums};

/// Path of the control socket's route, for `POST`.
pub const PATH: &str = "/v1/fetch";

/// `[fetch]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Files that one `windlass fetch` has under way. Several, so that the end of one and the start of the next
    /// leave no gap; few, so that early files are whole early and can be read while the rest comes.
    pub files_in_flight: usize,
    /// `windlass fetch` commands served at a time; one more is refused.
    pub max_active: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { files_in_flight: 4, max_active: 16 }
    }
}

/// Runs fetches. Cheap to clone.
#[derive(Clone)]
pub struct Fetcher {
    inner: Arc<Inner>,
}

struct Inner {
    config: Config,
    cache: Cache,
    /// Knows whether a destination will do.
    store: Store,
    origin: S3Origin,
    callers: S3Callers,
    slots: Arc<Semaphore>,
    metrics: Metrics,
}

impl Fetcher {
    /// `store` is the one below `cache`.
    #[must_use]
    pub fn new(
        config: Config,
        cache: Cache,
        store: Store,
        origin: S3Origin,
        callers: S3Callers,
        metrics: Metrics,
    ) -> Self {
        let slots = Arc::new(Semaphore::new(config.max_active));
        Self { inner: Arc::new(Inner { config, cache, store, origin, callers, slots, metrics }) }
    }
}

/// What is counted about fetches.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    active: Gauge,
    finished: Family<OutcomeLabels, Counter>,
    placed_bytes: Counter,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Outcome {
    Done,
    Failed,
    /// The client went away.
    Cancelled,
    /// More than `max_active` at a time.
    Refused,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: Outcome,
}

impl Metrics {
    /// Registers `fetches_active`, `fetches{outcome}` and `fetch_placed_bytes`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("fetches_active", "Prefetches under way", metrics.active.clone());
        registry.register("fetches", "Prefetches by how they ended", metrics.finished.clone());
        registry.register(
            "fetch_placed_bytes",
            "Bytes of files placed at destinations",
            metrics.placed_bytes.clone(),
        );
        metrics
    }

    fn finish(&self, outcome: Outcome) {
        self.finished.get_or_create(&OutcomeLabels { outcome }).inc();
    }
}

#[cfg(test)]
mod tests;

//! Every part's metrics, registered before any part is built: a scrape during a long start already shows them all.

use prometheus_client::registry::Registry;

use crate::http::served::Served;
use crate::http::server;
use crate::{cache, fetch, gossip, origin, provider, store, transport};

pub(super) struct Metrics {
    pub(super) transport: transport::Metrics,
    pub(super) store: store::Metrics,
    pub(super) engine: EngineMetrics,
    pub(super) origin: origin::Metrics,
    pub(super) access: origin::access::Metrics,
    pub(super) served: Served,
    pub(super) fetch: fetch::Metrics,
    pub(super) server: server::Metrics,
}

/// What the parts that work with peers count.
pub(super) struct EngineMetrics {
    pub(super) gossip: gossip::Metrics,
    pub(super) cache: cache::Metrics,
    pub(super) provider: provider::Metrics,
}

impl Metrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        Self {
            transport: transport::Metrics::register(registry),
            store: store::Metrics::register(registry),
            engine: EngineMetrics {
                gossip: gossip::Metrics::register(registry),
                cache: cache::Metrics::register(registry),
                provider: provider::Metrics::register(registry),
            },
            origin: origin::Metrics::register(registry),
            access: origin::access::Metrics::register(registry),
            served: Served::register(registry),
            fetch: fetch::Metrics::register(registry),
            server: server::Metrics::register(registry),
        }
    }
}

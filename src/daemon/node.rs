//! What the admin face asks: this node's identity and the figures of its parts.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use prometheus_client::registry::Registry;

use crate::config::NodeConfig;
use crate::gossip::Gossip;
use crate::http::admin::Inspect;
use crate::http::admin::view::{Canary, Content, Peer, PeerCounts, Stats, StoreStats, Transfers};
use crate::http::canary::Canaries;
use crate::store::Store;
use crate::telemetry::{self, Figures};

/// Answers from the start on; the parts are attached when they are built.
pub(super) struct Node {
    config: NodeConfig,
    started: Instant,
    registry: Registry,
    canaries: Canaries,
    parts: OnceLock<Parts>,
}

/// What is asked about peers and contents.
pub(super) struct Parts {
    pub(super) gossip: Gossip,
    pub(super) store: Store,
}

impl Node {
    pub(super) fn new(config: NodeConfig, registry: Registry, canaries: Canaries) -> Arc<Self> {
        Arc::new(Self { config, started: Instant::now(), registry, canaries, parts: OnceLock::new() })
    }

    /// The parts are built. Only the first call counts.
    pub(super) fn attach(&self, parts: Parts) {
        let _ = self.parts.set(parts);
    }
}

impl Inspect for Node {
    fn stats(&self) -> Stats {
        let figures = Figures::of(&self.registry);
        let peers = self.peers();
        let settled = peers.iter().filter(|peer| peer.settled).count();
        Stats {
            version: env!("CARGO_PKG_VERSION").into(),
            node: self.config.name.clone(),
            cluster: self.config.cluster.clone(),
            zone: self.config.zone.clone(),
            seed: self.config.seed,
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            store: StoreStats {
                contents: figures.sum("windlass_store_contents"),
                bytes: figures.sum("windlass_store_bytes"),
                budget_bytes: figures.sum("windlass_store_budget_bytes"),
            },
            peers: PeerCounts { alive: peers.len() as u64, settled: settled as u64 },
            transfers: Transfers {
                origin_bytes: figures.sum("windlass_origin_bytes_total"),
                peer_received_bytes: figures.sum("windlass_peer_received_bytes_total"),
                peer_sent_bytes: figures.sum("windlass_peer_sent_bytes_total"),
                served_bytes: figures.sum("windlass_served_bytes_total"),
            },
            ..Stats::default()
        }
    }

    fn peers(&self) -> Vec<Peer> {
        let Some(parts) = self.parts.get() else { return Vec::new() };
        let book = parts.gossip.book();
        let book = book.borrow();
        let others =
            book.members.iter().filter_map(|member| Some((member, book.identities.get(&member.id)?)));
        let mut peers: Vec<_> = others
            .filter(|(_, identity)| identity.name() != self.config.name)
            .map(|(member, identity)| Peer {
                name: identity.name().to_owned(),
                address: identity.addr.to_string(),
                zone: member.zone.as_str().to_owned(),
                seed: member.seed,
                settled: member.settled,
            })
            .collect();
        peers.sort_by(|a, b| a.name.cmp(&b.name));
        peers
    }

    fn contents(&self) -> Vec<Content> {
        let Some(parts) = self.parts.get() else { return Vec::new() };
        let mut contents: Vec<_> = parts.store.list().iter().map(Content::of).collect();
        contents.sort_by(|a, b| a.idle_seconds.total_cmp(&b.idle_seconds));
        contents
    }

    fn canaries(&self) -> Vec<Canary> {
        let seen = self.canaries.all().into_iter();
        seen.map(|seen| Canary {
            token: seen.token,
            registry: seen.registry,
            age_seconds: seen.at.elapsed().as_secs_f64(),
        })
        .collect()
    }

    fn metrics(&self) -> Option<(&'static str, String)> {
        Some((telemetry::TEXT_FORMAT, telemetry::encode(&self.registry).ok()?))
    }
}

//! What `/v1/stats`, `/v1/peers`, `/v1/contents` and `/v1/canaries` say, as the daemon writes it and the commands read it.
//!
//! Sizes are bytes, times are seconds. Keys are only ever added.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::store::{self, Pin};

/// `/v1/stats`: this node in one object.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    pub version: String,
    pub node: String,
    pub cluster: String,
    pub zone: String,
    pub seed: bool,
    pub uptime_seconds: f64,
    pub ready: bool,
    /// Why it is not ready; empty when it is.
    pub waiting_for: Vec<String>,
    pub store: StoreStats,
    pub peers: PeerCounts,
    pub transfers: Transfers,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StoreStats {
    pub contents: u64,
    pub bytes: u64,
    pub budget_bytes: u64,
}

/// Members of the cluster besides this node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PeerCounts {
    pub alive: u64,
    /// Of them, those old enough to be trusted with a home.
    pub settled: u64,
}

/// Bytes since this process started.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Transfers {
    pub origin_bytes: u64,
    pub peer_received_bytes: u64,
    pub peer_sent_bytes: u64,
    pub served_bytes: u64,
}

/// One entry of `/v1/peers`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Peer {
    pub name: String,
    pub address: String,
    pub zone: String,
    pub seed: bool,
    /// Old enough to be trusted with a home.
    pub settled: bool,
}

/// One entry of `/v1/contents`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Content {
    /// Digest of a blob, `s3://bucket/key` of an object.
    pub name: String,
    /// Name of this content between peers and on disk.
    pub key: String,
    pub size: u64,
    pub have_bytes: u64,
    /// Whole and verified.
    pub sealed: bool,
    /// Seconds since it was last read.
    pub idle_seconds: f64,
    /// Not evicted just now: by configuration, by `windlass pin` or by the lease of a fetch.
    pub pinned: bool,
    /// Seconds that it stays pinned; absent when it is not, or for good.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pinned_seconds: Option<f64>,
}

impl Content {
    /// As it is stored now.
    #[must_use]
    pub fn of(content: &store::Summary) -> Self {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_ms = u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX);
        let pinned = content.configured_pin || content.pin.holds(now_ms);
        let left_ms = match content.pin {
            Pin::Until(end_ms) if pinned && !content.configured_pin => Some(end_ms - now_ms),
            _ => None,
        };
        Self {
            name: content.id.to_string(),
            key: content.key.hex(),
            size: content.layout.size(),
            have_bytes: content.have.bytes(&content.layout),
            sealed: content.sealed,
            idle_seconds: now_ms.saturating_sub(content.last_used_ms) as f64 / 1e3,
            pinned,
            pinned_seconds: left_ms.map(|ms| ms as f64 / 1e3),
        }
    }
}

/// One entry of `/v1/canaries`: a request whose arrival proves that containerd asks this mirror.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Canary {
    pub token: String,
    /// The registry that it was for.
    pub registry: String,
    /// Seconds since it came.
    pub age_seconds: f64,
}

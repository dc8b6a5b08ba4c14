//! The admin face: metrics, health and what this node knows, read-only, for everyone who can reach it; and the control
//! socket, which answers the same and takes what changes something, for those whom the file's permissions let in.
//!
//! Invariant: nothing on the TCP listener changes anything, and no answer carries a credential.
//! This module refuses to compute: it shows what its [`Inspect`] and the metrics registry say.

mod control;
mod pages;
mod pins;
mod readiness;
mod spread;
pub mod view;

use std::net::{Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};

pub use control::{Actions, Control, ControlConfig, ControlError, SocketAccess, bind_control};
pub use pages::{Admin, AdminBody, Inspect};
pub use pins::{PINS_PATH, PinChange, PinRequest};
pub use readiness::{Condition, Readiness};
pub use spread::{SPREAD_PATH, Spread, SpreadRequest, SpreadState};

/// Section `[admin]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address of `/metrics`, `/healthz`, `/readyz` and `/v1/…`; read-only.
    pub listen: SocketAddr,
}

impl Default for Config {
    fn default() -> Self {
        // All addresses: Prometheus and the kubelet's probes come from outside the pod.
        Self { listen: (Ipv4Addr::UNSPECIFIED, 5102).into() }
    }
}

/// Connections the admin listener carries: two Prometheus servers, a probe and a few people; more is a fault or an attack.
pub const CONNECTIONS_MAX: usize = 64;

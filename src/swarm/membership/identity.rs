//! How a node introduces itself to the membership.

use std::net::SocketAddr;

use foca::Identity;
use serde::{Deserialize, Serialize};

use crate::content::NodeId;
use crate::swarm::Zone;

/// Longest node name in bytes. Two identities of this length, a zone each and some updates must fit a datagram of
/// [`super::MAX_PACKET_BYTES`]; EC2 host names have 45.
pub const MAX_NAME_BYTES: usize = 128;

/// One run of one node's daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Wire", into = "Wire")]
pub struct NodeIdentity {
    id: NodeId,
    name: String,
    /// Where peers reach it over QUIC.
    pub addr: SocketAddr,
    /// Milliseconds since the Unix epoch at its start: of two runs of one node the later one is the node.
    pub boot_ms: u64,
    pub zone: Zone,
    pub seed: bool,
    /// As [`Member::capacity`](crate::swarm::Member::capacity).
    pub capacity: u16,
}

/// The name does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("node name {0:?} is empty or longer than {MAX_NAME_BYTES} bytes; use a shorter one")]
pub struct BadName(String);

impl NodeIdentity {
    /// # Errors
    /// [`BadName`] when `name` is empty or longer than [`MAX_NAME_BYTES`].
    pub fn new(
        name: &str,
        addr: SocketAddr,
        boot_ms: u64,
        zone: Zone,
        seed: bool,
        capacity: u16,
    ) -> Result<Self, BadName> {
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(BadName(name.chars().take(MAX_NAME_BYTES).collect()));
        }
        Ok(Self { id: NodeId::from_name(name), name: name.to_owned(), addr, boot_ms, zone, seed, capacity })
    }

    #[must_use]
    pub const fn id(&self) -> NodeId {
        self.id
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Identity for NodeIdentity {
    type Addr = NodeId;

    fn renew(&self) -> Option<Self> {
        Some(Self { boot_ms: self.boot_ms + 1, ..self.clone() })
    }

    fn addr(&self) -> NodeId {
        self.id
    }

    fn win_addr_conflict(&self, other: &Self) -> bool {
        (self.boot_ms, self.addr) > (other.boot_ms, other.addr)
    }
}

#[derive(Serialize, Deserialize)]
struct Wire {
    name: String,
    addr: SocketAddr,
    boot_ms: u64,
    zone: Zone,
    seed: bool,
    capacity: u16,
}

impl From<NodeIdentity> for Wire {
    fn from(identity: NodeIdentity) -> Self {
        let NodeIdentity { id: _, name, addr, boot_ms, zone, seed, capacity } = identity;
        Self { name, addr, boot_ms, zone, seed, capacity }
    }
}

impl TryFrom<Wire> for NodeIdentity {
    type Error = BadName;

    fn try_from(wire: Wire) -> Result<Self, BadName> {
        let Wire { name, addr, boot_ms, zone, seed, capacity } = wire;
        Self::new(&name, addr, boot_ms, zone, seed, capacity)
    }
}

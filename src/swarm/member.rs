//! Who belongs to the cluster, as claims see it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::content::NodeId;

/// Longest zone name in bytes; cloud availability zones have 10 to 20.
pub const MAX_ZONE_BYTES: usize = 32;

/// Relative link capacity of a node that says nothing about it.
pub const DEFAULT_CAPACITY: u16 = 10;

/// Availability zone of a node. Traffic inside a zone is free and close, across zones it is neither.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Zone(String);

/// A zone's name is too long to travel in a membership datagram.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("zone {0:?} is longer than {MAX_ZONE_BYTES} bytes; use a shorter name")]
pub struct ZoneTooLong(String);

impl Zone {
    /// # Errors
    /// When `name` is longer than [`MAX_ZONE_BYTES`].
    pub fn new(name: &str) -> Result<Self, ZoneTooLong> {
        if name.len() > MAX_ZONE_BYTES {
            return Err(ZoneTooLong(name.chars().take(2 * MAX_ZONE_BYTES).collect()));
        }
        Ok(Self(name.to_owned()))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Zone {
    type Error = ZoneTooLong;

    fn try_from(name: String) -> Result<Self, ZoneTooLong> {
        Self::new(&name)
    }
}

impl From<Zone> for String {
    fn from(zone: Zone) -> Self {
        zone.0
    }
}

impl fmt::Display for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub id: NodeId,
    pub zone: Zone,
    /// On an always-on node: preferred as a home, and spared as a source.
    pub seed: bool,
    /// Member long enough for all others to know it: may be a home.
    pub settled: bool,
    /// Link capacity relative to the other members, [`DEFAULT_CAPACITY`] being a usual node. A node of twice the
    /// capacity is home of twice the stripes and source of twice the bytes.
    pub capacity: u16,
}

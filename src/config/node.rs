//! Who this node is.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::swarm::DEFAULT_CAPACITY;

/// Section `[node]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodeConfig {
    /// Name that this node's certificate proves; unique in the cluster. Empty: the environment variable `NODE_NAME`
    /// (set from `spec.nodeName` in Kubernetes), else the hostname.
    pub name: String,
    /// Name of the cluster; peers of another one are refused.
    pub cluster: String,
    /// Address that the other nodes reach this one at. Unset: the environment variable `POD_IP` (from `status.podIP` in
    /// Kubernetes), else the address of `transport.listen`, else the one that packets leave from.
    pub address: Option<IpAddr>,
    /// Availability zone, as in `topology.kubernetes.io/zone`. Empty: all nodes count as one zone.
    pub zone: String,
    /// Whether this is an always-on node that keeps the cache while the GPU nodes are scaled to zero.
    pub seed: bool,
    /// Capacity of this node's link, where 10 is a usual node: one of 20 serves, and keeps claims for, twice as much.
    pub capacity: u16,
    /// Run without other nodes: needs no certificate, and lets nobody in.
    pub standalone: bool,
    /// Threads that run the daemon; 0 is one per CPU, at most 16. Disk and hashing have their own.
    pub worker_threads: usize,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            cluster: "windlass".into(),
            address: None,
            zone: String::new(),
            seed: false,
            capacity: DEFAULT_CAPACITY,
            standalone: false,
            worker_threads: 0,
        }
    }
}

/// More runtime threads than this only add wake-ups: hashing and disk run elsewhere, and GPU nodes have 192 CPUs.
const WORKER_THREADS_DEFAULT_MAX: usize = 16;

impl NodeConfig {
    /// `worker_threads`, with 0 resolved for this machine.
    #[must_use]
    pub fn effective_worker_threads(&self) -> usize {
        match self.worker_threads {
            0 => std::thread::available_parallelism()
                .map_or(1, std::num::NonZero::get)
                .min(WORKER_THREADS_DEFAULT_MAX),
            chosen => chosen,
        }
    }

    /// What is not written and this machine knows: its name, and in Kubernetes its address.
    pub(super) fn fill_in(&mut self, environment: &[(String, String)]) {
        let given = |name: &str| {
            environment
                .iter()
                .find(|(n, value)| n == name && !value.is_empty())
                .map(|(_, value)| value.as_str())
        };
        if self.name.is_empty() {
            self.name = given("NODE_NAME").map_or_else(
                || rustix::system::uname().nodename().to_string_lossy().into_owned(),
                str::to_owned,
            );
        }
        // Kubernetes fills it in; whatever else is called so and is no address is not ours.
        self.address = self.address.or_else(|| given("POD_IP")?.parse().ok());
    }
}

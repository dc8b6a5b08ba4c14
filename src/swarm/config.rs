//! Every number of the protocol, with its reason.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Cursors that count in one content: readers beyond these are served as the window passes them.
pub const MAX_CURSORS: usize = 16;

/// Interested nodes for which a sole holder serves one chunk more at a time, and how many times more it serves at most.
const NODES_PER_SOLE_SLOT: u32 = 24;
const MAX_SOLE_FACTOR: u32 = 4;

/// Among whom a content is fetched from the origin once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Once per cluster; a node whose zone has a source is not sent across the border.
    #[default]
    Cluster,
    /// Once per zone; no chunk crosses a border. For origins that are free to read within the region while traffic
    /// between zones is not.
    Zone,
}

/// How claims and transfers are paced. The defaults are right for nodes of 1 to 100 Gbit/s in one region.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Among whom a content is fetched from the origin once. The same on all nodes.
    pub scope: Scope,
    /// Missing chunks, counted from the readers' cursors, that may be asked for at a time; each interested node adds one,
    /// up to twice as many ([`Self::window`]). 64 keep chunks almost in order and cost nothing in completion time
    /// among a few nodes; a chunk needs longer to reach many.
    pub window_chunks: u32,
    /// Bytes of chunks in the air on this node, over all contents. This is memory: a chunk is held until it is
    /// verified. 16 chunks of 8 MiB fill 25 Gbit/s at 40 ms a chunk.
    pub inflight_bytes: u64,
    /// Flows from the origin on this node, over all contents. One S3 stream gives 70 to 90 MB/s; 16 fill 10 Gbit/s.
    pub origin_flows: u32,
    /// Flows from the origin per content over the whole cluster, divided among the interested nodes. More only
    /// spreads a capped origin thinner: simulated, 512 nodes take 1.64 times the bound without and 1.04 with it.
    pub origin_flows_per_content: u32,
    /// Flows from one peer. Clouds cap a single connection at 5 to 10 Gbit/s, but a few chunks fill that.
    pub flows_per_peer: u32,
    /// Chunks served to peers at a time, for a node of usual capacity; others in proportion. Twice the usual number of
    /// incoming flows, so that a home that is late does not meet a closed door. Twice as many while nothing is read here:
    /// such a node may be the only holder, for the homes of several stripes that do not know of each other.
    pub upload_slots: u32,
    /// Peers that may be receiving one chunk from a node that is itself still receiving it. Three make the tree of a
    /// chunk flat without binding its root's uplink to one chunk.
    pub fanout: u32,
    /// Uploads of one stripe at a time from seeds, and from an idle node that alone has the chunk: it is an origin to the
    /// others, and should send each chunk once. More where many are interested ([`Self::sole_slots`]).
    pub sole_holder_slots: u32,
    /// How much more often a seed is a home than another node of its capacity.
    pub seed_weight: u32,

    /// Shortest time between two wants for one stripe, in microseconds. Changes within it travel together.
    pub want_interval_us: u64,
    /// What each further interested node adds to that time, in microseconds, so that a home hears at most 100,000 wants a
    /// second whatever the cluster's size, and half of that in a burst of 2,000 nodes. It decides on one in 10 to 20 µs, so
    /// that this is a core for the seconds of a burst; with 25 the last of 2,000 nodes takes 1.10 times the bound, not 1.04.
    pub want_interval_per_node_us: u64,
    /// A home that does not answer a want for this long is passed over, in milliseconds. Thousands of round trips, because
    /// a node that unpacks an image at full load has been seen to answer after hundreds of milliseconds, and passing over
    /// a home that lives costs duplicate fetches. A home that died is noticed sooner, by its connection.
    pub want_timeout_ms: u64,
    /// How long a node that failed is passed over, in milliseconds, unless it is heard from.
    pub suspect_ms: u64,
    /// Without progress and without a home that answers, the origin is used after this, in milliseconds.
    pub origin_fallback_ms: u64,
    /// Without progress, the origin is used after this whatever the home says, in milliseconds. Above the lease
    /// stall limit, so that the home can repair first.
    pub hard_fallback_ms: u64,
    /// After the first membership sync nothing is granted for this long, in milliseconds: others that started in
    /// the same instant are still syncing.
    pub cold_grace_ms: u64,
    /// A new home waits at most this long for what the nodes it asked know, in milliseconds. Paid only when a
    /// home moves, and only when one of them does not answer. Above a second, by which nodes at full load are late.
    pub recovery_wait_ms: u64,
    /// A new home waits at most this long for a previous one that is late but not known to be dead, in milliseconds. A
    /// node that is silent for longer, together with `want_timeout_ms`, may find its claims granted again.
    pub mute_wait_ms: u64,
    /// A new home waits at most this long to hear from membership of a home that others name, in milliseconds.
    pub stranger_wait_ms: u64,
    /// A lease without a new byte for this long is given to another, in milliseconds.
    pub lease_stall_ms: u64,
    /// A lease slower than a quarter of the median for this long is given to another, in milliseconds.
    pub lease_slow_ms: u64,
    /// A flow from a peer without a new byte for this long is given up, in milliseconds.
    pub flow_stall_ms: u64,
    /// How often a lessee reports the bytes of a running lease, in milliseconds.
    pub progress_interval_ms: u64,
    /// After an origin failure this node asks for no lease on the content for this long, in milliseconds; doubled
    /// with each failure in a row, up to 32 times.
    pub origin_backoff_ms: u64,

    /// Stripes this node keeps tables of as a home. At 2,000 nodes and 100 bytes a row, 1 GiB would be 5,000 busy
    /// stripes; usual tables have a few rows.
    pub max_home_stripes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            scope: Scope::Cluster,
            window_chunks: 64,
            inflight_bytes: 128 << 20,
            origin_flows: 16,
            origin_flows_per_content: 64,
            flows_per_peer: 8,
            upload_slots: 32,
            fanout: 3,
            sole_holder_slots: 8,
            seed_weight: 4,
            want_interval_us: 2_000,
            want_interval_per_node_us: 10,
            want_timeout_ms: 500,
            suspect_ms: 5_000,
            origin_fallback_ms: 5_000,
            hard_fallback_ms: 20_000,
            cold_grace_ms: 250,
            recovery_wait_ms: 1_200,
            mute_wait_ms: 2_500,
            // Five rounds of gossip.
            stranger_wait_ms: 1_000,
            lease_stall_ms: 5_000,
            lease_slow_ms: 2_000,
            flow_stall_ms: 4_000,
            progress_interval_ms: 200,
            origin_backoff_ms: 100,
            max_home_stripes: 16_384,
        }
    }
}

impl Config {
    /// The window of a content in which `interested` nodes want something. Simulated, the median of 128 nodes takes 1.11
    /// times the bound for 4 GiB with 64 chunks, 1.07 with 96 and 1.05 with 128; 8 nodes are no faster for it, and read
    /// less in order.
    #[must_use]
    pub fn window(&self, interested: u16) -> u32 {
        self.window_chunks.saturating_add(u32::from(interested).min(self.window_chunks))
    }

    /// Uploads at a time from a sole holder in a stripe that `interested` nodes want something of. A home learns late, the
    /// later the more it hears, that one has ended, and meanwhile the uplink that everybody waits for would stand idle:
    /// simulated, the last of 512 nodes after one warm node takes 1.15 times the bound with 8 and 1.09 with these, while 8
    /// nodes are slower with more (1.02 with 8, 1.06 with 16), because then each chunk arrives later.
    #[must_use]
    pub fn sole_slots(&self, interested: u16) -> u32 {
        let most = self.sole_holder_slots.saturating_mul(MAX_SOLE_FACTOR);
        self.sole_holder_slots.saturating_add(u32::from(interested) / NODES_PER_SOLE_SLOT).min(most)
    }

    /// Time between two wants for one stripe when `interested` nodes want something of it.
    #[must_use]
    pub fn want_interval(&self, interested: u16) -> Duration {
        let per_node = self.want_interval_per_node_us.saturating_mul(u64::from(interested));
        Duration::from_micros(self.want_interval_us.max(per_node))
    }
}

//! One scenario's figures, as a row of the table or as JSON.

use std::time::Instant;

use crate::grid::Case;
use crate::simulation::{Outcome, World};

pub(crate) struct Figures {
    pub(crate) name: &'static str,
    pub(crate) nodes: usize,
    bound_s: f64,
    /// Seconds a node needs alone at the rate of its own link.
    link_s: f64,
    /// The slowest of the nodes at full speed, in seconds.
    fast_s: f64,
    fast_bound_s: f64,
    bytes: f64,
    chunks: usize,
    pub(crate) outcome: Outcome,
    wall_s: f64,
}

pub(crate) fn header() -> String {
    format!(
        "{:<12} {:>5} {:>8} {:>8} {:>6} {:>8} {:>6} {:>7} {:>6} {:>6} {:>7} {:>8} {:>6} {:>6} {:>6} {:>6} {:>6} {:>6} {:>6}",
        "scenario",
        "N",
        "last s",
        "bound s",
        "ratio",
        "median s",
        "med/l",
        "origin",
        "again",
        "fast",
        "seed tx",
        "ctrl %",
        "msg/ch",
        "peak/s",
        "rows",
        "xzone",
        "prefix",
        "gap ms",
        "wall s",
    )
}

impl Figures {
    /// # Panics
    /// When an invariant is broken.
    pub(crate) fn of(case: &Case) -> Self {
        let scenario = case.scenario.clone();
        let (bound_s, bytes) = (scenario.bound_s(), scenario.bytes(0));
        let link_s = bytes * 8.0 / 1e9 / scenario.link_gbps;
        let fast: Vec<bool> = scenario.pulls.iter().map(|pull| scenario.speed[pull.node] >= 1.0).collect();
        let uplinks: f64 = (0..scenario.nodes()).map(|n| scenario.down_gbps(n)).sum();
        let fast_bound_s = link_s.max((scenario.nodes() - 1) as f64 * bytes * 8.0 / 1e9 / uplinks);
        let started = Instant::now();
        let outcome = World::new(scenario.clone()).run();
        let fast_s = outcome.seconds.iter().zip(fast).filter(|(_, fast)| *fast).filter_map(|(s, _)| *s);
        Self {
            name: case.name,
            nodes: scenario.pulls.len(),
            bound_s,
            link_s,
            fast_s: fast_s.fold(0.0, f64::max),
            fast_bound_s,
            bytes,
            chunks: outcome.fetches.len(),
            outcome,
            wall_s: started.elapsed().as_secs_f64(),
        }
    }

    pub(crate) fn ratio(&self) -> f64 {
        self.outcome.last_s / self.bound_s
    }

    fn per_chunk(&self) -> f64 {
        self.outcome.messages as f64 / (self.nodes * self.chunks) as f64
    }

    pub(crate) fn row(&self) -> String {
        let o = &self.outcome;
        format!(
            "{:<12} {:>5} {:>8.3} {:>8.3} {:>6.3} {:>8.3} {:>6.3} {:>7.4} {:>6} {:>6.3} {:>7.3} {:>8.4} {:>6.2} {:>6} {:>6} {:>6.3} {:>6.3} {:>6.0} {:>6.1}",
            self.name,
            self.nodes,
            o.last_s,
            self.bound_s,
            self.ratio(),
            o.median_s(),
            o.median_s() / self.link_s,
            o.origin_ratio,
            o.again(),
            self.fast_s / self.fast_bound_s,
            o.sent[0] / self.bytes,
            o.control_share() * 100.0,
            self.per_chunk(),
            o.peak_messages,
            o.peak_rows,
            o.cross_zone / self.bytes,
            o.prefix_at_half(),
            o.longest_read_gap_s * 1e3,
            self.wall_s,
        )
    }

    pub(crate) fn json(&self) -> String {
        let o = &self.outcome;
        serde_json::json!({
            "scenario": self.name, "nodes": self.nodes, "last_s": o.last_s, "bound_s": self.bound_s,
            "ratio": self.ratio(), "median_s": o.median_s(), "p99_s": o.quantile_s(0.99), "link_s": self.link_s,
            "origin_ratio": o.origin_ratio, "fetched_again": o.again(), "fast_ratio": self.fast_s / self.fast_bound_s,
            "first_node_sent": o.sent[0] / self.bytes, "control_share": o.control_share(),
            "messages_per_chunk_and_node": self.per_chunk(), "peak_messages_per_s": o.peak_messages,
            "home_rows": o.peak_rows, "cross_zone": o.cross_zone / self.bytes, "prefix_at_half": o.prefix_at_half(),
            "longest_read_gap_s": o.longest_read_gap_s, "wall_s": self.wall_s,
        })
        .to_string()
    }
}

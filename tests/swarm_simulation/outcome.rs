//! What came of a run.

use std::collections::BTreeMap;

use windlass::swarm::Stats;

use super::invariants::Cause;

#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Seconds from each pull's start to its last chunk, in the scenario's order; `None` for those of dead nodes.
    pub(crate) seconds: Vec<Option<f64>>,
    /// When the last pull ended, in seconds since the first began.
    pub(crate) last_s: f64,
    /// Origin bytes divided by the bytes of all contents.
    pub(crate) origin_ratio: f64,
    /// Origin fetches of each chunk, over all contents.
    pub(crate) fetches: Vec<u32>,
    /// Fetches beyond the first, by what explains them.
    pub(crate) again: BTreeMap<Cause, u32>,
    pub(crate) last_resorts: u64,
    pub(crate) steals: u64,
    pub(crate) messages: u64,
    pub(crate) message_bytes: u64,
    /// Bytes that arrived at nodes.
    pub(crate) moved: f64,
    pub(crate) cross_zone: f64,
    /// Bytes each node sent to others.
    pub(crate) sent: Vec<f64>,
    /// Messages the busiest node received in its busiest second.
    pub(crate) peak_messages: u32,
    /// Rows that the fullest home kept.
    pub(crate) peak_rows: u64,
    /// Most leases at a time over all homes.
    pub(crate) peak_leases: u64,
    /// Longest time that a waiting node went without a byte, in seconds.
    pub(crate) longest_stall_s: f64,
    /// Longest time that a reader in order, having had its first chunk, waited for the next, in seconds.
    pub(crate) longest_read_gap_s: f64,
    /// Share of its content that each pull had without a gap from the start when it had half of it; at best 0.5.
    pub(crate) prefixes: Vec<f64>,
    pub(crate) stats: Vec<Stats>,
    /// Seconds, and each node's share of all it pulls.
    pub(crate) samples: Vec<(f64, Vec<f32>)>,
    /// Virtual seconds.
    pub(crate) took_s: f64,
}

impl Outcome {
    /// Median over the pulls that ended, in seconds.
    pub(crate) fn median_s(&self) -> f64 {
        self.quantile_s(0.5)
    }

    pub(crate) fn quantile_s(&self, q: f64) -> f64 {
        let mut seconds: Vec<f64> = self.seconds.iter().flatten().copied().collect();
        seconds.sort_by(f64::total_cmp);
        let at = (q * (seconds.len().max(1) - 1) as f64).round() as usize;
        seconds.get(at).copied().unwrap_or(f64::NAN)
    }

    /// Mean over the pulls.
    pub(crate) fn prefix_at_half(&self) -> f64 {
        self.prefixes.iter().sum::<f64>() / self.prefixes.len().max(1) as f64
    }

    pub(crate) fn again(&self) -> u32 {
        self.again.values().sum()
    }

    /// Bytes of claim messages divided by the bytes that moved.
    pub(crate) fn control_share(&self) -> f64 {
        self.message_bytes as f64 / self.moved.max(1.0)
    }
}

//! What the demo says at the end: a table for people, one JSON object for programs.
//!
//! Invariant: `origin_ratio` is exactly 1.0 when, and only when, the origin sent as many bytes as there are.
//! This module refuses to measure; it is told.

use std::fmt;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

/// The outcome of one run. The JSON's field names are a promise to scripts.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub nodes: usize,
    /// Bytes of the image and the checkpoint, each counted once.
    pub unique_bytes: u64,
    /// Bytes of content that the origin sent.
    pub origin_bytes: u64,
    /// `origin_bytes` ÷ `unique_bytes`.
    pub origin_ratio: f64,
    /// What `unique_bytes` are in chunks: the fewest GETs that could do.
    pub chunks: u64,
    /// GETs of content.
    pub origin_requests: u64,
    /// HEADs, listings and refusals.
    pub origin_metadata_requests: u64,
    /// From the start of all pulls to the end of the last.
    pub seconds: f64,
    /// Every sha256 on every node was right.
    pub verified: bool,
    pub per_node: Vec<NodeReport>,
    /// What was off, one sentence each; empty when all went well.
    pub faults: Vec<String>,
}

/// The outcome on one node.
#[derive(Clone, Debug, Serialize)]
pub(super) struct NodeReport {
    pub name: String,
    /// From the common start until this node had the image and the checkpoint; `None` when it did not get them.
    pub seconds: Option<f64>,
    /// Bytes of image and checkpoint that were delivered to this node's clients.
    pub bytes: u64,
    pub from_peers_bytes: u64,
    pub from_origin_bytes: u64,
    /// What the node had already: neither a peer nor the origin sent it.
    pub from_local_bytes: u64,
    /// The daemon's peak resident set; `None` where the system does not tell.
    pub peak_rss_bytes: Option<u64>,
}

/// `sent` ÷ `unique`, exactly 1.0 when they are equal.
#[must_use]
pub(super) fn ratio(sent: u64, unique: u64) -> f64 {
    sent as f64 / unique as f64
}

impl Report {
    /// Whether the demo has shown what it is there to show.
    #[must_use]
    pub(super) fn is_good(&self) -> bool {
        self.verified && self.origin_bytes == self.unique_bytes && self.faults.is_empty()
    }

    /// As many digits as it takes: what is not 1 must not look like it.
    fn origin_ratio_text(&self) -> String {
        let rounded = format!("{:.4}", self.origin_ratio);
        if rounded == "1.0000" && self.origin_bytes != self.unique_bytes {
            return self.origin_ratio.to_string();
        }
        rounded
    }

    fn node_table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["NODE", "SECONDS", "MB/s", "FROM PEERS", "FROM ORIGIN", "LOCAL", "PEAK MEMORY"]);
        for node in &self.per_node {
            table.add_row(node.cells());
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}

impl NodeReport {
    fn cells(&self) -> [String; 7] {
        let share = |bytes: u64| {
            if self.bytes == 0 { "-".into() } else { format!("{:.1} %", 100.0 * ratio(bytes, self.bytes)) }
        };
        let seconds = self.seconds.map_or_else(|| "failed".into(), |s| format!("{s:.2}"));
        let rate = self.seconds.map_or_else(|| "-".into(), |s| format!("{:.0}", self.bytes as f64 / s / 1e6));
        let memory = self.peak_rss_bytes.map_or_else(|| "-".into(), |rss| format!("{} MiB", rss >> 20));
        [
            self.name.clone(),
            seconds,
            rate,
            share(self.from_peers_bytes),
            share(self.from_origin_bytes),
            share(self.from_local_bytes),
            memory,
        ]
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.node_table().trim_fmt())?;
        let moved: u64 = self.per_node.iter().map(|node| node.bytes).sum();
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        let requests = format!(
            "{} for {} chunks, and {} for metadata",
            self.origin_requests, self.chunks, self.origin_metadata_requests
        );
        let seconds = format!("{:.2}, {:.0} MB/s in all", self.seconds, moved as f64 / self.seconds / 1e6);
        table.add_rows([
            ["unique bytes", &self.unique_bytes.to_string()],
            ["bytes the origin sent", &self.origin_bytes.to_string()],
            ["origin ÷ unique", &self.origin_ratio_text()],
            ["requests to the origin", &requests],
            ["seconds", &seconds],
            ["every sha256 right", if self.verified { "yes" } else { "NO" }],
        ]);
        write!(f, "{}", table.trim_fmt())?;
        for fault in &self.faults {
            write!(f, "\n! {fault}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let node = NodeReport {
            name: "node-1".into(),
            seconds: Some(2.0),
            bytes: 1_000_000_000,
            from_peers_bytes: 750_000_000,
            from_origin_bytes: 250_000_000,
            from_local_bytes: 0,
            peak_rss_bytes: Some(100 << 20),
        };
        let failed = NodeReport {
            name: "node-2".into(),
            seconds: None,
            bytes: 0,
            peak_rss_bytes: None,
            ..node.clone()
        };
        Report {
            nodes: 2,
            unique_bytes: 1_000_000_000,
            origin_bytes: 1_000_000_000,
            origin_ratio: ratio(1_000_000_000, 1_000_000_000),
            chunks: 120,
            origin_requests: 121,
            origin_metadata_requests: 9,
            seconds: 2.0,
            verified: true,
            per_node: vec![node, failed],
            faults: vec![],
        }
    }

    #[test]
    fn the_table_says_it_all() {
        let mut report = report();
        report.faults.push("node-2 died".into());
        let text = report.to_string();
        for part in [
            "2.00",
            "500",
            "75.0 %",
            "25.0 %",
            "100 MiB",
            "failed",
            "1.0000",
            "121 for 120 chunks",
            "! node-2 died",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn one_byte_too_many_is_not_one() {
        let mut report = report();
        assert!(report.is_good());
        assert_eq!(report.origin_ratio.to_bits(), 1.0f64.to_bits());
        report.origin_bytes += 1;
        report.origin_ratio = ratio(report.origin_bytes, report.unique_bytes);
        assert!(!report.is_good());
        assert!(report.to_string().contains("1.000000001"), "{report}");
    }

    #[test]
    fn json_has_the_promised_names() {
        let json = serde_json::to_value(report()).unwrap();
        for name in [
            "nodes",
            "unique_bytes",
            "origin_bytes",
            "origin_ratio",
            "origin_requests",
            "seconds",
            "verified",
            "per_node",
        ] {
            assert!(!json[name].is_null(), "{name}");
        }
        assert_eq!(json["origin_ratio"], 1.0);
    }
}

//! The whole program as a user meets it first: a cluster of real daemons, pulled through from all sides at once.

use std::process::Command;

#[test]
fn three_nodes_haul_every_byte_once() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let output = Command::new(env!("CARGO_BIN_EXE_windlass"))
        .args(["demo", "--nodes", "3", "--size", "24MiB", "--chunk-size", "1MiB", "--json", "--dir"])
        .arg(scratch.path())
        .output()
        .expect("the program runs");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}\n{stderr}");
    let report: serde_json::Value = serde_json::from_str(&stdout).expect("one JSON object");
    assert_eq!(report["nodes"], 3);
    assert_eq!(report["verified"], true, "{report}");
    assert_eq!(report["origin_ratio"], 1.0, "{report}");
    assert_eq!(report["origin_bytes"], report["unique_bytes"], "{report}");
    assert!(report["unique_bytes"].as_u64() > Some(46 << 20), "{report}");
    let per_node = report["per_node"].as_array().expect("a list");
    assert_eq!(per_node.len(), 3);
    assert!(per_node.iter().all(|node| node["bytes"] == report["unique_bytes"]), "{report}");
    assert_eq!(std::fs::read_dir(scratch.path()).expect("readable").count(), 0, "nothing is left behind");
}

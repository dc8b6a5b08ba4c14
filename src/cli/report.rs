//! `windlass status`, `peers` and `contents`: what a daemon knows, as a table for people or JSON for programs.

use std::io::{self, Write};
use std::time::Duration;

use bytesize::ByteSize;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::control::{Daemon, DaemonArgs};
use crate::http::admin::view::{Content, Peer, Stats};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    daemon: DaemonArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn status(args: &Args) -> anyhow::Result<()> {
    show(args, "/v1/stats", status_table).await
}

pub(super) async fn peers(args: &Args) -> anyhow::Result<()> {
    show(args, "/v1/peers", |peers: &Vec<Peer>| peers_table(peers)).await
}

pub(super) async fn contents(args: &Args) -> anyhow::Result<()> {
    show(args, "/v1/contents", |contents: &Vec<Content>| contents_table(contents)).await
}

async fn show<T>(args: &Args, path: &str, table: impl FnOnce(&T) -> Table) -> anyhow::Result<()>
where
    T: DeserializeOwned + Serialize,
{
    let answer: T = Daemon::from(&args.daemon).get(path).await?;
    let text = if args.json { serde_json::to_string_pretty(&answer)? } else { lay_out(table(&answer)) };
    print(&text)
}

/// A reader that has seen enough, such as `head`, is no failure.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn plain_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table
}

/// Columns two spaces apart, flush with the left edge.
pub(super) fn lay_out(mut table: Table) -> String {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

fn align_right(table: &mut Table, columns: &[usize]) {
    for column in columns {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

fn status_table(stats: &Stats) -> Table {
    let mut table = plain_table();
    let zone = if stats.zone.is_empty() { "(none)" } else { &stats.zone };
    let role = if stats.seed { ", a seed" } else { "" };
    let ready =
        if stats.ready { "yes".into() } else { format!("no, waits for {}", stats.waiting_for.join(", ")) };
    let (store, moved) = (&stats.store, &stats.transfers);
    for (name, value) in [
        ("node", format!("{} in cluster {}, zone {zone}{role}", stats.node, stats.cluster)),
        ("version", format!("{}, up {}", stats.version, span(stats.uptime_seconds))),
        ("ready", ready),
        ("peers", format!("{} alive, {} of them settled", stats.peers.alive, stats.peers.settled)),
        (
            "store",
            format!("{} of {} in {} contents", size(store.bytes), size(store.budget_bytes), store.contents),
        ),
        ("from the origin", size(moved.origin_bytes)),
        ("from peers", size(moved.peer_received_bytes)),
        ("to peers", size(moved.peer_sent_bytes)),
        ("to clients", size(moved.served_bytes)),
    ] {
        table.add_row([name.to_owned(), value]);
    }
    table
}

fn peers_table(peers: &[Peer]) -> Table {
    let mut table = plain_table();
    table.set_header(["NAME", "ADDRESS", "ZONE", "ROLE"]);
    for peer in peers {
        let role = match (peer.seed, peer.settled) {
            (true, _) => "seed",
            (false, true) => "settled",
            (false, false) => "new",
        };
        table.add_row([&peer.name, &peer.address, &peer.zone, role]);
    }
    table
}

pub(super) fn contents_table(contents: &[Content]) -> Table {
    let mut table = plain_table();
    table.set_header(["CONTENT", "SIZE", "HERE", "STATE", "IDLE", "PINNED"]);
    for content in contents {
        table.add_row([
            content.name.clone(),
            size(content.size),
            share(content.have_bytes, content.size),
            if content.sealed { "whole" } else { "partial" }.into(),
            span(content.idle_seconds),
            pinned(content),
        ]);
    }
    align_right(&mut table, &[1, 2, 4]);
    table
}

fn pinned(content: &Content) -> String {
    match (content.pinned, content.pinned_seconds) {
        (false, _) => "no".into(),
        (true, None) => "yes".into(),
        (true, Some(seconds)) => format!("for {}", span(seconds)),
    }
}

fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

/// Whole per cent, rounded down: 100% is said only of all.
fn share(part: u64, whole: u64) -> String {
    match whole {
        0 => "100%".into(),
        _ => format!("{}%", u128::from(part) * 100 / u128::from(whole)),
    }
}

/// To the second, in the two largest units.
fn span(seconds: f64) -> String {
    let whole = Duration::try_from_secs_f64(seconds).unwrap_or_default().as_secs();
    // Seconds matter only in the first hour.
    let shown = if whole >= 3600 { whole - whole % 60 } else { whole };
    humantime::format_duration(Duration::from_secs(shown)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_for_people() {
        assert_eq!(size(1536 << 20), "1.5 GiB");
        assert_eq!(share(999, 1000), "99%");
        assert_eq!(share(0, 0), "100%");
        assert_eq!(span(59.9), "59s");
        assert_eq!(span(3725.0), "1h 2m");
    }

    #[test]
    fn a_node_that_waits_says_for_what() {
        let stats = Stats {
            node: "gpu-1".into(),
            waiting_for: vec!["the store to be opened".into()],
            ..Stats::default()
        };
        let text = status_table(&stats).to_string();
        assert!(text.contains("no, waits for the store to be opened"), "{text}");
    }
}

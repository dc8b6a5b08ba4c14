//! `windlass demo`: a whole cluster on one machine, to see that the origin sends every byte once.
//!
//! Invariant: what it reports, it measured from outside the daemons: bytes at the origin, hashes of what clients got.
//! It stops only processes that it started, and leaves nothing behind but what `--keep` asks for.
//! This module refuses to be a shortcut: its daemons are `windlass serve` as in production, apart from their addresses.

mod addresses;
mod cluster;
mod generate;
mod origin;
mod origin_registry;
mod origin_s3;
mod process;
mod progress;
mod pull;
mod recipe;
mod report;
mod rush;
mod scratch;

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use bytesize::ByteSize;
use tokio::signal::unix::{SignalKind, signal};

use cluster::Cluster;
use generate::Dataset;
use origin::Origin;
use progress::{hashing_bar, say};
use report::Report;
use scratch::Scratch;

/// The loopback has addresses for more; 32 daemons are what a workstation's memory carries.
const NODES_MAX: i64 = 32;
/// Below this a layer is smaller than its tar headers.
const SIZE_MIN: ByteSize = ByteSize(64 << 10);
/// Above this the sums of a run leave the 64 bits, or the machine the room.
const SIZE_MAX: ByteSize = ByteSize(1 << 40);
/// How often the hashing bar moves.
const REDRAW: Duration = Duration::from_millis(100);

/// Start a cluster on this machine and watch it pull an image and a checkpoint.
///
/// Exits with 0 only when the origin sent every byte exactly once and every sha256 was right on every node.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Nodes, each a daemon process of its own
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=NODES_MAX))]
    nodes: u8,
    /// Size of the image, and of the checkpoint
    #[arg(long, default_value = "1GiB", value_parser = size)]
    size: ByteSize,
    /// Size of a chunk
    #[arg(long, default_value = "8MiB", value_name = "SIZE", value_parser = chunk_size)]
    chunk_size: ByteSize,
    /// Limit the origin to this many megabits per second, so that the gain shows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    origin_mbit: Option<u64>,
    /// Directory to work in; it needs room for nodes × 2 × size [default: the temporary directory]
    #[arg(long, value_name = "PATH")]
    dir: Option<PathBuf>,
    /// Keep the nodes' directories: configurations, logs, caches, checkpoints
    #[arg(long)]
    keep: bool,
    /// Print the outcome as one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the demo; 0 only when the cluster did what it is for.
#[must_use]
pub fn run(args: Args) -> ExitCode {
    match outcome(&args).and_then(|report| print(&report, args.json)) {
        Ok(code) => code,
        Err(error) => {
            say(format_args!("windlass: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn outcome(args: &Args) -> anyhow::Result<Report> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let report = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hang_up = signal(SignalKind::hangup())?;
        let interrupted = async {
            tokio::select! { _ = interrupt.recv() => (), _ = terminate.recv() => (), _ = hang_up.recv() => () }
        };
        demonstrate(args, interrupted).await
    });
    // After an interrupt, hashing threads may be left; nobody waits for what they find.
    runtime.shutdown_background();
    report
}

fn print(report: &Report, json: bool) -> anyhow::Result<ExitCode> {
    let text = if json { serde_json::to_string_pretty(report)? } else { report.to_string() };
    writeln!(io::stdout(), "{text}").context("the outcome could not be printed")?;
    Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn demonstrate(args: &Args, interrupted: impl Future<Output = ()>) -> anyhow::Result<Report> {
    tokio::pin!(interrupted);
    let parent = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let scratch = Scratch::create(&parent, args.nodes.into(), 2 * args.size.as_u64(), args.keep)?;
    let dataset = tokio::select! {
        dataset = generate(args.size) => Arc::new(dataset?),
        () = &mut interrupted => anyhow::bail!("interrupted"),
    };
    let bytes_per_s = args.origin_mbit.map(|mbit| mbit * 1_000_000 / 8);
    let origin = Origin::start(dataset.clone(), bytes_per_s).await.context("the origin could not listen")?;
    let chunk_bytes = u32::try_from(args.chunk_size.as_u64()).context("the chunk size has 32 bits")?;
    let mut cluster = Cluster::start(args.nodes, scratch.path(), &origin, args.size, chunk_bytes)?;
    let rush = tokio::select! {
        rush = rush::rush(&mut cluster, &dataset) => rush,
        () = &mut interrupted => Err(anyhow::anyhow!("interrupted")),
    };
    let memory = cluster.peak_rss_bytes();
    let stopped = cluster.stop().await;
    let counts = origin.counts();
    origin.stop().await;
    if args.keep {
        say(format_args!("the nodes' directories are in {}", scratch.path().display()));
    }
    let mut report = rush?.report(&dataset, chunk_bytes, counts, &memory);
    report.faults.extend(stopped.iter().map(ToString::to_string));
    Ok(report)
}

/// Generates on blocking threads, with a bar.
async fn generate(size: ByteSize) -> anyhow::Result<Dataset> {
    let hashed = Arc::new(AtomicU64::new(0));
    let bar = hashing_bar(2 * size.as_u64());
    let count = hashed.clone();
    let mut generated = tokio::task::spawn_blocking(move || Dataset::generate(size.as_u64(), &count));
    let dataset = loop {
        tokio::select! {
            dataset = &mut generated => break dataset,
            () = tokio::time::sleep(REDRAW) => bar.set_position(hashed.load(Ordering::Relaxed)),
        }
    };
    bar.finish_and_clear();
    dataset.context("the image and the checkpoint could not be generated")
}

fn size(text: &str) -> Result<ByteSize, String> {
    bounded(text, SIZE_MIN, SIZE_MAX)
}

fn chunk_size(text: &str) -> Result<ByteSize, String> {
    bounded(text, ByteSize(64 << 10), ByteSize(1 << 30))
}

fn bounded(text: &str, min: ByteSize, max: ByteSize) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse().map_err(|_| "write a size like 512MiB or 1GiB".to_owned())?;
    if (min..=max).contains(&size) { Ok(size) } else { Err(format!("it must be from {min} to {max}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn usage(arguments: &[&str]) -> String {
        Cli::try_parse_from([&["demo"], arguments].concat()).unwrap_err().to_string()
    }

    #[test]
    fn the_defaults_are_the_promised_ones() {
        let args = Cli::try_parse_from(["demo"]).unwrap().args;
        let chunk_size = ByteSize(crate::content::DEFAULT_CHUNK_BYTES.into());
        assert_eq!((args.nodes, args.size, args.chunk_size), (4, ByteSize::gib(1), chunk_size));
        let args = Cli::try_parse_from(["demo", "--size", "24MiB", "--chunk-size", "1MiB"]).unwrap().args;
        assert_eq!((args.size, args.chunk_size), (ByteSize::mib(24), ByteSize::mib(1)));
    }

    #[test]
    fn wrong_arguments_are_explained() {
        assert!(usage(&["--nodes", "0"]).contains("1..=32"));
        assert!(usage(&["--size", "big"]).contains("write a size like 512MiB"));
        assert!(usage(&["--size", "1KiB"]).contains("it must be from 64.0 KiB"));
        assert!(usage(&["--chunk-size", "8GiB"]).contains("to 1.0 GiB"));
        assert!(usage(&["--origin-mbit", "0"]).contains("1..=1000000"));
    }
}

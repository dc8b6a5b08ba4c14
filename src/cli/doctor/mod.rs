//! `windlass doctor`: whether this node's pulls and fetches go through the cluster, and what to change when not.
//!
//! Invariant: nothing on the node is changed; each check stands for itself, so that one that cannot be made hides no
//! other; a finding that is not right says what, why it matters, and the exact change.
//! This module refuses to guess: that pulls arrive is shown by a pull that arrives.

mod finding;
mod peers;
mod runtime;
mod surroundings;
mod udp;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::control::Daemon;
use super::mirror::MirrorAddress;
use crate::config::{self, Config};
use crate::containerd;
use finding::{Finding, Verdict};

#[derive(Debug, clap::Args)]
#[command(after_help = "Exit code 1 means that a check failed. Over a cluster:\n  \
    kubectl -n windlass get pods -l app.kubernetes.io/component=node -o name |\n    \
    xargs -I POD kubectl -n windlass exec POD -c wire -- windlass doctor")]
pub(super) struct Args {
    /// Configuration file of the daemon [default: /etc/windlass/windlass.toml where it exists]
    #[arg(long, short, value_name = "PATH", env = "WINDLASS_CONFIG")]
    config: Option<PathBuf>,
    /// Where the node's root directory is mounted, for containerd's files
    #[arg(long, value_name = "DIR", env = "WINDLASS_HOST_ROOT", default_value = "/")]
    host_root: PathBuf,
    /// containerd's configuration file, on the node
    #[arg(long, value_name = "PATH", default_value = containerd::config::DEFAULT_PATH)]
    containerd_config: PathBuf,
    /// containerd's socket
    #[arg(long, value_name = "PATH", default_value = containerd::socket::DEFAULT_PATH)]
    containerd_socket: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What the checks look at.
struct Scene {
    config: Config,
    config_path: Option<PathBuf>,
    daemon: Daemon,
    mirror: MirrorAddress,
    host_root: PathBuf,
    containerd_config: PathBuf,
    containerd_socket: PathBuf,
}

pub(super) async fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let config = Config::read(args.config.as_deref(), config::process_environment())?;
    let scene = Scene {
        daemon: Daemon::Socket(config.control.socket.clone()),
        mirror: MirrorAddress::of(&config),
        config_path: args.config.clone(),
        host_root: args.host_root.clone(),
        containerd_config: args.containerd_config.clone(),
        containerd_socket: args.containerd_socket.clone(),
        config,
    };
    let (mut findings, runtime, peers) =
        tokio::join!(surroundings::check(&scene), runtime::check(&scene), peers::check(&scene));
    findings.extend(runtime);
    findings.extend(peers);
    show(&findings, args.json)?;
    let failed = findings.iter().any(|finding| finding.verdict == Verdict::Fail);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn show(findings: &[Finding], json: bool) -> anyhow::Result<()> {
    let text = if json { serde_json::to_string_pretty(findings)? + "\n" } else { finding::report(findings) };
    io::stdout().write_all(text.as_bytes()).context("cannot print the findings")
}

//! One daemon of the demo: a child process, its directory, its log.
//!
//! Invariant: the process ends with its [`DaemonProcess`]: asked to first, killed at the latest when it is dropped.
//! This module refuses to signal anything but the process that it started.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::addresses::Addresses;
use crate::cli::control::Daemon;
use crate::http::admin::view::Stats;

/// A daemon without clients has nothing to drain; ten seconds tell a stuck one from a slow machine.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// Enough of a log to see why it died, on one screen.
const LAST_LINES: usize = 15;
/// What of our own environment a daemon gets. Not `WINDLASS_…`, `AWS_…` or proxies: they would change the demo.
const PASSED_ON: [&str; 5] = ["PATH", "HOME", "TMPDIR", "RUST_LOG", "RUST_BACKTRACE"];

/// Where a node lives.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub name: String,
    pub addresses: Addresses,
    pub dir: PathBuf,
}

/// How long a daemon may take to say how it is: it answers at once or is busy, and the next look is soon.
const STATS_DEADLINE: Duration = Duration::from_secs(2);

/// A `windlass serve` that runs.
pub(super) struct DaemonProcess {
    pub node: Node,
    child: Child,
}

/// Why a daemon is of no use. Display ends with the last lines of its log.
#[derive(Debug, thiserror::Error)]
pub(super) enum DaemonError {
    #[error("{name} could not be started: {source}")]
    Start { name: String, source: io::Error },
    #[error("{name} ended on its own ({status}); the end of its log:\n{log}")]
    Died { name: String, status: String, log: String },
    #[error("{name} {what} within {} s; the end of its log:\n{log}", deadline.as_secs())]
    Late { name: String, what: &'static str, deadline: Duration, log: String },
    #[error("{name} stopped with {status}; the end of its log:\n{log}")]
    Stopped { name: String, status: String, log: String },
}

impl Node {
    /// Where the daemon takes orders.
    #[must_use]
    pub(super) fn control_socket(&self) -> PathBuf {
        self.dir.join("windlass.sock")
    }

    /// Where the checkpoint is placed.
    #[must_use]
    pub(super) fn models_dir(&self) -> PathBuf {
        self.dir.join("models")
    }

    /// What the daemon says of itself; `None` when it does not answer.
    pub(super) async fn stats(&self) -> Option<Stats> {
        let daemon = Daemon::Admin(format!("http://{}", self.addresses.admin).parse().ok()?);
        timeout(STATS_DEADLINE, daemon.get("/v1/stats")).await.ok()?.ok()
    }

    /// That the daemon did not do `what` in time.
    #[must_use]
    pub(super) fn late(&self, what: &'static str, deadline: Duration) -> DaemonError {
        DaemonError::Late { name: self.name.clone(), what, deadline, log: self.last_log_lines() }
    }

    fn log_file(&self) -> PathBuf {
        self.dir.join("daemon.log")
    }

    fn last_log_lines(&self) -> String {
        let log = fs::read(self.log_file()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
        if last.is_empty() { "    (empty)".into() } else { format!("    {}", last.join("\n    ")) }
    }
}

impl DaemonProcess {
    /// Runs this program's `serve` with `config` in the node's directory, which exists.
    ///
    /// # Errors
    /// When the program or its files cannot be opened.
    pub(super) fn start(node: Node, config: &str) -> Result<Self, DaemonError> {
        match spawn(&node, config) {
            Ok(child) => Ok(Self { node, child }),
            Err(source) => Err(DaemonError::Start { name: node.name, source }),
        }
    }

    /// Resolves when the daemon has ended without being asked to.
    pub(super) async fn died(&mut self) -> DaemonError {
        let status = describe(self.child.wait().await);
        DaemonError::Died { name: self.node.name.clone(), status, log: self.node.last_log_lines() }
    }

    /// Its peak resident set in bytes, where `/proc` tells.
    #[must_use]
    pub(super) fn peak_rss_bytes(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()?)).ok()?;
        let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.trim().strip_suffix(" kB")?;
        Some(kib.trim().parse::<u64>().ok()? << 10)
    }

    /// Asks the daemon to end, as Kubernetes would.
    ///
    /// # Errors
    /// When it ends, or has ended, with an error, or has to be killed.
    pub(super) async fn stop(mut self) -> Result<(), DaemonError> {
        if let Some(pid) = self.child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)) {
            // It may end at this very moment; waiting tells.
            let _ = kill_process(pid, Signal::TERM);
        }
        let Ok(ended) = timeout(STOP_DEADLINE, self.child.wait()).await else {
            let error = self.node.late("did not end when asked to", STOP_DEADLINE);
            let _ = self.child.kill().await;
            return Err(error);
        };
        if ended.as_ref().is_ok_and(ExitStatus::success) {
            return Ok(());
        }
        let (status, log) = (describe(ended), self.node.last_log_lines());
        Err(DaemonError::Stopped { name: self.node.name, status, log })
    }
}

fn spawn(node: &Node, config: &str) -> io::Result<Child> {
    let config_file = node.dir.join("windlass.toml");
    fs::write(&config_file, config)?;
    let log = File::create(node.log_file())?;
    Command::new(std::env::current_exe()?)
        .arg("serve")
        .arg("--config")
        .arg(config_file)
        .env_clear()
        .envs(PASSED_ON.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
        .envs([("AWS_ACCESS_KEY_ID", "demo"), ("AWS_SECRET_ACCESS_KEY", "demo"), ("AWS_REGION", "us-east-1")])
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
}

fn describe(status: io::Result<ExitStatus>) -> String {
    status.map_or_else(|error| error.to_string(), |status| status.to_string())
}

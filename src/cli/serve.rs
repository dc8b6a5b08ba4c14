//! `windlass serve`: the configuration, the logs, the runtime and the signals around the daemon.

use std::io::{self, Write};
use std::path::PathBuf;
use std::pin::pin;

use anyhow::{Context, bail};
use tokio_util::sync::CancellationToken;

use super::signals::Signals;
use crate::config::{self, Config};
use crate::daemon;
use crate::telemetry::{self, Exporter};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Configuration file [default: /etc/windlass/windlass.toml where it exists]
    #[arg(long, short, value_name = "PATH", env = "WINDLASS_CONFIG")]
    config: Option<PathBuf>,
    /// Only check the configuration, and print it as it takes effect
    #[arg(long)]
    check: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let config = Config::load(args.config.as_deref(), config::process_environment())?;
    if args.check {
        let text = config.to_toml().context("the effective configuration has no form in TOML")?;
        return io::stdout().write_all(text.as_bytes()).context("cannot print the configuration");
    }
    let exporter = telemetry::init(&config.log, &config.traces)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.node.effective_worker_threads())
        .enable_all()
        .build()
        .context("cannot start the runtime's threads")?;
    let outcome = runtime.block_on(traced(config, exporter));
    // A disk that hangs must not keep a daemon alive that is done.
    runtime.shutdown_background();
    outcome
}

/// Runs the daemon, and sends its traces until it has ended.
async fn traced(config: Config, exporter: Option<Exporter>) -> anyhow::Result<()> {
    let Some(exporter) = exporter else { return until_signalled(config).await };
    let stop = CancellationToken::new();
    let sending = tokio::spawn(exporter.run(config.node.name.clone(), stop.clone()));
    let outcome = until_signalled(config).await;
    stop.cancel();
    // It ends within its own deadlines; a fault in it is no fault of the daemon.
    let _ = sending.await;
    outcome
}

/// Runs the daemon until it fails or a signal asks it to drain; a second signal does not wait for that.
async fn until_signalled(config: Config) -> anyhow::Result<()> {
    let mut signals = Signals::listen().context("cannot listen for signals")?;
    let stop = CancellationToken::new();
    let mut daemon = pin!(daemon::run(config, stop.clone().cancelled_owned(), |_| {}));
    tokio::select! {
        ended = &mut daemon => return Ok(ended?),
        signal = signals.next() => {
            tracing::info!(signal, "stopping: finishing what is in flight; a second signal cuts it");
            stop.cancel();
        }
    }
    tokio::select! {
        ended = &mut daemon => Ok(ended?),
        signal = signals.next() => bail!("{signal} again: ended without finishing what was in flight"),
    }
}

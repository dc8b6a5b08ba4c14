//! Commands: what the user typed, to calls into the floors below, to an exit code.
//!
//! Invariant: 0 is done, 1 failed, 2 wrong usage, 64 bad configuration; an error is one line on stderr that begins with
//! `windlass:` and says what to do next.
//! This module refuses to hold logic that a running daemon needs.

mod canary;
mod certs;
pub mod control;
pub mod demo;
mod doctor;
pub mod fetch;
mod kubernetes;
mod mirror;
mod pin;
mod progress;
mod proofs;
mod report;
mod serve;
mod signals;
mod spread;
mod warm;
mod wire;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::ConfigError;

/// Fetches every byte of an image or checkpoint once per cluster.
#[derive(Debug, Parser)]
#[command(name = "windlass", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon.
    Serve(serve::Args),
    /// Show what this node is doing.
    Status(report::Args),
    /// List the other nodes.
    Peers(report::Args),
    /// Start a cluster on this machine and watch it pull an image and a checkpoint.
    Demo(demo::Args),
    /// List what this node has.
    Contents(report::Args),
    /// Keep stored contents from being evicted.
    Pin(pin::PinArgs),
    /// Let stored contents be evicted again.
    Unpin(pin::UnpinArgs),
    /// Make certificates for the nodes of a cluster.
    Certs(certs::Args),
    /// Have this node fetch images and objects before somebody needs them.
    Warm(warm::Args),
    /// Check that pulls on this node go through the cluster, and say what to change when not.
    Doctor(doctor::Args),
    /// Make this node's containerd ask the mirror first.
    Wire(wire::WireArgs),
    /// Undo what `wire` did, and nothing else.
    Unwire(wire::UnwireArgs),
    /// Put S3 objects on this node's disk, through the cluster's cache.
    Fetch(fetch::Args),
}

/// `EX_CONFIG` is 78 in sysexits, but 64 is what linkerd and this project's charts expect.
const EXIT_BAD_CONFIGURATION: u8 = 64;

/// Parses `arguments`, runs the command and returns its exit code.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    // A second installation in one process fails, and the first one is the same provider.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(usage) => {
            // Nothing is left to tell the user when stderr itself is closed.
            let _ = usage.print();
            return ExitCode::from(u8::try_from(usage.exit_code()).unwrap_or(2));
        }
    };
    match dispatch(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("windlass: {}", one_line(&error));
            exit_code(&error)
        }
    }
}

fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Serve(args) => serve::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Status(args) => ask(done(report::status(&args))),
        Command::Peers(args) => ask(done(report::peers(&args))),
        Command::Demo(args) => Ok(demo::run(args)),
        Command::Contents(args) => ask(done(report::contents(&args))),
        Command::Pin(args) => ask(done(pin::pin(&args))),
        Command::Unpin(args) => ask(done(pin::unpin(&args))),
        Command::Certs(args) => ask(done(certs::run(&args))),
        Command::Warm(args) => ask(done(warm::run(&args))),
        Command::Doctor(args) => ask(doctor::run(&args)),
        Command::Wire(args) => ask(done(wire::wire(&args))),
        Command::Unwire(args) => wire::unwire(&args).map(|()| ExitCode::SUCCESS),
        Command::Fetch(args) => fetch::run(&args),
    }
}

/// Runs a command that asks a daemon: one connection, so one thread will do.
fn ask(command: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(command)
}

/// A command that did what it was asked, or failed.
async fn done(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<ExitCode> {
    command.await.map(|()| ExitCode::SUCCESS)
}

fn exit_code(error: &anyhow::Error) -> ExitCode {
    if error.chain().any(|cause| cause.is::<ConfigError>()) {
        return ExitCode::from(EXIT_BAD_CONFIGURATION);
    }
    ExitCode::FAILURE
}

/// The error and its causes, each said once: most messages below already quote their cause.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_cause_is_said_once() {
        let cause = std::io::Error::other("disk on fire");
        let error = ConfigError::Unreadable { path: "w.toml".into(), source: cause };
        assert_eq!(one_line(&error.into()), "cannot read the configuration w.toml: disk on fire");
        let error = anyhow::anyhow!("disk on fire").context("cannot start");
        assert_eq!(one_line(&error), "cannot start: disk on fire");
    }
}

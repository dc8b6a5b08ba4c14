//! `windlass fetch`: asks this node's daemon for files and shows how it goes.
//!
//! Invariant: exit code 0 means that the daemon said `done`: every file is in place and whole. An answer that breaks
//! off is a failure, whatever came before. Going away cancels the fetch at the daemon.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::{Buf, Bytes, BytesMut};
use clap::builder::NonEmptyStringValueParser;
use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::control::{Daemon, SocketArgs};
use super::progress::Display;
use super::proofs;
use crate::fetch::{self, Event, FetchRequest, S3Url};
use crate::store::Owner;

/// Longest line of the answer: a path of 1 KiB and an error message, many times over.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Arguments of `windlass fetch`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Running the same command again continues where the last one ended.\n\n\
    Examples:\n  windlass fetch s3://models/llama-70b/ /models/llama-70b\n  \
    windlass fetch s3://models/llama-70b/ /models/llama-70b --include '*.safetensors' --include '*.json'\n  \
    windlass fetch s3://models/a.bin s3://models/b.bin /models/\n  \
    windlass fetch 's3://models/a.bin?versionId=3HL4kqt' /models/a.bin")]
pub struct Args {
    /// Objects, or prefixes
    #[arg(required = true, value_name = "s3://BUCKET/KEY")]
    sources: Vec<S3Url>,
    /// Where the files go: a directory, or a file for one object
    #[arg(value_name = "DEST", value_parser = destination)]
    destination: PathBuf,
    /// Only paths that match; `*` also matches `/`. May be given several times
    #[arg(long, value_name = "GLOB", value_parser = NonEmptyStringValueParser::new())]
    include: Vec<String>,
    /// No paths that match, whatever --include says. May be given several times
    #[arg(long, value_name = "GLOB", value_parser = NonEmptyStringValueParser::new())]
    exclude: Vec<String>,
    /// Do not make files hard links into the daemon's store, which are read-only: copy where the file system cannot
    /// share blocks
    #[arg(long)]
    no_hard_link: bool,
    /// Files must have these SHA-256s: a list as `sha256sum` writes it, with paths relative to DEST
    #[arg(long, value_name = "FILE")]
    sha256_file: Option<PathBuf>,
    /// Show the daemon that this command's own AWS credentials may read every file, as one with `s3.access = "caller"`
    /// demands. Only signed requests leave this process. AWS_ENDPOINT_URL_S3 must be S3's here, not the daemon's
    #[arg(long)]
    as_caller: bool,
    /// Permissions of the files, octal; the write bits are lost where a file is a hard link
    #[arg(long, value_name = "MODE", value_parser = mode)]
    mode: Option<u32>,
    /// Whom the files shall belong to, in numbers; never hard links then
    #[arg(long, value_name = "UID:GID", value_parser = owner)]
    owner: Option<Owner>,
    /// Keep the stored copies from eviction for so long, e.g. 2h
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pin_for: Option<Duration>,
    /// Print the daemon's events as they come, one JSON object per line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArgs,
}

/// Runs the command.
///
/// # Errors
/// When the daemon cannot be asked, or not every file is in place.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(fetch(args))?;
    Ok(ExitCode::SUCCESS)
}

/// Absolute, since the daemon has another working directory; a trailing `/` is kept, for it means a directory.
fn destination(text: &str) -> Result<PathBuf, String> {
    if text.starts_with("s3://") {
        return Err("the last argument is the destination, a path on this node".into());
    }
    std::path::absolute(text).map_err(|error| error.to_string())
}

fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("write three octal digits, as in 644".into()),
    }
}

fn owner(text: &str) -> Result<Owner, String> {
    let parts = text.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    let (uid, gid) = parts.ok_or("write two numbers, as in 1000:1000")?;
    Ok(Owner { uid, gid })
}

async fn fetch(args: &Args) -> anyhow::Result<()> {
    let proofs = if args.as_caller { proofs::sign(&args.sources).await? } else { BTreeMap::new() };
    let request = FetchRequest {
        sources: args.sources.clone(),
        destination: args.destination.clone(),
        include: args.include.clone(),
        exclude: args.exclude.clone(),
        no_hard_link: args.no_hard_link,
        sha256: sums(args.sha256_file.as_deref())?,
        proofs,
        mode: args.mode,
        owner: args.owner,
        pin_for_seconds: args.pin_for.map(|time| time.as_secs()),
    };
    let request = serde_json::to_vec(&request)?;
    let response = Daemon::from(&args.socket).post(fetch::PATH, request.into()).await?;
    let mut lines = Lines { body: response.into_body(), buffer: BytesMut::new() };
    let mut display = Display::new(!args.json && io::stderr().is_terminal());
    while let Some(line) = lines.next().await? {
        let event: Event = serde_json::from_slice(&line)
            .context("the daemon's answer is not understood; are both of the same version?")?;
        if args.json {
            io::stdout().write_all(&line).and_then(|()| io::stdout().write_all(b"\n"))?;
        } else {
            display.show(&event)?;
        }
        match event {
            Event::Done(_) => return Ok(()),
            Event::Failed { reason } => bail!(reason),
            _ => {}
        }
    }
    bail!("the daemon went away before the fetch was done; run the same command again to continue")
}

/// What `--sha256-file` lists. Read here: the file is the caller's, and the daemon may not see it.
fn sums(file: Option<&Path>) -> anyhow::Result<BTreeMap<String, String>> {
    let Some(file) = file else { return Ok(BTreeMap::new()) };
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    fetch::read_sums(&text).with_context(|| file.display().to_string())
}

/// The lines of a body.
struct Lines {
    body: Incoming,
    buffer: BytesMut,
}

impl Lines {
    /// The next line without its end; `None` at the end of the body.
    async fn next(&mut self) -> anyhow::Result<Option<Bytes>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end).freeze();
                self.buffer.advance(1);
                return Ok(Some(line));
            }
            if self.buffer.len() > LINE_BYTES_MAX {
                bail!("the daemon's answer has a line of more than {LINE_BYTES_MAX} bytes");
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            let frame =
                frame.context("the daemon's answer broke off; run the same command again to continue")?;
            if let Ok(data) = frame.into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(arguments: &[&str]) -> Result<Args, clap::Error> {
        Cli::try_parse_from([&["fetch"], arguments].concat()).map(|cli| cli.args)
    }

    #[test]
    fn several_sources_and_then_the_destination() {
        let args = parse(&["s3://models/a/", "s3://models/b", "/models/"]).unwrap();
        assert_eq!(args.sources.len(), 2);
        assert_eq!(args.destination.as_os_str(), "/models/");
        let relative = parse(&["s3://models/a", "x/"]).unwrap().destination;
        assert!(relative.is_absolute() && relative.as_os_str().to_str().unwrap().ends_with("/x/"));
    }

    #[test]
    fn modes_owners_and_leases() {
        let options = ["--mode", "640", "--owner", "1000:50", "--pin-for", "1h 30m"];
        let args = parse(&[&["s3://models/a", "/m"][..], &options].concat()).unwrap();
        assert_eq!(args.mode, Some(0o640));
        assert_eq!(args.owner, Some(Owner { uid: 1_000, gid: 50 }));
        assert_eq!(args.pin_for, Some(Duration::from_secs(5_400)));
        for wrong in [
            ["--mode", "999"],
            ["--mode", "4755"],
            ["--owner", "me:me"],
            ["--owner", "1"],
            ["--pin-for", "x"],
        ] {
            assert!(parse(&[&["s3://models/a", "/m"][..], &wrong].concat()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn wrong_usage_is_exit_code_2() {
        for wrong in [
            &["s3://models/a"][..],
            &["/models"],
            &["models/a", "/models"],
            &["s3://models/a", "s3://models/b"],
        ] {
            assert_eq!(parse(wrong).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
    }
}

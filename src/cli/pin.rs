//! `windlass pin` and `unpin`: which stored contents the daemon may not evict.
//!
//! Exit code 0 means that every name stands for something stored, and that all of it was changed durably.

use std::time::Duration;

use http_body_util::BodyExt;

use super::control::{Daemon, SocketArgs};
use super::report::{contents_table, lay_out, print};
use crate::http::admin::view::Content;
use crate::http::admin::{PINS_PATH, PinChange, PinRequest};
use crate::store::PinName;

#[derive(Debug, clap::Args)]
#[command(after_help = "Names are those of `windlass contents`.\n\n\
    Examples:\n  windlass pin s3://models/llama-70b/\n  windlass pin --for 12h sha256:…")]
pub(super) struct PinArgs {
    #[command(flatten)]
    what: What,
    /// For so long, e.g. 12h; until `windlass unpin` unless given
    #[arg(long = "for", value_name = "TIME", value_parser = humantime::parse_duration)]
    lease: Option<Duration>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "What `store.pins` of the configuration names stays pinned.")]
pub(super) struct UnpinArgs {
    #[command(flatten)]
    what: What,
}

#[derive(Debug, clap::Args)]
struct What {
    /// A blob's digest, an object's s3://bucket/key, or s3://bucket/prefix/ for all below it
    #[arg(required = true, value_name = "CONTENT")]
    names: Vec<PinName>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArgs,
}

pub(super) async fn pin(args: &PinArgs) -> anyhow::Result<()> {
    let change = args.lease.map_or(PinChange::Forever, |lease| PinChange::ForSeconds(lease.as_secs()));
    ask(&args.what, change).await
}

pub(super) async fn unpin(args: &UnpinArgs) -> anyhow::Result<()> {
    ask(&args.what, PinChange::Off).await
}

async fn ask(what: &What, pin: PinChange) -> anyhow::Result<()> {
    let request = serde_json::to_vec(&PinRequest { names: what.names.clone(), pin })?;
    let response = Daemon::from(&what.socket).post(PINS_PATH, request.into()).await?;
    let contents: Vec<Content> = serde_json::from_slice(&response.into_body().collect().await?.to_bytes())?;
    let text =
        if what.json { serde_json::to_string_pretty(&contents)? } else { lay_out(contents_table(&contents)) };
    print(&text)
}

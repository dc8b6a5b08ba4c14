//! `windlass wire` and `unwire`: makes this node's containerd ask the mirror first, and undoes that.
//!
//! Invariant: nothing is written before the mirror answers, only what is between our marks is ever changed, and a file
//! appears whole or not at all. With `--hold` the node is wired exactly as long as the mirror answers.
//! This module refuses to touch containerd's own configuration: that takes a restart, and `windlass doctor` says when it
//! is needed.

mod events;
mod files;
mod hold;
mod settings;
mod taint;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Serialize;

use super::canary::Canary;
use super::control::Daemon;
use super::kubernetes::ApiServer;
use super::mirror::{self, MirrorAddress};
use crate::config::{self, Config};
use crate::containerd;
use crate::containerd::config as containerd_config;
use crate::containerd::hosts::Mirror;
use crate::containerd::roots::{DEFAULT, Roots};
use crate::containerd::socket::Socket;
use files::{Change, Outcome};

/// Where `certs.d` is when containerd's configuration does not say: what every installer and document uses.
pub(super) const USUAL_ROOT: &str = "/etc/containerd/certs.d";

#[derive(Debug, Clone, clap::Args)]
pub(super) struct Place {
    /// Directories with a directory per registry, as in containerd's `config_path`; several with colons between them
    /// [default: what containerd's configuration says, else /etc/containerd/certs.d]
    #[arg(long, value_name = "DIR")]
    certs_d: Option<Roots>,
    /// Where the node's root directory is mounted
    #[arg(long, value_name = "DIR", default_value = "/")]
    host_root: PathBuf,
    /// Show what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct WireArgs {
    /// Only these of the configured registries
    #[arg(value_name = "REGISTRY")]
    registries: Vec<String>,
    /// Configuration file of the daemon [default: /etc/windlass/windlass.toml where it exists]
    #[arg(long, short, value_name = "PATH", env = "WINDLASS_CONFIG")]
    config: Option<PathBuf>,
    /// Also put the mirror into _default, which containerd takes for every registry without a directory of its own
    #[arg(long)]
    default: bool,
    /// How long to wait for the mirror to answer
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = humantime::parse_duration)]
    wait: Duration,
    /// Stay, take the wiring out while the mirror does not answer, and undo it all on SIGTERM
    #[arg(long, conflicts_with_all = ["dry_run", "json"])]
    hold: bool,
    /// With --hold: remove the taint windlass.dev/not-ready from this node when a canary arrived at the mirror
    #[arg(long, value_name = "NODE", requires = "hold")]
    untaint: Option<String>,
    /// With --untaint: remove it after this long, whatever the canary says
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = humantime::parse_duration)]
    untaint_deadline: Duration,
    /// With --hold: write Kubernetes events about this pod when pulls were served by peers, and when containerd does not
    /// use the mirror
    #[arg(long, value_name = "NAMESPACE/POD/UID", requires = "hold")]
    events: Option<events::PodName>,
    /// With --untaint and --events: containerd's socket, for the canary
    #[arg(long, value_name = "PATH", default_value = containerd::socket::DEFAULT_PATH)]
    containerd_socket: PathBuf,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Args)]
pub(super) struct UnwireArgs {
    /// Only these registries; `_default` is the directory for all others
    #[arg(value_name = "REGISTRY")]
    registries: Vec<String>,
    #[command(flatten)]
    place: Place,
}

/// One registry and what its file is to say.
#[derive(Debug, Clone)]
struct Wish {
    registry: String,
    mirror: Mirror,
}

pub(super) async fn wire(args: &WireArgs) -> anyhow::Result<()> {
    let config = Config::read(args.config.as_deref(), config::process_environment())?;
    let address = MirrorAddress::of(&config);
    let wishes = wishes(&config, args, &address)?;
    let has_files = !settings::is_bottlerocket(&args.place.host_root);
    if !has_files {
        settings::print(&wishes, args.place.json)?;
    }
    let roots = args.place.roots();
    if args.hold {
        let canary = canary(args, &config, &wishes);
        let watch =
            hold::Attendants { gatekeeper: gatekeeper(args, &canary)?, reporter: reporter(args, canary)? };
        let wishes = if has_files { wishes } else { Vec::new() };
        let wiring = hold::Wiring { roots, wishes, has_default: args.default };
        return hold::hold(&wiring, &address, watch).await;
    }
    if !has_files {
        return Ok(());
    }
    if !args.place.dry_run {
        mirror::wait(&address, args.wait).await.with_context(|| {
            "nothing was written: containerd would ask a mirror that is not there; start `windlass serve` first"
        })?;
    }
    let changes = files::wire(&roots, &wishes, args.default, args.place.dry_run);
    report(&changes, &args.place)
}

fn canary(args: &WireArgs, config: &Config, wishes: &[Wish]) -> Canary {
    Canary {
        daemon: Daemon::Socket(config.control.socket.clone()),
        socket: Socket::new(args.containerd_socket.clone()),
        // Any of them shows it: containerd treats them alike.
        registry: wishes
            .iter()
            .map(|wish| wish.registry.clone())
            .find(|name| name != DEFAULT)
            .unwrap_or_default(),
    }
}

/// What opens the node to pods, if that is asked for.
fn gatekeeper(args: &WireArgs, canary: &Canary) -> anyhow::Result<Option<hold::Gatekeeper>> {
    let Some(node) = &args.untaint else { return Ok(None) };
    let server = ApiServer::in_cluster("--untaint", |name| std::env::var(name).ok())?;
    let node = taint::NodeObject::new(server, node);
    Ok(Some(hold::Gatekeeper::new(node, canary.clone(), args.untaint_deadline)))
}

/// What writes events, if that is asked for.
fn reporter(args: &WireArgs, canary: Canary) -> anyhow::Result<Option<events::Reporter>> {
    let Some(pod) = &args.events else { return Ok(None) };
    let server = ApiServer::in_cluster("--events", |name| std::env::var(name).ok())?;
    Ok(Some(events::Reporter::new(server, pod.clone(), canary)))
}

pub(super) fn unwire(args: &UnwireArgs) -> anyhow::Result<()> {
    let changes = files::unwire(&args.place.roots(), &args.registries, args.place.dry_run);
    report(&changes, &args.place)
}

impl Place {
    /// The directories as they are seen from here.
    fn roots(&self) -> Roots {
        let found = || {
            let path = Path::new(containerd_config::DEFAULT_PATH);
            let settings = containerd_config::read(&self.host_root, path).ok()?;
            settings.config_path?.parse::<Roots>().ok()
        };
        match &self.certs_d {
            Some(given) => given.clone(),
            None => found().or_else(|| USUAL_ROOT.parse().ok()).map_or_else(
                || unreachable!("the usual root is an absolute path"),
                |roots| roots.below(&self.host_root),
            ),
        }
    }
}

fn wishes(config: &Config, args: &WireArgs, address: &MirrorAddress) -> anyhow::Result<Vec<Wish>> {
    let origins = &config.registry.origins;
    for registry in &args.registries {
        if !origins.iter().any(|origin| origin.name == *registry) {
            bail!(
                "{registry} is not among `registry.origins`: the mirror would answer 404; configure it first"
            );
        }
    }
    let wanted = |name: &String| args.registries.is_empty() || args.registries.contains(name);
    let mut wishes = Vec::new();
    for origin in origins.iter().filter(|origin| wanted(&origin.name)) {
        let server = origin.endpoint_url()?.as_str().trim_end_matches('/').to_owned();
        let mirror = Mirror { url: address.url(), server: Some(server) };
        wishes.push(Wish { registry: origin.name.clone(), mirror });
    }
    if wishes.is_empty() {
        bail!("no registry is configured, so there is nothing to wire; set `registry.origins`");
    }
    if args.default {
        wishes.insert(
            0,
            Wish { registry: DEFAULT.into(), mirror: Mirror { url: address.url(), server: None } },
        );
    }
    Ok(wishes)
}

#[derive(Serialize)]
struct Report<'a> {
    dry_run: bool,
    changes: &'a [Change],
}

/// Prints what was done; fails when a registry could not be wired or unwired.
fn report(changes: &[Change], place: &Place) -> anyhow::Result<()> {
    let text = if place.json {
        serde_json::to_string_pretty(&Report { dry_run: place.dry_run, changes })? + "\n"
    } else {
        changes.iter().map(|change| format!("{}\n", change.line(place.dry_run))).collect()
    };
    io::stdout().write_all(text.as_bytes()).context("cannot print the changes")?;
    let refused = changes.iter().filter(|change| change.outcome == Outcome::Refused).count();
    if refused > 0 {
        bail!("{refused} of {} files were left as they are; the reasons are above", changes.len());
    }
    Ok(())
}

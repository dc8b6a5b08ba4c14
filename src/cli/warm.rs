//! `windlass warm`: has this node's daemon fetch contents before somebody needs them, and others take them from it.
//!
//! It asks the daemon's own faces, as containerd and a model server would, and throws the bytes away: what passed through
//! was checked and is in the node's cache, where the other nodes find it. Invariant: exit code 0 means that every byte of
//! every source passed through.
//! This file refuses to speak to registries, and to place files, which `windlass fetch` does.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::value_parser;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use http::header::ACCEPT;
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::{Client, Response};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use url::Url;

use super::control::Daemon;
use super::mirror::{self, MirrorAddress};
use super::spread::{Selector, spread};
use crate::config::{self, Config};
use crate::fetch::S3Url;
use crate::oci::{Manifest, Platform, Reference, RepositoryName, Tag};
use crate::origin;
use crate::origin::s3::S3Origin;
use crate::store::PinName;

/// Contents under way at a time: what containerd asks for at a time, so that a warm-up is no heavier than a pull.
const AT_ONCE: usize = 3;

/// Tries for one content. What arrived before is in the cache, so a second one goes on where the first ended.
const ATTEMPTS: u32 = 5;

/// Between two tries.
const PAUSE: Duration = Duration::from_secs(2);

/// The daemon gives a read up after a minute without a byte (`cache.stall_timeout_ms`); this is longer.
const READ_TIMEOUT: Duration = Duration::from_secs(120);

/// Every kind of manifest that containerd reads.
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json";

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    windlass warm 123456789012.dkr.ecr.eu-west-1.amazonaws.com/team/server:1.2\n  \
    windlass warm s3://models/released/llama/\n  \
    windlass warm --replicas 4 --nodes 'gpu-*' REGISTRY/team/server:1.2\n  \
    kubectl -n windlass exec windlass-seed-0 -- windlass warm REGISTRY/team/server:1.2")]
pub(super) struct Args {
    /// Images as pods name them, and S3 objects or prefixes
    #[arg(required = true, value_name = "IMAGE|s3://BUCKET/KEY")]
    sources: Vec<Source>,
    /// Configuration file of the daemon [default: /etc/windlass/windlass.toml where it exists]
    #[arg(long, short, value_name = "PATH", env = "WINDLASS_CONFIG")]
    config: Option<PathBuf>,
    /// So many nodes shall have it, this one included; those with --nodes, or seeds first
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(1..))]
    replicas: Option<u16>,
    /// Which other nodes shall have it: `seed`, `zone=NAME`, or a name with a `*`; with commas between, all must hold
    #[arg(long, value_name = "SELECTOR")]
    nodes: Option<Selector>,
    /// Print one JSON object per source when it is there
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Image(Image),
    Objects(S3Url),
}

/// An image by its registry, which the mirror needs to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Image {
    registry: String,
    repository: RepositoryName,
    reference: Reference,
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with("s3://") {
            return text.parse().map(Self::Objects).map_err(|error| format!("{error}"));
        }
        image(text).map(Self::Image)
    }
}

/// Reads a reference as Docker and Kubernetes do: the part before the first slash is a registry when it looks like a host.
fn image(text: &str) -> Result<Image, String> {
    let (name, reference) = match text.split_once('@') {
        Some((name, digest)) => {
            let digest = digest.parse().map_err(|error| format!("{digest}: {error}"))?;
            (name, Reference::Digest(digest))
        }
        None => {
            let (name, tag) = match text.rsplit_once(':') {
                Some((name, tag)) if !tag.contains('/') => (name, tag),
                _ => (text, "latest"),
            };
            (name, Reference::Tag(tag.parse::<Tag>().map_err(|error| error.to_string())?))
        }
    };
    let (registry, repository) = match name.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest.to_owned()),
        Some(_) => ("docker.io", name.to_owned()),
        None => ("docker.io", format!("library/{name}")),
    };
    let repository = repository.parse().map_err(|error: crate::oci::NameError| error.to_string())?;
    Ok(Image { registry: registry.to_owned(), repository, reference })
}

/// What passed through.
#[derive(Debug, Default, Serialize)]
struct Warmed {
    source: String,
    contents: u64,
    bytes: u64,
    /// Other nodes that have it now, of those that were asked for.
    others: usize,
    /// What was warmed, as the store names it.
    #[serde(skip)]
    names: Vec<String>,
}

pub(super) async fn run(args: &Args) -> anyhow::Result<()> {
    let config = Config::read(args.config.as_deref(), config::process_environment())?;
    let address = MirrorAddress::of(&config);
    mirror::wait(&address, Duration::ZERO)
        .await
        .context("this node's daemon does the work; start it first")?;
    let client = Client::builder().no_proxy().read_timeout(READ_TIMEOUT).build()?;
    let warmer = Warmer { client, mirror: address.url().parse()?, config, bar: bar() };
    for source in &args.sources {
        let mut warmed = match source {
            Source::Image(image) => warmer.image(image).await?,
            Source::Objects(url) => warmer.objects(url).await?,
        };
        warmed.others = warmer.spread(args, &warmed.names).await?;
        warmer.bar.suspend(|| say(&warmed, args.json))?;
    }
    warmer.bar.finish_and_clear();
    Ok(())
}

fn bar() -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("{spinner} {binary_bytes} {binary_bytes_per_sec} {elapsed} {msg}");
    ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
}

fn say(warmed: &Warmed, json: bool) -> anyhow::Result<()> {
    let line = if json {
        serde_json::to_string(warmed)?
    } else {
        let size = bytesize::ByteSize::b(warmed.bytes).display().iec().to_string();
        let others = match warmed.others {
            0 => String::new(),
            1 => ", on one more node".to_owned(),
            others => format!(", on {others} more nodes"),
        };
        format!("{}: {size} in {} contents{others}", warmed.source, warmed.contents)
    };
    writeln!(io::stdout(), "{line}").context("cannot print what is there")
}

struct Warmer {
    client: Client,
    mirror: Url,
    config: Config,
    bar: ProgressBar,
}

impl Warmer {
    /// The manifest, and what it is made of on this node's platform.
    async fn image(&self, image: &Image) -> anyhow::Result<Warmed> {
        let source = format!("{}/{}", image.registry, image.repository);
        let mut warmed = Warmed { source: format!("{source} {}", image.reference), ..Warmed::default() };
        let mut reference = image.reference.clone();
        let (config, layers) = loop {
            let bytes = self.manifest(image, &reference).await.with_context(|| source.clone())?;
            warmed.contents += 1;
            warmed.bytes += bytes.len() as u64;
            warmed.names.push(format!("sha256:{}", hex::encode(Sha256::digest(&bytes))));
            match Manifest::parse(&bytes, &Platform::of_this_build())? {
                Manifest::Image { config, layers } => break (config, layers),
                Manifest::Index { chosen: Some(child), .. }
                    if reference != Reference::Digest(child.digest.clone()) =>
                {
                    reference = Reference::Digest(child.digest);
                }
                Manifest::Index { .. } => bail!("{source} has no image for this node's platform"),
            }
        };
        let parts: Vec<_> = config.into_iter().chain(layers).filter(|part| part.size > 0).collect();
        warmed.names.extend(parts.iter().map(|part| part.digest.to_string()));
        let urls = parts
            .iter()
            .map(|part| self.address(image, "blobs", &part.digest.to_string()))
            .collect::<Result<Vec<_>, _>>()?;
        self.pass(urls, warmed).await
    }

    async fn objects(&self, url: &S3Url) -> anyhow::Result<Warmed> {
        let s3 = S3Origin::new(self.config.s3.clone(), &origin::Metrics::default())?;
        let is_prefix = url.key.is_empty() || url.key.ends_with('/');
        let keys = if is_prefix {
            let listed = s3.list(&url.bucket, &url.key).await?;
            listed.into_iter().filter(|one| one.version.size > 0).map(|one| one.version.key).collect()
        } else {
            vec![url.key.clone()]
        };
        if keys.is_empty() {
            bail!("there is nothing below {url}");
        }
        let names = keys.iter().map(|key| format!("s3://{}/{key}", url.bucket)).collect();
        let endpoint: Url = format!("http://{}", self.config.object.listen).parse()?;
        let urls = keys
            .iter()
            .map(|key| below(&endpoint, std::iter::once(url.bucket.as_str()).chain(key.split('/'))));
        self.pass(
            urls.collect::<Result<Vec<_>, _>>()?,
            Warmed { source: url.to_string(), names, ..Warmed::default() },
        )
        .await
    }

    /// Has other nodes take it, if that is asked for. Returns how many did.
    async fn spread(&self, args: &Args, names: &[String]) -> anyhow::Result<usize> {
        if args.replicas.is_none() && args.nodes.is_none() {
            return Ok(0);
        }
        let names = names.iter().map(|name| name.parse()).collect::<Result<Vec<PinName>, _>>()?;
        let daemon = Daemon::Socket(self.config.control.socket.clone());
        let selector = args.nodes.clone().unwrap_or_default();
        let show = |missing: u64| self.bar.set_message(format!("{missing} chunks still to come elsewhere"));
        spread(&daemon, names, &selector, args.replicas.map(usize::from), show).await
    }

    /// Reads all of `urls` to their end, some at a time.
    async fn pass(&self, urls: Vec<Url>, warmed: Warmed) -> anyhow::Result<Warmed> {
        let sizes = stream::iter(urls).map(|url| self.whole(url)).buffer_unordered(AT_ONCE);
        let count = |warmed: Warmed, bytes| async move {
            Ok(Warmed { contents: warmed.contents + 1, bytes: warmed.bytes + bytes, ..warmed })
        };
        sizes.try_fold(warmed, count).await
    }

    /// Reads one body to its end. Returns how long it was.
    async fn whole(&self, url: Url) -> anyhow::Result<u64> {
        let mut attempt = 1;
        loop {
            match self.read(&url).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) if attempt == ATTEMPTS => return Err(error.context(url)),
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
            attempt += 1;
        }
    }

    async fn read(&self, url: &Url) -> anyhow::Result<u64> {
        let response = accepted(self.client.get(url.clone()).send().await?).await?;
        let length = response.content_length();
        let mut body = response.bytes_stream();
        let mut read = 0;
        while let Some(piece) = body.try_next().await? {
            read += piece.len() as u64;
            self.bar.inc(piece.len() as u64);
        }
        match length {
            Some(length) if length != read => bail!("it broke off after {read} of {length} bytes"),
            _ => Ok(read),
        }
    }

    async fn manifest(&self, image: &Image, reference: &Reference) -> anyhow::Result<Vec<u8>> {
        let url = self.address(image, "manifests", &reference.to_string())?;
        let response = accepted(self.client.get(url).header(ACCEPT, MANIFESTS).send().await?).await?;
        Ok(response.bytes().await?.to_vec())
    }

    fn address(&self, image: &Image, kind: &str, what: &str) -> anyhow::Result<Url> {
        let path = ["v2"].into_iter().chain(image.repository.as_str().split('/')).chain([kind, what]);
        let mut url = below(&self.mirror, path)?;
        url.query_pairs_mut().append_pair("ns", &image.registry);
        Ok(url)
    }
}

/// `base` with these segments as its path.
fn below<'a>(base: &Url, segments: impl Iterator<Item = &'a str>) -> anyhow::Result<Url> {
    let mut url = base.clone();
    match url.path_segments_mut() {
        Ok(mut path) => path.clear().extend(segments),
        Err(()) => bail!("{base} has no path"),
    };
    Ok(url)
}

/// The response, or the daemon's words for why there is none.
async fn accepted(response: Response) -> anyhow::Result<Response> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = response.text().await.unwrap_or_default();
    let said: Option<serde_json::Value> = serde_json::from_str(&body).ok();
    let message = said.as_ref().and_then(|said| said.pointer("/errors/0/message")?.as_str());
    bail!("the daemon answers {status}: {}", message.unwrap_or_else(|| body.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (String, String, String) {
        match text.parse().expect("a source") {
            Source::Image(image) => {
                (image.registry, image.repository.to_string(), image.reference.to_string())
            }
            Source::Objects(url) => (url.to_string(), String::new(), String::new()),
        }
    }

    #[test]
    fn images_are_read_as_pods_name_them() {
        let is = |text, registry: &str, repository: &str, reference: &str| {
            assert_eq!(parsed(text), (registry.into(), repository.into(), reference.into()), "{text}");
        };
        is("ubuntu", "docker.io", "library/ubuntu", "latest");
        is("nvidia/cuda:12", "docker.io", "nvidia/cuda", "12");
        is("reg.example:5000/team/a", "reg.example:5000", "team/a", "latest");
        is("reg.example/team/a:v1", "reg.example", "team/a", "v1");
        let digest = format!("sha256:{}", "0".repeat(64));
        is(&format!("localhost/a@{digest}"), "localhost", "a", &digest);
        assert!("reg.example/Team:v1".parse::<Source>().is_err());
        assert!("reg.example/a@sha256:0".parse::<Source>().is_err());
        assert_eq!(parsed("s3://models/a/").0, "s3://models/a/");
    }

    #[test]
    fn keys_are_escaped_and_keep_their_slashes() {
        let base: Url = "http://127.0.0.1:5101".parse().expect("a URL");
        let url = below(&base, ["b", "a b", "", "c?d"].into_iter()).expect("a URL");
        assert_eq!(url.as_str(), "http://127.0.0.1:5101/b/a%20b//c%3Fd");
    }
}

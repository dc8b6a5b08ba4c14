//! The demo's cluster: certificates, configurations and processes of its nodes.
//!
//! Invariant: the nodes share nothing but the origin, the CA and what they send each other: each has its own
//! directory, address, certificate and socket.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use bytesize::ByteSize;
use futures_util::future::{join_all, select_all};
use tokio::time::{Instant, sleep};

use super::addresses;
use super::generate::BUCKET;
use super::origin::Origin;
use super::process::{DaemonError, DaemonProcess, Node};
use crate::config::{Config, TlsConfig};
use crate::origin::registry::RegistryConfig;
use crate::transport::tls::{Authority, PeerName};

/// The registry whose mirror the daemons are: containerd's `ns`. The name is never resolved.
pub(super) const REGISTRY: &str = "registry.demo.internal";
const CLUSTER: &str = "demo";
/// The demo has made sure of the room before, so the store need not be careful with it.
const STORE_SLACK: ByteSize = ByteSize::mib(64);
/// Longer than anyone watches.
const CERTIFICATE_VALIDITY: Duration = Duration::from_secs(7 * 24 * 3600);
/// Unoptimised daemons on a busy two-core machine take a few seconds to find each other.
const STANDS_DEADLINE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Every daemon, running.
pub(super) struct Cluster {
    daemons: Vec<DaemonProcess>,
}

impl Cluster {
    /// Starts `count` daemons that work in directories under `dir`.
    ///
    /// # Errors
    /// When a certificate, a directory or a process cannot be made.
    pub(super) fn start(
        count: u8,
        dir: &Path,
        origin: &Origin,
        size: ByteSize,
        chunk_bytes: u32,
    ) -> anyhow::Result<Self> {
        let addresses = addresses::choose(count).context("the loopback has no free ports")?;
        let (authority, _) = Authority::create(CLUSTER, CERTIFICATE_VALIDITY)?;
        let nodes: Vec<_> = (1..=count)
            .zip(addresses)
            .map(|(n, addresses)| {
                let name = format!("node-{n:02}");
                Node { dir: dir.join(&name), name, addresses }
            })
            .collect();
        let daemons = nodes.iter().map(|node| {
            equip(node, &authority).with_context(|| format!("{} cannot be written", node.dir.display()))?;
            let config = configure(node, &nodes, origin, size, chunk_bytes)?.to_toml()?;
            Ok(DaemonProcess::start(node.clone(), &config)?)
        });
        Ok(Self { daemons: daemons.collect::<anyhow::Result<_>>()? })
    }

    #[must_use]
    pub(super) fn nodes(&self) -> Vec<Node> {
        self.daemons.iter().map(|daemon| daemon.node.clone()).collect()
    }

    /// Resolves when a daemon has ended.
    pub(super) async fn first_death(&mut self) -> DaemonError {
        select_all(self.daemons.iter_mut().map(|daemon| Box::pin(daemon.died()))).await.0
    }

    /// Each daemon's, in bytes.
    #[must_use]
    pub(super) fn peak_rss_bytes(&self) -> Vec<Option<u64>> {
        self.daemons.iter().map(DaemonProcess::peak_rss_bytes).collect()
    }

    /// Ends all daemons; returns what did not end well.
    pub(super) async fn stop(self) -> Vec<DaemonError> {
        let ends = join_all(self.daemons.into_iter().map(DaemonProcess::stop)).await;
        ends.into_iter().filter_map(Result::err).collect()
    }
}

/// Returns when every node is ready and trusts every other with claims: a cluster as it is two seconds after its last
/// node joined.
///
/// # Errors
/// When one does not in time.
pub(super) async fn wait_until_it_stands(nodes: &[Node]) -> Result<(), DaemonError> {
    let others = nodes.len() as u64 - 1;
    let deadline = Instant::now() + STANDS_DEADLINE;
    for node in nodes {
        while !node.stats().await.is_some_and(|stats| stats.ready && stats.peers.settled >= others) {
            if Instant::now() > deadline {
                return Err(node.late("was not ready with all its peers", STANDS_DEADLINE));
            }
            sleep(LOOK_EVERY).await;
        }
    }
    Ok(())
}

/// The node's directory and its certificate.
fn equip(node: &Node, authority: &Authority) -> anyhow::Result<()> {
    fs::create_dir_all(node.models_dir())?;
    let issued = authority.issue(&PeerName::new(CLUSTER, &node.name)?, CERTIFICATE_VALIDITY)?;
    let TlsConfig { ca, certificate, key, .. } = certificates(node);
    fs::write(ca, authority.certificate_pem())?;
    fs::write(certificate, &issued.certificate_pem)?;
    fs::write(key, &issued.key_pem)?;
    Ok(())
}

fn certificates(node: &Node) -> TlsConfig {
    let file = |name| node.dir.join(name);
    TlsConfig { ca: file("ca.crt"), certificate: file("tls.crt"), key: file("tls.key"), ca_key: None }
}

/// What differs from the defaults, all of it because of where the node is, not of what is shown.
fn configure(
    node: &Node,
    nodes: &[Node],
    origin: &Origin,
    size: ByteSize,
    chunk_bytes: u32,
) -> anyhow::Result<Config> {
    let mut config = Config::default();
    config.node.name.clone_from(&node.name);
    config.node.cluster = CLUSTER.into();
    config.tls = certificates(node);
    config.transport.listen = node.addresses.peers;
    config.gossip.peers = nodes.iter().map(|node| node.addresses.peers.to_string()).collect();
    config.store.data_dir = node.dir.join("data");
    config.store.budget = ByteSize(4 * size.as_u64() + STORE_SLACK.as_u64());
    config.store.free_floor = STORE_SLACK;
    config.cache.chunk_bytes = chunk_bytes;
    config.registry.listen = node.addresses.registry;
    config.registry.origins = vec![RegistryConfig {
        name: REGISTRY.into(),
        endpoint: Some(format!("http://{}", origin.registry()).parse()?),
        ..RegistryConfig::default()
    }];
    config.object.listen = node.addresses.s3;
    config.s3.buckets = vec![BUCKET.to_owned()].try_into()?;
    config.s3.endpoint = Some(format!("http://{}", origin.s3()).parse()?);
    config.s3.path_style = true;
    config.admin.listen = node.addresses.admin;
    config.control.socket = node.control_socket();
    Ok(config)
}

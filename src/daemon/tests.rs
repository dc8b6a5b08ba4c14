//! Whole daemons in this process, on the loopback, with real certificates.

use std::path::Path;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::cli::control;
use crate::http::admin::view::Stats;
use crate::transport::tls::{Authority, PeerName};

const CLUSTER: &str = "c1";
const HOUR: Duration = Duration::from_secs(3600);
/// Members find each other in milliseconds; this is for a machine that does ten other things.
const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon's configuration under `directory`, with a certificate by `authority` and ports of the system's choice.
fn configure(directory: &Path, authority: &Authority, name: &str) -> Config {
    let home = directory.join(name);
    std::fs::create_dir_all(&home).expect("writable");
    let named = PeerName::new(CLUSTER, name).expect("a name");
    let issued = authority.issue(&named, HOUR).expect("signs");
    let write = |file: &str, pem: &str| {
        let path = home.join(file);
        std::fs::write(&path, pem).expect("writable");
        path
    };
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut config = Config::default();
    config.node.name = name.into();
    config.node.cluster = CLUSTER.into();
    config.tls.ca = write("ca.crt", authority.certificate_pem());
    config.tls.certificate = write("tls.crt", &issued.certificate_pem);
    config.tls.key = write("tls.key", &issued.key_pem);
    config.transport.listen = loopback;
    config.admin.listen = loopback;
    config.registry.listen = loopback;
    config.object.listen = loopback;
    config.control.socket = home.join("w.sock");
    config.store.data_dir = home.join("data");
    config.store.free_floor = bytesize::ByteSize(0);
    config
}

struct Running {
    bound: Bound,
    stop: DropGuard,
    task: JoinHandle<Result<(), DaemonError>>,
}

impl Running {
    async fn start(config: Config) -> Self {
        let stop = CancellationToken::new();
        let (sender, bound) = oneshot::channel();
        let on_bound = |bound| drop(sender.send(bound));
        let task = tokio::spawn(run(config, stop.clone().cancelled_owned(), on_bound));
        Self { bound: bound.await.expect("it starts"), stop: stop.drop_guard(), task }
    }

    async fn stop(self) {
        drop(self.stop);
        self.task.await.expect("no panic").expect("a clean end");
    }

    /// Waits until the daemon says of itself what `holds` asks for.
    async fn until(&self, holds: impl Fn(&Stats) -> bool) {
        let daemon = control::Daemon::Socket(self.bound.control.clone());
        let asked = async {
            loop {
                let stats: Stats = daemon.get("/v1/stats").await.expect("it answers");
                if holds(&stats) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, asked).await.expect("it comes to hold");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_of_a_cluster_find_each_other_and_say_goodbye() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (authority, _) = Authority::create(CLUSTER, HOUR).expect("a CA");
    let first = Running::start(configure(scratch.path(), &authority, "n1")).await;
    let mut config = configure(scratch.path(), &authority, "n2");
    config.gossip.peers = vec![first.bound.peer.to_string()];
    let second = Running::start(config).await;
    first.until(|stats| stats.ready && stats.peers.alive == 1).await;
    second.until(|stats| stats.ready && stats.peers.alive == 1).await;
    second.stop().await;
    first.until(|stats| stats.peers.alive == 0).await;
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_cluster_stays_alone() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let authority = || Authority::create(CLUSTER, HOUR).expect("a CA").0;
    let first = Running::start(configure(scratch.path(), &authority(), "n1")).await;
    let mut config = configure(scratch.path(), &authority(), "n2");
    config.gossip.peers = vec![first.bound.peer.to_string()];
    config.gossip.alone_after_ms = 500;
    let stranger = Running::start(config).await;
    stranger.until(|stats| stats.ready && stats.peers.alive == 0).await;
    first.until(|stats| stats.peers.alive == 0).await;
    stranger.stop().await;
    first.stop().await;
}

#[tokio::test]
async fn a_start_that_fails_leaves_nothing_behind() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (authority, _) = Authority::create(CLUSTER, HOUR).expect("a CA");
    let mut config = configure(scratch.path(), &authority, "n1");
    config.store.data_dir = config.tls.ca.clone();
    let error = run(config.clone(), std::future::pending(), |_| panic!("it must not start")).await;
    let text = error.expect_err("a file is no directory").to_string();
    assert!(text.contains("store.data_dir"), "{text}");
    assert!(!config.control.socket.exists(), "the control socket is gone");
}

#[tokio::test]
async fn a_certificate_for_another_node_is_refused_with_both_names() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (authority, _) = Authority::create(CLUSTER, HOUR).expect("a CA");
    let mut config = configure(scratch.path(), &authority, "n1");
    config.node.name = "n2".into();
    let error = run(config, std::future::pending(), |_| {}).await.expect_err("not its own").to_string();
    assert!(error.contains("is for node n1, but this node is n2"), "{error}");
}

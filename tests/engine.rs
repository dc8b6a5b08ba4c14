//! The engine, several nodes of it in one process over the memory transport: each byte leaves the origin once.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use windlass::cache::{self, Cache, Content, Parts};
use windlass::content::{ByteRange, ContentId, ETag, NodeId, ObjectVersion};
use windlass::gossip::{self, Gossip};
use windlass::origin::Source;
use windlass::origin::fake::{FakeSource, Fault};
use windlass::provider::{self, Provider};
use windlass::store::{self, Store};
use windlass::swarm::membership::{self, Membership, NodeIdentity};
use windlass::swarm::{self, DEFAULT_CAPACITY, Swarm, Time, Zone};

use windlass::transport::{Incoming, MemoryNetwork, Transport};

const CHUNK_BYTES: u32 = 256 << 10;

struct Node {
    cache: Cache,
    gossip: Gossip,
    transport: Arc<dyn Transport>,
    stop: CancellationToken,
    tasks: TaskTracker,
    store: Store,
    data: tempfile::TempDir,
}

impl Node {
    /// `RUST_LOG=windlass=debug` shows what the nodes do.
    fn start(network: &Arc<MemoryNetwork>, name: &str, first: Option<&Self>, budget: u64) -> Self {
        let data = tempfile::tempdir().expect("a directory");
        Self::start_on(data, network, name, first, budget)
    }

    /// On what an earlier node left behind.
    fn start_on(
        data: tempfile::TempDir,
        network: &Arc<MemoryNetwork>,
        name: &str,
        first: Option<&Self>,
        budget: u64,
    ) -> Self {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let (transport, mut incoming) = network.join(name, 1_024);
        let addr = transport.addr().addr;
        let peers = first.map(|first| {
            first.gossip.book().borrow().identities.values().map(|i| i.addr.to_string()).collect()
        });
        let transport: Arc<dyn Transport> = transport;
        let config = store::Config {
            data_dir: data.path().into(),
            budget: bytesize::ByteSize(budget),
            free_floor: bytesize::ByteSize(0),
            io_threads: 2,
            ..store::Config::default()
        };
        let store = Store::open(config, store::Metrics::default()).expect("the directory opens");
        let identity =
            NodeIdentity::new(name, addr, 1, Zone::default(), false, DEFAULT_CAPACITY).expect("a short name");
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let membership = Membership::new(Time(0), membership::Config::default(), identity, 1);
        let (gossip, task) = Gossip::new(
            gossip::Config {
                peers: peers.unwrap_or_default(),
                bootstrap_interval_ms: 50,
                alone_after_ms: 2_000,
            },
            membership,
            Arc::clone(&transport),
            gossip::Metrics::default(),
            stop.clone(),
        );
        tasks.spawn(task);
        let cache = Cache::start(Parts {
            config: cache::Config { chunk_bytes: CHUNK_BYTES, ..cache::Config::default() },
            swarm: Swarm::new(NodeId::from_name(name), swarm::Config::default(), 7),
            store: store.clone(),
            transport: Arc::clone(&transport),
            peers: gossip.book(),
            metrics: cache::Metrics::default(),
            shutdown: stop.clone(),
        });
        let provider =
            Provider::new(cache.clone(), &provider::Config::default(), provider::Metrics::default());
        let (gossip_in, cache_in, spawner) = (gossip.clone(), cache.clone(), tasks.clone());
        tasks.spawn(async move {
            while let Some(arrived) = incoming.recv().await {
                match arrived {
                    Incoming::Datagram { from, bytes } => gossip_in.datagram(from, bytes),
                    Incoming::Message { from, bytes } => cache_in.message(from, bytes).await,
                    Incoming::Disconnected { from } => cache_in.disconnected(from).await,
                    Incoming::Stream { from, send, recv } => {
                        let provider = provider.clone();
                        spawner.spawn(async move { provider.serve(from, send, recv).await });
                    }
                }
            }
        });
        Self { cache, gossip, transport, stop, tasks, store, data }
    }

    async fn open(&self, id: &ContentId, source: &Arc<FakeSource>) -> Content {
        let source: Arc<dyn Source> = Arc::clone(source) as _;
        let size = match id {
            ContentId::Object(object) => object.size,
            ContentId::Blob(_) => SIZE,
        };
        self.cache.open(id.clone(), size, source).await.expect("opens")
    }

    /// A clean end; what was stored is in the directory.
    async fn stop(self) -> tempfile::TempDir {
        tracing::debug!(node = %self.transport.local(), "stopping");
        self.stop.cancel();
        self.cache.stopped().await;
        tracing::debug!("engine stopped");
        self.transport.close().await;
        tracing::debug!("transport closed");
        self.tasks.close();
        self.tasks.wait().await;
        self.store.close().expect("the disk is well");
        self.data
    }
}

/// 5 MiB and a bit: 21 chunks, the last one short.
const SIZE: u64 = (5 << 20) + 12_345;

async fn cluster(n: usize) -> Vec<Node> {
    let network = MemoryNetwork::new(1);
    let mut nodes = Vec::new();
    for i in 0..n {
        nodes.push(Node::start(&network, &format!("node-{i}"), nodes.first(), 1 << 30));
    }
    meet(&nodes).await;
    nodes
}

async fn meet(nodes: &[Node]) {
    for node in nodes {
        let mut book = node.gossip.book();
        let all = book.wait_for(|book| book.members.len() == nodes.len());
        tokio::time::timeout(Duration::from_secs(20), all)
            .await
            .expect("they find each other")
            .expect("gossip runs");
    }
}

fn blob(source: &FakeSource) -> ContentId {
    ContentId::Blob(source.digest())
}

async fn read(content: &Content, range: ByteRange) -> Vec<u8> {
    let pieces: Vec<_> = content.read(range).try_collect().await.expect("reads");
    pieces.concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_node_reads_what_the_origin_has() {
    let nodes = cluster(1).await;
    let source = FakeSource::new(1, SIZE);
    let content = nodes[0].open(&blob(&source), &source).await;
    let whole = ByteRange::new(0, SIZE);
    assert!(read(&content, whole).await == source.bytes(whole));
    let part = ByteRange::new(300_000, 900_001);
    assert!(read(&content, part).await == source.bytes(part));
    assert_eq!(source.sent_bytes(), SIZE);
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn four_nodes_at_once_take_each_byte_from_the_origin_once() {
    let nodes = cluster(4).await;
    let source = FakeSource::new(2, SIZE);
    let id = blob(&source);
    let whole = ByteRange::new(0, SIZE);
    let reads = nodes.iter().map(|node| async {
        let content = node.open(&id, &source).await;
        assert!(read(&content, whole).await == source.bytes(whole));
        content.progress()
    });
    let progress = futures_util::future::join_all(reads).await;
    assert_eq!(source.sent_bytes(), SIZE, "{progress:?}");
    assert_eq!(progress.iter().map(|p| p.from_origin).sum::<u64>(), SIZE);
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_comes_later_takes_nothing_from_the_origin() {
    let nodes = cluster(3).await;
    let source = FakeSource::new(3, SIZE);
    let id = blob(&source);
    nodes[0].open(&id, &source).await.fill().await.expect("fills");
    nodes[1].open(&id, &source).await.fill().await.expect("fills");
    assert_eq!(source.sent_bytes(), SIZE);
    let object = ContentId::Object(ObjectVersion {
        bucket: "b".into(),
        key: "k".into(),
        etag: ETag("\"1\"".into()),
        size: SIZE,
    });
    let other = FakeSource::new(4, SIZE);
    let part = ByteRange::new(1_000_000, 1_200_000);
    assert!(read(&nodes[2].open(&object, &other).await, part).await == other.bytes(part));
    assert!(other.sent_bytes() < SIZE, "a ranged read of an object does not fetch all of it");
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_disk_lost_comes_from_a_peer_again() {
    let network = MemoryNetwork::new(1);
    let healthy = Node::start(&network, "healthy", None, 1 << 30);
    let tired = Node::start(&network, "tired", Some(&healthy), 1 << 30);
    let mut nodes = vec![healthy, tired];
    meet(&nodes).await;
    let source = FakeSource::new(9, SIZE);
    let id = blob(&source);
    for node in &nodes {
        node.open(&id, &source).await.fill().await.expect("fills");
    }
    let data = nodes.pop().expect("the tired one").stop().await;
    let key = id.key(CHUNK_BYTES).hex();
    let path = data.path().join("contents").join(&key[..2]).join(key).join("data");
    let file = File::options().write(true).open(path).expect("it is stored");
    file.write_all_at(b"rotten", 3_000_000).expect("it is written");
    nodes.push(Node::start_on(data, &network, "tired-again", nodes.first(), 1 << 30));
    meet(&nodes).await;
    let whole = ByteRange::new(0, SIZE);
    let content = nodes[1].open(&id, &source).await;
    assert!(read(&content, whole).await == source.bytes(whole));
    assert_eq!(content.progress().from_peers, u64::from(CHUNK_BYTES));
    assert_eq!(source.sent_bytes(), SIZE, "the origin was not asked again");
    drop(content);
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_the_origin_are_tried_again_and_corruption_is_caught() {
    let nodes = cluster(2).await;
    let source = FakeSource::new(5, SIZE);
    let id = blob(&source);
    source.inject(0, 2, Fault::Short(1_000));
    source.inject(3_000_000, 1, Fault::Corrupt(3_000_000));
    let contents = futures_util::future::join_all(nodes.iter().map(|node| node.open(&id, &source))).await;
    let fills = futures_util::future::join_all(contents.iter().map(Content::fill)).await;
    for fill in fills {
        fill.expect("the origin's second answer is right");
    }
    let whole = ByteRange::new(0, SIZE);
    for content in &contents {
        assert!(read(content, whole).await == source.bytes(whole));
    }
    for node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_without_room_passes_bytes_through() {
    let network = MemoryNetwork::new(1);
    let node = Node::start(&network, "small", None, u64::from(CHUNK_BYTES));
    let source = FakeSource::new(6, SIZE);
    let content = node.open(&blob(&source), &source).await;
    let whole = ByteRange::new(0, SIZE);
    assert!(read(&content, whole).await == source.bytes(whole));
    assert!(content.fill().await.is_err(), "it cannot be kept");
    node.stop().await;
}

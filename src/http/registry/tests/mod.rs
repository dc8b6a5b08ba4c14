//! The mirror between a client that asks as containerd does and a stub registry.

mod callers;

use std::sync::atomic::{AtomicBool, Ordering};

use http_body_util::BodyExt;

use tokio_util::sync::CancellationToken;

use super::*;
use crate::cache;
use crate::content::NodeId;
use crate::http::server::{self, Limits, Listener};
use crate::origin::registry::stub::{Reply, Seen, Stub};
use crate::origin::{Metrics, access, fake};
use crate::store::{self, Store};
use crate::swarm::membership::PeerBook;
use crate::swarm::{self, Swarm};
use crate::transport::MemoryNetwork;

const LAYER_BYTES: u64 = 300_000;
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";

fn digest_of(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Algorithm::Sha256, &Sha256::digest(bytes)).unwrap()
}

/// An image with a config and two layers, and an index on top.
#[derive(Clone)]
struct Image {
    blobs: Vec<Bytes>,
    manifest: Bytes,
    index: Bytes,
}

impl Image {
    fn new(seed: u64) -> Self {
        let blobs = vec![
            Bytes::from(format!("{{\"seed\":{seed}}}")),
            fake::seeded_bytes(seed, ByteRange::new(0, LAYER_BYTES)),
            Bytes::new(),
        ];
        let descriptors: Vec<_> = blobs.iter().map(|blob| descriptor("application/x", blob, "")).collect();
        let manifest = Bytes::from(format!(
            r#"{{"schemaVersion":2,"mediaType":"{MANIFEST_TYPE}","config":{},"layers":[{},{}]}}"#,
            descriptors[0], descriptors[1], descriptors[2]
        ));
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let platform = format!(r#","platform":{{"os":"linux","architecture":"{architecture}"}}"#);
        let child = descriptor(MANIFEST_TYPE, &manifest, &platform);
        let index =
            Bytes::from(format!(r#"{{"schemaVersion":2,"mediaType":"{INDEX_TYPE}","manifests":[{child}]}}"#));
        Self { blobs, manifest, index }
    }

    fn layer(&self) -> Bytes {
        self.blobs[1].clone()
    }

    /// Answers as a registry that has this image under the tag `latest`.
    fn answer(&self, seen: &Seen) -> Reply {
        let last = seen.target.rsplit('/').next().unwrap_or_default();
        let manifests = [(&self.index, INDEX_TYPE), (&self.manifest, MANIFEST_TYPE)];
        for (bytes, media_type) in manifests {
            let digest = digest_of(bytes).to_string();
            if last == digest || (last == "latest" && media_type == INDEX_TYPE) {
                return Reply::ranged(seen, bytes)
                    .with("content-type", media_type)
                    .with("docker-content-digest", digest);
            }
        }
        let blob = self.blobs.iter().find(|blob| last == digest_of(blob).to_string());
        blob.map_or_else(|| Reply::status(404), |blob| Reply::ranged(seen, blob))
    }
}

fn descriptor(media_type: &str, bytes: &[u8], more: &str) -> String {
    let (digest, size) = (digest_of(bytes), bytes.len());
    format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":{size}{more}}}"#)
}

/// Several chunks a layer.
const CHUNK_BYTES: u32 = 64 << 10;

/// A mirror with an engine of its own, alone in its cluster.
struct Node {
    mirror: Mirror,
    _stop: tokio_util::sync::DropGuard,
    _data: tempfile::TempDir,
}

impl Node {
    fn new(config: &Config, registries: Vec<RegistryConfig>) -> Self {
        Self::with_access(config, registries, &access::Config::default())
    }

    fn with_access(config: &Config, registries: Vec<RegistryConfig>, access: &access::Config) -> Self {
        let origin = RegistryOrigin::new(registries, &Metrics::default()).unwrap();
        let data = tempfile::tempdir().unwrap();
        let stop = CancellationToken::new();
        let store = store::Config {
            data_dir: data.path().into(),
            free_floor: bytesize::ByteSize(0),
            io_threads: 1,
            ..store::Config::default()
        };
        let (transport, _) = MemoryNetwork::new(1).join("alone", 16);
        let cache = Cache::start(cache::Parts {
            config: cache::Config { chunk_bytes: CHUNK_BYTES, ..cache::Config::default() },
            swarm: Swarm::new(NodeId::from_name("alone"), swarm::Config::default(), 7),
            store: Store::open(store, store::Metrics::default()).unwrap(),
            transport,
            peers: tokio::sync::watch::channel(alone()).1,
            metrics: cache::Metrics::default(),
            shutdown: stop.clone(),
        });
        let callers = Arc::new(Callers::new(access, config.tag_ttl(), &access::Metrics::default()));
        let mirror = Mirror::new(config, cache, origin, callers, Served::default());
        Self { mirror, _stop: stop.drop_guard(), _data: data }
    }
}

/// Membership has looked and found nobody else.
fn alone() -> PeerBook {
    PeerBook::new(Vec::new(), true)
}

fn mirror(config: Config, stub: &Stub) -> Node {
    Node::new(&config, vec![stub.config()])
}

/// No layer is started ahead, so that a test sees only what it asks for.
fn plain() -> Config {
    Config { prefetch_layers: 0, ..Config::default() }
}

struct Got {
    status: u16,
    headers: HeaderMap,
    body: Result<Bytes, ()>,
}

impl Got {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(self.body.as_ref().unwrap()).into_owned()
    }
}

async fn ask(node: &Node, method: &str, target: &str, headers: &[(&'static str, &str)]) -> Got {
    let mut request = Request::builder().method(method).uri(target);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let (parts, body) = node.mirror.answer(request.body(()).unwrap()).await.into_parts();
    let body = body.collect().await.map(http_body_util::Collected::to_bytes).map_err(|_| ());
    Got { status: parts.status.as_u16(), headers: parts.headers, body }
}

async fn get(node: &Node, target: &str) -> Got {
    ask(node, "GET", target, &[]).await
}

fn blob_target(bytes: &[u8]) -> String {
    format!("/v2/team/app/blobs/{}?ns=reg.example.com", digest_of(bytes))
}

fn manifest_target(reference: &str) -> String {
    format!("/v2/team/app/manifests/{reference}?ns=reg.example.com")
}

async fn registry_of(image: &Image) -> Stub {
    let image = image.clone();
    Stub::start(move |seen| image.answer(seen)).await
}

#[tokio::test]
async fn a_pull_as_containerd_does_it() {
    let image = Image::new(1);
    let stub = registry_of(&image).await;
    let mirror = mirror(plain(), &stub);
    let head = ask(&mirror, "HEAD", &manifest_target("latest"), &[("accept", "a/b, */*")]).await;
    assert_eq!((head.status, head.header("content-type")), (200, INDEX_TYPE));
    assert_eq!(head.header("docker-content-digest"), digest_of(&image.index).to_string());
    assert_eq!(head.header("content-length"), image.index.len().to_string());
    assert_eq!(head.header("oci-namespace"), "reg.example.com");
    for (bytes, media_type) in [(&image.index, INDEX_TYPE), (&image.manifest, MANIFEST_TYPE)] {
        let got = get(&mirror, &manifest_target(&digest_of(bytes).to_string())).await;
        assert_eq!((got.status, got.header("content-type")), (200, media_type));
        assert_eq!(got.body.as_ref(), Ok(bytes));
    }
    for blob in &image.blobs {
        let got = get(&mirror, &blob_target(blob)).await;
        assert_eq!((got.status, got.header("content-type")), (200, "application/octet-stream"));
        assert_eq!(got.header("docker-content-digest"), digest_of(blob).to_string());
        assert_eq!(got.header("content-length"), blob.len().to_string());
        assert_eq!(got.header("accept-ranges"), "bytes");
        assert_eq!(got.body.as_ref(), Ok(blob));
    }
    assert_eq!(
        stub.seen().iter().filter(|seen| seen.method == "HEAD").count(),
        1,
        "sizes come from manifests"
    );
}

#[tokio::test]
async fn ranges_of_blobs_and_manifests() {
    let image = Image::new(2);
    let stub = registry_of(&image).await;
    let mirror = mirror(plain(), &stub);
    let digest = digest_of(&image.manifest).to_string();
    for (target, bytes) in
        [(manifest_target(&digest), &image.manifest), (blob_target(&image.layer()), &image.layer())]
    {
        let size = bytes.len();
        for (range, status, start, end) in [
            ("bytes=0-", 206, 0, size),
            ("bytes=7-", 206, 7, size),
            ("bytes=3-9", 206, 3, 10),
            ("bytes=-5", 206, size - 5, size),
            ("bytes=0-1,4-5", 200, 0, size),
            ("bytes=x", 200, 0, size),
        ] {
            let got = ask(&mirror, "GET", &target, &[("range", range)]).await;
            assert_eq!((got.status, got.body.as_ref()), (status, Ok(&bytes.slice(start..end))), "{range}");
            let expected = format!("bytes {start}-{}/{size}", end - 1);
            assert_eq!(got.header("content-range"), if status == 206 { &*expected } else { "" });
            // A length would have containerd read the rest of a blob in parallel, from here or not at all.
            let is_open = target.contains("/blobs/") && status == 206 && end == size;
            let length = (end - start).to_string();
            assert_eq!(got.header("content-length"), if is_open { "" } else { &*length }, "{range}");
        }
        let got = ask(&mirror, "GET", &target, &[("range", "bytes=9999999-")]).await;
        assert_eq!((got.status, got.header("content-range")), (416, &*format!("bytes */{size}")));
        let head = ask(&mirror, "HEAD", &target, &[("range", "bytes=3-9")]).await;
        assert_eq!((head.status, head.header("content-length")), (200, &*size.to_string()));
    }
}

#[tokio::test]
async fn what_is_wrong_is_said_in_the_specifications_words() {
    let stub = registry_of(&Image::new(3)).await;
    let mirror = mirror(plain(), &stub);
    let missing = digest_of(b"missing");
    for (method, target, status, code) in [
        ("GET", "/v2/".to_owned(), 200, "{}"),
        ("GET", "/v2/a/tags/list".to_owned(), 404, "UNSUPPORTED"),
        ("PUT", manifest_target("latest"), 405, "UNSUPPORTED"),
        ("GET", "/v2/team/app/blobs/sha256:12".to_owned(), 400, "DIGEST_INVALID"),
        ("GET", "/v2/Team/manifests/latest".to_owned(), 400, "NAME_INVALID"),
        ("GET", manifest_target("nope"), 404, "MANIFEST_UNKNOWN"),
        ("GET", format!("/v2/a/blobs/{missing}"), 404, "BLOB_UNKNOWN"),
        ("GET", "/v2/a/manifests/latest?ns=ghcr.io".to_owned(), 404, "reg.example.com"),
    ] {
        let got = ask(&mirror, method, &target, &[]).await;
        assert_eq!(got.status, status, "{target}");
        assert!(got.text().contains(code), "{target}: {}", got.text());
        assert_eq!(got.header("content-type"), "application/json");
    }
}

#[tokio::test]
async fn without_ns_the_only_registry_is_meant() {
    let stub = registry_of(&Image::new(4)).await;
    assert_eq!(get(&mirror(plain(), &stub), "/v2/team/app/manifests/latest").await.status, 200);
    let other = RegistryConfig { name: "ghcr.io".into(), ..RegistryConfig::default() };
    let mirror = Node::new(&plain(), vec![stub.config(), other]);
    let got = get(&mirror, "/v2/team/app/manifests/latest").await;
    assert_eq!(got.status, 404);
    assert!(got.text().contains("ghcr.io, reg.example.com"), "{}", got.text());
}

#[tokio::test]
async fn a_tag_is_remembered_for_a_moment_only() {
    let stub = registry_of(&Image::new(5)).await;
    for (tag_ttl_ms, asked) in [(3_600_000, 1), (0, 3)] {
        let before = stub.count("latest");
        let mirror = mirror(Config { tag_ttl_ms, ..plain() }, &stub);
        for _ in 0..3 {
            assert_eq!(ask(&mirror, "HEAD", &manifest_target("latest"), &[]).await.status, 200);
        }
        assert_eq!(stub.count("latest") - before, asked);
    }
}

#[tokio::test]
async fn while_the_registry_is_down_a_tag_may_stand_for_what_it_did() {
    let (image, down) = (Image::new(6), Arc::new(AtomicBool::new(false)));
    let is_down = Arc::clone(&down);
    let stub = Stub::start(move |seen| match is_down.load(Ordering::SeqCst) {
        true => Reply::status(500),
        false => image.answer(seen),
    })
    .await;
    for (serve_stale_tags, status) in [(true, 200), (false, 404)] {
        down.store(false, Ordering::SeqCst);
        let mirror = mirror(Config { tag_ttl_ms: 0, serve_stale_tags, ..plain() }, &stub);
        assert_eq!(ask(&mirror, "HEAD", &manifest_target("latest"), &[]).await.status, 200);
        down.store(true, Ordering::SeqCst);
        assert_eq!(ask(&mirror, "HEAD", &manifest_target("latest"), &[]).await.status, status);
    }
}

#[tokio::test]
async fn a_manifest_starts_its_layers() {
    let image = Image::new(7);
    let stub = registry_of(&image).await;
    let mirror = mirror(Config::default(), &stub);
    assert_eq!(get(&mirror, &manifest_target("latest")).await.status, 200);
    assert_eq!(get(&mirror, &manifest_target(&digest_of(&image.manifest).to_string())).await.status, 200);
    let layer = digest_of(&image.layer()).to_string();
    let started = async {
        while stub.count(&layer) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), started).await.expect("the layer is fetched unasked");
}

#[tokio::test]
async fn a_manifest_of_another_platform_starts_nothing() {
    let (ours, foreign) = (Image::new(11), Image::new(12));
    let index = String::from_utf8(ours.index.to_vec()).unwrap();
    let child =
        descriptor(MANIFEST_TYPE, &foreign.manifest, r#","platform":{"os":"plan9","architecture":"mips"}"#);
    let index = Bytes::from(index.replace("\"manifests\":[", &format!("\"manifests\":[{child},")));
    let (both, theirs) = (Image { index, ..ours.clone() }, foreign.clone());
    let stub = Stub::start(move |seen| match both.answer(seen) {
        Reply { status: 404, .. } => theirs.answer(seen),
        reply => reply,
    })
    .await;
    let mirror = mirror(Config::default(), &stub);
    assert_eq!(get(&mirror, &manifest_target("latest")).await.status, 200);
    for image in [&foreign, &ours] {
        let manifest = digest_of(&image.manifest).to_string();
        assert_eq!(get(&mirror, &manifest_target(&manifest)).await.status, 200);
    }
    let started = async {
        while stub.count(&digest_of(&ours.layer()).to_string()) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), started).await.expect("this platform's layer is started");
    assert_eq!(stub.count(&digest_of(&foreign.layer()).to_string()), 0);
}

#[tokio::test]
async fn an_origin_that_does_not_answer_is_a_404_in_time() {
    let image = Image::new(8);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
    let config = RegistryConfig { endpoint: Some(silent), ..registry_of(&image).await.config() };
    let impatient = Config { first_byte_deadline_ms: 50, ..plain() };
    let mirror = Node::new(&impatient, vec![config]);
    for target in [manifest_target("latest"), blob_target(&image.layer())] {
        let got = get(&mirror, &target).await;
        assert_eq!(got.status, 404);
        assert!(got.text().contains("nothing arrived within"), "{}", got.text());
    }
}

#[tokio::test]
async fn an_origin_that_is_slow_is_waited_for_while_bytes_come() {
    // One chunk: nothing of it may go out before the whole is verified.
    let config = Bytes::from(vec![7; CHUNK_BYTES as usize]);
    let (theirs, digest) = (config.clone(), digest_of(&config).to_string());
    let stub = Stub::start(move |seen| {
        let reply = Reply::ranged(seen, &theirs);
        let pause = Duration::from_millis(if seen.method == "GET" { 250 } else { 0 });
        if seen.target.ends_with(&digest) { Reply { pause, ..reply } } else { Reply::status(404) }
    })
    .await;
    // Half of what the body takes, and four times what is between its pieces.
    let impatient = Config { first_byte_deadline_ms: 1_000, ..plain() };
    let mirror = Node::new(&impatient, vec![stub.config()]);
    let got = get(&mirror, &blob_target(&config)).await;
    assert_eq!((got.status, got.body), (200, Ok(config)));
}

#[test]
fn what_a_client_accepts_is_passed_on_whole() {
    let accepts = |lines: &[&str]| {
        accepted(&lines.iter().map(|line| (ACCEPT, line.parse().unwrap())).collect::<HeaderMap>())
    };
    assert_eq!(accepts(&["a/b", "c/d, */*"]).as_deref(), Some("a/b, c/d, */*"));
    assert_eq!((accepts(&["*/*"]), accepts(&[])), (None, None));
}

#[tokio::test]
async fn a_mirror_that_is_its_own_origin_says_so() {
    let stub = registry_of(&Image::new(9)).await;
    let got = ask(&mirror(plain(), &stub), "GET", "/v2/", &[("user-agent", AGENT)]).await;
    assert_eq!(got.status, 400);
    assert!(got.text().contains("endpoint"), "{}", got.text());
}

#[tokio::test]
async fn what_was_wrong_from_the_registry_itself_is_not_sent_again() {
    let image = Image::new(12);
    let layer = image.layer();
    let mut wrong = layer.to_vec();
    wrong[0] ^= 1;
    let (target, wrong, theirs) = (blob_target(&layer), Bytes::from(wrong), image.clone());
    let layers = digest_of(&layer).to_string();
    let stub = Stub::start(move |seen| match seen.target.contains(&layers) {
        true => Reply::ranged(seen, &wrong),
        false => theirs.answer(seen),
    })
    .await;
    let mirror = mirror(plain(), &stub);
    let first = get(&mirror, &target).await;
    assert_eq!((first.status, first.body), (200, Err(())), "cut before its end");
    let asked = stub.seen().len();
    let second = get(&mirror, &target).await;
    assert_eq!(second.status, 404);
    assert!(second.text().contains("something else"), "{}", second.text());
    assert_eq!(stub.seen().len(), asked, "and not asked for again");
}

#[tokio::test]
async fn a_body_that_cannot_go_on_ends_with_fin() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let image = Image::new(10);
    let (layer, theirs) = (image.layer(), image.clone());
    let layers = digest_of(&layer).to_string();
    // The last chunk is lost.
    let lost = format!("bytes={}-", LAYER_BYTES - LAYER_BYTES % u64::from(CHUNK_BYTES));
    let stub = Stub::start(move |seen| match seen.header("range") {
        Some(range) if seen.target.contains(&layers) && range.starts_with(&lost) => Reply::status(404),
        _ => theirs.answer(seen),
    })
    .await;
    let mirror = mirror(plain(), &stub);
    let listener = Listener::bind("registry", "registry.listen", ([127, 0, 0, 1], 0).into()).await.unwrap();
    let address = listener.address().unwrap();
    let limits = Limits { connections: 4, drain: Duration::ZERO };
    let answering = mirror.mirror.clone();
    let answer = move |request| {
        let mirror = answering.clone();
        async move { mirror.answer(request).await }
    };
    tokio::spawn(listener.serve(answer, limits, server::Metrics::default(), CancellationToken::new()));
    let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", blob_target(&layer));
    client.write_all(request.as_bytes()).await.unwrap();
    let mut all = Vec::new();
    client.read_to_end(&mut all).await.expect("FIN, not RST");
    let text = String::from_utf8_lossy(&all);
    assert!(
        text.starts_with("HTTP/1.1 200") || text.starts_with("HTTP/1.1 404"),
        "{}",
        &text[..60.min(text.len())]
    );
    assert!(all.len() < layer.len(), "never the whole");
}

//! The registry against stubs on loopback that behave as real ones do, and worse.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderMap, Method};
use parking_lot::Mutex;

use super::client::Client;
use super::stub::{Reply, Seen, Stub, registry};
use super::*;
use crate::origin::{Outcome, Source, conformance, fake};

const SIZE: u64 = 300_000;

fn bytes() -> Bytes {
    fake::seeded_bytes(7, ByteRange::new(0, SIZE))
}

fn digest_of(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Algorithm::Sha256, &Sha256::digest(bytes)).unwrap()
}

fn name() -> RepositoryName {
    "team/app".parse().unwrap()
}

fn blob(registry: &Arc<Registry>) -> Content {
    registry.blob(name(), digest_of(&bytes()), SIZE)
}

fn tag() -> Reference {
    Reference::Tag("latest".parse().unwrap())
}

async fn read_all(content: &Content) -> Result<Vec<u8>, OriginError> {
    conformance::read(content, ByteRange::new(0, SIZE)).await
}

/// Reads four ranges at the same moment.
async fn read_quarters(content: &Content) -> Vec<Result<Vec<u8>, OriginError>> {
    let quarters = (0..4).map(|n| ByteRange::new(SIZE * n / 4, SIZE * (n + 1) / 4));
    join_all(quarters.map(|range| conformance::read(content, range))).await
}

#[tokio::test]
async fn a_plain_registry_conforms() {
    let stub = Stub::start(|seen| Reply::ranged(seen, &bytes())).await;
    let content = blob(&stub.registry());
    conformance::check(Arc::new(content), &bytes()).await;
    assert!(stub.seen().iter().all(|seen| seen.header("accept-encoding") == Some("identity")));
    assert_eq!(stub.seen()[0].target, format!("/v2/team/app/blobs/{}", digest_of(&bytes())));
}

#[tokio::test]
async fn one_redirect_serves_all_ranges_and_takes_no_credential_along() {
    let store = Stub::start(|seen| Reply::ranged(seen, &bytes())).await;
    let to = store.url("/bucket/blob?signature=secret");
    let stub = Stub::start(move |seen| match seen.header("authorization") {
        None => Reply::status(401).with("www-authenticate", "Basic realm=\"r\""),
        Some(_) => Reply::redirect(to.clone()),
    })
    .await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "password").unwrap();
    let content = blob(&registry(RegistryConfig {
        username: Some("user".into()),
        password_file: Some(file.path().into()),
        ..stub.config()
    }));
    let whole: Vec<u8> = read_quarters(&content).await.into_iter().flat_map(Result::unwrap).collect();
    assert_eq!(whole, bytes());
    assert_eq!(stub.seen().len(), 2, "a challenge and a redirect");
    assert_eq!(store.seen().len(), 4);
    assert!(store.seen().iter().all(|seen| seen.header("authorization").is_none()));
}

#[tokio::test]
async fn an_expired_redirect_is_asked_for_again() {
    let uses = Arc::new(AtomicUsize::new(0));
    let store = Stub::start(move |seen| match uses.fetch_add(1, Ordering::SeqCst) {
        1 => Reply::status(403),
        _ => Reply::ranged(seen, &bytes()),
    })
    .await;
    let to = store.url("/blob");
    let stub = Stub::start(move |_| Reply::redirect(to.clone())).await;
    let content = blob(&stub.registry());
    for _ in 0..3 {
        assert_eq!(read_all(&content).await.unwrap(), bytes());
    }
    assert_eq!((stub.seen().len(), store.seen().len()), (2, 4));
}

#[tokio::test]
async fn redirects_end() {
    let stub = Stub::start(|_| Reply::redirect("/again".into())).await;
    let error = read_all(&blob(&stub.registry())).await.unwrap_err();
    assert!(error.to_string().contains("more than 5 redirects"), "{error}");
    assert_eq!(stub.seen().len(), 6);
}

#[tokio::test]
async fn a_realm_on_this_node_is_not_asked_for_a_registry_elsewhere() {
    let metadata = "http://169.254.169.254/latest/api/token";
    let challenge = format!("Bearer realm=\"{metadata}\",service=\"x\"");
    let stub = Stub::start(move |_| Reply::status(401).with("www-authenticate", challenge.clone())).await;
    let error = read_all(&blob(&stub.registry())).await.unwrap_err().to_string();
    assert!(error.contains("169.254.169.254, which may not be asked"), "{error}");
}

#[tokio::test]
async fn a_registry_cannot_send_us_to_the_metadata_service() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let config = RegistryConfig { name: "reg.example.com".into(), ..RegistryConfig::default() };
    let client = Client::new(&config, Metrics::default().origin("reg.example.com")).unwrap();
    for target in ["http://169.254.169.254/latest/meta-data/", "https://localhost/", "file:///etc/passwd"] {
        let error = client
            .send(Kind::Content, Method::GET, &target.parse().unwrap(), HeaderMap::new())
            .await
            .unwrap_err();
        assert!(error.to_string().contains("points to"), "{error}");
    }
}

/// Answers 401 until the token that is `valid` at the time comes along.
fn guarded(stub_url: &str, valid: &AtomicUsize, seen: &Seen) -> Reply {
    if seen.target.starts_with("/token") {
        return Reply::ok(format!(r#"{{"token":"t{}","expires_in":300}}"#, valid.load(Ordering::SeqCst)));
    }
    let expected = format!("Bearer t{}", valid.load(Ordering::SeqCst));
    match seen.header("authorization") {
        Some(token) if token == expected => Reply::ranged(seen, &bytes()),
        _ => {
            let challenge = format!(
                r#"Basic realm="x", Bearer realm="{stub_url}/token?a=b",service="svc",scope="repository:team/app:pull""#
            );
            Reply::status(401).with("www-authenticate", challenge)
        }
    }
}

async fn guarded_stub(valid: &Arc<AtomicUsize>) -> Stub {
    let (valid, url) = (Arc::clone(valid), Arc::new(Mutex::new(String::new())));
    let theirs = Arc::clone(&url);
    let stub = Stub::start(move |seen| guarded(&theirs.lock(), &valid, seen)).await;
    *url.lock() = stub.url("");
    stub
}

#[tokio::test]
async fn one_token_serves_all_and_is_renewed_once() {
    let valid = Arc::new(AtomicUsize::new(1));
    let stub = guarded_stub(&valid).await;
    let content = blob(&stub.registry());
    assert!(read_quarters(&content).await.iter().all(Result::is_ok));
    assert_eq!(stub.count("/token"), 1);
    let token = stub.seen().into_iter().find(|seen| seen.target.starts_with("/token")).unwrap();
    assert_eq!(token.target, "/token?a=b&service=svc&scope=repository%3Ateam%2Fapp%3Apull");
    assert_eq!(token.header("authorization"), None);
    valid.store(2, Ordering::SeqCst);
    assert!(read_quarters(&content).await.iter().all(Result::is_ok));
    assert_eq!(stub.count("/token"), 2);
}

#[tokio::test]
async fn a_refused_credential_is_named_and_not_shown() {
    let stub = Stub::start(|_| Reply::status(401).with("www-authenticate", "Basic realm=\"r\"")).await;
    let error = read_all(&blob(&stub.registry())).await.unwrap_err();
    assert!(
        matches!(error, OriginError::Denied { .. }) && error.to_string().contains("docker_config"),
        "{error}"
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    let auth = r#"{"auths":{"reg.example.com":{"username":"user","password":"swordfish"}}}"#;
    std::fs::write(file.path(), auth).unwrap();
    let config = RegistryConfig { docker_config: Some(file.path().into()), ..stub.config() };
    let error = read_all(&blob(&registry(config))).await.unwrap_err().to_string();
    assert!(error.contains("the entry for reg.example.com") && !error.contains("swordfish"), "{error}");
    assert_eq!(stub.seen().len(), 3);
}

/// A token service that is asked by POST, and the registry before it.
async fn posting_stub(get_status: u16) -> Stub {
    let url = Arc::new(Mutex::new(String::new()));
    let theirs = Arc::clone(&url);
    let stub = Stub::start(move |seen| match (seen.method.as_str(), seen.target.starts_with("/token")) {
        ("POST", true) => Reply::ok(r#"{"access_token":"posted","expires_in":300}"#),
        (_, true) => Reply::status(get_status),
        _ if seen.header("authorization") == Some("Bearer posted") => Reply::ranged(seen, &bytes()),
        _ => {
            let challenge = format!(r#"Bearer realm="{}/token",service="a svc""#, theirs.lock());
            Reply::status(401).with("www-authenticate", challenge)
        }
    })
    .await;
    *url.lock() = stub.url("");
    stub
}

fn with_docker_config(stub: &Stub, entry: &str) -> (RegistryConfig, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!(r#"{{"auths":{{"reg.example.com":{entry}}}}}"#)).unwrap();
    (RegistryConfig { docker_config: Some(file.path().into()), ..stub.config() }, file)
}

#[tokio::test]
async fn a_refresh_token_is_exchanged_by_post() {
    let stub = posting_stub(500).await;
    let (config, _file) = with_docker_config(&stub, r#"{"identitytoken":"refresh me"}"#);
    assert_eq!(read_all(&blob(&registry(config))).await.unwrap(), bytes());
    let asked = stub.seen().into_iter().find(|seen| seen.method == "POST").unwrap();
    assert_eq!(
        asked.body,
        "grant_type=refresh_token&refresh_token=refresh+me&client_id=windlass&service=a+svc\
         &scope=repository%3Ateam%2Fapp%3Apull"
    );
    assert_eq!((asked.target.as_str(), asked.header("authorization")), ("/token", None));
}

#[tokio::test]
async fn a_token_service_without_get_is_asked_by_post() {
    let stub = posting_stub(405).await;
    let (config, _file) = with_docker_config(&stub, r#"{"username":"me","password":"p&w"}"#);
    assert_eq!(read_all(&blob(&registry(config))).await.unwrap(), bytes());
    let asked = stub.seen().into_iter().find(|seen| seen.method == "POST").unwrap();
    assert!(asked.body.starts_with("grant_type=password&username=me&password=p%26w&"), "{}", asked.body);
}

/// A server's TLS with a certificate of its own, and the file that makes it trusted.
fn tls() -> (rustls::ServerConfig, tempfile::NamedTempFile) {
    let own = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap();
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let tls = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key)
        .unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), own.cert.pem()).unwrap();
    (tls, file)
}

#[tokio::test]
async fn small_questions_share_a_connection_of_http_2_and_ranges_do_not() {
    let (mut tls, file) = tls();
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let digest = digest_of(MANIFEST.as_bytes()).to_string();
    let stub = Stub::start_tls(tls, move |seen| match seen.target.contains("/manifests/") {
        true => Reply::ok(MANIFEST)
            .with("docker-content-digest", digest.clone())
            .with("content-type", OCI_MANIFEST),
        false => Reply::ranged(seen, &bytes()),
    })
    .await;
    let endpoint = Some(format!("https://{}/", stub.address).parse().unwrap());
    let registry = registry(RegistryConfig { ca_file: Some(file.path().into()), endpoint, ..stub.config() });
    let (name, tag) = (name(), tag());
    let questions = (0..20).map(|_| registry.resolve(&name, &tag, None));
    assert!(join_all(questions).await.iter().all(Result::is_ok));
    assert_eq!(read_all(&blob(&registry)).await.unwrap(), bytes());
    for seen in stub.seen() {
        let is_blob = seen.target.contains("/blobs/");
        let expected = if is_blob { http::Version::HTTP_11 } else { http::Version::HTTP_2 };
        assert_eq!(seen.version, expected, "{}", seen.target);
    }
}

#[tokio::test]
async fn a_private_authority_is_trusted_where_it_is_named_and_nowhere_else() {
    let (tls, file) = tls();
    let stub = Stub::start_tls(tls, |seen| Reply::ranged(seen, &bytes())).await;
    let endpoint = Some(format!("https://{}/", stub.address).parse().unwrap());
    let config = |ca_file| RegistryConfig { ca_file, endpoint: endpoint.clone(), ..stub.config() };
    let trusting = registry(config(Some(file.path().into())));
    assert_eq!(read_all(&blob(&trusting)).await.unwrap(), bytes());
    let error = read_all(&blob(&registry(config(None)))).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("certificate"), "{error}");
    assert!(error.to_string().contains("`registry.origins.ca_file`"), "{error}");
}

#[tokio::test]
async fn a_small_question_survives_a_bad_moment() {
    let asked = AtomicUsize::new(0);
    let digest = digest_of(MANIFEST.as_bytes()).to_string();
    let stub = Stub::start(move |_| match asked.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::status(500),
        1 => Reply::status(503).with("retry-after", "0"),
        _ => Reply::ok(MANIFEST)
            .with("docker-content-digest", digest.clone())
            .with("content-type", OCI_MANIFEST),
    })
    .await;
    let registry = stub.registry();
    assert!(registry.resolve(&name(), &tag(), None).await.is_ok());
    assert_eq!(stub.seen().len(), 3);
    assert_eq!(registry.client.metrics().retries(), 2);
}

#[tokio::test]
async fn a_redirect_whose_time_is_over_is_not_followed_again() {
    let store = Stub::start(|seen| Reply::ranged(seen, &bytes())).await;
    let to = store.url("/blob?X-Amz-Expires=1&X-Amz-Signature=secret");
    let stub = Stub::start(move |_| Reply::redirect(to.clone())).await;
    let content = blob(&stub.registry());
    for _ in 0..3 {
        assert_eq!(read_all(&content).await.unwrap(), bytes());
    }
    assert_eq!(stub.seen().len(), 1, "it is good for a second");
    tokio::time::sleep(std::time::Duration::from_millis(1_000)).await;
    assert_eq!(read_all(&content).await.unwrap(), bytes());
    assert_eq!(stub.seen().len(), 2);
}

#[tokio::test]
async fn a_registry_that_ignores_ranges_is_read_around() {
    let stub = Stub::start(|_| Reply::ok(bytes())).await;
    let registry = stub.registry();
    let range = ByteRange::new(1_000, 2_000);
    assert_eq!(conformance::read(&blob(&registry), range).await.unwrap(), bytes()[1_000..2_000]);
    let metrics = registry.client.metrics();
    assert!(metrics.bytes_wasted() >= 1_000);
    assert_eq!(metrics.bytes_received(Kind::Content), 1_000 + metrics.bytes_wasted());
    assert_eq!(metrics.requests(Kind::Content, Outcome::Ok), 1);
}

#[tokio::test]
async fn answers_that_are_not_what_was_asked_for_are_refused() {
    let shorter: fn(&Seen) -> Reply = |seen| Reply { cut: Some(5), ..Reply::ranged(seen, &bytes()) };
    let other_range: fn(&Seen) -> Reply =
        |_| Reply { status: 206, ..Reply::ok("x") }.with("content-range", "bytes 0-0/300000");
    let other_size: fn(&Seen) -> Reply = |_| Reply::ok("short");
    let encoded: fn(&Seen) -> Reply = |_| Reply::ok(bytes()).with("content-encoding", "gzip");
    for answer in [shorter, other_range, other_size, encoded] {
        let stub = Stub::start(answer).await;
        let error = read_all(&blob(&stub.registry())).await.unwrap_err();
        assert!(error.is_transient(), "{error}");
    }
}

#[tokio::test]
async fn statuses_are_told_apart() {
    let outcome = |reply: Reply| async move {
        let stub = Stub::start(move |_| reply.clone()).await;
        Outcome::of(&blob(&stub.registry()).read(ByteRange::new(0, 1)).await)
    };
    assert_eq!(outcome(Reply::status(404)).await, Outcome::NotFound);
    assert_eq!(outcome(Reply::status(403)).await, Outcome::Denied);
    assert_eq!(outcome(Reply::status(429)).await, Outcome::Throttled);
    assert_eq!(outcome(Reply::status(503).with("retry-after", "3")).await, Outcome::Throttled);
    assert_eq!(outcome(Reply::status(503)).await, Outcome::Failed);
    assert_eq!(outcome(Reply::status(500)).await, Outcome::Failed);
    let said = Reply { status: 403, ..Reply::ok(r#"{"errors":[{"code":"DENIED","message":"pay first"}]}"#) };
    let stub = Stub::start(move |_| said.clone()).await;
    assert!(read_all(&blob(&stub.registry())).await.unwrap_err().to_string().contains("pay first"));
}

#[tokio::test]
async fn an_unreachable_registry_says_why() {
    let stub = Stub::start(|_| Reply::status(200)).await;
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let endpoint = format!("http://{free}/").parse().unwrap();
    let registry = registry(RegistryConfig { endpoint: Some(endpoint), ..stub.config() });
    let error = read_all(&blob(&registry)).await.unwrap_err().to_string();
    assert!(error.contains(&free.to_string()) && error.to_lowercase().contains("refused"), "{error}");
}

const MANIFEST: &str = r#"{"schemaVersion":2,"config":{},"layers":[]}"#;
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

#[tokio::test]
async fn a_tag_is_resolved_by_head() {
    let digest = digest_of(b"other");
    let said = digest.to_string();
    let stub = Stub::start(move |_| {
        Reply::ok(MANIFEST)
            .with("docker-content-digest", said.clone())
            .with("content-type", format!("{OCI_MANIFEST}; charset=utf-8"))
    })
    .await;
    let resolved = stub.registry().resolve(&name(), &tag(), Some("a/b")).await.unwrap();
    let expected = ResolvedManifest { digest, media_type: OCI_MANIFEST.into(), size: MANIFEST.len() as u64 };
    assert_eq!(resolved, expected);
    let seen = stub.seen();
    assert_eq!((seen.len(), seen[0].method.as_str(), seen[0].header("accept")), (1, "HEAD", Some("a/b")));
}

#[tokio::test]
async fn what_head_does_not_say_is_read() {
    let forbids_head: fn(&Seen) -> Reply = |seen| match seen.method.as_str() {
        "HEAD" => Reply::status(405),
        _ => Reply::ok(MANIFEST),
    };
    let says_nothing: fn(&Seen) -> Reply =
        |_| Reply::ok(MANIFEST).with("content-type", "application/octet-stream");
    for answer in [forbids_head, says_nothing] {
        let stub = Stub::start(answer).await;
        let resolved = stub.registry().resolve(&name(), &tag(), None).await.unwrap();
        assert_eq!(resolved.digest, digest_of(MANIFEST.as_bytes()));
        assert_eq!((resolved.media_type.as_str(), resolved.size), (OCI_MANIFEST, MANIFEST.len() as u64));
    }
}

#[tokio::test]
async fn a_missing_tag_is_not_found() {
    let stub = Stub::start(|_| Reply::status(404)).await;
    let error = stub.registry().resolve(&name(), &tag(), None).await.unwrap_err();
    assert_eq!(error.to_string(), "team/app@latest does not exist at reg.example.com");
    assert_eq!(stub.seen().len(), 1);
}

#[tokio::test]
async fn a_blobs_size_is_learnt_even_where_head_is_refused() {
    let allows_head: fn(&Seen) -> Reply = |seen| Reply::ranged(seen, &bytes());
    let refuses_head: fn(&Seen) -> Reply = |seen| match seen.method.as_str() {
        "HEAD" => Reply::status(403),
        _ => Reply::ranged(seen, &bytes()),
    };
    for answer in [allows_head, refuses_head] {
        let stub = Stub::start(answer).await;
        assert_eq!(stub.registry().blob_size(&name(), &digest_of(&bytes())).await.unwrap(), SIZE);
    }
}

#[tokio::test]
async fn a_ca_file_that_is_none_is_named() {
    let stub = Stub::start(|_| Reply::status(200)).await;
    for (content, part) in [(None, "No such file"), (Some(""), "no certificate")] {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content.unwrap_or_default()).unwrap();
        let path = if content.is_some() { file.path().to_owned() } else { "/nonexistent/ca.pem".into() };
        let config = RegistryConfig { ca_file: Some(path.clone()), ..stub.config() };
        let error = RegistryOrigin::new(vec![config], &Metrics::default()).unwrap_err().to_string();
        assert!(
            error.contains("ca_file") && error.contains(part) && error.contains(&path.display().to_string()),
            "{error}"
        );
    }
}

#[tokio::test]
async fn registries_are_found_by_name() {
    let stub = Stub::start(|_| Reply::status(200)).await;
    let other = RegistryConfig { name: "docker.io".into(), ..RegistryConfig::default() };
    let both = RegistryOrigin::new(vec![stub.config(), other], &Metrics::default()).unwrap();
    assert_eq!(both.names().collect::<Vec<_>>(), ["docker.io", "reg.example.com"]);
    assert!(both.get("docker.io").is_some() && both.get("ghcr.io").is_none() && both.only().is_none());
    let twice = RegistryOrigin::new(vec![stub.config(), stub.config()], &Metrics::default());
    assert!(matches!(twice, Err(ConfigError::Twice(_))));
}

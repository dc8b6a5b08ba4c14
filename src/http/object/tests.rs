use std::time::Duration;

use bytes::Bytes;
use reqwest::{Client, Method, StatusCode};
use tokio_util::sync::CancellationToken;
use tokio_util::sync::DropGuard;

use super::*;
use crate::content::ByteRange;
use crate::http::server::{self, Limits, Listener};
use crate::origin::access;
use crate::origin::fake::seeded_bytes;
use crate::origin::s3::stub::{Fault, Stub};

const SIZE: u64 = 300_000;

/// The endpoint on a port of its own, in front of a stub S3 with the object `models/a`.
struct Running {
    stub: Stub,
    url: String,
    client: Client,
    bytes: Bytes,
    _stop: DropGuard,
    _node: crate::cache::testing::Node,
}

impl Running {
    async fn start() -> Self {
        let stub = Stub::start().await;
        let origin = stub.origin();
        Self::with(stub, origin).await
    }

    async fn with(stub: Stub, origin: S3Origin) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let bytes = seeded_bytes(1, ByteRange::new(0, SIZE));
        stub.put("models", "a", bytes.clone());
        let node = crate::cache::testing::Node::alone();
        let config = Config { head_ttl_ms: 60_000, ..Config::default() };
        let access = access::Config { permit_ttl_ms: 0, refusal_ttl_ms: 0, ..access::Config::default() };
        let callers = S3Callers::new(origin.clone(), &access, &access::Metrics::default());
        let endpoint = Endpoint::new(&config, node.cache(), origin, callers, Served::default());
        let listener = Listener::bind("object", "object.listen", ([127, 0, 0, 1], 0).into()).await.unwrap();
        let url = format!("http://{}", listener.address().unwrap());
        let stop = CancellationToken::new();
        let answer = move |request| {
            let endpoint = endpoint.clone();
            async move { endpoint.handle(request).await }
        };
        let limits = Limits { connections: 16, drain: Duration::ZERO };
        tokio::spawn(listener.serve(answer, limits, server::Metrics::default(), stop.clone()));
        Self { stub, url, client: Client::new(), bytes, _stop: stop.drop_guard(), _node: node }
    }

    async fn ask(&self, method: Method, path: &str, headers: &[(&str, &str)]) -> reqwest::Response {
        let mut request = self.client.request(method, format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send().await.unwrap()
    }

    async fn get(&self, headers: &[(&str, &str)]) -> reqwest::Response {
        self.ask(Method::GET, "/models/a", headers).await
    }

    fn count(&self, method: &str) -> usize {
        self.stub.requests().iter().filter(|line| line.starts_with(method)).count()
    }
}

fn header<'a>(response: &'a reqwest::Response, name: &str) -> &'a str {
    response.headers().get(name).map_or("", |value| value.to_str().unwrap())
}

#[tokio::test]
async fn an_object_comes_with_what_the_origin_says_of_it() {
    let running = Running::start().await;
    let response = running.get(&[]).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(header(&response, "etag"), format!("\"{}\"", blake3::hash(&running.bytes).to_hex()));
    assert_eq!(header(&response, "content-length"), SIZE.to_string());
    assert_eq!(header(&response, "accept-ranges"), "bytes");
    assert_eq!(header(&response, "content-type"), "binary/octet-stream");
    assert_eq!(header(&response, "last-modified"), "Wed, 12 Oct 2022 17:50:00 GMT");
    assert_eq!(header(&response, "x-amz-meta-flavour"), "plain");
    assert!(response.bytes().await.unwrap() == running.bytes);
    let head = running.ask(Method::HEAD, "/models/a", &[]).await;
    assert_eq!(header(&head, "content-length"), SIZE.to_string());
}

#[tokio::test]
async fn many_ranges_cost_one_head() {
    let running = Running::start().await;
    for (range, start, end) in [("bytes=0-9", 0, 10), ("bytes=299990-999999", 299_990, 300_000)] {
        let response = running.get(&[("range", range)]).await;
        assert_eq!(response.status(), StatusCode::PARTIAL_CONTENT);
        assert_eq!(header(&response, "content-range"), format!("bytes {start}-{}/300000", end - 1));
        assert!(response.bytes().await.unwrap() == running.bytes[start..end], "{range}");
    }
    assert_eq!(running.get(&[("range", "bytes=0-1,5-6")]).await.status(), StatusCode::OK, "several: ignored");
    let beyond = running.get(&[("range", "bytes=300000-")]).await;
    assert_eq!(beyond.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(header(&beyond, "content-range"), "bytes */300000");
    assert_eq!(running.count("HEAD"), 1);
}

#[tokio::test]
async fn conditions_are_judged_on_a_fresh_answer_before_they_fail() {
    let running = Running::start().await;
    let old = format!("\"{}\"", blake3::hash(&running.bytes).to_hex());
    let unchanged = running.get(&[("if-none-match", &old)]).await;
    assert_eq!((unchanged.status(), header(&unchanged, "etag")), (StatusCode::NOT_MODIFIED, old.as_str()));
    assert_eq!(running.get(&[("if-match", &old)]).await.status(), StatusCode::OK);
    let fresh = seeded_bytes(2, ByteRange::new(0, SIZE));
    running.stub.put("models", "a", fresh.clone());
    let new = format!("\"{}\"", blake3::hash(&fresh).to_hex());
    let response = running.get(&[("if-match", &new)]).await;
    assert!(response.bytes().await.unwrap() == fresh);
    assert_eq!(running.get(&[("if-match", &old)]).await.status(), StatusCode::PRECONDITION_FAILED);
}

#[tokio::test]
async fn an_object_overwritten_since_its_head_is_read_in_its_new_version() {
    let running = Running::start().await;
    assert_eq!(running.ask(Method::HEAD, "/models/a", &[]).await.status(), StatusCode::OK);
    let fresh = seeded_bytes(2, ByteRange::new(0, SIZE + 1));
    running.stub.put("models", "a", fresh.clone());
    assert!(running.get(&[]).await.bytes().await.unwrap() == fresh);
}

#[tokio::test]
async fn signatures_are_neither_needed_nor_checked() {
    let running = Running::start().await;
    let signed =
        "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0";
    let headers = [("authorization", signed), ("x-amz-content-sha256", "nonsense"), ("x-amz-date", "never")];
    assert_eq!(running.get(&headers).await.status(), StatusCode::OK);
    let presigned = "/models/a?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=0&x-id=GetObject";
    assert_eq!(running.ask(Method::GET, presigned, &[]).await.status(), StatusCode::OK);
    let version_2 = "/models/a?AWSAccessKeyId=x&Signature=y&Expires=1";
    assert_eq!(running.ask(Method::GET, version_2, &[]).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn whatever_writes_is_denied() {
    let running = Running::start().await;
    for (method, path) in [
        (Method::PUT, "/models/b"),
        (Method::DELETE, "/models/a"),
        (Method::POST, "/models/b?uploads"),
        (Method::POST, "/models?delete"),
        (Method::PUT, "/newbucket"),
    ] {
        let response = running.ask(method.clone(), path, &[]).await;
        assert_eq!(response.status(), StatusCode::FORBIDDEN, "{method} {path}");
        let text = response.text().await.unwrap();
        assert!(text.contains("<Code>AccessDenied</Code>") && text.contains("only reads"), "{text}");
    }
    assert!(running.stub.requests().is_empty());
}

#[tokio::test]
async fn a_failure_before_the_first_byte_is_an_s3_error() {
    let running = Running::start().await;
    running.stub.fault("/models/a", Fault::Refuse(403, "AccessDenied"));
    let denied = running.get(&[]).await;
    assert_eq!(denied.status(), StatusCode::FORBIDDEN);
    assert!(denied.text().await.unwrap().contains("s3:GetObject"));
    let missing = running.ask(Method::GET, "/models/nothing", &[]).await;
    assert_eq!(missing.status(), StatusCode::NOT_FOUND);
    assert!(missing.text().await.unwrap().contains("<Code>NoSuchKey</Code>"));
    let elsewhere = running.ask(Method::GET, "/secrets/a", &[]).await;
    assert_eq!(elsewhere.status(), StatusCode::FORBIDDEN);
    assert!(elsewhere.text().await.unwrap().contains("s3.buckets"));
}

#[tokio::test]
async fn listings_pass_through() {
    let running = Running::start().await;
    for key in ["m/1", "m/2", "m/3", "m/4"] {
        running.stub.put("models", key, Bytes::from_static(b"x"));
    }
    let first = running.ask(Method::GET, "/models?list-type=2&prefix=m%2F", &[]).await.text().await.unwrap();
    assert!(first.contains("<Key>m/3</Key>") && !first.contains("<Key>m/4</Key>"), "{first}");
    assert!(first.contains("<IsTruncated>true</IsTruncated>"), "{first}");
    let path = "/models?list-type=2&prefix=m%2F&continuation-token=m%2F3";
    let second = running.ask(Method::GET, path, &[]).await.text().await.unwrap();
    assert!(second.contains("<Key>m/4</Key>") && second.contains("<KeyCount>1</KeyCount>"), "{second}");
    let old = running.ask(Method::GET, "/models?prefix=m%2F&marker=m%2F3", &[]).await.text().await.unwrap();
    assert!(old.contains("<Key>m/4</Key>") && old.contains("<Marker>m/3</Marker>"), "{old}");
}

#[tokio::test]
async fn where_callers_rights_count_a_read_needs_a_proof_that_s3_accepts() {
    let stub = Stub::start().await;
    let node = stub.origin_of("node").await;
    let running = Running::with(stub, node).await;
    let signed_by = async |signer, key| -> String {
        let signer = running.stub.origin_of(signer).await;
        signer.presign_head("models", key, None, Duration::from_secs(60)).await.unwrap().into()
    };
    let (anns, bobs) = (signed_by("ann", "a").await, signed_by("bob", "a").await);
    running.stub.refuse("bob", true);
    let read = async |proof: &str| running.get(&[("x-windlass-proof", proof)]).await;

    let first = read(&anns).await;
    assert_eq!(first.status(), StatusCode::OK);
    assert!(first.bytes().await.unwrap() == running.bytes);
    for (denied, reason) in [
        (read(&bobs).await, "does not accept the proof"),
        (read(&signed_by("ann", "b").await).await, "another object"),
        (read("http://169.254.169.254/models/a").await, "sign it for"),
        (running.get(&[]).await, "a proof is needed"),
        (running.ask(Method::GET, "/models/a?X-Amz-Signature=0", &[]).await, "a proof is needed"),
        (running.ask(Method::GET, "/models?list-type=2", &[]).await, "object by object"),
    ] {
        assert_eq!(denied.status(), StatusCode::FORBIDDEN, "{reason}");
        let text = denied.text().await.unwrap();
        assert!(text.contains("<Code>AccessDenied</Code>") && text.contains(reason), "{text}");
    }
    assert_eq!(running.ask(Method::HEAD, "/models/a", &[]).await.status(), StatusCode::FORBIDDEN);
    assert_eq!(read("nonsense").await.status(), StatusCode::BAD_REQUEST);

    running.stub.refuse("ann", true);
    assert_eq!(read(&anns).await.status(), StatusCode::FORBIDDEN, "revoked");
    running.stub.refuse("ann", false);
    let range = running.get(&[("x-windlass-proof", &anns), ("range", "bytes=5-9")]).await;
    assert!(range.bytes().await.unwrap() == running.bytes[5..10]);
}

#[tokio::test]
async fn a_daemon_pointed_at_itself_is_told_so() {
    let running = Running::start().await;
    let agent = ("user-agent", "aws-sdk-rust/1.3 ua/2.1 app/windlass");
    let text = running.get(&[agent]).await.text().await.unwrap();
    assert!(text.contains("points at a windlass daemon"), "{text}");
}

#[test]
fn only_a_signature_is_taken_off_the_query() {
    let uri = |text: &str| unsigned(&text.parse().unwrap()).to_string();
    assert_eq!(uri("/b/k%20y?x-amz-signature=1&versionId=2&X-Amz-Date=3"), "/b/k%20y?versionId=2");
    assert_eq!(uri("/b/k?X-Amz-Expires=3"), "/b/k");
    assert_eq!(uri("/b?list-type=2&prefix=a%2Fb"), "/b?list-type=2&prefix=a%2Fb");
}

#[test]
fn a_name_under_localhost_is_a_bucket() {
    let bucket = |host: &str| LocalHost.parse_host_header(host).unwrap().bucket().map(str::to_owned);
    assert_eq!(bucket("models.localhost:5101").as_deref(), Some("models"));
    assert_eq!(bucket("my.models.localhost").as_deref(), Some("my.models"));
    assert_eq!(bucket("localhost:5101"), None);
    assert_eq!(bucket("node-a.cluster:5101"), None);
}

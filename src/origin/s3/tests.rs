use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::stub::{Fault, Stub};
use super::*;
use crate::content::ByteRange;
use crate::origin::{access, conformance, fake};

fn bytes_of(seed: u64, size: u64) -> Bytes {
    fake::seeded_bytes(seed, ByteRange::new(0, size))
}

async fn pinned(origin: &S3Origin, key: &str) -> S3Object {
    let head = origin.head("models", key, None).await.unwrap();
    origin.object(head.version, head.version_id)
}

async fn read(object: &S3Object, start: u64, end: u64) -> Result<Vec<u8>, OriginError> {
    conformance::read(object, ByteRange::new(start, end)).await
}

#[tokio::test]
async fn conforms_as_a_source() {
    let stub = Stub::start().await;
    let bytes = bytes_of(1, 300_000);
    stub.put("models", "a", bytes.clone());
    let origin = stub.origin();
    conformance::check(Arc::new(pinned(&origin, "a").await), &bytes).await;
}

#[tokio::test]
async fn head_pins_and_lists_page_through() {
    let stub = Stub::start().await;
    for i in 0..7 {
        stub.put("models", &format!("m/{i}"), bytes_of(i, i));
    }
    stub.put("models", "other", bytes_of(9, 9));
    let origin = stub.origin();
    let head = origin.head("models", "m/3", None).await.unwrap();
    assert_eq!((head.version.size, head.content_type.as_deref()), (3, Some("binary/octet-stream")));
    let listed = origin.list("models", "m/").await.unwrap();
    assert_eq!(listed.len(), 7);
    assert_eq!(listed[3].version, head.version);
    assert!(stub.requests().iter().filter(|line| line.contains("list-type")).count() > 1, "several pages");
}

#[tokio::test]
async fn every_range_carries_the_pinned_etag() {
    let stub = Stub::start().await;
    stub.put("models", "a", bytes_of(1, 1000));
    let object = pinned(&stub.origin(), "a").await;
    read(&object, 10, 20).await.unwrap();
    let etag = &object.version.etag.0;
    assert_eq!(stub.requests().last().unwrap(), &format!("GET /models/a bytes=10-19 if-match {etag}"));
}

#[tokio::test]
async fn an_object_that_changed_is_an_error_and_not_other_bytes() {
    let stub = Stub::start().await;
    stub.put("models", "a", bytes_of(1, 1000));
    let object = pinned(&stub.origin(), "a").await;
    stub.put("models", "a", bytes_of(2, 1000));
    assert!(matches!(read(&object, 0, 10).await.unwrap_err(), OriginError::Changed { .. }));
    // A store that ignores If-Match is caught by the ETag of its answer.
    stub.fault("/models/a", Fault::IgnoreIfMatch);
    assert!(matches!(read(&object, 0, 10).await.unwrap_err(), OriginError::Changed { .. }));
}

#[tokio::test]
async fn what_s3_refuses_keeps_its_meaning() {
    let stub = Stub::start().await;
    stub.put("models", "a", bytes_of(1, 1000));
    let object = pinned(&stub.origin(), "a").await;
    let refuse = async |status, code| {
        stub.fault("/models/a", Fault::Refuse(status, code));
        read(&object, 0, 10).await.unwrap_err()
    };
    assert!(matches!(refuse(404, "NoSuchKey").await, OriginError::NotFound { .. }));
    assert!(refuse(500, "InternalError").await.is_transient());
    let denied = refuse(403, "AccessDenied").await.to_string();
    assert!(denied.contains("s3:GetObject") && denied.contains("s3:ListBucket"), "{denied}");
    let key = refuse(400, "KMS.DisabledException").await.to_string();
    assert!(key.contains("KMS key") && key.contains("disabled"), "{key}");
    let quota = refuse(400, "KMS.ThrottlingException").await;
    assert!(matches!(quota, OriginError::Throttled { .. }) && quota.to_string().contains("KMS"), "{quota}");
    let slow = refuse(503, "SlowDown").await;
    assert!(matches!(slow, OriginError::Throttled { retry_after: Some(_), .. }), "{slow}");
    let missing = stub.origin().head("models", "nothing", None).await.unwrap_err();
    assert_eq!(missing.to_string(), "s3://models/nothing does not exist at s3");
}

#[tokio::test]
async fn a_body_that_ends_early_or_stands_still_is_an_error() {
    let stub = Stub::start().await;
    let hasty = S3Config { stall_timeout_ms: 100, ..stub.config() };
    let origin = S3Origin::new(hasty, &Metrics::default()).unwrap();
    for (key, fault) in [("short", Fault::Short(100)), ("stall", Fault::Stall(100))] {
        stub.put("models", key, bytes_of(1, 1000));
        let object = pinned(&origin, key).await;
        // The first request, its second, and those that go on: none may do better.
        (0..8).for_each(|_| stub.fault(&format!("/models/{key}"), fault));
        assert!(read(&object, 0, 1000).await.unwrap_err().is_transient(), "{fault:?}");
    }
    stub.put("models", "a", bytes_of(1, 1000));
    let object = pinned(&stub.origin(), "a").await;
    stub.fault("/models/a", Fault::Short(100));
    assert_eq!(read(&object, 0, 1000).await.unwrap(), bytes_of(1, 1000));
    assert!(stub.requests().iter().any(|line| line.contains("bytes=100-999")), "it goes on where it broke");
    stub.fault("/models/a", Fault::IgnoreRange);
    let error = read(&object, 5, 10).await.unwrap_err().to_string();
    assert!(error.contains("ignores ranges"), "{error}");
    assert_eq!(read(&object, 0, 1000).await.unwrap(), bytes_of(1, 1000));
}

#[tokio::test]
async fn a_bucket_elsewhere_is_asked_where_s3_says_it_is() {
    let stub = Stub::start().await;
    stub.put("models", "a", bytes_of(1, 1000));
    let origin = stub.origin();
    let object = pinned(&origin, "a").await;
    stub.fault("/models/a", Fault::Refuse(301, "PermanentRedirect"));
    let before = stub.requests().len();
    assert_eq!(read(&object, 0, 1000).await.unwrap(), bytes_of(1, 1000));
    assert_eq!(stub.requests().len(), before + 2, "asked again in eu-west-1");
    // In the region that S3 named it says so again: somebody must look.
    stub.fault("/models/a", Fault::Refuse(301, "PermanentRedirect"));
    let elsewhere = read(&object, 0, 10).await.unwrap_err().to_string();
    assert!(elsewhere.contains("region = \"eu-west-1\""), "{elsewhere}");
}

#[tokio::test]
async fn who_pays_is_said_when_the_requester_does() {
    let stub = Stub::start().await;
    stub.put("models", "a", bytes_of(1, 1000));
    for requester_pays in [false, true] {
        let origin =
            S3Origin::new(S3Config { requester_pays, ..stub.config() }, &Metrics::default()).unwrap();
        let object = pinned(&origin, "a").await;
        read(&object, 0, 10).await.unwrap();
        origin.list("models", "").await.unwrap();
        let said = stub.requests().iter().filter(|line| line.ends_with(" payer requester")).count();
        assert_eq!(said, if requester_pays { 3 } else { 0 }, "{:?}", stub.requests());
    }
}

#[tokio::test]
async fn parts_are_told_with_their_places() {
    let stub = Stub::start().await;
    stub.put("models", "a", bytes_of(1, 1000));
    let origin = stub.origin();
    let version = origin.head("models", "a", None).await.unwrap().version;
    assert!(matches!(origin.parts(&version, None, SumKind::Crc32c).await, Err(OriginError::Denied { .. })));
    let part = |number, size| {
        format!(
            "<Part><PartNumber>{number}</PartNumber><Size>{size}</Size><ChecksumCRC32C>4waSgw==</ChecksumCRC32C></Part>"
        )
    };
    let xml = format!(
        "<GetObjectAttributesResponse><ObjectParts><PartsCount>2</PartsCount><IsTruncated>false</IsTruncated>{}{}\
         </ObjectParts></GetObjectAttributesResponse>",
        part(1, 600),
        part(2, 400)
    );
    stub.tell_attributes("/models/a", &xml);
    let parts = origin.parts(&version, None, SumKind::Crc32c).await.unwrap();
    let places: Vec<_> = parts.iter().map(|part| (part.number, part.range)).collect();
    assert_eq!(places, [(1, ByteRange::new(0, 600)), (2, ByteRange::new(600, 1000))]);
    assert!(origin.parts(&version, None, SumKind::Crc32).await.unwrap().is_empty(), "of another kind");
}

#[tokio::test]
async fn only_the_allow_list_is_asked_for() {
    let stub = Stub::start().await;
    let origin = stub.origin();
    let error = origin.head("secrets", "a", None).await.unwrap_err().to_string();
    assert!(error.contains("`s3.buckets`") && error.contains("\"secrets\""), "{error}");
    assert!(origin.list("secrets", "").await.is_err());
    assert!(origin.head_bucket("secrets").await.is_err());
    assert!(stub.requests().is_empty());
}

#[tokio::test]
async fn a_dead_endpoint_names_the_cause() {
    let stub = Stub::start().await;
    let config = S3Config { endpoint: Some("http://127.0.0.1:1/".parse().unwrap()), ..stub.config() };
    let origin = S3Origin::new(config, &Metrics::default()).unwrap();
    let error = origin.head("models", "a", None).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("refused"), "{error}");
}

#[tokio::test]
async fn a_proof_is_judged_by_s3_and_remembered_for_its_object_only() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let stub = Stub::start().await;
    for key in ["a", "c"] {
        stub.put("models", key, Bytes::from_static(b"x"));
    }
    let callers = S3Callers::new(
        stub.origin_of("node").await,
        &access::Config { refusal_ttl_ms: 0, ..access::Config::default() },
        &access::Metrics::default(),
    );
    let ann = stub.origin_of("ann").await;
    let proof = ann.presign_head("models", "a", None, Duration::from_secs(60)).await.unwrap();
    for _ in 0..3 {
        callers.admit(Some(&proof), "models", "a", None).await.unwrap();
    }
    let seen = stub.requests();
    assert!(seen.len() == 1 && seen[0].starts_with("HEAD /models/a?"), "{seen:?}");
    assert!(seen[0].contains("X-Amz-Credential=ann%2F"), "{seen:?}");

    let refused = async |proof, key, version| {
        let error = callers.admit(proof, "models", key, version).await.unwrap_err();
        assert!(matches!(error, OriginError::Denied { .. }), "{error}");
        assert!(!error.to_string().contains("X-Amz"), "{error}");
        error.to_string()
    };
    assert!(refused(None, "a", None).await.contains("presigned"));
    assert!(refused(Some(&proof), "c", None).await.contains("another object"));
    assert!(refused(Some(&proof), "a", Some("v")).await.contains("another version"));
    assert_eq!(stub.requests().len(), 1, "what is wrong by itself is not sent");

    stub.refuse("bob", true);
    let bobs =
        stub.origin_of("bob").await.presign_head("models", "a", None, Duration::from_secs(60)).await.unwrap();
    assert!(refused(Some(&bobs), "a", None).await.contains("does not accept the proof"));
    stub.refuse("bob", false);
    callers.admit(Some(&bobs), "models", "a", None).await.unwrap();

    let missing = ann.presign_head("models", "none", None, Duration::from_secs(60)).await.unwrap();
    let error = callers.admit(Some(&missing), "models", "none", None).await.unwrap_err();
    assert!(matches!(error, OriginError::NotFound { .. }), "{error}");
    let secret = ann.presign_head("secrets", "a", None, Duration::from_secs(60)).await.unwrap();
    let error = callers.admit(Some(&secret), "secrets", "a", None).await.unwrap_err().to_string();
    assert!(error.contains("s3.buckets"), "{error}");
}

#[tokio::test]
async fn connections_spread_over_the_addresses_of_a_name() {
    let stub = Stub::start_on("0.0.0.0:0").await;
    stub.put("models", "a", Bytes::from_static(b"bytes"));
    let addresses: Vec<IpAddr> = ["127.0.0.2", "127.0.0.3", "127.0.0.4"].map(|a| a.parse().unwrap()).to_vec();
    let origin = stub.origin_at("s3.example", addresses.clone()).await;
    let heads = futures_util::future::join_all((0..12).map(|_| origin.head("models", "a", None))).await;
    assert!(heads.iter().all(Result::is_ok));
    let reached = stub.reached();
    assert_eq!(reached.keys().copied().collect::<Vec<_>>(), addresses, "{reached:?}");
    let counts: Vec<usize> = reached.into_values().collect();
    assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{counts:?}");
}

#[tokio::test]
async fn a_dead_address_costs_nothing_but_the_next_one() {
    let stub = Stub::start_on("127.0.0.3:0").await;
    stub.put("models", "a", Bytes::from_static(b"bytes"));
    let addresses = ["127.0.0.2", "127.0.0.3"].map(|a| a.parse().unwrap()).to_vec();
    let origin = stub.origin_at("s3.example", addresses).await;
    for _ in 0..4 {
        origin.head("models", "a", None).await.unwrap();
    }
}

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use sha2::Digest as _;

use super::*;
use crate::content::ByteRange;
use crate::origin::access;
use crate::origin::fake::seeded_bytes;
use crate::origin::s3::stub::{Fault, Stub};
use crate::origin::s3::{Sum, SumKind};

/// A fetcher in front of a stub S3 with the objects `models/m/0` to `4`, which go to a directory.
struct Bench {
    stub: Stub,
    fetcher: Fetcher,
    directory: tempfile::TempDir,
    _node: crate::cache::testing::Node,
}

fn object(index: u64) -> Bytes {
    seeded_bytes(index, ByteRange::new(0, index * 100_000))
}

impl Bench {
    async fn start() -> Self {
        let stub = Stub::start().await;
        let origin = stub.origin();
        Self::with(stub, origin)
    }

    fn with(stub: Stub, origin: S3Origin) -> Self {
        for index in 0..5 {
            stub.put("models", &format!("m/{index}"), object(index));
        }
        let node = crate::cache::testing::Node::alone();
        let directory = tempfile::tempdir().unwrap();
        let config = Config { files_in_flight: 2, max_active: 1 };
        let access = access::Config { permit_ttl_ms: 0, refusal_ttl_ms: 0, ..access::Config::default() };
        let callers = S3Callers::new(origin.clone(), &access, &access::Metrics::default());
        let fetcher = Fetcher::new(config, node.cache(), node.store(), origin, callers, Metrics::default());
        Self { stub, fetcher, directory, _node: node }
    }

    fn destination(&self) -> PathBuf {
        self.directory.path().join("out")
    }

    fn request(&self) -> String {
        serde_json::json!({ "sources": ["s3://models/m/"], "destination": self.destination() }).to_string()
    }

    /// All events of one fetch, over its HTTP form.
    async fn fetch(&self) -> Vec<Event> {
        self.ask(self.request()).await
    }

    async fn fetch_one(&self, index: u64, sha256: &str) -> Vec<Event> {
        let sha256 = match sha256 {
            "" => serde_json::json!({}),
            hex => serde_json::json!({ index.to_string(): hex }),
        };
        let source = format!("s3://models/m/{index}");
        let to = self.destination().join("");
        self.ask(serde_json::json!({ "sources": [source], "destination": to, "sha256": sha256 }).to_string())
            .await
    }

    async fn ask(&self, request: String) -> Vec<Event> {
        let response = self.fetcher.handle(post(request)).await;
        assert_eq!(response.status(), StatusCode::OK);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let lines = body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines.map(|line| serde_json::from_slice(line).unwrap()).collect()
    }

    fn gets(&self) -> usize {
        self.stub.requests().iter().filter(|line| line.starts_with("GET /models/m/")).count()
    }

    fn outcome(&self, outcome: Outcome) -> u64 {
        self.fetcher.inner.metrics.finished.get_or_create(&OutcomeLabels { outcome }).get()
    }
}

fn post(body: String) -> Request<Full<Bytes>> {
    Request::builder().method(Method::POST).body(Full::from(body)).unwrap()
}

fn assert_file(root: &Path, index: u64) {
    assert!(fs::read(root.join(index.to_string())).unwrap() == object(index), "file {index}");
}

#[tokio::test]
async fn every_file_is_placed_and_the_second_time_kept() {
    let bench = Bench::start().await;
    let events = bench.fetch().await;
    assert_eq!(events[0], Event::Plan { files: 5, bytes: 1_000_000, kept_files: 0, kept_bytes: 0 });
    let Some(Event::Done(summary)) = events.last() else { panic!("{events:?}") };
    assert_eq!((summary.files, summary.bytes), (5, 1_000_000));
    assert_eq!(summary.shares, Shares { origin_bytes: 1_000_000, ..Shares::default() });
    assert_eq!(events.iter().filter(|event| matches!(event, Event::File { .. })).count(), 5);
    (0..5).for_each(|index| assert_file(&bench.destination(), index));
    let gets = bench.gets();
    let events = bench.fetch().await;
    assert_eq!(events[0], Event::Plan { files: 5, bytes: 1_000_000, kept_files: 5, kept_bytes: 1_000_000 });
    assert_eq!(bench.gets(), gets, "nothing is fetched again");
    assert_eq!(bench.outcome(Outcome::Done), 2);
}

#[tokio::test]
async fn what_was_damaged_at_the_destination_is_placed_again_without_the_origin() {
    let bench = Bench::start().await;
    bench.fetch().await;
    let gets = bench.gets();
    fs::remove_file(bench.destination().join("3")).unwrap();
    fs::remove_file(bench.destination().join("4")).unwrap();
    fs::write(bench.destination().join("4"), vec![0; 400_000]).unwrap();
    let events = bench.fetch().await;
    assert!(matches!(events[0], Event::Plan { kept_files: 3, .. }), "{events:?}");
    let Some(Event::Done(summary)) = events.last() else { panic!("{events:?}") };
    assert_eq!(summary.shares, Shares { local_bytes: 1_000_000, ..Shares::default() });
    (0..5).for_each(|index| assert_file(&bench.destination(), index));
    assert_eq!(bench.gets(), gets);
}

#[tokio::test]
async fn an_object_that_changes_under_way_is_fetched_in_its_new_version() {
    let bench = Bench::start().await;
    bench.stub.fault("/models/m/2", Fault::Refuse(412, "PreconditionFailed"));
    let events = bench.fetch().await;
    let changed = events.iter().any(|event| matches!(event, Event::Changed { path, .. } if path == "2"));
    assert!(changed, "{events:?}");
    assert!(matches!(events.last(), Some(Event::Done(_))), "{events:?}");
    assert_file(&bench.destination(), 2);
}

#[tokio::test]
async fn one_failed_file_fails_the_fetch_and_not_the_others() {
    let bench = Bench::start().await;
    bench.stub.fault("/models/m/1", Fault::Refuse(403, "AccessDenied"));
    let events = bench.fetch().await;
    let reason = events.iter().find_map(|event| match event {
        Event::FileFailed { path, reason } if path == "1" => Some(reason.clone()),
        _ => None,
    });
    assert!(reason.as_ref().is_some_and(|reason| reason.contains("s3:GetObject")), "{events:?}");
    let Some(Event::Failed { reason }) = events.last() else { panic!("{events:?}") };
    assert!(reason.starts_with("1 of 5 files"), "{reason}");
    assert!(!bench.destination().join("1").exists());
    let events = bench.fetch().await;
    assert!(matches!(events[0], Event::Plan { kept_files: 4, .. }), "{events:?}");
    assert!(matches!(events.last(), Some(Event::Done(_))), "{events:?}");
    assert_file(&bench.destination(), 1);
}

/// What one file was compared with, or why it failed.
fn outcome_of(events: &[Event]) -> Result<(Vec<String>, Option<String>), String> {
    let found = events.iter().find_map(|event| match event {
        Event::File { verified_by, not_verified_by_s3, .. } => {
            Some(Ok((verified_by.clone(), not_verified_by_s3.clone())))
        }
        Event::FileFailed { reason, .. } => Some(Err(reason.clone())),
        _ => None,
    });
    found.unwrap_or_else(|| panic!("{events:?}"))
}

/// The sum of `bytes`, as S3 writes it.
fn text_of(kind: SumKind, bytes: &[u8]) -> String {
    let mut hasher = kind.hasher();
    hasher.update(bytes);
    hasher.finish().to_string().split_once(' ').unwrap().1.to_owned()
}

const WHOLE: [(SumKind, &str); 4] = [
    (SumKind::Crc64Nvme, "x-amz-checksum-crc64nvme"),
    (SumKind::Crc32c, "x-amz-checksum-crc32c"),
    (SumKind::Crc32, "x-amz-checksum-crc32"),
    (SumKind::Sha256, "x-amz-checksum-sha256"),
];

#[tokio::test]
async fn the_whole_is_compared_with_each_kind_of_sum_that_s3_keeps() {
    for (kind, header) in WHOLE {
        let bench = Bench::start().await;
        bench.stub.say("/models/m/3", header, &text_of(kind, &object(3)));
        bench.stub.say("/models/m/3", "x-amz-checksum-type", "FULL_OBJECT");
        let events = bench.fetch_one(3, "").await;
        assert_eq!(outcome_of(&events), Ok((vec![kind.name().into()], None)));
        let Some(Event::Done(summary)) = events.last() else { panic!("{events:?}") };
        assert_eq!(summary.verified, Verified { now_files: 1, ..Verified::default() });
        assert_file(&bench.destination(), 3);
    }
}

#[tokio::test]
async fn a_corrupt_byte_is_caught_for_each_kind_and_mended_if_the_origin_can() {
    for (kind, header) in WHOLE {
        let bench = Bench::start().await;
        let expected = text_of(kind, &object(3));
        bench.stub.say("/models/m/3", header, &expected);
        bench.stub.fault("/models/m/3", Fault::Corrupt(123_456));
        assert_eq!(outcome_of(&bench.fetch_one(3, "").await), Ok((vec![kind.name().into()], None)));
        assert_file(&bench.destination(), 3);

        // An origin that is wrong each time: nothing is placed, and the store keeps nothing of it.
        let bench = Bench::start().await;
        bench.stub.say("/models/m/3", header, &expected);
        (0..2).for_each(|_| bench.stub.fault("/models/m/3", Fault::Corrupt(123_456)));
        let reason = outcome_of(&bench.fetch_one(3, "").await).unwrap_err();
        assert!(reason.contains("s3://models/m/3") && reason.contains(&expected), "{reason}");
        assert!(!bench.destination().join("3").exists());
        assert_eq!(outcome_of(&bench.fetch_one(3, "").await), Ok((vec![kind.name().into()], None)));
        assert_file(&bench.destination(), 3);
    }
}

#[tokio::test]
async fn parts_are_compared_and_the_wrong_one_is_named() {
    for (kind, header, tag) in [
        (SumKind::Crc32c, "x-amz-checksum-crc32c", "ChecksumCRC32C"),
        (SumKind::Sha256, "x-amz-checksum-sha256", "ChecksumSHA256"),
    ] {
        let bytes = object(4);
        let parts: Vec<_> = bytes.chunks(150_000).collect();
        let sums: Vec<_> = parts.iter().map(|part| text_of(kind, part)).collect();
        let whole =
            Sum::of_sums(kind, &sums.iter().map(|s| Sum::parse(kind, s).unwrap()).collect::<Vec<_>>());
        let whole = whole.to_string().split_once(' ').unwrap().1.to_owned();
        let listed: String = parts
            .iter()
            .zip(&sums)
            .enumerate()
            .map(|(index, (part, sum))| {
                let (number, size) = (index + 1, part.len());
                format!(
                    "<Part><PartNumber>{number}</PartNumber><Size>{size}</Size><{tag}>{sum}</{tag}></Part>"
                )
            })
            .collect();
        let xml = format!(
            "<GetObjectAttributesResponse><ObjectParts>{listed}</ObjectParts></GetObjectAttributesResponse>"
        );
        let bench = Bench::start().await;
        bench.stub.say("/models/m/4", header, &format!("{whole}-{}", parts.len()));
        bench.stub.say("/models/m/4", "x-amz-checksum-type", "COMPOSITE");
        bench.stub.tell_attributes("/models/m/4", &xml);
        (0..2).for_each(|_| bench.stub.fault("/models/m/4", Fault::Corrupt(200_000)));
        let reason = outcome_of(&bench.fetch_one(4, "").await).unwrap_err();
        assert!(
            reason.starts_with("part 2 of 3 of s3://models/m/4") && reason.contains(&sums[1]),
            "{reason}"
        );
        let verified = outcome_of(&bench.fetch_one(4, "").await);
        assert_eq!(verified, Ok((vec![format!("{kind} of parts")], None)));
        assert_file(&bench.destination(), 4);
    }
}

#[tokio::test]
async fn a_wrong_part_of_a_whole_is_named_where_s3_keeps_the_parts_sums() {
    let (kind, bytes) = (SumKind::Crc64Nvme, object(4));
    let listed: String = bytes
        .chunks(150_000)
        .enumerate()
        .map(|(index, part)| {
            let (number, size, sum) = (index + 1, part.len(), text_of(kind, part));
            format!(
                "<Part><PartNumber>{number}</PartNumber><Size>{size}</Size>\
                 <ChecksumCRC64NVME>{sum}</ChecksumCRC64NVME></Part>"
            )
        })
        .collect();
    let xml = format!(
        "<GetObjectAttributesResponse><ObjectParts>{listed}</ObjectParts></GetObjectAttributesResponse>"
    );
    let bench = Bench::start().await;
    bench.stub.say("/models/m/4", "x-amz-checksum-crc64nvme", &text_of(kind, &bytes));
    bench.stub.tell_attributes("/models/m/4", &xml);
    (0..2).for_each(|_| bench.stub.fault("/models/m/4", Fault::Corrupt(350_000)));
    let reason = outcome_of(&bench.fetch_one(4, "").await).unwrap_err();
    assert!(reason.starts_with("part 3 of 3 of s3://models/m/4"), "{reason}");
    assert!(reason.contains(&text_of(kind, &bytes[300_000..])), "{reason}");
}

#[tokio::test]
async fn what_is_not_verified_is_said() {
    let bench = Bench::start().await;
    let events = bench.fetch_one(1, "").await;
    assert_eq!(outcome_of(&events), Ok((vec![], Some("S3 keeps no checksum of it".into()))));
    let Some(Event::Done(summary)) = events.last() else { panic!("{events:?}") };
    assert_eq!(summary.verified, Verified { by_nothing_files: 1, ..Verified::default() });
    bench.stub.say("/models/m/2", "x-amz-checksum-crc32c", "4waSgw==-3");
    let (by, why) = outcome_of(&bench.fetch_one(2, "").await).unwrap();
    assert!(by.is_empty() && why.unwrap().contains("s3:GetObjectAttributes"));
}

#[tokio::test]
async fn a_list_of_sums_is_held_to() {
    let bench = Bench::start().await;
    let right = hex::encode(sha2::Sha256::digest(object(1)));
    let (by, _) = outcome_of(&bench.fetch_one(1, &right).await).unwrap();
    assert_eq!(by, ["--sha256-file"]);
    let wrong = outcome_of(&bench.fetch_one(2, &right).await).unwrap_err();
    assert!(wrong.contains("--sha256-file says sha256"), "{wrong}");
    // A file that was placed and is not what the list says is not kept.
    let events = bench.fetch_one(1, &"0".repeat(64)).await;
    assert!(matches!(events[0], Event::Plan { kept_files: 0, .. }), "{events:?}");
    let unknown = bench.ask(
        serde_json::json!({ "sources": ["s3://models/m/"], "destination": bench.destination(),
            "sha256": { "elsewhere": right } })
        .to_string(),
    );
    let Some(Event::Failed { reason }) = unknown.await.pop() else { panic!() };
    assert!(reason.contains("--sha256-file lists"), "{reason}");
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_and_one_too_many_is_refused() {
    let bench = Bench::start().await;
    bench.stub.fault("/models/m/1", Fault::Stall(10));
    let mut body = bench.fetcher.handle(post(bench.request())).await.into_body();
    body.frame().await.unwrap().unwrap();
    assert_eq!(bench.fetcher.inner.metrics.active.get(), 1);
    let second = bench.fetch().await;
    assert!(matches!(&second[..], [Event::Failed { reason }] if reason.contains("max_active")), "{second:?}");
    drop(body);
    assert_eq!(bench.fetcher.inner.metrics.active.get(), 0);
    assert_eq!((bench.outcome(Outcome::Cancelled), bench.outcome(Outcome::Refused)), (1, 1));
}

#[tokio::test]
async fn a_request_that_is_none_is_refused() {
    let bench = Bench::start().await;
    let wrong = bench.fetcher.handle(post("{\"sources\":[\"http://x\"]}".into())).await;
    assert_eq!(wrong.status(), StatusCode::BAD_REQUEST);
    let text = wrong.into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&text).contains("is not an S3 URL"), "{text:?}");
    let get = Request::builder().body(Full::<Bytes>::default()).unwrap();
    assert_eq!(bench.fetcher.handle(get).await.status(), StatusCode::METHOD_NOT_ALLOWED);
    let relative =
        bench.fetcher.handle(post("{\"sources\":[\"s3://m/a\"],\"destination\":\"x\"}".into())).await;
    let text = relative.into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&text).contains("absolute"), "{text:?}");
}

#[tokio::test]
async fn where_callers_rights_count_only_what_is_proven_is_fetched() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let stub = Stub::start().await;
    let origin = stub.origin_of("node").await;
    let bench = Bench::with(stub, origin);
    let proven_by = async |signer, keys: &[&str]| {
        let signer = bench.stub.origin_of(signer).await;
        let mut proofs = serde_json::Map::new();
        for key in keys {
            let proof =
                signer.presign_head("models", key, None, std::time::Duration::from_secs(60)).await.unwrap();
            proofs.insert(format!("s3://models/{key}"), String::from(proof).into());
        }
        let (sources, destination) = (["s3://models/m/"], bench.destination());
        serde_json::json!({ "sources": sources, "destination": destination, "proofs": proofs }).to_string()
    };
    let reason_of = |events: &[Event]| match events.last() {
        Some(Event::Failed { reason }) => reason.clone(),
        other => panic!("{other:?}"),
    };
    bench.stub.refuse("bob", true);
    assert!(reason_of(&bench.fetch().await).contains("--as-caller"));
    let events = bench.ask(proven_by("bob", &["m/1", "m/2"]).await).await;
    assert!(reason_of(&events).contains("does not accept the proof"));
    assert_eq!(bench.gets(), 0);
    assert!(!bench.destination().exists());

    let events = bench.ask(proven_by("ann", &["m/1", "m/3"]).await).await;
    assert!(matches!(events.last(), Some(Event::Done(_))), "{events:?}");
    for index in [1, 3] {
        assert_file(&bench.destination(), index);
    }
    assert!(!bench.destination().join("2").exists(), "it was not proven");
    assert!(
        bench.stub.requests().iter().all(|line| !line.contains("list-type")),
        "nothing is listed for a caller"
    );
}

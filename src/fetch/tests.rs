use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};

use super::*;
use crate::content::ByteRange;
use crate::origin::fake::seeded_bytes;
use crate::origin::s3::stub::{Fault, Stub};

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
        for index in 0..5 {
            stub.put("models", &format!("m/{index}"), object(index));
        }
        let node = crate::cache::testing::Node::alone();
        let directory = tempfile::tempdir().unwrap();
        let config = Config { files_in_flight: 2, max_active: 1 };
        let fetcher = Fetcher::new(config, node.cache(), node.store(), stub.origin(), Metrics::default());
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
        let response = self.fetcher.handle(post(self.request())).await;
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

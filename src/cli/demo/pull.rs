//! Pulls the image as containerd does, and checks what a node was given.
//!
//! Invariant: nothing counts as pulled before its sha256 was compared with what was generated; neither a daemon's
//! headers nor its progress reports are believed.
//! This module refuses to fall back to the origin, as containerd would: a fault of the mirror must show.

use std::fs::File;
use std::io::{self, Read as _};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use http::header::ACCEPT;
use http_body_util::BodyExt as _;
use sha2::{Digest as _, Sha256};
use tokio_util::codec::{FramedRead, LinesCodec};
use tokio_util::io::StreamReader;

use super::generate::{BUCKET, Generated, Image, MANIFEST_TYPE, PREFIX, REPOSITORY, TAG};
use crate::cli::control::Daemon;
use crate::fetch::{self, Event, FetchRequest, S3Url};

/// containerd's `max_concurrent_downloads` per image.
const PARALLEL_BLOBS: usize = 3;
/// An event names a file or quotes an error.
const LINE_BYTES_MAX: usize = 64 << 10;
/// Large enough that reading a file costs little beside hashing it.
const FILE_READ_BYTES: usize = 256 << 10;

/// Why a node does not have what it should.
#[derive(Debug, thiserror::Error)]
pub(super) enum PullError {
    #[error("{what} could not be pulled: {reason}")]
    Failed { what: String, reason: String },
    #[error("{what} arrived with sha256 {got}, not {expected}")]
    Wrong { what: String, expected: String, got: String },
    #[error("{what} cannot be read where it was placed: {source}")]
    Unreadable { what: String, source: io::Error },
}

/// What containerd asks of the mirror at `mirror` for an image of `registry`, a host name. `moved` grows with every byte.
///
/// # Errors
/// At the first part that does not arrive whole and right.
pub(super) async fn pull_image(
    mirror: SocketAddr,
    registry: &str,
    image: &Image,
    moved: &AtomicU64,
) -> Result<(), PullError> {
    let client = reqwest::Client::builder().http1_only().no_proxy().build();
    let client = client.map_err(|error| failed("the image", &error))?;
    let base = format!("http://{mirror}/v2/{REPOSITORY}");
    let pull = Pull { client, base, registry, moved };
    pull.resolve(&image.manifest).await?;
    pull.get("manifests", &image.manifest).await?;
    stream::iter([&image.config].into_iter().chain(&image.layers))
        .map(|blob| pull.get("blobs", blob))
        .buffer_unordered(PARALLEL_BLOBS)
        .try_collect()
        .await
}

struct Pull<'a> {
    client: reqwest::Client,
    base: String,
    registry: &'a str,
    moved: &'a AtomicU64,
}

impl Pull<'_> {
    /// Asks what the tag stands for.
    async fn resolve(&self, manifest: &Generated) -> Result<(), PullError> {
        let what = format!("tag {TAG}");
        let request = self.client.head(format!("{}/manifests/{TAG}?ns={}", self.base, self.registry));
        let response = request.header(ACCEPT, format!("{MANIFEST_TYPE}, */*")).send().await;
        let response =
            response.and_then(reqwest::Response::error_for_status).map_err(|e| failed(&what, &e))?;
        let digest = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        let (expected, got) = (manifest.digest.to_string(), digest.unwrap_or("missing").to_owned());
        if got == expected { Ok(()) } else { Err(PullError::Wrong { what, expected, got }) }
    }

    async fn get(&self, kind: &str, blob: &Generated) -> Result<(), PullError> {
        let request = self.client.get(format!("{}/{kind}/{}?ns={}", self.base, blob.digest, self.registry));
        let response = request.header(ACCEPT, format!("{}, */*", blob.media_type)).send().await;
        let response =
            response.and_then(reqwest::Response::error_for_status).map_err(|e| failed(&blob.name, &e))?;
        let mut body = response.bytes_stream();
        let mut hasher = Sha256::new();
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(|error| failed(&blob.name, &error))?;
            hasher.update(&piece);
            self.moved.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        compare(blob, hasher)
    }
}

/// What `windlass fetch` asks of the daemon behind `socket`: the whole checkpoint, placed in `destination`. `moved` is
/// set to the bytes that the daemon says it has.
///
/// # Errors
/// Unless the daemon says that every file is in place.
pub(super) async fn fetch_checkpoint(
    socket: &Path,
    destination: &Path,
    moved: &AtomicU64,
) -> Result<(), PullError> {
    let failed = |reason: String| PullError::Failed { what: "the checkpoint".into(), reason };
    let request = FetchRequest {
        sources: vec![S3Url { bucket: BUCKET.into(), key: PREFIX.into(), version_id: None }],
        destination: destination.to_owned(),
        include: vec![],
        exclude: vec![],
        ..FetchRequest::default()
    };
    let request = serde_json::to_vec(&request).map_err(|error| failed(error.to_string()))?;
    let daemon = Daemon::Socket(socket.to_owned());
    let response =
        daemon.post(fetch::PATH, request.into()).await.map_err(|error| failed(error.to_string()))?;
    let body = response.into_body().into_data_stream().map_err(io::Error::other);
    let mut lines = FramedRead::new(StreamReader::new(body), LinesCodec::new_with_max_length(LINE_BYTES_MAX));
    let mut last_failure = None;
    while let Some(line) = lines.next().await {
        let line = line.map_err(|error| failed(error.to_string()))?;
        match serde_json::from_str(&line).map_err(|error| failed(format!("{error} in {line}")))? {
            Event::Progress { shares, .. } => moved.store(shares.total(), Ordering::Relaxed),
            Event::Done(summary) => {
                moved.store(summary.bytes, Ordering::Relaxed);
                return Ok(());
            }
            Event::FileFailed { path, reason } => last_failure = Some(format!("{path}: {reason}")),
            Event::Failed { reason } => return Err(failed(last_failure.unwrap_or(reason))),
            Event::Plan { .. } | Event::File { .. } | Event::Changed { .. } => {}
        }
    }
    Err(failed("the daemon hung up".into()))
}

/// Hashes what was placed at `path`. Blocks.
///
/// # Errors
/// When the file cannot be read or is not `expected`.
pub(super) fn verify_file(path: &Path, expected: &Generated) -> Result<(), PullError> {
    let unreadable = |source| PullError::Unreadable { what: path.display().to_string(), source };
    let mut file = File::open(path).map_err(unreadable)?;
    let mut buffer = vec![0; FILE_READ_BYTES];
    let mut hasher = Sha256::new();
    loop {
        match file.read(&mut buffer).map_err(unreadable)? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        }
    }
    compare(expected, hasher)
}

fn compare(content: &Generated, hasher: Sha256) -> Result<(), PullError> {
    let got = hasher.finalize();
    if got.as_slice() == content.digest.as_bytes() {
        return Ok(());
    }
    let (what, expected) = (content.name.clone(), content.digest.hex());
    Err(PullError::Wrong { what, expected, got: hex::encode(got) })
}

/// reqwest keeps the reason in the chain of sources.
fn failed(what: &str, error: &reqwest::Error) -> PullError {
    let mut reason = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        reason = format!("{reason}: {inner}");
        source = inner.source();
    }
    PullError::Failed { what: what.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::super::origin::tests::start;
    use super::*;
    use crate::content::ByteRange;

    static NO_BYTES: AtomicU64 = AtomicU64::new(0);

    #[tokio::test]
    async fn a_whole_image_is_pulled_and_counted() {
        let (origin, dataset) = start(1 << 20, None).await;
        let moved = AtomicU64::new(0);
        pull_image(origin.registry(), "registry.example", &dataset.image, &moved).await.unwrap();
        assert_eq!(moved.into_inner(), dataset.blobs().map(|blob| blob.recipe.size()).sum::<u64>());
        origin.stop().await;
    }

    #[tokio::test]
    async fn an_image_other_than_the_generated_one_is_wrong() {
        let (origin, _) = start(1 << 20, None).await;
        let (other, dataset) = start(2 << 20, None).await;
        let error = pull_image(origin.registry(), "r", &dataset.image, &NO_BYTES).await.unwrap_err();
        assert!(matches!(error, PullError::Wrong { .. }), "{error}");
        other.stop().await;
        let gone = origin.registry();
        origin.stop().await;
        let error = pull_image(gone, "r", &dataset.image, &NO_BYTES).await.unwrap_err();
        assert!(error.to_string().contains("refused"), "{error}");
    }

    /// A control socket that answers one request with `lines`, and what the fetch made of them.
    async fn fetch(lines: &'static str) -> (Result<(), PullError>, u64) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let daemon = async {
            let (connection, _) = listener.accept().await.unwrap();
            let service = hyper::service::service_fn(|request: http::Request<hyper::body::Incoming>| async {
                assert_eq!(request.uri().path(), fetch::PATH);
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let request: FetchRequest = serde_json::from_slice(&body).unwrap();
                assert_eq!(request.sources[0].to_string(), "s3://demo-models/model-server/");
                Ok::<_, std::convert::Infallible>(http::Response::new(lines.to_owned()))
            });
            let connection = hyper_util::rt::TokioIo::new(connection);
            hyper::server::conn::http1::Builder::new().serve_connection(connection, service).await.unwrap();
        };
        let moved = AtomicU64::new(0);
        let ((), result) = tokio::join!(daemon, fetch_checkpoint(&socket, dir.path(), &moved));
        (result, moved.into_inner())
    }

    #[tokio::test]
    async fn a_fetch_is_done_when_the_daemon_says_so_and_only_then() {
        let progress = concat!(
            r#"{"event":"plan","files":1,"bytes":9,"kept_files":0,"kept_bytes":0}"#,
            "\n",
            r#"{"event":"progress","files_done":0,"local_bytes":1,"peer_bytes":2,"origin_bytes":3}"#,
            "\n"
        );
        let (result, moved) = fetch(progress).await;
        assert!(result.unwrap_err().to_string().contains("hung up"));
        assert_eq!(moved, 6);
        let done = r#"{"event":"done","files":1,"bytes":9,"seconds":1.0,"local_bytes":0,"peer_bytes":9,"origin_bytes":0}"#;
        let (result, moved) = fetch(done).await;
        assert!(result.is_ok());
        assert_eq!(moved, 9);
        let (result, _) = fetch(concat!(
            r#"{"event":"file_failed","path":"a","reason":"disk full"}"#,
            "\n",
            r#"{"event":"failed","reason":"1 of 1"}"#
        ))
        .await;
        assert!(result.unwrap_err().to_string().contains("a: disk full"));
    }

    #[tokio::test]
    async fn a_flipped_bit_in_a_file_is_found() {
        let (origin, dataset) = start(100_000, None).await;
        let object = &dataset.checkpoint[0];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard");
        let mut bytes = object.recipe.read(ByteRange::new(0, u64::MAX)).to_vec();
        std::fs::write(&path, &bytes).unwrap();
        verify_file(&path, object).unwrap();
        bytes[20_000] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(verify_file(&path, object), Err(PullError::Wrong { .. })));
        assert!(matches!(verify_file(&path.join("x"), object), Err(PullError::Unreadable { .. })));
        origin.stop().await;
    }
}

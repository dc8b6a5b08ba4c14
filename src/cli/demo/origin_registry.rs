//! The registry half of the demo's origin: the pull endpoints of the OCI distribution spec 1.1, under any repository.
//!
//! This module refuses pushes, referrers and tag listings.

use http::header::CONTENT_TYPE;
use http::{Method, Request, Response, StatusCode};
use serde_json::json;

use super::generate::TAG;
use super::origin::{Answer, Shelf};

pub(super) fn answer<B>(shelf: &Shelf, request: &Request<B>) -> Answer {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return refuse(shelf, StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED");
    }
    let path = request.uri().path();
    if path == "/v2/" || path == "/v2" {
        return shelf.tell(Response::builder().header(CONTENT_TYPE, "application/json"), "{}");
    }
    let image = &shelf.dataset.image;
    let (wanted, missing) = if let Some((_, reference)) = path.rsplit_once("/manifests/") {
        let is_ours = reference == TAG || reference == image.manifest.digest.to_string();
        (is_ours.then_some(&image.manifest), "MANIFEST_UNKNOWN")
    } else if let Some((_, digest)) = path.rsplit_once("/blobs/") {
        (shelf.dataset.blobs().find(|blob| blob.digest.to_string() == digest), "BLOB_UNKNOWN")
    } else {
        (None, "NAME_UNKNOWN")
    };
    match wanted {
        Some(blob) => {
            let head = Response::builder().header("Docker-Content-Digest", blob.digest.to_string());
            shelf.send(request, blob, head)
        }
        None => refuse(shelf, StatusCode::NOT_FOUND, missing),
    }
}

fn refuse(shelf: &Shelf, status: StatusCode, code: &str) -> Answer {
    let body = json!({ "errors": [{ "code": code, "message": "the demo's registry has one image" }] });
    let head = Response::builder().status(status).header(CONTENT_TYPE, "application/json");
    shelf.tell(head, body.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::origin::{Counts, tests::start};
    use crate::content::ByteRange;
    use http::StatusCode;

    #[tokio::test]
    async fn a_pull_reads_right_and_is_counted_to_the_byte() {
        let (origin, dataset) = start(1 << 20, None).await;
        let base = format!("http://{}/v2/any/name", origin.registry());
        let client = reqwest::Client::new();
        let head = client.head(format!("{base}/manifests/latest")).send().await.unwrap();
        let digest = dataset.image.manifest.digest.to_string();
        assert_eq!(head.headers()["docker-content-digest"], digest.as_str());
        assert_eq!(
            head.headers()["content-length"],
            dataset.image.manifest.recipe.size().to_string().as_str()
        );
        let mut bytes = 0;
        for (n, blob) in dataset.blobs().enumerate() {
            let kind = if n == 0 { "manifests" } else { "blobs" };
            let body = client.get(format!("{base}/{kind}/{}", blob.digest)).send().await.unwrap();
            let body = body.bytes().await.unwrap();
            assert_eq!(body, blob.recipe.read(ByteRange::new(0, u64::MAX)), "{}", blob.name);
            bytes += body.len() as u64;
        }
        assert_eq!(origin.counts(), Counts { bytes, content_requests: 5, metadata_requests: 1 });
        origin.stop().await;
    }

    #[tokio::test]
    async fn ranges_are_exact_and_refusals_send_no_content() {
        let (origin, dataset) = start(1 << 20, None).await;
        let layer = &dataset.image.layers[1];
        let base = format!("http://{}/v2/a/blobs", origin.registry());
        let client = reqwest::Client::new();
        let get =
            |digest: &str, range: &str| client.get(format!("{base}/{digest}")).header("range", range).send();
        let digest = layer.digest.to_string();
        let part = get(&digest, "bytes=500-150499").await.unwrap();
        assert_eq!(part.status(), StatusCode::PARTIAL_CONTENT);
        let size = layer.recipe.size();
        assert_eq!(part.headers()["content-range"], format!("bytes 500-150499/{size}").as_str());
        assert_eq!(part.bytes().await.unwrap(), layer.recipe.read(ByteRange::new(500, 150_500)));

        let beyond = get(&digest, &format!("bytes={size}-")).await.unwrap();
        assert_eq!(beyond.status(), StatusCode::RANGE_NOT_SATISFIABLE);
        let missing = get("sha256:00", "bytes=0-").await.unwrap();
        assert_eq!(missing.status(), StatusCode::NOT_FOUND);
        assert!(missing.text().await.unwrap().contains("BLOB_UNKNOWN"));
        let put = client.put(format!("{base}/{digest}")).send().await.unwrap();
        assert_eq!(put.status(), StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(origin.counts(), Counts { bytes: 150_000, content_requests: 1, metadata_requests: 3 });
        origin.stop().await;
    }
}

//! The S3 half of the demo's origin: `GetObject`, `HeadObject` and `ListObjectsV2`, addressed path style.
//!
//! Every request is accepted unsigned or signed by anyone: nothing here is worth a secret.
//! This module refuses writes, and keys outside the characters that need no escaping in a URL or in XML, which the
//! generated ones do not use.

use std::fmt::Write as _;

use base64::Engine as _;
use http::header::{CONTENT_TYPE, ETAG, IF_MATCH, LAST_MODIFIED};
use http::{Method, Request, Response, StatusCode};

use super::generate::{BUCKET, Generated};
use super::origin::{Answer, Shelf};

/// The API's own limit on the keys of one page.
const MAX_KEYS: usize = 1000;

pub(super) fn answer<B>(shelf: &Shelf, request: &Request<B>) -> Answer {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return refuse(shelf, StatusCode::FORBIDDEN, "AccessDenied");
    }
    let path = request.uri().path().trim_start_matches('/');
    let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
    if bucket != BUCKET {
        return refuse(shelf, StatusCode::NOT_FOUND, "NoSuchBucket");
    }
    if key.is_empty() {
        return list(shelf, request.uri().query().unwrap_or_default());
    }
    let Some(object) = shelf.dataset.checkpoint.iter().find(|object| object.name == key) else {
        return refuse(shelf, StatusCode::NOT_FOUND, "NoSuchKey");
    };
    let etag = etag(object);
    if request.headers().get(IF_MATCH).is_some_and(|expected| expected.as_bytes() != etag.as_bytes()) {
        return refuse(shelf, StatusCode::PRECONDITION_FAILED, "PreconditionFailed");
    }
    let mut head =
        Response::builder().header(ETAG, etag).header(LAST_MODIFIED, "Thu, 01 Jan 2026 00:00:00 GMT");
    // S3 sends a full object's checksum only to those who ask and, being of the full object, not with a part of it.
    if request.headers().contains_key("x-amz-checksum-mode") && !request.headers().contains_key("range") {
        let sha256 = base64::prelude::BASE64_STANDARD.encode(object.digest.as_bytes());
        head = head.header("x-amz-checksum-sha256", sha256).header("x-amz-checksum-type", "FULL_OBJECT");
    }
    shelf.send(request, object, head)
}

/// Shaped like a multipart upload's, so that nobody mistakes it for an MD5.
fn etag(object: &Generated) -> String {
    format!("\"{}-1\"", &object.digest.hex()[..32])
}

/// Keys ascending; the continuation token is the last key of the page before.
fn list(shelf: &Shelf, query: &str) -> Answer {
    let find = |name: &str| {
        let mut pairs = url::form_urlencoded::parse(query.as_bytes());
        pairs.find_map(|(key, value)| (key == name).then(|| value.into_owned()))
    };
    let prefix = find("prefix").unwrap_or_default();
    let after = find("continuation-token").or_else(|| find("start-after")).unwrap_or_default();
    let page_keys = find("max-keys").and_then(|n| n.parse().ok()).unwrap_or(MAX_KEYS).min(MAX_KEYS);
    let mut objects: Vec<_> =
        shelf.dataset.checkpoint.iter().filter(|o| o.name.starts_with(&prefix) && o.name > after).collect();
    objects.sort_by(|a, b| a.name.cmp(&b.name));
    let is_truncated = objects.len() > page_keys;
    objects.truncate(page_keys);

    let mut xml = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<ListBucketResult \
         xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Name>{BUCKET}</Name><MaxKeys>{page_keys}</MaxKeys>\
         <KeyCount>{}</KeyCount><IsTruncated>{is_truncated}</IsTruncated>",
        objects.len()
    );
    if let (true, Some(last)) = (is_truncated, objects.last()) {
        let _ = write!(xml, "<NextContinuationToken>{}</NextContinuationToken>", last.name);
    }
    for object in objects {
        let (key, size) = (&object.name, object.recipe.size());
        let etag = etag(object).replace('"', "&quot;");
        let _ = write!(
            xml,
            "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{etag}</ETag>\
             <Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        );
    }
    xml.push_str("</ListBucketResult>");
    shelf.tell(Response::builder().header(CONTENT_TYPE, "application/xml"), xml)
}

fn refuse(shelf: &Shelf, status: StatusCode, code: &str) -> Answer {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code>\
         <Message>the demo's bucket is {BUCKET}, and read-only</Message></Error>"
    );
    shelf.tell(Response::builder().status(status).header(CONTENT_TYPE, "application/xml"), body)
}

#[cfg(test)]
mod tests {
    use super::super::generate::PREFIX;
    use super::super::origin::{Counts, Origin, tests::start};
    use super::*;
    use crate::content::ByteRange;
    use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
    use aws_sdk_s3::types::ChecksumMode;

    fn client(origin: &Origin) -> aws_sdk_s3::Client {
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("us-east-1"))
            .credentials_provider(Credentials::new("demo", "demo", None, None, "demo"))
            .endpoint_url(format!("http://{}", origin.s3()))
            .force_path_style(true)
            .http_client(aws_smithy_http_client::Builder::new().build_http());
        aws_sdk_s3::Client::from_conf(config.build())
    }

    #[tokio::test]
    async fn the_sdk_lists_heads_and_gets() {
        let (origin, dataset) = start(1 << 20, None).await;
        let s3 = client(&origin);
        let mut pages =
            s3.list_objects_v2().bucket(BUCKET).prefix(PREFIX).max_keys(4).into_paginator().send();
        let mut listed = Vec::new();
        while let Some(page) = pages.next().await {
            listed.extend(page.unwrap().contents.unwrap_or_default());
        }
        assert_eq!(listed.len(), dataset.checkpoint.len());
        let mut bytes = 0;
        for entry in &listed {
            let object = dataset.checkpoint.iter().find(|o| Some(o.name.as_str()) == entry.key()).unwrap();
            let head = s3.head_object().bucket(BUCKET).key(&object.name).checksum_mode(ChecksumMode::Enabled);
            let head = head.send().await.unwrap();
            assert_eq!((head.e_tag(), head.content_length()), (entry.e_tag(), entry.size()));
            let get = s3.get_object().bucket(BUCKET).key(&object.name).if_match(entry.e_tag().unwrap());
            let body = get.range("bytes=1-").send().await.unwrap().body.collect().await.unwrap().into_bytes();
            assert_eq!(body, object.recipe.read(ByteRange::new(1, u64::MAX)));
            bytes += body.len() as u64;
        }
        assert_eq!(origin.counts(), Counts { bytes, content_requests: 6, metadata_requests: 2 + 6 });
        origin.stop().await;
    }

    #[tokio::test]
    async fn the_sdk_accepts_the_full_objects_checksum() {
        let (origin, dataset) = start(100_000, None).await;
        let key = &dataset.checkpoint[0].name;
        let get = client(&origin).get_object().bucket(BUCKET).key(key).checksum_mode(ChecksumMode::Enabled);
        let answer = get.send().await.unwrap();
        assert!(answer.checksum_sha256().is_some());
        assert_eq!(
            answer.body.collect().await.unwrap().into_bytes().len() as u64,
            dataset.checkpoint[0].recipe.size()
        );
        origin.stop().await;
    }

    #[tokio::test]
    async fn refusals_are_errors_that_the_sdk_knows() {
        let (origin, dataset) = start(100_000, None).await;
        let s3 = client(&origin);
        let missing = s3.get_object().bucket(BUCKET).key("nothing").send().await.unwrap_err();
        assert!(missing.into_service_error().is_no_such_key());
        let key = &dataset.checkpoint[0].name;
        let changed = s3.get_object().bucket(BUCKET).key(key).if_match("\"old\"").send().await.unwrap_err();
        assert_eq!(changed.raw_response().unwrap().status().as_u16(), 412);
        let put = s3.put_object().bucket(BUCKET).key(key).send().await.unwrap_err();
        assert_eq!(put.raw_response().unwrap().status().as_u16(), 403);
        assert_eq!(origin.counts().bytes, 0);
        origin.stop().await;
    }
}

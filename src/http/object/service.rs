//! The operations that read, as `s3s` calls them.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::Extensions;
use http::header::{ETAG, HeaderMap, HeaderValue};
use http_body::Frame;
use http_body_util::StreamBody;
use s3s::dto::{
    BucketLocationConstraint, ChecksumMode, CommonPrefix, GetBucketLocationInput, GetBucketLocationOutput,
    GetObjectInput, GetObjectOutput, HeadBucketInput, HeadBucketOutput, HeadObjectInput, HeadObjectOutput,
    ListObjectsInput, ListObjectsOutput, ListObjectsV2Input, ListObjectsV2Output, Object, ObjectStorageClass,
    StreamingBlob, Timestamp, TimestampFormat,
};
use s3s::{Body, S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};

use super::conditions::{Conditions, Verdict};
use super::failure::{self, Subject};
use super::heads::{Heads, Known, Name};
use super::{Asked, Config};
use crate::cache::{Cache, ReadError};
use crate::content::{ByteRange, ContentId};
use crate::http::served::{Face, Metered, Served};
use crate::origin::OriginError;
use crate::origin::access::Access;
use crate::origin::s3::{Checksums, Listed, ObjectHead, PageRequest, Proof, S3Callers, S3Origin};

/// AWS's default and maximum for one page of a listing.
const MAX_KEYS: i32 = 1000;

/// S3 without the operations that write: those keep `s3s`'s refusal, and never get this far.
pub(super) struct ReadOnly {
    cache: Cache,
    origin: S3Origin,
    callers: S3Callers,
    heads: Heads,
    served: Served,
    first_byte_timeout: Duration,
}

/// A body whose first byte is in hand.
struct Opened {
    head: Arc<ObjectHead>,
    /// `None`: the whole object was asked for.
    partial: Option<ByteRange>,
    body: Option<StreamingBlob>,
}

impl ReadOnly {
    pub(super) fn new(
        config: &Config,
        cache: Cache,
        origin: S3Origin,
        callers: S3Callers,
        served: Served,
    ) -> Self {
        let heads = Heads::new(origin.clone(), Duration::from_millis(config.head_ttl_ms));
        let first_byte_timeout = Duration::from_millis(config.first_byte_timeout_ms);
        Self { cache, origin, callers, heads, served, first_byte_timeout }
    }

    /// Whether the client may read the object: by the proof that it brought, where one is needed.
    async fn admit(&self, extensions: &Extensions, name: &Name) -> S3Result<()> {
        let proof = extensions.get::<Proof>();
        let admitted = self.callers.admit(proof, &name.bucket, &name.key, name.version_id.as_deref()).await;
        admitted.map_err(|error| failure::from_origin(&error, Subject::Object))
    }

    /// A proof is for one object, so what is about more of them is not answered where proofs are needed.
    fn admit_to_bucket(&self) -> S3Result<()> {
        match self.callers.access() {
            Access::Node => Ok(()),
            Access::Caller => Err(s3_error!(
                AccessDenied,
                "this node reads in the name of its callers (`s3.access`), object by object: ask S3 itself for listings"
            )),
        }
    }

    /// What the object is now, given that the client's conditions hold of it.
    ///
    /// A condition that fails on a remembered answer is judged again on a fresh one: the client may just have
    /// written what it names.
    async fn judged(&self, name: &Name, conditions: &Conditions) -> S3Result<Known> {
        let ask = async || {
            let known = self.heads.get(name).await;
            known.map_err(|error| failure::from_origin(&error, Subject::Object))
        };
        let mut known = ask().await?;
        if !known.fresh && conditions.judge(&known.head) != Verdict::Send {
            self.heads.forget(name);
            known = ask().await?;
        }
        match conditions.judge(&known.head) {
            Verdict::Send => Ok(known),
            Verdict::Failed => Err(failure::precondition_failed()),
            Verdict::NotModified => {
                let etag = &known.head.version.etag.0;
                Err(failure::not_modified(etag, known.head.last_modified.and_then(http_date)))
            }
        }
    }

    /// Opens the body. An object that was overwritten since its HEAD was remembered is opened once more.
    async fn open(&self, name: &Name, conditions: &Conditions, asked: Option<Asked>) -> S3Result<Opened> {
        let begun = Instant::now();
        let known = match self.judged(name, conditions).await {
            Err(error) if *error.code() == S3ErrorCode::NoSuchKey => {
                return Err(self.missing(name, error).await);
            }
            judged => judged?,
        };
        let opened = match self.first_byte(known.head, asked).await {
            Err(Unopened::Read(ReadError::Origin(OriginError::Changed { .. }))) => {
                self.heads.forget(name);
                let known = self.judged(name, conditions).await?;
                self.first_byte(known.head, asked).await?
            }
            opened => opened?,
        };
        self.served.first_byte(Face::Object, begun.elapsed());
        Ok(opened)
    }

    /// Whether the key is missing or its bucket: HEAD, which has no body, does not tell.
    async fn missing(&self, name: &Name, no_such_key: S3Error) -> S3Error {
        match self.origin.head_bucket(&name.bucket).await {
            Err(error @ OriginError::NotFound { .. }) => failure::from_origin(&error, Subject::Bucket),
            _ => no_such_key,
        }
    }

    async fn first_byte(&self, head: Arc<ObjectHead>, asked: Option<Asked>) -> Result<Opened, Unopened> {
        let size = head.version.size;
        let partial = asked.map(|Asked(range)| range.resolve(size)).transpose();
        let partial = partial.map_err(|error| Unopened::Answer(failure::unsatisfiable(error)))?;
        let range = partial.unwrap_or_else(|| ByteRange::new(0, size));
        if range.is_empty() {
            return Ok(Opened { head, partial, body: None });
        }
        let id = ContentId::Object(head.version.clone());
        let source = Arc::new(self.origin.object(head.version.clone(), head.version_id.clone()));
        let content = self.cache.open(id, size, source).await;
        let content = content.map_err(|error| Unopened::Answer(failure::from_open(&error)))?;
        let mut reader = self.served.metered(Face::Object, content.read(range));
        let first = tokio::time::timeout(self.first_byte_timeout, reader.next()).await;
        let first = first.map_err(|_| Unopened::Answer(failure::too_late(self.first_byte_timeout)))?;
        let first = first.unwrap_or_else(|| Ok(Bytes::new())).map_err(Unopened::Read)?;
        Ok(Opened { head, partial, body: Some(body(first, reader)) })
    }

    async fn page(&self, bucket: &str, request: &PageRequest) -> S3Result<crate::origin::s3::Page> {
        self.admit_to_bucket()?;
        let page = self.origin.list_page(bucket, request).await;
        page.map_err(|error| failure::from_origin(&error, Subject::Bucket))
    }
}

/// Why there is no body yet.
enum Unopened {
    Read(ReadError),
    Answer(S3Error),
}

impl From<Unopened> for S3Error {
    fn from(unopened: Unopened) -> Self {
        match unopened {
            Unopened::Read(error) => failure::from_read(&error),
            Unopened::Answer(error) => error,
        }
    }
}

#[async_trait::async_trait]
impl S3 for ReadOnly {
    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let asked = request.extensions.get::<Asked>().copied();
        let input = request.input;
        whole_objects_only(input.part_number)?;
        let wants_checksums = wants_checksums(input.checksum_mode.as_ref());
        let conditions = Conditions {
            if_match: input.if_match,
            if_none_match: input.if_none_match,
            if_modified_since: input.if_modified_since,
            if_unmodified_since: input.if_unmodified_since,
        };
        let name = Name { bucket: input.bucket, key: input.key, version_id: input.version_id };
        self.admit(&request.extensions, &name).await?;
        let Opened { head, partial, body } = self.open(&name, &conditions, asked).await?;
        let size = head.version.size;
        // They are of the whole object, so they would be wrong of a part.
        let checksums =
            if wants_checksums && partial.is_none() { head.checksums.clone() } else { Checksums::default() };
        let output = GetObjectOutput {
            body,
            checksum_crc32: checksums.crc32,
            checksum_crc32c: checksums.crc32c,
            checksum_crc64nvme: checksums.crc64nvme,
            checksum_sha1: checksums.sha1,
            checksum_sha256: checksums.sha256,
            checksum_type: checksums.kind.map(Into::into),
            accept_ranges: Some("bytes".into()),
            content_length: Some(signed(partial.map_or(size, |range| range.len()))),
            content_range: partial.map(|range| content_range(range, size)),
            last_modified: head.last_modified.map(Timestamp::from),
            content_type: head.content_type.clone(),
            content_encoding: head.content_encoding.clone(),
            content_disposition: head.content_disposition.clone(),
            content_language: head.content_language.clone(),
            cache_control: head.cache_control.clone(),
            metadata: Some(head.metadata.clone().into_iter().collect()),
            version_id: head.version_id.clone(),
            ..GetObjectOutput::default()
        };
        Ok(with_etag(output, &head.version.etag.0))
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let input = request.input;
        whole_objects_only(input.part_number)?;
        let wants_checksums = wants_checksums(input.checksum_mode.as_ref());
        let conditions = Conditions {
            if_match: input.if_match,
            if_none_match: input.if_none_match,
            if_modified_since: input.if_modified_since,
            if_unmodified_since: input.if_unmodified_since,
        };
        let name = Name { bucket: input.bucket, key: input.key, version_id: input.version_id };
        self.admit(&request.extensions, &name).await?;
        let head = self.judged(&name, &conditions).await?.head;
        let checksums = if wants_checksums { head.checksums.clone() } else { Checksums::default() };
        let output = HeadObjectOutput {
            checksum_crc32: checksums.crc32,
            checksum_crc32c: checksums.crc32c,
            checksum_crc64nvme: checksums.crc64nvme,
            checksum_sha1: checksums.sha1,
            checksum_sha256: checksums.sha256,
            checksum_type: checksums.kind.map(Into::into),
            accept_ranges: Some("bytes".into()),
            content_length: Some(signed(head.version.size)),
            last_modified: head.last_modified.map(Timestamp::from),
            content_type: head.content_type.clone(),
            content_encoding: head.content_encoding.clone(),
            content_disposition: head.content_disposition.clone(),
            content_language: head.content_language.clone(),
            cache_control: head.cache_control.clone(),
            metadata: Some(head.metadata.clone().into_iter().collect()),
            version_id: head.version_id.clone(),
            ..HeadObjectOutput::default()
        };
        Ok(with_etag(output, &head.version.etag.0))
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = request.input;
        let page = PageRequest {
            prefix: input.prefix.clone().unwrap_or_default(),
            delimiter: input.delimiter.clone(),
            continuation_token: input.continuation_token.clone(),
            start_after: input.start_after.clone(),
            max_keys: input.max_keys,
        };
        let page = self.page(&input.bucket, &page).await?;
        let count = page.objects.len() + page.common_prefixes.len();
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: input.prefix,
            delimiter: input.delimiter,
            start_after: input.start_after,
            continuation_token: input.continuation_token,
            max_keys: Some(input.max_keys.unwrap_or(MAX_KEYS)),
            key_count: i32::try_from(count).ok(),
            is_truncated: Some(page.next_continuation_token.is_some()),
            next_continuation_token: page.next_continuation_token,
            contents: Some(page.objects.into_iter().map(object).collect()),
            common_prefixes: Some(page.common_prefixes.into_iter().map(common_prefix).collect()),
            ..ListObjectsV2Output::default()
        }))
    }

    /// Version 1 by version 2: its marker is a key, as `start-after` is.
    async fn list_objects(
        &self,
        request: S3Request<ListObjectsInput>,
    ) -> S3Result<S3Response<ListObjectsOutput>> {
        let input = request.input;
        let page = PageRequest {
            prefix: input.prefix.clone().unwrap_or_default(),
            delimiter: input.delimiter.clone(),
            continuation_token: None,
            start_after: input.marker.clone(),
            max_keys: input.max_keys,
        };
        let page = self.page(&input.bucket, &page).await?;
        let truncated = page.next_continuation_token.is_some();
        let last_key = page.objects.last().map(|listed| listed.version.key.clone());
        // Behind everything that the common prefix stands for, or the next page would begin with it again.
        let last_prefix = page.common_prefixes.last().map(|prefix| format!("{prefix}{}", char::MAX));
        let next_marker = last_key.max(last_prefix).filter(|_| truncated);
        Ok(S3Response::new(ListObjectsOutput {
            name: Some(input.bucket),
            prefix: input.prefix,
            delimiter: input.delimiter,
            marker: input.marker,
            max_keys: Some(input.max_keys.unwrap_or(MAX_KEYS)),
            is_truncated: Some(truncated),
            next_marker,
            contents: Some(page.objects.into_iter().map(object).collect()),
            common_prefixes: Some(page.common_prefixes.into_iter().map(common_prefix).collect()),
            ..ListObjectsOutput::default()
        }))
    }

    async fn head_bucket(
        &self,
        request: S3Request<HeadBucketInput>,
    ) -> S3Result<S3Response<HeadBucketOutput>> {
        self.admit_to_bucket()?;
        let answer = self.origin.head_bucket(&request.input.bucket).await;
        answer.map_err(|error| failure::from_origin(&error, Subject::Bucket))?;
        let bucket_region = Some(self.origin.region().await);
        Ok(S3Response::new(HeadBucketOutput { bucket_region, ..HeadBucketOutput::default() }))
    }

    /// The region this daemon reads from: that is where the client's requests go.
    async fn get_bucket_location(
        &self,
        request: S3Request<GetBucketLocationInput>,
    ) -> S3Result<S3Response<GetBucketLocationOutput>> {
        self.admit_to_bucket()?;
        let permitted = self.origin.permit_bucket(&request.input.bucket);
        permitted.map_err(|error| failure::from_origin(&error, Subject::Bucket))?;
        // S3's own way of saying us-east-1 is an empty constraint.
        let region = Some(self.origin.region().await).filter(|region| region != "us-east-1");
        let location_constraint = region.map(BucketLocationConstraint::from);
        Ok(S3Response::new(GetBucketLocationOutput { location_constraint }))
    }
}

fn wants_checksums(mode: Option<&ChecksumMode>) -> bool {
    mode.is_some_and(|mode| mode.as_str() == ChecksumMode::ENABLED)
}

fn whole_objects_only(part: Option<i32>) -> S3Result<()> {
    match part {
        Some(_) => Err(s3_error!(NotImplemented, "windlass does not serve single parts; ask for a range")),
        None => Ok(()),
    }
}

/// The first piece, then the rest as the reader gets it.
fn body(first: Bytes, reader: Metered) -> StreamingBlob {
    let pieces = stream::once(async { Ok(first) }).chain(reader);
    let frames = pieces.map(|piece| piece.map(Frame::data).map_err(io::Error::other));
    Body::http_body_unsync(StreamBody::new(frames)).into()
}

/// The ETag as the origin wrote it, whether or not it has the form that `s3s` would parse.
fn with_etag<T>(output: T, etag: &str) -> S3Response<T> {
    let mut headers = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_str(etag) {
        headers.insert(ETAG, value);
    }
    S3Response::with_headers(output, headers)
}

fn content_range(range: ByteRange, size: u64) -> String {
    format!("bytes {}-{}/{size}", range.start(), range.end() - 1)
}

/// S3 objects end at 50 TB, far below the sign bit.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn http_date(at: SystemTime) -> Option<String> {
    let mut text = Vec::new();
    Timestamp::from(at).format(TimestampFormat::HttpDate, &mut text).ok()?;
    String::from_utf8(text).ok()
}

fn object(listed: Listed) -> Object {
    Object {
        e_tag: s3s::dto::ETag::parse_http_header(listed.version.etag.0.as_bytes()).ok(),
        key: Some(listed.version.key),
        size: Some(signed(listed.version.size)),
        last_modified: listed.last_modified.map(Timestamp::from),
        storage_class: listed.storage_class.map(ObjectStorageClass::from),
        ..Object::default()
    }
}

fn common_prefix(prefix: String) -> CommonPrefix {
    CommonPrefix { prefix: Some(prefix) }
}

//! S3: pins an object's version, lists, and reads ranges of what was pinned.
//!
//! Invariant: every range carries `If-Match` with the pinned ETag (and the version id where one is known), and its
//! answer is checked against the range and the ETag, so that two bytes of one [`ObjectVersion`] never come from two
//! writes. Only what the allow-list names is asked for, whatever the credentials would permit.
//! This module refuses to retry ranges (the engine knows better whom to ask next) and to interpret ETags.

mod checksum;
mod config;
mod failure;
mod object;
mod proof;
#[cfg(test)]
pub(crate) mod stub;

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_config::retry::RetryConfig;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::config::{
    Builder as Overrides, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::types::{ChecksumMode, ObjectAttributes, ObjectPart, RequestPayer};
use parking_lot::Mutex;
use tokio::sync::OnceCell;

pub use checksum::{Claim, Hasher, Sum, SumKind};
pub use config::{AllowList, CaError, RuleError, S3Config};
pub use object::S3Object;
pub use proof::{Proof, ProofError, S3Callers};

use super::aws;
pub use super::aws::APP_NAME;
use super::care::Care;
use super::recent::Recent;
use super::{Kind, Metrics, OriginError, OriginMetrics, Outcome};
use crate::content::{ByteRange, ETag, ObjectVersion};

/// This origin in metrics and messages.
const LABEL: &str = "s3";

/// Where no region is configured or discoverable: S3-alikes accept any, and AWS's answer names the right one.
const LAST_RESORT_REGION: &str = "us-east-1";

/// Attempts of the SDK for HEAD and LIST, which are small and on somebody's critical path. Ranges get one.
const METADATA_ATTEMPTS: u32 = 3;

/// Objects one listing may return: 200 bytes each make 20 MB. A checkpoint has hundreds of files, not thousands.
pub const MAX_LISTED: usize = 100_000;

/// Buckets whose region is remembered because it is not the configured one.
const REMEMBERED_REGIONS: usize = 1024;

/// Parts one `GetObjectAttributes` returns, S3's limit; an object has at most ten times as many.
const PARTS_PER_PAGE: i32 = 1000;

/// Most parts of an object, S3's limit: who says more is not believed.
const MAX_PARTS: usize = 10_000;

/// The object store, as one node's credentials see it.
#[derive(Clone, Debug)]
pub struct S3Origin {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: S3Config,
    /// Certificates to trust beside the system's, in PEM.
    trusted: Option<Vec<u8>>,
    metrics: OriginMetrics,
    /// Made at the first request: finding the region may ask the instance metadata, and start-up must not wait.
    client: OnceCell<Client>,
    /// Regions that S3 named when it was asked in another.
    regions: Mutex<Recent<String, String>>,
    care: Arc<Care>,
}

/// A pinned object and what its HEAD says.
#[derive(Clone, Debug)]
pub struct ObjectHead {
    pub version: ObjectVersion,
    /// Set in versioned buckets.
    pub version_id: Option<String>,
    pub last_modified: Option<SystemTime>,
    pub content_type: Option<String>,
    pub content_encoding: Option<String>,
    pub content_disposition: Option<String>,
    pub content_language: Option<String>,
    pub cache_control: Option<String>,
    /// User metadata, `x-amz-meta-` removed from the names.
    pub metadata: BTreeMap<String, String>,
    pub checksums: Checksums,
}

/// Checksums S3 keeps of an object, base64 as on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checksums {
    pub crc32: Option<String>,
    pub crc32c: Option<String>,
    pub crc64nvme: Option<String>,
    pub sha1: Option<String>,
    pub sha256: Option<String>,
    /// `FULL_OBJECT` or `COMPOSITE`.
    pub kind: Option<String>,
}

/// One part of an object that was uploaded in several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub number: u32,
    pub range: ByteRange,
    pub sum: Sum,
}

/// One object of a listing; its version is pinned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub version: ObjectVersion,
    pub last_modified: Option<SystemTime>,
    pub storage_class: Option<String>,
}

/// Which page of a listing is wanted: the parameters of `ListObjectsV2`.
#[derive(Clone, Debug, Default)]
pub struct PageRequest {
    pub prefix: String,
    pub delimiter: Option<String>,
    pub continuation_token: Option<String>,
    pub start_after: Option<String>,
    pub max_keys: Option<i32>,
}

/// One page of a listing.
#[derive(Clone, Debug, Default)]
pub struct Page {
    pub objects: Vec<Listed>,
    pub common_prefixes: Vec<String>,
    pub next_continuation_token: Option<String>,
}

impl S3Origin {
    /// Opens no connection yet: the first request loads the credentials and the region.
    ///
    /// # Errors
    /// When `ca_file` holds no certificates.
    pub fn new(config: S3Config, metrics: &Metrics) -> Result<Self, CaError> {
        let trusted = config.trusted()?;
        Ok(Self::of(config, trusted, OnceCell::new(), metrics))
    }

    /// One whose client is made already.
    #[cfg(test)]
    fn with_client(config: S3Config, client: Client, metrics: &Metrics) -> Self {
        Self::of(config, None, OnceCell::new_with(Some(client)), metrics)
    }

    fn of(config: S3Config, trusted: Option<Vec<u8>>, client: OnceCell<Client>, metrics: &Metrics) -> Self {
        let metrics = metrics.origin(LABEL);
        let care = Care::new(metrics.clone(), Duration::from_millis(config.stall_timeout_ms));
        let regions = Mutex::new(Recent::new(REMEMBERED_REGIONS));
        Self { inner: Arc::new(Inner { config, trusted, metrics, client, regions, care }) }
    }

    /// Pins the current version of an object, or the one `version_id` names.
    ///
    /// # Errors
    /// See [`OriginError`]; `NotFound` also for a delete marker.
    pub async fn head(
        &self,
        bucket: &str,
        key: &str,
        version_id: Option<&str>,
    ) -> Result<ObjectHead, OriginError> {
        self.permit(bucket, key)?;
        let what = url_of(bucket, key);
        let request = self
            .client()
            .await
            .head_object()
            .bucket(bucket)
            .key(key)
            .set_version_id(version_id.map(Into::into))
            .set_request_payer(self.payer())
            .checksum_mode(ChecksumMode::Enabled);
        let send = |over| request.clone().customize().config_override(over).send();
        let answer = self.in_region(bucket, &what, send).await;
        self.inner.metrics.request(Kind::Metadata, Outcome::of(&answer));
        pin(bucket, key, answer?).ok_or_else(|| failure::failed(format!("{what}: no ETag or no length")))
    }

    /// Every object whose key begins with `prefix`, in key order, each pinned.
    ///
    /// # Errors
    /// See [`OriginError`]; also when there are more than [`MAX_LISTED`].
    pub async fn list(&self, bucket: &str, prefix: &str) -> Result<Vec<Listed>, OriginError> {
        let mut request = PageRequest { prefix: prefix.into(), ..PageRequest::default() };
        let mut all = Vec::new();
        loop {
            let page = self.list_page(bucket, &request).await?;
            all.extend(page.objects);
            if all.len() > MAX_LISTED {
                let what = url_of(bucket, prefix);
                return Err(OriginError::Ours(format!(
                    "{what} has more than {MAX_LISTED} objects: name a longer prefix"
                )));
            }
            let Some(token) = page.next_continuation_token else { return Ok(all) };
            request.continuation_token = Some(token);
        }
    }

    /// One page of a listing.
    ///
    /// # Errors
    /// See [`OriginError`].
    pub async fn list_page(&self, bucket: &str, page: &PageRequest) -> Result<Page, OriginError> {
        self.permit(bucket, &page.prefix)?;
        let request = self
            .client()
            .await
            .list_objects_v2()
            .bucket(bucket)
            .prefix(&page.prefix)
            .set_delimiter(page.delimiter.clone())
            .set_continuation_token(page.continuation_token.clone())
            .set_start_after(page.start_after.clone())
            .set_request_payer(self.payer())
            .set_max_keys(page.max_keys);
        let what = url_of(bucket, &page.prefix);
        let send = |over| request.clone().customize().config_override(over).send();
        let answer = self.in_region(bucket, &what, send).await;
        self.inner.metrics.request(Kind::Metadata, Outcome::of(&answer));
        let answer = answer?;
        let objects = answer.contents().iter().filter_map(|object| listed(bucket, object)).collect();
        let prefixes = answer.common_prefixes().iter().filter_map(|common| common.prefix());
        Ok(Page {
            objects,
            common_prefixes: prefixes.map(Into::into).collect(),
            next_continuation_token: answer.next_continuation_token().map(Into::into),
        })
    }

    /// Whether `bucket` exists and the credentials may list it.
    ///
    /// # Errors
    /// See [`OriginError`].
    pub async fn head_bucket(&self, bucket: &str) -> Result<(), OriginError> {
        self.permit_bucket(bucket)?;
        let request = self.client().await.head_bucket().bucket(bucket);
        let send = |over| request.clone().customize().config_override(over).send();
        let answer = self.in_region(bucket, &format!("s3://{bucket}"), send).await;
        self.inner.metrics.request(Kind::Metadata, Outcome::of(&answer));
        answer.map(drop)
    }

    /// The parts that the object was uploaded in, with their sums of `kind`; empty when S3 does not keep them.
    ///
    /// # Errors
    /// See [`OriginError`]; `Denied` without the permission `s3:GetObjectAttributes`.
    pub async fn parts(
        &self,
        version: &ObjectVersion,
        version_id: Option<&str>,
        kind: SumKind,
    ) -> Result<Vec<Part>, OriginError> {
        let what = url_of(&version.bucket, &version.key);
        let mut parts = Vec::new();
        let mut after = None;
        loop {
            let request = self
                .client()
                .await
                .get_object_attributes()
                .bucket(&version.bucket)
                .key(&version.key)
                .set_version_id(version_id.map(Into::into))
                .set_request_payer(self.payer())
                .object_attributes(ObjectAttributes::ObjectParts)
                .max_parts(PARTS_PER_PAGE)
                .set_part_number_marker(after.take());
            let send = |over| request.clone().customize().config_override(over).send();
            let answer = self.in_region(&version.bucket, &what, send).await;
            self.inner.metrics.request(Kind::Metadata, Outcome::of(&answer));
            let answer = answer?;
            let Some(page) = answer.object_parts() else { return Ok(parts) };
            for part in page.parts() {
                parts.extend(next_part(&parts, part, kind));
            }
            after =
                page.next_part_number_marker().filter(|_| page.is_truncated() == Some(true)).map(Into::into);
            if after.is_none() || page.parts().is_empty() || parts.len() >= MAX_PARTS {
                return Ok(parts);
            }
        }
    }

    /// The region that requests are signed for.
    pub async fn region(&self) -> String {
        let region = self.client().await.config().region().map(ToString::to_string);
        region.unwrap_or_else(|| LAST_RESORT_REGION.into())
    }

    /// The object to read, pinned to `version`.
    #[must_use]
    pub fn object(&self, version: ObjectVersion, version_id: Option<String>) -> S3Object {
        S3Object { origin: self.clone(), version, version_id }
    }

    /// Whether the configuration lets `key` of `bucket` be read. `key` may be a prefix to list.
    ///
    /// # Errors
    /// [`OriginError::Denied`], saying what to add to the configuration.
    pub fn permit(&self, bucket: &str, key: &str) -> Result<(), OriginError> {
        if self.inner.config.buckets.allows(bucket, key) { Ok(()) } else { Err(not_allowed(bucket, key)) }
    }

    /// Whether the configuration lets anything in `bucket` be read.
    ///
    /// # Errors
    /// [`OriginError::Denied`], saying what to add to the configuration.
    pub fn permit_bucket(&self, bucket: &str) -> Result<(), OriginError> {
        if self.inner.config.buckets.knows(bucket) { Ok(()) } else { Err(not_allowed(bucket, "")) }
    }

    /// Sends a request in the bucket's region: in the configured one at first, and where S3 says the bucket is when it
    /// is not there.
    async fn in_region<T, E, F>(
        &self,
        bucket: &str,
        what: &str,
        send: impl Fn(Overrides) -> F,
    ) -> Result<T, OriginError>
    where
        F: Future<Output = Result<T, SdkError<E, HttpResponse>>>,
        E: ProvideErrorMetadata + Error + 'static,
    {
        let known = self.inner.regions.lock().get(&bucket.to_owned()).cloned();
        let over = |region: Option<&String>| match region {
            Some(region) => Overrides::new().region(Region::new(region.clone())),
            None => Overrides::new(),
        };
        let error = match send(over(known.as_ref())).await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        let Some(region) = failure::region(&error).filter(|region| known.as_ref() != Some(region)) else {
            return Err(failure::classify(&error, what));
        };
        tracing::info!(bucket, region, "the bucket is in another region than `s3.region`: asking there");
        self.inner.regions.lock().insert(bucket.to_owned(), region.clone());
        send(over(Some(&region))).await.map_err(|error| failure::classify(&error, what))
    }

    /// Who pays for requests, as the header says it.
    fn payer(&self) -> Option<RequestPayer> {
        self.inner.config.requester_pays.then_some(RequestPayer::Requester)
    }

    async fn client(&self) -> &Client {
        self.inner.client.get_or_init(|| connect(&self.inner.config, self.inner.trusted.as_deref())).await
    }
}

async fn connect(config: &S3Config, trusted: Option<&[u8]>) -> Client {
    let timeouts = (config.connect_timeout_ms, config.first_byte_timeout_ms);
    let mut loader =
        aws::loader(Duration::from_millis(timeouts.0), Duration::from_millis(timeouts.1), trusted)
            .retry_config(RetryConfig::standard().with_max_attempts(METADATA_ATTEMPTS))
            // It fails whatever is slower than its idea of slow; our own clock is on the body.
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    if let Some(region) = &config.region {
        loader = loader.region(Region::new(region.clone()));
    }
    if let Some(endpoint) = &config.endpoint {
        loader = loader.endpoint_url(endpoint.as_str());
    }
    if config.anonymous {
        loader = loader.no_credentials();
    }
    let shared = loader.load().await;
    let region = shared.region().cloned().unwrap_or(Region::from_static(LAST_RESORT_REGION));
    let s3 = aws_sdk_s3::config::Builder::from(&shared).region(region).force_path_style(config.path_style);
    Client::from_conf(s3.build())
}

fn url_of(bucket: &str, key: &str) -> String {
    format!("s3://{bucket}/{key}")
}

fn not_allowed(bucket: &str, key: &str) -> OriginError {
    OriginError::Denied {
        origin: LABEL.into(),
        what: url_of(bucket, key),
        reason: format!("not in the allow-list: add \"{bucket}\" or a prefix of it to `s3.buckets`"),
    }
}

/// `None` when the answer lacks what pinning needs.
fn pin(bucket: &str, key: &str, head: HeadObjectOutput) -> Option<ObjectHead> {
    let version = ObjectVersion {
        bucket: bucket.into(),
        key: key.into(),
        etag: ETag(head.e_tag()?.into()),
        size: head.content_length().and_then(|n| n.try_into().ok())?,
    };
    Some(ObjectHead {
        version,
        version_id: real_version_id(head.version_id()),
        last_modified: head.last_modified().and_then(|at| SystemTime::try_from(*at).ok()),
        checksums: Checksums {
            crc32: head.checksum_crc32,
            crc32c: head.checksum_crc32_c,
            crc64nvme: head.checksum_crc64_nvme,
            sha1: head.checksum_sha1,
            sha256: head.checksum_sha256,
            kind: head.checksum_type.map(|kind| kind.as_str().into()),
        },
        content_type: head.content_type,
        content_encoding: head.content_encoding,
        content_disposition: head.content_disposition,
        content_language: head.content_language,
        cache_control: head.cache_control,
        metadata: head.metadata.unwrap_or_default().into_iter().collect(),
    })
}

/// Buckets whose versioning is suspended answer with the literal `null`, which is the latest version and changes.
fn real_version_id(id: Option<&str>) -> Option<String> {
    id.filter(|id| *id != "null").map(Into::into)
}

/// The part after `before`; `None` when it lacks its size or its sum.
fn next_part(before: &[Part], part: &ObjectPart, kind: SumKind) -> Option<Part> {
    let start = before.last().map_or(0, |part| part.range.end());
    let text = match kind {
        SumKind::Crc64Nvme => part.checksum_crc64_nvme(),
        SumKind::Crc32c => part.checksum_crc32_c(),
        SumKind::Crc32 => part.checksum_crc32(),
        SumKind::Sha256 => part.checksum_sha256(),
    };
    Some(Part {
        number: u32::try_from(part.part_number()?).ok()?,
        range: ByteRange::new(start, start.checked_add(u64::try_from(part.size()?).ok()?)?),
        sum: Sum::parse(kind, text?)?,
    })
}

/// `None` for an entry without a key, a size or an ETag, which cannot be pinned.
fn listed(bucket: &str, object: &aws_sdk_s3::types::Object) -> Option<Listed> {
    let version = ObjectVersion {
        bucket: bucket.into(),
        key: object.key()?.into(),
        etag: ETag(object.e_tag()?.into()),
        size: object.size().and_then(|n| n.try_into().ok())?,
    };
    Some(Listed {
        version,
        last_modified: object.last_modified().and_then(|at| SystemTime::try_from(*at).ok()),
        storage_class: object.storage_class().map(|class| class.as_str().into()),
    })
}

#[cfg(test)]
mod tests;

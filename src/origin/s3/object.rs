//! Ranges of one pinned object.

use std::sync::Arc;
use std::time::Duration;

use aws_config::retry::RetryConfig;
use aws_sdk_s3::config::Builder as Overrides;
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::ByteStream;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt, stream};

use super::{LABEL, S3Origin, failure, url_of};
use crate::content::{ByteRange, ObjectVersion};
use crate::origin::aws::chain_of;
use crate::origin::care::Opener;
use crate::origin::{Body, Delivery, Kind, OriginError, Outcome, Source};

/// One object version at S3.
#[derive(Clone, Debug)]
pub struct S3Object {
    pub(super) origin: S3Origin,
    pub(crate) version: ObjectVersion,
    pub(super) version_id: Option<String>,
}

impl Source for S3Object {
    fn read(&self, range: ByteRange) -> BoxFuture<'_, Result<Body, OriginError>> {
        let this = self.clone();
        let open: Opener = Box::new(move |range| {
            let this = this.clone();
            Box::pin(async move {
                let answer = this.get(range).await;
                this.origin.inner.metrics.request(Kind::Content, Outcome::of(&answer));
                Ok(this.body(answer?.body, range))
            })
        });
        Box::pin(Arc::clone(&self.origin.inner.care).read(open, range))
    }

    fn label(&self) -> &str {
        LABEL
    }
}

impl S3Object {
    async fn get(&self, range: ByteRange) -> Result<GetObjectOutput, OriginError> {
        let ObjectVersion { bucket, key, etag, .. } = &self.version;
        self.origin.permit(bucket, key)?;
        let request = self
            .origin
            .client()
            .await
            .get_object()
            .bucket(bucket)
            .key(key)
            .range(range.to_header())
            .if_match(&etag.0)
            .set_version_id(self.version_id.clone())
            .set_request_payer(self.origin.payer());
        let send = |over: Overrides| {
            let once = over.retry_config(RetryConfig::disabled());
            request.clone().customize().config_override(once).send()
        };
        let answer = self.origin.in_region(bucket, &self.url(), send).await?;
        check(&self.version, range, &answer)?;
        Ok(answer)
    }

    fn url(&self) -> String {
        url_of(&self.version.bucket, &self.version.key)
    }

    /// The pieces as hyper delivers them, uncopied.
    fn body(&self, bytes: ByteStream, range: ByteRange) -> Body {
        let what = self.url();
        let pieces =
            stream::unfold(bytes, |mut bytes| async { bytes.next().await.map(|piece| (piece, bytes)) });
        let pieces = pieces.map(move |piece| piece.map_err(|error| format!("{what}: {}", chain_of(&error))));
        let progress_timeout = Duration::from_millis(self.origin.inner.config.stall_timeout_ms);
        let metrics = self.origin.inner.metrics.clone();
        Delivery { skip: 0, want: range.len(), progress_timeout, metrics }.from(pieces)
    }
}

/// Whether the answer is the range that was asked, of the version that was pinned.
fn check(version: &ObjectVersion, range: ByteRange, answer: &GetObjectOutput) -> Result<(), OriginError> {
    let what = || url_of(&version.bucket, &version.key);
    if answer.e_tag().is_some_and(|etag| etag != version.etag.0) {
        return Err(OriginError::Changed { origin: LABEL.into(), what: what() });
    }
    let expected = format!("bytes {}-{}/{}", range.start(), range.end() - 1, version.size);
    match answer.content_range() {
        Some(got) if got == expected => Ok(()),
        // 200: some stores answer so when the range is the whole object.
        None if range.len() == version.size => Ok(()),
        Some(got) => Err(failure::failed(format!("{}: asked for {expected}, got {got}", what()))),
        None => Err(failure::failed(format!(
            "{}: asked for {expected}, got the whole object: this store ignores ranges",
            what()
        ))),
    }
}

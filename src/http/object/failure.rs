//! What our failures are called in S3: one table.

use std::time::Duration;

use http::header::{CONTENT_RANGE, CONTENT_TYPE, ETAG, LAST_MODIFIED, RETRY_AFTER};
use http::{HeaderMap, HeaderValue};
use s3s::{S3Error, S3ErrorCode};

use crate::cache::{OpenError, ReadError};
use crate::content::RangeError;
use crate::origin::OriginError;

/// Told to clients that we have no better number for: SDKs back off by themselves, curl needs one.
const RETRY_AFTER_SECONDS: u64 = 1;

/// What was asked for, which is what is missing when the origin says 404.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Subject {
    Bucket,
    Object,
}

/// Turns a failure of the origin into S3's terms.
pub(super) fn from_origin(error: &OriginError, subject: Subject) -> S3Error {
    let code = match error {
        OriginError::NotFound { .. } if subject == Subject::Bucket => S3ErrorCode::NoSuchBucket,
        OriginError::NotFound { .. } => S3ErrorCode::NoSuchKey,
        OriginError::Denied { .. } => S3ErrorCode::AccessDenied,
        OriginError::Throttled { .. } => S3ErrorCode::SlowDown,
        OriginError::Changed { .. } => S3ErrorCode::PreconditionFailed,
        OriginError::Failed { .. } => S3ErrorCode::ServiceUnavailable,
        OriginError::Ours(_) => S3ErrorCode::InternalError,
    };
    let wait = match error {
        OriginError::Throttled { retry_after, .. } => Some(*retry_after),
        OriginError::Failed { .. } => Some(None),
        _ => None,
    };
    let answer = S3Error::with_message(code, error.to_string());
    match wait {
        Some(wait) => retriable(answer, wait),
        None => answer,
    }
}

/// Turns a failure of the cache into S3's terms.
pub(super) fn from_read(error: &ReadError) -> S3Error {
    match error {
        ReadError::Origin(error) => from_origin(error, Subject::Object),
        ReadError::Stalled { .. } | ReadError::Shutdown => {
            retriable(S3Error::with_message(S3ErrorCode::ServiceUnavailable, error.to_string()), None)
        }
        ReadError::Verification { .. } | ReadError::Store { .. } => {
            S3Error::with_message(S3ErrorCode::InternalError, error.to_string())
        }
    }
}

/// Turns a failure to open into S3's terms.
pub(super) fn from_open(error: &OpenError) -> S3Error {
    match error {
        OpenError::Shutdown => from_read(&ReadError::Shutdown),
        OpenError::Layout(_) => S3Error::with_message(S3ErrorCode::InternalError, error.to_string()),
    }
}

/// No first byte in time.
pub(super) fn too_late(waited: Duration) -> S3Error {
    let message = format!("no byte of the object arrived in {waited:?}; ask again");
    retriable(S3Error::with_message(S3ErrorCode::ServiceUnavailable, message), None)
}

/// 416, with the size that the client needs to do better.
pub(super) fn unsatisfiable(error: RangeError) -> S3Error {
    let mut answer = S3Error::with_message(S3ErrorCode::InvalidRange, error.to_string());
    answer.set_headers(with_headers([(CONTENT_RANGE, format!("bytes */{}", error.size))]));
    answer
}

/// 412
pub(super) fn precondition_failed() -> S3Error {
    S3Error::with_message(
        S3ErrorCode::PreconditionFailed,
        "the object is not the one that the conditions name",
    )
}

/// 304, which has no body but says what the client's copy is.
pub(super) fn not_modified(etag: &str, last_modified: Option<String>) -> S3Error {
    let mut answer = S3Error::new(S3ErrorCode::NotModified);
    let mut headers = with_headers([(ETAG, etag.to_owned())]);
    if let Some(date) = last_modified.and_then(|date| HeaderValue::try_from(date).ok()) {
        headers.insert(LAST_MODIFIED, date);
    }
    answer.set_headers(headers);
    answer
}

fn retriable(mut answer: S3Error, wait: Option<Duration>) -> S3Error {
    let seconds = wait.map_or(RETRY_AFTER_SECONDS, |wait| wait.as_secs().max(1));
    answer.set_headers(with_headers([(RETRY_AFTER, seconds.to_string())]));
    answer
}

/// `s3s` replaces its own headers by these, the content type of its error document too.
fn with_headers<const N: usize>(headers: [(http::HeaderName, String); N]) -> HeaderMap {
    let mut map = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/xml"))]);
    map.extend(
        headers.into_iter().filter_map(|(name, value)| Some((name, HeaderValue::try_from(value).ok()?))),
    );
    map
}

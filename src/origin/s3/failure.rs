//! What the SDK's errors mean to us: one table.

use std::error::Error;
use std::fmt::Write as _;
use std::time::Duration;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::LABEL;
use crate::origin::OriginError;

/// What to do when no link of the default credential chain had credentials; the SDK itself names the links.
const NO_CREDENTIALS: &str = "give the daemon's service account a role (EKS Pod Identity or IRSA), or set \
    `s3.anonymous = true` for public buckets; from a pod, Ec2InstanceMetadata needs a hop limit of 2 or hostNetwork";

/// Turns an SDK error about `what` into ours.
pub(super) fn classify<E>(error: &SdkError<E, HttpResponse>, what: &str) -> OriginError
where
    E: ProvideErrorMetadata + Error + 'static,
{
    if let SdkError::ServiceError(answer) = error {
        return refused(answer.raw(), answer.err(), what);
    }
    if let Some(error @ CredentialsError::CredentialsNotLoaded(_)) = cause(error) {
        // The chain's report has a line for each link.
        let links = chain_of(error).split_whitespace().collect::<Vec<_>>().join(" ");
        let reason = format!("{links}; {NO_CREDENTIALS}");
        return OriginError::Denied { origin: LABEL.into(), what: what.into(), reason };
    }
    let reason = chain_of(error);
    match error {
        SdkError::ConstructionFailure(_) => OriginError::Ours(format!("cannot ask S3 for {what}: {reason}")),
        _ => failed(format!("{what}: {reason}")),
    }
}

/// An origin that misbehaved.
pub(super) fn failed(reason: String) -> OriginError {
    OriginError::Failed { origin: LABEL.into(), reason }
}

/// A status above 299. HEAD has no body, so that the code may be missing and the status must do.
fn refused(answer: &HttpResponse, error: &impl ProvideErrorMetadata, what: &str) -> OriginError {
    let (origin, what) = (LABEL.to_owned(), what.to_owned());
    let code = error.code().unwrap_or_default();
    match (answer.status().as_u16(), code) {
        (_, "NoSuchBucket") => OriginError::NotFound { origin, what: format!("the bucket of {what}") },
        (404, _) => OriginError::NotFound { origin, what },
        // With If-Match, a range beyond the end means that the object is another one.
        (412 | 416, _) => OriginError::Changed { origin, what },
        (429 | 503, _) | (_, "SlowDown" | "RequestLimitExceeded" | "Throttling") => {
            OriginError::Throttled { origin, retry_after: retry_after(answer) }
        }
        (301 | 307, _) | (400, "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException") => {
            OriginError::Ours(elsewhere(answer, &what))
        }
        (401 | 403, _) => OriginError::Denied { origin, what, reason: denial(code, error.message()) },
        (status, _) => {
            let text = error.message().unwrap_or("no message");
            let reason = format!("{what}: status {status} {code}: {text}");
            // A request that S3 does not accept is not accepted the next time either.
            if (400..500).contains(&status) && status != 408 {
                OriginError::Ours(reason)
            } else {
                failed(reason)
            }
        }
    }
}

fn denial(code: &str, message: Option<&str>) -> String {
    let hint = match code {
        "InvalidObjectState" => "the object is archived; restore it first",
        "ExpiredToken" | "TokenRefreshRequired" => "the daemon's AWS credentials have expired",
        "InvalidAccessKeyId" | "SignatureDoesNotMatch" => {
            "the daemon's AWS credentials are not valid at this endpoint"
        }
        "RequestTimeTooSkewed" => "this node's clock is wrong",
        _ => {
            "the daemon's role needs s3:GetObject on the key (and kms:Decrypt if encrypted with KMS) and \
             s3:ListBucket on the bucket; without s3:ListBucket a missing key is refused in the same way"
        }
    };
    match message {
        Some(message) => format!("{hint} ({code}: {message})"),
        None => hint.into(),
    }
}

fn elsewhere(answer: &HttpResponse, what: &str) -> String {
    match answer.headers().get("x-amz-bucket-region") {
        Some(region) => format!("{what} is in region {region}: set `s3.region = \"{region}\"`"),
        None => format!("{what} is in another region: set `s3.region` to the bucket's"),
    }
}

/// `Retry-After` in seconds; its date form is not used by object stores.
fn retry_after(answer: &HttpResponse) -> Option<Duration> {
    answer.headers().get("retry-after")?.trim().parse().ok().map(Duration::from_secs)
}

/// The error and its causes: the SDK's own Display says only "dispatch failure".
pub(super) fn chain_of(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            let _ = write!(text, ": {part}");
        }
        cause = error.source();
    }
    text
}

/// The first error of type `T` among `error` and its causes.
fn cause<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

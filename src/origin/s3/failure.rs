//! What the SDK's errors mean to us: one table.

use std::error::Error;
use std::time::{Duration, SystemTime};

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::LABEL;
use crate::origin::aws::{chain_of, without_credentials};
use crate::origin::{OriginError, care, trust};

/// Turns an SDK error about `what` into ours.
pub(super) fn classify<E>(error: &SdkError<E, HttpResponse>, what: &str) -> OriginError
where
    E: ProvideErrorMetadata + Error + 'static,
{
    if let SdkError::ServiceError(answer) = error {
        return refused(answer.raw(), answer.err(), what);
    }
    if let Some(error) = cause::<CredentialsError>(error) {
        let reason = without_credentials(error);
        return match error {
            CredentialsError::ProviderTimedOut(_) => failed(format!("{what}: {reason}")),
            _ => OriginError::Denied { origin: LABEL.into(), what: what.into(), reason },
        };
    }
    let reason = trust::with_cure(chain_of(error), "s3.ca_file");
    match error {
        SdkError::ConstructionFailure(_) => OriginError::Ours(format!("cannot ask S3 for {what}: {reason}")),
        _ => failed(format!("{what}: {reason}")),
    }
}

/// Where S3 says the bucket is, when it answers that it is elsewhere.
pub(super) fn region<E>(error: &SdkError<E, HttpResponse>) -> Option<String>
where
    E: ProvideErrorMetadata + Error + 'static,
{
    let SdkError::ServiceError(answer) = error else { return None };
    let code = answer.err().code().unwrap_or_default();
    let is_elsewhere = match answer.raw().status().as_u16() {
        301 | 307 => true,
        // HEAD has no body, hence no code.
        400 => matches!(code, "" | "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException"),
        _ => false,
    };
    let named = answer.raw().headers().get("x-amz-bucket-region").filter(|_| is_elsewhere)?;
    let is_name = named.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    (is_name && !named.is_empty()).then(|| named.to_owned())
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
        // KMS has a quota of its own per region; S3 passes its refusal on with 400.
        (_, code) if code.contains("KMS.Throttling") || code == "ThrottlingException" => {
            OriginError::Throttled {
                origin: format!("KMS, behind {origin},"),
                retry_after: retry_after(answer),
            }
        }
        (_, code) if code.starts_with("KMS.") => {
            OriginError::Denied { origin, what, reason: denial(code, error.message()) }
        }
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
    let is_about_key = message.is_some_and(|message| message.contains("kms:") || message.contains("KMS"));
    let hint = match code {
        "KMS.DisabledException" | "KMS.KMSInvalidStateException" => {
            "the KMS key that the object is encrypted with is disabled or about to be deleted"
        }
        "KMS.NotFoundException" => "the KMS key that the object is encrypted with does not exist any more",
        code if code.starts_with("KMS.") || is_about_key => {
            "the object may be read, but its KMS key not used: the daemon's role needs kms:Decrypt on the key, and \
             the key's policy must allow it"
        }
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

/// How long the answer asks us to wait.
fn retry_after(answer: &HttpResponse) -> Option<Duration> {
    care::retry_after(answer.headers().get("retry-after")?, SystemTime::now())
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

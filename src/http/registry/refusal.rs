//! How a request is refused: the one place where a failure becomes a status.

use std::time::Duration;

use http::{Response, StatusCode, request};

use super::response::{self, MirrorBody};
use crate::cache::{OpenError, ReadError};
use crate::content::RangeError;
use crate::oci::{ErrorCode, RouteError, error_body};
use crate::origin::OriginError;

/// Why a request is not answered with what it asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error(transparent)]
    Route(#[from] RouteError),
    #[error("{}", namespace(asked.as_deref(), configured))]
    Namespace { asked: Option<String>, configured: Vec<String> },
    #[error(transparent)]
    Range(#[from] RangeError),
    #[error("this is windlass's own request: `endpoint` of a registry points at a windlass mirror")]
    Loop,
    #[error("its manifest is {size} bytes long, more than containerd reads")]
    ManifestTooLong { size: u64 },
    #[error("it is said to be empty, and its digest is not that of no bytes")]
    Empty,
    #[error(
        "what the registry last sent this node for it was something else: see the log, and what is between the two"
    )]
    Doubted,
    #[error("nothing arrived within {} ms", waited.as_millis())]
    TooSlow { waited: Duration },
    #[error("{registry} does not show this to everybody: bring a credential for it")]
    Unnamed { registry: String },
    #[error("the credential of whoever asks does not do: {0}")]
    Stranger(OriginError),
    #[error(transparent)]
    Origin(#[from] OriginError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Read(#[from] ReadError),
}

impl Refusal {
    /// Whatever we cannot serve is 404, whoever's fault it is: containerd then asks its next host, and reports that
    /// one's answer. It would retry 429 here six times, and show a 500 instead of the registry's own answer
    /// (`facts/wire.md`, traps 8 and 10).
    ///
    /// `unknown` is the code that says that what was asked for is not here.
    fn status(&self, unknown: ErrorCode) -> (StatusCode, ErrorCode) {
        match self {
            Self::Route(error @ RouteError::Method) => (StatusCode::METHOD_NOT_ALLOWED, error.code()),
            Self::Route(error @ (RouteError::Name(_) | RouteError::Digest(_))) => {
                (StatusCode::BAD_REQUEST, error.code())
            }
            Self::Route(error) => (StatusCode::NOT_FOUND, error.code()),
            Self::Namespace { .. } => (StatusCode::NOT_FOUND, ErrorCode::NameUnknown),
            Self::Range(_) => (StatusCode::RANGE_NOT_SATISFIABLE, ErrorCode::SizeInvalid),
            // On which containerd asks again with the credential that it was given, or goes on to the registry.
            Self::Unnamed { .. } => (StatusCode::UNAUTHORIZED, ErrorCode::Unauthorized),
            // 401 would be asked five times more, and 403 shown in place of the registry's own refusal.
            Self::Stranger(_) => (StatusCode::NOT_FOUND, ErrorCode::Denied),
            // Not 404: our own client would take it for a missing image and not show the message.
            Self::Loop => (StatusCode::BAD_REQUEST, ErrorCode::Unsupported),
            Self::ManifestTooLong { .. }
            | Self::Empty
            | Self::Doubted
            | Self::TooSlow { .. }
            | Self::Origin(_)
            | Self::Open(_)
            | Self::Read(_) => (StatusCode::NOT_FOUND, unknown),
        }
    }

    /// The client sees a 404 as a rule, so why must be in the log.
    pub(super) fn log(&self, request: &request::Parts) {
        let (method, uri) = (&request.method, &request.uri);
        match self {
            Self::Route(_)
            | Self::Range(_)
            | Self::Unnamed { .. }
            | Self::Origin(OriginError::NotFound { .. })
            | Self::Read(ReadError::Origin(OriginError::NotFound { .. })) => {
                tracing::debug!(%method, %uri, refusal = %self, "refused");
            }
            _ => tracing::warn!(%method, %uri, refusal = %self, "refused: the client goes to its next host"),
        }
    }

    pub(super) fn into_response(self, request: &request::Parts) -> Response<MirrorBody> {
        let is_manifest = request.uri.path().contains("/manifests/");
        let unknown = if is_manifest { ErrorCode::ManifestUnknown } else { ErrorCode::BlobUnknown };
        let (status, code) = self.status(unknown);
        let body = error_body(&code, &self.to_string());
        let size = match &self {
            Self::Range(error) => Some(error.size),
            _ => None,
        };
        let mut response = response::error(status, body, size, &request.method);
        if let Self::Unnamed { registry } = &self {
            response::challenge(&mut response, registry);
        }
        response
    }
}

fn namespace(asked: Option<&str>, configured: &[String]) -> String {
    let known = match configured {
        [] => "no registry is".to_owned(),
        [one] => format!("{one} is"),
        many => format!("{} are", many.join(", ")),
    };
    match asked {
        Some(asked) => format!("registry {asked} is not mirrored here; {known} (`registry.origins`)"),
        None => format!("the request names no registry (`ns`); {known} mirrored here"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_served_is_not_found() {
        let throttled = OriginError::Throttled { origin: "a".into(), retry_after: None };
        let denied = OriginError::Denied { origin: "a".into(), what: "b".into(), reason: "c".into() };
        for refusal in [
            Refusal::Origin(throttled),
            Refusal::Read(ReadError::Origin(denied)),
            Refusal::TooSlow { waited: Duration::from_secs(1) },
            Refusal::Open(OpenError::Shutdown),
        ] {
            assert_eq!(refusal.status(ErrorCode::BlobUnknown).0, StatusCode::NOT_FOUND, "{refusal}");
        }
    }

    #[test]
    fn an_unknown_registry_is_told_which_are_known() {
        let names = ["a".to_owned(), "b".to_owned()];
        assert_eq!(
            namespace(Some("c"), &names),
            "registry c is not mirrored here; a, b are (`registry.origins`)"
        );
        assert_eq!(
            namespace(None, &[]),
            "the request names no registry (`ns`); no registry is mirrored here"
        );
    }
}

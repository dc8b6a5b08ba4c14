//! Which part of the distribution API a request means (distribution-spec, "Endpoints").

use http::Method;
use url::form_urlencoded;

use super::error::ErrorCode;
use super::name::{NameError, Reference, RepositoryName};
use crate::content::{Digest, DigestError};

/// A request that the pull half of the specification knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub target: Target,
    /// The `ns` parameter: the registry that the client believes it talks to, percent-decoded. A key to look up,
    /// never an address to dial.
    pub namespace: Option<String>,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `/v2/`
    Base,
    /// `/v2/<name>/manifests/<tag or digest>`
    Manifest { name: RepositoryName, reference: Reference },
    /// `/v2/<name>/blobs/<digest>`
    Blob { name: RepositoryName, digest: Digest },
}

/// Why a request means nothing here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// 404. Tag lists, referrers and the catalog are among them: a client falls back (`facts/wire.md` section 3).
    #[error("this mirror serves /v2/, manifests and blobs only")]
    NotFound,
    /// 404: no such tag can exist.
    #[error("{0}")]
    Tag(NameError),
    /// 405.
    #[error("this mirror only answers GET and HEAD")]
    Method,
    /// 400.
    #[error("{0}")]
    Name(NameError),
    /// 400.
    #[error("{0}")]
    Digest(#[from] DigestError),
}

impl RouteError {
    /// The specification's code for it.
    #[must_use]
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::NotFound | Self::Method => ErrorCode::Unsupported,
            Self::Tag(_) => ErrorCode::ManifestUnknown,
            Self::Name(_) => ErrorCode::NameInvalid,
            Self::Digest(_) => ErrorCode::DigestInvalid,
        }
    }
}

impl Route {
    /// Reads a request's method, path and query.
    ///
    /// # Errors
    /// [`RouteError`], which says how to answer.
    pub fn parse(method: &Method, path: &str, query: Option<&str>) -> Result<Self, RouteError> {
        if !matches!(*method, Method::GET | Method::HEAD) {
            return Err(RouteError::Method);
        }
        let rest = path.strip_prefix("/v2").ok_or(RouteError::NotFound)?;
        let target = match rest {
            "" | "/" => Target::Base,
            _ => Target::parse(rest.strip_prefix('/').ok_or(RouteError::NotFound)?)?,
        };
        Ok(Self { target, namespace: query.and_then(namespace) })
    }
}

impl Target {
    /// Reads what follows `/v2/`. The last two segments decide, because a repository name may contain
    /// `manifests` or `blobs` itself.
    fn parse(path: &str) -> Result<Self, RouteError> {
        let mut segments = path.rsplitn(3, '/');
        let (Some(last), Some(kind), Some(name)) = (segments.next(), segments.next(), segments.next()) else {
            return Err(RouteError::NotFound);
        };
        if !matches!(kind, "manifests" | "blobs") {
            return Err(RouteError::NotFound);
        }
        let name = name.parse().map_err(RouteError::Name)?;
        Ok(match kind {
            "blobs" => Self::Blob { name, digest: last.parse()? },
            _ if last.contains(':') => Self::Manifest { name, reference: Reference::Digest(last.parse()?) },
            _ => Self::Manifest { name, reference: Reference::Tag(last.parse().map_err(RouteError::Tag)?) },
        })
    }
}

fn namespace(query: &str) -> Option<String> {
    let mut pairs = form_urlencoded::parse(query.as_bytes());
    pairs.find(|(key, _)| key == "ns").map(|(_, value)| value.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn get(path: &str) -> Result<Target, RouteError> {
        Route::parse(&Method::GET, path, None).map(|route| route.target)
    }

    #[test]
    fn the_routes_of_a_pull() {
        assert_eq!(get("/v2/"), Ok(Target::Base));
        assert_eq!(get("/v2"), Ok(Target::Base));
        let name: RepositoryName = "team/app".parse().unwrap();
        let tag = Reference::Tag("latest".parse().unwrap());
        let digest = Reference::Digest(DIGEST.parse().unwrap());
        assert_eq!(
            get("/v2/team/app/manifests/latest"),
            Ok(Target::Manifest { name: name.clone(), reference: tag })
        );
        assert_eq!(
            get(&format!("/v2/team/app/manifests/{DIGEST}")),
            Ok(Target::Manifest { name: name.clone(), reference: digest })
        );
        assert_eq!(
            get(&format!("/v2/team/app/blobs/{DIGEST}")),
            Ok(Target::Blob { name, digest: DIGEST.parse().unwrap() })
        );
        let nested = get(&format!("/v2/blobs/manifests/blobs/{DIGEST}")).unwrap();
        assert!(matches!(nested, Target::Blob { name, .. } if name.as_str() == "blobs/manifests"));
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert_eq!(get("/v1/"), Err(RouteError::NotFound));
        assert_eq!(get("/v2x"), Err(RouteError::NotFound));
        assert_eq!(get("/v2/team/app/tags/list"), Err(RouteError::NotFound));
        assert_eq!(get(&format!("/v2/team/app/referrers/{DIGEST}")), Err(RouteError::NotFound));
        assert_eq!(get("/v2/_catalog"), Err(RouteError::NotFound));
        let code = |path: &str| get(path).unwrap_err().code();
        assert_eq!(code("/v2/Team/manifests/latest"), ErrorCode::NameInvalid);
        assert_eq!(code("/v2/a/../b/manifests/latest"), ErrorCode::NameInvalid);
        assert_eq!(code("/v2/app/blobs/sha256:123"), ErrorCode::DigestInvalid);
        assert_eq!(code("/v2/app/manifests/sha256:123"), ErrorCode::DigestInvalid);
        assert_eq!(code("/v2/app/manifests/.hidden"), ErrorCode::ManifestUnknown);
        assert_eq!(Route::parse(&Method::POST, "/v2/app/blobs/uploads/", None), Err(RouteError::Method));
    }

    #[test]
    fn the_namespace_is_decoded() {
        let route = Route::parse(&Method::HEAD, "/v2/", Some("a=b&ns=reg.example.com%3A8443")).unwrap();
        assert_eq!(route.namespace.as_deref(), Some("reg.example.com:8443"));
    }

    proptest! {
        #[test]
        fn no_request_panics(path in ".{0,80}", query in ".{0,80}") {
            let _ = Route::parse(&Method::GET, &path, Some(&query));
            let _ = Route::parse(&Method::GET, &format!("/v2/{path}/blobs/{query}"), None);
            let _ = Route::parse(&Method::GET, &format!("/v2/{path}/manifests/{query}"), None);
        }
    }
}

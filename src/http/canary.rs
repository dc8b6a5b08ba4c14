//! Canaries: requests whose arrival proves that this node's containerd asks the mirror.
//!
//! `windlass doctor` and the startup taint have containerd pull `REGISTRY/windlass-canary/TOKEN`, an image that nobody
//! has, with a token that nobody else knows. Here its arrival is remembered, and answered with 404 at once: the pull
//! fails, as it should, and no registry is asked by us.
//! This file refuses to tell a good canary from a forged one: whoever reaches the mirror may send one.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use http::{Method, StatusCode, header, request};
use parking_lot::Mutex;

use crate::oci::{ErrorCode, error_body};

/// The first part of a canary's repository; the second is its token.
pub const REPOSITORY: &str = "windlass-canary";

/// Canaries remembered. Each doctor sends one per registry, and looks within seconds.
const REMEMBERED: usize = 64;

/// Longest token that is remembered: 128 bits in hexadecimal.
const TOKEN_BYTES_MAX: usize = 32;

/// The canaries that came, oldest first; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Canaries(Arc<Mutex<VecDeque<Seen>>>);

/// One canary.
#[derive(Clone, Debug)]
pub struct Seen {
    pub token: String,
    /// The registry that was meant (`ns`).
    pub registry: String,
    pub at: Instant,
}

/// The answer to a canary: status, content type and body.
pub type Answer = (StatusCode, &'static str, String);

impl Canaries {
    /// Remembers `request` and answers it, if it is a canary.
    #[must_use]
    pub fn answer(&self, request: &request::Parts) -> Option<Answer> {
        let rest = request.uri.path().strip_prefix("/v2/")?.strip_prefix(REPOSITORY)?;
        let (token, what) = rest.strip_prefix('/')?.split_once('/')?;
        let is_token = !token.is_empty()
            && token.len() <= TOKEN_BYTES_MAX
            && token.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if !is_token || !what.starts_with("manifests/") {
            return None;
        }
        self.remember(token, &namespace(request.uri.query().unwrap_or_default()));
        let body = match request.method {
            Method::HEAD => String::new(),
            _ => error_body(&ErrorCode::NameUnknown, "a canary: it arrived, and there is nothing behind it"),
        };
        Some((StatusCode::NOT_FOUND, "application/json", body))
    }

    fn remember(&self, token: &str, registry: &str) {
        let mut seen = self.0.lock();
        if seen.iter().any(|one| one.token == token) {
            return;
        }
        if seen.len() == REMEMBERED {
            seen.pop_front();
        }
        seen.push_back(Seen { token: token.to_owned(), registry: registry.to_owned(), at: Instant::now() });
    }

    /// Whether a canary with this token came.
    #[must_use]
    pub fn has(&self, token: &str) -> bool {
        self.0.lock().iter().any(|one| one.token == token)
    }

    /// All that are remembered.
    #[must_use]
    pub fn all(&self) -> Vec<Seen> {
        self.0.lock().iter().cloned().collect()
    }
}

/// The query's `ns`, decoded; empty when there is none.
fn namespace(query: &str) -> String {
    let mut pairs = url::form_urlencoded::parse(query.as_bytes());
    pairs.find(|(key, _)| key == "ns").map_or_else(String::new, |(_, value)| value.into_owned())
}

/// The reference that containerd is asked to pull.
#[must_use]
pub fn reference(registry: &str, token: &str) -> String {
    format!("{registry}/{REPOSITORY}/{token}:check")
}

/// A token that nobody else knows.
#[must_use]
pub fn token() -> String {
    hex::encode(rand::random::<[u8; TOKEN_BYTES_MAX / 2]>())
}

/// Makes `answer` a response.
pub fn response<B>(
    (status, content_type, body): Answer,
    into_body: impl FnOnce(String) -> B,
) -> http::Response<B> {
    let mut response = http::Response::new(into_body(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(method: Method, uri: &str) -> request::Parts {
        http::Request::builder().method(method).uri(uri).body(()).expect("a request").into_parts().0
    }

    #[test]
    fn a_canary_is_remembered_and_nothing_else_is() {
        let canaries = Canaries::default();
        let token = token();
        let path = format!("/v2/windlass-canary/{token}/manifests/check?ns=reg.example%3A5000");
        let (status, _, body) = canaries.answer(&parts(Method::GET, &path)).expect("a canary");
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert!(body.contains("NAME_UNKNOWN"), "{body}");
        assert!(canaries.answer(&parts(Method::HEAD, &path)).is_some_and(|(_, _, body)| body.is_empty()));
        assert!(canaries.has(&token));
        assert_eq!(canaries.all().len(), 1);
        assert_eq!(canaries.all()[0].registry, "reg.example:5000");
        for other in [
            "/v2/windlass-canary/manifests/check",
            "/v2/windlass-canary/UPPER/manifests/check",
            "/v2/team/windlass-canary/abc/manifests/check",
            "/v2/windlass-canary/abc/blobs/sha256:0",
        ] {
            assert_eq!(canaries.answer(&parts(Method::GET, other)), None, "{other}");
        }
    }

    #[test]
    fn only_the_latest_are_kept() {
        let canaries = Canaries::default();
        for number in 0..=REMEMBERED {
            let path = format!("/v2/windlass-canary/t{number}/manifests/check");
            assert!(canaries.answer(&parts(Method::HEAD, &path)).is_some());
        }
        assert_eq!(canaries.all().len(), REMEMBERED);
        assert!(!canaries.has("t0") && canaries.has("t1"));
    }
}

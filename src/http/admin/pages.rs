//! The pages of the admin face.

use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use serde::Serialize;

use super::readiness::Readiness;
use super::view::{Canary, Content, Peer, Stats};

/// Every page is small and whole before its headers go out.
pub type AdminBody = Full<Bytes>;

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";

/// What the node knows of itself: the running daemon, and a stand-in for tests.
pub trait Inspect: Send + Sync + 'static {
    /// Everything of [`Stats`] but the readiness, which the pages add.
    fn stats(&self) -> Stats;
    fn peers(&self) -> Vec<Peer>;
    /// May block.
    fn contents(&self) -> Vec<Content>;
    /// The canaries that came to the mirror lately.
    fn canaries(&self) -> Vec<Canary>;
    /// The metrics and their content type; nothing if a metric fails to write itself.
    fn metrics(&self) -> Option<(&'static str, String)>;
}

/// Answers the pages.
#[derive(Clone)]
pub struct Admin {
    node: Arc<dyn Inspect>,
    readiness: Readiness,
}

impl Admin {
    #[must_use]
    pub fn new(node: Arc<dyn Inspect>, readiness: Readiness) -> Self {
        Self { node, readiness }
    }

    /// The page for `request`. Its body is not read.
    pub async fn answer<B>(&self, request: Request<B>) -> Response<AdminBody> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut refusal = text(StatusCode::METHOD_NOT_ALLOWED, "this listener only reads\n");
            refusal.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
            return refusal;
        }
        match request.uri().path() {
            "/healthz" => text(StatusCode::OK, "ok\n"),
            "/readyz" => self.readyz(),
            "/metrics" => self.metrics(),
            "/v1/stats" => json(&self.stats()),
            "/v1/peers" => json(&self.node.peers()),
            "/v1/contents" => self.contents().await,
            "/v1/canaries" => json(&self.node.canaries()),
            _ => text(
                StatusCode::NOT_FOUND,
                "there are /metrics, /healthz, /readyz, /v1/stats, /v1/peers, /v1/contents and /v1/canaries\n",
            ),
        }
    }

    fn readyz(&self) -> Response<AdminBody> {
        match self.readiness.waiting_for() {
            missing if missing.is_empty() => text(StatusCode::OK, "ready\n"),
            missing => text(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("not ready: waits for {}\n", missing.join(", ")),
            ),
        }
    }

    fn metrics(&self) -> Response<AdminBody> {
        match self.node.metrics() {
            Some((kind, page)) => answer(StatusCode::OK, kind, page),
            None => text(StatusCode::INTERNAL_SERVER_ERROR, "a metric could not be written\n"),
        }
    }

    async fn contents(&self) -> Response<AdminBody> {
        let node = Arc::clone(&self.node);
        // It may read a small file for each content.
        match tokio::task::spawn_blocking(move || node.contents()).await {
            Ok(contents) => json(&contents),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }

    fn stats(&self) -> Stats {
        let waiting_for: Vec<_> = self.readiness.waiting_for().into_iter().map(str::to_owned).collect();
        Stats { ready: waiting_for.is_empty(), waiting_for, ..self.node.stats() }
    }
}

fn json(value: &impl Serialize) -> Response<AdminBody> {
    match serde_json::to_vec(value) {
        Ok(bytes) => answer(StatusCode::OK, JSON, bytes),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<AdminBody> {
    answer(status, TEXT, body)
}

fn answer(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<AdminBody> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::super::Condition;
    use super::*;

    struct Quiet;

    impl Inspect for Quiet {
        fn stats(&self) -> Stats {
            Stats { node: "a".into(), ..Stats::default() }
        }
        fn peers(&self) -> Vec<Peer> {
            Vec::new()
        }
        fn contents(&self) -> Vec<Content> {
            vec![Content { name: "sha256:0".into(), size: 7, ..Content::default() }]
        }
        fn canaries(&self) -> Vec<Canary> {
            vec![Canary { token: "abc".into(), ..Canary::default() }]
        }
        fn metrics(&self) -> Option<(&'static str, String)> {
            Some(("text/plain; version=0.0.4", "up 1\n".into()))
        }
    }

    async fn get(admin: &Admin, method: Method, path: &str) -> (StatusCode, String) {
        let request = Request::builder().method(method).uri(path).body(()).expect("a request");
        let response = admin.answer(request).await;
        let status = response.status();
        let bytes = response.into_body().collect().await.expect("a whole body").to_bytes();
        (status, String::from_utf8_lossy(&bytes).into_owned())
    }

    #[tokio::test]
    async fn readyz_says_why_not_until_it_is_ready() {
        let readiness = Readiness::default();
        let admin = Admin::new(Arc::new(Quiet), readiness.clone());
        readiness.report(Condition::ListenersBound);
        let (status, why) = get(&admin, Method::GET, "/readyz").await;
        assert_eq!(status, 503);
        assert_eq!(why, "not ready: waits for the store to be opened, the membership to be in sync\n");
        readiness.report(Condition::StoreOpen);
        readiness.report(Condition::MembershipSynced);
        assert_eq!(get(&admin, Method::GET, "/readyz").await.0, 200);
        let stats: Stats =
            serde_json::from_str(&get(&admin, Method::GET, "/v1/stats").await.1).expect("JSON");
        assert!(stats.ready && stats.node == "a");
    }

    #[tokio::test]
    async fn it_reads_and_never_writes() {
        let admin = Admin::new(Arc::new(Quiet), Readiness::default());
        assert_eq!(get(&admin, Method::GET, "/metrics").await, (StatusCode::OK, "up 1\n".into()));
        assert_eq!(get(&admin, Method::GET, "/healthz").await.0, 200);
        assert!(get(&admin, Method::GET, "/v1/contents").await.1.contains("\"size\":7"));
        assert!(get(&admin, Method::GET, "/v1/canaries").await.1.contains("\"token\":\"abc\""));
        assert_eq!(get(&admin, Method::POST, "/v1/fetch").await.0, 405);
        assert_eq!(get(&admin, Method::GET, "/v1/fetch").await.0, 404);
    }
}

//! The startup taint: a node that Karpenter made takes no pods until this has shown that pulls on it go through the
//! mirror, and takes them all the same when that does not come to be.
//!
//! Invariant: only the one taint is removed, by the key it is known under; the others stay as they are, whatever happens
//! to them meanwhile (the change carries the version of the node that was read). After the deadline the taint goes
//! whatever the canary says: a node that pulls from the registry is better than none.
//! This file refuses to add a taint. The service account needs `get` and `patch` on nodes, and nothing else.

use std::time::Duration;

use anyhow::Context;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::cli::kubernetes::ApiServer;

/// The taint's key. Karpenter is told of it under `startupTaints`.
pub(super) const KEY: &str = "windlass.dev/not-ready";

/// How long after its removal the taint is looked for again. Karpenter copies `startupTaints` onto a node once more
/// when it registers it, which is over minutes after the kubelet came up.
const GUARDED: Duration = Duration::from_secs(10 * 60);

/// Between two looks at a node whose taint is gone: 200 nodes that start at once make 10 requests in a second.
const GUARD_INTERVAL: Duration = Duration::from_secs(20);

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Remove it if it is there.
    Remove,
    Nothing,
    /// It will not come back.
    Done,
}

/// When the taint has to go. Times count from the start.
#[derive(Debug)]
pub(super) struct Gate {
    deadline: Duration,
    /// When it was first removed, or found to be missing.
    opened: Option<Duration>,
    looked: Duration,
}

impl Gate {
    pub(super) const fn new(deadline: Duration) -> Self {
        Self { deadline, opened: None, looked: Duration::ZERO }
    }

    /// `is_proven`: the mirror answers and a canary arrived.
    pub(super) fn step(&mut self, now: Duration, is_proven: bool) -> Step {
        match self.opened {
            None if is_proven || now >= self.deadline => Step::Remove,
            None => Step::Nothing,
            Some(opened) if now >= opened + GUARDED => Step::Done,
            Some(_) if now >= self.looked + GUARD_INTERVAL => Step::Remove,
            Some(_) => Step::Nothing,
        }
    }

    /// The node was looked at, and is without the taint now.
    pub(super) fn removed(&mut self, now: Duration) {
        self.opened.get_or_insert(now);
        self.looked = now;
    }

    /// Whether the node waits for it.
    pub(super) const fn is_shut(&self) -> bool {
        self.opened.is_none()
    }
}

/// This node, as the API server knows it.
#[derive(Debug)]
pub(super) struct NodeObject {
    server: ApiServer,
    path: String,
}

#[derive(Deserialize)]
struct Found {
    metadata: Metadata,
    spec: Spec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    resource_version: String,
}

#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    taints: Vec<Value>,
}

impl NodeObject {
    pub(super) fn new(server: ApiServer, name: &str) -> Self {
        Self { server, path: format!("/api/v1/nodes/{name}") }
    }

    /// Makes sure that the node is without the taint. True when it was there.
    pub(super) async fn untaint(&self) -> anyhow::Result<bool> {
        let answer = self.server.get(&self.path).await?;
        let found: Found = answer.json().await.context("the node is not understood")?;
        let Some(change) = without_taint(&found) else { return Ok(false) };
        self.server.patch(&self.path, &change).await?;
        Ok(true)
    }
}

/// The merge patch that takes the taint away; nothing when it is not there. The version makes the API server refuse it
/// when a taint came or went since.
fn without_taint(node: &Found) -> Option<Value> {
    let is_ours = |taint: &&Value| taint.get("key").and_then(Value::as_str) == Some(KEY);
    let others: Vec<_> = node.spec.taints.iter().filter(|taint| !is_ours(taint)).collect();
    (others.len() < node.spec.taints.len()).then(|| {
        json!({ "metadata": { "resourceVersion": node.metadata.resource_version }, "spec": { "taints": others } })
    })
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;

    use bytes::Bytes;
    use http::{Method, Request, Response, StatusCode};
    use http_body_util::{BodyExt, Full};
    use hyper::body::Incoming;
    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use parking_lot::Mutex;
    use url::Url;

    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn node(taints: Value) -> Found {
        serde_json::from_value(
            json!({ "metadata": { "resourceVersion": "7" }, "spec": { "taints": taints } }),
        )
        .expect("a node")
    }

    #[test]
    fn the_gate_opens_when_it_is_proven_and_at_the_deadline_all_the_same() {
        let mut gate = Gate::new(300 * S);
        assert_eq!(gate.step(S, false), Step::Nothing);
        assert_eq!(gate.step(2 * S, true), Step::Remove);
        let mut gate = Gate::new(300 * S);
        assert_eq!(gate.step(299 * S, false), Step::Nothing);
        assert_eq!(gate.step(300 * S, false), Step::Remove, "fails open");
        assert_eq!(gate.step(301 * S, false), Step::Remove, "until it is removed");
    }

    #[test]
    fn a_taint_that_comes_back_is_removed_for_a_while() {
        let mut gate = Gate::new(300 * S);
        gate.removed(10 * S);
        assert!(!gate.is_shut());
        assert_eq!(gate.step(15 * S, true), Step::Nothing);
        assert_eq!(gate.step(30 * S, false), Step::Remove, "it is looked for again");
        gate.removed(30 * S);
        assert_eq!(gate.step(40 * S, true), Step::Nothing);
        assert_eq!(gate.step(10 * S + GUARDED, true), Step::Done);
    }

    #[test]
    fn only_our_taint_goes_and_the_version_is_held() {
        let gpu = json!({ "key": "nvidia.com/gpu", "value": "true", "effect": "NoSchedule" });
        let ours = json!({ "key": KEY, "effect": "NoSchedule" });
        let change = without_taint(&node(json!([ours, gpu]))).expect("a change");
        assert_eq!(change["spec"]["taints"], json!([gpu]));
        assert_eq!(change["metadata"]["resourceVersion"], "7");
        assert_eq!(without_taint(&node(json!([gpu]))), None);
        assert_eq!(without_taint(&node(json!([ours]))).expect("a change")["spec"]["taints"], json!([]));
    }

    /// An API server with one node, which may forbid or refuse the first change.
    #[derive(Clone)]
    struct Server {
        node: Arc<Mutex<Value>>,
        refusals: Arc<Mutex<Vec<StatusCode>>>,
    }

    impl Server {
        async fn answer(self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
            assert_eq!(request.uri().path(), "/api/v1/nodes/gpu-1");
            assert_eq!(request.headers()["authorization"], "Bearer secret");
            let is_patch = request.method() == Method::PATCH;
            let body = request.into_body().collect().await.expect("a body").to_bytes();
            let mut response = Response::new(Full::default());
            if is_patch {
                if let Some(refusal) = self.refusals.lock().pop() {
                    *response.status_mut() = refusal;
                    return Ok(response);
                }
                let change: Value = serde_json::from_slice(&body).expect("JSON");
                self.node.lock()["spec"]["taints"] = change["spec"]["taints"].clone();
            }
            *response.body_mut() = Full::from(self.node.lock().to_string());
            Ok(response)
        }

        /// Serves on the loopback, until the test ends.
        async fn start(self) -> Url {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = listener.local_addr().expect("it is bound");
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let server = self.clone();
                    let service = service_fn(move |request| server.clone().answer(request));
                    tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
                }
            });
            format!("http://{address}").parse().expect("a URL")
        }
    }

    #[tokio::test]
    async fn an_api_server_is_asked_for_one_change_and_its_refusals_are_explained() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let gpu = json!({ "key": "nvidia.com/gpu", "effect": "NoSchedule" });
        let taints = json!([gpu, { "key": KEY, "effect": "NoSchedule" }]);
        let server = Server {
            node: Arc::new(Mutex::new(
                json!({ "metadata": { "resourceVersion": "7" }, "spec": { "taints": taints } }),
            )),
            refusals: Arc::new(Mutex::new(vec![StatusCode::CONFLICT, StatusCode::FORBIDDEN])),
        };
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let token = scratch.path().join("token");
        std::fs::write(&token, "secret\n").expect("writable");
        let (_, issued) = crate::transport::tls::Authority::create("c1", S).expect("a CA");
        let url = server.clone().start().await;
        let api = ApiServer::new(url, issued.certificate_pem.as_bytes(), token).expect("a client");
        let node = NodeObject::new(api, "gpu-1");

        let forbidden = node.untaint().await.expect_err("RBAC says no").to_string();
        assert!(forbidden.contains("may not patch"), "{forbidden}");
        let conflict = node.untaint().await.expect_err("changed in between").to_string();
        assert!(conflict.contains("tried again"), "{conflict}");
        assert!(node.untaint().await.expect("the third try"));
        assert_eq!(server.node.lock()["spec"]["taints"], json!([gpu]));
        assert!(!node.untaint().await.expect("nothing to do"));
    }
}

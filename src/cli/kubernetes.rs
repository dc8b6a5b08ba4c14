//! The API server, as a pod reaches it: two environment variables, an authority and a token.
//!
//! Invariant: the token goes to that server alone, over TLS that the cluster's authority vouches for, and follows no
//! redirect. This file refuses to know what is asked.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use http::{Method, StatusCode, header};
use reqwest::{Client, Response};
use serde_json::Value;
use url::Url;

/// Where Kubernetes puts what a pod needs to speak to it.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// One call. The API server answers in milliseconds; behind it is another attempt.
const CALL_DEADLINE: Duration = Duration::from_secs(5);

/// Of the API server's words in an error.
const MESSAGE_CHARACTERS_MAX: usize = 300;

/// Why the API server did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    #[error("cannot read the token {}: {source}", path.display())]
    Token { path: PathBuf, source: std::io::Error },
    #[error("{0} is no path of the API server")]
    Path(String),
    #[error("the API server does not answer: {0}")]
    NoAnswer(#[from] reqwest::Error),
    #[error("the service account may not {verb} {path}: give it the RBAC that the chart renders for this")]
    Forbidden { verb: &'static str, path: String },
    /// It is there already, or somebody else changed it.
    #[error("somebody else changed it in between; it is tried again")]
    Conflict,
    /// Its own words: an admission policy says here what it minds.
    #[error("the API server answers {status}: {message}")]
    Status { status: StatusCode, message: String },
}

/// Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct ApiServer {
    client: Client,
    url: Url,
    token: PathBuf,
}

impl ApiServer {
    /// The one that Kubernetes names in `environment`, for `option`, which needs it.
    pub(super) fn in_cluster(
        option: &str,
        environment: impl Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Self> {
        let outside = || {
            format!(
                "{option} works inside a pod: KUBERNETES_SERVICE_HOST is set there, and {ACCOUNT} mounted; \
                 give the pod a service account token"
            )
        };
        let host = environment("KUBERNETES_SERVICE_HOST").with_context(outside)?;
        let port = environment("KUBERNETES_SERVICE_PORT").unwrap_or_else(|| "443".into());
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let account = Path::new(ACCOUNT);
        let authority = std::fs::read(account.join("ca.crt")).with_context(outside)?;
        let server = format!("https://{host}:{port}").parse().context("the API server's address")?;
        Self::new(server, &authority, account.join("token"))
    }

    pub(super) fn new(url: Url, authority: &[u8], token: PathBuf) -> anyhow::Result<Self> {
        let authorities =
            reqwest::Certificate::from_pem_bundle(authority).context("the API server's authority")?;
        let client = Client::builder()
            .timeout(CALL_DEADLINE)
            .no_proxy()
            .tls_certs_only(authorities)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .context("cannot set up TLS for the API server")?;
        Ok(Self { client, url, token })
    }

    pub(super) async fn get(&self, path: &str) -> Result<Response, CallError> {
        self.send(Method::GET, path, "application/json", String::new()).await
    }

    /// A merge patch (RFC 7386).
    pub(super) async fn patch(&self, path: &str, change: &Value) -> Result<Response, CallError> {
        self.send(Method::PATCH, path, "application/merge-patch+json", change.to_string()).await
    }

    pub(super) async fn post(&self, path: &str, object: &Value) -> Result<Response, CallError> {
        self.send(Method::POST, path, "application/json", object.to_string()).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        kind: &str,
        body: String,
    ) -> Result<Response, CallError> {
        // Read each time: the kubelet replaces it every hour.
        let token = std::fs::read_to_string(&self.token)
            .map_err(|source| CallError::Token { path: self.token.clone(), source })?;
        let url = self.url.join(path).map_err(|_| CallError::Path(path.to_owned()))?;
        let verb = verb(&method);
        let request = self.client.request(method, url).bearer_auth(token.trim());
        let answer = request.header(header::CONTENT_TYPE, kind).body(body).send().await?;
        match answer.status() {
            status if status.is_success() => Ok(answer),
            StatusCode::FORBIDDEN => Err(CallError::Forbidden { verb, path: path.to_owned() }),
            StatusCode::CONFLICT => Err(CallError::Conflict),
            status => Err(CallError::Status { status, message: words(answer).await }),
        }
    }
}

/// What an error of the API server says for people.
async fn words(answer: Response) -> String {
    let said: Value = answer.json().await.unwrap_or_default();
    let message = said.get("message").and_then(Value::as_str).unwrap_or("without a word");
    message.chars().take(MESSAGE_CHARACTERS_MAX).collect()
}

/// RBAC's word for it.
fn verb(method: &Method) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::PATCH => "patch",
        _ => "get",
    }
}

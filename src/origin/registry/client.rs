//! How one registry, and the hosts it points to, are reached.
//!
//! Invariant: the registry's own host is reached as configured; any other host only at public addresses. Messages
//! never carry a URL's query: a presigned one is a credential.

use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Method};
use reqwest::Response;
use url::Url;

use super::address::{Guard, GuardedResolver};
use super::config::{ConfigError, RegistryConfig};
use crate::origin::care::Care;
use crate::origin::{Kind, OriginError, OriginMetrics, trust};

/// How we introduce ourselves to registries. A mirror that hears it is asked by a windlass, which would go round in
/// circles.
pub const AGENT: &str = concat!("windlass/", env!("CARGO_PKG_VERSION"));

/// Idle connections kept per host: about what a content's chunks use at a time.
const MAX_IDLE_CONNECTIONS: usize = 64;

/// Detects a peer that vanished without a word; well under the progress timeout's effect on an idle connection.
const TCP_KEEPALIVE: Duration = Duration::from_secs(15);

/// The same for an HTTP/2 connection, of which there is one: found out well within a pull's first-byte deadline.
const HTTP2_PING_INTERVAL: Duration = Duration::from_secs(10);
const HTTP2_PING_TIMEOUT: Duration = Duration::from_secs(4);

/// Most of a body that is read only to keep its connection alive, or to learn why a request failed.
const MAX_ASIDE_BYTES: usize = 64 << 10;

/// Sends single requests: no redirects, no authentication, no interpretation.
#[derive(Debug)]
pub(super) struct Client {
    name: String,
    endpoint: Url,
    /// For the bytes of blobs from the registry's own host.
    own: reqwest::Client,
    /// For everything else from there: small questions, many at a time.
    own_small: reqwest::Client,
    /// For hosts that the registry names.
    foreign: reqwest::Client,
    guard: Guard,
    care: Arc<Care>,
    first_byte_timeout: Duration,
    progress_timeout: Duration,
    metrics: OriginMetrics,
}

impl Client {
    pub(super) fn new(config: &RegistryConfig, metrics: OriginMetrics) -> Result<Self, ConfigError> {
        let endpoint = config.endpoint_url()?;
        let guard = Guard::of(&endpoint);
        let own = build(config, &endpoint, Http::One, None)?;
        let own_small = build(config, &endpoint, Http::OneOrTwo, None)?;
        let foreign = build(config, &endpoint, Http::One, Some(GuardedResolver(guard)))?;
        let care = Care::new(metrics.clone(), config.progress_timeout());
        Ok(Self {
            name: config.name.clone(),
            endpoint,
            own,
            own_small,
            foreign,
            guard,
            care,
            first_byte_timeout: config.first_byte_timeout(),
            progress_timeout: config.progress_timeout(),
            metrics,
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) const fn metrics(&self) -> &OriginMetrics {
        &self.metrics
    }

    pub(super) const fn care(&self) -> &Arc<Care> {
        &self.care
    }

    pub(super) const fn progress_timeout(&self) -> Duration {
        self.progress_timeout
    }

    /// The URL of a path below the endpoint.
    pub(super) fn url(&self, path: &str) -> Result<Url, OriginError> {
        let text = format!("{}/{path}", self.endpoint.as_str().trim_end_matches('/'));
        Url::parse(&text)
            .map_err(|error| OriginError::Ours(format!("cannot build a URL for {path}: {error}")))
    }

    /// Whether a credential for this registry may go to `url`: same scheme, host and port.
    pub(super) fn is_own(&self, url: &Url) -> bool {
        url.origin() == self.endpoint.origin()
    }

    /// Whether the registry is spoken to without TLS, because its endpoint says so.
    pub(super) fn is_plain(&self) -> bool {
        self.endpoint.scheme() == "http"
    }

    /// Sends one request and waits for the response's headers.
    pub(super) async fn send(
        &self,
        kind: Kind,
        method: Method,
        url: &Url,
        headers: HeaderMap,
    ) -> Result<Response, OriginError> {
        self.send_with(kind, method, url, headers, None).await
    }

    /// Posts a form, and waits for the response's headers.
    pub(super) async fn post_form(&self, url: &Url, form: &str) -> Result<Response, OriginError> {
        let form_type = HeaderValue::from_static("application/x-www-form-urlencoded");
        let headers = HeaderMap::from_iter([(CONTENT_TYPE, form_type)]);
        self.send_with(Kind::Token, Method::POST, url, headers, Some(form.to_owned())).await
    }

    async fn send_with(
        &self,
        kind: Kind,
        method: Method,
        url: &Url,
        headers: HeaderMap,
        body: Option<String>,
    ) -> Result<Response, OriginError> {
        let is_same_host = url.host() == self.endpoint.host();
        if !is_same_host {
            self.check_foreign(url)?;
        }
        let client = match kind {
            _ if !is_same_host => &self.foreign,
            Kind::Content => &self.own,
            Kind::Metadata | Kind::Token => &self.own_small,
        };
        let mut request = client.request(method, url.clone()).headers(headers);
        if let Some(body) = body {
            request = request.body(body);
        }
        match tokio::time::timeout(self.first_byte_timeout, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => {
                let reason = trust::with_cure(cause(error), "registry.origins.ca_file");
                Err(self.failed(format!("{}: {reason}", host(url))))
            }
            Err(_) => {
                let waited = self.first_byte_timeout.as_millis();
                Err(self.failed(format!("{} did not answer within {waited} ms", host(url))))
            }
        }
    }

    /// Reads a short body whole, at most `limit` bytes.
    pub(super) async fn read_whole(&self, response: Response, limit: usize) -> Result<Bytes, OriginError> {
        let mut body = response.bytes_stream();
        let mut whole = Vec::new();
        loop {
            let piece = match tokio::time::timeout(self.progress_timeout, body.next()).await {
                Ok(None) => return Ok(whole.into()),
                Ok(Some(Ok(piece))) => piece,
                Ok(Some(Err(error))) => return Err(self.failed(format!("connection lost: {}", cause(error)))),
                Err(_) => return Err(self.failed("its answer stalled".to_owned())),
            };
            self.metrics.received(Kind::Metadata, piece.len() as u64);
            whole.extend_from_slice(&piece);
            if whole.len() > limit {
                return Err(self.failed(format!("its answer is longer than {limit} bytes")));
            }
        }
    }

    /// Reads what a body of no interest has to say, if it is short: its connection can be used again, and an
    /// error's text can be quoted.
    pub(super) async fn read_aside(&self, response: Response) -> Bytes {
        self.read_whole(response, MAX_ASIDE_BYTES).await.unwrap_or_default()
    }

    pub(super) fn failed(&self, reason: String) -> OriginError {
        OriginError::Failed { origin: self.name.clone(), reason }
    }

    fn check_foreign(&self, url: &Url) -> Result<(), OriginError> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(self.failed(format!("it points to a {}: address", url.scheme())));
        }
        if self.guard.forbids(url) {
            return Err(self.failed(format!("it points to {}, which may not be asked", host(url))));
        }
        Ok(())
    }
}

/// The host and port, for messages: the rest of a URL may be secret.
pub(super) fn host(url: &Url) -> String {
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}{port}", url.host_str().unwrap_or("no host"))
}

/// The innermost cause, which is what tells "connection refused" from "unknown certificate authority".
pub(super) fn cause(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut innermost = error.source();
    while let Some(deeper) = innermost.and_then(std::error::Error::source) {
        innermost = Some(deeper);
    }
    innermost.map_or_else(|| error.to_string(), ToString::to_string)
}

/// Which versions of HTTP a client offers.
enum Http {
    /// Ranges want connections side by side, which HTTP/2 would put on one: eight at once take up to twice as long
    /// (`cargo bench --bench origin`).
    One,
    /// The registry chooses (ALPN).
    OneOrTwo,
}

fn build(
    config: &RegistryConfig,
    endpoint: &Url,
    http: Http,
    resolver: Option<GuardedResolver>,
) -> Result<reqwest::Client, ConfigError> {
    let mut headers = HeaderMap::new();
    // Digests and ranges are of the bytes as stored.
    headers.insert(http::header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let mut builder = reqwest::Client::builder()
        .user_agent(AGENT)
        .default_headers(headers)
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(config.connect_timeout())
        .tcp_keepalive(TCP_KEEPALIVE)
        .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS);
    builder = match http {
        Http::One => builder.http1_only(),
        // One connection carries every question: one that died without a word must not take them all with it.
        Http::OneOrTwo => builder
            .http2_keep_alive_interval(HTTP2_PING_INTERVAL)
            .http2_keep_alive_timeout(HTTP2_PING_TIMEOUT)
            .http2_keep_alive_while_idle(true),
    };
    if Guard::of(endpoint).is_at_home() {
        // A proxy's loopback is not ours.
        builder = builder.no_proxy();
    }
    if let Some(resolver) = resolver {
        builder = builder.dns_resolver(resolver);
    }
    let builder = match &config.ca_file {
        Some(path) => {
            let failed = |reason| ConfigError::Ca { name: config.name.clone(), path: path.clone(), reason };
            let pem = trust::read(path).map_err(failed)?;
            let certificates =
                reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| failed(cause(error)))?;
            builder.tls_certs_merge(certificates)
        }
        None => builder,
    };
    builder.build().map_err(|error| ConfigError::Tls { name: config.name.clone(), reason: cause(error) })
}

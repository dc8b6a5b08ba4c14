//! A registry on loopback that answers as a test tells it, and remembers what it was asked.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::{Registry, RegistryConfig, RegistryOrigin};
use crate::content::RangeHeader;
use crate::origin::Metrics;

/// One request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    /// Path and query.
    pub target: String,
    pub headers: HeaderMap,
    pub body: String,
    pub version: http::Version,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

/// What to answer.
#[derive(Clone, Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Bytes,
    /// Close the connection after this many bytes of the body.
    pub cut: Option<usize>,
    /// Pause after each eighth of the body.
    pub pause: Duration,
}

impl Reply {
    pub fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Bytes::new(), cut: None, pause: Duration::ZERO }
    }

    pub fn ok(body: impl Into<Bytes>) -> Self {
        Self { body: body.into(), ..Self::status(200) }
    }

    /// `bytes`, or the range of them that was asked for.
    pub fn ranged(seen: &Seen, bytes: &Bytes) -> Self {
        let header = seen.header("range").and_then(RangeHeader::parse);
        let Some(range) = header.and_then(|header| header.resolve(bytes.len() as u64).ok()) else {
            return Self::ok(bytes.clone());
        };
        let (start, end) = (usize::try_from(range.start()).unwrap(), usize::try_from(range.end()).unwrap());
        Self { body: bytes.slice(start..end), ..Self::status(206) }
            .with("content-range", format!("bytes {start}-{}/{}", end - 1, bytes.len()))
    }

    pub fn redirect(to: String) -> Self {
        Self::status(307).with("location", to)
    }

    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn into_response(
        self,
        is_head: bool,
    ) -> Response<StreamBody<stream::BoxStream<'static, io::Result<Frame<Bytes>>>>> {
        let mut response = Response::builder().status(self.status);
        for (name, value) in &self.headers {
            response = response.header(*name, value);
        }
        if !self.headers.iter().any(|(name, _)| *name == "content-length") {
            response = response.header("content-length", self.body.len());
        }
        let sent = self.body.slice(..self.cut.unwrap_or(self.body.len()));
        let pause = self.pause;
        let step = if pause.is_zero() { sent.len() } else { sent.len().div_ceil(8) }.max(1);
        let starts = if is_head { 0..0 } else { 0..sent.len() }.step_by(step);
        let data = stream::iter(starts).then(move |start| {
            let piece = sent.slice(start..sent.len().min(start + step));
            async move {
                tokio::time::sleep(pause).await;
                Ok(Frame::data(piece))
            }
        });
        let is_cut = !is_head && self.cut.is_some();
        let cut = stream::iter(is_cut.then_some(())).then(|()| async {
            // What was sent before must be on its way first.
            tokio::time::sleep(Duration::from_millis(20)).await;
            Err(io::Error::other("cut"))
        });
        response.body(StreamBody::new(data.chain(cut).boxed())).unwrap()
    }
}

/// The running registry.
#[derive(Clone, Debug)]
pub struct Stub {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Stub {
    /// Starts one; it lives as long as the test's runtime.
    pub async fn start(answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::listen(None, answer).await
    }

    /// Starts one that speaks TLS.
    pub async fn start_tls(
        config: rustls::ServerConfig,
        answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::listen(Some(TlsAcceptor::from(Arc::new(config))), answer).await
    }

    async fn listen(
        tls: Option<TlsAcceptor>,
        answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stub = Self { address: listener.local_addr().unwrap(), seen: Arc::default() };
        let (seen, answer) = (Arc::clone(&stub.seen), Arc::new(answer));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (seen, answer, tls) = (Arc::clone(&seen), Arc::clone(&answer), tls.clone());
                let service = service_fn(move |request: Request<Incoming>| {
                    let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                    async move { Ok::<_, Infallible>(Self::serve(request, &seen, &*answer).await) }
                });
                tokio::spawn(async move {
                    let http = http1::Builder::new();
                    match tls {
                        None => drop(http.serve_connection(TokioIo::new(stream), service).await),
                        Some(tls) => {
                            let Ok(stream) = tls.accept(stream).await else { return };
                            if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
                                let http = http2::Builder::new(TokioExecutor::new());
                                drop(http.serve_connection(TokioIo::new(stream), service).await);
                            } else {
                                drop(http.serve_connection(TokioIo::new(stream), service).await);
                            }
                        }
                    }
                });
            }
        });
        stub
    }

    async fn serve(
        request: Request<Incoming>,
        seen: &Mutex<Vec<Seen>>,
        answer: &(impl Fn(&Seen) -> Reply + ?Sized),
    ) -> Response<StreamBody<stream::BoxStream<'static, io::Result<Frame<Bytes>>>>> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let this = Seen {
            method: parts.method.to_string(),
            target: parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
            version: parts.version,
            headers: parts.headers,
            body: String::from_utf8_lossy(&body).into_owned(),
        };
        seen.lock().push(this.clone());
        answer(&this).into_response(this.method == "HEAD")
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().clone()
    }

    /// Requests whose path and query contain `part`.
    pub fn count(&self, part: &str) -> usize {
        self.seen.lock().iter().filter(|seen| seen.target.contains(part)).count()
    }

    pub fn config(&self) -> RegistryConfig {
        RegistryConfig {
            name: "reg.example.com".into(),
            endpoint: Some(self.url("/").parse().unwrap()),
            ..RegistryConfig::default()
        }
    }

    pub fn registry(&self) -> Arc<Registry> {
        registry(self.config())
    }
}

pub fn registry(config: RegistryConfig) -> Arc<Registry> {
    let origin = RegistryOrigin::new(vec![config], &Metrics::default()).unwrap();
    Arc::clone(origin.only().unwrap())
}

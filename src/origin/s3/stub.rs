//! An S3 in memory for tests: HEAD, ranged GET with `If-Match`, `ListObjectsV2` in pages of three, faults on demand.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use aws_credential_types::Credentials;
use aws_smithy_http_client::tls;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_runtime_api::client::dns::{DnsFuture, ResolveDns};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpListener;

use super::{Client, S3Config, S3Origin};
use crate::content::RangeHeader;
use crate::origin::Metrics;
use crate::origin::access::Access;
use crate::origin::spread::Spread;

const PAGE: usize = 3;

/// What goes wrong with the next GET of a path.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// A status and an S3 error code.
    Refuse(u16, &'static str),
    /// The connection breaks after this many bytes of the body.
    Short(usize),
    /// No more bytes after this many.
    Stall(usize),
    IgnoreRange,
    IgnoreIfMatch,
    /// The byte at this offset of the object is wrong.
    Corrupt(usize),
}

impl Fault {
    /// Whether it can be seen in the answer to `request`.
    fn strikes(self, request: &Request<Incoming>) -> bool {
        let Self::Corrupt(at) = self else { return true };
        let range = header(request.headers(), "range").and_then(RangeHeader::parse);
        let range = range.and_then(|range| range.resolve(u64::MAX).ok());
        range.is_none_or(|range| range.start() <= at as u64 && (at as u64) < range.end())
    }
}

/// A resolver that knows one answer.
#[derive(Debug)]
struct Fixed(Vec<IpAddr>);

impl ResolveDns for Fixed {
    fn resolve_dns<'a>(&'a self, _: &'a str) -> DnsFuture<'a> {
        DnsFuture::ready(Ok(self.0.clone()))
    }
}

type StubBody = BoxBody<Bytes, std::io::Error>;

#[derive(Default)]
struct State {
    objects: BTreeMap<(String, String), (Bytes, String)>,
    /// What else HEAD says of an object.
    said: BTreeMap<String, Vec<(String, String)>>,
    /// What `GetObjectAttributes` answers.
    attributes: BTreeMap<String, String>,
    faults: Vec<(String, Fault)>,
    /// Names in whose signature nothing may be read.
    refused: Vec<&'static str>,
    requests: Vec<String>,
    /// Connections by the address that they came to.
    reached: BTreeMap<IpAddr, usize>,
}

/// A running stub; it stops with the test's runtime.
#[derive(Clone)]
pub(crate) struct Stub {
    state: Arc<Mutex<State>>,
    port: u16,
}

impl Stub {
    pub(crate) async fn start() -> Self {
        Self::start_on("127.0.0.1:0").await
    }

    pub(crate) async fn start_on(address: &str) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let stub = Self { state: Arc::default(), port: listener.local_addr().unwrap().port() };
        let serving = stub.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let stub = serving.clone();
                let here = stream.local_addr().unwrap().ip();
                *stub.state.lock().reached.entry(here).or_default() += 1;
                let service = service_fn(move |request| {
                    let stub = stub.clone();
                    async move { Ok::<_, std::convert::Infallible>(stub.answer(&request)) }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        stub
    }

    /// Unsigned, because tests must not depend on the environment's credentials.
    pub(crate) fn config(&self) -> S3Config {
        S3Config {
            buckets: vec!["models".to_owned()].try_into().unwrap(),
            endpoint: Some(format!("http://127.0.0.1:{}/", self.port).parse().unwrap()),
            region: Some("us-east-1".into()),
            path_style: true,
            anonymous: true,
            ..S3Config::default()
        }
    }

    pub(crate) fn origin(&self) -> S3Origin {
        S3Origin::new(self.config(), &Metrics::default()).unwrap()
    }

    /// What a process sees of it that has the credentials called `signer`, where callers' rights count.
    pub(crate) async fn origin_of(&self, signer: &str) -> S3Origin {
        let config = S3Config { access: Access::Caller, ..self.config() };
        let credentials = Credentials::new(signer, "secret", None, None, "test");
        let client = super::connect(&config, None).await;
        let signed = client.config().to_builder().credentials_provider(credentials).build();
        S3Origin::with_client(config, Client::from_conf(signed), &Metrics::default())
    }

    /// What a process sees of it for which each of its names has `addresses`.
    pub(crate) async fn origin_at(&self, name: &str, addresses: Vec<IpAddr>) -> S3Origin {
        let endpoint = format!("http://{name}:{}/", self.port).parse().unwrap();
        let config = S3Config { endpoint: Some(endpoint), ..self.config() };
        let http = aws_smithy_http_client::Builder::new()
            .tls_provider(tls::Provider::Rustls(CryptoMode::AwsLc))
            .build_with_resolver(Spread::over(Fixed(addresses)));
        let client = super::connect(&config, None).await;
        let spread = client.config().to_builder().http_client(http).build();
        S3Origin::with_client(config, Client::from_conf(spread), &Metrics::default())
    }

    /// Connections so far, by the address that they came to.
    pub(crate) fn reached(&self) -> BTreeMap<IpAddr, usize> {
        self.state.lock().reached.clone()
    }

    /// What nobody may read any more whose requests `signer` signed, or may again.
    pub(crate) fn refuse(&self, signer: &'static str, is_refused: bool) {
        let mut state = self.state.lock();
        state.refused.retain(|refused| *refused != signer);
        if is_refused {
            state.refused.push(signer);
        }
    }

    pub(crate) fn put(&self, bucket: &str, key: &str, bytes: Bytes) {
        let etag = format!("\"{}\"", blake3::hash(&bytes).to_hex());
        self.state.lock().objects.insert((bucket.into(), key.into()), (bytes, etag));
    }

    /// HEAD of `path` answers with this header too.
    pub(crate) fn say(&self, path: &str, name: &str, value: &str) {
        self.state.lock().said.entry(path.into()).or_default().push((name.into(), value.into()));
    }

    /// `GetObjectAttributes` of `path` answers with this document; without one it is refused.
    pub(crate) fn tell_attributes(&self, path: &str, xml: &str) {
        self.state.lock().attributes.insert(path.into(), xml.into());
    }

    /// The next GET of `path` meets `fault`.
    pub(crate) fn fault(&self, path: &str, fault: Fault) {
        self.state.lock().faults.push((path.into(), fault));
    }

    /// `METHOD path?query [range] [if-match etag]` of every request so far.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.state.lock().requests.clone()
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<StubBody> {
        let mut state = self.state.lock();
        let path = request.uri().path().to_owned();
        let query = request.uri().query().unwrap_or_default();
        state.requests.push(log_line(request));
        let (bucket, key) = path[1..].split_once('/').unwrap_or_else(|| (&path[1..], ""));
        let signer = |name: &&str| query.contains(&format!("X-Amz-Credential={name}%2F"));
        if state.refused.iter().any(signer) {
            return refuse(403, "AccessDenied");
        }
        if key.is_empty() && query.contains("list-type=2") {
            return state.list(bucket, query);
        }
        if query.contains("attributes") {
            let told = state.attributes.get(&path).cloned();
            return told.map_or_else(|| refuse(403, "AccessDenied"), |xml| Response::new(full(xml.into())));
        }
        if key.is_empty() && request.method() == Method::HEAD {
            let exists = state.objects.keys().any(|(name, _)| name == bucket);
            return if exists { Response::new(empty()) } else { refuse(404, "NoSuchBucket") };
        }
        let strikes = |(at, fault): &(String, Fault)| *at == path && fault.strikes(request);
        let fault = match state.faults.iter().position(strikes) {
            Some(index) if request.method() == Method::GET => Some(state.faults.remove(index).1),
            _ => None,
        };
        if let Some(Fault::Refuse(status, code)) = fault {
            return refuse(status, code);
        }
        let Some((bytes, etag)) = state.objects.get(&(bucket.into(), key.into())).cloned() else {
            return refuse(404, "NoSuchKey");
        };
        let wrong = header(request.headers(), "if-match").is_some_and(|wanted| wanted != etag);
        if wrong && !matches!(fault, Some(Fault::IgnoreIfMatch)) {
            return refuse(412, "PreconditionFailed");
        }
        state.object(request, bytes, &etag, fault)
    }
}

impl State {
    fn object(
        &self,
        request: &Request<Incoming>,
        bytes: Bytes,
        etag: &str,
        fault: Option<Fault>,
    ) -> Response<StubBody> {
        let size = bytes.len();
        let mut response = Response::builder()
            .header("etag", etag)
            .header("content-type", "binary/octet-stream")
            .header("last-modified", "Wed, 12 Oct 2022 17:50:00 GMT")
            .header("x-amz-meta-flavour", "plain");
        if request.method() == Method::HEAD {
            for (name, value) in self.said.get(request.uri().path()).into_iter().flatten() {
                response = response.header(name, value);
            }
            return response.header("content-length", size).body(empty()).unwrap();
        }
        let range = header(request.headers(), "range").and_then(RangeHeader::parse);
        let bytes = match fault {
            Some(Fault::Corrupt(at)) => {
                let mut wrong = bytes.to_vec();
                wrong[at] ^= 1;
                wrong.into()
            }
            _ => bytes,
        };
        let body = match range.filter(|_| !matches!(fault, Some(Fault::IgnoreRange))) {
            Some(range) => {
                let range = range.resolve(size as u64).unwrap();
                let last = range.end() - 1;
                response = response
                    .status(StatusCode::PARTIAL_CONTENT)
                    .header("content-range", format!("bytes {}-{last}/{size}", range.start()));
                bytes.slice(usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap())
            }
            None => bytes,
        };
        response.header("content-length", body.len()).body(faulty(body, fault)).unwrap()
    }

    fn list(&self, bucket: &str, query: &str) -> Response<StubBody> {
        let query: BTreeMap<_, _> = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        let prefix = query.get("prefix").map_or("", String::as_str);
        let after = query.get("continuation-token").or_else(|| query.get("start-after"));
        let after = after.map_or("", String::as_str);
        let all: Vec<_> = self
            .objects
            .iter()
            .filter(|((b, key), _)| b == bucket && key.starts_with(prefix) && key.as_str() > after)
            .collect();
        let mut xml = String::from("<ListBucketResult>");
        for ((_, key), (bytes, etag)) in all.iter().take(PAGE) {
            let etag = etag.replace('"', "&quot;");
            let size = bytes.len();
            let at = "2022-10-12T17:50:00.000Z";
            let _ = write!(
                xml,
                "<Contents><Key>{key}</Key><Size>{size}</Size><ETag>{etag}</ETag>\
                 <LastModified>{at}</LastModified></Contents>"
            );
        }
        if all.len() > PAGE {
            let ((_, last), _) = all[PAGE - 1];
            let _ = write!(
                xml,
                "<IsTruncated>true</IsTruncated><NextContinuationToken>{last}</NextContinuationToken>"
            );
        }
        xml.push_str("</ListBucketResult>");
        Response::new(full(xml.into()))
    }
}

fn faulty(bytes: Bytes, fault: Option<Fault>) -> StubBody {
    match fault {
        Some(Fault::Short(n)) => {
            let first = stream::iter([Ok(Frame::data(bytes.slice(..n.min(bytes.len()))))]);
            // What was sent before must be on its way first.
            let broken = stream::once(tokio::time::sleep(Duration::from_millis(20)))
                .map(|()| Err(std::io::Error::other("cut")));
            BodyExt::boxed(StreamBody::new(first.chain(broken)))
        }
        Some(Fault::Stall(n)) => {
            let first = stream::iter([Ok(Frame::data(bytes.slice(..n.min(bytes.len()))))]);
            let never = stream::once(tokio::time::sleep(Duration::from_secs(3600)))
                .map(|()| Err(std::io::Error::other("cut")));
            BodyExt::boxed(StreamBody::new(first.chain(never)))
        }
        _ => full(bytes),
    }
}

fn refuse(status: u16, code: &str) -> Response<StubBody> {
    let xml = format!("<Error><Code>{code}</Code><Message>told so</Message></Error>");
    Response::builder()
        .status(status)
        .header("retry-after", "2")
        .header("x-amz-bucket-region", "eu-west-1")
        .body(full(xml.into()))
        .unwrap()
}

fn full(bytes: Bytes) -> StubBody {
    Full::new(bytes).map_err(|never| match never {}).boxed()
}

fn empty() -> StubBody {
    Empty::new().map_err(|never| match never {}).boxed()
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn log_line(request: &Request<Incoming>) -> String {
    let mut line =
        format!("{} {}", request.method(), request.uri().to_string().replace("?x-id=GetObject", ""));
    if let Some(range) = header(request.headers(), "range") {
        let _ = write!(line, " {range}");
    }
    if let Some(etag) = header(request.headers(), "if-match") {
        let _ = write!(line, " if-match {etag}");
    }
    if let Some(payer) = header(request.headers(), "x-amz-request-payer") {
        let _ = write!(line, " payer {payer}");
    }
    line
}

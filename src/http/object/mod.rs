//! The S3 read endpoint: what boto3, s5cmd or a model server's own S3 reader talks to instead of S3.
//!
//! Invariant: a response's headers go out when its first byte is in hand; its bytes are of one object version, the
//! one that its `ETag` names; a body that cannot go on is cut short, never padded.
//! This module refuses to write, and to check signatures, which are made for another host: they are taken off before
//! `s3s` would want to verify them. `s3.access = "node"`: whatever reaches this node's loopback may read what the
//! allow-list names. `s3.access = "caller"`: a client brings with each request, in the header [`PROOF`], the URL of a
//! HEAD of that object that it presigned for S3 itself, and reads what S3 lets it.

mod conditions;
mod failure;
mod heads;
mod service;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use http::header::{self, HeaderName};
use http::{HeaderMap, Method, Request, Response, Uri};
use hyper::body::Incoming;
use s3s::host::{S3Host, VirtualHost};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{Body, S3Error, S3ErrorCode, S3Result};
use serde::{Deserialize, Serialize};

use super::served::{Face, Served};
use crate::cache::Cache;
use crate::content::RangeHeader;
use crate::origin::s3::{APP_NAME, Proof, ProofError, S3Callers, S3Origin};

use service::ReadOnly;

/// `[object]`: the S3 read endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where it listens. Where `s3.access = "node"`, clients are not asked who they are: leave it on loopback.
    pub listen: SocketAddr,
    /// How long a HEAD's answer is remembered, milliseconds: a transfer of many ranges then sends one. A client may
    /// see an overwritten object this much later; 0 asks the origin each time.
    pub head_ttl_ms: u64,
    /// Longest wait for a body's first byte, milliseconds; then 503, on which S3 clients retry. Shorter than their
    /// usual read timeout of 60 s.
    pub first_byte_timeout_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 5101)),
            head_ttl_ms: 1_000,
            first_byte_timeout_ms: 30_000,
        }
    }
}

/// Carries the URL of a presigned HEAD of the object that is read.
pub const PROOF: HeaderName = HeaderName::from_static("x-windlass-proof");

/// Headers of a signature, and of the payload hashing that only a verified signature gives a meaning.
const SIGNATURE_HEADERS: [&str; 4] =
    ["authorization", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token"];

/// Parameters of a presigned URL, version 4 and 2, in lower case.
const SIGNATURE_PARAMETERS: [&str; 10] = [
    "x-amz-algorithm",
    "x-amz-credential",
    "x-amz-date",
    "x-amz-expires",
    "x-amz-security-token",
    "x-amz-signature",
    "x-amz-signedheaders",
    "awsaccesskeyid",
    "signature",
    "expires",
];

/// The endpoint, ready to answer.
#[derive(Clone)]
pub struct Endpoint {
    service: S3Service,
    served: Served,
}

impl Endpoint {
    #[must_use]
    pub fn new(config: &Config, cache: Cache, origin: S3Origin, callers: S3Callers, served: Served) -> Self {
        let mut builder =
            S3ServiceBuilder::new(ReadOnly::new(config, cache, origin, callers, served.clone()));
        builder.set_host(LocalHost);
        Self { service: builder.build(), served }
    }

    /// Answers one request; every failure is an S3 error document.
    pub async fn handle(&self, request: Request<Incoming>) -> Response<Body> {
        let response = match admit(request.map(Body::from)) {
            Ok(request) => self.service.call(request).await.unwrap_or_else(|error| {
                refusal(S3Error::internal_error(io::Error::other(format!("{error:?}"))))
            }),
            Err(error) => refusal(error),
        };
        self.served.request(Face::Object, response.status());
        response
    }
}

/// The buckets of `bucket.localhost`, which SDKs use with an endpoint that has a name; every other host means path
/// style.
struct LocalHost;

impl S3Host for LocalHost {
    fn parse_host_header<'a>(&'a self, host: &'a str) -> S3Result<VirtualHost<'a>> {
        let name = host.split_once(':').map_or(host, |(name, _)| name);
        Ok(match name.strip_suffix(".localhost") {
            Some(bucket) if !bucket.is_empty() => VirtualHost::new("localhost").with_bucket(bucket),
            _ => VirtualHost::new(host),
        })
    }
}

/// What `Range` asked for, carried past `s3s` so that [`RangeHeader`] alone decides what a range means.
#[derive(Clone, Copy, Debug)]
struct Asked(RangeHeader);

/// Refuses what this endpoint never does, and takes off what `s3s` must not judge.
fn admit<B>(request: Request<B>) -> S3Result<Request<B>> {
    let (mut parts, body) = request.into_parts();
    if !matches!(parts.method, Method::GET | Method::HEAD) {
        return Err(S3Error::with_message(
            S3ErrorCode::AccessDenied,
            "windlass only reads: write to S3 itself, without AWS_ENDPOINT_URL_S3 or --endpoint-url",
        ));
    }
    if is_own(&parts.headers) {
        return Err(S3Error::with_message(
            S3ErrorCode::InvalidRequest,
            "this is windlass's own request: the daemon's endpoint (`s3.endpoint`, or AWS_ENDPOINT_URL_S3 \
             in its environment) points at a windlass daemon instead of S3",
        ));
    }
    if let Some(value) = parts.headers.remove(PROOF) {
        let proof: Result<Proof, _> = value.to_str().map_err(|_| ProofError).and_then(str::parse);
        let proof = proof.map_err(|error| {
            S3Error::with_message(
                S3ErrorCode::InvalidArgument,
                format!("the header {PROOF} is wrong: {error}"),
            )
        })?;
        parts.extensions.insert(proof);
    }
    for name in SIGNATURE_HEADERS {
        parts.headers.remove(HeaderName::from_static(name));
    }
    if let Some(value) = parts.headers.remove(header::RANGE)
        && let Some(range) = value.to_str().ok().and_then(RangeHeader::parse)
    {
        parts.extensions.insert(Asked(range));
    }
    parts.uri = unsigned(&parts.uri);
    Ok(Request::from_parts(parts, body))
}

fn is_own(headers: &HeaderMap) -> bool {
    let agent = headers.get(header::USER_AGENT).and_then(|value| value.to_str().ok());
    agent.is_some_and(|agent| agent.split(' ').any(|part| part.strip_prefix("app/") == Some(APP_NAME)))
}

/// The URI without a presigned URL's parameters.
fn unsigned(uri: &Uri) -> Uri {
    let Some(query) = uri.query() else { return uri.clone() };
    let kept: Vec<&str> = query.split('&').filter(|pair| !is_signature(pair)).collect();
    let path_and_query =
        if kept.is_empty() { uri.path().to_owned() } else { format!("{}?{}", uri.path(), kept.join("&")) };
    path_and_query.parse().unwrap_or_else(|_| uri.clone())
}

fn is_signature(pair: &str) -> bool {
    let name = pair.split_once('=').map_or(pair, |(name, _)| name);
    SIGNATURE_PARAMETERS.contains(&name.to_ascii_lowercase().as_str())
}

fn refusal(error: S3Error) -> Response<Body> {
    error.to_http_response().unwrap_or_else(|_| {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = http::StatusCode::INTERNAL_SERVER_ERROR;
        response
    })
}

#[cfg(test)]
mod tests;

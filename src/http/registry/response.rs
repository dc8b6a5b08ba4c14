//! The responses of a pull: their headers and bodies.

use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use http::header::{
    ACCEPT_RANGES, ALLOW, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderName, IF_RANGE, RANGE,
    WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};

use crate::cache::ReadError;
use crate::content::{ByteRange, RangeError, RangeHeader};
use crate::oci::Descriptor;

/// A body that is in memory or comes from the cache.
pub type MirrorBody = UnsyncBoxBody<Bytes, ReadError>;

/// Media type of blobs: a client knows better from the manifest.
pub(super) const BLOB: &str = "application/octet-stream";

const JSON: &str = "application/json";
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
const DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const NAMESPACE: HeaderName = HeaderName::from_static("oci-namespace");

/// What every successful response says of its content.
pub(super) struct Headers<'a> {
    pub(super) descriptor: &'a Descriptor,
    pub(super) namespace: &'a str,
}

/// The status and the bytes that a GET means, by its `Range`.
///
/// An empty content has no ranges; clients that ask for `bytes=0-` of everything mean all of it.
pub(super) fn wanted(headers: &HeaderMap, size: u64) -> Result<(StatusCode, ByteRange), RangeError> {
    let value = headers.get(RANGE).and_then(|value| value.to_str().ok());
    // `If-Range` asks for the range only of a version that it names, and nothing here has such a name.
    let is_honoured = size > 0 && !headers.contains_key(IF_RANGE);
    match value.filter(|_| is_honoured).and_then(RangeHeader::parse) {
        Some(range) => Ok((StatusCode::PARTIAL_CONTENT, range.resolve(size)?)),
        None => Ok((StatusCode::OK, ByteRange::new(0, size))),
    }
}

impl Headers<'_> {
    /// The answer to HEAD.
    pub(super) fn head(&self) -> Response<MirrorBody> {
        self.response(StatusCode::OK, ByteRange::new(0, self.descriptor.size), empty())
    }

    pub(super) fn with_bytes(
        &self,
        status: StatusCode,
        range: ByteRange,
        bytes: Bytes,
    ) -> Response<MirrorBody> {
        self.response(status, range, full(bytes))
    }

    /// `first` is in hand; `rest` follows, and an error in it cuts the connection.
    ///
    /// A range to the content's end goes out without its length. containerd 2.1 and newer, where it reads a layer in
    /// parallel ranges, asks for the first of them (`bytes=N-`) to learn the length, and the others of the same host: one
    /// that is refused or cut then fails the pull, and no other host is asked. Without a length it reads one body, and
    /// goes to its next host wherever that ends.
    pub(super) fn with_stream(
        &self,
        status: StatusCode,
        range: ByteRange,
        first: Bytes,
        rest: impl Stream<Item = Result<Bytes, ReadError>> + Send + 'static,
    ) -> Response<MirrorBody> {
        let digest = self.descriptor.digest.clone();
        let rest = rest.inspect_err(move |error| {
            tracing::warn!(%digest, %error, "a body is cut short: containerd resumes where it ends");
        });
        let frames = stream::once(async { Ok(first) }).chain(rest).map_ok(Frame::data);
        let mut response = self.response(status, range, StreamBody::new(frames).boxed_unsync());
        if status == StatusCode::PARTIAL_CONTENT && range.end() == self.descriptor.size {
            response.headers_mut().remove(CONTENT_LENGTH);
        }
        response
    }

    fn response(&self, status: StatusCode, range: ByteRange, body: MirrorBody) -> Response<MirrorBody> {
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let headers = response.headers_mut();
        put(headers, CONTENT_TYPE, &self.descriptor.media_type);
        put(headers, DIGEST, &self.descriptor.digest.to_string());
        put(headers, NAMESPACE, self.namespace);
        headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        headers.insert(CONTENT_LENGTH, range.len().into());
        if status == StatusCode::PARTIAL_CONTENT {
            let (first, last) = (range.start(), range.end().saturating_sub(1));
            put(headers, CONTENT_RANGE, &format!("bytes {first}-{last}/{}", self.descriptor.size));
        }
        response
    }
}

/// `/v2/`: the API is spoken here.
pub(super) fn base() -> Response<MirrorBody> {
    let mut response = Response::new(full(Bytes::from_static(b"{}")));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(JSON));
    response.headers_mut().insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
    response
}

/// An error document. `size` is the content's when a range lay outside it.
pub(super) fn error(
    status: StatusCode,
    document: String,
    size: Option<u64>,
    method: &Method,
) -> Response<MirrorBody> {
    let length = document.len();
    let body = if method == Method::HEAD { empty() } else { full(document.into()) };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(JSON));
    headers.insert(CONTENT_LENGTH, length.into());
    if let Some(size) = size {
        put(headers, CONTENT_RANGE, &format!("bytes */{size}"));
    }
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

/// Adds what a client answers with its user name and password (RFC 7617).
pub(super) fn challenge(response: &mut Response<MirrorBody>, registry: &str) {
    put(response.headers_mut(), WWW_AUTHENTICATE, &format!("Basic realm=\"{registry}\", charset=\"UTF-8\""));
}

/// Leaves a header out whose value HTTP cannot carry: a media type is as an origin wrote it.
fn put(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

fn full(bytes: Bytes) -> MirrorBody {
    Full::from(bytes).map_err(|never| match never {}).boxed_unsync()
}

fn empty() -> MirrorBody {
    full(Bytes::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted_of(range: &str, size: u64) -> Option<(u16, u64, u64)> {
        let headers = HeaderMap::from_iter([(RANGE, range.parse().unwrap())]);
        wanted(&headers, size).ok().map(|(status, range)| (status.as_u16(), range.start(), range.end()))
    }

    #[test]
    fn ranges_as_containerd_sends_them() {
        assert_eq!(wanted_of("bytes=0-", 10), Some((206, 0, 10)));
        assert_eq!(wanted_of("bytes=3-5", 10), Some((206, 3, 6)));
        assert_eq!(wanted_of("bytes=10-", 10), None);
        assert_eq!(wanted_of("bytes=0-1,3-4", 10), Some((200, 0, 10)));
        assert_eq!(wanted_of("pages=1-", 10), Some((200, 0, 10)));
        assert_eq!(wanted_of("bytes=0-", 0), Some((200, 0, 0)));
    }
}

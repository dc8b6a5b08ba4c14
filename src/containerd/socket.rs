//! Asks containerd over its socket: gRPC with a message of one or two fields.
//!
//! Three calls in a hundred lines; a gRPC stack and generated code for them would be the largest dependency of this
//! program. Invariant: every call has a deadline, and ends when its future is dropped.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;
use tokio_util::task::AbortOnDropHandle;

/// Where containerd listens unless it is told otherwise.
pub const DEFAULT_PATH: &str = "/run/containerd/containerd.sock";

/// What containerd does at once is answered within this.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// Longest answer that is read: containerd's are some hundred bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// A message without fields.
const NOTHING: &[u8] = &[];

/// The socket of a containerd.
#[derive(Clone, Debug)]
pub struct Socket(PathBuf);

/// Why containerd did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("containerd does not answer at {}: {source}", path.display())]
    Unreachable { path: PathBuf, source: io::Error },
    /// It said no; gRPC's status code and its own words.
    #[error("containerd says: {message} (gRPC status {code})")]
    Refused { code: u32, message: String },
    #[error("the connection to containerd broke: {0}")]
    Broken(String),
    #[error("containerd did not answer within {0:?}")]
    Late(Duration),
}

impl CallError {
    /// Whether this containerd does not know the call: its CRI plugin is not loaded.
    #[must_use]
    pub const fn is_unknown_call(&self) -> bool {
        // `UNIMPLEMENTED` of gRPC's status codes.
        matches!(self, Self::Refused { code: 12, .. })
    }
}

impl Socket {
    #[must_use]
    pub const fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// The version that runs, as in `1.6.20~ds1` or `v2.2.4`.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn version(&self) -> Result<String, CallError> {
        let answer =
            self.call("containerd.services.version.v1.Version/Version", NOTHING, ANSWER_DEADLINE).await?;
        let version =
            field(&answer, 1).ok_or_else(|| CallError::Broken("its answer has no version".into()))?;
        Ok(String::from_utf8_lossy(version).into_owned())
    }

    /// Has it pull `reference` as the kubelet would, without credentials, for at most `deadline`.
    ///
    /// # Errors
    /// [`CallError`]; what cannot be pulled is [`CallError::Refused`].
    pub async fn pull(&self, reference: &str, deadline: Duration) -> Result<(), CallError> {
        let image = message(1, reference.as_bytes());
        let request = message(1, &image);
        self.call("runtime.v1.ImageService/PullImage", &request, deadline).await.map(drop)
    }

    async fn call(&self, method: &str, message: &[u8], deadline: Duration) -> Result<Bytes, CallError> {
        let exchange = self.exchange(method, message);
        tokio::time::timeout(deadline, exchange).await.unwrap_or(Err(CallError::Late(deadline)))
    }

    async fn exchange(&self, method: &str, message: &[u8]) -> Result<Bytes, CallError> {
        let unreachable = |source| CallError::Unreachable { path: self.0.clone(), source };
        let broken = |error: hyper::Error| CallError::Broken(error.to_string());
        let stream = UnixStream::connect(&self.0).await.map_err(unreachable)?;
        let (mut sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.map_err(broken)?;
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let response = sender.send_request(request(method, message)).await.map_err(broken)?;
        let headers = response.headers().clone();
        let collected = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| CallError::Broken(error.to_string()))?;
        // A refusal has no body, and its status stands among the headers.
        status(collected.trailers().unwrap_or(&headers))?;
        let bytes = collected.to_bytes();
        // One byte says whether it is compressed, which nobody asked for, and four how long it is.
        if bytes.len() < 5 { Ok(Bytes::new()) } else { Ok(bytes.slice(5..)) }
    }
}

fn request(method: &str, message: &[u8]) -> Request<Full<Bytes>> {
    let mut framed = vec![0];
    framed.extend(u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes());
    framed.extend(message);
    let mut request = Request::new(Full::new(Bytes::from(framed)));
    *request.method_mut() = Method::POST;
    // The methods are this file's own constants.
    *request.uri_mut() = format!("http://localhost/{method}").parse().unwrap_or_default();
    request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    request.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    request
}

fn status(trailers: &HeaderMap) -> Result<(), CallError> {
    let text = |name: &str| trailers.get(name).and_then(|value| value.to_str().ok());
    match text("grpc-status").and_then(|code| code.parse().ok()) {
        Some(0) => Ok(()),
        Some(code) => {
            Err(CallError::Refused { code, message: text("grpc-message").unwrap_or_default().to_owned() })
        }
        None => Err(CallError::Broken("its answer has no status".into())),
    }
}

/// A length-delimited field of protobuf's wire format.
fn message(number: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    let mut length = value.len();
    while length >= 0x80 {
        bytes.push(low_bits(length) | 0x80);
        length >>= 7;
    }
    bytes.push(low_bits(length));
    bytes.extend(value);
    bytes
}

/// The seven bits that go into one byte of a variable-length number.
const fn low_bits(length: usize) -> u8 {
    length.to_le_bytes()[0] & 0x7f
}

/// The first length-delimited field of that number; nothing when there is none, or a field of another kind before it.
fn field(mut bytes: &[u8], number: u8) -> Option<&[u8]> {
    loop {
        let (tag, rest) = bytes.split_first()?;
        let (mut length, mut shift) = (0_usize, 0_u32);
        let mut rest = rest;
        loop {
            let (byte, after) = rest.split_first()?;
            length |= usize::from(byte & 0x7f).checked_shl(shift)?;
            (rest, shift) = (after, shift + 7);
            if byte & 0x80 == 0 {
                break;
            }
        }
        let value = rest.get(..length)?;
        match tag {
            _ if *tag == (number << 3 | 2) => return Some(value),
            _ if tag & 7 == 2 => bytes = &rest[length..],
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(value in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut bytes = message(2, b"before");
            bytes.extend(message(1, &value));
            prop_assert_eq!(field(&bytes, 1), Some(&value[..]));
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = field(&bytes, 1);
        }
    }

    #[tokio::test]
    async fn nobody_there_is_told_from_a_refusal() {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let socket = Socket::new(scratch.path().join("containerd.sock"));
        let error = socket.version().await.expect_err("nobody is there");
        assert!(matches!(error, CallError::Unreachable { .. }) && !error.is_unknown_call(), "{error}");
    }
}

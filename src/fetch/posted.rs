//! What is posted to the control socket: one JSON request, bounded, or a line of text that says what is wrong with it.

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body::Body;
use http_body_util::{BodyExt, Full, Limited};
use serde::de::DeserializeOwned;

use super::ResponseBody;

/// Reads a request of at most `bytes_max` bytes.
///
/// # Errors
/// The answer to give instead: 405 to anything but a POST, 400 to what cannot be read or understood.
pub async fn posted<T, B>(request: Request<B>, bytes_max: usize) -> Result<T, Response<ResponseBody>>
where
    T: DeserializeOwned,
    B: Body<Data = Bytes> + Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    if request.method() != Method::POST {
        return Err(text(StatusCode::METHOD_NOT_ALLOWED, "POST a JSON request".to_owned()));
    }
    let refused = |what: String| text(StatusCode::BAD_REQUEST, what);
    let body = Limited::new(request.into_body(), bytes_max).collect().await;
    let body = body.map_err(|error| refused(format!("cannot read the request: {error}")))?.to_bytes();
    serde_json::from_slice(&body).map_err(|error| refused(format!("cannot understand the request: {error}")))
}

/// An answer of one line.
#[must_use]
pub fn text(status: StatusCode, message: String) -> Response<ResponseBody> {
    let mut response = Response::new(Full::from(message + "\n").boxed_unsync());
    *response.status_mut() = status;
    response
}

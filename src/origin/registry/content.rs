//! A blob or manifest at its registry, as a [`Source`] of ranges.
//!
//! Invariant: where a blob's redirect led is asked for once and used by all its chunks until it fails; while the
//! first one finds out, the others wait.

use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE};
use http::{Method, StatusCode};
use reqwest::Response;
use url::Url;

use super::Registry;
use super::exchange::{Answer, Question, ask, ask_elsewhere};
use crate::content::{ByteRange, Digest};
use crate::oci::RepositoryName;
use crate::origin::{Body, Delivery, Kind, OriginError, Source};

/// One blob or manifest of known digest and size.
#[derive(Debug)]
pub struct Content {
    pub(super) registry: Arc<Registry>,
    pub(super) name: RepositoryName,
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) path: &'static str,
    pub(super) accept: Option<&'static str>,
}

/// Where the bytes of a blob are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Location {
    #[default]
    Unknown,
    /// The registry sends them itself, or was not able to say: ask it.
    Registry,
    /// A redirect led here.
    Elsewhere(Url),
}

impl Source for Content {
    fn read(&self, range: ByteRange) -> BoxFuture<'_, Result<Body, OriginError>> {
        async move {
            let response = self.ask(range).await?;
            self.deliver(response, range)
        }
        .boxed()
    }

    fn label(&self) -> &str {
        self.registry.name()
    }
}

impl Content {
    /// Sends the request for one range to where the bytes are.
    async fn ask(&self, range: ByteRange) -> Result<Response, OriginError> {
        let location = self.registry.location(&self.name, &self.digest);
        let mut known = location.lock().await;
        match known.clone() {
            // Holding the lock is what makes the others wait.
            Location::Unknown => {
                let answer = self.ask_registry(range).await;
                *known = found(&answer);
                answer.map(|answer| answer.response)
            }
            Location::Registry => {
                drop(known);
                let answer = self.ask_registry(range).await;
                *location.lock().await = found(&answer);
                answer.map(|answer| answer.response)
            }
            Location::Elsewhere(url) => {
                drop(known);
                let question = self.question(url.clone(), range);
                let registry = &self.registry;
                match ask_elsewhere(&registry.client, &registry.authorizer, &question).await {
                    Ok(response) => Ok(response),
                    Err(error) => {
                        tracing::debug!(%error, digest = %self.digest, "asking the registry again where a blob is");
                        self.ask_anew(&url, range).await
                    }
                }
            }
        }
    }

    /// Asks the registry after the place `stale` failed; of several who saw it fail, one asks first.
    async fn ask_anew(&self, stale: &Url, range: ByteRange) -> Result<Response, OriginError> {
        let location = self.registry.location(&self.name, &self.digest);
        let mut known = location.lock().await;
        if let Location::Elsewhere(url) = &*known
            && url != stale
        {
            let question = self.question(url.clone(), range);
            drop(known);
            return ask_elsewhere(&self.registry.client, &self.registry.authorizer, &question).await;
        }
        let answer = self.ask_registry(range).await;
        *known = found(&answer);
        answer.map(|answer| answer.response)
    }

    async fn ask_registry(&self, range: ByteRange) -> Result<Answer, OriginError> {
        let registry = &self.registry;
        let url = registry.content_url(&self.name, self.path, &self.digest.to_string())?;
        ask(&registry.client, &registry.authorizer, &self.question(url, range)).await
    }

    fn question(&self, url: Url, range: ByteRange) -> Question<'_> {
        let (name, accept) = (&self.name, self.accept);
        Question { method: Method::GET, name, url, accept, range: Some(range), kind: Kind::Content }
    }

    /// Checks that the response is what was asked for, and opens its body.
    fn deliver(&self, response: Response, range: ByteRange) -> Result<Body, OriginError> {
        let client = &self.registry.client;
        let header =
            |name| response.headers().get(name).and_then(|value: &http::HeaderValue| value.to_str().ok());
        let wrong = |what: String| Err(client.failed(format!("{}: {what}", self.digest)));
        if let Some(encoding) = header(CONTENT_ENCODING).filter(|encoding| *encoding != "identity") {
            return wrong(format!("it encodes the body ({encoding}), though identity was asked for"));
        }
        let skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let sent = header(CONTENT_RANGE).unwrap_or_default();
                if !is_range(sent, range, self.size) {
                    return wrong(format!("asked for {}, it sends {sent:?}", range.to_header()));
                }
                0
            }
            StatusCode::OK => {
                let length = header(CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
                if let Some(length) = length.filter(|length| *length != self.size) {
                    return wrong(format!("it is {length} bytes long there and should be {}", self.size));
                }
                range.start()
            }
            other => return wrong(format!("it answers a range with {other}")),
        };
        let (want, metrics) = (range.len(), client.metrics().clone());
        let delivery = Delivery { skip, want, progress_timeout: client.progress_timeout(), metrics };
        let body = futures_util::StreamExt::map(response.bytes_stream(), |piece| {
            piece.map_err(super::client::cause)
        });
        Ok(delivery.from(body))
    }
}

fn found(answer: &Result<Answer, OriginError>) -> Location {
    match answer {
        Ok(Answer { elsewhere: Some(url), .. }) => Location::Elsewhere(url.clone()),
        _ => Location::Registry,
    }
}

/// Whether a `Content-Range` says exactly `range` of `size` bytes (RFC 9110 section 14.4).
fn is_range(header: &str, range: ByteRange, size: u64) -> bool {
    let Some((sent, total)) = header.trim().strip_prefix("bytes ").and_then(|rest| rest.split_once('/'))
    else {
        return false;
    };
    let Some((first, last)) = sent.split_once('-') else { return false };
    let number = |text: &str| text.trim().parse::<u64>().ok();
    number(first) == Some(range.start())
        && number(last) == Some(range.end().saturating_sub(1))
        && (total.trim() == "*" || number(total) == Some(size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        let range = ByteRange::new(5, 10);
        for good in ["bytes 5-9/20", "bytes 5-9/*", " bytes 5-9/20 "] {
            assert!(is_range(good, range, 20), "{good}");
        }
        for bad in ["", "bytes 5-8/20", "bytes 4-9/20", "bytes 5-9/21", "bytes */20", "5-9/20", "bytes 5-9"] {
            assert!(!is_range(bad, range, 20), "{bad}");
        }
    }
}

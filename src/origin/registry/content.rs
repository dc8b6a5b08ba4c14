//! A blob or manifest at its registry, as a [`Source`] of ranges.
//!
//! Invariant: what comes out is what was asked for, whatever the place that a redirect led to sends (`location`).

use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE};
use http::{Method, StatusCode};
use reqwest::Response;
use url::Url;

use super::exchange::{Answer, Question, ask, ask_elsewhere};
use super::location::{Lookup, Turn};
use super::{BLOBS, Registry};
use crate::content::{ByteRange, Digest};
use crate::oci::RepositoryName;
use crate::origin::care::Opener;
use crate::origin::{Body, Delivery, Kind, OriginError, Source};

/// One blob or manifest of known digest and size.
#[derive(Clone, Debug)]
pub struct Content {
    pub(super) registry: Arc<Registry>,
    pub(super) name: RepositoryName,
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) path: &'static str,
    pub(super) accept: Option<&'static str>,
}

impl Source for Content {
    fn read(&self, range: ByteRange) -> BoxFuture<'_, Result<Body, OriginError>> {
        let this = self.clone();
        let open: Opener = Box::new(move |range| {
            let this = this.clone();
            async move {
                let response = this.ask(range).await?;
                this.deliver(response, range)
            }
            .boxed()
        });
        Arc::clone(self.registry.client.care()).read(open, range).boxed()
    }

    fn label(&self) -> &str {
        self.registry.name()
    }
}

impl Content {
    /// Sends the request for one range to where the bytes are.
    async fn ask(&self, range: ByteRange) -> Result<Response, OriginError> {
        let location = self.registry.location(&self.name, &self.digest, self.path == BLOBS);
        let url = match location.turn(range.start()).await {
            Turn::LookUp(lookup) => return self.look_up(&lookup, range).await,
            Turn::Go(url) => url,
        };
        match self.ask_elsewhere(url.clone(), range).await {
            Ok(response) => Ok(response),
            Err(error) => {
                tracing::debug!(%error, digest = %self.digest, "asking the registry again where a blob is");
                location.forget(&url);
                match location.turn(range.start()).await {
                    Turn::LookUp(lookup) => self.look_up(&lookup, range).await,
                    Turn::Go(url) => self.ask_elsewhere(url, range).await,
                }
            }
        }
    }

    /// Asks the registry, and tells the others where that led as soon as it is known.
    async fn look_up(&self, lookup: &Lookup, range: ByteRange) -> Result<Response, OriginError> {
        let registry = &self.registry;
        let url = registry.content_url(&self.name, self.path, &self.digest.to_string())?;
        let question = self.question(url, range);
        match ask(&registry.client, &registry.authorizer, &question, &|to| lookup.leads_to(to)).await {
            Ok(Answer { response, elsewhere }) => {
                if elsewhere.is_none() {
                    lookup.ends_here();
                }
                Ok(response)
            }
            Err(error) => {
                lookup.failed();
                Err(error)
            }
        }
    }

    async fn ask_elsewhere(&self, url: Url, range: ByteRange) -> Result<Response, OriginError> {
        let registry = &self.registry;
        ask_elsewhere(&registry.client, &registry.authorizer, &self.question(url, range)).await
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

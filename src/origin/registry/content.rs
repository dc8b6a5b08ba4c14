//! A blob or manifest at its registry, as a [`Source`] of ranges.
//!
//! Invariant: where a blob's redirect led is asked for once and used by all its chunks until it ends or fails; while
//! the first one finds out, the others wait.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

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
use crate::origin::care::Opener;
use crate::origin::{Body, Delivery, Kind, OriginError, Source};

/// A presigned URL is not used on its last moment: a request needs a while to be looked at.
const URL_MARGIN: Duration = Duration::from_secs(30);

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

/// Where the bytes of a blob are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Location {
    #[default]
    Unknown,
    /// The registry sends them itself, or was not able to say: ask it.
    Registry,
    /// A redirect led here.
    Elsewhere {
        url: Url,
        /// A presigned URL says so itself.
        ends_at: Option<Instant>,
    },
}

impl Location {
    /// Where to ask now: a place whose time is over is none.
    fn current(&self) -> Self {
        match self {
            Self::Elsewhere { ends_at: Some(ends_at), .. } if *ends_at <= Instant::now() => Self::Unknown,
            known => known.clone(),
        }
    }
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
        let location = self.registry.location(&self.name, &self.digest);
        let mut known = location.lock().await;
        match known.current() {
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
            Location::Elsewhere { url, .. } => {
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
        if let Location::Elsewhere { url, .. } = known.current()
            && url != *stale
        {
            let question = self.question(url, range);
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
        Ok(Answer { elsewhere: Some(url), .. }) => {
            let life = presigned_life(url, SystemTime::now());
            Location::Elsewhere { url: url.clone(), ends_at: life.map(|life| Instant::now() + life) }
        }
        _ => Location::Registry,
    }
}

/// How long a presigned URL that just came is good for; `None` when it does not say.
///
/// AWS's and Google's carry when they were signed and for how many seconds (Signature Version 4, query parameters). A
/// registry may hand out one that it signed a while ago; a clock that would make a new one old already is not believed.
fn presigned_life(url: &Url, now: SystemTime) -> Option<Duration> {
    let value = |wanted: &str| {
        let mut pairs = url.query_pairs();
        let is_it =
            |key: &str| key.strip_prefix("X-Amz-").or_else(|| key.strip_prefix("X-Goog-")) == Some(wanted);
        pairs.find(|(key, _)| is_it(key)).map(|(_, value)| value.into_owned())
    };
    let life = Duration::from_secs(value("Expires")?.parse().ok()?);
    let signed = value("Date").and_then(|date| read_basic_date(&date));
    let by_clock = signed.and_then(|at| (at + life).duration_since(now).ok()).filter(|left| !left.is_zero());
    let left = by_clock.map_or(life, |by_clock| by_clock.min(life));
    Some(left - URL_MARGIN.min(left / 10))
}

/// `20261127T093000Z`.
fn read_basic_date(text: &str) -> Option<SystemTime> {
    let is_basic = text.len() == 16 && text.is_ascii() && text.ends_with('Z');
    let part = |range| is_basic.then(|| text.get(range)).flatten();
    let (date, time) = (part(0..8)?, part(9..15)?);
    let spelled = format!(
        "{}-{}-{}T{}:{}:{}Z",
        &date[..4],
        &date[4..6],
        &date[6..],
        &time[..2],
        &time[2..4],
        &time[4..]
    );
    humantime::parse_rfc3339(&spelled).ok()
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
    fn presigned_urls_say_when_they_end() {
        let now = humantime::parse_rfc3339("2026-11-27T09:30:00Z").unwrap();
        let life = |query: &str| {
            let url = Url::parse(&format!("https://bucket.example.com/blob?{query}")).unwrap();
            presigned_life(&url, now).map(|life| life.as_secs())
        };
        assert_eq!(life("X-Amz-Date=20261127T093000Z&X-Amz-Expires=3600&X-Amz-Signature=x"), Some(3570));
        assert_eq!(life("X-Amz-Date=20261127T092000Z&X-Amz-Expires=3600"), Some(2970), "signed a while ago");
        assert_eq!(life("X-Amz-Date=20261127T080000Z&X-Amz-Expires=60"), Some(54), "our clock is off");
        assert_eq!(life("X-Goog-Date=20261127T093000Z&X-Goog-Expires=100"), Some(90));
        assert_eq!(life("X-Amz-Expires=100"), Some(90));
        for other in ["", "Expires=1700000000", "X-Amz-Expires=soon"] {
            assert_eq!(life(other), None, "{other}");
        }
        for odd in ["20261327T093000Z", "20261127T093000", "é0261127T09300Z", "20261127 093000Z"] {
            assert!(life(&format!("X-Amz-Date={odd}&X-Amz-Expires=100")).is_some(), "{odd}");
        }
    }

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

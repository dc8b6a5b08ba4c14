//! One question to the registry, through challenges and redirects to the answer.
//!
//! Invariant: `Authorization` is attached afresh on every hop, and only when the hop is the registry's own scheme,
//! host and port.

use std::time::{Duration, SystemTime};

use http::header::{ACCEPT, AUTHORIZATION, HeaderName, LOCATION, RANGE, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::Response;
use url::Url;

use super::authorizer::Authorizer;
use super::client::{Client, host};
use crate::content::ByteRange;
use crate::oci::RepositoryName;
use crate::origin::{Kind, OriginError, Outcome, care};

/// Redirects followed for one question. Registries need one, content networks in front of them two.
const MAX_REDIRECTS: usize = 5;

/// Longest part of an error body that is quoted.
const MAX_QUOTE_CHARS: usize = 200;

/// What is asked, of which repository.
#[derive(Clone, Debug)]
pub(super) struct Question<'a> {
    pub(super) method: Method,
    pub(super) name: &'a RepositoryName,
    pub(super) url: Url,
    pub(super) accept: Option<&'a str>,
    pub(super) range: Option<ByteRange>,
    pub(super) kind: Kind,
}

/// A response that is neither a challenge nor a redirect.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response,
    /// Where it came from, when redirects led away from where it was asked.
    pub(super) elsewhere: Option<Url>,
}

impl Question<'_> {
    fn headers(&self) -> Result<HeaderMap, OriginError> {
        let mut headers = HeaderMap::new();
        let mut put = |name: HeaderName, value: &str| {
            let value = HeaderValue::from_str(value)
                .map_err(|_| OriginError::Ours(format!("cannot send {name}: {value:?}")))?;
            headers.insert(name, value);
            Ok(())
        };
        if let Some(accept) = self.accept {
            put(ACCEPT, accept)?;
        }
        if let Some(range) = self.range {
            put(RANGE, &range.to_header())?;
        }
        Ok(headers)
    }

    /// What the question is about, for messages.
    fn subject(&self) -> String {
        let last = self.url.path_segments().and_then(|mut segments| segments.next_back()).unwrap_or_default();
        format!("{}@{last}", self.name)
    }
}

/// Asks, authenticates when challenged, follows redirects, and counts every request that was sent. `led_to` hears of
/// each redirect before it is followed.
///
/// # Errors
/// When there is no answer; and, as [`OriginError`] tells them apart, when it is not a success.
pub(super) async fn ask(
    client: &Client,
    authorizer: &Authorizer,
    question: &Question<'_>,
    led_to: &(dyn Fn(&Url) + Sync),
) -> Result<Answer, OriginError> {
    let headers = question.headers()?;
    let mut url = question.url.clone();
    let mut has_renewed = false;
    let mut hops = 0;
    loop {
        let mut headers = headers.clone();
        let authorization = match client.is_own(&url) {
            true => authorizer.authorization(client, question.name).await?,
            false => None,
        };
        if let Some(authorization) = &authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        let sent = client.send(question.kind, question.method.clone(), &url, headers).await;
        let response = sent.inspect_err(|_| client.metrics().request(question.kind, Outcome::Failed))?;
        let status = response.status();
        let can_renew = client.is_own(&url) && !has_renewed;
        if status == StatusCode::UNAUTHORIZED && can_renew {
            has_renewed = true;
            client.metrics().request(Kind::Metadata, Outcome::Ok);
            let challenge = response.headers().clone();
            client.read_aside(response).await;
            authorizer.challenged(client, question.name, &challenge, authorization.as_ref()).await?;
        } else if is_redirect(status) {
            hops += 1;
            if hops > MAX_REDIRECTS {
                client.metrics().request(question.kind, Outcome::Failed);
                return Err(client.failed(format!("more than {MAX_REDIRECTS} redirects")));
            }
            client.metrics().request(Kind::Metadata, Outcome::Ok);
            url = next(client, &url, &response)?;
            led_to(&url);
            client.read_aside(response).await;
        } else {
            let checked = check(client, authorizer, question, &url, response).await;
            client.metrics().request(question.kind, Outcome::of(&checked));
            if let (Err(OriginError::Denied { reason, .. }), Some(rejected)) = (&checked, &authorization)
                && can_renew
            {
                has_renewed = true;
                if authorizer.renew(client, rejected, says_expired(reason)).await? {
                    continue;
                }
            }
            let elsewhere = (hops > 0).then_some(url);
            return checked.map(|response| Answer { response, elsewhere });
        }
    }
}

/// ECR answers a token that is over not with a challenge but with 403 "Your authorization token has expired."; to HEAD
/// with a bare 403.
fn says_expired(reason: &str) -> bool {
    reason.contains("expired")
}

/// Asks a place that an earlier redirect led to, without credentials and without following further.
pub(super) async fn ask_elsewhere(
    client: &Client,
    authorizer: &Authorizer,
    question: &Question<'_>,
) -> Result<Response, OriginError> {
    let sent = client.send(question.kind, question.method.clone(), &question.url, question.headers()?).await;
    let checked = match sent {
        Ok(response) if is_redirect(response.status()) => {
            Err(client.failed("its blob has moved again".to_owned()))
        }
        Ok(response) => check(client, authorizer, question, &question.url, response).await,
        Err(error) => Err(error),
    };
    client.metrics().request(question.kind, Outcome::of(&checked));
    checked
}

const fn is_redirect(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::MOVED_PERMANENTLY
            | StatusCode::FOUND
            | StatusCode::SEE_OTHER
            | StatusCode::TEMPORARY_REDIRECT
            | StatusCode::PERMANENT_REDIRECT
    )
}

fn next(client: &Client, from: &Url, response: &Response) -> Result<Url, OriginError> {
    let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let next = location.and_then(|location| from.join(location).ok());
    next.ok_or_else(|| client.failed(format!("{} redirects to nowhere", host(from))))
}

/// Some registries know no HEAD; the same question as GET may be answered (`facts/wire.md` section 1.2).
const fn refuses_method(status: StatusCode) -> bool {
    matches!(status, StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED)
}

/// Sorts an answer's status into what [`OriginError`] tells apart. A HEAD that is refused as such passes.
async fn check(
    client: &Client,
    authorizer: &Authorizer,
    question: &Question<'_>,
    url: &Url,
    response: Response,
) -> Result<Response, OriginError> {
    let status = response.status();
    if status.is_success() || question.method == Method::HEAD && refuses_method(status) {
        return Ok(response);
    }
    let origin = client.name().to_owned();
    let retry_after = retry_after(response.headers());
    let said = quote(&client.read_aside(response).await);
    Err(match status {
        StatusCode::NOT_FOUND | StatusCode::GONE => {
            OriginError::NotFound { origin, what: question.subject() }
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => OriginError::Denied {
            origin,
            what: question.subject(),
            reason: match client.is_own(url) {
                true => format!("it answers {status}{said}; used {}", authorizer.source()),
                false => format!("{} answers {status}{said}", host(url)),
            },
        },
        StatusCode::TOO_MANY_REQUESTS => OriginError::Throttled { origin, retry_after },
        StatusCode::SERVICE_UNAVAILABLE if retry_after.is_some() => {
            OriginError::Throttled { origin, retry_after }
        }
        _ => client.failed(format!("{} answers {status} for {}{said}", host(url), question.subject())),
    })
}

/// How long the answer asks us to wait.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    care::retry_after(headers.get(RETRY_AFTER)?.to_str().ok()?, SystemTime::now())
}

/// The first message of an OCI error body, as `: message`; nothing when it is something else.
fn quote(body: &[u8]) -> String {
    let json: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let message = json.as_ref().and_then(|json| json.pointer("/errors/0/message")).and_then(|m| m.as_str());
    let clean = |message: &str| message.chars().filter(|c| !c.is_control()).take(MAX_QUOTE_CHARS).collect();
    let said: Option<String> = message.map(clean);
    said.map(|said| format!(": {said}")).unwrap_or_default()
}

//! Meets a registry's challenges: remembers which one a repository makes, and keeps the tokens.
//!
//! Invariant: one token request per (realm, service, scope) is in the air at a time, and nobody asks for a token
//! that another just got. A credential goes to the registry itself, and to the realm that it names.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use parking_lot::Mutex;
use serde::Deserialize;
use url::Url;

use super::challenge::{Bearer, Challenge};
use super::client::{Client, host};
use super::credentials::{Credential, CredentialSource};
use crate::oci::RepositoryName;
use crate::origin::recent::Recent;
use crate::origin::{Kind, OriginError, Outcome};

/// Repositories whose challenge, and scopes whose token, are remembered: a node runs a few dozen images.
const REMEMBERED: usize = 1024;

/// Longest answer of a token service that is read.
const MAX_TOKEN_BYTES: usize = 256 << 10;

/// Lifetime of a token that does not say (distribution token specification).
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);

/// No token is used for longer, whatever it says; the longest known, ECR's, live 12 hours.
const MAX_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// A token is renewed this long before it ends, or after 9/10 of a shorter life: no request is sent on its last
/// moment.
const RENEWAL_MARGIN: Duration = Duration::from_secs(10);

/// Authentication at one registry.
#[derive(Debug)]
pub(super) struct Authorizer {
    source: CredentialSource,
    challenges: Mutex<Recent<RepositoryName, Challenge>>,
    tokens: Mutex<Recent<Bearer, TokenSlot>>,
}

/// Locked while a token is asked for.
type TokenSlot = Arc<tokio::sync::Mutex<Option<Token>>>;

#[derive(Debug)]
struct Token {
    header: HeaderValue,
    renew_at: Instant,
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    /// Read leniently: a strange lifetime is no reason to refuse a good token.
    expires_in: Option<serde_json::Value>,
}

impl Authorizer {
    pub(super) fn new(source: CredentialSource) -> Self {
        let (challenges, tokens) = (Recent::new(REMEMBERED), Recent::new(REMEMBERED));
        Self { source, challenges: Mutex::new(challenges), tokens: Mutex::new(tokens) }
    }

    /// Where the credential comes from, for messages.
    pub(super) const fn source(&self) -> &CredentialSource {
        &self.source
    }

    /// The `Authorization` for a request about `name`; `None` while the registry has not asked for one.
    pub(super) async fn authorization(
        &self,
        client: &Client,
        name: &RepositoryName,
    ) -> Result<Option<HeaderValue>, OriginError> {
        let challenge = self.challenges.lock().get(name).cloned();
        match challenge {
            Some(challenge) => self.meet(client, &challenge, None).await.map(Some),
            None => Ok(None),
        }
    }

    /// The `Authorization` after a 401 with `headers` to a request that carried `rejected`.
    pub(super) async fn challenged(
        &self,
        client: &Client,
        name: &RepositoryName,
        headers: &HeaderMap,
        rejected: Option<&HeaderValue>,
    ) -> Result<HeaderValue, OriginError> {
        let Some(challenge) = Challenge::choose(headers, name) else {
            let reason = "it asks for an authentication that is neither Basic nor Bearer";
            return Err(self.denied(client, name, reason));
        };
        self.challenges.lock().insert(name.clone(), challenge.clone());
        let header = self.meet(client, &challenge, rejected).await?;
        if rejected == Some(&header) {
            return Err(self.denied(client, name, "it does not accept"));
        }
        Ok(header)
    }

    async fn meet(
        &self,
        client: &Client,
        challenge: &Challenge,
        rejected: Option<&HeaderValue>,
    ) -> Result<HeaderValue, OriginError> {
        match challenge {
            Challenge::Basic => {
                self.credential().await?.and_then(|credential| credential.basic()).ok_or_else(|| {
                    OriginError::Denied {
                        origin: client.name().to_owned(),
                        what: "the request".to_owned(),
                        reason:
                            "it asks for a user and a password; configure `docker_config`, or `username` and \
                             `password_file`, for it"
                                .to_owned(),
                    }
                })
            }
            Challenge::Bearer(bearer) => self.token(client, bearer, rejected).await,
        }
    }

    /// The token for `bearer`: the one we hold unless it is about to end or was `rejected`.
    async fn token(
        &self,
        client: &Client,
        bearer: &Bearer,
        rejected: Option<&HeaderValue>,
    ) -> Result<HeaderValue, OriginError> {
        let slot = self.tokens.lock().get_or_insert_with(bearer, TokenSlot::default);
        let mut held = slot.lock().await;
        if let Some(token) = &*held
            && token.renew_at > Instant::now()
            && rejected != Some(&token.header)
        {
            return Ok(token.header.clone());
        }
        let token = self.fetch_token(client, bearer).await;
        client.metrics().request(Kind::Metadata, Outcome::of(&token));
        let token = token?;
        let header = token.header.clone();
        *held = Some(token);
        Ok(header)
    }

    /// Asks the realm, as the distribution token specification says.
    async fn fetch_token(&self, client: &Client, bearer: &Bearer) -> Result<Token, OriginError> {
        let mut url = Url::parse(&bearer.realm)
            .map_err(|error| client.failed(format!("its token service's address is malformed: {error}")))?;
        if let Some(service) = &bearer.service {
            url.query_pairs_mut().append_pair("service", service);
        }
        for scope in bearer.scope.split_ascii_whitespace() {
            url.query_pairs_mut().append_pair("scope", scope);
        }
        let mut headers = HeaderMap::new();
        if let Some(basic) = self.credential().await?.and_then(|credential| credential.basic()) {
            if url.scheme() != "https" && !client.is_plain() {
                return Err(client.failed("its token service wants the password over plain HTTP".to_owned()));
            }
            headers.insert(AUTHORIZATION, basic);
        }
        let asked_at = Instant::now();
        let response = client.send(Method::GET, &url, headers).await?;
        let status = response.status();
        let body = client.read_whole(response, MAX_TOKEN_BYTES).await?;
        match status {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                return Err(OriginError::Denied {
                    origin: client.name().to_owned(),
                    what: bearer.scope.clone(),
                    reason: format!("its token service {} does not accept {}", host(&url), self.source),
                });
            }
            StatusCode::TOO_MANY_REQUESTS => {
                return Err(OriginError::Throttled { origin: client.name().to_owned(), retry_after: None });
            }
            _ => return Err(client.failed(format!("its token service {} answers {status}", host(&url)))),
        }
        read_token(&body, asked_at)
            .ok_or_else(|| client.failed(format!("its token service {} sent no token", host(&url))))
    }

    async fn credential(&self) -> Result<Option<Credential>, OriginError> {
        self.source.credential().await.map_err(|error| OriginError::Ours(error.to_string()))
    }

    fn denied(&self, client: &Client, name: &RepositoryName, reason: &str) -> OriginError {
        OriginError::Denied {
            origin: client.name().to_owned(),
            what: name.to_string(),
            reason: format!("{reason}; used {}", self.source),
        }
    }
}

fn read_token(body: &[u8], asked_at: Instant) -> Option<Token> {
    let answer: TokenAnswer = serde_json::from_slice(body).ok()?;
    let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty())?;
    let mut header = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
    header.set_sensitive(true);
    let lifetime = answer.expires_in.and_then(|value| value.as_u64()).map(Duration::from_secs);
    let lifetime = lifetime.unwrap_or(DEFAULT_LIFETIME).min(MAX_LIFETIME);
    let margin = RENEWAL_MARGIN.min(lifetime / 10);
    Some(Token { header, renew_at: asked_at + (lifetime - margin) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_answers() {
        let now = Instant::now();
        let token = read_token(br#"{"token":"a","access_token":"b"}"#, now).unwrap();
        assert_eq!(token.header, "Bearer a");
        assert_eq!(token.renew_at - now, Duration::from_secs(54));
        let token = read_token(br#"{"access_token":"b","expires_in":3600}"#, now).unwrap();
        assert_eq!(
            (token.header.to_str().unwrap(), token.renew_at - now),
            ("Bearer b", Duration::from_secs(3590))
        );
        assert!(!format!("{token:?}").contains("Bearer b"));
        for bad in ["", "{}", r#"{"token":""}"#, r#"{"token":"a\nb"}"#] {
            assert!(read_token(bad.as_bytes(), now).is_none(), "{bad}");
        }
        for odd in ["-1", "1e99", "18446744073709551615", "null", "\"60\""] {
            let answer = format!(r#"{{"token":"a","expires_in":{odd}}}"#);
            assert!(read_token(answer.as_bytes(), now).is_some(), "{odd}");
        }
    }
}

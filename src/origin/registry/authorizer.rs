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
use zeroize::Zeroizing;

use super::challenge::{Bearer, Challenge};
use super::client::{Client, host};
use super::credentials::{Credential, CredentialError, CredentialSource};
use super::exchange::retry_after;
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

    /// Replaces the credential that made `rejected` after a 403, if that may be why; `false` when it may not.
    pub(super) async fn renew(
        &self,
        client: &Client,
        rejected: &HeaderValue,
        is_certain: bool,
    ) -> Result<bool, OriginError> {
        let renewed = self.source.renew(client.metrics(), rejected, is_certain).await;
        renewed.map_err(|error| no_credential(client, &error))
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
                self.credential(client, rejected).await?.and_then(|credential| credential.basic()).ok_or_else(
                    || OriginError::Denied {
                        origin: client.name().to_owned(),
                        what: "the request".to_owned(),
                        reason:
                            "it asks for a user and a password; configure `docker_config`, or `username` and \
                             `password_file`, for it"
                                .to_owned(),
                    },
                )
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
        let token = client.care().ask(|| self.fetch_token(client, bearer)).await;
        client.metrics().request(Kind::Token, Outcome::of(&token));
        let token = token?;
        let header = token.header.clone();
        *held = Some(token);
        Ok(header)
    }

    /// Asks the realm, as the distribution token specification says: by GET, and by POST (OAuth2) with a refresh token
    /// or where GET is not served.
    async fn fetch_token(&self, client: &Client, bearer: &Bearer) -> Result<Token, OriginError> {
        let realm = Url::parse(&bearer.realm)
            .map_err(|error| client.failed(format!("its token service's address is malformed: {error}")))?;
        let credential = self.credential(client, None).await?;
        if credential.is_some() && realm.scheme() != "https" && !client.is_plain() {
            return Err(client.failed("its token service wants the password over plain HTTP".to_owned()));
        }
        let asked_at = Instant::now();
        let by_get = match &credential {
            Some(credential) => credential.basic().map(Some),
            None => Some(None),
        };
        let mut answer = None;
        if let Some(basic) = by_get {
            let mut headers = HeaderMap::new();
            headers.extend(basic.map(|basic| (AUTHORIZATION, basic)));
            answer = Some(client.send(Kind::Token, Method::GET, &with_query(&realm, bearer), headers).await?);
        }
        let is_served = answer.as_ref().is_some_and(|answer| !refuses_get(answer.status()));
        let answer = match (answer, &credential) {
            (Some(answer), _) if is_served => answer,
            (Some(answer), None) => answer,
            (_, Some(credential)) => client.post_form(&realm, &form(bearer, credential)).await?,
            (None, None) => return Err(client.failed("its token service was not asked".to_owned())),
        };
        let (status, wait) = (answer.status(), retry_after(answer.headers()));
        let body = Zeroizing::new(client.read_whole(answer, MAX_TOKEN_BYTES).await?.to_vec());
        self.check_token_status(client, bearer, &realm, status, wait)?;
        read_token(&body, asked_at)
            .ok_or_else(|| client.failed(format!("its token service {} sent no token", host(&realm))))
    }

    fn check_token_status(
        &self,
        client: &Client,
        bearer: &Bearer,
        realm: &Url,
        status: StatusCode,
        retry_after: Option<Duration>,
    ) -> Result<(), OriginError> {
        match status {
            StatusCode::OK => Ok(()),
            StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(OriginError::Denied {
                    origin: client.name().to_owned(),
                    what: bearer.scope.clone(),
                    reason: format!("its token service {} does not accept {}", host(realm), self.source),
                })
            }
            StatusCode::TOO_MANY_REQUESTS => {
                Err(OriginError::Throttled { origin: client.name().to_owned(), retry_after })
            }
            _ => Err(client.failed(format!("its token service {} answers {status}", host(realm)))),
        }
    }

    async fn credential(
        &self,
        client: &Client,
        rejected: Option<&HeaderValue>,
    ) -> Result<Option<Credential>, OriginError> {
        let credential = self.source.credential(client.metrics(), rejected).await;
        credential.map_err(|error| no_credential(client, &error))
    }

    fn denied(&self, client: &Client, name: &RepositoryName, reason: &str) -> OriginError {
        OriginError::Denied {
            origin: client.name().to_owned(),
            what: name.to_string(),
            reason: format!("{reason}; used {}", self.source),
        }
    }
}

fn no_credential(client: &Client, error: &CredentialError) -> OriginError {
    match error {
        CredentialError::Refused { .. } => OriginError::Denied {
            origin: client.name().to_owned(),
            what: "the request".to_owned(),
            reason: error.to_string(),
        },
        CredentialError::Unreachable { .. } => client.failed(error.to_string()),
        CredentialError::Read { .. } | CredentialError::Malformed { .. } => {
            OriginError::Ours(error.to_string())
        }
    }
}

/// A token service that knows only POST says so, or knows nothing of the path.
const fn refuses_get(status: StatusCode) -> bool {
    matches!(status, StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_FOUND)
}

fn with_query(realm: &Url, bearer: &Bearer) -> Url {
    let mut url = realm.clone();
    if let Some(service) = &bearer.service {
        url.query_pairs_mut().append_pair("service", service);
    }
    for scope in bearer.scope.split_ascii_whitespace() {
        url.query_pairs_mut().append_pair("scope", scope);
    }
    url
}

/// The body of an OAuth2 token request; scopes are separated by spaces there.
fn form(bearer: &Bearer, credential: &Credential) -> Zeroizing<String> {
    let mut form = url::form_urlencoded::Serializer::new(String::new());
    form.extend_pairs(credential.grant()).append_pair("client_id", "windlass");
    form.append_pair("service", bearer.service.as_deref().unwrap_or_default());
    form.append_pair("scope", &bearer.scope);
    Zeroizing::new(form.finish())
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

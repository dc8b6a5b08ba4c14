//! `GetAuthorizationToken` (ECR API reference): asked with the default AWS credentials, kept to half its life.

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use aws_config::SdkConfig;
use aws_credential_types::Credentials;
use aws_credential_types::provider::ProvideCredentials;
use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::sync::OnceCell;
use zeroize::Zeroizing;

use super::EcrName;
use crate::origin::aws;
use crate::origin::registry::client::cause;
use crate::origin::registry::credentials::{Credential, CredentialError};
use crate::origin::{Kind, OriginMetrics, Outcome};

/// To connect to the API, and until it answers; tokens of 2 KB come within a second.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(3_500);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A failure is remembered this long: every layer of every image asks, and none shall wait for the same time-out anew.
const FAILURE_MEMORY: Duration = Duration::from_secs(5);

/// ECR's tokens live 12 hours; nothing is believed to live longer.
const LONGEST_LIFE: Duration = Duration::from_secs(12 * 3600);

/// A token that is refused is replaced once it is this old, or after a quarter of a shorter life: what a role may not do
/// costs one token a minute, not one a request.
const SUSPECT_AGE: Duration = Duration::from_secs(60);

/// Longest part of an error's text that is quoted.
const QUOTED_CHARS: usize = 300;

/// The passwords of all ECR registries of this node.
pub(in crate::origin::registry) struct EcrTokens {
    /// Made at the first request: the chains may ask the instance's metadata, and start-up must not wait.
    reach: OnceCell<Reach>,
    /// By account and region; as many as registries are configured.
    slots: Mutex<BTreeMap<String, Slot>>,
}

struct Reach {
    sdk: SdkConfig,
    http: reqwest::Client,
}

/// Locked while a token is asked for.
type Slot = Arc<tokio::sync::Mutex<Held>>;

#[derive(Default)]
struct Held {
    token: Option<Token>,
    failed: Option<(Instant, CredentialError)>,
}

struct Token {
    credential: Credential,
    /// From then on, a refusal may mean that it is over.
    suspect_at: Instant,
    renew_at: Instant,
    ends_at: Instant,
}

impl EcrTokens {
    pub(in crate::origin::registry) fn new() -> Arc<Self> {
        Arc::new(Self { reach: OnceCell::new(), slots: Mutex::default() })
    }

    /// The password for the registry `name`; another one than makes the header `rejected`.
    ///
    /// `None` for the public registry when this node has no AWS credentials, or none that may: it is then asked
    /// without.
    pub(in crate::origin::registry) async fn credential(
        &self,
        name: &EcrName,
        metrics: &OriginMetrics,
        rejected: Option<&HeaderValue>,
    ) -> Result<Option<Credential>, CredentialError> {
        let slot = Arc::clone(self.slots.lock().entry(name.to_string()).or_default());
        let mut held = slot.lock().await;
        if let Some(token) = held.token.take_if(|token| {
            let is_over = token.ends_at <= Instant::now();
            is_over || rejected.is_some() && token.credential.basic().as_ref() == rejected
        }) {
            tracing::debug!(%name, over = token.ends_at <= Instant::now(), "a registry's token is of no more use");
        }
        let valid = held.token.as_ref().map(|token| (token.credential.clone(), token.renew_at));
        if let Some((credential, renew_at)) = &valid
            && *renew_at > Instant::now()
        {
            return Ok(Some(credential.clone()));
        }
        let asked = match &held.failed {
            Some((at, error)) if at.elapsed() < FAILURE_MEMORY => Err(error.clone()),
            _ => {
                let asked = self.ask(name).await;
                metrics.request(Kind::Token, outcome(&asked));
                held.failed = asked.as_ref().err().map(|error| (Instant::now(), error.clone()));
                asked
            }
        };
        match (asked, valid) {
            (Ok(token), _) => {
                let credential = token.credential.clone();
                held.token = Some(token);
                Ok(Some(credential))
            }
            (Err(error), Some((credential, _))) => {
                tracing::warn!(%name, %error, "its token is not renewed; the old one is still good");
                Ok(Some(credential))
            }
            (Err(error), None) if name.is_public() => {
                tracing::debug!(%error, "asking the public registry without a token");
                Ok(None)
            }
            (Err(error), None) => Err(error),
        }
    }

    /// Replaces the password that makes `rejected`, which the registry forbade something. `false` when that was no doing
    /// of its age: it is young, and nobody is `certain` that it is over.
    ///
    /// ECR answers 403 both for a token that is over and for what a role may not do, and a HEAD's answer says no more.
    pub(in crate::origin::registry) async fn renew(
        &self,
        name: &EcrName,
        metrics: &OriginMetrics,
        rejected: &HeaderValue,
        is_certain: bool,
    ) -> Result<bool, CredentialError> {
        let slot = Arc::clone(self.slots.lock().entry(name.to_string()).or_default());
        let is_young = slot.lock().await.token.as_ref().is_some_and(|token| {
            token.credential.basic().as_ref() == Some(rejected) && token.suspect_at > Instant::now()
        });
        if is_young && !is_certain {
            return Ok(false);
        }
        Ok(self.credential(name, metrics, Some(rejected)).await?.is_some())
    }

    async fn ask(&self, name: &EcrName) -> Result<Token, CredentialError> {
        let refused = |reason: String| CredentialError::Refused { what: name.to_string(), reason };
        let unreachable = |reason: String| CredentialError::Unreachable { what: name.to_string(), reason };
        let reach = self.reach.get_or_try_init(Reach::new).await.map_err(&unreachable)?;
        let provider = reach.sdk.credentials_provider().ok_or_else(|| refused(NO_CREDENTIALS.into()))?;
        let credentials = provider.provide_credentials().await;
        let credentials = credentials.map_err(|error| refused(aws::without_credentials(&error)))?;
        let request =
            signed(name, &reach.endpoint(name), credentials, SystemTime::now()).map_err(&refused)?;
        let asked_at = Instant::now();
        let answer = reach.http.execute(request).await.map_err(|error| unreachable(cause(error)))?;
        let status = answer.status();
        let body = Zeroizing::new(answer.bytes().await.map_err(|error| unreachable(cause(error)))?.to_vec());
        if !status.is_success() {
            let reason = said(&body, &format!("it answers {status}"));
            return Err(if status.is_server_error() || status == 429 || reason.contains("Throttling") {
                unreachable(reason)
            } else {
                refused(format!("{reason}; the role needs {}", name.permission()))
            });
        }
        read_token(&body, asked_at, SystemTime::now())
            .ok_or_else(|| unreachable("its answer holds no token".into()))
    }
}

/// What to do when no link of the credential chain has any.
const NO_CREDENTIALS: &str = "no AWS credentials";

impl Reach {
    async fn new() -> Result<Self, String> {
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(ANSWER_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("windlass/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(cause)?;
        let sdk = aws::loader(CONNECT_TIMEOUT, ANSWER_TIMEOUT, None).load().await;
        Ok(Self { sdk, http })
    }

    /// Where the API is: as the environment says, as for any AWS SDK, else where the registry's name says.
    fn endpoint(&self, name: &EcrName) -> String {
        let variable = if name.is_public() { "AWS_ENDPOINT_URL_ECR_PUBLIC" } else { "AWS_ENDPOINT_URL_ECR" };
        let own = env::var(variable).ok().filter(|url| !url.is_empty());
        let any = || self.sdk.endpoint_url().map(str::to_owned);
        own.or_else(any).unwrap_or_else(|| name.api())
    }
}

impl EcrName {
    /// The service's names: in the signature, and before the operation.
    const fn service(&self) -> (&'static str, &'static str) {
        if self.is_public() {
            ("ecr-public", "SpencerFrontendService")
        } else {
            ("ecr", "AmazonEC2ContainerRegistry_V20150921")
        }
    }

    const fn permission(&self) -> &'static str {
        if self.is_public() {
            "ecr-public:GetAuthorizationToken and sts:GetServiceBearerToken"
        } else {
            "ecr:GetAuthorizationToken, ecr:BatchGetImage and ecr:GetDownloadUrlForLayer"
        }
    }
}

/// Never its content.
impl fmt::Debug for EcrTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EcrTokens").finish_non_exhaustive()
    }
}

const fn outcome(asked: &Result<Token, CredentialError>) -> Outcome {
    match asked {
        Ok(_) => Outcome::Ok,
        Err(CredentialError::Refused { .. }) => Outcome::Denied,
        Err(_) => Outcome::Failed,
    }
}

/// The request, signed (AWS Signature Version 4).
fn signed(
    name: &EcrName,
    endpoint: &str,
    credentials: Credentials,
    now: SystemTime,
) -> Result<reqwest::Request, String> {
    const BODY: &[u8] = b"{}";
    let url = format!("{}/", endpoint.trim_end_matches('/'));
    let (service, target) = name.service();
    let target = format!("{target}.GetAuthorizationToken");
    let headers = [("content-type", "application/x-amz-json-1.1"), ("x-amz-target", target.as_str())];
    let identity = credentials.into();
    let params = v4::SigningParams::builder()
        .identity(&identity)
        .region(name.region())
        .name(service)
        .time(now)
        .settings(SigningSettings::default())
        .build()
        .map_err(|error| error.to_string())?;
    let signable =
        SignableRequest::new("POST", url.as_str(), headers.iter().copied(), SignableBody::Bytes(BODY))
            .map_err(|error| error.to_string())?;
    let (instructions, _) = sign(signable, &params.into()).map_err(|error| error.to_string())?.into_parts();
    let mut request = http::Request::post(&url);
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let mut request = request.body(BODY).map_err(|error| error.to_string())?;
    instructions.apply_to_request_http1x(&mut request);
    reqwest::Request::try_from(request).map_err(cause)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    /// A list from the private registry, one object from the public one.
    authorization_data: OneOrMany,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(Authorization),
    Many(Vec<Authorization>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Authorization {
    authorization_token: String,
    /// Seconds since the Unix epoch, with a fraction.
    expires_at: f64,
}

fn read_token(body: &[u8], asked_at: Instant, now: SystemTime) -> Option<Token> {
    let answer: Answer = serde_json::from_slice(body).ok()?;
    let authorization = match answer.authorization_data {
        OneOrMany::One(one) => one,
        OneOrMany::Many(many) => many.into_iter().next()?,
    };
    let encoded = Zeroizing::new(authorization.authorization_token);
    let decoded = Zeroizing::new(STANDARD.decode(encoded.trim()).ok()?);
    let (username, password) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
    let ends = UNIX_EPOCH + Duration::try_from_secs_f64(authorization.expires_at).ok()?;
    let life = ends.duration_since(now).unwrap_or_default().min(LONGEST_LIFE);
    Some(Token {
        credential: Credential::new(username, password),
        suspect_at: asked_at + SUSPECT_AGE.min(life / 4),
        renew_at: asked_at + life / 2,
        ends_at: asked_at + life,
    })
}

/// The error that the API names, else `otherwise`.
fn said(body: &[u8], otherwise: &str) -> String {
    let json: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let field = |names: [&str; 2]| {
        let json = json.as_ref()?;
        names.iter().find_map(|name| json.get(name)?.as_str()).map(str::to_owned)
    };
    let kind = field(["__type", "code"]).map(|kind| kind.rsplit('#').next().unwrap_or_default().to_owned());
    let Some(kind) = kind else { return otherwise.to_owned() };
    let message = field(["message", "Message"]).unwrap_or_default();
    let message: String = message.chars().filter(|c| !c.is_control()).take(QUOTED_CHARS).collect();
    format!("{kind}: {message}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> EcrName {
        EcrName::parse("123456789012.dkr.ecr.eu-west-1.amazonaws.com").unwrap()
    }

    #[test]
    fn a_token_is_kept_to_half_its_life() {
        let (at, now) = (Instant::now(), UNIX_EPOCH + Duration::from_secs(1_000));
        let encoded = STANDARD.encode("AWS:pass:word");
        for data in [
            format!(r#"[{{"authorizationToken":"{encoded}","expiresAt":1600.5,"proxyEndpoint":"x"}}]"#),
            format!(r#"{{"authorizationToken":"{encoded}","expiresAt":1600.5}}"#),
        ] {
            let token = read_token(format!(r#"{{"authorizationData":{data}}}"#).as_bytes(), at, now).unwrap();
            assert_eq!(token.credential, Credential::new("AWS", "pass:word"));
            assert_eq!((token.renew_at - at).as_secs(), 300);
            assert_eq!((token.ends_at - at).as_secs(), 600);
        }
        for bad in ["", "{}", r#"{"authorizationData":[]}"#] {
            assert!(read_token(bad.as_bytes(), at, now).is_none(), "{bad}");
        }
    }

    #[test]
    fn the_request_is_signed_for_its_service_and_region() {
        let credentials = Credentials::new("AKID", "secret", Some("session".into()), None, "test");
        let at = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let request = signed(&name(), "https://api.ecr.eu-west-1.amazonaws.com", credentials, at).unwrap();
        let header = |name| request.headers()[name].to_str().unwrap().to_owned();
        assert_eq!(request.url().as_str(), "https://api.ecr.eu-west-1.amazonaws.com/");
        let authorization = header("authorization");
        let scope = "Credential=AKID/20231114/eu-west-1/ecr/aws4_request";
        assert!(authorization.contains(scope), "{authorization}");
        assert_eq!(header("x-amz-security-token"), "session");
        assert_eq!(header("x-amz-target"), "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken");
        assert!(!format!("{request:?}").contains("session"));
    }

    #[test]
    fn errors_are_named_as_the_api_names_them() {
        let body = br#"{"__type":"com.amazonaws.ecr#AccessDeniedException","Message":"no"}"#;
        assert_eq!(said(body, "x"), "AccessDeniedException: no");
        assert_eq!(said(b"<html>", "it answers 502"), "it answers 502");
    }
}

//! Where the user name and password for a registry come from.
//!
//! Invariant: a password lives in memory only, is wiped when it is dropped, and no `Debug` or message shows it.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::ecr::{EcrName, EcrTokens};
use crate::origin::OriginMetrics;

/// Docker Hub's key in a `config.json`, for historical reasons an API address.
const DOCKER_HUB_KEY: &str = "index.docker.io";

/// A place to take a credential from.
#[derive(Clone, Debug)]
pub(super) enum CredentialSource {
    Anonymous,
    PasswordFile {
        username: String,
        file: PathBuf,
    },
    DockerConfig {
        file: PathBuf,
        /// The registry whose entry is taken.
        registry: String,
    },
    /// What a caller brought, if anything; it is in memory and nowhere else.
    Caller(Option<Credential>),
    /// This node's AWS credentials, exchanged for ECR's password.
    Ecr {
        name: EcrName,
        tokens: Arc<EcrTokens>,
    },
}

/// A user name and password, or a refresh token.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential {
    pub(super) username: String,
    pub(super) secret: Zeroizing<String>,
    is_refresh_token: bool,
}

/// The credential that is configured cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum CredentialError {
    #[error("cannot read {}: {reason}; check that the secret is mounted and readable", path.display())]
    Read { path: PathBuf, reason: String },
    #[error("{} is not a docker config.json: {reason}", path.display())]
    Malformed { path: PathBuf, reason: String },
    /// Who gives it out says no.
    #[error("no token for {what}: {reason}")]
    Refused { what: String, reason: String },
    /// Who gives it out does not answer.
    #[error("no token for {what}: {reason}")]
    Unreachable { what: String, reason: String },
}

impl CredentialSource {
    /// The credential as of now; `None` to ask anonymously. A source that can makes another one than `rejected`,
    /// the header that was refused.
    ///
    /// # Errors
    /// [`CredentialError`] when what is configured cannot be had.
    pub(super) async fn credential(
        &self,
        metrics: &OriginMetrics,
        rejected: Option<&HeaderValue>,
    ) -> Result<Option<Credential>, CredentialError> {
        match self {
            Self::Anonymous => Ok(None),
            Self::Caller(credential) => Ok(credential.clone()),
            Self::Ecr { name, tokens } => tokens.credential(name, metrics, rejected).await,
            Self::PasswordFile { username, file } => {
                let text = read(file).await?;
                Ok(Some(Credential::new(username, text.trim_end_matches(['\r', '\n']))))
            }
            Self::DockerConfig { file, registry } => {
                let text = read(file).await?;
                from_docker_config(&text, registry)
                    .map_err(|reason| CredentialError::Malformed { path: file.clone(), reason })
            }
        }
    }

    /// Replaces the credential that makes `rejected`, where credentials end on their own; `certain` means that the
    /// registry said that it did. `false` when there is none other.
    ///
    /// # Errors
    /// [`CredentialError`] when the new one cannot be had.
    pub(super) async fn renew(
        &self,
        metrics: &OriginMetrics,
        rejected: &HeaderValue,
        is_certain: bool,
    ) -> Result<bool, CredentialError> {
        match self {
            Self::Ecr { name, tokens } => tokens.renew(name, metrics, rejected, is_certain).await,
            _ => Ok(false),
        }
    }
}

/// Names the source and never its content: it goes into error messages.
impl fmt::Display for CredentialSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("no credential (none is configured)"),
            Self::Caller(Some(_)) => f.write_str("the credential of whoever asked"),
            Self::Caller(None) => f.write_str("no credential (whoever asked brought none)"),
            Self::PasswordFile { username, file } => {
                write!(f, "user {username} with the password in {}", file.display())
            }
            Self::DockerConfig { file, registry } => {
                write!(f, "the entry for {registry} in {}", file.display())
            }
            Self::Ecr { name, .. } => write!(f, "a token for {name} from this node's AWS credentials"),
        }
    }
}

impl Credential {
    #[must_use]
    pub(super) fn new(username: &str, password: &str) -> Self {
        let secret = Zeroizing::new(password.to_owned());
        Self { username: username.to_owned(), secret, is_refresh_token: false }
    }

    /// What a login with OAuth2 leaves in a docker configuration, in place of a password.
    fn of_refresh_token(token: &str) -> Self {
        Self { is_refresh_token: true, ..Self::new("", token) }
    }

    /// The fields of an OAuth2 token request (distribution specification, "OAuth2 Token Authentication").
    #[must_use]
    pub(super) fn grant(&self) -> Vec<(&'static str, &str)> {
        if self.is_refresh_token {
            vec![("grant_type", "refresh_token"), ("refresh_token", self.secret.as_str())]
        } else {
            let secret = self.secret.as_str();
            vec![("grant_type", "password"), ("username", &self.username), ("password", secret)]
        }
    }

    /// The value of an `Authorization` header (RFC 7617), marked so that no log shows it; `None` for a refresh token.
    #[must_use]
    pub(super) fn basic(&self) -> Option<HeaderValue> {
        if self.is_refresh_token {
            return None;
        }
        let pair = Zeroizing::new(format!("{}:{}", self.username, *self.secret));
        let header = Zeroizing::new(format!("Basic {}", STANDARD.encode(pair.as_bytes())));
        let mut value = HeaderValue::from_str(&header).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential").field("username", &self.username).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: HashMap<String, Auth>,
}

#[derive(Deserialize)]
struct Auth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    #[serde(rename = "identitytoken")]
    identity_token: Option<String>,
}

fn from_docker_config(text: &str, registry: &str) -> Result<Option<Credential>, String> {
    let config: DockerConfig = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let is_ours =
        |key: &str| host(key) == registry || (registry == "docker.io" && host(key) == DOCKER_HUB_KEY);
    let Some((key, auth)) = config.auths.into_iter().find(|(key, _)| is_ours(key)) else { return Ok(None) };
    match auth {
        Auth { identity_token: Some(token), .. } if !token.is_empty() => {
            Ok(Some(Credential::of_refresh_token(&token)))
        }
        Auth { auth: Some(encoded), .. } if !encoded.is_empty() => {
            let decoded = Zeroizing::new(STANDARD.decode(encoded.trim()).unwrap_or_default());
            let pair = std::str::from_utf8(&decoded).ok().and_then(|text| text.split_once(':'));
            let (username, password) =
                pair.ok_or_else(|| format!("`auth` of {key} is not base64 of user:password"))?;
            Ok(Some(Credential::new(username, password)))
        }
        Auth { username: Some(username), password: Some(password), .. } => {
            Ok(Some(Credential::new(&username, &password)))
        }
        _ => Err(format!("the entry {key} has neither `auth` nor `username` and `password`")),
    }
}

/// The host of a key such as `https://host:port/v1/`.
fn host(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    key.split('/').next().unwrap_or(key)
}

async fn read(path: &Path) -> Result<Zeroizing<String>, CredentialError> {
    let read = tokio::fs::read_to_string(path).await;
    read.map(Zeroizing::new)
        .map_err(|error| CredentialError::Read { path: path.to_owned(), reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(text: &str, registry: &str) -> Option<(String, String)> {
        from_docker_config(text, registry).unwrap().map(|c| (c.username, c.secret.to_string()))
    }

    async fn of(source: &CredentialSource) -> Credential {
        let metrics = crate::origin::Metrics::default().origin("test");
        source.credential(&metrics, None).await.unwrap().unwrap()
    }

    #[test]
    fn entries_of_a_docker_config() {
        let encoded = STANDARD.encode("me:se:cret");
        let config = format!(
            r#"{{"auths":{{"https://index.docker.io/v1/":{{"auth":"{encoded}"}},
                "reg.example.com:5000":{{"username":"a","password":"b"}}}},"credsStore":"x"}}"#
        );
        assert_eq!(pair(&config, "docker.io"), Some(("me".into(), "se:cret".into())));
        assert_eq!(pair(&config, "reg.example.com:5000"), Some(("a".into(), "b".into())));
        assert_eq!(pair(&config, "reg.example.com"), None);
        assert_eq!(pair("{}", "docker.io"), None);
        assert!(from_docker_config(r#"{"auths":{"a":{"auth":"?"}}}"#, "a").is_err());
    }

    #[test]
    fn a_login_with_oauth2_leaves_a_refresh_token() {
        let config = r#"{"auths":{"a":{"auth":"bWU6","identitytoken":"refresh-me"}}}"#;
        let credential = from_docker_config(config, "a").unwrap().unwrap();
        assert_eq!(credential.grant(), [("grant_type", "refresh_token"), ("refresh_token", "refresh-me")]);
        assert!(credential.basic().is_none() && !format!("{credential:?}").contains("refresh-me"));
    }

    #[tokio::test]
    async fn a_password_is_read_afresh_and_never_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let source = CredentialSource::PasswordFile { username: "me".into(), file: file.path().into() };
        for password in ["old", "new"] {
            std::fs::write(file.path(), format!("{password}\n")).unwrap();
            let credential = of(&source).await;
            assert_eq!(*credential.secret, password);
            let basic = credential.basic().unwrap();
            let shown = format!("{credential:?} {source} {source:?} {basic:?}");
            assert!(!shown.contains(password) && !shown.contains("Basic"), "{shown}");
        }
    }
}

//! Where the user name and password for a registry come from.
//!
//! Invariant: a password lives in memory while a request is made of it, and no `Debug` or message shows it.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use serde::Deserialize;

/// Docker Hub's key in a `config.json`, for historical reasons an API address.
const DOCKER_HUB_KEY: &str = "index.docker.io";

/// A place to take a credential from. A registry with tokens of its own kind (ECR) is one more variant.
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
}

/// A user name and password.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Credential {
    username: String,
    password: String,
}

/// The credential that is configured cannot be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum CredentialError {
    #[error("cannot read {}: {source}; check that the secret is mounted and readable", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} is not a docker config.json: {reason}", path.display())]
    Malformed { path: PathBuf, reason: String },
}

impl CredentialSource {
    /// The credential as of now; `None` to ask anonymously.
    ///
    /// # Errors
    /// [`CredentialError`] when a file that is configured cannot be read.
    pub(super) async fn credential(&self) -> Result<Option<Credential>, CredentialError> {
        match self {
            Self::Anonymous => Ok(None),
            Self::PasswordFile { username, file } => {
                let password = read(file).await?.trim_end_matches(['\r', '\n']).to_owned();
                Ok(Some(Credential { username: username.clone(), password }))
            }
            Self::DockerConfig { file, registry } => {
                let text = read(file).await?;
                from_docker_config(&text, registry)
                    .map_err(|reason| CredentialError::Malformed { path: file.clone(), reason })
            }
        }
    }
}

/// Names the source and never its content: it goes into error messages.
impl fmt::Display for CredentialSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("no credential (none is configured)"),
            Self::PasswordFile { username, file } => {
                write!(f, "user {username} with the password in {}", file.display())
            }
            Self::DockerConfig { file, registry } => {
                write!(f, "the entry for {registry} in {}", file.display())
            }
        }
    }
}

impl Credential {
    /// The value of an `Authorization` header (RFC 7617), marked so that no log shows it.
    #[must_use]
    pub(super) fn basic(&self) -> Option<HeaderValue> {
        let encoded = STANDARD.encode(format!("{}:{}", self.username, self.password));
        let mut value = HeaderValue::from_str(&format!("Basic {encoded}")).ok()?;
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
}

fn from_docker_config(text: &str, registry: &str) -> Result<Option<Credential>, String> {
    let config: DockerConfig = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let is_ours =
        |key: &str| host(key) == registry || (registry == "docker.io" && host(key) == DOCKER_HUB_KEY);
    let Some((key, auth)) = config.auths.into_iter().find(|(key, _)| is_ours(key)) else { return Ok(None) };
    match auth {
        Auth { auth: Some(encoded), .. } if !encoded.is_empty() => {
            let decoded =
                STANDARD.decode(encoded.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
            let pair = decoded.as_deref().and_then(|text| text.split_once(':'));
            let (username, password) =
                pair.ok_or_else(|| format!("`auth` of {key} is not base64 of user:password"))?;
            Ok(Some(Credential { username: username.to_owned(), password: password.to_owned() }))
        }
        Auth { username: Some(username), password: Some(password), .. } => {
            Ok(Some(Credential { username, password }))
        }
        _ => Err(format!("the entry {key} has neither `auth` nor `username` and `password`")),
    }
}

/// The host of a key such as `https://host:port/v1/`.
fn host(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    key.split('/').next().unwrap_or(key)
}

async fn read(path: &Path) -> Result<String, CredentialError> {
    let read = tokio::fs::read_to_string(path).await;
    read.map_err(|source| CredentialError::Read { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(text: &str, registry: &str) -> Option<(String, String)> {
        from_docker_config(text, registry).unwrap().map(|c| (c.username, c.password))
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

    #[tokio::test]
    async fn a_password_is_read_afresh_and_never_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let source = CredentialSource::PasswordFile { username: "me".into(), file: file.path().into() };
        for password in ["old", "new"] {
            std::fs::write(file.path(), format!("{password}\n")).unwrap();
            let credential = source.credential().await.unwrap().unwrap();
            assert_eq!(credential.password, password);
            let basic = credential.basic().unwrap();
            let shown = format!("{credential:?} {source} {source:?} {basic:?}");
            assert!(!shown.contains(password) && !shown.contains("Basic"), "{shown}");
        }
    }
}

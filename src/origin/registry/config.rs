//! What a registry is called, where it is and who we are to it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use url::Url;

use super::credentials::CredentialSource;
use super::ecr::{EcrName, EcrTokens};
use crate::origin::access::Access;

/// One registry that the mirror serves: a `[[registry.origins]]` table of the configuration.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// The registry as image names spell it, with the port if they do: `docker.io`, `registry.example.com:5000`.
    /// It is what containerd sends as `ns`.
    pub name: String,
    /// Where the registry is, when not at `https://<name>`. Plain HTTP is used only if this says `http://`.
    pub endpoint: Option<Url>,
    /// Whose right to read counts: this node's, or each caller's own, which the registry is asked for with the
    /// credential that the caller brings. The bytes come with this node's credential either way.
    pub access: Access,
    /// PEM file with certificates to trust beside the system's.
    pub ca_file: Option<PathBuf>,
    /// Where the credential comes from when none of the keys below names one.
    pub credentials: Credentials,
    /// Docker `config.json` whose `auths` hold the credential.
    pub docker_config: Option<PathBuf>,
    /// User name, together with `password_file`.
    pub username: Option<String>,
    /// File with the password; read when it is needed, so that a mounted secret may change.
    pub password_file: Option<PathBuf>,
    /// Longest wait for a connection.
    pub connect_timeout_ms: u64,
    /// Longest wait for a response's headers.
    pub first_byte_timeout_ms: u64,
    /// Longest wait for more bytes of a body.
    pub progress_timeout_ms: u64,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            endpoint: None,
            access: Access::Node,
            ca_file: None,
            credentials: Credentials::Auto,
            docker_config: None,
            username: None,
            password_file: None,
            // A SYN that is lost twice is sent again after 3 s.
            connect_timeout_ms: 3_500,
            // Slow registries answer in a second; a container's pull waits for its manifest all the while.
            first_byte_timeout_ms: 10_000,
            // TCP mends a lossy path within seconds; a body silent for longer is dead.
            progress_timeout_ms: 10_000,
        }
    }
}

/// Where a registry's credential comes from when no file is named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Credentials {
    /// From the AWS default chain when the name is one of ECR's, else there is none.
    #[default]
    Auto,
    /// There is none, whatever the name.
    None,
}

/// A registry table that cannot be used. The text names the key.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("registry name {0:?}: expected what image names begin with, as in `docker.io` or `host:5000`")]
    Name(String),
    #[error("registry {0} is configured twice")]
    Twice(String),
    #[error("registry {name}: `endpoint` {endpoint}: expected http:// or https:// and a host, no query")]
    Endpoint { name: String, endpoint: Url },
    #[error("registry {0}: set `username` and `password_file` together")]
    HalfCredential(String),
    #[error("registry {0}: set either `docker_config` or `username` and `password_file`, not both")]
    TwoCredentials(String),
    #[error("registry {name}: cannot use `ca_file` {}: {reason}", path.display())]
    Ca { name: String, path: PathBuf, reason: String },
    #[error("registry {name}: cannot set up TLS: {reason}")]
    Tls { name: String, reason: String },
}

impl RegistryConfig {
    /// The URL below which `/v2/` lies, without a slash at the end.
    ///
    /// # Errors
    /// When the name or the endpoint is no registry's.
    pub fn endpoint_url(&self) -> Result<Url, ConfigError> {
        let spelled = Url::parse(&format!("https://{}", self.name)).ok();
        let is_host = |url: &Url| url.has_host() && url.path() == "/" && url.query().is_none();
        let Some(by_name) = spelled.filter(is_host).filter(|_| !self.name.contains(['/', '@', '?', '#']))
        else {
            return Err(ConfigError::Name(self.name.clone()));
        };
        let endpoint = match &self.endpoint {
            Some(endpoint) => endpoint.clone(),
            // Docker Hub's API is not where its name points (`facts/wire.md` section 4).
            None if self.name == "docker.io" => Url::parse("https://registry-1.docker.io").unwrap_or(by_name),
            None => by_name,
        };
        let is_web = matches!(endpoint.scheme(), "http" | "https") && endpoint.has_host();
        if is_web && endpoint.query().is_none() && endpoint.username().is_empty() {
            Ok(endpoint)
        } else {
            Err(ConfigError::Endpoint { name: self.name.clone(), endpoint })
        }
    }

    pub(super) fn credential_source(&self, ecr: &Arc<EcrTokens>) -> Result<CredentialSource, ConfigError> {
        match (&self.docker_config, &self.username, &self.password_file) {
            (None, None, None) => Ok(match (self.credentials, EcrName::parse(&self.name)) {
                (Credentials::Auto, Some(name)) => CredentialSource::Ecr { name, tokens: Arc::clone(ecr) },
                _ => CredentialSource::Anonymous,
            }),
            (None, Some(username), Some(file)) => {
                Ok(CredentialSource::PasswordFile { username: username.clone(), file: file.clone() })
            }
            (Some(file), None, None) => {
                Ok(CredentialSource::DockerConfig { file: file.clone(), registry: self.name.clone() })
            }
            (None, ..) => Err(ConfigError::HalfCredential(self.name.clone())),
            (Some(_), ..) => Err(ConfigError::TwoCredentials(self.name.clone())),
        }
    }

    pub(super) const fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    pub(super) const fn first_byte_timeout(&self) -> Duration {
        Duration::from_millis(self.first_byte_timeout_ms)
    }

    pub(super) const fn progress_timeout(&self) -> Duration {
        Duration::from_millis(self.progress_timeout_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> RegistryConfig {
        RegistryConfig { name: name.into(), ..RegistryConfig::default() }
    }

    #[test]
    fn endpoints_follow_from_names() {
        let endpoint = |name| named(name).endpoint_url().map(String::from);
        assert_eq!(endpoint("docker.io").unwrap(), "https://registry-1.docker.io/");
        assert_eq!(endpoint("reg.example.com:5000").unwrap(), "https://reg.example.com:5000/");
        for bad in ["", "a/b", "https://a", "a b", "user@a", "a?x"] {
            assert!(endpoint(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn half_a_credential_is_refused() {
        let mut config = named("a");
        config.username = Some("me".into());
        let source = |config: &RegistryConfig| config.credential_source(&EcrTokens::new());
        assert!(matches!(source(&config), Err(ConfigError::HalfCredential(_))));
        config.docker_config = Some("/x".into());
        assert!(matches!(source(&config), Err(ConfigError::TwoCredentials(_))));
    }

    #[test]
    fn ecr_has_credentials_by_itself_unless_told_otherwise() {
        let source = |config: RegistryConfig| config.credential_source(&EcrTokens::new()).unwrap();
        let ecr = || named("123456789012.dkr.ecr.eu-west-1.amazonaws.com");
        assert!(matches!(source(ecr()), CredentialSource::Ecr { .. }));
        assert!(matches!(source(named("docker.io")), CredentialSource::Anonymous));
        let none = RegistryConfig { credentials: Credentials::None, ..ecr() };
        assert!(matches!(source(none), CredentialSource::Anonymous));
        let own = RegistryConfig { docker_config: Some("/x".into()), ..ecr() };
        assert!(matches!(source(own), CredentialSource::DockerConfig { .. }));
    }
}

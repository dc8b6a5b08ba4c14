//! How every AWS API is reached: one HTTP client and one way to load regions and credentials.
//!
//! Invariant: one crypto provider, time-outs on every request, and the proxies that the environment names. Connections
//! spread over the addresses that a name has ([`Spread`]).

use std::env;
use std::error::Error;
use std::fmt::Write as _;
use std::time::Duration;

use aws_config::timeout::TimeoutConfig;
use aws_config::{AppName, BehaviorVersion, ConfigLoader};
use aws_credential_types::provider::error::CredentialsError;
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{TlsContext, TrustStore};
use aws_smithy_http_client::{Builder, Connector, tls};

use super::spread::Spread;

/// In the `User-Agent` of every request, by which the S3 face knows a daemon that was pointed at itself.
pub const APP_NAME: &str = "windlass";

/// Idle connections kept per host: what a node uses at full speed (about 140 at 100 Gbit/s, `facts/wire.md` 5).
const IDLE_CONNECTIONS: usize = 160;

/// S3 closes idle connections after a few seconds; dropping them first avoids the race.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);

/// What names a proxy, as everywhere.
const PROXY_VARIABLES: [&str; 6] =
    ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];

/// A loader of the SDK's configuration with our HTTP client, which trusts what is in `trusted` (PEM, as
/// [`trust::read`](super::trust::read) checked it) beside the system's certificates; region and credentials come from the
/// default chains.
pub(super) fn loader(connect: Duration, first_byte: Duration, trusted: Option<&[u8]>) -> ConfigLoader {
    let timeouts = TimeoutConfig::builder().connect_timeout(connect).read_timeout(first_byte).build();
    let loader = aws_config::defaults(BehaviorVersion::latest())
        .timeout_config(timeouts)
        .app_name(AppName::new(APP_NAME).expect("letters only"));
    let trust =
        trusted.map_or_else(TrustStore::default, |pem| TrustStore::default().with_pem_certificate(pem));
    let tls =
        TlsContext::builder().with_trust_store(trust).build().expect("only s2n's contexts fail to build");
    let addresses = Spread::default();
    if PROXY_VARIABLES.iter().any(|name| env::var_os(name).is_some()) {
        return loader.http_client(Builder::new().build_with_connector_fn(move |settings, _| {
            let mut connector = Connector::builder()
                .pool_idle_timeout(IDLE_TIMEOUT)
                .pool_max_idle_per_host(IDLE_CONNECTIONS)
                .proxy_config(ProxyConfig::from_env());
            connector.set_connector_settings(settings.cloned());
            connector
                .tls_provider(tls::Provider::Rustls(CryptoMode::AwsLc))
                .tls_context(tls.clone())
                .build_with_resolver(addresses.clone())
        }));
    }
    let http = Builder::new()
        .tls_provider(tls::Provider::Rustls(CryptoMode::AwsLc))
        .pool_idle_timeout(IDLE_TIMEOUT)
        .pool_max_idle_per_host(IDLE_CONNECTIONS)
        .tls_context(tls)
        .build_with_resolver(addresses);
    loader.http_client(http)
}

/// What to do when no link of the default credential chain had credentials; the SDK itself names the links.
const NO_CREDENTIALS: &str = "give the daemon's service account a role (EKS Pod Identity or IRSA), or the node one; \
    from a pod, Ec2InstanceMetadata needs a hop limit of 2 or hostNetwork";

/// A failure of the credential chain in one line, with the link that failed and what to do about it.
pub(super) fn without_credentials(error: &CredentialsError) -> String {
    // The chain's report has a line for each link.
    let report = chain_of(error).split_whitespace().collect::<Vec<_>>().join(" ");
    match error {
        CredentialsError::CredentialsNotLoaded(_) => format!("{report}; {NO_CREDENTIALS}"),
        _ => {
            format!("{}; {report}", failed_link(|name| env::var(name).ok().filter(|value| !value.is_empty())))
        }
    }
}

/// Which link of the default chain failed, and what to look at. The chain stops at the first link that is configured and
/// does not work, and its error does not always say which that was; the environment does.
fn failed_link(variable: impl Fn(&str) -> Option<String>) -> String {
    let value = |name: &str| variable(name).unwrap_or_else(|| "unset".to_owned());
    if variable("AWS_ACCESS_KEY_ID").is_some() {
        return "the keys in the environment (AWS_ACCESS_KEY_ID) do not work".into();
    }
    if let Some(profile) = variable("AWS_PROFILE") {
        return format!(
            "the profile {profile} (AWS_PROFILE) does not work: check the files in ~/.aws, its source_profile, and that \
             its role may be assumed"
        );
    }
    if let Some(file) = variable("AWS_WEB_IDENTITY_TOKEN_FILE") {
        let role = value("AWS_ROLE_ARN");
        return format!(
            "the web identity (IRSA) does not work: check the trust policy of the role {role} (issuer, namespace, \
             service account), and that the token {file} is mounted"
        );
    }
    let container = ["AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"];
    if let Some(uri) = container.into_iter().find_map(&variable) {
        let file = value("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE");
        return format!(
            "the container credentials (EKS Pod Identity) do not work: check that the agent answers at {uri}, that the \
             service account has an association, and that the token {file} is mounted"
        );
    }
    "the instance's metadata does not give credentials: check that the instance has a profile with a role; from a pod, \
     it needs a hop limit of 2 or hostNetwork"
        .into()
}

/// The error and its causes: the SDK's own Display says only "dispatch failure".
pub(super) fn chain_of(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            let _ = write!(text, ": {part}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_that_is_configured_first_is_the_one_that_failed() {
        let link = |set: &[(&str, &str)]| {
            failed_link(|name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
        };
        let irsa = [("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/token"), ("AWS_ROLE_ARN", "arn:aws:iam::1:role/r")];
        let pod = [("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://169.254.170.23/v1/credentials")];
        assert!(link(&irsa).contains("IRSA") && link(&irsa).contains("/var/token"));
        assert!(link(&irsa).contains("arn:aws:iam::1:role/r"));
        assert!(link(&[irsa.as_slice(), &pod].concat()).contains("IRSA"), "the chain's order");
        assert!(link(&pod).contains("Pod Identity") && link(&pod).contains("169.254.170.23"));
        assert!(link(&[("AWS_PROFILE", "prod")]).contains("prod"));
        assert!(link(&[("AWS_ACCESS_KEY_ID", "AKID")]).contains("AWS_ACCESS_KEY_ID"));
        assert!(!link(&[("AWS_ACCESS_KEY_ID", "AKID")]).contains("AKID)"), "no key in a message");
        assert!(link(&[]).contains("hop limit"));
    }
}

//! The mirror's listener as containerd meets it, for the commands that ask whether it is there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use http::StatusCode;
use tokio::time::Instant;
use url::Url;

use super::control::Daemon;
use crate::config::Config;

/// A mirror on the loopback answers in a millisecond; one that does not within this is no help to containerd, which
/// before 1.7 has no deadline of its own.
const ANSWER_DEADLINE: Duration = Duration::from_secs(2);

/// Between two attempts while a daemon starts.
const PAUSE: Duration = Duration::from_millis(200);

/// The header by which a registry is told from anything else that answers HTTP.
const API_VERSION: &str = "docker-distribution-api-version";

/// Where containerd reaches the mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MirrorAddress(SocketAddr);

impl MirrorAddress {
    /// The listener's address; the loopback when it listens on all of them.
    pub(super) fn of(config: &Config) -> Self {
        let mut address = config.registry.listen;
        if address.ip().is_unspecified() {
            address.set_ip(match address {
                SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
                SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
            });
        }
        Self(address)
    }

    /// As a host of `hosts.toml`.
    pub(super) fn url(&self) -> String {
        format!("http://{}", self.0)
    }
}

/// Asks the mirror once.
///
/// # Errors
/// Why it is not there, in one line.
pub(super) async fn ask(address: &MirrorAddress) -> Result<(), String> {
    let url: Url = address.url().parse().map_err(|error| format!("{}: {error}", address.url()))?;
    let asked = async {
        match Daemon::Admin(url).head("/v2/").await {
            Ok(response) if response.headers().contains_key(API_VERSION) => Ok(()),
            Ok(response) if response.status() == StatusCode::OK => {
                Err(format!("what answers at {} is not a registry mirror", address.url()))
            }
            Ok(response) => Err(format!("{} answered {}", address.url(), response.status())),
            Err(error) => Err(error.to_string()),
        }
    };
    let late = || Err(format!("{} does not answer within {ANSWER_DEADLINE:?}", address.url()));
    tokio::time::timeout(ANSWER_DEADLINE, asked).await.unwrap_or_else(|_| late())
}

/// Asks until it answers, at most for `patience`.
///
/// # Errors
/// What the last attempt met.
pub(super) async fn wait(address: &MirrorAddress, patience: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        match ask(address).await {
            Ok(()) => return Ok(()),
            Err(why) if Instant::now() >= deadline => anyhow::bail!(why),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

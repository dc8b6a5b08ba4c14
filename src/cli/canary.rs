//! A pull that is sent through containerd to see whether it arrives at the mirror.

use std::time::Duration;

use super::control::Daemon;
use crate::containerd::socket::{CallError, Socket};
use crate::http::admin::view;
use crate::http::canary;

/// Longest wait. containerd asks the mirror first, and the loopback takes no time; the rest is a machine that pulls
/// other images.
const DEADLINE: Duration = Duration::from_secs(20);

/// Between two looks whether it came.
const PAUSE: Duration = Duration::from_millis(100);

/// What is needed to send one.
#[derive(Debug, Clone)]
pub(super) struct Canary {
    pub(super) daemon: Daemon,
    pub(super) socket: Socket,
    /// Whose image containerd is asked for.
    pub(super) registry: String,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Arrival {
    Came,
    /// containerd went elsewhere; with what it said.
    Missing(String),
    /// It could not be sent, or nobody could be asked whether it came.
    Unknown(String),
}

impl Canary {
    /// Sends one, and returns as soon as it is known whether it came.
    pub(super) async fn send(&self) -> Arrival {
        let token = canary::token();
        let reference = canary::reference(&self.registry, &token);
        if let Err(why) = self.has_come(&token).await {
            return Arrival::Unknown(why);
        }
        tokio::select! {
            arrival = self.watch(&token) => arrival,
            pulled = self.socket.pull(&reference, DEADLINE) => match pulled {
                Err(error) if error.is_unknown_call() => Arrival::Unknown("this containerd has no CRI plugin".into()),
                Err(error @ CallError::Unreachable { .. }) => Arrival::Unknown(error.to_string()),
                // It may have come after the last look.
                pulled => self.look_again(&token, pulled.err()).await,
            }
        }
    }

    async fn watch(&self, token: &str) -> Arrival {
        loop {
            match self.has_come(token).await {
                Ok(true) => return Arrival::Came,
                Ok(false) => tokio::time::sleep(PAUSE).await,
                Err(why) => return Arrival::Unknown(why),
            }
        }
    }

    async fn look_again(&self, token: &str, refusal: Option<CallError>) -> Arrival {
        match self.has_come(token).await {
            Ok(true) => Arrival::Came,
            Ok(false) => Arrival::Missing(
                refusal.map_or_else(|| "it was pulled from elsewhere".into(), |error| error.to_string()),
            ),
            Err(why) => Arrival::Unknown(why),
        }
    }

    async fn has_come(&self, token: &str) -> Result<bool, String> {
        let seen: Result<Vec<view::Canary>, _> = self.daemon.get("/v1/canaries").await;
        let seen =
            seen.map_err(|error| format!("the daemon cannot be asked whether a canary came: {error}"))?;
        Ok(seen.iter().any(|canary| canary.token == token))
    }
}

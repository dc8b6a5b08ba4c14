//! The control socket: where it is, who may use it, and what it takes.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};

use super::{Admin, pins, spread};
use crate::cache::Cache;
use crate::fetch::{self, Fetcher, ResponseBody};
use crate::http::server::{BindError, Listener};
use crate::store::Store;

/// Section `[control]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ControlConfig {
    /// Path of the Unix socket. Its directory is created if it is missing.
    pub socket: PathBuf,
    /// Who may use it: `owner` (mode 0600) or also the `group` of the daemon (0660).
    pub access: SocketAccess,
}

/// Who may use the control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SocketAccess {
    Owner,
    Group,
}

impl SocketAccess {
    const fn mode(self) -> u32 {
        match self {
            Self::Owner => 0o600,
            Self::Group => 0o660,
        }
    }
}

impl Default for ControlConfig {
    fn default() -> Self {
        Self { socket: "/run/windlass/windlass.sock".into(), access: SocketAccess::Owner }
    }
}

/// Longest path of a Unix socket: `sun_path` of unix(7) is 108 bytes with its closing zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error(
        "control socket {} is {len} bytes long and a Unix socket's path has at most {SOCKET_PATH_BYTES_MAX}; \
         set `control.socket` to a shorter path", path.display()
    )]
    TooLong { path: PathBuf, len: usize },
    #[error("cannot create {}, the directory of `control.socket`: {source}", directory.display())]
    Directory { directory: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Bind(#[from] BindError),
}

impl ControlConfig {
    /// # Errors
    /// [`ControlError::TooLong`]
    pub fn check(&self) -> Result<(), ControlError> {
        let len = self.socket.as_os_str().as_bytes().len();
        if len > SOCKET_PATH_BYTES_MAX {
            return Err(ControlError::TooLong { path: self.socket.clone(), len });
        }
        Ok(())
    }
}

/// Who does what changes this node's disk, or another's.
#[derive(Clone)]
pub struct Actions {
    pub fetcher: Fetcher,
    pub store: Store,
    pub cache: Cache,
}

/// Answers on the control socket: the pages of [`Admin`], and what changes this node's disk.
#[derive(Clone)]
pub struct Control {
    admin: Admin,
    actions: Arc<OnceLock<Actions>>,
}

impl Control {
    /// Changes something only once there is something in `actions`.
    #[must_use]
    pub fn new(admin: Admin, actions: Arc<OnceLock<Actions>>) -> Self {
        Self { admin, actions }
    }

    #[must_use]
    pub const fn admin(&self) -> &Admin {
        &self.admin
    }

    pub async fn answer(&self, request: Request<Incoming>) -> Response<ResponseBody> {
        let path = request.uri().path();
        if ![fetch::PATH, pins::PINS_PATH, spread::SPREAD_PATH].contains(&path) {
            return self.admin.answer(request).await.map(BodyExt::boxed_unsync);
        }
        match self.actions.get() {
            Some(actions) if path == fetch::PATH => actions.fetcher.handle(request).await,
            Some(actions) if path == spread::SPREAD_PATH => spread::answer(&actions.cache, request).await,
            Some(actions) => pins::answer(&actions.store, request).await,
            None => {
                let early = Full::from("the daemon is still starting; try again in a moment\n");
                let mut response = Response::new(early.boxed_unsync());
                *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                response
            }
        }
    }
}

/// Binds the control socket, in place of one that nobody listens on any more.
///
/// # Errors
/// [`ControlError`]
pub async fn bind_control(config: &ControlConfig) -> Result<Listener, ControlError> {
    config.check()?;
    let directory = config.socket.parent().unwrap_or_else(|| Path::new("/"));
    if let Err(source) = std::fs::create_dir_all(directory) {
        return Err(ControlError::Directory { directory: directory.to_owned(), source });
    }
    Ok(Listener::bind_unix("control", "control.socket", &config.socket, config.access.mode()).await?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn the_mode_is_as_configured_and_the_directory_is_made() {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        for (access, mode) in [(SocketAccess::Owner, 0o600), (SocketAccess::Group, 0o660)] {
            let config = ControlConfig { socket: scratch.path().join("run/w.sock"), access };
            let _listener = bind_control(&config).await.expect("binds");
            let found = std::fs::metadata(&config.socket).expect("it exists").permissions().mode();
            assert_eq!(found & 0o777, mode);
        }
    }

    #[tokio::test]
    async fn a_path_that_is_too_long_says_so() {
        let config =
            ControlConfig { socket: Path::new("/tmp").join("x".repeat(120)), ..ControlConfig::default() };
        let error = bind_control(&config).await.expect_err("too long").to_string();
        assert!(error.contains("control.socket") && error.contains("107"), "{error}");
    }
}

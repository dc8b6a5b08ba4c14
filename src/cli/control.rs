//! Talks to a running daemon: HTTP over its control socket, or over its admin address.
//!
//! Invariant: one connection per request, closed with its response. An error says how to reach a daemon.
//! This file refuses to know what is asked: paths and bodies are the commands'.

use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use clap::Args;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use url::Url;

/// Where the daemon's control socket is unless `control.socket` says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/windlass/windlass.sock";

/// Longest answer that is read into memory: a table of some ten thousand contents.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Which daemon to ask, for commands that only read.
#[derive(Debug, Clone, Args)]
pub struct DaemonArgs {
    #[command(flatten)]
    pub socket: SocketArgs,
    /// Ask over the network instead: the admin address of a daemon, e.g. http://10.0.0.7:5102
    #[arg(long, value_name = "URL")]
    pub admin: Option<Url>,
}

/// Which daemon to ask, for commands that change something: only its socket takes those.
#[derive(Debug, Clone, Args)]
pub struct SocketArgs {
    /// Control socket of the daemon
    #[arg(long, value_name = "PATH", env = "WINDLASS_SOCKET", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
}

/// A daemon that can be asked.
#[derive(Debug, Clone)]
pub enum Daemon {
    /// Through its control socket.
    Socket(PathBuf),
    /// Through its admin address, read-only.
    Admin(Url),
}

/// Why the daemon gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error(
        "no daemon answers at {at}: {source}; start one with `windlass serve`, \
         or say where it is with --socket PATH or --admin URL"
    )]
    NotRunning { at: String, source: io::Error },
    #[error("{socket}: {source}; run this as the user that runs the daemon, or read with --admin http://127.0.0.1:5102",
        socket = .socket.display())]
    NotAllowed { socket: PathBuf, source: io::Error },
    #[error("{0} is no admin address; write it like http://127.0.0.1:5102")]
    NoAddress(Url),
    /// The daemon said no; its own words.
    #[error("{message} ({status})")]
    Refused { status: StatusCode, message: String },
    #[error("the daemon's answer broke off: {0}; see its log")]
    Broken(#[from] hyper::Error),
    #[error("the daemon's answer is not understood: {0}; are both of the same version?")]
    NotUnderstood(#[from] serde_json::Error),
    #[error("the daemon's answer is longer than {ANSWER_BYTES_MAX} bytes")]
    TooLong,
}

impl From<&DaemonArgs> for Daemon {
    fn from(args: &DaemonArgs) -> Self {
        match &args.admin {
            Some(url) => Self::Admin(url.clone()),
            None => Self::from(&args.socket),
        }
    }
}

impl From<&SocketArgs> for Daemon {
    fn from(args: &SocketArgs) -> Self {
        Self::Socket(args.socket.clone())
    }
}

impl Daemon {
    /// The JSON at `path`.
    ///
    /// # Errors
    /// [`ControlError`]; a status other than 2xx is [`ControlError::Refused`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ControlError> {
        let response = self.send(Method::GET, path, Bytes::new()).await?;
        Ok(serde_json::from_slice(&whole_body(response).await?)?)
    }

    /// Posts JSON and returns the response as it streams in.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn post(&self, path: &str, json: Bytes) -> Result<Response<Incoming>, ControlError> {
        self.send(Method::POST, path, json).await
    }

    /// What a HEAD of `path` is answered.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(super) async fn head(&self, path: &str) -> Result<Response<Incoming>, ControlError> {
        self.send(Method::HEAD, path, Bytes::new()).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ControlError> {
        let response = match self {
            Self::Socket(socket) => {
                let stream = UnixStream::connect(socket).await.map_err(|e| socket_error(socket, e))?;
                exchange(stream, request(method, path, "windlass", body)).await?
            }
            Self::Admin(url) => {
                let (host, port) = address(url).ok_or_else(|| ControlError::NoAddress(url.clone()))?;
                let at = format!("{host}:{port}");
                let stream = TcpStream::connect(&at)
                    .await
                    .map_err(|source| ControlError::NotRunning { at: at.clone(), source })?;
                exchange(stream, request(method, path, &at, body)).await?
            }
        };
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let message = String::from_utf8_lossy(&whole_body(response).await?).trim().to_owned();
        Err(ControlError::Refused { status, message })
    }
}

fn address(url: &Url) -> Option<(&str, u16)> {
    (url.scheme() == "http").then_some(())?;
    Some((url.host_str()?, url.port_or_known_default()?))
}

fn socket_error(socket: &Path, source: io::Error) -> ControlError {
    match source.kind() {
        io::ErrorKind::PermissionDenied => ControlError::NotAllowed { socket: socket.to_owned(), source },
        _ => ControlError::NotRunning { at: socket.display().to_string(), source },
    }
}

fn request(method: Method, path: &str, host: &str, body: Bytes) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = method;
    // The paths are this crate's own constants; one that did not parse would be answered with 404.
    *request.uri_mut() = path.parse().unwrap_or_default();
    let host = header::HeaderValue::from_str(host).unwrap_or(header::HeaderValue::from_static("windlass"));
    request.headers_mut().insert(header::HOST, host);
    request.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    request
}

async fn exchange<S>(stream: S, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, ControlError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the response's body; its error is the body's too.
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}

async fn whole_body(response: Response<Incoming>) -> Result<Bytes, ControlError> {
    let body = http_body_util::Limited::new(response.into_body(), ANSWER_BYTES_MAX);
    match body.collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) => {
            Err(error.downcast::<hyper::Error>().map_or(ControlError::TooLong, |e| ControlError::Broken(*e)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_daemon_that_does_not_run_comes_with_a_cure() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let daemon = Daemon::Socket(directory.path().join("windlass.sock"));
        let error =
            daemon.get::<serde_json::Value>("/v1/stats").await.expect_err("nobody is there").to_string();
        assert!(error.contains("windlass serve") && error.contains("windlass.sock"), "{error}");
        let daemon = Daemon::Admin("https://127.0.0.1:1".parse().expect("a URL"));
        let error = daemon.get::<serde_json::Value>("/").await.expect_err("no TLS there").to_string();
        assert!(error.contains("no admin address"), "{error}");
    }
}

//! The one HTTP/1.1 server under every face: binds, accepts, limits, drains and closes.
//!
//! Invariant: a connection on which a response has begun is closed with FIN and never with RST. containerd resumes
//! a body that ended early and fails the whole pull on a reset (`facts/wire.md`, trap 2), so an abort in mid-body
//! shuts down the write side, then reads away what the client had still sent.
//! This module refuses to look into a request: routing, status codes and bodies belong to the faces.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Connections one listener carries at a time. containerd opens three per image and 20 with parallel ranges, a
/// streaming model loader 32 per GPU process; 512 is twice what eight GPUs ask for.
pub const DEFAULT_MAX_CONNECTIONS: usize = 512;

/// How long a connection may take to send a request's head, idle keep-alive included: Go's transport drops idle
/// connections after 90 s itself, so we rarely race it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(100);

/// How long a closed connection is read from, waiting for the client's own FIN. Long enough for a loopback or
/// in-zone client to see ours; short, because the slot counts as used meanwhile.
const LINGER: Duration = Duration::from_secs(1);

/// Pause after `accept` fails, for lack of file descriptors as a rule: spinning would not free any.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Bounds of one listener.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections carried at a time; one more is closed before its request is read, which sends containerd to
    /// its next host.
    pub connections: usize,
    /// How long connections may finish what they are doing after the stop, before they are cut.
    pub drain: Duration,
}

/// Why a listener could not be opened. The text says what to change.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error(
        "{listener} cannot listen on {address}: something else listens there already; stop it, or set `{key}` \
         to a free address"
    )]
    InUse { listener: &'static str, address: String, key: &'static str },
    #[error("{listener} cannot listen on {address}: {source}; check `{key}`")]
    Other { listener: &'static str, address: String, key: &'static str, source: io::Error },
}

/// Connection metrics of all listeners.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    open: Family<ListenerLabels, Gauge>,
    refused: Family<ListenerLabels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ListenerLabels {
    listener: &'static str,
}

impl Metrics {
    /// Registers `http_connections{listener}` and `http_connections_refused{listener}`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("http_connections", "Open HTTP connections", metrics.open.clone());
        registry.register(
            "http_connections_refused",
            "HTTP connections closed at once because the listener carried its maximum",
            metrics.refused.clone(),
        );
        metrics
    }
}

/// A bound listener that does not accept yet.
#[derive(Debug)]
pub struct Listener {
    name: &'static str,
    socket: Socket,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Binds a TCP address. `name` is the listener's in messages and metrics (`registry`), `key` the configuration
    /// key that sets the address (`registry.listen`).
    ///
    /// # Errors
    /// [`BindError`] when the address is taken, not ours or not allowed.
    pub async fn bind(name: &'static str, key: &'static str, address: SocketAddr) -> Result<Self, BindError> {
        match TcpListener::bind(address).await {
            Ok(tcp) => Ok(Self { name, socket: Socket::Tcp(tcp) }),
            Err(source) => Err(bind_error(name, key, address.to_string(), source)),
        }
    }

    /// Binds a Unix socket with the permissions `mode`, replacing one that nobody listens on.
    ///
    /// # Errors
    /// [`BindError`] when a living process listens there, or the directory is missing or not writable.
    pub async fn bind_unix(
        name: &'static str,
        key: &'static str,
        path: &Path,
        mode: u32,
    ) -> Result<Self, BindError> {
        let failed = |source| bind_error(name, key, path.display().to_string(), source);
        if UnixStream::connect(path).await.is_ok() {
            return Err(failed(io::ErrorKind::AddrInUse.into()));
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let unix = UnixListener::bind(path).map_err(failed)?;
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(path, permissions).map_err(failed)?;
        Ok(Self { name, socket: Socket::Unix(unix, path.to_owned()) })
    }

    /// Where it listens; `None` for a Unix socket. Tells which port the system chose for port 0.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Tcp(tcp) => tcp.local_addr().ok(),
            Socket::Unix(..) => None,
        }
    }

    /// Accepts and serves until `stop`, then lets connections finish for [`Limits::drain`], then cuts them.
    ///
    /// Returns when the last connection is closed. `service` turns a request into a response and has no other way
    /// to fail; an error from its body cuts the connection.
    pub async fn serve<S, F, B>(self, service: S, limits: Limits, metrics: Metrics, stop: CancellationToken)
    where
        S: Fn(Request<Incoming>) -> F + Clone + Send + Sync + Unpin + 'static,
        F: Future<Output = Response<B>> + Send + 'static,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let labels = ListenerLabels { listener: self.name };
        let open = metrics.open.get_or_create_owned(&labels);
        let refused = metrics.refused.get_or_create_owned(&labels);
        let slots = Arc::new(Semaphore::new(limits.connections));
        let connections = TaskTracker::new();
        let cut = CancellationToken::new();
        while let Some(stream) = self.accept(&stop).await {
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                refused.inc();
                continue;
            };
            let (service, open) = (service.clone(), open.clone());
            let (stop, cut) = (stop.clone(), cut.clone());
            connections.spawn(async move {
                open.inc();
                converse(stream, service, stop, cut).await;
                open.dec();
                drop(slot);
            });
        }
        // Closing the listener first makes new dials fail at once, and containerd go to its next host.
        drop(self);
        connections.close();
        if tokio::time::timeout(limits.drain, connections.wait()).await.is_err() {
            cut.cancel();
            connections.wait().await;
        }
    }

    /// The next connection; `None` after `stop`.
    async fn accept(&self, stop: &CancellationToken) -> Option<Box<dyn Stream>> {
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => return None,
                accepted = self.socket.accept() => accepted,
            };
            match accepted {
                Ok(stream) => return Some(stream),
                Err(error) => {
                    tracing::warn!(listener = self.name, %error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }
}

impl Socket {
    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        match self {
            Self::Tcp(tcp) => {
                let (stream, _) = tcp.accept().await?;
                // A response's head must not wait for its body; failing to set it costs latency only.
                let _ = stream.set_nodelay(true);
                Ok(Box::new(stream))
            }
            Self::Unix(unix, _) => Ok(Box::new(unix.accept().await?.0)),
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// What TCP and Unix streams have in common.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

fn bind_error(listener: &'static str, key: &'static str, address: String, source: io::Error) -> BindError {
    if source.kind() == io::ErrorKind::AddrInUse {
        BindError::InUse { listener, address, key }
    } else {
        BindError::Other { listener, address, key, source }
    }
}

/// One connection from its first request to its FIN.
async fn converse<S, F, B>(
    stream: Box<dyn Stream>,
    service: S,
    stop: CancellationToken,
    cut: CancellationToken,
) where
    S: Fn(Request<Incoming>) -> F + Send + Unpin + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let answer = service_fn(move |request| -> BoxFuture<'static, Result<Response<B>, Infallible>> {
        let response = service(request);
        Box::pin(async move { Ok(response.await) })
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), answer);
    let ended = tokio::select! {
        biased;
        ended = poll_fn(|cx| connection.poll_without_shutdown(cx)) => Some(ended),
        () = stop.cancelled() => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            Pin::new(&mut connection).graceful_shutdown();
            tokio::select! {
                ended = poll_fn(|cx| connection.poll_without_shutdown(cx)) => ended,
                () = cut.cancelled() => Ok(()),
            }
        }
    };
    if let Err(error) = ended {
        // Clients hang up as a matter of course (`facts/wire.md` section 1.4).
        tracing::debug!(%error, "connection ended early");
    }
    // Taking the stream out drops the response's body first, and with it the demand for its bytes.
    close_with_fin(connection.into_parts().io.into_inner()).await;
}

/// Sends FIN and reads until the client's, so that the kernel has no unread input that would turn it into RST.
async fn close_with_fin(mut stream: Box<dyn Stream>) {
    let linger = async {
        stream.shutdown().await?;
        let mut sink = [0; 4096];
        while stream.read(&mut sink).await? > 0 {}
        io::Result::Ok(())
    };
    let _ = tokio::time::timeout(LINGER, linger).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{StreamExt, stream};
    use http_body::Frame;
    use http_body_util::BodyExt;
    use http_body_util::{Full, StreamBody, combinators::BoxBody};
    use tokio::net::TcpStream;

    type TestBody = BoxBody<Bytes, io::Error>;

    struct Running {
        address: SocketAddr,
        stop: CancellationToken,
        task: tokio::task::JoinHandle<()>,
    }

    /// `/cut` sends 1 KiB of 1 MiB and fails; `/hang` sends 1 KiB and waits for ever; the rest answers `ok`.
    async fn answer(request: Request<Incoming>) -> Response<TestBody> {
        let first = Ok(Frame::data(Bytes::from(vec![7; 1024])));
        let body = match request.uri().path() {
            "/cut" => {
                BoxBody::new(StreamBody::new(stream::iter([first, Err(io::Error::other("origin died"))])))
            }
            "/hang" => BoxBody::new(StreamBody::new(stream::iter([first]).chain(stream::pending()))),
            _ => return Response::new(BoxBody::new(Full::from("ok").map_err(|never| match never {}))),
        };
        Response::builder().header("content-length", 1 << 20).body(body).unwrap()
    }

    async fn start(connections: usize, drain: Duration) -> Running {
        let listener = Listener::bind("test", "test.listen", ([127, 0, 0, 1], 0).into()).await.unwrap();
        let address = listener.address().unwrap();
        let stop = CancellationToken::new();
        let limits = Limits { connections, drain };
        let task = tokio::spawn(listener.serve(answer, limits, Metrics::default(), stop.clone()));
        Running { address, stop, task }
    }

    async fn get(address: SocketAddr, path: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
        stream
    }

    async fn read_first(stream: &mut TcpStream) -> usize {
        stream.read(&mut [0; 4096]).await.unwrap()
    }

    #[tokio::test]
    async fn a_body_that_fails_ends_with_fin_even_with_unread_input() {
        let server = start(4, Duration::ZERO).await;
        let mut stream = get(server.address, "/cut").await;
        // Pipelined input that nobody will answer is what turns a close into a reset.
        stream.write_all(&[b'x'; 9000]).await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.expect("FIN, not RST");
    }

    #[tokio::test]
    async fn the_drain_waits_for_a_response_and_then_cuts_it_with_fin() {
        let server = start(4, Duration::from_millis(50)).await;
        let mut stream = get(server.address, "/hang").await;
        assert!(read_first(&mut stream).await > 0);
        server.stop.cancel();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.expect("FIN, not RST");
        drop(stream);
        server.task.await.unwrap();
        assert!(TcpStream::connect(server.address).await.is_err(), "the listener is closed");
    }

    #[tokio::test]
    async fn an_idle_connection_does_not_hold_up_the_drain() {
        let server = start(4, Duration::from_secs(3600)).await;
        let mut stream = get(server.address, "/").await;
        assert!(read_first(&mut stream).await > 0);
        server.stop.cancel();
        assert_eq!(read_first(&mut stream).await, 0);
        drop(stream);
        server.task.await.unwrap();
    }

    #[tokio::test]
    async fn one_connection_too_many_is_closed_at_once() {
        let server = start(1, Duration::ZERO).await;
        let mut first = get(server.address, "/hang").await;
        assert!(read_first(&mut first).await > 0);
        let mut second = TcpStream::connect(server.address).await.unwrap();
        assert_eq!(second.read(&mut [0; 16]).await.unwrap_or(0), 0);
    }

    #[tokio::test]
    async fn a_port_in_use_is_named_with_its_key() {
        let server = start(1, Duration::ZERO).await;
        let error = Listener::bind("registry", "registry.listen", server.address).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, BindError::InUse { .. }));
        assert!(text.contains("registry.listen") && text.contains(&server.address.to_string()), "{text}");
    }

    #[tokio::test]
    async fn a_stale_unix_socket_is_replaced_and_a_living_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let living = Listener::bind_unix("control", "control.socket", &path, 0o600).await.unwrap();
        let error = Listener::bind_unix("control", "control.socket", &path, 0o600).await.unwrap_err();
        assert!(matches!(error, BindError::InUse { .. }));
        drop(living);
        assert!(!path.exists());
    }
}

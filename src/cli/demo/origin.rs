//! The demo's origin: a registry and an S3 endpoint on the loopback that count what they send.
//!
//! Invariant: a byte is counted when it is handed to a connection, whoever asked and however often, so the counts are
//! the judge of "once per cluster" and no daemon's own word is taken for it.
//! This module refuses to authenticate, and to serve anything but the generated contents.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use http::response::Builder;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::generate::{Dataset, Generated};
use super::recipe::Recipe;
use super::{origin_registry, origin_s3};
use crate::content::{ByteRange, RangeHeader};

/// hyper serves a loopback client fastest with frames of 128 to 256 KiB.
const PIECE_BYTES: u64 = 128 << 10;
/// A shaped origin sends smaller pieces, so that a hundred connections that take turns all keep moving.
const SHAPED_PIECE_BYTES_MIN: u64 = 4 << 10;
const SHAPED_PIECES_PER_S: u64 = 500;
/// How far a shaped origin may run ahead after a pause: a few pieces, so that short pulls are shaped too.
const BURST: Duration = Duration::from_millis(10);

pub(super) type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// Both endpoints, running until [`Origin::stop`].
pub(super) struct Origin {
    registry: SocketAddr,
    s3: SocketAddr,
    shelf: Arc<Shelf>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// What the origin was asked for and sent so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Bytes of blobs, manifests and objects.
    pub bytes: u64,
    /// GETs that were answered with such bytes.
    pub content_requests: u64,
    /// Everything else: HEADs, listings, pings, refusals.
    pub metadata_requests: u64,
}

impl Origin {
    /// Listens on two free ports of 127.0.0.1. `bytes_per_s` limits both together.
    ///
    /// # Errors
    /// When the loopback has no port to give.
    pub(super) async fn start(dataset: Arc<Dataset>, bytes_per_s: Option<u64>) -> io::Result<Self> {
        let shelf = Arc::new(Shelf {
            dataset,
            shaper: bytes_per_s.map(|rate| Arc::new(Shaper::new(rate))),
            tally: Arc::default(),
        });
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let registry = listen(origin_registry::answer, &shelf, &stop, &tasks).await?;
        let s3 = listen(origin_s3::answer, &shelf, &stop, &tasks).await?;
        tasks.close();
        Ok(Self { registry, s3, shelf, stop, tasks })
    }

    #[must_use]
    pub(super) const fn registry(&self) -> SocketAddr {
        self.registry
    }

    #[must_use]
    pub(super) const fn s3(&self) -> SocketAddr {
        self.s3
    }

    #[must_use]
    pub(super) fn counts(&self) -> Counts {
        let Tally { bytes, content_requests, metadata_requests } = &*self.shelf.tally;
        Counts {
            bytes: bytes.load(Ordering::Relaxed),
            content_requests: content_requests.load(Ordering::Relaxed),
            metadata_requests: metadata_requests.load(Ordering::Relaxed),
        }
    }

    /// Hangs up on everyone.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        self.tasks.wait().await;
    }
}

/// What an endpoint answers from.
pub(super) struct Shelf {
    pub(super) dataset: Arc<Dataset>,
    shaper: Option<Arc<Shaper>>,
    tally: Arc<Tally>,
}

#[derive(Default)]
struct Tally {
    bytes: AtomicU64,
    content_requests: AtomicU64,
    metadata_requests: AtomicU64,
}

impl Shelf {
    /// Answers a GET or HEAD of `content`; `head` carries the endpoint's own headers.
    pub(super) fn send<B>(&self, request: &Request<B>, content: &Generated, head: Builder) -> Answer {
        let size = content.recipe.size();
        let head = head.header(CONTENT_TYPE, content.media_type).header(ACCEPT_RANGES, "bytes");
        if request.method() == Method::HEAD {
            return self.tell(head.header(CONTENT_LENGTH, size), Bytes::new());
        }
        let asked = request.headers().get(RANGE).and_then(|value| RangeHeader::parse(value.to_str().ok()?));
        let (head, range) = match asked.map(|range| range.resolve(size)) {
            None => (head, ByteRange::new(0, size)),
            Some(Ok(range)) => {
                let covers = format!("bytes {}-{}/{size}", range.start(), range.end() - 1);
                (head.status(StatusCode::PARTIAL_CONTENT).header(CONTENT_RANGE, covers), range)
            }
            Some(Err(_)) => {
                let head = Response::builder().status(StatusCode::RANGE_NOT_SATISFIABLE);
                return self.tell(head.header(CONTENT_RANGE, format!("bytes */{size}")), Bytes::new());
            }
        };
        self.tally.content_requests.fetch_add(1, Ordering::Relaxed);
        finish(head.header(CONTENT_LENGTH, range.len()), self.body(content.recipe.clone(), range))
    }

    /// Answers with something that is not content.
    pub(super) fn tell(&self, head: Builder, body: impl Into<Bytes>) -> Answer {
        self.tally.metadata_requests.fetch_add(1, Ordering::Relaxed);
        finish(head, Full::new(body.into()).boxed_unsync())
    }

    fn body(&self, recipe: Recipe, range: ByteRange) -> UnsyncBoxBody<Bytes, Infallible> {
        let (tally, shaper) = (self.tally.clone(), self.shaper.clone());
        let piece_bytes = shaper.as_ref().map_or(PIECE_BYTES, |shaper| shaper.piece_bytes());
        let pieces = stream::unfold(range.start(), move |at| {
            let piece = ByteRange::new(at, range.end().min(at + piece_bytes));
            let (recipe, tally, shaper) = (recipe.clone(), tally.clone(), shaper.clone());
            async move {
                if piece.is_empty() {
                    return None;
                }
                if let Some(shaper) = shaper {
                    shaper.wait(piece.len()).await;
                }
                tally.bytes.fetch_add(piece.len(), Ordering::Relaxed);
                Some((recipe.read(piece), piece.end()))
            }
        });
        StreamBody::new(pieces.map(|bytes| Ok(Frame::data(bytes)))).boxed_unsync()
    }
}

fn finish(head: Builder, body: UnsyncBoxBody<Bytes, Infallible>) -> Answer {
    head.body(body).expect("every header is made of digests, numbers and constants")
}

/// Paces the bytes of all connections together, to the byte over time.
struct Shaper {
    bytes_per_s: u64,
    /// When the next byte may go.
    next: Mutex<Instant>,
}

impl Shaper {
    fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s: bytes_per_s.max(1), next: Mutex::new(Instant::now()) }
    }

    fn piece_bytes(&self) -> u64 {
        (self.bytes_per_s / SHAPED_PIECES_PER_S).clamp(SHAPED_PIECE_BYTES_MIN, PIECE_BYTES)
    }

    async fn wait(&self, bytes: u64) {
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64);
        let turn = {
            let mut next = self.next.lock();
            let now = Instant::now();
            let turn = (*next).max(now.checked_sub(BURST).unwrap_or(now));
            *next = turn + takes;
            turn
        };
        sleep_until(turn).await;
    }
}

type Endpoint = fn(&Shelf, &Request<hyper::body::Incoming>) -> Answer;

async fn listen(
    endpoint: Endpoint,
    shelf: &Arc<Shelf>,
    stop: &CancellationToken,
    tasks: &TaskTracker,
) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let addr = listener.local_addr()?;
    let (shelf, stop, connections) = (shelf.clone(), stop.clone(), tasks.clone());
    tasks.spawn(async move {
        while let Some(Ok((connection, _))) = stop.run_until_cancelled(listener.accept()).await {
            let (shelf, stop) = (shelf.clone(), stop.clone());
            connections.spawn(async move {
                stop.run_until_cancelled(serve(endpoint, shelf, connection)).await;
            });
        }
    });
    Ok(addr)
}

/// A client that hangs up is its own business, so errors end the connection and nothing else.
async fn serve(endpoint: Endpoint, shelf: Arc<Shelf>, connection: TcpStream) {
    // Small answers must not wait for the acknowledgement of the previous ones.
    let _ = connection.set_nodelay(true);
    let service = service_fn(move |request| {
        let answer = endpoint(&shelf, &request);
        async move { Ok::<_, Infallible>(answer) }
    });
    let _ =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(connection), service).await;
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An origin with contents of about `size` bytes, and its contents.
    pub(in crate::cli::demo) async fn start(size: u64, bytes_per_s: Option<u64>) -> (Origin, Arc<Dataset>) {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let dataset = Arc::new(Dataset::generate(size, &AtomicU64::new(0)));
        (Origin::start(dataset.clone(), bytes_per_s).await.unwrap(), dataset)
    }

    #[tokio::test]
    async fn a_shaped_origin_takes_its_time() {
        let (origin, dataset) = start(100_000, Some(400_000)).await;
        let began = Instant::now();
        let layer = &dataset.image.layers[0];
        let url = format!("http://{}/v2/x/blobs/{}", origin.registry(), layer.digest);
        let client = reqwest::Client::new();
        for _ in 0..2 {
            client.get(&url).send().await.unwrap().bytes().await.unwrap();
        }
        // Only the last piece's own time need not have passed when the last byte is here.
        let least = 2.0 * layer.recipe.size() as f64 / 400_000.0 - 4096.0 / 400_000.0;
        assert!(began.elapsed() >= Duration::from_secs_f64(least) - BURST);
        origin.stop().await;
    }

    #[tokio::test]
    async fn stopping_hangs_up() {
        let (origin, dataset) = start(10 << 20, Some(1)).await;
        let url = format!("http://{}/v2/x/blobs/{}", origin.registry(), dataset.image.layers[0].digest);
        let response = reqwest::get(&url).await.unwrap();
        origin.stop().await;
        assert!(response.bytes().await.is_err());
    }
}

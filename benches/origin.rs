//! Ranges of a blob side by side from a registry: over connections of their own (HTTP/1.1), and over one (HTTP/2).
//!
//! Client and server are in this process, with TLS between them, and a path that holds back what it carries in both
//! directions, answers and window updates alike. Rounds alternate; compare ratios, not GB/s.
//!
//! `cargo bench --bench origin`. It says which protocol the registry client should offer for blobs.

use std::error::Error;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::try_join_all;
use futures_util::{StreamExt, stream};
use http::{Request, Response};
use http_body::Frame;
use http_body_util::StreamBody;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// As many chunks as a node has in the air from one origin by default, of the usual size.
const RANGES: usize = 8;
const RANGE_BYTES: usize = 8 << 20;
const PIECE_BYTES: usize = 256 << 10;
const ROUNDS: usize = 7;
/// In the region, and across an ocean.
const ROUND_TRIPS_MS: [u64; 3] = [0, 2, 80];

#[derive(Clone, Copy)]
enum Way {
    /// A connection for each range.
    One,
    /// One connection, with the windows that the client has by itself.
    Two,
    /// One connection, whose windows grow with what the path holds.
    TwoAdaptive,
}

const WAYS: [(&str, Way); 3] =
    [("HTTP/1.1", Way::One), ("HTTP/2", Way::Two), ("HTTP/2, adaptive windows", Way::TwoAdaptive)];

fn main() -> ExitCode {
    // `cargo test --all-targets` runs benches too.
    if !std::env::args().any(|arg| arg == "--bench") {
        println!("nothing to test here; run `cargo bench --bench origin`");
        return ExitCode::SUCCESS;
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime starts");
    match runtime.block_on(measure()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ORIGIN BENCH NOT RUN: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn measure() -> Outcome<()> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let own = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()])?;
    let key = rustls::pki_types::PrivateKeyDer::try_from(own.signing_key.serialize_der())?;
    let mut tls = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key)?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let registry = serve(TlsAcceptor::from(Arc::new(tls))).await?;
    println!("{RANGES} ranges of 8 MiB at once, {ROUNDS} rounds, medians:");
    for round_trip_ms in ROUND_TRIPS_MS {
        let path = delay(registry, Duration::from_millis(round_trip_ms) / 2).await?;
        let mut seconds = [Vec::new(), Vec::new(), Vec::new()];
        for round in 0..ROUNDS {
            // Each goes first, second and last in turn.
            for which in (0..WAYS.len()).map(|n| (n + round) % WAYS.len()) {
                seconds[which].push(fetch(&client(WAYS[which].1, &own.cert.pem())?, path).await?);
            }
        }
        let medians = seconds.map(|mut all| {
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        });
        println!("  a round trip of {round_trip_ms} ms:");
        for ((name, _), median) in WAYS.iter().zip(medians) {
            let rate = (RANGES * RANGE_BYTES) as f64 / 1e9 / median;
            println!("    {name:26} {rate:.2} GB/s, time ÷ HTTP/1.1 {:.2}", median / medians[0]);
        }
    }
    Ok(())
}

fn client(way: Way, trusted: &str) -> Outcome<reqwest::Client> {
    let builder =
        reqwest::Client::builder().tls_certs_merge([reqwest::Certificate::from_pem(trusted.as_bytes())?]);
    Ok(match way {
        Way::One => builder.http1_only(),
        Way::Two => builder,
        Way::TwoAdaptive => builder.http2_adaptive_window(true),
    }
    .build()?)
}

/// Seconds for all the ranges, on connections that are open already.
async fn fetch(client: &reqwest::Client, at: SocketAddr) -> Outcome<f64> {
    let url = format!("https://{at}/blob");
    let get = |bytes: usize| {
        let request = client.get(&url).header("range", format!("bytes=0-{}", bytes - 1));
        async move {
            let mut body = request.send().await?.error_for_status()?.bytes_stream();
            let mut got = 0;
            while let Some(piece) = body.next().await {
                got += piece?.len();
            }
            if got == bytes { Ok::<_, Box<dyn Error + Send + Sync>>(()) } else { Err("a short body".into()) }
        }
    };
    try_join_all((0..RANGES).map(|_| get(PIECE_BYTES))).await?;
    let begun = Instant::now();
    try_join_all((0..RANGES).map(|_| get(RANGE_BYTES))).await?;
    Ok(begun.elapsed().as_secs_f64())
}

async fn serve(tls: TlsAcceptor) -> Outcome<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let at = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let tls = tls.clone();
            tokio::spawn(async move {
                let Ok(stream) = tls.accept(stream).await else { return };
                let is_two = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                let (stream, service) = (TokioIo::new(stream), service_fn(answer));
                // A client that has enough hangs up.
                if is_two {
                    let _ = http2::Builder::new(TokioExecutor::new()).serve_connection(stream, service).await;
                } else {
                    let _ = http1::Builder::new().serve_connection(stream, service).await;
                }
            });
        }
    });
    Ok(at)
}

async fn answer(
    request: Request<Incoming>,
) -> Outcome<Response<StreamBody<stream::BoxStream<'static, Outcome<Frame<Bytes>>>>>> {
    let range = request.headers().get("range").and_then(|range| range.to_str().ok()).unwrap_or_default();
    let last: usize = range.trim_start_matches("bytes=0-").parse()?;
    let piece = Bytes::from_static(&[7; PIECE_BYTES]);
    let pieces = (0..(last + 1).div_ceil(PIECE_BYTES)).map(move |_| Ok(Frame::data(piece.clone())));
    Ok(Response::builder()
        .status(206)
        .header("content-length", last + 1)
        .body(StreamBody::new(stream::iter(pieces).boxed()))?)
}

/// A path to `to` on which everything takes `one_way` longer, in both directions.
async fn delay(to: SocketAddr, one_way: Duration) -> Outcome<SocketAddr> {
    if one_way.is_zero() {
        return Ok(to);
    }
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let at = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(to).await else { return };
            let _ = (near.set_nodelay(true), far.set_nodelay(true));
            let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
            tokio::spawn(carry(near_in, far_out, one_way));
            tokio::spawn(carry(far_in, near_out, one_way));
        }
    });
    Ok(at)
}

async fn carry(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    late: Duration,
) {
    // What a path holds: 1 GB/s for 100 ms, so that it is HTTP's windows that bind and not this one.
    let (sender, mut arriving) = tokio::sync::mpsc::channel::<(Instant, Bytes)>(1_600);
    tokio::spawn(async move {
        while let Some((due, bytes)) = arriving.recv().await {
            tokio::time::sleep_until(due.into()).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    });
    let mut buffer = vec![0; 64 << 10];
    while let Ok(got @ 1..) = from.read(&mut buffer).await {
        if sender.send((Instant::now() + late, Bytes::copy_from_slice(&buffer[..got]))).await.is_err() {
            return;
        }
    }
}

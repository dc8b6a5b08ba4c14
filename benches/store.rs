//! What the store costs: its checks beside a plain `pwrite`, its serving beside nginx, its index, its memory.
//!
//! Rounds of what is compared alternate in one run, so that a ratio is sound even when the machine is busy; compare
//! ratios, not GB/s. Files lie in `$WINDLASS_BENCH_DIR`, else in the temporary directory: a memory file system there
//! measures the processor, a disk the disk as well.
//!
//! `cargo bench --bench store`. nginx (Debian: nginx-light) is started by itself, on a port and with a configuration
//! of its own; without it that comparison is skipped, loudly.

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use bytesize::ByteSize;
use sha2::{Digest as _, Sha256};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use windlass::cache::{self, Cache, Parts};
use windlass::content::{
    Algorithm, Attestation, ChunkDigest, ChunkIndex, ContentId, Digest, ETag, Layout, NodeId, ObjectVersion,
};
use windlass::http::registry::{self, Callers, Mirror};
use windlass::http::served::Served;
use windlass::http::server::{self, Limits, Listener};
use windlass::origin::registry::{RegistryConfig, RegistryOrigin};
use windlass::origin::{self, access};
use windlass::store::{self, Expect, Store};
use windlass::swarm::membership::PeerBook;
use windlass::swarm::{self, Swarm};
use windlass::transport::MemoryNetwork;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const CHUNK_BYTES: u32 = 8 << 20;
/// As the transport hands them over.
const PIECE_BYTES: usize = 128 << 10;
/// 1 GiB a measurement.
const CHUNKS: u32 = 128;
const BLOB_BYTES: u64 = CHUNKS as u64 * CHUNK_BYTES as u64;
const ROUNDS: usize = 7;

/// What a lean client reads at a time.
const READ_BYTES: usize = 256 << 10;
const SLOW_READERS: usize = 64;
const SMALL_CONTENTS: u64 = 5_000;

const REGISTRY: &str = "bench.example";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match args.first().map(String::as_str) {
        Some("server") => serve(Path::new(&args[1])),
        Some("--bench") => measure(),
        // `cargo test --all-targets` runs benches too.
        _ => {
            println!("nothing to test here; run `cargo bench --bench store`");
            Ok(())
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("STORE BENCH NOT RUN: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure() -> Outcome<()> {
    let base = std::env::var_os("WINDLASS_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = base.join(format!("windlass-bench-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let outcome = writes(&dir).and_then(|()| index(&dir)).and_then(|()| serving(&dir));
    fs::remove_dir_all(&dir)?;
    outcome
}

fn open(data_dir: &Path) -> Outcome<Store> {
    let config = store::Config {
        data_dir: data_dir.to_owned(),
        budget: ByteSize::tib(1),
        free_floor: ByteSize(0),
        scrub_rate: ByteSize(0),
        ..store::Config::default()
    };
    Ok(Store::open(config, store::Metrics::default())?)
}

/// One chunk's bytes in pieces, as they come from the network.
fn received() -> (Vec<Bytes>, Attestation) {
    let mut bytes = vec![0; CHUNK_BYTES as usize];
    blake3::Hasher::new().update(b"chunk").finalize_xof().fill(&mut bytes);
    let digest = ChunkDigest::of(&bytes);
    let whole = Bytes::from(bytes);
    let pieces = (0..whole.len()).step_by(PIECE_BYTES).map(|at| whole.slice(at..at + PIECE_BYTES)).collect();
    (pieces, Attestation { digest, attester: NodeId::from_name("peer") })
}

fn object(key: String, size: u64) -> ContentId {
    ContentId::Object(ObjectVersion { bucket: "bench".into(), key, etag: ETag("\"1\"".into()), size })
}

/// Receive, verify, write; the same without verification; plain `pwritev`.
fn writes(dir: &Path) -> Outcome<()> {
    let runtime = Runtime::new()?;
    let (pieces, attestation) = received();
    let mut ratios = [Vec::new(), Vec::new()];
    let mut rates = [Vec::new(), Vec::new(), Vec::new()];
    for round in 0..ROUNDS {
        let mut seconds = [0.0; 3];
        // Each goes first, second and last in turn.
        for which in (0..3).map(|n| (n + round) % 3) {
            let at = dir.join("writes");
            seconds[which] = match which {
                0 => insert_all(&runtime, &at, &pieces, Expect::Attested(attestation))?,
                1 => insert_all(&runtime, &at, &pieces, Expect::Verified(attestation))?,
                _ => pwrite_all(&at, &pieces)?,
            };
            fs::remove_dir_all(&at)?;
        }
        ratios[0].push(seconds[1] / seconds[0]);
        ratios[1].push(seconds[2] / seconds[0]);
        for (rates, seconds) in rates.iter_mut().zip(seconds) {
            rates.push(BLOB_BYTES as f64 / 1e9 / seconds);
        }
    }
    println!("receive, verify, write of {CHUNKS} chunks of 8 MiB, {ROUNDS} rounds, medians:");
    println!("  verified            {:.2} GB/s", median(&mut rates[0]));
    println!("  unverified          {:.2} GB/s", median(&mut rates[1]));
    println!("  plain pwritev       {:.2} GB/s", median(&mut rates[2]));
    println!("  verified ÷ unverified {:.2}", median(&mut ratios[0]));
    println!("  verified ÷ pwritev    {:.2}", median(&mut ratios[1]));
    Ok(())
}

fn insert_all(runtime: &Runtime, at: &Path, pieces: &[Bytes], expect: Expect) -> Outcome<f64> {
    let store = open(at)?;
    let entry = store.create(&object("a".into(), BLOB_BYTES), Layout::new(BLOB_BYTES, CHUNK_BYTES)?)?;
    let begun = Instant::now();
    runtime.block_on(async {
        // Four at a time, as many as there are threads.
        for first in (0..CHUNKS).step_by(4) {
            let inserts =
                (first..first + 4).map(|chunk| entry.insert(ChunkIndex(chunk), pieces.to_vec(), expect));
            for done in futures_util::future::join_all(inserts).await {
                done?;
            }
        }
        Ok::<_, store::InsertError>(())
    })?;
    let seconds = begun.elapsed().as_secs_f64();
    store.close()?;
    Ok(seconds)
}

fn pwrite_all(at: &Path, pieces: &[Bytes]) -> Outcome<f64> {
    fs::create_dir_all(at)?;
    let file = File::create(at.join("plain"))?;
    file.set_len(BLOB_BYTES)?;
    let slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
    let begun = Instant::now();
    for chunk in 0..CHUNKS {
        rustix::io::pwritev(&file, &slices, u64::from(chunk) * u64::from(CHUNK_BYTES))?;
    }
    Ok(begun.elapsed().as_secs_f64())
}

/// Contents per second: written durably into the index at a clean end, and found in it at the next start.
fn index(dir: &Path) -> Outcome<()> {
    let at = dir.join("index");
    let runtime = Runtime::new()?;
    let store = open(&at)?;
    let begun = Instant::now();
    runtime.block_on(async {
        for number in 0..SMALL_CONTENTS {
            let bytes = Bytes::copy_from_slice(&number.to_le_bytes());
            let entry = store.create(&object(number.to_string(), 8), Layout::new(8, CHUNK_BYTES)?)?;
            entry.insert(ChunkIndex(0), vec![bytes], Expect::Attest(NodeId::from_name("me"))).await?;
        }
        Ok::<_, Box<dyn Error + Send + Sync>>(())
    })?;
    let inserted = begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    store.flush()?;
    let flushed = begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    store.close()?;
    let closed = begun.elapsed().as_secs_f64();
    drop(store);
    let begun = Instant::now();
    let store = open(&at)?;
    let opened = begun.elapsed().as_secs_f64();
    let found = store.held().len() as f64;
    println!("contents of one chunk per second, of {SMALL_CONTENTS}:");
    for (what, seconds) in [
        ("created and written", inserted),
        ("made durable, sidecar and all", flushed),
        ("written to the index at the end", closed),
        ("found in the index at the start", opened),
    ] {
        println!("  {what:32} {:.0}", found / seconds);
    }
    store.close()?;
    Ok(fs::remove_dir_all(&at)?)
}

/// A child that is ended with its guard.
struct Server {
    child: Child,
    address: SocketAddr,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A sealed blob of 1 GiB to a client on the same node, from us and from nginx; then memory with slow readers.
fn serving(dir: &Path) -> Outcome<()> {
    let digest = make_blob(dir)?;
    let target = format!("/v2/a/blobs/{digest}?ns={REGISTRY}");
    let ours = start_ours(dir)?;
    let nginx = start_nginx(dir)?;
    if let Some(nginx) = &nginx {
        let (mut ratios, mut rates) = (Vec::new(), [Vec::new(), Vec::new()]);
        get(ours.address, &target)?;
        get(nginx.address, "/blob")?;
        for round in 0..ROUNDS {
            let (mut us, mut them) = (0.0, 0.0);
            for which in [round % 2, (round + 1) % 2] {
                if which == 0 {
                    us = get(ours.address, &target)?;
                } else {
                    them = get(nginx.address, "/blob")?;
                }
            }
            ratios.push(them / us);
            rates[0].push(BLOB_BYTES as f64 / 1e9 / us);
            rates[1].push(BLOB_BYTES as f64 / 1e9 / them);
        }
        println!("a sealed blob of 1 GiB to a lean client on this node, {ROUNDS} rounds, medians:");
        println!("  windlass            {:.2} GB/s", median(&mut rates[0]));
        println!("  nginx, sendfile on  {:.2} GB/s", median(&mut rates[1]));
        println!("  windlass ÷ nginx    {:.2} (aim: 1.0 or more)", median(&mut ratios));
    } else {
        println!("NOT MEASURED: serving beside nginx, for there is no nginx here (Debian: nginx-light)");
    }
    memory(&ours, &target)
}

fn memory(server: &Server, target: &str) -> Outcome<()> {
    let before = resident_bytes(server)?;
    let mut readers = Vec::new();
    for _ in 0..SLOW_READERS {
        let mut stream = request(server.address, target)?;
        // The head and a little of the body, and then nothing for a while.
        stream.read_exact(&mut [0; 4096])?;
        readers.push(stream);
    }
    std::thread::sleep(Duration::from_secs(2));
    let with = resident_bytes(server)?;
    println!("resident memory: {} MiB, with {SLOW_READERS} slow readers {} MiB", before >> 20, with >> 20);
    Ok(())
}

fn resident_bytes(server: &Server) -> Outcome<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", server.child.id()))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).ok_or("no VmRSS")?;
    let kib: u64 = line.split_whitespace().nth(1).ok_or("no figure")?.parse()?;
    Ok(kib << 10)
}

fn make_blob(dir: &Path) -> Outcome<Digest> {
    let (pieces, attestation) = received();
    let mut hasher = Sha256::new();
    for _ in 0..CHUNKS {
        pieces.iter().for_each(|piece| hasher.update(piece));
    }
    let digest = Digest::from_bytes(Algorithm::Sha256, &hasher.finalize())?;
    let store = open(&dir.join("served"))?;
    let entry = store.create(&ContentId::Blob(digest.clone()), Layout::new(BLOB_BYTES, CHUNK_BYTES)?)?;
    Runtime::new()?.block_on(async {
        for chunk in 0..CHUNKS {
            entry.insert(ChunkIndex(chunk), pieces.clone(), Expect::Attested(attestation)).await?;
        }
        entry.seal().await?;
        Ok::<_, Box<dyn Error + Send + Sync>>(())
    })?;
    store.close()?;
    let mut plain = File::create(dir.join("blob"))?;
    for _ in 0..CHUNKS {
        pieces.iter().try_for_each(|piece| plain.write_all(piece))?;
    }
    Ok(digest)
}

fn start_ours(dir: &Path) -> Outcome<Server> {
    let mut child = Command::new(std::env::current_exe()?)
        .args([Path::new("server"), dir])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut line)?;
    let mut server = Server { child, address: (Ipv4Addr::LOCALHOST, 0).into() };
    server.address = line.trim().parse()?;
    Ok(server)
}

/// None where there is no nginx.
fn start_nginx(dir: &Path) -> Outcome<Option<Server>> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let config = dir.join("nginx.conf");
    let d = dir.display();
    fs::write(
        &config,
        format!(
            "daemon off; master_process off; pid {d}/nginx.pid; error_log {d}/nginx.log; user root;\n\
             events {{}}\n\
             http {{ access_log off; sendfile on; tcp_nopush on; client_body_temp_path {d}/t1; proxy_temp_path {d}/t2;\n\
             fastcgi_temp_path {d}/t3; uwsgi_temp_path {d}/t4; scgi_temp_path {d}/t5;\n\
             server {{ listen {port}; root {d}; }} }}\n"
        ),
    )?;
    let child = match Command::new("nginx").arg("-c").arg(&config).stderr(Stdio::null()).spawn() {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let server = Server { child, address: port };
    for _ in 0..100 {
        if TcpStream::connect(port).is_ok() {
            return Ok(Some(server));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err("nginx does not answer".into())
}

fn request(address: SocketAddr, target: &str) -> Outcome<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    write!(stream, "GET {target} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
    Ok(stream)
}

/// Seconds for the whole blob.
fn get(address: SocketAddr, target: &str) -> Outcome<f64> {
    let begun = Instant::now();
    let mut stream = request(address, target)?;
    let (mut buffer, mut got) = (vec![0; READ_BYTES], 0);
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            read => got += read as u64,
        }
    }
    if got < BLOB_BYTES {
        return Err(format!("{target} gave {got} bytes").into());
    }
    Ok(begun.elapsed().as_secs_f64())
}

/// The child's half: the registry mirror over a store that has the blob.
fn serve(dir: &Path) -> Outcome<()> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let store = open(&dir.join("served"))?;
    Runtime::new()?.block_on(async {
        let stop = CancellationToken::new();
        let cache = Cache::start(Parts {
            config: cache::Config::default(),
            swarm: Swarm::new(NodeId::from_name("bench"), swarm::Config::default(), 7),
            store,
            transport: MemoryNetwork::new(1).join("bench", 16).0,
            peers: tokio::sync::watch::channel(PeerBook::new(Vec::new(), true)).1,
            metrics: cache::Metrics::default(),
            shutdown: stop.clone(),
        });
        let named = RegistryConfig { name: REGISTRY.into(), ..RegistryConfig::default() };
        let origins = RegistryOrigin::new(vec![named], &origin::Metrics::default())?;
        let config = registry::Config::default();
        let callers = Callers::new(&access::Config::default(), config.tag_ttl(), &access::Metrics::default());
        let mirror = Mirror::new(&config, cache, origins, Arc::new(callers), Served::default());
        let listener = Listener::bind("bench", "bench", (Ipv4Addr::LOCALHOST, 0).into()).await?;
        println!("{}", listener.address().ok_or("no address")?);
        let limits = Limits { connections: 128, drain: Duration::ZERO };
        let answer = move |request| {
            let mirror: Mirror = mirror.clone();
            async move { mirror.answer(request).await }
        };
        listener.serve(answer, limits, server::Metrics::default(), stop).await;
        Ok(())
    })
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

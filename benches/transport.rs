//! The chunk path over our QUIC transport against TCP with TLS 1.3, on a network that behaves like a cloud's.
//!
//! Two processes, each pinned to a core with one thread, in two network namespaces joined by a veth pair on which
//! segmentation offloads are off and GRO is on: as on AWS's ENA, where the kernel cuts and joins packets itself. On
//! loopback a batch crosses whole, which flatters QUIC and says nothing. Rounds of both alternate in one run, so
//! the ratio of each pair is sound even when the machine is busy; compare ratios, not GB/s.
//!
//! `cargo bench --bench transport`, as root, with iproute2 and ethtool. Namespaces carry this process's id and are
//! removed at the end.

use std::error::Error;
use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use windlass::transport::tls::{self, Authority, Files, Identity, PeerName};
use windlass::transport::{
    Config, Incoming, Metrics, PeerAddr, QuicTransport, RecvStream, SendStream, Transport,
};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const CHUNK_BYTES: usize = 8 << 20;
const PIECE_BYTES: usize = 128 << 10;

/// Chunks asked for ahead, over both.
const IN_FLIGHT: usize = 4;

/// 1 GiB a measurement: long enough to leave slow start behind, short enough that a pair sees the same machine.
const CHUNKS: usize = 128;
const ROUNDS: usize = 7;

const SENDER: Ipv4Addr = Ipv4Addr::new(10, 255, 77, 1);
const RECEIVER: Ipv4Addr = Ipv4Addr::new(10, 255, 77, 2);
const QUIC_PORT: u16 = 5103;
const TCP_PORT: u16 = 5104;
const CLUSTER: &str = "bench";

/// What a path must show: name, link MTU, least `current_mtu`, ratio aimed at.
const PATHS: [(u16, u16, f64); 2] = [(9_001, 8_952, 1.0), (1_500, 1_440, 0.5)];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match args.first().map(String::as_str) {
        Some("sender") => one_thread(send(PathBuf::from(&args[1]))),
        Some("receiver") => one_thread(receive(PathBuf::from(&args[1]), args[2].clone())),
        Some("--bench") => compare(),
        // `cargo test --all-targets` runs benches too.
        _ => {
            println!("nothing to test here; run `cargo bench --bench transport` as root");
            Ok(true)
        }
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("TRANSPORT BENCH NOT RUN: {error}");
            ExitCode::FAILURE
        }
    }
}

fn one_thread(work: impl Future<Output = Outcome<()>>) -> Outcome<bool> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)?;
    Ok(true)
}

/// Runs every path; `false` when one of them is not what it should be.
fn compare() -> Outcome<bool> {
    let dir = tempfile::tempdir()?;
    issue(dir.path())?;
    let mut sound = true;
    for (mtu, least_mtu, aim) in PATHS {
        let network = Network::create(mtu)?;
        sound &= measure(&network, dir.path(), least_mtu, aim)?;
    }
    Ok(sound)
}

fn measure(network: &Network, dir: &Path, least_mtu: u16, aim: f64) -> Outcome<bool> {
    let mut sender = network.spawn(0, &["sender", text(dir)])?;
    let mut lines = BufReader::new(sender.stdout.take().ok_or("no output of the sender")?).lines();
    lines.next().ok_or("the sender did not start")??;
    let mut receiver = network.spawn(1, &["receiver", text(dir), &sender.id().to_string()])?;
    println!("\nMTU {}, {} rounds of {} MiB each", network.mtu, ROUNDS, (CHUNKS * CHUNK_BYTES) >> 20);
    println!("round   QUIC GB/s   TLS GB/s   ratio   QUIC CPU-s/GB   TLS CPU-s/GB");
    let mut pairs = Vec::new();
    let rounds = BufReader::new(receiver.stdout.take().ok_or("no output of the receiver")?).lines();
    for line in rounds.take(ROUNDS) {
        let numbers: Vec<f64> = line?.split(' ').map(str::parse).collect::<Result<_, _>>()?;
        let [quic, tls, quic_cpu, tls_cpu] = numbers[..] else { return Err("a torn line".into()) };
        pairs.push((quic, tls, quic / tls));
        println!(
            "{:>5} {quic:>11.2} {tls:>10.2} {:>7.2} {quic_cpu:>15.2} {tls_cpu:>14.2}",
            pairs.len(),
            quic / tls
        );
    }
    if pairs.len() != ROUNDS {
        return Err("the receiver failed".into());
    }
    drop(sender.stdin.take());
    let path = lines.next().ok_or("the sender said nothing of its path")??;
    sender.wait()?;
    drop(receiver.stdin.take());
    receiver.wait()?;
    let (current_mtu, per_send) = path.split_once(' ').ok_or("a torn line")?;
    let (current_mtu, per_send): (u16, f64) = (current_mtu.parse()?, per_send.parse()?);
    let ratio = spread(pairs.iter().map(|p| p.2));
    println!(
        "median: QUIC {:.2} GB/s, TLS {:.2} GB/s; ratio {:.2} [{:.2}-{:.2}], aim {aim:.2} {}",
        spread(pairs.iter().map(|p| p.0)).1,
        spread(pairs.iter().map(|p| p.1)).1,
        ratio.1,
        ratio.0,
        ratio.2,
        if ratio.1 >= aim { "met" } else { "MISSED" },
    );
    let (mtu_right, gso_on) = (current_mtu >= least_mtu, per_send > 2.0);
    println!(
        "path: current_mtu {current_mtu} {}, {per_send:.1} packets per send: GSO {}",
        if mtu_right { "as it must be" } else { "TOO SMALL" },
        if gso_on { "on" } else { "OFF" }
    );
    Ok(mtu_right && gso_on)
}

/// Least, median and greatest.
fn spread(values: impl Iterator<Item = f64>) -> (f64, f64, f64) {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    (values[0], values[values.len() / 2], values[values.len() - 1])
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8 on the systems that have namespaces")
}

/// Two namespaces and the wire between them, removed when dropped.
struct Network {
    mtu: u16,
    spaces: [String; 2],
}

impl Network {
    fn create(mtu: u16) -> Outcome<Self> {
        let id = std::process::id();
        let network = Self { mtu, spaces: [format!("wl{id}a"), format!("wl{id}b")] };
        for space in &network.spaces {
            system(&format!("ip netns add {space}"))?;
        }
        let [a, b] = &network.spaces;
        system(&format!("ip link add veth0 netns {a} mtu {mtu} type veth peer name veth0 netns {b}"))?;
        for (space, addr) in network.spaces.iter().zip([SENDER, RECEIVER]) {
            system(&format!("ip -n {space} link set veth0 mtu {mtu}"))?;
            // With any TSO flag on, veth hands batches over whole and never joins packets by GRO.
            system(&format!(
                "ip netns exec {space} ethtool -K veth0 tso off tx-udp-segmentation off gro on"
            ))?;
            system(&format!("ip -n {space} addr add {addr}/24 dev veth0"))?;
            system(&format!("ip -n {space} link set lo up"))?;
            system(&format!("ip -n {space} link set veth0 up"))?;
        }
        Ok(network)
    }

    /// This program in one of the namespaces, on one core.
    fn spawn(&self, side: usize, args: &[&str]) -> Outcome<Child> {
        let cores = std::thread::available_parallelism()?.get();
        let child = Command::new("ip")
            .args(["netns", "exec", &self.spaces[side], "taskset", "-c", &(side % cores).to_string()])
            .arg(std::env::current_exe()?)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(child)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // One that could not be made needs no removal.
        for space in self.spaces.iter().filter(|space| Path::new("/run/netns").join(space).exists()) {
            if let Err(error) = system(&format!("ip netns del {space}")) {
                eprintln!("{error}");
            }
        }
    }
}

fn system(command: &str) -> Outcome<()> {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap_or_default())
        .args(words)
        .output()
        .map_err(|error| format!("`{command}`: {error} (iproute2 and ethtool are needed)"))?;
    if output.status.success() {
        return Ok(());
    }
    let reason = String::from_utf8_lossy(&output.stderr);
    Err(format!("`{command}`: {} (root is needed)", reason.trim()).into())
}

/// One CA and a certificate for each side.
fn issue(dir: &Path) -> Outcome<()> {
    let validity = Duration::from_secs(86_400);
    let (authority, _) = Authority::create(CLUSTER, validity)?;
    std::fs::write(dir.join("ca.crt"), authority.certificate_pem())?;
    for node in ["sender", "receiver"] {
        let issued = authority.issue(&PeerName::new(CLUSTER, node)?, validity)?;
        std::fs::write(dir.join(format!("{node}.crt")), issued.certificate_pem)?;
        std::fs::write(dir.join(format!("{node}.key")), issued.key_pem)?;
    }
    Ok(())
}

fn identity(dir: &Path, node: &str) -> Outcome<Identity> {
    let files = Files {
        ca: dir.join("ca.crt"),
        certificate: dir.join(format!("{node}.crt")),
        key: dir.join(format!("{node}.key")),
    };
    Ok(Identity::load(files, CLUSTER)?)
}

fn bind(
    dir: &Path,
    node: &str,
    listen: SocketAddr,
) -> Outcome<(Arc<QuicTransport>, mpsc::Receiver<Incoming>)> {
    let config = Config { listen, ..Config::default() };
    Ok(QuicTransport::bind(config, identity(dir, node)?, Metrics::default())?)
}

/// Serves chunks over both until the parent closes our input; then prints what the path was.
async fn send(dir: PathBuf) -> Outcome<()> {
    let (transport, mut incoming) = bind(&dir, "sender", SocketAddr::from((SENDER, QUIC_PORT)))?;
    let listener = TcpListener::bind((SENDER, TCP_PORT)).await?;
    let acceptor = TlsAcceptor::from(Arc::new(tls::server_config(&Arc::new(identity(&dir, "sender")?))?));
    let chunk = Bytes::from((0..CHUNK_BYTES).map(|i| i.to_le_bytes()[0]).collect::<Vec<u8>>());
    println!("ready");
    let over_quic = async {
        while let Some(arrived) = incoming.recv().await {
            if let Incoming::Stream { send, recv, .. } = arrived {
                tokio::spawn(answer(send, recv, chunk.clone()));
            }
        }
    };
    let over_tls = async {
        while let Ok((socket, _)) = listener.accept().await {
            let (acceptor, chunk) = (acceptor.clone(), chunk.clone());
            tokio::spawn(async move {
                if let Err(error) = answer_tls(socket, acceptor, chunk).await {
                    eprintln!("TLS: {error}");
                }
            });
        }
    };
    tokio::select! {
        () = over_quic => {}
        () = over_tls => {}
        () = told_to_stop() => {}
    }
    let path = transport.connections().pop().ok_or("no connection is left")?;
    println!("{} {}", path.current_mtu, path.packets_per_send);
    transport.close().await;
    Ok(())
}

/// The parent closes our input.
async fn told_to_stop() {
    // Whatever the outcome, nobody speaks to us any more.
    let _ = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await;
}

async fn answer(mut send: SendStream, mut recv: RecvStream, chunk: Bytes) -> Outcome<()> {
    recv.read_exact(8).await?;
    for at in (0..CHUNK_BYTES).step_by(PIECE_BYTES) {
        send.write(chunk.slice(at..at + PIECE_BYTES)).await?;
    }
    send.finish()?;
    Ok(())
}

async fn answer_tls(socket: TcpStream, acceptor: TlsAcceptor, chunk: Bytes) -> Outcome<()> {
    socket.set_nodelay(true)?;
    let mut tls = acceptor.accept(socket).await?;
    let mut request = [0; 8];
    // The requester ends the connection when it has everything.
    while tls.read_exact(&mut request).await.is_ok() {
        for piece in chunk.chunks(PIECE_BYTES) {
            tls.write_all(piece).await?;
        }
        tls.flush().await?;
    }
    Ok(())
}

/// Fetches over both in turn; prints GB/s and CPU seconds per GB of each pair.
async fn receive(dir: PathBuf, sender_pid: String) -> Outcome<()> {
    let (transport, _incoming) = bind(&dir, "receiver", SocketAddr::from((RECEIVER, QUIC_PORT)))?;
    let to = transport.resolve(SocketAddr::from((SENDER, QUIC_PORT))).await?;
    let config = tls::client_config(&Arc::new(identity(&dir, "receiver")?))?;
    let connector = TlsConnector::from(Arc::new(config));
    let socket = TcpStream::connect((SENDER, TCP_PORT)).await?;
    socket.set_nodelay(true)?;
    let name = ServerName::try_from(PeerName::new(CLUSTER, "sender")?.dns())?;
    let mut tls = connector.connect(name, socket).await?;
    for round in 0..=ROUNDS {
        let clock = Clock::start(&sender_pid)?;
        fetch(&transport, &to).await?;
        let (quic, quic_cpu) = clock.read()?;
        let clock = Clock::start(&sender_pid)?;
        fetch_tls(&mut tls).await?;
        let (tls, tls_cpu) = clock.read()?;
        // The first pair warms up: MTU discovery, congestion windows, page tables.
        if round > 0 {
            println!("{quic} {tls} {quic_cpu} {tls_cpu}");
        }
    }
    told_to_stop().await;
    transport.close().await;
    Ok(())
}

async fn fetch(transport: &QuicTransport, to: &PeerAddr) -> Outcome<()> {
    let one = async || -> Outcome<usize> {
        let (mut send, mut recv) = transport.open(to).await?;
        send.write(Bytes::from_static(b"chunk 00")).await?;
        send.finish()?;
        let (mut got, mut pieces) = (0, Vec::new());
        loop {
            match recv.read(&mut pieces, PIECE_BYTES * 4).await? {
                0 => return Ok(got),
                n => got += n,
            }
            pieces.clear();
        }
    };
    let mut chunks = stream::iter(0..CHUNKS).map(|_| one()).buffer_unordered(IN_FLIGHT);
    while let Some(got) = chunks.next().await {
        if got? != CHUNK_BYTES {
            return Err("a chunk came short".into());
        }
    }
    Ok(())
}

async fn fetch_tls(tls: &mut tokio_rustls::client::TlsStream<TcpStream>) -> Outcome<()> {
    let mut buffer = vec![0; PIECE_BYTES];
    for ahead in 0..CHUNKS + IN_FLIGHT {
        if ahead < CHUNKS {
            tls.write_all(b"chunk 00").await?;
            tls.flush().await?;
        }
        if ahead >= IN_FLIGHT {
            let mut left = CHUNK_BYTES;
            while left > 0 {
                let room = left.min(PIECE_BYTES);
                match tls.read(&mut buffer[..room]).await? {
                    0 => return Err("the connection ended".into()),
                    n => left -= n,
                }
            }
        }
    }
    Ok(())
}

/// Time and CPU of both processes.
struct Clock<'a> {
    sender_pid: &'a str,
    started: Instant,
    cpu: f64,
}

impl<'a> Clock<'a> {
    fn start(sender_pid: &'a str) -> Outcome<Self> {
        Ok(Self { sender_pid, cpu: cpu_seconds(sender_pid)?, started: Instant::now() })
    }

    /// GB/s and CPU seconds per GB.
    fn read(self) -> Outcome<(f64, f64)> {
        let seconds = self.started.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "exact far beyond the sizes moved here")]
        let gigabytes = (CHUNKS * CHUNK_BYTES) as f64 / 1e9;
        Ok((gigabytes / seconds, (cpu_seconds(self.sender_pid)? - self.cpu) / gigabytes))
    }
}

/// User and system time of the sender and this process: fields 14 and 15 of `proc_pid_stat(5)`.
fn cpu_seconds(sender_pid: &str) -> Outcome<f64> {
    /// USER_HZ, which Linux shows to programs whatever the kernel's own clock.
    const TICKS_PER_SECOND: f64 = 100.0;
    let mut ticks = 0.0;
    for pid in [sender_pid, "self"] {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let after_name = stat.rsplit_once(") ").ok_or("an odd /proc")?.1;
        for field in after_name.split(' ').skip(11).take(2) {
            ticks += field.parse::<f64>()?;
        }
    }
    Ok(ticks / TICKS_PER_SECOND)
}

//! What every transport must do, run on each of them, and what only QUIC can prove: who is at the other end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::timeout;
use windlass::content::NodeId;
use windlass::transport::tls::{Authority, Identity, PeerName};
use windlass::transport::{
    Config, DROPPED, Incoming, MAX_DATAGRAM_BYTES, MAX_MESSAGE_BYTES, MemoryNetwork, Metrics, OpenError,
    PeerAddr, QuicTransport, RecvStream, SendError, SendStream, StreamError, Transport,
};

/// Nothing here takes a second; a minute without progress is a hang.
const HANG: Duration = Duration::from_secs(60);

const DAY: Duration = Duration::from_secs(86_400);

struct Node {
    transport: Arc<dyn Transport>,
    incoming: mpsc::Receiver<Incoming>,
    addr: PeerAddr,
}

impl Node {
    async fn next(&mut self) -> Incoming {
        timeout(HANG, self.incoming.recv()).await.expect("something arrives").expect("the transport is open")
    }

    async fn message(&mut self) -> (NodeId, Bytes) {
        match self.next().await {
            Incoming::Message { from, bytes } => (from, bytes),
            other => panic!("a message was expected, not {}", kind(&other)),
        }
    }

    async fn stream(&mut self) -> (SendStream, RecvStream) {
        match self.next().await {
            Incoming::Stream { send, recv, .. } => (send, recv),
            other => panic!("a stream was expected, not {}", kind(&other)),
        }
    }

    /// Takes what comes until the peer is gone.
    async fn disconnected(&mut self) -> NodeId {
        loop {
            if let Incoming::Disconnected { from } = self.next().await {
                return from;
            }
        }
    }

    /// Sends again while the queue is full.
    async fn send(&self, to: &PeerAddr, bytes: Bytes) {
        while let Err(error) = self.transport.send_message(to, bytes.clone()) {
            assert_eq!(error, SendError::QueueFull(to.node));
            tokio::task::yield_now().await;
        }
    }
}

fn kind(incoming: &Incoming) -> &'static str {
    match incoming {
        Incoming::Datagram { .. } => "a datagram",
        Incoming::Message { .. } => "a message",
        Incoming::Stream { .. } => "a stream",
        Incoming::Disconnected { .. } => "a disconnection",
    }
}

/// Makes nodes that can reach each other.
trait Net {
    /// `queue`: what may wait for the owner.
    fn node(&self, name: &str, queue: usize) -> Node;

    /// An address of `name` where nobody is.
    fn nobody(&self, name: &str) -> PeerAddr;
}

struct Quic {
    authority: Authority,
}

impl Quic {
    fn new() -> Self {
        Self { authority: Authority::create("test", DAY).unwrap().0 }
    }

    fn identity(&self, cluster: &str, node: &str) -> Identity {
        Identity::issued_by(&self.authority, PeerName::new(cluster, node).unwrap(), DAY).unwrap()
    }
}

fn config() -> Config {
    Config { listen: SocketAddr::from(([127, 0, 0, 1], 0)), connect_timeout_ms: 1_000, ..Config::default() }
}

fn bind(config: Config, identity: Identity) -> (Arc<QuicTransport>, Node) {
    let name = identity.name().node().to_owned();
    let (transport, incoming) = QuicTransport::bind(config, identity, Metrics::default()).unwrap();
    let addr = PeerAddr { node: transport.local(), name, addr: transport.local_addr().unwrap() };
    (transport.clone(), Node { transport, incoming, addr })
}

impl Net for Quic {
    fn node(&self, name: &str, queue: usize) -> Node {
        bind(Config { incoming_queue: queue, ..config() }, self.identity("test", name)).1
    }

    fn nobody(&self, name: &str) -> PeerAddr {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let addr = socket.local_addr().unwrap();
        PeerAddr { node: NodeId::from_name(name), name: name.into(), addr }
    }
}

struct Memory(Arc<MemoryNetwork>);

impl Net for Memory {
    fn node(&self, name: &str, queue: usize) -> Node {
        let (transport, incoming) = self.0.join(name, queue);
        Node { addr: transport.addr(), transport, incoming }
    }

    fn nobody(&self, name: &str) -> PeerAddr {
        self.0.join(name, 1).0.addr()
    }
}

macro_rules! conformance {
    ($($case:ident)*) => {
        mod quic {
            $(#[tokio::test] async fn $case() { super::$case(&super::Quic::new()).await })*
        }
        mod memory {
            $(#[tokio::test] async fn $case() { super::$case(&super::Memory(super::MemoryNetwork::new(1))).await })*
        }
    };
}

conformance! {
    the_first_datagram_arrives_and_names_its_sender
    what_is_too_long_is_refused
    messages_arrive_once_and_in_order
    a_full_queue_is_an_error_and_loses_nothing
    streams_carry_both_ways_and_close_by_half
    reads_keep_to_their_limit
    codes_reach_the_other_side
    a_dropped_sender_is_not_a_finished_one
    a_slow_reader_holds_the_writer_back
    nobody_at_the_address
    an_address_tells_its_name
    a_disconnection_comes_last
    what_was_queued_is_sent_before_closing
    both_may_dial_at_once
    a_full_owner_loses_datagrams_only
}

async fn the_first_datagram_arrives_and_names_its_sender(net: &impl Net) {
    let (a, mut b) = (net.node("a", 16), net.node("b", 16));
    a.transport.send_datagram(&b.addr, Bytes::from_static(b"hello")).unwrap();
    let Incoming::Datagram { from, bytes } = b.next().await else { panic!("a datagram was expected") };
    assert_eq!((from, bytes.as_ref()), (NodeId::from_name("a"), b"hello".as_ref()));
}

async fn what_is_too_long_is_refused(net: &impl Net) {
    let (a, mut b) = (net.node("a", 16), net.node("b", 16));
    let of = |len: usize| Bytes::from(vec![1; len]);
    let too_large = |max: usize| Err(SendError::TooLarge { len: max + 1, max });
    assert_eq!(a.transport.send_datagram(&b.addr, of(MAX_DATAGRAM_BYTES + 1)), too_large(MAX_DATAGRAM_BYTES));
    assert_eq!(a.transport.send_message(&b.addr, of(MAX_MESSAGE_BYTES + 1)), too_large(MAX_MESSAGE_BYTES));
    a.transport.send_message(&b.addr, of(MAX_MESSAGE_BYTES)).unwrap();
    assert_eq!(b.message().await.1.len(), MAX_MESSAGE_BYTES);
    a.transport.send_datagram(&b.addr, of(MAX_DATAGRAM_BYTES)).unwrap();
    assert!(matches!(b.next().await, Incoming::Datagram { bytes, .. } if bytes.len() == MAX_DATAGRAM_BYTES));
}

async fn messages_arrive_once_and_in_order(net: &impl Net) {
    let (a, mut b) = (net.node("a", 16), net.node("b", 16));
    let to = b.addr.clone();
    let receive = async {
        for i in 0..3_000_u32 {
            assert_eq!(b.message().await, (NodeId::from_name("a"), Bytes::from(i.to_be_bytes().to_vec())));
        }
    };
    let send = async {
        for i in 0..3_000_u32 {
            a.send(&to, Bytes::from(i.to_be_bytes().to_vec())).await;
        }
    };
    tokio::join!(send, receive);
}

async fn a_full_queue_is_an_error_and_loses_nothing(net: &impl Net) {
    let (a, mut b) = (net.node("a", 16), net.node("b", 1));
    let body = Bytes::from(vec![7; MAX_MESSAGE_BYTES / 4]);
    let (mut queued, mut refusals) = (0, 0);
    // The queue drains into the windows along the way until those are full too.
    while refusals < 200 {
        match a.transport.send_message(&b.addr, body.clone()) {
            Ok(()) => (queued, refusals) = (queued + 1, 0),
            Err(error) => {
                assert_eq!(error, SendError::QueueFull(b.addr.node));
                refusals += 1;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        assert!(queued < 1_024, "256 MiB were taken though nobody reads");
    }
    for _ in 0..queued {
        assert_eq!(b.message().await.1, body);
    }
}

async fn streams_carry_both_ways_and_close_by_half(net: &impl Net) {
    let (a, mut b) = (net.node("a", 16), net.node("b", 16));
    let (mut send, mut recv) = a.transport.open(&b.addr).await.unwrap();
    send.write(Bytes::from_static(b"question")).await.unwrap();
    send.finish().unwrap();
    let (mut answer, mut question) = b.stream().await;
    assert_eq!(question.read_exact(8).await.unwrap(), "question");
    assert_eq!(question.read(&mut Vec::new(), 1).await.unwrap(), 0, "the half is closed");
    answer.write(Bytes::from_static(b"answer")).await.unwrap();
    answer.finish().unwrap();
    assert_eq!(recv.read_exact(6).await.unwrap(), "answer");
    assert_eq!(recv.read_exact(1).await.unwrap_err(), StreamError::Ended);
}

async fn reads_keep_to_their_limit(net: &impl Net) {
    let (a, mut b) = (net.node("a", 16), net.node("b", 16));
    let (mut send, _recv) = a.transport.open(&b.addr).await.unwrap();
    let sent: Vec<u8> = (0..100_000_u32).map(|i| i.to_le_bytes()[0]).collect();
    send.write(sent.clone().into()).await.unwrap();
    send.finish().unwrap();
    let (_answer, mut recv) = b.stream().await;
    let mut got = Vec::new();
    for limit in [1, 4, 5_000, 70_000].into_iter().cycle() {
        let mut pieces = Vec::new();
        let n = recv.read(&mut pieces, limit).await.unwrap();
        assert!(n <= limit && n == pieces.iter().map(Bytes::len).sum::<usize>());
        if n == 0 {
            break;
        }
        got.extend(pieces.concat());
    }
    assert!(got == sent, "every byte arrives in its place");
}

async fn codes_reach_the_other_side(net: &impl Net) {
    let (a, mut b) = (net.node("a", 16), net.node("b", 16));
    let (mut send, mut recv) = a.transport.open(&b.addr).await.unwrap();
    send.write(Bytes::from_static(b"x")).await.unwrap();
    let (mut answer, mut question) = b.stream().await;
    answer.reset(41);
    assert_eq!(recv.read_exact(1).await.unwrap_err(), StreamError::GivenUp(41));
    question.stop(42);
    let stopped = async {
        loop {
            if let Err(error) = send.write(Bytes::from_static(b"more")).await {
                return error;
            }
            tokio::task::yield_now().await;
        }
    };
    assert_eq!(timeout(HANG, stopped).await.unwrap(), StreamError::GivenUp(42));
}

async fn a_dropped_sender_is_not_a_finished_one(net: &impl Net) {
    let (a, mut b) = (net.node("a", 16), net.node("b", 16));
    let (mut send, _recv) = a.transport.open(&b.addr).await.unwrap();
    send.write(Bytes::from_static(b"half of it")).await.unwrap();
    let (_answer, mut question) = b.stream().await;
    drop(send);
    let error = question.read_exact(20).await.unwrap_err();
    assert_eq!(error, StreamError::GivenUp(DROPPED));
}

async fn a_slow_reader_holds_the_writer_back(net: &impl Net) {
    const PIECE: usize = 256 << 10;
    const PIECES: usize = 256;
    let (a, mut b) = (net.node("a", 16), net.node("b", 16));
    let (mut send, _recv) = a.transport.open(&b.addr).await.unwrap();
    let mut written = 0;
    let piece = |i: usize| Bytes::from(vec![i.to_le_bytes()[0]; PIECE]);
    while timeout(Duration::from_millis(300), send.write(piece(written))).await.is_ok_and(|r| r.is_ok()) {
        written += 1;
        assert!(written < PIECES, "64 MiB were taken though nobody reads");
    }
    let (_answer, mut question) = b.stream().await;
    // The write that timed out may have been taken in part: bytes count, not pieces.
    let reader = tokio::spawn(async move {
        let (mut total, mut pieces) = (0, Vec::new());
        loop {
            match question.read(&mut pieces, 1 << 20).await.unwrap() {
                0 => return total,
                n => total += n,
            }
            pieces.clear();
        }
    });
    for i in written..PIECES {
        timeout(HANG, send.write(piece(i))).await.unwrap().unwrap();
    }
    send.finish().unwrap();
    let total = timeout(HANG, reader).await.unwrap().unwrap();
    assert!((PIECES * PIECE..=(PIECES + 1) * PIECE).contains(&total), "{total} bytes arrived");
}

async fn nobody_at_the_address(net: &impl Net) {
    let mut a = net.node("a", 16);
    let nobody = net.nobody("b");
    let Err(error) = a.transport.open(&nobody).await else { panic!("nobody answered") };
    assert!(matches!(error, OpenError::Unreachable { .. }), "{error}");
    assert_eq!(a.disconnected().await, nobody.node);
}

async fn an_address_tells_its_name(net: &impl Net) {
    let (a, mut b) = (net.node("a", 16), net.node("10.0.0.7", 16));
    assert_eq!(a.transport.resolve(b.addr.addr).await.unwrap(), b.addr);
    assert_eq!(a.transport.resolve(a.addr.addr).await.unwrap(), a.addr, "this may be ourselves");
    a.send(&b.addr, Bytes::from_static(b"hello")).await;
    assert_eq!(b.message().await.0, a.addr.node);
    let nobody = net.nobody("c").addr;
    assert!(matches!(a.transport.resolve(nobody).await, Err(OpenError::Unreachable { .. })));
}

async fn a_disconnection_comes_last(net: &impl Net) {
    let (mut a, mut b) = (net.node("a", 16), net.node("b", 16));
    let (mut send, mut recv) = a.transport.open(&b.addr).await.unwrap();
    send.write(Bytes::from_static(b"x")).await.unwrap();
    let (_answer, _question) = b.stream().await;
    b.transport.send_message(&a.addr, Bytes::from_static(b"farewell")).unwrap();
    b.transport.close().await;
    assert!(timeout(HANG, b.incoming.recv()).await.unwrap().is_none(), "the closed side's queue ends");
    assert_eq!(b.transport.send_message(&a.addr, Bytes::new()), Err(SendError::Closed));
    assert!(matches!(b.transport.open(&a.addr).await, Err(OpenError::Closed)));
    assert_eq!(a.message().await.1, "farewell");
    assert!(matches!(recv.read_exact(1).await, Err(StreamError::Lost(_) | StreamError::GivenUp(DROPPED))));
    assert_eq!(a.disconnected().await, b.addr.node);
}

async fn what_was_queued_is_sent_before_closing(net: &impl Net) {
    let (a, mut b) = (net.node("a", 16), net.node("b", 2_000));
    a.send(&b.addr, Bytes::from_static(b"first")).await;
    assert_eq!(b.message().await.1, "first");
    for _ in 0..500 {
        a.send(&b.addr, Bytes::from_static(b"leaving")).await;
    }
    a.transport.close().await;
    for _ in 0..500 {
        assert_eq!(b.message().await.1, "leaving");
    }
    assert_eq!(b.disconnected().await, NodeId::from_name("a"));
}

async fn both_may_dial_at_once(net: &impl Net) {
    for round in 0..10 {
        let names = [format!("a{round}"), format!("b{round}")];
        let (mut a, mut b) = (net.node(&names[0], 64), net.node(&names[1], 64));
        for i in 0..20_u8 {
            a.send(&b.addr, Bytes::from(vec![i])).await;
            b.send(&a.addr, Bytes::from(vec![i])).await;
        }
        for i in 0..20_u8 {
            assert_eq!(a.message().await, (b.addr.node, Bytes::from(vec![i])));
            assert_eq!(b.message().await, (a.addr.node, Bytes::from(vec![i])));
        }
    }
}

async fn a_full_owner_loses_datagrams_only(net: &impl Net) {
    let (a, mut b) = (net.node("a", 16), net.node("b", 4));
    for _ in 0..100 {
        a.transport.send_datagram(&b.addr, Bytes::from_static(b"d")).unwrap();
        a.send(&b.addr, Bytes::from_static(b"m")).await;
        tokio::task::yield_now().await;
    }
    let (mut messages, mut datagrams) = (0, 0);
    while messages < 100 {
        match b.next().await {
            Incoming::Message { .. } => messages += 1,
            Incoming::Datagram { .. } => datagrams += 1,
            other => panic!("{} was not sent", kind(&other)),
        }
    }
    assert!(datagrams <= 100);
}

/// A network that fails on demand: only memory can.
mod network {
    use super::*;

    #[tokio::test]
    async fn a_cut_link_breaks_what_is_under_way_until_it_heals() {
        let network = MemoryNetwork::new(1);
        let net = Memory(network.clone());
        let (mut a, mut b, c) = (net.node("a", 16), net.node("b", 16), net.node("c", 16));
        let (mut send, mut recv) = a.transport.open(&b.addr).await.unwrap();
        send.write(Bytes::from_static(b"x")).await.unwrap();
        let (_answer, mut question) = b.stream().await;
        network.partition(&[a.addr.node]);
        assert!(matches!(recv.read_exact(1).await, Err(StreamError::Lost(_))));
        assert_eq!(question.read_exact(1).await.unwrap(), "x", "what had arrived can be read");
        assert!(matches!(question.read_exact(1).await, Err(StreamError::Lost(_))));
        assert_eq!(a.disconnected().await, b.addr.node);
        assert_eq!(b.disconnected().await, a.addr.node);
        assert!(matches!(a.transport.open(&c.addr).await, Err(OpenError::Unreachable { .. })));
        c.send(&b.addr, Bytes::from_static(b"others still talk")).await;
        assert_eq!(b.message().await.0, c.addr.node);
        network.heal();
        assert!(a.transport.open(&c.addr).await.is_ok());
    }

    #[tokio::test]
    async fn the_same_seed_loses_the_same_datagrams() {
        let run = async |seed| {
            let network = MemoryNetwork::new(seed);
            let net = Memory(network.clone());
            let (a, mut b) = (net.node("a", 16), net.node("b", 128));
            network.set_loss(0.5);
            for i in 0..100 {
                a.transport.send_datagram(&b.addr, Bytes::from(vec![i])).unwrap();
            }
            let mut arrived = Vec::new();
            while let Ok(Incoming::Datagram { bytes, .. }) = b.incoming.try_recv() {
                arrived.push(bytes[0]);
            }
            arrived
        };
        let first = run(7).await;
        assert!((20..80).contains(&first.len()));
        assert_eq!(run(7).await, first);
        assert_ne!(run(8).await, first);
    }

    #[tokio::test]
    async fn an_address_of_another_node_is_refused() {
        let net = Memory(MemoryNetwork::new(1));
        let (a, b) = (net.node("a", 16), net.node("b", 16));
        let wrong = PeerAddr { node: NodeId::from_name("c"), name: "c".into(), addr: b.addr.addr };
        assert!(matches!(a.transport.open(&wrong).await, Err(OpenError::NotAuthentic { .. })));
    }
}

/// Who is at the other end: only QUIC can tell.
mod identity {
    use super::*;

    async fn refusal(net: &Quic, listener: Identity, dialled: &str) -> String {
        let a = net.node("a", 16);
        let (_, b) = bind(config(), listener);
        let to = PeerAddr { node: NodeId::from_name(dialled), name: dialled.into(), addr: b.addr.addr };
        match a.transport.open(&to).await {
            Err(error @ OpenError::NotAuthentic { .. }) => error.to_string(),
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("{dialled} was believed"),
        }
    }

    #[tokio::test]
    async fn another_authority_is_refused() {
        let stranger = Quic::new().identity("test", "b");
        let text = refusal(&Quic::new(), stranger, "b").await;
        assert!(text.contains("not signed by this cluster's CA"), "{text}");
    }

    #[tokio::test]
    async fn another_cluster_is_refused() {
        let net = Quic::new();
        let text = refusal(&net, net.identity("staging", "b"), "b").await;
        assert!(text.contains("for cluster staging, this node is in test"), "{text}");
    }

    #[tokio::test]
    async fn another_node_is_refused() {
        let net = Quic::new();
        let text = refusal(&net, net.identity("test", "c"), "b").await;
        assert!(text.contains("for node c"), "{text}");
    }

    #[tokio::test]
    async fn an_expired_certificate_is_refused() {
        let net = Quic::new();
        let brief = PeerName::new("test", "b").unwrap();
        let listener = Identity::issued_by(&net.authority, brief, Duration::from_secs(1)).unwrap();
        tokio::time::sleep(Duration::from_millis(2_100)).await;
        let text = refusal(&net, listener, "b").await;
        assert!(text.contains("expired"), "{text}");
    }

    #[tokio::test]
    async fn a_dialler_without_proof_hears_why() {
        let net = Quic::new();
        let brief = PeerName::new("test", "a").unwrap();
        let dialler = Identity::issued_by(&net.authority, brief, Duration::from_secs(1)).unwrap();
        let (_, a) = bind(config(), dialler);
        let mut b = net.node("b", 16);
        tokio::time::sleep(Duration::from_millis(2_100)).await;
        let Err(error) = a.transport.open(&b.addr).await else { panic!("an expired node was believed") };
        assert!(error.to_string().contains("does not accept this node's certificate"), "{error}");
        assert!(b.incoming.try_recv().is_err(), "the listener's owner hears nothing of it");
    }

    #[tokio::test]
    async fn an_address_is_asked_once() {
        let net = Quic::new();
        let (a, _node_a) = bind(config(), net.identity("test", "a"));
        let b = net.node("b", 16);
        for _ in 0..2 {
            assert_eq!(a.resolve(b.addr.addr).await.unwrap(), b.addr);
        }
        assert_eq!(a.connections().len(), 1);
        let (_, stranger) = bind(config(), Quic::new().identity("test", "b"));
        assert!(matches!(a.resolve(stranger.addr.addr).await, Err(OpenError::NotAuthentic { .. })));
    }

    #[tokio::test]
    async fn there_is_one_connection_per_pair() {
        let net = Quic::new();
        let (a, mut node_a) = bind(config(), net.identity("test", "a"));
        let (b, mut node_b) = bind(config(), net.identity("test", "b"));
        node_a.send(&node_b.addr, Bytes::from_static(b"1")).await;
        node_b.message().await;
        node_b.send(&node_a.addr, Bytes::from_static(b"2")).await;
        node_a.message().await;
        assert_eq!((a.connections().len(), b.connections().len()), (1, 1));
        assert_eq!(a.connections()[0].name, "b");
    }

    #[tokio::test]
    async fn the_path_grows_to_jumbo_packets() {
        let net = Quic::new();
        let (a, node_a) = bind(config(), net.identity("test", "a"));
        let mut b = net.node("b", 16);
        let (mut send, _recv) = node_a.transport.open(&b.addr).await.unwrap();
        send.write(Bytes::from_static(b"x")).await.unwrap();
        let (_answer, mut question) = b.stream().await;
        question.read_exact(1).await.unwrap();
        for _ in 0..50 {
            // Probes ride on traffic, a round trip apart.
            send.write(Bytes::from(vec![0; 1 << 20])).await.unwrap();
            question.read_exact(1 << 20).await.unwrap();
            if a.connections()[0].current_mtu == 8_952 {
                break;
            }
        }
        let path = &a.connections()[0];
        assert_eq!((path.current_mtu, path.black_holes), (8_952, 0), "loopback carries the upper bound");
    }

    /// A node that was killed comes back with the same key at the same address.
    #[tokio::test]
    async fn a_restarted_peer_is_noticed_at_once() {
        let net = Quic::new();
        let dir = tempfile::tempdir().unwrap();
        let name = PeerName::new("test", "b").unwrap();
        let issued = net.authority.issue(&name, DAY).unwrap();
        let files = windlass::transport::tls::Files {
            ca: dir.path().join("ca.crt"),
            certificate: dir.path().join("tls.crt"),
            key: dir.path().join("tls.key"),
        };
        std::fs::write(&files.ca, net.authority.certificate_pem()).unwrap();
        std::fs::write(&files.certificate, &issued.certificate_pem).unwrap();
        std::fs::write(&files.key, &issued.key_pem).unwrap();

        let mut a = net.node("a", 16);
        let killed =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let load = || Identity::load(files.clone(), "test").unwrap();
        let (transport, node_b) = killed.block_on_bind(|| bind(config(), load()));
        let (mut send, _recv) = a.transport.open(&node_b.addr).await.unwrap();
        send.write(Bytes::from_static(b"x")).await.unwrap();
        let listen = node_b.addr.addr;
        // The runtime ends without a word to anybody.
        killed.shutdown_background();
        drop((transport, node_b));

        let mut again = None;
        for _ in 0..500 {
            match QuicTransport::bind(Config { listen, ..config() }, load(), Metrics::default()) {
                Ok(bound) => {
                    again = Some(bound);
                    break;
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
        assert!(again.is_some(), "the port is free again");
        let before = std::time::Instant::now();
        // Keep-alives or this write meet the new process, which does not know the connection.
        let _ = send.write(Bytes::from_static(b"y")).await;
        assert_eq!(a.disconnected().await, NodeId::from_name("b"));
        assert!(before.elapsed() < Duration::from_secs(8), "sooner than the idle timeout");
    }

    trait BindOn {
        fn block_on_bind<T>(&self, bind: impl FnOnce() -> T) -> T;
    }

    impl BindOn for tokio::runtime::Runtime {
        fn block_on_bind<T>(&self, bind: impl FnOnce() -> T) -> T {
            let _inside = self.enter();
            bind()
        }
    }
}

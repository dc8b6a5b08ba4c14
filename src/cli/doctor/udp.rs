//! Whether a peer's UDP port answers, and packets of which size reach it, without a connection and without a key.
//!
//! A QUIC server answers a long packet of a version that it does not speak with the versions that it does (RFC 9000,
//! section 6.1), before any cryptography, and keeps nothing of it. A packet of 8,952 bytes that may not be fragmented
//! and is answered so has crossed the path whole.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use quinn::udp::UdpSocketState;
use tokio::net::UdpSocket;

/// A version that no server speaks: reserved to force this answer (RFC 9000, section 15).
const RESERVED_VERSION: u32 = 0x1a2a_3a4a;

/// A server drops shorter packets of an unknown version (RFC 9000, section 5.2.2).
pub(super) const LEAST_BYTES: usize = 1_200;

/// Longest wait for one answer, and how often it is asked for: a node is less than a millisecond away.
const PATIENCE: Duration = Duration::from_millis(500);
const ATTEMPTS: u32 = 3;

const ID_LEN: u8 = 8;
const ID_BYTES: usize = ID_LEN as usize;

/// How far a packet got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// It was answered.
    Answered,
    Silent,
    /// This node's own interface does not take it.
    TooLong,
    /// The way there is shut: no route, or the port is closed.
    Shut(String),
}

/// What this node's UDP can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offload {
    /// Packets that the kernel takes in one call; 1 without GSO.
    pub(super) segments: usize,
}

/// Sends a packet of `bytes` UDP payload to `peer` and waits for its answer.
pub(super) async fn reach(peer: SocketAddr, bytes: usize) -> Reach {
    match ask(peer, bytes).await {
        Ok(true) => Reach::Answered,
        Ok(false) => Reach::Silent,
        // EMSGSIZE of Linux.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::MSGSIZE.raw_os_error()) => {
            Reach::TooLong
        }
        Err(error) => Reach::Shut(error.to_string()),
    }
}

/// Whether the kernel takes several packets in one call.
pub(super) fn offload() -> io::Result<Offload> {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    Ok(Offload { segments: UdpSocketState::new((&socket).into())?.max_gso_segments() })
}

async fn ask(peer: SocketAddr, bytes: usize) -> io::Result<bool> {
    let any: IpAddr =
        if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = std::net::UdpSocket::bind((any, 0))?;
    // Forbids fragments, as it does for the daemon's own socket.
    UdpSocketState::new((&socket).into())?;
    socket.set_nonblocking(true)?;
    let socket = UdpSocket::from_std(socket)?;
    socket.connect(peer).await?;
    for _ in 0..ATTEMPTS {
        let id: [u8; ID_BYTES] = rand::random();
        socket.send(&question(&id, bytes)).await?;
        if tokio::time::timeout(PATIENCE, answered(&socket, &id)).await.unwrap_or(Ok(false))? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A long header (RFC 9000, section 17.2) with our identifier as its source, and nothing in it.
fn question(id: &[u8; ID_BYTES], bytes: usize) -> Vec<u8> {
    let mut packet = vec![0xc0];
    packet.extend(RESERVED_VERSION.to_be_bytes());
    for identifier in [&rand::random::<[u8; ID_BYTES]>(), id] {
        packet.push(ID_LEN);
        packet.extend(identifier);
    }
    packet.resize(bytes.max(LEAST_BYTES), 0);
    packet
}

async fn answered(socket: &UdpSocket, id: &[u8; ID_BYTES]) -> io::Result<bool> {
    let mut packet = [0; 1_500];
    loop {
        let length = socket.recv(&mut packet).await?;
        if is_answer(&packet[..length], id) {
            return Ok(true);
        }
    }
}

/// A version negotiation packet (RFC 9000, section 17.2.1) to `id`.
fn is_answer(packet: &[u8], id: &[u8; ID_BYTES]) -> bool {
    let is_long = packet.first().is_some_and(|first| first & 0x80 != 0);
    is_long && packet.get(1..5) == Some(&[0; 4]) && packet.get(6..6 + ID_BYTES) == Some(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::QuicTransport;
    use crate::transport::tls::{Authority, Identity, PeerName};

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn a_peer_answers_a_stranger_with_versions_and_nothing_else() {
        let (authority, _) = Authority::create("c1", HOUR).expect("a CA");
        let name = PeerName::new("c1", "n1").expect("a name");
        let identity = Identity::issued_by(&authority, name, HOUR).expect("signs");
        let config = crate::transport::Config {
            listen: ([127, 0, 0, 1], 0).into(),
            ..crate::transport::Config::default()
        };
        let (transport, _incoming) =
            QuicTransport::bind(config, identity, crate::transport::Metrics::default()).expect("binds");
        let address = transport.local_addr().expect("it is bound");
        assert_eq!(reach(address, LEAST_BYTES).await, Reach::Answered);
        assert_eq!(reach(address, 8_952).await, Reach::Answered, "the loopback takes them");
    }

    #[tokio::test]
    async fn a_closed_port_is_told_from_an_open_one() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
        let address = socket.local_addr().expect("it is bound");
        assert_eq!(reach(address, LEAST_BYTES).await, Reach::Silent, "nobody reads it");
        drop(socket);
        assert!(matches!(reach(address, LEAST_BYTES).await, Reach::Shut(_)));
    }

    #[test]
    fn only_an_answer_to_this_question_counts() {
        let id = [7; ID_BYTES];
        let mut answer = vec![0xff, 0, 0, 0, 0, 8];
        answer.extend(id);
        assert!(is_answer(&answer, &id));
        assert!(!is_answer(&answer, &[8; ID_BYTES]));
        answer[4] = 1;
        assert!(!is_answer(&answer, &id));
        assert!(!is_answer(&[], &id));
    }
}

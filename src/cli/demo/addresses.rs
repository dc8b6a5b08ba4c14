//! Where the demo's nodes listen: an address of its own for each, as in a cluster, as far as the system allows.
//!
//! Invariant: no two listeners of a run get the same address and port.
//! This module refuses to hold what it found: the daemons bind it themselves, and say so when someone was faster.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

/// One node's listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    /// Registry mirror.
    pub registry: SocketAddr,
    /// S3 read endpoint.
    pub s3: SocketAddr,
    pub admin: SocketAddr,
    /// UDP.
    pub peers: SocketAddr,
}

/// Held until every node has its own.
struct Reservation {
    addresses: Addresses,
    _tcp: [TcpListener; 3],
    _udp: UdpSocket,
}

/// Addresses for `nodes` nodes: 127.0.0.2, 127.0.0.3 and so on with the daemon's usual ports, or free ports where
/// those are taken, or free ports of 127.0.0.1 where the loopback has one address only (macOS).
///
/// # Errors
/// When the loopback has no free port.
pub(super) fn choose(nodes: u8) -> io::Result<Vec<Addresses>> {
    let reserved: io::Result<Vec<_>> = (0..nodes).map(|node| reserve(own_ip(node))).collect();
    Ok(reserved?.into_iter().map(|reservation| reservation.addresses).collect())
}

fn own_ip(node: u8) -> IpAddr {
    let own = IpAddr::V4(Ipv4Addr::new(127, 0, 0, node.saturating_add(2)));
    if TcpListener::bind((own, 0)).is_ok() { own } else { IpAddr::V4(Ipv4Addr::LOCALHOST) }
}

fn reserve(ip: IpAddr) -> io::Result<Reservation> {
    if ip != IpAddr::V4(Ipv4Addr::LOCALHOST)
        && let Ok(usual) = bind(ip, [5100, 5101, 5102, 5103])
    {
        return Ok(usual);
    }
    bind(ip, [0; 4])
}

fn bind(ip: IpAddr, [registry, s3, admin, peers]: [u16; 4]) -> io::Result<Reservation> {
    let tcp =
        [TcpListener::bind((ip, registry))?, TcpListener::bind((ip, s3))?, TcpListener::bind((ip, admin))?];
    let udp = UdpSocket::bind((ip, peers))?;
    let addresses = Addresses {
        registry: tcp[0].local_addr()?,
        s3: tcp[1].local_addr()?,
        admin: tcp[2].local_addr()?,
        peers: udp.local_addr()?,
    };
    Ok(Reservation { addresses, _tcp: tcp, _udp: udp })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_listener_has_its_own() {
        let chosen = choose(5).unwrap();
        let tcp: HashSet<_> = chosen.iter().flat_map(|a| [a.registry, a.s3, a.admin]).collect();
        let udp: HashSet<_> = chosen.iter().map(|a| a.peers).collect();
        assert_eq!((tcp.len(), udp.len()), (15, 5));
        assert!(tcp.iter().all(|addr| addr.ip().is_loopback() && addr.port() != 0));
    }

    #[test]
    fn taken_ports_are_gone_around() {
        let ip = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let first = reserve(ip).unwrap();
        let second = reserve(ip).unwrap();
        assert_ne!(first.addresses.registry, second.addresses.registry);
    }
}

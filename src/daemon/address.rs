//! The address that other nodes reach this one at.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs, UdpSocket};

/// An address of TEST-NET-1 (RFC 5737), which nobody has: asking for the way there names the interface of the default
/// route, and sends nothing.
const ELSEWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 9);

/// No address to tell the others.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot tell which address the other nodes reach this one at ({0}); \
     set `node.address`, or give `transport.listen` the address"
)]
pub struct AddressError(io::Error);

/// The configured address, else the one that is listened on, else the one that packets to `peers` (as `host:port`) or
/// to anywhere leave from. Blocking: may look names up.
///
/// # Errors
/// [`AddressError`] when this machine has no way to anywhere.
pub(super) fn advertised(
    configured: Option<IpAddr>,
    listened: SocketAddr,
    peers: &[String],
) -> Result<SocketAddr, AddressError> {
    let ip = match configured {
        Some(ip) => ip,
        None if !listened.ip().is_unspecified() => listened.ip(),
        None => outgoing(peers).map_err(AddressError)?,
    };
    Ok(SocketAddr::new(ip, listened.port()))
}

fn outgoing(peers: &[String]) -> io::Result<IpAddr> {
    let found = peers.iter().filter_map(|name| name.to_socket_addrs().ok()).flatten();
    // A name may stand for this very node, and the way there is the loopback.
    let ways = found.filter_map(|peer| way_to(peer).ok()).find(|ip| !ip.is_loopback());
    ways.map_or_else(|| way_to(ELSEWHERE), Ok)
}

/// The source address of packets to `target`. Connecting a UDP socket sends nothing.
fn way_to(target: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr = if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { [0u16; 8].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(target)?;
    Ok(socket.local_addr()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_configured_goes_first_then_what_is_listened_on() {
        let listened = SocketAddr::from(([127, 0, 0, 7], 5103));
        assert_eq!(advertised(None, listened, &[]).expect("known"), listened);
        let configured = Some([10, 0, 0, 1].into());
        assert_eq!(advertised(configured, listened, &[]).expect("known"), ([10, 0, 0, 1], 5103).into());
    }

    #[test]
    fn the_way_to_somewhere_names_this_end() {
        let ip = way_to(([127, 0, 0, 1], 9).into()).expect("the loopback is there");
        assert!(ip.is_loopback());
    }
}

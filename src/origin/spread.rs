//! Which of a name's addresses a connection goes to.
//!
//! S3 answers a name with several addresses, each of other machines, and one of them gives a node only so much. A
//! connector takes the first address that answers; so each look-up begins with the next one. Invariant: every address
//! that the system gave is in the answer, and the family that the system prefers stays first.
//! This module refuses to remember addresses: the system knows how long they are good for.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use aws_smithy_runtime_api::client::dns::{DnsFuture, ResolveDns, ResolveDnsError, SharedDnsResolver};

/// A resolver that begins each answer with another address of the one below it.
#[derive(Clone, Debug)]
pub(super) struct Spread {
    below: SharedDnsResolver,
    turn: Arc<AtomicUsize>,
}

impl Default for Spread {
    fn default() -> Self {
        Self::over(System)
    }
}

impl Spread {
    pub(super) fn over(below: impl ResolveDns + 'static) -> Self {
        Self { below: SharedDnsResolver::new(below), turn: Arc::default() }
    }
}

impl ResolveDns for Spread {
    fn resolve_dns<'a>(&'a self, name: &'a str) -> DnsFuture<'a> {
        DnsFuture::new(async move {
            let addresses = self.below.resolve_dns(name).await?;
            Ok(rotated(&addresses, self.turn.fetch_add(1, Ordering::Relaxed)))
        })
    }
}

/// The system's own.
#[derive(Debug)]
struct System;

impl ResolveDns for System {
    fn resolve_dns<'a>(&'a self, name: &'a str) -> DnsFuture<'a> {
        DnsFuture::new(async move {
            let found: io::Result<Vec<_>> = tokio::net::lookup_host((name, 0))
                .await
                .map(|found| found.map(|at: SocketAddr| at.ip()).collect());
            found.map_err(ResolveDnsError::new)
        })
    }
}

/// Each family's addresses begin with the `turn`-th; the family that came first stays first.
fn rotated(addresses: &[IpAddr], turn: usize) -> Vec<IpAddr> {
    let is_first =
        |address: &&IpAddr| addresses.first().is_some_and(|first| first.is_ipv4() == address.is_ipv4());
    let (mut first, mut second): (Vec<IpAddr>, Vec<IpAddr>) = addresses.iter().partition(is_first);
    for family in [&mut first, &mut second] {
        let by = turn % family.len().max(1);
        family.rotate_left(by);
    }
    first.append(&mut second);
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_look_up_begins_with_the_next_address_of_the_preferred_family() {
        let addresses: Vec<IpAddr> =
            ["10.0.0.1", "::1", "10.0.0.2", "10.0.0.3", "::2"].map(|a| a.parse().unwrap()).to_vec();
        let spelled =
            |turn| rotated(&addresses, turn).iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        assert_eq!(spelled(0), "10.0.0.1 10.0.0.2 10.0.0.3 ::1 ::2");
        assert_eq!(spelled(1), "10.0.0.2 10.0.0.3 10.0.0.1 ::2 ::1");
        assert_eq!(spelled(5), "10.0.0.3 10.0.0.1 10.0.0.2 ::2 ::1");
        assert!(rotated(&[], 3).is_empty());
    }
}

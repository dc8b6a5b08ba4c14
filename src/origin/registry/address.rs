//! Which addresses a registry may send us to.
//!
//! Invariant: a redirect or a token realm never leads to loopback, link-local or instance-metadata addresses,
//! neither as a literal nor through DNS: those answer to whoever runs on this node, and a registry does not. A registry
//! that is itself on loopback, as in tests and demos, may keep its blobs and tokens there too, and nowhere closer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// Metadata services that are not link-local: Azure's, Alibaba's and Oracle's.
const METADATA: [Ipv4Addr; 3] =
    [Ipv4Addr::new(168, 63, 129, 16), Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(192, 0, 0, 192)];

/// What one registry may not send us to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Guard {
    allows_loopback: bool,
}

impl Guard {
    /// The guard against redirects of a registry at `endpoint`.
    #[must_use]
    pub(super) fn of(endpoint: &Url) -> Self {
        let allows_loopback = match endpoint.host() {
            Some(Host::Domain(name)) => is_localhost(name),
            Some(Host::Ipv4(ip)) => ip.is_loopback(),
            Some(Host::Ipv6(ip)) => ip.to_canonical().is_loopback(),
            None => false,
        };
        Self { allows_loopback }
    }

    /// Whether the registry itself is on this node.
    #[must_use]
    pub(super) const fn is_at_home(self) -> bool {
        self.allows_loopback
    }

    /// Whether a URL's host may not be asked by its spelling.
    #[must_use]
    pub(super) fn forbids(self, url: &Url) -> bool {
        match url.host() {
            Some(Host::Domain(name)) => is_localhost(name) && !self.allows_loopback,
            Some(Host::Ipv4(ip)) => self.forbids_address(IpAddr::V4(ip)),
            Some(Host::Ipv6(ip)) => self.forbids_address(IpAddr::V6(ip)),
            None => true,
        }
    }

    fn forbids_address(self, ip: IpAddr) -> bool {
        let ip = embedded(ip);
        if ip.is_loopback() {
            return !self.allows_loopback;
        }
        match ip {
            IpAddr::V4(ip) => is_near_v4(ip),
            IpAddr::V6(ip) => is_near_v6(ip),
        }
    }
}

fn is_localhost(name: &str) -> bool {
    let name = name.trim_end_matches('.');
    name == "localhost" || name.ends_with(".localhost")
}

/// The IPv4 address inside an IPv6 one that only wraps it: mapped (RFC 4291) or NAT64's (RFC 6052).
fn embedded(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) if ip.segments()[..6] == [0x64, 0xff9b, 0, 0, 0, 0] => {
            let [.., a, b, c, d] = ip.octets();
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        ip => ip,
    }
}

fn is_near_v4(ip: Ipv4Addr) -> bool {
    // 0.0.0.0/8 reaches this host, as loopback does; 169.254.0.0/16 holds the metadata services.
    ip.is_link_local() || ip.octets()[0] == 0 || ip.is_broadcast() || METADATA.contains(&ip)
}

const fn is_near_v6(ip: Ipv6Addr) -> bool {
    // fd00:ec2::/32 holds EC2's metadata and EKS Pod Identity.
    let is_ec2_service = ip.segments()[0] == 0xfd00 && ip.segments()[1] == 0x0ec2;
    ip.is_unspecified() || ip.is_unicast_link_local() || is_ec2_service
}

/// Resolves names as the system does and leaves out what the guard forbids.
#[derive(Debug)]
pub(super) struct GuardedResolver(pub(super) Guard);

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = self.0;
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> =
                found.filter(|address| !guard.forbids_address(address.ip())).collect();
            if allowed.is_empty() {
                return Err(
                    "its name leads to this node's own addresses only, where no redirect may go".into()
                );
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(endpoint: &str) -> Guard {
        Guard::of(&Url::parse(endpoint).unwrap())
    }

    const LOOPBACK: [&str; 8] = [
        "http://127.0.0.1/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://localhost:5000/",
        "http://localhost./",
        "http://a.localhost/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
    ];

    const NEAR: [&str; 11] = [
        "http://169.254.169.254/latest/meta-data",
        "http://169.254.170.23/v1/credentials",
        "http://0.0.0.0/",
        "http://[::]/",
        "http://[::ffff:169.254.169.254]/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://[fe80::1]/",
        "http://[fd00:ec2::23]/",
        "http://[fd00:ec2::254]/",
        "http://168.63.129.16/",
        "http://100.100.100.200/",
    ];

    #[test]
    fn local_hosts_in_every_spelling() {
        for local in LOOPBACK.iter().chain(&NEAR) {
            assert!(guard("https://reg.example.com/").forbids(&Url::parse(local).unwrap()), "{local}");
        }
        for public in ["http://10.0.0.1/", "https://example.com/", "http://[fd12::1]/", "http://192.168.1.1/"]
        {
            assert!(!guard("https://reg.example.com/").forbids(&Url::parse(public).unwrap()), "{public}");
        }
    }

    #[test]
    fn a_registry_on_loopback_may_point_to_loopback_and_no_closer() {
        for endpoint in ["http://127.0.0.1:5000/", "http://localhost:5000/", "http://[::1]:5000/"] {
            for local in LOOPBACK {
                assert!(!guard(endpoint).forbids(&Url::parse(local).unwrap()), "{endpoint} {local}");
            }
            for near in NEAR {
                assert!(guard(endpoint).forbids(&Url::parse(near).unwrap()), "{endpoint} {near}");
            }
        }
    }

    #[tokio::test]
    async fn a_name_that_leads_here_is_not_resolved() {
        let strict = GuardedResolver(guard("https://reg.example.com/"));
        assert!(strict.resolve("localhost".parse().unwrap()).await.is_err());
        let at_home = GuardedResolver(guard("http://localhost:5000/"));
        assert!(at_home.resolve("localhost".parse().unwrap()).await.is_ok());
    }
}

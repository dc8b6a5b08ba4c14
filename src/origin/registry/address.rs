//! Which addresses a registry may send us to.
//!
//! Invariant: a redirect or a token realm never leads to loopback, link-local or instance-metadata addresses,
//! neither as a literal nor through DNS: those answer to whoever runs on this node, and a registry does not.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// Whether a URL's host is this machine by its spelling.
pub(super) fn is_local_host(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(Host::Ipv4(ip)) => is_local(IpAddr::V4(ip)),
        Some(Host::Ipv6(ip)) => is_local(IpAddr::V6(ip)),
        None => false,
    }
}

/// Loopback, link-local, unspecified, and EC2's metadata addresses.
fn is_local(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => is_local_v4(ip),
        IpAddr::V6(ip) => is_local_v6(ip),
    }
}

const fn is_local_v4(ip: Ipv4Addr) -> bool {
    // 0.0.0.0/8 reaches this host, as loopback does; 169.254.0.0/16 holds the metadata services.
    ip.is_loopback() || ip.is_link_local() || ip.octets()[0] == 0 || ip.is_broadcast()
}

const fn is_local_v6(ip: Ipv6Addr) -> bool {
    // fd00:ec2::/32 holds EC2's metadata and EKS Pod Identity.
    let is_ec2_service = ip.segments()[0] == 0xfd00 && ip.segments()[1] == 0x0ec2;
    ip.is_loopback() || ip.is_unspecified() || ip.is_unicast_link_local() || is_ec2_service
}

/// Resolves names as the system does and leaves local addresses out.
#[derive(Debug)]
pub(super) struct PublicResolver;

impl Resolve for PublicResolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> = found.filter(|address| !is_local(address.ip())).collect();
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

    #[test]
    fn local_hosts_in_every_spelling() {
        for local in [
            "http://127.0.0.1/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://localhost:5000/",
            "http://a.localhost/",
            "http://169.254.169.254/latest/meta-data",
            "http://0.0.0.0/",
            "http://[::1]/",
            "http://[::ffff:169.254.169.254]/",
            "http://[fe80::1]/",
            "http://[fd00:ec2::23]/",
        ] {
            assert!(is_local_host(&Url::parse(local).unwrap()), "{local}");
        }
        for public in ["http://10.0.0.1/", "https://example.com/", "http://[fd12::1]/", "http://192.168.1.1/"]
        {
            assert!(!is_local_host(&Url::parse(public).unwrap()), "{public}");
        }
    }

    #[tokio::test]
    async fn a_name_that_leads_here_is_not_resolved() {
        assert!(PublicResolver.resolve("localhost".parse().unwrap()).await.is_err());
    }
}

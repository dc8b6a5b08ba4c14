//! The name that a certificate proves: a cluster and a node in it.

use std::fmt;

use rustls::pki_types::CertificateDer;

use super::verify::Refusal;
use crate::content::NodeId;

const SCHEME: &str = "windlass://";

/// `.internal` is reserved for private use (ICANN resolution 2024.07.29.06), so the name can never be somebody's.
const DNS_SUFFIX: &str = "windlass.internal";

/// Longest DNS name in bytes (RFC 1035, section 2.3.4), and longest label.
const MAX_DNS: usize = 253;
const MAX_LABEL: usize = 63;

/// A node of a cluster. Both parts are valid and lower-case, so equal names are equal bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerName {
    cluster: String,
    node: String,
}

/// Why a text cannot be in a certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("{0:?} cannot name a cluster: use lower-case letters, digits and '-', at most 63")]
    Cluster(String),
    #[error("{0:?} cannot name a node: use a lower-case host name, as Kubernetes does")]
    Node(String),
    #[error(
        "cluster and node name together are too long: at most {MAX_DNS} bytes with the suffix .{DNS_SUFFIX}"
    )]
    TooLong,
}

impl PeerName {
    /// `cluster` is a DNS label, `node` a DNS name (RFC 1123), which every Kubernetes node name is.
    ///
    /// # Errors
    /// When either is not.
    pub fn new(cluster: &str, node: &str) -> Result<Self, NameError> {
        if !is_label(cluster) {
            return Err(NameError::Cluster(cluster.chars().take(MAX_DNS).collect()));
        }
        if node.is_empty() || !node.split('.').all(is_label) {
            return Err(NameError::Node(node.chars().take(MAX_DNS).collect()));
        }
        let name = Self { cluster: cluster.to_owned(), node: node.to_owned() };
        if name.dns().len() > MAX_DNS { Err(NameError::TooLong) } else { Ok(name) }
    }

    #[must_use]
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The identity used everywhere else.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        NodeId::from_name(&self.node)
    }

    /// The URI subject alternative name.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("{SCHEME}{}/{}", self.cluster, self.node)
    }

    /// The DNS subject alternative name, which is also the server name of a dial. A suffix is needed because a
    /// node may be called `10.0.0.7`, which TLS would take for an address.
    #[must_use]
    pub fn dns(&self) -> String {
        format!("{}.{}.{DNS_SUFFIX}", self.node, self.cluster)
    }

    /// The name in a certificate. Proves nothing by itself: the chain must have been verified.
    ///
    /// # Errors
    /// [`Refusal::Unnamed`] unless there is exactly one `windlass://` URI and it is well-formed.
    pub fn from_certificate(certificate: &CertificateDer<'_>) -> Result<Self, Refusal> {
        let parsed = webpki::EndEntityCert::try_from(certificate).map_err(Refusal::Webpki)?;
        let mut ours = parsed.valid_uri_names().filter_map(|uri| uri.strip_prefix(SCHEME));
        match (ours.next().and_then(|rest| rest.split_once('/')), ours.next()) {
            (Some((cluster, node)), None) => Self::new(cluster, node).map_err(|_| Refusal::Unnamed),
            _ => Err(Refusal::Unnamed),
        }
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.cluster, self.node)
    }
}

fn is_label(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=MAX_LABEL).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_host_names() {
        for node in ["gpu-1", "ip-10-0-1-2.eu-west-1.compute.internal", "10.0.0.7"] {
            assert_eq!(PeerName::new("prod", node).unwrap().node(), node);
        }
        for node in ["", "GPU", "a..b", "-a", "a_b", "a/b", "../x", &"a.".repeat(120)] {
            assert!(PeerName::new("prod", node).is_err(), "{node:?}");
        }
        for cluster in ["", "a.b", "A", "a/b", &"a".repeat(64)] {
            assert!(PeerName::new(cluster, "node").is_err(), "{cluster:?}");
        }
    }
}

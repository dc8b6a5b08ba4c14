//! This node's certificate: from files, signed by itself with the cluster's CA, or made up for a node alone.

use std::time::Duration;

use crate::config::{NodeConfig, TlsConfig};
use crate::transport::tls::{Authority, AuthorityError, Files, Identity, IdentityError, NameError, PeerName};

/// A certificate that a node signs for itself: it signs again at half of this, so a node that is down for two weeks
/// still has a valid one, and a stolen one is worthless after a month.
const SELF_ISSUED_VALIDITY: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// A cluster of one lives as long as its process; ten years is for ever.
const STANDALONE_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// Why this node cannot say who it is.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    #[error("{0}; or set `node.standalone = true` to run without other nodes")]
    Identity(#[from] IdentityError),
    #[error(
        "the certificate {certificate} is for node {theirs}, but this node is {ours}; \
         issue one for it (`windlass certs issue --node {ours}`), or set `node.name`"
    )]
    OtherNode { certificate: String, ours: String, theirs: String },
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

/// Reads or makes the certificate. Blocking.
///
/// # Errors
/// [`ProofError`], with the file and the cure.
pub(super) fn prove(node: &NodeConfig, tls: &TlsConfig) -> Result<Identity, ProofError> {
    let name = PeerName::new(&node.cluster, &node.name)?;
    if node.standalone {
        let (authority, _) = Authority::create(&node.cluster, STANDALONE_VALIDITY)?;
        return Ok(Identity::issued_by(&authority, name, STANDALONE_VALIDITY)?);
    }
    if let Some(ca_key) = &tls.ca_key {
        return Ok(Identity::self_issue(tls.ca.clone(), ca_key.clone(), name, SELF_ISSUED_VALIDITY)?);
    }
    let files = Files { ca: tls.ca.clone(), certificate: tls.certificate.clone(), key: tls.key.clone() };
    let identity = Identity::load(files, &node.cluster)?;
    if identity.name().node() != node.name {
        return Err(ProofError::OtherNode {
            certificate: tls.certificate.display().to_string(),
            ours: node.name.clone(),
            theirs: identity.name().node().to_owned(),
        });
    }
    Ok(identity)
}

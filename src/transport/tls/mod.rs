//! Who is who between peers: one certificate authority per cluster, one certificate per node.
//!
//! A node's certificate carries its identity as a URI subject alternative name, `windlass://<cluster>/<node>`, and
//! for the tools that know only host names also as the DNS name `<node>.<cluster>.windlass.internal`. Only the URI
//! is trusted; a certificate without it, or with two of them, is nobody's.
//!
//! Invariant: no handshake succeeds unless the other side's chain ends at the cluster's CA, its certificate is
//! valid now and names the same cluster, the protocol is `windlass/1`, and (when dialling by name) it names the
//! node that was dialled. Sessions are never resumed, so every connection is checked anew.

mod authority;
mod identity;
mod name;
mod verify;

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::version::TLS13;

use crate::wire;

pub use authority::{Authority, AuthorityError, Issued};
pub use identity::{Files, Identity, IdentityError};
pub use name::{NameError, PeerName};
pub use verify::Refusal;

use verify::PeerVerifier;
pub(super) use verify::explain;

/// AES-128-GCM first: half the cost of ring's on the 8.9 KB packets of a jumbo path, and QUIC's own initial suite.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    let preferred = rustls::CipherSuite::TLS13_AES_128_GCM_SHA256;
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != preferred);
    Arc::new(provider)
}

/// TLS of the side that dials.
///
/// # Errors
/// Only when the crypto provider lacks TLS 1.3, which is a build fault.
pub fn client_config(identity: &Arc<Identity>) -> Result<rustls::ClientConfig, rustls::Error> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PeerVerifier::new(Arc::clone(identity))))
        .with_client_cert_resolver(identity.resolver());
    config.alpn_protocols = vec![wire::ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// TLS of the side that is dialled. Demands the other side's certificate.
///
/// # Errors
/// As [`client_config`].
pub fn server_config(identity: &Arc<Identity>) -> Result<rustls::ServerConfig, rustls::Error> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(PeerVerifier::new(Arc::clone(identity))))
        .with_cert_resolver(identity.resolver());
    config.alpn_protocols = vec![wire::ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    Ok(config)
}

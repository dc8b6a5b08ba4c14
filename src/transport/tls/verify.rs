//! The check of the other side's certificate: a thin layer over webpki, the same for both sides.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use webpki::{EndEntityCert, KeyUsage};

use super::identity::Identity;
use super::name::PeerName;

/// Why a certificate does not prove a node of this cluster.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("its certificate is not signed by this cluster's CA")]
    OtherAuthority,
    #[error("its certificate expired {seconds_ago} s ago")]
    Expired { seconds_ago: u64 },
    #[error("its certificate is valid only in {seconds} s: compare the clocks")]
    NotYetValid { seconds: u64 },
    #[error("its certificate names no node: it needs exactly one URI name windlass://<cluster>/<node>")]
    Unnamed,
    #[error("its certificate is for cluster {theirs}, this node is in {ours}")]
    OtherCluster { ours: String, theirs: String },
    #[error("its certificate is for node {theirs}")]
    OtherNode { theirs: String },
    #[error("its certificate is not usable: {0:?}")]
    Webpki(webpki::Error),
}

impl fmt::Debug for Refusal {
    /// rustls shows the reasons of others only so.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The refusal inside a text that rustls made of it, or the text.
pub(in crate::transport) fn explain(text: &str) -> &str {
    let inner = text.split_once("OtherError(").and_then(|(_, rest)| rest.strip_suffix("))"));
    inner.unwrap_or(text)
}

/// Verifies both servers and clients: peers are equals.
#[derive(Debug)]
pub(super) struct PeerVerifier {
    identity: Arc<Identity>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PeerVerifier {
    pub(super) fn new(identity: Arc<Identity>) -> Self {
        Self { identity, algorithms: super::provider().signature_verification_algorithms }
    }

    /// The node that the chain proves.
    fn authenticate(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<PeerName, Refusal> {
        let credentials = self.identity.credentials();
        verify_chain(end_entity, intermediates, &credentials.anchors, now, usage)?;
        let name = PeerName::from_certificate(end_entity)?;
        let ours = self.identity.name().cluster();
        if name.cluster() != ours {
            return Err(Refusal::OtherCluster { ours: ours.to_owned(), theirs: name.cluster().to_owned() });
        }
        Ok(name)
    }
}

/// Checks signatures, validity at `now` and key usage up to one of `anchors`.
pub(super) fn verify_chain(
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    anchors: &[TrustAnchor<'_>],
    now: UnixTime,
    usage: KeyUsage,
) -> Result<(), Refusal> {
    let algorithms = super::provider().signature_verification_algorithms.all;
    let certificate = EndEntityCert::try_from(end_entity).map_err(Refusal::Webpki)?;
    match certificate.verify_for_usage(algorithms, anchors, intermediates, now, usage, None, None) {
        Ok(_) => Ok(()),
        Err(
            webpki::Error::UnknownIssuer
            | webpki::Error::InvalidSignatureForPublicKey
            | webpki::Error::CaUsedAsEndEntity,
        ) => Err(Refusal::OtherAuthority),
        Err(webpki::Error::CertExpired { time, not_after }) => {
            Err(Refusal::Expired { seconds_ago: time.as_secs().saturating_sub(not_after.as_secs()) })
        }
        Err(webpki::Error::CertNotValidYet { time, not_before }) => {
            Err(Refusal::NotYetValid { seconds: not_before.as_secs().saturating_sub(time.as_secs()) })
        }
        Err(other) => Err(Refusal::Webpki(other)),
    }
}

fn refused(refusal: Refusal) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
}

impl ServerCertVerifier for PeerVerifier {
    /// A DNS name in `server_name` is the node that must answer; an address means that the caller does not know
    /// who lives there and asks for any node of the cluster.
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let name =
            self.authenticate(end_entity, intermediates, now, KeyUsage::server_auth()).map_err(refused)?;
        match server_name {
            ServerName::IpAddress(_) => Ok(ServerCertVerified::assertion()),
            ServerName::DnsName(expected) if expected.as_ref() == name.dns() => {
                Ok(ServerCertVerified::assertion())
            }
            _ => Err(refused(Refusal::OtherNode { theirs: name.node().to_owned() })),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    /// No hints: every node has one certificate and presents it.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.authenticate(end_entity, intermediates, now, KeyUsage::client_auth())
            .map(|_| ClientCertVerified::assertion())
            .map_err(refused)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

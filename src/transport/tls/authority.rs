//! The cluster's certificate authority, for people without cert-manager.
//!
//! Its key signs everything that may join the cluster, so it is written nowhere by this module: callers get PEM.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

use super::name::{NameError, PeerName};

/// Certificates count from an hour ago, because clocks differ and a certificate from the future is refused.
const BACKDATE: Duration = Duration::from_secs(3_600);

/// A CA certificate and its key.
pub struct Authority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key.
pub struct Issued {
    pub certificate_pem: String,
    pub key_pem: String,
}

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("not a CA's PEM certificate and key: {0}; `windlass certs init` makes them")]
    Load(rcgen::Error),
    #[error("the CA certificate may not sign certificates (key usage lacks certificate signing)")]
    NotSigning,
    #[error("the certificate could not be made: {0}")]
    Sign(rcgen::Error),
}

impl Authority {
    /// Makes a new CA for `cluster`; returns it with its key as PEM. P-256, which every TLS stack verifies fast.
    ///
    /// # Errors
    /// When `cluster` is no DNS label or the random source fails.
    pub fn create(cluster: &str, validity: Duration) -> Result<(Self, Issued), AuthorityError> {
        PeerName::new(cluster, "ca")?;
        let key = KeyPair::generate().map_err(AuthorityError::Sign)?;
        let mut params = valid_for(validity);
        params.distinguished_name.push(DnType::CommonName, format!("windlass {cluster} CA"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate_pem = params.self_signed(&key).map_err(AuthorityError::Sign)?.pem();
        let issued = Issued { certificate_pem: certificate_pem.clone(), key_pem: key.serialize_pem() };
        Ok((Self { certificate_pem, issuer: Issuer::new(params, key) }, issued))
    }

    /// Takes a CA from PEM, whoever made it (cert-manager, openssl).
    ///
    /// # Errors
    /// When the PEM is not a certificate and its key, or the certificate may not sign.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, AuthorityError> {
        let key = KeyPair::from_pem(key_pem).map_err(AuthorityError::Load)?;
        let issuer = Issuer::from_ca_cert_pem(certificate_pem, key).map_err(AuthorityError::Load)?;
        let usages = issuer.key_usages();
        if !usages.is_empty() && !usages.contains(&KeyUsagePurpose::KeyCertSign) {
            return Err(AuthorityError::NotSigning);
        }
        Ok(Self { certificate_pem: certificate_pem.to_owned(), issuer })
    }

    /// The CA certificate that every node must trust.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Signs a certificate with a new key for one node, good for both ends of a connection.
    ///
    /// # Errors
    /// When the random source fails.
    pub fn issue(&self, name: &PeerName, validity: Duration) -> Result<Issued, AuthorityError> {
        let key = KeyPair::generate().map_err(AuthorityError::Sign)?;
        let mut params = valid_for(validity);
        // 64 is the longest common name (RFC 5280, upper bounds); only the alternative names count.
        let common: String = name.node().chars().take(64).collect();
        params.distinguished_name.push(DnType::CommonName, common);
        params.subject_alt_names = vec![
            SanType::URI(name.uri().try_into().map_err(AuthorityError::Sign)?),
            SanType::DnsName(name.dns().try_into().map_err(AuthorityError::Sign)?),
        ];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).map_err(AuthorityError::Sign)?;
        Ok(Issued { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }
}

fn valid_for(validity: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(BACKDATE);
    params.not_after = epoch + now + validity;
    params
}

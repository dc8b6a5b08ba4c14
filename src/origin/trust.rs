//! Certificates to trust beside the system's, from a file that the configuration names.
//!
//! Invariant: what [`read`] returns is one or more certificates that TLS can use; everything else is refused with a reason
//! at the start, not at the first connection.

use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// The text of a PEM file with certificates.
///
/// # Errors
/// What is wrong with the file, without its name.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, String> {
    let pem = std::fs::read(path).map_err(|error| error.to_string())?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| error.to_string())?;
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    if roots.is_empty() { Err("it holds no certificate".to_owned()) } else { Ok(pem) }
}

/// A failure's reason with what to do about it, where it is that nobody vouches for the server; `key` holds the file that
/// [`read`] takes.
pub(super) fn with_cure(reason: String, key: &str) -> String {
    // As rustls begins; a type to look for is lost on the way through the clients.
    if !reason.contains("invalid peer certificate") {
        return reason;
    }
    format!(
        "{reason}; if a private authority vouches for this server, name the file of its certificate in `{key}`"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_certificates_are_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        assert!(read(&path).unwrap_err().contains("No such file"));
        for wrong in ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
        {
            std::fs::write(&path, wrong).unwrap();
            read(&path).unwrap_err();
        }
        let made = rcgen::generate_simple_self_signed(vec!["s3.example".to_owned()]).unwrap();
        std::fs::write(&path, made.cert.pem()).unwrap();
        assert_eq!(read(&path).unwrap(), made.cert.pem().into_bytes());
    }
}

//! This node's certificate, key and the CA it trusts, kept fresh while the daemon runs.
//!
//! Invariant: what is in use was checked against itself first (key fits, chain verifies, name is right); a bad new
//! file never replaces good old credentials. Keys never appear in errors or debug output.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, TrustAnchor, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use webpki::KeyUsage;

use super::authority::{Authority, AuthorityError};
use super::name::PeerName;
use super::verify::{Refusal, verify_chain};
use crate::content::NodeId;

/// Paths of PEM files, as cert-manager writes them (`ca.crt`, `tls.crt` with any intermediates, `tls.key`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Why this node has no identity. Each names the file and the cure.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("cannot read {}: {source}; check that it is mounted and readable", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not usable: {reason}; it must be PEM", .path.display())]
    Pem { path: PathBuf, reason: String },
    #[error("{} is not the key of {}; issue both together (`windlass certs issue`)", .key.display(), .certificate.display())]
    KeyMismatch { certificate: PathBuf, key: PathBuf },
    #[error("{}: it is not signed by {}; use the CA that signed it, or issue it again (`windlass certs issue`)", .certificate.display(), .ca.display())]
    OtherAuthority { certificate: PathBuf, ca: PathBuf },
    #[error("{}: {refusal}; issue it again (`windlass certs issue`)", .certificate.display())]
    Certificate { certificate: PathBuf, refusal: Refusal },
    #[error("{} is for cluster {theirs}, but this node is configured for cluster {ours}", .certificate.display())]
    OtherCluster { certificate: PathBuf, ours: String, theirs: String },
    #[error("{} now names node {theirs}; restart to run as another node than {ours}", .certificate.display())]
    OtherNode { certificate: PathBuf, ours: String, theirs: String },
    #[error("{}: {source}", .ca.display())]
    Authority { ca: PathBuf, source: AuthorityError },
}

/// Where fresh credentials come from.
enum Origin {
    Files(Files),
    /// A mounted CA: this node signs for itself, and again when half the time is over.
    SelfIssued {
        ca: PathBuf,
        ca_key: PathBuf,
        validity: Duration,
    },
    /// Made in this process and never renewed.
    Memory,
}

/// One consistent set.
pub(super) struct Credentials {
    certified: Arc<CertifiedKey>,
    pub(super) anchors: Vec<TrustAnchor<'static>>,
    issued: SystemTime,
    expires_unix_s: u64,
    reset_seed: [u8; 32],
}

/// This node's proof of who it is. Share it with `Arc`; [`Self::refresh`] swaps the credentials under everyone.
pub struct Identity {
    name: PeerName,
    origin: Origin,
    current: ArcSwap<Credentials>,
    seen: Mutex<Vec<Stamp>>,
}

/// What tells that a file changed.
type Stamp = Option<(SystemTime, u64)>;

impl Identity {
    /// Loads a certificate that somebody else issued. The node's name is what the certificate says. Blocking.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub fn load(files: Files, cluster: &str) -> Result<Self, IdentityError> {
        let seen = stamps([&files.ca, &files.certificate, &files.key]);
        let (name, credentials) = load_files(&files)?;
        if name.cluster() != cluster {
            return Err(IdentityError::OtherCluster {
                certificate: files.certificate,
                ours: cluster.to_owned(),
                theirs: name.cluster().to_owned(),
            });
        }
        Ok(Self::new(name, Origin::Files(files), credentials, seen))
    }

    /// Signs a certificate for `name` with a mounted CA, valid for `validity`. Blocking.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub fn self_issue(
        ca: PathBuf,
        ca_key: PathBuf,
        name: PeerName,
        validity: Duration,
    ) -> Result<Self, IdentityError> {
        let seen = stamps([&ca, &ca_key]);
        let credentials = issue_for(&name, &ca, &ca_key, validity)?;
        Ok(Self::new(name, Origin::SelfIssued { ca, ca_key, validity }, credentials, seen))
    }

    /// Signs a certificate for `name` that is never renewed: for tests and programs that own their cluster.
    ///
    /// # Errors
    /// [`IdentityError::Authority`] when it cannot be signed.
    pub fn issued_by(
        authority: &Authority,
        name: PeerName,
        validity: Duration,
    ) -> Result<Self, IdentityError> {
        let nowhere = PathBuf::from("(in memory)");
        let credentials = issue_with(authority, &name, validity, &nowhere, b"")?;
        Ok(Self::new(name, Origin::Memory, credentials, Vec::new()))
    }

    fn new(name: PeerName, origin: Origin, credentials: Credentials, seen: Vec<Stamp>) -> Self {
        Self { name, origin, current: ArcSwap::from_pointee(credentials), seen: Mutex::new(seen) }
    }

    /// Reads the files again when they changed, or signs anew when half of the own validity is over. `true` when
    /// the credentials were replaced; connections made from then on use them. Blocking.
    ///
    /// # Errors
    /// See [`IdentityError`]; the old credentials stay, and the next call tries again.
    pub fn refresh(&self) -> Result<bool, IdentityError> {
        let (now, due) = match &self.origin {
            Origin::Memory => return Ok(false),
            Origin::Files(files) => (stamps([&files.ca, &files.certificate, &files.key]), false),
            Origin::SelfIssued { ca, ca_key, validity } => {
                let age = self.current.load().issued.elapsed().unwrap_or_default();
                (stamps([ca, ca_key]), age > *validity / 2)
            }
        };
        if !due && *self.seen.lock() == now {
            return Ok(false);
        }
        let fresh = self.obtain()?;
        self.current.store(Arc::new(fresh));
        *self.seen.lock() = now;
        Ok(true)
    }

    fn obtain(&self) -> Result<Credentials, IdentityError> {
        match &self.origin {
            Origin::Files(files) => {
                let (name, credentials) = load_files(files)?;
                if name == self.name {
                    return Ok(credentials);
                }
                Err(IdentityError::OtherNode {
                    certificate: files.certificate.clone(),
                    ours: self.name.to_string(),
                    theirs: name.to_string(),
                })
            }
            Origin::SelfIssued { ca, ca_key, validity } => issue_for(&self.name, ca, ca_key, *validity),
            Origin::Memory => unreachable!("refresh returns before it asks for credentials made in memory"),
        }
    }

    #[must_use]
    pub const fn name(&self) -> &PeerName {
        &self.name
    }

    #[must_use]
    pub fn node_id(&self) -> NodeId {
        self.name.node_id()
    }

    /// End of the certificate's validity, seconds since 1970.
    #[must_use]
    pub fn expires_unix_s(&self) -> u64 {
        self.current.load().expires_unix_s
    }

    /// Secret from which stateless resets are made (RFC 9000, section 10.3). It outlives the process where the
    /// key does, so that a restarted node can tell its peers at once that their connections are gone.
    pub(in crate::transport) fn reset_seed(&self) -> [u8; 32] {
        self.current.load().reset_seed
    }

    pub(super) fn credentials(&self) -> Arc<Credentials> {
        self.current.load_full()
    }

    pub(super) fn resolver(self: &Arc<Self>) -> Arc<Resolver> {
        Arc::new(Resolver(Arc::clone(self)))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.name).finish()
    }
}

/// Hands rustls the current certificate.
#[derive(Debug)]
pub(super) struct Resolver(Arc<Identity>);

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.current.load().certified))
    }
}

impl ResolvesClientCert for Resolver {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.current.load().certified))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn load_files(files: &Files) -> Result<(PeerName, Credentials), IdentityError> {
    let chain = certificates(&files.certificate, &read(&files.certificate)?)?;
    let key_pem = read(&files.key)?;
    let key = private_key(&files.key, &key_pem)?;
    let anchors = anchors(&files.ca, &read(&files.ca)?)?;
    let seed = blake3::derive_key("windlass stateless reset of a mounted key v1", &key_pem);
    credentials(files, chain, key, anchors, seed)
}

fn issue_for(
    name: &PeerName,
    ca: &Path,
    ca_key: &Path,
    validity: Duration,
) -> Result<Credentials, IdentityError> {
    let (ca_pem, key_pem) = (read(ca)?, read(ca_key)?);
    let authority =
        Authority::from_pem(&String::from_utf8_lossy(&ca_pem), &String::from_utf8_lossy(&key_pem))
            .map_err(|source| IdentityError::Authority { ca: ca.to_owned(), source })?;
    issue_with(&authority, name, validity, ca, &key_pem)
}

/// `secret` is what survives a restart; empty when nothing does.
fn issue_with(
    authority: &Authority,
    name: &PeerName,
    validity: Duration,
    ca: &Path,
    secret: &[u8],
) -> Result<Credentials, IdentityError> {
    let issued = authority
        .issue(name, validity)
        .map_err(|source| IdentityError::Authority { ca: ca.to_owned(), source })?;
    let secret = if secret.is_empty() { issued.key_pem.as_bytes() } else { secret };
    let mut seed = blake3::Hasher::new_derive_key("windlass stateless reset of a self-issued key v1");
    seed.update(secret).update(name.node().as_bytes());
    let own = PathBuf::from(format!("the certificate that this node issues itself from {}", ca.display()));
    let files = Files { ca: ca.to_owned(), certificate: own.clone(), key: own.clone() };
    let chain = certificates(&own, issued.certificate_pem.as_bytes())?;
    let key = private_key(&own, issued.key_pem.as_bytes())?;
    let anchors = anchors(ca, authority.certificate_pem().as_bytes())?;
    credentials(&files, chain, key, anchors, *seed.finalize().as_bytes()).map(|(_, credentials)| credentials)
}

/// Checks the set against itself, as a peer would.
fn credentials(
    files: &Files,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    anchors: Vec<TrustAnchor<'static>>,
    reset_seed: [u8; 32],
) -> Result<(PeerName, Credentials), IdentityError> {
    let certificate = || files.certificate.clone();
    let key = super::provider()
        .key_provider
        .load_private_key(key)
        .map_err(|e| IdentityError::Pem { path: files.key.clone(), reason: e.to_string() })?;
    let certified = CertifiedKey::new(chain, key);
    if certified.keys_match().is_err() {
        return Err(IdentityError::KeyMismatch { certificate: certificate(), key: files.key.clone() });
    }
    for usage in [KeyUsage::server_auth(), KeyUsage::client_auth()] {
        verify_own(&certified.cert, &anchors, UnixTime::now(), usage).map_err(|refusal| match refusal {
            Refusal::OtherAuthority => {
                IdentityError::OtherAuthority { certificate: certificate(), ca: files.ca.clone() }
            }
            refusal => IdentityError::Certificate { certificate: certificate(), refusal },
        })?;
    }
    let name = PeerName::from_certificate(&certified.cert[0])
        .map_err(|refusal| IdentityError::Certificate { certificate: certificate(), refusal })?;
    let expires_unix_s = expiry(&certified.cert, &anchors);
    let issued = SystemTime::now();
    Ok((name, Credentials { certified: Arc::new(certified), anchors, issued, expires_unix_s, reset_seed }))
}

fn verify_own(
    chain: &[CertificateDer<'static>],
    anchors: &[TrustAnchor<'static>],
    now: UnixTime,
    usage: KeyUsage,
) -> Result<(), Refusal> {
    let (end_entity, intermediates) = chain.split_first().ok_or(Refusal::Unnamed)?;
    verify_chain(end_entity, intermediates, anchors, now, usage)
}

/// webpki shows no dates; asked about a far day, it says how long ago the certificate ended.
fn expiry(chain: &[CertificateDer<'static>], anchors: &[TrustAnchor<'static>]) -> u64 {
    const YEAR_9999_S: u64 = 253_402_300_799;
    let far = UnixTime::since_unix_epoch(Duration::from_secs(YEAR_9999_S));
    match verify_own(chain, anchors, far, KeyUsage::server_auth()) {
        Err(Refusal::Expired { seconds_ago }) => YEAR_9999_S.saturating_sub(seconds_ago),
        _ => YEAR_9999_S,
    }
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    std::fs::read(path).map_err(|source| IdentityError::Read { path: path.to_owned(), source })
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let unusable = |reason: String| IdentityError::Pem { path: path.to_owned(), reason };
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|e| unusable(e.to_string()))?;
    if chain.is_empty() { Err(unusable("it holds no certificate".into())) } else { Ok(chain) }
}

fn private_key(path: &Path, pem: &[u8]) -> Result<PrivateKeyDer<'static>, IdentityError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|e| IdentityError::Pem {
        path: path.to_owned(),
        reason: format!("it holds no private key ({e})"),
    })
}

/// Every certificate in the file is trusted, so that an old and a new CA can overlap during a rotation.
fn anchors(path: &Path, pem: &[u8]) -> Result<Vec<TrustAnchor<'static>>, IdentityError> {
    certificates(path, pem)?
        .iter()
        .map(|ca| webpki::anchor_from_trusted_cert(ca).map(|anchor| anchor.to_owned()))
        .collect::<Result<_, _>>()
        .map_err(|e| IdentityError::Pem {
            path: path.to_owned(),
            reason: format!("not a CA certificate: {e:?}"),
        })
}

fn stamps<const N: usize>(paths: [&PathBuf; N]) -> Vec<Stamp> {
    let stamp = |path: &PathBuf| {
        let meta = std::fs::metadata(path).ok()?;
        Some((meta.modified().unwrap_or(UNIX_EPOCH), meta.len()))
    };
    paths.into_iter().map(stamp).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    struct Mount {
        dir: tempfile::TempDir,
        authority: Authority,
    }

    impl Mount {
        fn new(cluster: &str) -> Self {
            let (authority, issued) = Authority::create(cluster, 10 * DAY).unwrap();
            let mount = Self { dir: tempfile::tempdir().unwrap(), authority };
            mount.write("ca.crt", &issued.certificate_pem);
            mount.write("ca.key", &issued.key_pem);
            mount
        }

        fn write(&self, name: &str, text: &str) {
            std::fs::write(self.path(name), text).unwrap();
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn issue(&self, cluster: &str, node: &str, validity: Duration) {
            let name = PeerName::new(cluster, node).unwrap();
            let issued = self.authority.issue(&name, validity).unwrap();
            self.write("tls.crt", &issued.certificate_pem);
            self.write("tls.key", &issued.key_pem);
        }

        fn load(&self) -> Result<Identity, IdentityError> {
            Identity::load(self.files(), "prod")
        }

        fn files(&self) -> Files {
            Files { ca: self.path("ca.crt"), certificate: self.path("tls.crt"), key: self.path("tls.key") }
        }
    }

    #[test]
    fn the_certificate_names_the_node() {
        let mount = Mount::new("prod");
        mount.issue("prod", "gpu-7", DAY);
        let identity = mount.load().unwrap();
        assert_eq!(identity.name(), &PeerName::new("prod", "gpu-7").unwrap());
        assert_eq!(identity.node_id(), NodeId::from_name("gpu-7"));
        let now = UnixTime::now().as_secs();
        assert!((now + 86_300..now + 86_500).contains(&identity.expires_unix_s()));
    }

    #[test]
    fn a_mounted_ca_signs_and_keeps_signing() {
        let mount = Mount::new("prod");
        let name = PeerName::new("prod", "10.0.0.7").unwrap();
        let identity =
            Identity::self_issue(mount.path("ca.crt"), mount.path("ca.key"), name, Duration::ZERO + DAY)
                .unwrap();
        assert!(!identity.refresh().unwrap(), "nothing changed");
        let again = Identity::self_issue(
            mount.path("ca.crt"),
            mount.path("ca.key"),
            PeerName::new("prod", "10.0.0.7").unwrap(),
            DAY,
        )
        .unwrap();
        assert_eq!(identity.reset_seed(), again.reset_seed(), "a restart keeps the reset secret");
    }

    #[test]
    fn each_fault_names_its_file_and_cure() {
        let mount = Mount::new("prod");
        let says = |expected: &str, file: &str| {
            let text = mount.load().unwrap_err().to_string();
            assert!(text.contains(expected) && text.contains(file), "{text}");
        };
        says("check that it is mounted", "tls.crt");
        mount.issue("staging", "n", DAY);
        says("for cluster staging, but this node is configured for cluster prod", "tls.crt");
        mount.issue("prod", "n", Duration::ZERO);
        std::thread::sleep(Duration::from_millis(1_100));
        says("expired", "tls.crt");
        mount.issue("prod", "n", DAY);
        mount.write("tls.key", &Authority::create("x", DAY).unwrap().1.key_pem);
        says("is not the key of", "tls.key");
        mount.issue("prod", "n", DAY);
        mount.write("ca.crt", &Authority::create("prod", DAY).unwrap().1.certificate_pem);
        says("not signed by", "ca.crt");
        mount.write("tls.key", "no pem");
        says("holds no private key", "tls.key");
    }

    #[test]
    fn a_certificate_without_a_name_is_nobodys() {
        let mount = Mount::new("prod");
        let ca = Authority::create("prod", DAY).unwrap();
        mount.write("ca.crt", &ca.1.certificate_pem);
        mount.write("tls.crt", &ca.1.certificate_pem);
        mount.write("tls.key", &ca.1.key_pem);
        assert!(mount.load().is_err());
    }

    #[test]
    fn rotation_replaces_good_with_good_only() {
        let mount = Mount::new("prod");
        mount.issue("prod", "n", DAY);
        let identity = mount.load().unwrap();
        let before = identity.expires_unix_s();
        mount.write("tls.crt", "garbage");
        assert!(identity.refresh().is_err());
        assert_eq!(identity.expires_unix_s(), before);
        mount.issue("prod", "other", DAY);
        assert!(matches!(identity.refresh(), Err(IdentityError::OtherNode { .. })));
        mount.issue("prod", "n", 2 * DAY);
        assert!(identity.refresh().unwrap());
        assert!(identity.expires_unix_s() > before);
    }
}

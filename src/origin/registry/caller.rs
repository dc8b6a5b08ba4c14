//! A registry as one caller sees it: asked with that caller's credential and with no other.
//!
//! Invariant: a caller's credential goes where this node's own would go (the registry, and the token service that it
//! names), and its tokens serve that caller only.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use zeroize::Zeroizing;

use super::Registry;
use super::credentials::{Credential, CredentialSource};
use super::location::Locations;
use crate::origin::access::Access;
use crate::origin::registry::authorizer::Authorizer;

impl Registry {
    /// Whose right to read counts here.
    #[must_use]
    pub const fn access(&self) -> Access {
        self.access
    }

    /// This registry, asked in the name of a caller who brought `credential`; without one, as anybody may ask.
    ///
    /// The credential lives as long as what is returned.
    #[must_use]
    pub fn seen_by(&self, credential: Option<Credential>) -> Self {
        Self {
            client: Arc::clone(&self.client),
            authorizer: Authorizer::new(CredentialSource::Caller(credential)),
            locations: Locations::default(),
            access: self.access,
        }
    }
}

impl Credential {
    /// The credential in the value of an `Authorization` header (RFC 7617); `None` unless it is a Basic one.
    #[must_use]
    pub fn from_basic(header: &HeaderValue) -> Option<Self> {
        let (scheme, encoded) = header.to_str().ok()?.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("basic") {
            return None;
        }
        let decoded = Zeroizing::new(STANDARD.decode(encoded.trim()).ok()?);
        let (username, password) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
        Some(Self::new(username, password))
    }

    /// User name and password as bytes, to tell callers apart by.
    #[must_use]
    pub fn parts(&self) -> [&[u8]; 2] {
        [self.username.as_bytes(), self.secret.as_bytes()]
    }
}

#[cfg(test)]
mod tests {
    use super::super::stub::{Reply, Stub};
    use super::*;
    use crate::content::{Algorithm, ByteRange, Digest};
    use crate::origin::fake;

    #[tokio::test]
    async fn a_callers_credential_stays_with_the_registry() {
        const SIZE: u64 = 1_000;
        let hers: HeaderValue = format!("Basic {}", STANDARD.encode("ann:hers")).parse().unwrap();
        let store =
            Stub::start(|seen| Reply::ranged(seen, &fake::seeded_bytes(3, ByteRange::new(0, SIZE)))).await;
        let to = store.url("/bucket/blob");
        let stub = Stub::start(move |seen| match seen.header("authorization") {
            None => Reply::status(401).with("www-authenticate", "Basic realm=\"r\""),
            Some(_) => Reply::redirect(to.clone()),
        })
        .await;
        let caller = stub.registry().seen_by(Credential::from_basic(&hers));
        let digest = Digest::from_bytes(Algorithm::Sha256, &[7; 32]).unwrap();
        assert_eq!(caller.blob_size(&"team/app".parse().unwrap(), &digest).await.unwrap(), SIZE);
        assert_eq!(stub.seen().last().unwrap().header("authorization"), hers.to_str().ok());
        assert!(
            !store.seen().is_empty()
                && store.seen().iter().all(|seen| seen.header("authorization").is_none())
        );
        assert!(!format!("{caller:?}").contains("hers"));
    }

    #[test]
    fn only_basic_credentials_are_understood() {
        let read = |header: &str| Credential::from_basic(&header.parse().unwrap());
        let expected = Some(Credential::new("me", "se:cret"));
        assert_eq!(read(&format!("Basic {}", STANDARD.encode("me:se:cret"))), expected);
        assert_eq!(read(&format!("bASIC  {}", STANDARD.encode("me:se:cret"))), expected);
        for other in ["Bearer abc", "Basic ?", "Basic", &format!("Basic {}", STANDARD.encode("nocolon"))] {
            assert_eq!(read(other), None, "{other}");
        }
    }
}

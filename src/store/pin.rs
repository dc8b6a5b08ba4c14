//! What is exempt from eviction: by command or lease, which the sidecar keeps, and by configuration.
//!
//! This module refuses to know the clock: `now` is passed in.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::content::ContentId;

/// How long a content is exempt from eviction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pin {
    #[default]
    Not,
    /// Milliseconds since the Unix epoch.
    Until(u64),
    Forever,
}

impl Pin {
    #[must_use]
    pub const fn holds(self, now_ms: u64) -> bool {
        match self {
            Self::Not => false,
            Self::Until(end_ms) => now_ms < end_ms,
            Self::Forever => true,
        }
    }

    /// Zero for none and the largest number for ever: what the sidecar and the index keep.
    pub(super) const fn to_ms(self) -> u64 {
        match self {
            Self::Not => 0,
            Self::Until(end_ms) => end_ms,
            Self::Forever => u64::MAX,
        }
    }

    pub(super) const fn from_ms(end_ms: u64) -> Self {
        match end_ms {
            0 => Self::Not,
            u64::MAX => Self::Forever,
            end_ms => Self::Until(end_ms),
        }
    }
}

/// One of `store.pins`: a blob's digest, an object's `s3://bucket/key`, or a prefix of such names that ends with `/`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PinName(String);

/// Not the name of anything that can be pinned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} names no content: write sha256:DIGEST, s3://bucket/key, or s3://bucket/prefix/ for all below it"
)]
pub struct PinNameError(String);

impl PinName {
    /// Whether it names `id`.
    #[must_use]
    pub fn names(&self, id: &ContentId) -> bool {
        let name = id.to_string();
        if self.0.ends_with('/') { name.starts_with(&self.0) } else { name == self.0 }
    }
}

impl FromStr for PinName {
    type Err = PinNameError;

    fn from_str(text: &str) -> Result<Self, PinNameError> {
        let is_digest =
            |digest: &str| digest.bytes().all(|byte| byte.is_ascii_hexdigit()) && digest.len() >= 64;
        let fits = match text.split_once(':') {
            Some(("s3", rest)) => rest
                .strip_prefix("//")
                .and_then(|path| path.split_once('/'))
                .is_some_and(|(bucket, _)| !bucket.is_empty()),
            Some(("sha256" | "sha512", digest)) => is_digest(digest),
            _ => false,
        };
        if fits { Ok(Self(text.to_owned())) } else { Err(PinNameError(text.to_owned())) }
    }
}

impl TryFrom<String> for PinName {
    type Error = PinNameError;

    fn try_from(text: String) -> Result<Self, PinNameError> {
        text.parse()
    }
}

impl From<PinName> for String {
    fn from(name: PinName) -> Self {
        name.0
    }
}

impl std::fmt::Display for PinName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// All of `store.pins`.
#[derive(Clone, Debug, Default)]
pub(super) struct Pins(pub Vec<PinName>);

impl Pins {
    pub(super) fn name(&self, id: &ContentId) -> bool {
        self.0.iter().any(|pin| pin.names(id))
    }

    /// Differs when the pins do: rows of an index that was made under others say the wrong thing.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut hasher = blake3::Hasher::new();
        for PinName(name) in &self.0 {
            hasher.update(name.as_bytes()).update(b"\0");
        }
        let mut first = [0; 8];
        first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        u64::from_le_bytes(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::{ETag, ObjectVersion};

    #[test]
    fn names_and_prefixes() {
        let id = |key: &str| {
            ContentId::Object(ObjectVersion {
                bucket: "models".into(),
                key: key.into(),
                etag: ETag("\"1\"".into()),
                size: 1,
            })
        };
        let names = |pin: &str, key: &str| pin.parse::<PinName>().unwrap().names(&id(key));
        assert!(names("s3://models/a/", "a/b") && names("s3://models/", "x") && names("s3://models/a", "a"));
        assert!(
            !names("s3://models/a", "a/b") && !names("s3://models/a/", "ab") && !names("s3://model/", "x")
        );
        let digest = format!("sha256:{}", "ab".repeat(32));
        assert!(digest.parse::<PinName>().is_ok());
        for wrong in ["models/a", "s3://models", "s3:///a", "sha256:", "sha256:xyz", ""] {
            assert!(wrong.parse::<PinName>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_pin_ends() {
        assert!(Pin::Forever.holds(u64::MAX) && Pin::Until(5).holds(4) && !Pin::Until(5).holds(5));
        assert!(Pin::Not < Pin::Until(1) && Pin::Until(u64::MAX - 1) < Pin::Forever);
        for pin in [Pin::Not, Pin::Until(7), Pin::Forever] {
            assert_eq!(Pin::from_ms(pin.to_ms()), pin);
        }
    }
}

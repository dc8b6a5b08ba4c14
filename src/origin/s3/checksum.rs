//! The checksums that S3 keeps of an object: read, computed, combined and compared. Pure.
//!
//! S3 keeps one algorithm's checksum of an object, of the whole (`FULL_OBJECT`) or, after a multipart upload, of the
//! parts' checksums (`COMPOSITE`, written `base64-N`): "Checking object integrity" in the S3 user guide. The CRCs of two
//! halves combine into the whole's, so that chunks are summed side by side.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use crc_fast::{CrcAlgorithm, checksum_combine};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::Checksums;
use crate::content::Digest;

/// How a sum is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SumKind {
    /// What S3 adds to every object that comes without a checksum.
    Crc64Nvme,
    Crc32c,
    Crc32,
    Sha256,
}

/// A sum of some bytes, as S3 writes it: big-endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sum {
    pub kind: SumKind,
    bytes: Vec<u8>,
}

/// What S3 says of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The sum of all its bytes.
    Whole(Sum),
    /// The sum of its parts' sums, and how many these are.
    Parts { of_sums: Sum, count: u32 },
}

/// A sum in the making.
pub enum Hasher {
    Crc(SumKind, Box<crc_fast::Digest>),
    Sha256(Box<Sha256>),
}

impl SumKind {
    const ALL: [Self; 4] = [Self::Crc64Nvme, Self::Crc32c, Self::Crc32, Self::Sha256];

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Crc64Nvme => "crc64nvme",
            Self::Crc32c => "crc32c",
            Self::Crc32 => "crc32",
            Self::Sha256 => "sha256",
        }
    }

    /// Bytes of a sum.
    const fn len(self) -> usize {
        match self {
            Self::Crc64Nvme => 8,
            Self::Crc32c | Self::Crc32 => 4,
            Self::Sha256 => 32,
        }
    }

    /// `None` for a hash, which cannot be combined.
    const fn crc(self) -> Option<CrcAlgorithm> {
        match self {
            Self::Crc64Nvme => Some(CrcAlgorithm::Crc64Nvme),
            Self::Crc32c => Some(CrcAlgorithm::Crc32Iscsi),
            Self::Crc32 => Some(CrcAlgorithm::Crc32IsoHdlc),
            Self::Sha256 => None,
        }
    }

    /// Whether the sums of neighbours make the sum of both.
    #[must_use]
    pub const fn combines(self) -> bool {
        self.crc().is_some()
    }

    #[must_use]
    pub fn hasher(self) -> Hasher {
        match self.crc() {
            Some(crc) => Hasher::Crc(self, Box::new(crc_fast::Digest::new(crc))),
            None => Hasher::Sha256(Box::default()),
        }
    }
}

impl fmt::Display for SumKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Crc(_, digest) => digest.update(bytes),
            Self::Sha256(hash) => hash.update(bytes),
        }
    }

    #[must_use]
    pub fn finish(self) -> Sum {
        match self {
            Self::Crc(kind, digest) => Sum::of_crc(kind, digest.finalize()),
            Self::Sha256(hash) => Sum { kind: SumKind::Sha256, bytes: hash.finalize().to_vec() },
        }
    }
}

impl Sum {
    /// Reads base64 of the right length.
    #[must_use]
    pub fn parse(kind: SumKind, text: &str) -> Option<Self> {
        let bytes = STANDARD.decode(text).ok()?;
        (bytes.len() == kind.len()).then_some(Self { kind, bytes })
    }

    /// A SHA-256 that somebody else made.
    #[must_use]
    pub fn from_digest(digest: &Digest) -> Self {
        Self { kind: SumKind::Sha256, bytes: digest.as_bytes().to_vec() }
    }

    /// The sum of `self`'s bytes followed by `next`'s, which are `next_len`; `None` unless both are CRCs of one kind.
    #[must_use]
    pub fn combine(&self, next: &Self, next_len: u64) -> Option<Self> {
        let crc = self.kind.crc().filter(|_| self.kind == next.kind)?;
        Some(Self::of_crc(self.kind, checksum_combine(crc, self.value(), next.value(), next_len)))
    }

    /// What S3 calls composite: the sum of the parts' sums.
    #[must_use]
    pub fn of_sums<'a>(kind: SumKind, sums: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut hasher = kind.hasher();
        sums.into_iter().for_each(|sum| hasher.update(&sum.bytes));
        hasher.finish()
    }

    fn of_crc(kind: SumKind, value: u64) -> Self {
        let bytes = value.to_be_bytes();
        Self { kind, bytes: bytes[bytes.len() - kind.len()..].to_vec() }
    }

    fn value(&self) -> u64 {
        self.bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }
}

/// As S3 writes it.
impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, STANDARD.encode(&self.bytes))
    }
}

impl Checksums {
    /// What can be compared with the object's bytes; `None` when S3 keeps no sum, or only a SHA-1.
    #[must_use]
    pub fn claim(&self) -> Option<Claim> {
        SumKind::ALL.into_iter().find_map(|kind| {
            let text = self.of(kind)?;
            match text.split_once('-') {
                Some((sums, count)) => {
                    Some(Claim::Parts { of_sums: Sum::parse(kind, sums)?, count: count.parse().ok()? })
                }
                None if self.kind.as_deref() == Some("COMPOSITE") => None,
                None => Sum::parse(kind, text).map(Claim::Whole),
            }
        })
    }

    /// The text of one algorithm's sum.
    #[must_use]
    pub fn of(&self, kind: SumKind) -> Option<&str> {
        match kind {
            SumKind::Crc64Nvme => self.crc64nvme.as_deref(),
            SumKind::Crc32c => self.crc32c.as_deref(),
            SumKind::Crc32 => self.crc32.as_deref(),
            SumKind::Sha256 => self.sha256.as_deref(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sum(kind: SumKind, bytes: &[u8]) -> Sum {
        let mut hasher = kind.hasher();
        hasher.update(bytes);
        hasher.finish()
    }

    #[test]
    fn known_values() {
        // The check values of the CRC catalogue for "123456789", and SHA-256's of FIPS 180-4 for "abc".
        for (kind, value) in [
            (SumKind::Crc64Nvme, 0xae8b_1486_0a79_9888),
            (SumKind::Crc32c, 0xe306_9283),
            (SumKind::Crc32, 0xcbf4_3926),
        ] {
            assert_eq!(sum(kind, b"123456789"), Sum::of_crc(kind, value), "{kind}");
            assert_eq!(sum(kind, b"123456789").value(), value);
        }
        assert!(sum(SumKind::Sha256, b"abc").to_string().starts_with("sha256 ungWv48Bz+pBQUDeXa4i"));
    }

    #[test]
    fn what_s3_says_is_read() {
        let mut said = Checksums { crc64nvme: Some("rosUhgp5mIg=".into()), ..Checksums::default() };
        assert_eq!(said.claim(), Some(Claim::Whole(sum(SumKind::Crc64Nvme, b"123456789"))));
        said = Checksums {
            crc32c: Some("4waSgw==-3".into()),
            kind: Some("COMPOSITE".into()),
            ..Checksums::default()
        };
        let of_sums = sum(SumKind::Crc32c, b"123456789");
        assert_eq!(said.claim(), Some(Claim::Parts { of_sums, count: 3 }));
        for odd in ["", "?", "4waSgw==-", "4waSgw==-x", "4waS"] {
            assert_eq!(Checksums { crc32c: Some(odd.into()), ..Checksums::default() }.claim(), None, "{odd}");
        }
        assert_eq!(Checksums { sha1: Some("x".into()), ..Checksums::default() }.claim(), None);
    }

    proptest! {
        #[test]
        fn halves_combine(bytes in proptest::collection::vec(any::<u8>(), 0..3000), at in 0usize..3000) {
            let (left, right) = bytes.split_at(at.min(bytes.len()));
            for kind in SumKind::ALL.into_iter().filter(|kind| kind.combines()) {
                let both = sum(kind, left).combine(&sum(kind, right), right.len() as u64);
                prop_assert_eq!(both, Some(sum(kind, &bytes)));
            }
        }
    }

    #[test]
    fn hashes_do_not_combine() {
        let hash = sum(SumKind::Sha256, b"a");
        assert_eq!(hash.combine(&hash, 1), None);
        assert_eq!(sum(SumKind::Crc32, b"a").combine(&sum(SumKind::Crc32c, b"a"), 1), None);
    }
}

//! Digests: the OCI kind that names a blob, and the chunk kind that peers attest.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Hash functions that may name a blob (image-spec, "Registered algorithms").
///
/// Others are refused: accepting an unknown algorithm would mean serving bytes nobody can check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Algorithm {
    Sha256,
    Sha512,
}

impl Algorithm {
    /// The name in front of the colon.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// Length of the raw digest in bytes.
    #[must_use]
    pub const fn len_bytes(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }
}

/// An OCI digest, `algorithm:lowercase-hex`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Digest {
    algorithm: Algorithm,
    bytes: Vec<u8>,
}

/// Why a text is not a digest we can check.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    #[error("{0:?} is not a digest: expected sha256: or sha512: followed by lowercase hex")]
    Malformed(String),
    #[error("digest algorithm {0:?} is not supported: use sha256 or sha512")]
    UnknownAlgorithm(String),
}

impl Digest {
    /// A digest from raw bytes, as a hasher returns them.
    ///
    /// # Errors
    /// [`DigestError::Malformed`] when the length is not the algorithm's.
    pub fn from_bytes(algorithm: Algorithm, bytes: &[u8]) -> Result<Self, DigestError> {
        if bytes.len() != algorithm.len_bytes() {
            return Err(DigestError::Malformed(hex::encode(bytes)));
        }
        Ok(Self { algorithm, bytes: bytes.to_vec() })
    }

    #[must_use]
    pub const fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The part behind the colon.
    #[must_use]
    pub fn hex(&self) -> String {
        hex::encode(&self.bytes)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let malformed = || DigestError::Malformed(text.chars().take(160).collect());
        let (name, encoded) = text.split_once(':').ok_or_else(malformed)?;
        let algorithm = match name {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            other => return Err(DigestError::UnknownAlgorithm(other.chars().take(32).collect())),
        };
        let is_lower_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if encoded.len() != 2 * algorithm.len_bytes() || !encoded.bytes().all(is_lower_hex) {
            return Err(malformed());
        }
        let bytes = hex::decode(encoded).map_err(|_| malformed())?;
        Ok(Self { algorithm, bytes })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.as_str(), self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// BLAKE3 fed with single packets loses its SIMD width and most of its speed; from this length on it is whole.
const WIDE_BYTES: usize = 64 << 10;

/// Small pieces are gathered up to this: fits a core's second-level cache.
const GATHER_BYTES: usize = 256 << 10;

/// BLAKE3 of one chunk: what the node that fetched it from the origin attests.
///
/// BLAKE3 and not SHA-256 because a receiver hashes every byte it gets: 9.8 GB/s a core against 2.0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChunkDigest(pub [u8; 32]);

impl ChunkDigest {
    /// Hashes a chunk that lies in one piece.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Hashes a chunk that lies in pieces of any length, one behind the other.
    #[must_use]
    pub fn of_pieces<P: AsRef<[u8]>>(pieces: impl IntoIterator<Item = P>) -> Self {
        let mut hasher = blake3::Hasher::new();
        let mut gathered = Vec::new();
        for piece in pieces {
            let piece = piece.as_ref();
            if piece.len() < WIDE_BYTES {
                gathered.extend_from_slice(piece);
                if gathered.len() < GATHER_BYTES {
                    continue;
                }
            }
            hasher.update(&gathered);
            gathered.clear();
            if piece.len() >= WIDE_BYTES {
                hasher.update(piece);
            }
        }
        hasher.update(&gathered);
        Self(*hasher.finalize().as_bytes())
    }
}

impl fmt::Debug for ChunkDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blake3:{}", hex::encode(&self.0[..8]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn a_digest_prints_as_it_was_read() {
        assert_eq!(EMPTY.parse::<Digest>().unwrap().to_string(), EMPTY);
    }

    #[test]
    fn what_could_not_be_checked_is_refused() {
        for bad in [
            "",
            "sha256",
            "sha256:",
            "sha256:e3b0",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
            "sha256:E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855",
            "sha256:../../../../etc/passwd0000000000000000000000000000000000000000000",
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn pieces_hash_like_the_whole() {
        let bytes = vec![7u8; 300_000];
        for len in [1, 8_900, 65_536, 100_000] {
            assert_eq!(ChunkDigest::of(&bytes), ChunkDigest::of_pieces(bytes.chunks(len)), "{len}");
        }
        let mixed = [&bytes[..10], &bytes[10..200_000], &bytes[200_000..200_005], &bytes[200_005..]];
        assert_eq!(ChunkDigest::of(&bytes), ChunkDigest::of_pieces(mixed));
    }
}

//! Identities: of contents, and of the nodes that vouch for their chunks.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::digest::{ChunkDigest, Digest};

/// An S3 entity tag as the origin wrote it, quotes included.
///
/// Opaque: it is an MD5 only for single-part uploads without KMS (`facts/wire.md` section 5).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ETag(pub String);

/// One version of an S3 object. Equal values mean equal bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectVersion {
    pub bucket: String,
    pub key: String,
    pub etag: ETag,
    /// Bytes.
    pub size: u64,
}

/// Either kind of thing that is cut into chunks and shared.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ContentId {
    /// An OCI layer, configuration or manifest.
    Blob(Digest),
    /// An S3 object version.
    Object(ObjectVersion),
}

impl ContentId {
    /// The fixed-size name used between peers and on disk.
    ///
    /// `chunk_bytes` is part of it, so that nodes configured with different chunk sizes never mistake each
    /// other's chunk numbers: they merely do not share.
    #[must_use]
    pub fn key(&self, chunk_bytes: u32) -> ContentKey {
        let mut hasher = blake3::Hasher::new_derive_key("windlass content key v1");
        let mut field = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        field(&chunk_bytes.to_le_bytes());
        match self {
            Self::Blob(digest) => {
                field(b"blob");
                field(digest.algorithm().as_str().as_bytes());
                field(digest.as_bytes());
            }
            Self::Object(object) => {
                field(b"object");
                field(object.bucket.as_bytes());
                field(object.key.as_bytes());
                field(object.etag.0.as_bytes());
                field(&object.size.to_le_bytes());
            }
        }
        ContentKey(*hasher.finalize().as_bytes())
    }
}

impl fmt::Display for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blob(digest) => write!(f, "{digest}"),
            Self::Object(object) => write!(f, "s3://{}/{}", object.bucket, object.key),
        }
    }
}

/// Fixed-size name of a content: see [`ContentId::key`]. Peers exchange nothing else, so a home keeps claims
/// for contents whose names it has never learnt.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ContentKey(pub [u8; 32]);

impl ContentKey {
    #[must_use]
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Debug for ContentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0[..6]))
    }
}

/// Name of a node, derived from the name its certificate proves.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeId(pub [u8; 16]);

impl NodeId {
    /// The identity of the node whose certificate carries `name`.
    #[must_use]
    pub fn from_name(name: &str) -> Self {
        let hash = blake3::derive_key("windlass node id v1", name.as_bytes());
        let mut id = [0; 16];
        id.copy_from_slice(&hash[..16]);
        Self(id)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0[..4]))
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// "I fetched this chunk from the origin and its digest is this": the node to blame when it was not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Attestation {
    pub digest: ChunkDigest,
    pub attester: NodeId,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(key: &str, etag: &str) -> ContentId {
        ContentId::Object(ObjectVersion {
            bucket: "models".into(),
            key: key.into(),
            etag: ETag(etag.into()),
            size: 1,
        })
    }

    #[test]
    fn keys_differ_where_bytes_may_differ() {
        let base = object("a", "\"1\"").key(8);
        assert_ne!(base, object("a", "\"2\"").key(8));
        assert_ne!(base, object("b", "\"1\"").key(8));
        assert_ne!(base, object("a", "\"1\"").key(4));
        assert_eq!(base, object("a", "\"1\"").key(8));
    }

    #[test]
    fn fields_do_not_run_into_each_other() {
        assert_ne!(object("ab", "c").key(8), object("a", "bc").key(8));
    }
}

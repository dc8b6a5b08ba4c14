//! What a client is told: one JSON object per line.

use serde::{Deserialize, Serialize};

use crate::store::Method;

/// A line of the response. The last one is `done` or `failed`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Everything is listed and pinned, and the destination will do.
    Plan {
        files: u64,
        bytes: u64,
        /// Of these, already in place and whole.
        kept_files: u64,
        kept_bytes: u64,
    },
    /// A few times per second.
    Progress {
        files_done: u64,
        #[serde(flatten)]
        shares: Shares,
    },
    /// A file is in place, whole.
    File {
        path: String,
        bytes: u64,
        method: Method,
        etag: String,
        /// What the whole was compared with and agreed: `crc64nvme`, `sha256 of parts`, `--sha256-file`.
        #[serde(default)]
        verified_by: Vec<String>,
        /// Why it was not compared with a checksum of S3's.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        not_verified_by_s3: Option<String>,
    },
    /// The object was overwritten while it was fetched; its new version is fetched instead.
    Changed { path: String, old_etag: String, new_etag: String, new_bytes: u64 },
    /// A file is not in place.
    FileFailed { path: String, reason: String },
    /// Every file is in place, whole.
    Done(Summary),
    /// At least one file is not in place; running the same command again continues.
    Failed { reason: String },
}

/// Bytes on this node, of the files under way and done, by where the node got them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shares {
    /// In place, or in this node's store, before.
    pub local_bytes: u64,
    pub peer_bytes: u64,
    pub origin_bytes: u64,
}

impl Shares {
    /// Bytes here, wherever they came from.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.local_bytes + self.peer_bytes + self.origin_bytes
    }
}

/// Files by whether their whole was compared with a checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Compared now, and equal.
    pub now_files: u64,
    /// In place, and compared or not when they were placed.
    pub kept_files: u64,
    /// There was nothing to compare with: each chunk came from S3 over TLS or had the digest that its fetcher attested.
    pub by_nothing_files: u64,
}

/// How a fetch went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub files: u64,
    pub bytes: u64,
    pub seconds: f64,
    #[serde(flatten)]
    pub shares: Shares,
    #[serde(default)]
    pub verified: Verified,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_flat_and_tagged() {
        let shares = Shares { local_bytes: 1, peer_bytes: 2, origin_bytes: 3 };
        let event = Event::Progress { files_done: 4, shares };
        let line = serde_json::to_string(&event).unwrap();
        assert_eq!(
            line,
            r#"{"event":"progress","files_done":4,"local_bytes":1,"peer_bytes":2,"origin_bytes":3}"#
        );
        assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
        let done =
            Event::Done(Summary { files: 1, bytes: 6, seconds: 0.5, shares, verified: Verified::default() });
        let line = serde_json::to_string(&done).unwrap();
        assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), done);
    }
}

//! Which buckets may be read, and how S3 is reached.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use url::Url;

use crate::origin::access::Access;
use crate::origin::trust;

/// `[s3]`: the object store. Credentials are not configured here: they come from the AWS default chain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct S3Config {
    /// What may be read: `"bucket"`, `"bucket/prefix"` or `"*"`. A prefix is a plain string prefix as in IAM; end it
    /// with `/` to mean a folder. Empty, the default, means that nothing may be.
    pub buckets: AllowList,
    /// Whose right to read counts: this node's, or each caller's own, which S3 is asked for with a proof that the caller
    /// brings ([`Proof`](super::Proof)). The bytes come with this node's credentials either way.
    pub access: Access,
    /// Another S3 than AWS's, as `https://host[:port]`. Unset: `AWS_ENDPOINT_URL_S3`, then the region's endpoint.
    pub endpoint: Option<Url>,
    /// Region of the buckets. Unset: `AWS_REGION`, the profile, the instance metadata, at last `us-east-1`.
    pub region: Option<String>,
    /// PEM file with certificates to trust beside the system's.
    pub ca_file: Option<PathBuf>,
    /// `https://host/bucket/key` instead of `https://bucket.host/key`, which most S3 stores other than AWS need.
    pub path_style: bool,
    /// Send unsigned requests, for public buckets.
    pub anonymous: bool,
    /// Pay for requests to buckets of others who ask for it (requester pays).
    pub requester_pays: bool,
    /// To connect, milliseconds.
    pub connect_timeout_ms: u64,
    /// From the request to the response's headers, milliseconds. S3's slow tail is a few seconds when a prefix is
    /// being repartitioned.
    pub first_byte_timeout_ms: u64,
    /// Longest pause inside a body, milliseconds. Slow is fine, standing still is not.
    pub stall_timeout_ms: u64,
}

impl Default for S3Config {
    fn default() -> Self {
        Self {
            buckets: AllowList::default(),
            access: Access::Node,
            endpoint: None,
            region: None,
            ca_file: None,
            path_style: false,
            anonymous: false,
            requester_pays: false,
            connect_timeout_ms: 3_000,
            first_byte_timeout_ms: 10_000,
            stall_timeout_ms: 10_000,
        }
    }
}

/// What may be read, of all that the credentials would allow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct AllowList(Vec<Rule>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Rule {
    Everything,
    Prefix { bucket: String, prefix: String },
}

/// `[s3]` cannot be used. The text names the key.
#[derive(Debug, thiserror::Error)]
#[error("cannot use `s3.ca_file` {}: {reason}", path.display())]
pub struct CaError {
    pub(super) path: PathBuf,
    pub(super) reason: String,
}

impl S3Config {
    /// What `ca_file` holds.
    pub(super) fn trusted(&self) -> Result<Option<Vec<u8>>, CaError> {
        let read =
            |path: &PathBuf| trust::read(path).map_err(|reason| CaError { path: path.clone(), reason });
        self.ca_file.as_ref().map(read).transpose()
    }
}

/// An entry of `buckets` that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} names no bucket: write \"bucket\", \"bucket/prefix\" or \"*\", without \"s3://\"")]
pub struct RuleError(String);

impl AllowList {
    /// Whether the object `key` of `bucket` may be read.
    #[must_use]
    pub fn allows(&self, bucket: &str, key: &str) -> bool {
        self.0.iter().any(|rule| match rule {
            Rule::Everything => true,
            Rule::Prefix { bucket: allowed, prefix } => allowed == bucket && key.starts_with(prefix.as_str()),
        })
    }

    /// Whether anything in `bucket` may be read.
    #[must_use]
    pub fn knows(&self, bucket: &str) -> bool {
        self.0.iter().any(|rule| match rule {
            Rule::Everything => true,
            Rule::Prefix { bucket: allowed, .. } => allowed == bucket,
        })
    }
}

impl TryFrom<Vec<String>> for AllowList {
    type Error = RuleError;

    fn try_from(entries: Vec<String>) -> Result<Self, RuleError> {
        entries.into_iter().map(Rule::try_from).collect::<Result<_, _>>().map(Self)
    }
}

impl From<AllowList> for Vec<String> {
    fn from(list: AllowList) -> Self {
        list.0.iter().map(ToString::to_string).collect()
    }
}

impl TryFrom<String> for Rule {
    type Error = RuleError;

    fn try_from(entry: String) -> Result<Self, RuleError> {
        if entry == "*" {
            return Ok(Self::Everything);
        }
        let (bucket, prefix) = entry.split_once('/').unwrap_or((&entry, ""));
        let named = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if bucket.is_empty() || !bucket.chars().all(named) {
            return Err(RuleError(entry));
        }
        Ok(Self::Prefix { bucket: bucket.into(), prefix: prefix.into() })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Everything => f.write_str("*"),
            Self::Prefix { bucket, prefix } if prefix.is_empty() => f.write_str(bucket),
            Self::Prefix { bucket, prefix } => write!(f, "{bucket}/{prefix}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[&str]) -> AllowList {
        AllowList::try_from(entries.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn an_empty_list_allows_nothing() {
        assert!(!AllowList::default().allows("models", "a"));
        assert!(!AllowList::default().knows("models"));
    }

    #[test]
    fn a_prefix_is_a_string_prefix() {
        let allowed = list(&["models", "data/team-a/"]);
        assert!(allowed.allows("models", "anything"));
        assert!(allowed.allows("data", "team-a/x"));
        assert!(!allowed.allows("data", "team-ab/x"));
        assert!(!allowed.allows("data", "team-a"));
        assert!(!allowed.allows("models2", "anything"));
        assert!(allowed.knows("data") && !allowed.knows("dat"));
        assert!(list(&["*"]).allows("any", "thing"));
    }

    #[test]
    fn entries_survive_the_configuration_file() {
        let text = "buckets = [\"models\", \"data/team-a/\", \"*\"]\nendpoint = \"http://127.0.0.1:9000/\"";
        let config: S3Config = toml::from_str(text).unwrap();
        assert_eq!(config.buckets, list(&["models", "data/team-a/", "*"]));
        assert_eq!(Vec::from(config.buckets), ["models", "data/team-a/", "*"]);
    }

    #[test]
    fn a_url_is_not_a_bucket() {
        for wrong in ["s3://models", "", "/models", "a b"] {
            let error = AllowList::try_from(vec![wrong.to_string()]).unwrap_err();
            assert!(error.to_string().contains("without \"s3://\""), "{error}");
        }
    }
}

//! What a client asks for: one JSON object.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Body of `POST /v1/fetch`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FetchRequest {
    /// Objects, or prefixes that end with `/`.
    pub sources: Vec<S3Url>,
    /// Absolute, as the daemon sees it. With a trailing `/`, several sources or a prefix it is a directory.
    pub destination: PathBuf,
    /// Globs over paths relative to the source; `*` also matches `/`. Empty: everything.
    #[serde(default)]
    pub include: Vec<String>,
    /// Globs of what to leave out, whatever `include` says.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Never let a file share its inode with the daemon's store, which makes it read-only: copy where the file
    /// system cannot reflink.
    #[serde(default)]
    pub no_hard_link: bool,
}

/// `s3://bucket/key`. The key is literal: nothing is decoded, and it may be empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct S3Url {
    pub bucket: String,
    pub key: String,
}

/// Not an S3 URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an S3 URL: write s3://bucket/key or s3://bucket/prefix/")]
pub struct UrlError(String);

impl FromStr for S3Url {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let wrong = || UrlError(text.into());
        let rest = text.strip_prefix("s3://").ok_or_else(wrong)?;
        let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
        let named = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if bucket.is_empty() || !bucket.chars().all(named) {
            return Err(wrong());
        }
        Ok(Self { bucket: bucket.into(), key: key.into() })
    }
}

impl TryFrom<String> for S3Url {
    type Error = UrlError;

    fn try_from(text: String) -> Result<Self, UrlError> {
        text.parse()
    }
}

impl From<S3Url> for String {
    fn from(url: S3Url) -> Self {
        url.to_string()
    }
}

impl fmt::Display for S3Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let url: S3Url = "s3://models/llama/70b/".parse().unwrap();
        assert_eq!((url.bucket.as_str(), url.key.as_str()), ("models", "llama/70b/"));
        assert_eq!("s3://models".parse::<S3Url>().unwrap().key, "");
        assert_eq!("s3://models/a%20b?c#d".parse::<S3Url>().unwrap().key, "a%20b?c#d");
        for wrong in ["models/a", "https://models/a", "s3://", "s3:///a", "s3://mo dels/a"] {
            assert!(wrong.parse::<S3Url>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_wire_form_is_plain() {
        let request: FetchRequest =
            serde_json::from_str(r#"{"sources":["s3://models/a/"],"destination":"/models/a"}"#).unwrap();
        assert!(request.include.is_empty() && request.exclude.is_empty());
        let unknown =
            serde_json::from_str::<FetchRequest>(r#"{"sources":[],"destination":"/x","includes":[]}"#);
        assert!(unknown.unwrap_err().to_string().contains("includes"));
    }
}

//! What a client asks for: one JSON object.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::origin::s3::Proof;
use crate::store::Owner;

/// Body of `POST /v1/fetch`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// SHA-256 in hexadecimal of files, by path relative to the destination: they must match.
    #[serde(default)]
    pub sha256: BTreeMap<String, String>,
    /// Where `s3.access = "caller"`: for each object, the caller's proof that it may read it. Nothing else is fetched.
    #[serde(default)]
    pub proofs: BTreeMap<S3Url, Proof>,
    /// Permission bits of the files; 0644 unless given.
    #[serde(default)]
    pub mode: Option<u32>,
    /// Whom the files belong to; the daemon unless given.
    #[serde(default)]
    pub owner: Option<Owner>,
    /// How long the stored copies are not evicted, in seconds from when each is whole.
    #[serde(default)]
    pub pin_for_seconds: Option<u64>,
}

/// `s3://bucket/key` or `s3://bucket/key?versionId=ID`. The key is literal: nothing is decoded, and it may be empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct S3Url {
    pub bucket: String,
    pub key: String,
    /// The version that is meant; of a bucket without versions there is none.
    pub version_id: Option<String>,
}

/// What separates a key from a version.
const VERSION: &str = "?versionId=";

/// A line of a list of sums that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line} is not as `sha256sum` writes it: 64 hexadecimal digits, two spaces and a path")]
pub struct SumsError {
    pub line: usize,
}

/// Reads what `sha256sum` writes: path to hexadecimal digits. A leading `./` is left out; empty lines and comments
/// (`#`) are passed over.
///
/// # Errors
/// On the first line that is something else.
pub fn read_sums(text: &str) -> Result<BTreeMap<String, String>, SumsError> {
    let mut sums = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = SumsError { line: index + 1 };
        let (hex, path) = line.split_once(' ').ok_or_else(|| wrong.clone())?;
        // The second character says how the file was read: a space for text, a star for binary.
        let path = path.strip_prefix([' ', '*']).ok_or_else(|| wrong.clone())?;
        let path = path.strip_prefix("./").unwrap_or(path);
        if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) || path.is_empty() {
            return Err(wrong);
        }
        sums.insert(path.to_owned(), hex.to_owned());
    }
    Ok(sums)
}

/// Not an S3 URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an S3 URL: write s3://bucket/key or s3://bucket/prefix/")]
pub struct UrlError(String);

impl S3Url {
    /// The last part of the key: what the object's file is called.
    #[must_use]
    pub fn name(&self) -> &str {
        self.key.rsplit('/').next().unwrap_or(&self.key)
    }
}

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
        let (key, version_id) = match key.rsplit_once(VERSION) {
            Some((_, "")) => return Err(wrong()),
            Some((key, version_id)) => (key, Some(version_id.into())),
            None => (key, None),
        };
        if key.is_empty() && version_id.is_some() {
            return Err(wrong());
        }
        Ok(Self { bucket: bucket.into(), key: key.into(), version_id })
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
        write!(f, "s3://{}/{}", self.bucket, self.key)?;
        match &self.version_id {
            Some(version_id) => write!(f, "{VERSION}{version_id}"),
            None => Ok(()),
        }
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
        let versioned: S3Url = "s3://models/a?versionId=v.1".parse().unwrap();
        assert_eq!((versioned.key.as_str(), versioned.version_id.as_deref()), ("a", Some("v.1")));
        assert_eq!(versioned.to_string(), "s3://models/a?versionId=v.1");
        for wrong in [
            "s3://models/a?versionId=",
            "s3://models/?versionId=1",
            "models/a",
            "https://models/a",
            "s3://",
            "s3:///a",
            "s3://mo dels/a",
        ] {
            assert!(wrong.parse::<S3Url>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn sums_are_read_as_sha256sum_writes_them() {
        let hex = "a".repeat(64);
        let text = format!("# by hand\n{hex}  ./a\n{hex} *sub/b c\n\n");
        let sums = read_sums(&text).unwrap();
        assert_eq!(sums.keys().collect::<Vec<_>>(), ["a", "sub/b c"]);
        for wrong in ["a", "abc  file", &format!("{hex} file"), &format!("\\{hex}  a"), &format!("{hex}  ")] {
            assert_eq!(read_sums(&format!("\n{wrong}")), Err(SumsError { line: 2 }), "{wrong}");
        }
    }

    #[test]
    fn the_wire_form_is_plain() {
        let request: FetchRequest =
            serde_json::from_str(r#"{"sources":["s3://models/a/"],"destination":"/models/a"}"#).unwrap();
        assert!(request.include.is_empty() && request.exclude.is_empty() && request.proofs.is_empty());
        let proven = r#"{"sources":[],"destination":"/x","proofs":{"s3://models/a":"https://models.s3.amazonaws.com/a"}}"#;
        let request: FetchRequest = serde_json::from_str(proven).unwrap();
        assert_eq!(
            serde_json::from_slice::<FetchRequest>(&serde_json::to_vec(&request).unwrap()).unwrap(),
            request
        );
        let unknown =
            serde_json::from_str::<FetchRequest>(r#"{"sources":[],"destination":"/x","includes":[]}"#);
        assert!(unknown.unwrap_err().to_string().contains("includes"));
    }
}

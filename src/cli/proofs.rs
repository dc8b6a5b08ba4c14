//! `windlass fetch --as-caller`: signs, with this command's own credentials, what shows a daemon that they may read.
//!
//! Invariant: only HEADs are signed, of objects that these credentials could list or see, and no credential leaves this
//! process.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;

use crate::fetch::S3Url;
use crate::origin::s3::{Proof, S3Config, S3Origin};
use crate::origin::{Metrics, OriginError};

/// The daemon judges proofs before it moves the first byte; thousands of them take it some minutes.
const GOOD_FOR: Duration = Duration::from_secs(15 * 60);

/// A proof for each object that `sources` mean.
///
/// # Errors
/// When S3 cannot be asked with this command's credentials, or has nothing there for them.
pub(super) async fn sign(sources: &[S3Url]) -> anyhow::Result<BTreeMap<S3Url, Proof>> {
    let everything = vec!["*".to_owned()].try_into().context("\"*\" stands for every bucket")?;
    let origin = S3Origin::new(S3Config { buckets: everything, ..S3Config::default() }, &Metrics::default())?;
    let mut proofs = BTreeMap::new();
    for source in sources {
        for key in keys(&origin, source).await.context("asking S3 with this command's own credentials")? {
            let object = S3Url { key, ..source.clone() };
            let version_id = object.version_id.as_deref();
            let proof = origin.presign_head(&object.bucket, &object.key, version_id, GOOD_FOR).await?;
            proofs.insert(object, proof);
        }
    }
    Ok(proofs)
}

/// The keys that a source means: itself, or what is below it.
async fn keys(origin: &S3Origin, source: &S3Url) -> Result<Vec<String>, OriginError> {
    let is_fixed = source.version_id.is_some();
    let is_prefix = !is_fixed && (source.key.is_empty() || source.key.ends_with('/'));
    let missing = match is_prefix {
        true => None,
        false => match origin.head(&source.bucket, &source.key, source.version_id.as_deref()).await {
            Ok(_) => return Ok(vec![source.key.clone()]),
            Err(error) if is_fixed => return Err(error),
            // Who may not list gets 403 for a missing key.
            Err(error @ (OriginError::NotFound { .. } | OriginError::Denied { .. })) => Some(error),
            Err(error) => return Err(error),
        },
    };
    let prefix = if is_prefix { source.key.clone() } else { format!("{}/", source.key) };
    let listed = origin.list(&source.bucket, &prefix).await;
    match (listed, missing) {
        (Ok(listed), Some(missing)) if listed.is_empty() => Err(missing),
        (Err(_), Some(missing)) => Err(missing),
        (listed, _) => Ok(listed?.into_iter().map(|listed| listed.version.key).collect()),
    }
}

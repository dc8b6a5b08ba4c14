//! A caller's proof that it may read an object: a HEAD of that object, signed by the caller and sent by us.
//!
//! Invariant: a proof goes only to the host that this node itself would ask for that object, and only if it names that
//! very object and version. This node's own credentials do not go with it.
//! A presigned HEAD is a credential of its own: it is in memory while it is judged, and no `Debug` or message shows it.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use aws_sdk_s3::presigning::PresigningConfig;
use http::StatusCode;
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize};
use url::Url;
use zeroize::Zeroizing;

use super::{LABEL, S3Origin, failure, url_of};
use crate::origin::access::{self, Access, Fingerprints, Proofs};
use crate::origin::aws::chain_of;
use crate::origin::{Kind, OriginError, Outcome};

/// A longer URL is none that an SDK made: keys have at most 1 KiB, session tokens a few.
const PROOF_BYTES_MAX: usize = 16 << 10;

/// How long our own presigned HEAD would be good for; it is only looked at, for where it points.
const LOOKED_AT: Duration = Duration::from_secs(60);

/// The URL of a presigned HEAD (AWS Signature Version 4 in the query), as SDKs make it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Proof(Zeroizing<String>);

/// What was given as a proof is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a proof is the URL of a presigned HEAD request, http:// or https://, of at most {PROOF_BYTES_MAX} bytes"
)]
pub struct ProofError;

impl FromStr for Proof {
    type Err = ProofError;

    fn from_str(text: &str) -> Result<Self, ProofError> {
        let is_web = |url: &Url| matches!(url.scheme(), "http" | "https") && url.has_host();
        let is_bare = |url: &Url| url.username().is_empty() && url.password().is_none();
        let fits = text.len() <= PROOF_BYTES_MAX;
        match Url::parse(text) {
            Ok(url) if fits && is_web(&url) && is_bare(&url) => Ok(Self(Zeroizing::new(text.to_owned()))),
            _ => Err(ProofError),
        }
    }
}

impl TryFrom<String> for Proof {
    type Error = ProofError;

    fn try_from(text: String) -> Result<Self, ProofError> {
        Zeroizing::new(text).parse()
    }
}

impl From<Proof> for String {
    fn from(proof: Proof) -> Self {
        proof.0.to_string()
    }
}

impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proof(..)")
    }
}

/// An object as a caller names it: bucket, key, and the version if one is named.
type Wanted = (String, String, Option<String>);

/// What S3 said of callers' proofs, for the read endpoint and for fetches. Cheap to clone.
#[derive(Clone)]
pub struct S3Callers {
    inner: Arc<Inner>,
}

struct Inner {
    origin: S3Origin,
    /// Made at the first proof.
    client: OnceLock<reqwest::Client>,
    proofs: Proofs<Wanted, ()>,
    fingerprints: Fingerprints,
}

impl S3Callers {
    /// Knows nobody yet.
    #[must_use]
    pub fn new(origin: S3Origin, config: &access::Config, metrics: &access::Metrics) -> Self {
        let proofs = Proofs::new(config, LABEL, metrics);
        let (client, fingerprints) = (OnceLock::new(), Fingerprints::default());
        Self { inner: Arc::new(Inner { origin, client, proofs, fingerprints }) }
    }

    /// Whose right to read counts.
    #[must_use]
    pub fn access(&self) -> Access {
        self.inner.origin.inner.config.access
    }

    /// Whether whoever shows `proof` may read an object: always, where this node's right counts.
    ///
    /// # Errors
    /// [`OriginError::Denied`] without a proof, or with one that is for something else or that S3 does not accept; what
    /// S3 answered otherwise.
    pub async fn admit(
        &self,
        proof: Option<&Proof>,
        bucket: &str,
        key: &str,
        version_id: Option<&str>,
    ) -> Result<(), OriginError> {
        if self.access() == Access::Node {
            return Ok(());
        }
        self.inner.origin.permit(bucket, key)?;
        let Some(proof) = proof else {
            return Err(denied(
                bucket,
                key,
                "a proof is needed here, the URL of a HEAD presigned by the caller",
            ));
        };
        let caller = self.inner.fingerprints.of(&[proof.0.as_bytes()]);
        let wanted = (bucket.to_owned(), key.to_owned(), version_id.map(str::to_owned));
        let judge = || self.inner.judge(proof, bucket, key, version_id);
        self.inner.proofs.get(caller, wanted, None, judge).await
    }
}

impl S3Origin {
    /// The URL of a HEAD of an object, or of one version of it, signed with this process's own credentials and good for
    /// `expires_in`.
    ///
    /// # Errors
    /// [`OriginError::Ours`] when there are no credentials to sign with.
    pub async fn presign_head(
        &self,
        bucket: &str,
        key: &str,
        version_id: Option<&str>,
        expires_in: Duration,
    ) -> Result<Proof, OriginError> {
        let ours = |reason: String| {
            OriginError::Ours(format!("cannot sign a HEAD of {}: {reason}", url_of(bucket, key)))
        };
        let config = PresigningConfig::expires_in(expires_in).map_err(|error| ours(error.to_string()))?;
        let head = self.client().await.head_object().bucket(bucket).key(key);
        let request = head.set_version_id(version_id.map(str::to_owned)).presigned(config).await;
        let request = request.map_err(|error| ours(chain_of(&error)))?;
        request.uri().parse().map_err(|error: ProofError| ours(error.to_string()))
    }
}

impl Inner {
    /// Has S3 say whether `proof` is good for the object.
    async fn judge(
        &self,
        proof: &Proof,
        bucket: &str,
        key: &str,
        version_id: Option<&str>,
    ) -> Result<(), OriginError> {
        let ours = self.origin.presign_head(bucket, key, version_id, LOOKED_AT).await?;
        let (Ok(url), Ok(ours)) = (Url::parse(&proof.0), Url::parse(&ours.0)) else {
            return Err(denied(bucket, key, "the proof is not a URL"));
        };
        if let Err(reason) = check(&url, &ours, bucket, key, version_id) {
            return Err(denied(bucket, key, &reason));
        }
        let answer = self.client()?.head(url).send().await;
        let judged = match answer {
            Ok(answer) => weigh(answer.status(), bucket, key),
            Err(error) => {
                Err(failure::failed(format!("{}: {}", url_of(bucket, key), chain_of(&error.without_url()))))
            }
        };
        self.origin.inner.metrics.request(Kind::Metadata, Outcome::of(&judged));
        judged
    }

    /// Sends proofs: no redirects, for the signature is for one host.
    fn client(&self) -> Result<&reqwest::Client, OriginError> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let config = &self.origin.inner.config;
        let built = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(Duration::from_millis(config.connect_timeout_ms))
            .timeout(Duration::from_millis(config.first_byte_timeout_ms))
            .build();
        let built =
            built.map_err(|error| OriginError::Ours(format!("cannot send proofs: {}", chain_of(&error))))?;
        Ok(self.client.get_or_init(|| built))
    }
}

/// Whether `proof` is for this object at the place that `ours` points to. The error says what is wrong with it.
fn check(proof: &Url, ours: &Url, bucket: &str, key: &str, version_id: Option<&str>) -> Result<(), String> {
    let place = |url: &Url| (url.scheme().to_owned(), url.port_or_known_default());
    let host = proof.host_str().unwrap_or_default();
    let hosts = hosts(ours.host_str().unwrap_or_default(), bucket);
    if place(proof) != place(ours) || !hosts.iter().any(|(ours, _)| ours == host) {
        let wanted = ours.origin().ascii_serialization();
        return Err(format!(
            "the proof is for {}; sign it for {wanted}",
            proof.origin().ascii_serialization()
        ));
    }
    let path = percent_decode_str(proof.path()).decode_utf8_lossy();
    let names = |has_bucket: bool| if has_bucket { format!("/{key}") } else { format!("/{bucket}/{key}") };
    if !hosts.iter().any(|(ours, has_bucket)| ours == host && path == names(*has_bucket)) {
        return Err("the proof is for another object".to_owned());
    }
    let version = proof.query_pairs().find(|(name, _)| name == "versionId").map(|(_, id)| id.into_owned());
    if version.as_deref() != version_id {
        return Err("the proof is for another version of the object".to_owned());
    }
    Ok(())
}

/// The hosts at which an object of `bucket` is found where we find it at `ours`, and whether they name the bucket: with
/// the bucket in front or in the path, and at AWS also without the region, as some SDKs sign for us-east-1.
fn hosts(ours: &str, bucket: &str) -> Vec<(String, bool)> {
    let bare = ours.strip_prefix(&format!("{bucket}.")).unwrap_or(ours);
    let mut bare = vec![bare.to_owned()];
    if bare[0].starts_with("s3.") && bare[0].ends_with(".amazonaws.com") {
        bare.push("s3.amazonaws.com".to_owned());
    }
    bare.into_iter().flat_map(|host| [(format!("{bucket}.{host}"), true), (host, false)]).collect()
}

/// What S3's answer to a proof means. A HEAD's answer has no body, so its status is all there is.
fn weigh(status: StatusCode, bucket: &str, key: &str) -> Result<(), OriginError> {
    let origin = LABEL.to_owned();
    match status.as_u16() {
        200..=299 => Ok(()),
        404 => Err(OriginError::NotFound { origin, what: url_of(bucket, key) }),
        429 | 503 => Err(OriginError::Throttled { origin, retry_after: None }),
        300..=399 => Err(denied(bucket, key, "the proof is signed for a region that the bucket is not in")),
        400..=499 => Err(denied(
            bucket,
            key,
            &format!(
                "S3 does not accept the proof ({status}): it has expired, is not signed for HEAD with the host as \
                      its only header, or its signer may not read the object"
            ),
        )),
        _ => Err(failure::failed(format!("{}: status {status} for a proof", url_of(bucket, key)))),
    }
}

fn denied(bucket: &str, key: &str, reason: &str) -> OriginError {
    OriginError::Denied { origin: LABEL.into(), what: url_of(bucket, key), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "https://models.s3.eu-west-1.amazonaws.com/a%20b/c?X-Amz-Signature=ours";

    fn checked(proof: &str, version_id: Option<&str>) -> Result<(), String> {
        check(&proof.parse().unwrap(), &OURS.parse().unwrap(), "models", "a b/c", version_id)
    }

    #[test]
    fn a_proof_for_the_object_is_sent_wherever_its_bucket_is_spelt() {
        for good in [
            "https://models.s3.eu-west-1.amazonaws.com/a%20b/c?X-Amz-Signature=1",
            "https://models.s3.eu-west-1.amazonaws.com:443/a%20b%2Fc?X-Amz-Signature=1",
            "https://s3.eu-west-1.amazonaws.com/models/a%20b/c?X-Amz-Signature=1",
            "https://models.s3.amazonaws.com/a%20b/c?X-Amz-Signature=1",
            "https://s3.amazonaws.com/models/a%20b/c?X-Amz-Signature=1",
        ] {
            checked(good, None).expect(good);
        }
        let versioned = "https://models.s3.amazonaws.com/a%20b/c?versionId=v%2F1&X-Amz-Signature=1";
        checked(versioned, Some("v/1")).expect("the version that is read");
    }

    #[test]
    fn a_proof_for_anything_else_is_not_sent() {
        for (bad, version_id, reason) in [
            ("http://models.s3.eu-west-1.amazonaws.com/a%20b/c", None, "sign it for https://models.s3"),
            ("https://169.254.169.254/a%20b/c", None, "sign it for"),
            ("https://models.s3.eu-west-1.amazonaws.com:8443/a%20b/c", None, "sign it for"),
            ("https://models.s3.eu-west-1.amazonaws.com.example.com/a%20b/c", None, "sign it for"),
            ("https://other.s3.eu-west-1.amazonaws.com/a%20b/c", None, "sign it for"),
            ("https://models.s3.eu-west-1.amazonaws.com/a%20b/d", None, "another object"),
            ("https://models.s3.eu-west-1.amazonaws.com/models/a%20b/c", None, "another object"),
            ("https://s3.eu-west-1.amazonaws.com/a%20b/c", None, "another object"),
            ("https://s3.eu-west-1.amazonaws.com/other/a%20b/c", None, "another object"),
            ("https://models.s3.amazonaws.com/a%20b/c", Some("v1"), "another version"),
            ("https://models.s3.amazonaws.com/a%20b/c?versionId=v2", Some("v1"), "another version"),
            ("https://models.s3.amazonaws.com/a%20b/c?versionId=v2", None, "another version"),
        ] {
            let said = checked(bad, version_id).expect_err(bad);
            assert!(said.contains(reason), "{bad}: {said}");
        }
    }

    #[test]
    fn a_proof_is_a_url_and_is_not_shown() {
        let proof: Proof = "https://models.s3.amazonaws.com/a?X-Amz-Signature=secret".parse().unwrap();
        assert!(!format!("{proof:?}").contains("secret"));
        let long = format!("https://a/{}", "x".repeat(PROOF_BYTES_MAX));
        for bad in ["", "models/a", "file:///etc/passwd", "https://user:pass@a/b", &long] {
            assert_eq!(bad.parse::<Proof>(), Err(ProofError), "{bad:.40}");
        }
    }

    #[test]
    fn answers_to_a_proof() {
        let outcome = |status: u16| Outcome::of(&weigh(StatusCode::from_u16(status).unwrap(), "b", "k"));
        assert_eq!(
            (outcome(200), outcome(404), outcome(503)),
            (Outcome::Ok, Outcome::NotFound, Outcome::Throttled)
        );
        for status in [301, 400, 401, 403, 412] {
            assert_eq!(outcome(status), Outcome::Denied, "{status}");
        }
        assert_eq!(outcome(500), Outcome::Failed);
    }
}

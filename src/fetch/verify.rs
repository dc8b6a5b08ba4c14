//! Compares what was fetched with what S3, and whoever asked for it, say of the whole.
//!
//! Invariant: a file is placed only when nothing that was compared differed; what could not be compared is said, never
//! passed over. Chunks are summed side by side and their CRCs combined; only SHA-256 walks the object in order.
//! This module refuses to decide what becomes of bytes that differ: `run` has them fetched again, once.

use std::fmt;
use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio_util::task::AbortOnDropHandle;

use super::plan::PlannedFile;
use crate::cache::{Content, ReadError};
use crate::content::{ByteRange, ETag};
use crate::origin::OriginError;
use crate::origin::s3::{Claim, ObjectHead, Part, S3Origin, Sum, SumKind};

/// Stretches of one object summed at a time: reading them waits for the disk, and four keep it busy.
const AT_ONCE: usize = 4;

/// Bytes summed by one reader, a chunk's: small enough to share the work, large enough to be worth a reader.
const STRETCH_BYTES: u64 = crate::content::DEFAULT_CHUNK_BYTES as u64;

/// What the whole of a file was compared with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// Names of what agreed.
    pub(super) by: Vec<String>,
    /// Why nothing that S3 keeps was compared.
    pub(super) not_by_s3: Option<String>,
}

/// Bytes that are not what somebody says they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mismatch {
    object: String,
    /// Number of the part and of all parts.
    part: Option<(u32, u32)>,
    /// Where the bytes are.
    pub(super) range: ByteRange,
    expected: String,
    actual: String,
    /// Whether S3 itself says so, and not a list that the caller brought.
    pub(super) is_s3s: bool,
}

/// Why a file was not found to be right.
#[derive(Debug, thiserror::Error)]
pub(super) enum VerifyError {
    #[error("{0}")]
    Mismatch(Box<Mismatch>),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("a task of the daemon's broke: {0}")]
    Broken(#[from] tokio::task::JoinError),
}

/// What there is to compare one file with.
#[derive(Clone)]
pub(super) struct Expectations {
    origin: S3Origin,
    file: PlannedFile,
    claim: Result<Claim, String>,
    parts: Arc<Vec<Part>>,
}

impl Expectations {
    /// Asks S3 what it keeps of the object. That it does not say is no failure: the file is then not verified by it.
    pub(super) async fn of(origin: &S3Origin, file: &PlannedFile) -> Self {
        let version = &file.version;
        let head = origin.head(&version.bucket, &version.key, file.version_id.as_deref()).await;
        let mut claim = claim_of(file, head);
        let mut parts = Vec::new();
        if let Ok(Claim::Parts { of_sums, count }) = &claim {
            let found = origin.parts(version, file.version_id.as_deref(), of_sums.kind).await;
            match usable(found, *count, version.size) {
                Ok(usable) => parts = usable,
                Err(reason) => claim = Err(reason),
            }
        }
        Self { origin: origin.clone(), file: file.clone(), claim, parts: Arc::new(parts) }
    }

    /// Reads the content, which is whole, and compares.
    pub(super) async fn check(&self, content: &Content) -> Result<Verdict, VerifyError> {
        // Tasks of their own, so that files are summed side by side on the daemon's threads.
        let (this, content) = (self.clone(), content.clone());
        AbortOnDropHandle::new(tokio::spawn(async move { this.compare(&content).await })).await?
    }

    async fn compare(&self, content: &Content) -> Result<Verdict, VerifyError> {
        let mut verdict = Verdict::default();
        match &self.claim {
            Ok(Claim::Whole(expected)) => {
                let actual = sum_of(content, whole(content), expected.kind).await?;
                if let Err(differs) = self.agree(None, whole(content), expected, &actual, true) {
                    return Err(self.narrowed(content, expected.kind).await?.unwrap_or(differs));
                }
                verdict.by.push(expected.kind.name().to_owned());
            }
            Ok(Claim::Parts { of_sums, .. }) => {
                self.compare_parts(content, &self.parts).await?;
                // The parts' sums are themselves what S3 says the object is made of.
                let composite = Sum::of_sums(of_sums.kind, self.parts.iter().map(|part| &part.sum));
                self.agree(None, whole(content), of_sums, &composite, true)?;
                verdict.by.push(format!("{} of parts", of_sums.kind));
            }
            Err(reason) => verdict.not_by_s3 = Some(reason.clone()),
        }
        if let Some(supplied) = &self.file.sha256 {
            let actual = sum_of(content, whole(content), SumKind::Sha256).await?;
            let expected = Sum::from_digest(supplied);
            self.agree(None, whole(content), &expected, &actual, false)?;
            verdict.by.push("--sha256-file".to_owned());
        }
        Ok(verdict)
    }

    async fn compare_parts(&self, content: &Content, parts: &[Part]) -> Result<(), VerifyError> {
        let count = u32::try_from(parts.len()).unwrap_or(u32::MAX);
        for part in parts {
            let actual = sum_of(content, part.range, part.sum.kind).await?;
            self.agree(Some((part.number, count)), part.range, &part.sum, &actual, true)?;
        }
        Ok(())
    }

    /// The part that differs, of an object whose whole does, if S3 keeps the parts' sums too.
    async fn narrowed(&self, content: &Content, kind: SumKind) -> Result<Option<VerifyError>, VerifyError> {
        let found = self.origin.parts(&self.file.version, self.file.version_id.as_deref(), kind).await;
        let parts = found.unwrap_or_default();
        if parts.last().map(|part| part.range.end()) != Some(content.size()) {
            return Ok(None);
        }
        match self.compare_parts(content, &parts).await {
            Err(differs @ VerifyError::Mismatch(_)) => Ok(Some(differs)),
            Err(error) => Err(error),
            Ok(()) => Ok(None),
        }
    }

    fn agree(
        &self,
        part: Option<(u32, u32)>,
        range: ByteRange,
        expected: &Sum,
        actual: &Sum,
        is_s3s: bool,
    ) -> Result<(), VerifyError> {
        if expected == actual {
            return Ok(());
        }
        let version = &self.file.version;
        Err(VerifyError::Mismatch(Box::new(Mismatch {
            object: format!("s3://{}/{}", version.bucket, version.key),
            part,
            range,
            expected: expected.to_string(),
            actual: actual.to_string(),
            is_s3s,
        })))
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { object, part, range, expected, actual, is_s3s } = self;
        if let Some((number, count)) = part {
            write!(f, "part {number} of {count} of ")?;
        }
        write!(f, "{object} (bytes {}-{}) ", range.start(), range.end().saturating_sub(1))?;
        let says = if *is_s3s { "S3 says" } else { "--sha256-file says" };
        write!(f, "is not what it should be: {says} {expected}, the bytes are {actual}")
    }
}

fn whole(content: &Content) -> ByteRange {
    ByteRange::new(0, content.size())
}

/// What S3 says of exactly this version, or why nothing can be compared.
fn claim_of(file: &PlannedFile, head: Result<ObjectHead, OriginError>) -> Result<Claim, String> {
    let head = head.map_err(|error| format!("S3 was not able to say: {error}"))?;
    if head.version.etag != file.version.etag {
        return Err("the object was overwritten since, and S3 speaks of the new one".into());
    }
    match head.checksums.claim() {
        Some(Claim::Whole(_)) if head.checksums.kind.is_none() && is_of_parts(&head.version.etag) => {
            Err("its store does not say whether its checksum is of the whole or of its parts".into())
        }
        Some(claim) => Ok(claim),
        None if head.checksums.sha1.is_some() => Err("S3 keeps only a SHA-1 of it".into()),
        None => Err("S3 keeps no checksum of it".into()),
    }
}

/// Whether an object was uploaded in parts, as far as the usual form of an ETag tells. S3 itself says what a checksum is
/// of; some that are like it do not, and a sum that is of something else is no reason to refuse a file.
fn is_of_parts(etag: &ETag) -> bool {
    let count = etag.0.trim_matches('"').rsplit_once('-').map(|(_, count)| count);
    count.is_some_and(|count| !count.is_empty() && count.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The parts, if they are all of them and make up the object.
fn usable(found: Result<Vec<Part>, OriginError>, count: u32, size: u64) -> Result<Vec<Part>, String> {
    let parts = found.map_err(|error| {
        format!("its checksum is one of parts, which S3 does not tell (s3:GetObjectAttributes): {error}")
    })?;
    let is_all = parts.len() == count as usize && parts.last().map(|part| part.range.end()) == Some(size);
    if is_all { Ok(parts) } else { Err("its checksum is one of parts, and S3 does not tell them all".into()) }
}

/// The sum of `range`: of stretches side by side where sums combine, else in order.
async fn sum_of(content: &Content, range: ByteRange, kind: SumKind) -> Result<Sum, ReadError> {
    if !kind.combines() {
        return stretch(content, range, kind).await;
    }
    let starts = (range.start()..range.end()).step_by(usize::try_from(STRETCH_BYTES).unwrap_or(usize::MAX));
    let sums = stream::iter(starts)
        .map(|start| async move {
            let part = ByteRange::new(start, range.end().min(start + STRETCH_BYTES));
            Ok::<_, ReadError>((stretch(content, part, kind).await?, part.len()))
        })
        .buffered(AT_ONCE);
    let nothing = kind.hasher().finish();
    sums.try_fold(nothing, |before, (next, len)| async move {
        Ok(before.combine(&next, len).expect("CRCs of one kind combine"))
    })
    .await
}

async fn stretch(content: &Content, range: ByteRange, kind: SumKind) -> Result<Sum, ReadError> {
    let mut hasher = kind.hasher();
    let mut bytes = content.read(range);
    while let Some(piece) = bytes.try_next().await? {
        hasher.update(&piece);
    }
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etags_of_parts() {
        for (etag, expected) in [
            ("\"9b2cf535f27731c974343645a3985328-3\"", true),
            ("\"9b2cf535f27731c974343645a3985328\"", false),
            ("\"a-b\"", false),
            ("\"a-\"", false),
            ("", false),
        ] {
            assert_eq!(is_of_parts(&ETag(etag.into())), expected, "{etag}");
        }
    }
}

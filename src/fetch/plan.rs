//! From sources to files: what to fetch, in which version, to which path.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use futures_util::{StreamExt, TryStreamExt, stream};
use globset::{Glob, GlobSet, GlobSetBuilder};

use super::destination::LEDGER;
use super::request::{FetchRequest, S3Url};
use crate::content::{Digest, ObjectVersion};
use crate::origin::OriginError;
use crate::origin::access::Access;
use crate::origin::s3::{MAX_LISTED, ObjectHead, Proof, S3Callers, S3Origin};

/// Proofs that S3 is asked about at a time: a plan of a thousand files waits for some tens of round trips.
const PROOFS_AT_A_TIME: usize = 16;

/// What will be done.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// The directory that every file lies in.
    pub(super) root: PathBuf,
    /// In listing order.
    pub(super) files: Vec<PlannedFile>,
}

/// One object and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PlannedFile {
    pub(super) version: ObjectVersion,
    pub(super) version_id: Option<String>,
    /// The source named the version: no other will do.
    pub(super) is_fixed: bool,
    /// Relative to the root.
    pub(super) path: String,
    /// What the caller says it is.
    pub(super) sha256: Option<Digest>,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub(super) enum PlanError {
    #[error("no source: name at least one s3://bucket/key or s3://bucket/prefix/")]
    NoSource,
    #[error("the destination {} must be an absolute path", .0.display())]
    NotAbsolute(PathBuf),
    #[error("{0:?} is not a glob: {1}")]
    Glob(String, globset::Error),
    #[error(transparent)]
    Origin(#[from] OriginError),
    #[error("nothing under {0}: the prefix does not exist, or is empty")]
    Nothing(S3Url),
    #[error(
        "{0}: this daemon reads in the name of its callers (`s3.access`), and no proof came along; use --as-caller"
    )]
    Unproven(S3Url),
    #[error("none of the {0} objects matches --include and --exclude")]
    NoMatch(usize),
    #[error("the key {key:?} of bucket {bucket} cannot be a path below the destination: {reason}")]
    Escapes { bucket: String, key: String, reason: &'static str },
    #[error("{first} and {second} would both be {path}; fetch them to different destinations")]
    Collision { first: String, second: String, path: String },
    #[error(
        "none of the {0} files that --sha256-file lists is among those to fetch; its paths are relative to the destination"
    )]
    NoSum(usize),
    #[error("--sha256-file: {path}: {hex:?} is not a SHA-256")]
    Sum { path: String, hex: String },
    #[error("more than {MAX_LISTED} objects: name longer prefixes or fetch them one after another")]
    TooMany,
}

impl Plan {
    pub(super) async fn make(
        origin: &S3Origin,
        callers: &S3Callers,
        request: &FetchRequest,
    ) -> Result<Self, PlanError> {
        if request.sources.is_empty() {
            return Err(PlanError::NoSource);
        }
        if !request.destination.is_absolute() {
            return Err(PlanError::NotAbsolute(request.destination.clone()));
        }
        let filter = Filter::new(&request.include, &request.exclude)?;
        let mut found = Vec::new();
        for source in &request.sources {
            found.push(match callers.access() {
                Access::Node => Found::at(origin, source).await?,
                Access::Caller => Found::proven(origin, callers, source, &request.proofs).await?,
            });
        }
        let (root, mut files) = lay_out(found, &request.destination)?;
        if files.len() > MAX_LISTED {
            return Err(PlanError::TooMany);
        }
        let all = files.len();
        files.retain(|file| filter.keeps(&file.path));
        if files.is_empty() {
            return Err(PlanError::NoMatch(all));
        }
        check_collisions(&files)?;
        expect(&mut files, &request.sha256)?;
        Ok(Self { root, files })
    }
}

/// Notes what the caller says of the files. What it lists beside them is none of this fetch's business.
fn expect(files: &mut [PlannedFile], sums: &BTreeMap<String, String>) -> Result<(), PlanError> {
    let mut known = 0;
    for file in files {
        let Some(hex) = sums.get(&file.path) else { continue };
        let digest = format!("sha256:{}", hex.to_ascii_lowercase()).parse();
        let wrong = |_| PlanError::Sum { path: file.path.clone(), hex: hex.clone() };
        file.sha256 = Some(digest.map_err(wrong)?);
        known += 1;
    }
    if known == 0 && !sums.is_empty() { Err(PlanError::NoSum(sums.len())) } else { Ok(()) }
}

/// What a source turned out to be.
enum Found {
    Object(PlannedFile),
    Prefix(Vec<PlannedFile>),
}

impl Found {
    async fn at(origin: &S3Origin, source: &S3Url) -> Result<Self, PlanError> {
        let is_fixed = source.version_id.is_some();
        if !is_fixed && (source.key.is_empty() || source.key.ends_with('/')) {
            let files = list(origin, source, &source.key).await?;
            return if files.is_empty() {
                Err(PlanError::Nothing(source.clone()))
            } else {
                Ok(Self::Prefix(files))
            };
        }
        let missing = match origin.head(&source.bucket, &source.key, source.version_id.as_deref()).await {
            Ok(head) => return Ok(Self::Object(pinned(source, head, source.name())?)),
            Err(error) if is_fixed => return Err(error.into()),
            // Who may not list gets 403 for a missing key.
            Err(error @ (OriginError::NotFound { .. } | OriginError::Denied { .. })) => error,
            Err(error) => return Err(error.into()),
        };
        // `s3://bucket/model` for `s3://bucket/model/`: what everyone types at first.
        match list(origin, source, &format!("{}/", source.key)).await {
            Ok(files) if !files.is_empty() => Ok(Self::Prefix(files)),
            Ok(_) | Err(PlanError::Origin(_)) => Err(missing.into()),
            Err(error) => Err(error),
        }
    }

    /// What of `source` the caller proves that it may read. Nothing else is looked for, so that no message names what the
    /// caller may not know of.
    async fn proven(
        origin: &S3Origin,
        callers: &S3Callers,
        source: &S3Url,
        proofs: &BTreeMap<S3Url, Proof>,
    ) -> Result<Self, PlanError> {
        if let Some(proof) = proofs.get(source) {
            return Ok(Self::Object(prove(origin, callers, source, proof, source.name()).await?));
        }
        if source.version_id.is_some() {
            return Err(PlanError::Unproven(source.clone()));
        }
        let is_prefix = source.key.is_empty() || source.key.ends_with('/');
        let prefix = if is_prefix { source.key.clone() } else { format!("{}/", source.key) };
        let below = proofs.iter().filter_map(|(url, proof)| {
            let is_of_it = url.bucket == source.bucket && url.version_id.is_none();
            let path = url.key.strip_prefix(&prefix).filter(|_| is_of_it)?;
            (!path.is_empty() && !path.ends_with('/')).then_some((url, proof, path))
        });
        // Owned by their futures, which the daemon's runtime moves between threads.
        let below = below.map(|(url, proof, path)| (url.clone(), proof.clone(), path.to_owned()));
        let files: Vec<_> = below
            .map(|(url, proof, path)| async move { prove(origin, callers, &url, &proof, &path).await })
            .collect();
        let files: Vec<_> = stream::iter(files).buffered(PROOFS_AT_A_TIME).try_collect().await?;
        if files.is_empty() { Err(PlanError::Unproven(source.clone())) } else { Ok(Self::Prefix(files)) }
    }
}

/// Pins the object at `url` once the caller's proof for it has been judged.
async fn prove(
    origin: &S3Origin,
    callers: &S3Callers,
    url: &S3Url,
    proof: &Proof,
    path: &str,
) -> Result<PlannedFile, PlanError> {
    let version_id = url.version_id.as_deref();
    callers.admit(Some(proof), &url.bucket, &url.key, version_id).await?;
    pinned(url, origin.head(&url.bucket, &url.key, version_id).await?, path)
}

/// The object at `url`, of which S3 told `head`, as a file at `path`.
fn pinned(url: &S3Url, head: ObjectHead, path: &str) -> Result<PlannedFile, PlanError> {
    check_path(&head.version, path)?;
    let (version, path) = (head.version, path.to_owned());
    let version_id = url.version_id.clone().or(head.version_id);
    Ok(PlannedFile { version, version_id, is_fixed: url.version_id.is_some(), path, sha256: None })
}

async fn list(origin: &S3Origin, source: &S3Url, prefix: &str) -> Result<Vec<PlannedFile>, PlanError> {
    let mut files = Vec::new();
    for listed in origin.list(&source.bucket, prefix).await? {
        let path = listed.version.key[prefix.len()..].to_owned();
        // A directory marker: consoles create them, and no file can have that name.
        if path.is_empty() || path.ends_with('/') {
            continue;
        }
        check_path(&listed.version, &path)?;
        let version = listed.version;
        files.push(PlannedFile { version, version_id: None, is_fixed: false, path, sha256: None });
    }
    Ok(files)
}

/// Whether `path` stays below whatever it is joined to.
fn check_path(version: &ObjectVersion, path: &str) -> Result<(), PlanError> {
    let reason = if path.contains('\0') {
        "it contains a NUL byte"
    } else if path.starts_with('/') || path.contains("//") {
        "it has an empty component"
    } else if path.split('/').any(|part| part == "." || part == "..") {
        "it has a component . or .."
    } else if path.split('/').any(|part| part.len() > 255) {
        "it has a component of more than 255 bytes"
    } else if path == LEDGER {
        "windlass keeps its own records under that name"
    } else {
        return Ok(());
    };
    Err(PlanError::Escapes { bucket: version.bucket.clone(), key: version.key.clone(), reason })
}

/// The root directory, and the files with their paths in it.
fn lay_out(mut found: Vec<Found>, destination: &Path) -> Result<(PathBuf, Vec<PlannedFile>), PlanError> {
    let is_one = matches!(found.as_slice(), [Found::Object(_)]);
    if is_one
        && !is_directory(destination)
        && let (Some(root), Some(name)) = (destination.parent(), destination.file_name())
        && let Some(name) = name.to_str()
        && let Some(Found::Object(file)) = found.pop()
    {
        check_path(&file.version, name)?;
        return Ok((root.to_owned(), vec![PlannedFile { path: name.to_owned(), ..file }]));
    }
    let files = found.into_iter().flat_map(|found| match found {
        Found::Object(file) => vec![file],
        Found::Prefix(files) => files,
    });
    Ok((destination.to_owned(), files.collect()))
}

fn is_directory(destination: &Path) -> bool {
    destination.as_os_str().as_encoded_bytes().ends_with(b"/") || destination.is_dir()
}

/// Two objects with one path, or a file where another needs a directory.
fn check_collisions(files: &[PlannedFile]) -> Result<(), PlanError> {
    let name = |file: &PlannedFile| format!("s3://{}/{}", file.version.bucket, file.version.key);
    let mut taken: BTreeMap<&str, &PlannedFile> = BTreeMap::new();
    for file in files {
        if let Some(first) = taken.insert(&file.path, file) {
            let path = file.path.clone();
            return Err(PlanError::Collision { first: name(first), second: name(file), path });
        }
    }
    for file in files {
        for (end, _) in file.path.match_indices('/') {
            if let Some(first) = taken.get(&file.path[..end]) {
                let path = format!("{} and a directory", &file.path[..end]);
                return Err(PlanError::Collision { first: name(first), second: name(file), path });
            }
        }
    }
    Ok(())
}

struct Filter {
    include: Option<GlobSet>,
    exclude: GlobSet,
}

impl Filter {
    fn new(include: &[String], exclude: &[String]) -> Result<Self, PlanError> {
        let include = if include.is_empty() { None } else { Some(globs(include)?) };
        Ok(Self { include, exclude: globs(exclude)? })
    }

    fn keeps(&self, path: &str) -> bool {
        self.include.as_ref().is_none_or(|set| set.is_match(path)) && !self.exclude.is_match(path)
    }
}

fn globs(patterns: &[String]) -> Result<GlobSet, PlanError> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        set.add(Glob::new(pattern).map_err(|error| PlanError::Glob(pattern.clone(), error))?);
    }
    set.build().map_err(|error| PlanError::Glob(patterns.join(" "), error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::origin::s3::stub::Stub;

    fn request(sources: &[&str], destination: &str) -> FetchRequest {
        FetchRequest {
            sources: sources.iter().map(|url| url.parse().unwrap()).collect(),
            destination: destination.into(),
            ..FetchRequest::default()
        }
    }

    async fn bucket(keys: &[&str]) -> Stub {
        let stub = Stub::start().await;
        for key in keys {
            stub.put("models", key, key.as_bytes().to_vec().into());
        }
        stub
    }

    async fn paths(stub: &Stub, request: &FetchRequest) -> Result<(PathBuf, Vec<String>), PlanError> {
        let (origin, metrics) = (stub.origin(), crate::origin::access::Metrics::default());
        let callers = S3Callers::new(origin.clone(), &crate::origin::access::Config::default(), &metrics);
        let plan = Plan::make(&origin, &callers, request).await?;
        Ok((plan.root, plan.files.into_iter().map(|file| file.path).collect()))
    }

    #[tokio::test]
    async fn a_prefix_keeps_its_tree_and_needs_no_slash() {
        let stub = bucket(&["m/", "m/a", "m/sub/", "m/sub/b", "m/sub/c", "mother"]).await;
        for source in ["s3://models/m/", "s3://models/m"] {
            let (root, files) = paths(&stub, &request(&[source], "/no/such/dir")).await.unwrap();
            assert_eq!(root, Path::new("/no/such/dir"));
            assert_eq!(files, ["a", "sub/b", "sub/c"], "{source}");
        }
    }

    #[tokio::test]
    async fn one_object_goes_to_a_file_or_into_a_directory() {
        let stub = bucket(&["m/a"]).await;
        let of = async |destination| paths(&stub, &request(&["s3://models/m/a"], destination)).await.unwrap();
        assert_eq!(of("/no/such/file").await, ("/no/such".into(), vec!["file".to_owned()]));
        assert_eq!(of("/no/such/dir/").await, ("/no/such/dir/".into(), vec!["a".to_owned()]));
        assert_eq!(of("/tmp").await, ("/tmp".into(), vec!["a".to_owned()]));
    }

    #[tokio::test]
    async fn globs_cross_slashes_and_exclusion_wins() {
        let stub = bucket(&["m/a.bin", "m/b.json", "m/sub/c.bin", "m/sub/d.json"]).await;
        let mut request = request(&["s3://models/m/"], "/x");
        request.include = vec!["*.bin".into(), "b.*".into()];
        request.exclude = vec!["sub/*".into()];
        assert_eq!(paths(&stub, &request).await.unwrap().1, ["a.bin", "b.json"]);
        request.include = vec!["nothing".into()];
        assert!(paths(&stub, &request).await.unwrap_err().to_string().contains("--include"));
        request.include = vec!["[".into()];
        assert!(matches!(paths(&stub, &request).await.unwrap_err(), PlanError::Glob(..)));
    }

    #[tokio::test]
    async fn what_would_leave_the_destination_is_refused_before_anything_moves() {
        for key in ["m/../../etc/passwd", "m/a/./b", "m//etc/passwd", "m/a/../b"] {
            let stub = bucket(&["m/fine", key]).await;
            let error = paths(&stub, &request(&["s3://models/m/"], "/x")).await.unwrap_err();
            assert!(matches!(error, PlanError::Escapes { .. }), "{key}: {error}");
        }
    }

    #[tokio::test]
    async fn two_sources_must_not_meet() {
        let stub = bucket(&["m/a", "n/a", "o/b", "p/b/c"]).await;
        let error = paths(&stub, &request(&["s3://models/m/", "s3://models/n/a"], "/x")).await.unwrap_err();
        assert!(error.to_string().contains("s3://models/m/a and s3://models/n/a"), "{error}");
        let error = paths(&stub, &request(&["s3://models/o/", "s3://models/p/"], "/x")).await.unwrap_err();
        assert!(error.to_string().contains("b and a directory"), "{error}");
        let both = request(&["s3://models/m/a", "s3://models/o/b"], "/x");
        assert_eq!(paths(&stub, &both).await.unwrap(), ("/x".into(), vec!["a".to_owned(), "b".to_owned()]));
    }

    #[tokio::test]
    async fn what_is_not_there_is_named() {
        let stub = bucket(&["m/a"]).await;
        let of = async |source| paths(&stub, &request(&[source], "/x")).await.unwrap_err().to_string();
        assert_eq!(of("s3://models/nope").await, "s3://models/nope does not exist at s3");
        assert!(of("s3://models/nope/").await.contains("nothing under s3://models/nope/"));
        assert!(of("s3://secret/a").await.contains("allow-list"));
    }
}

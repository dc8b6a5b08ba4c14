//! The daemon, its disk, its origins and its clock.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use bytesize::ByteSize;
use url::Url;

use super::Scene;
use super::finding::Finding;
use crate::cli::mirror;
use crate::config::{self, Config};
use crate::http::admin::view::Stats;
use crate::http::canary;
use crate::oci::{Reference, RepositoryName, Tag};
use crate::origin::registry::{RegistryConfig, RegistryOrigin};
use crate::origin::s3::{PageRequest, S3Origin};
use crate::origin::{self, OriginError};

const CONFIGURATION: &str = "configuration";
const DAEMON: &str = "daemon";
const LISTENER: &str = "mirror";
const DISK: &str = "disk";
const REFLINK: &str = "reflink";
const ALLOWED: &str = "allow-list";
const REGISTRY: &str = "registry";
const S3: &str = "s3";
const CLOCK: &str = "clock";

/// A clock that is further off than this is not set by anybody. Certificates bear days, S3's signatures 15 minutes.
const SKEW_WARNED: Duration = Duration::from_secs(30);
const SKEW_REFUSED: Duration = Duration::from_secs(10 * 60);

/// Longest wait for an origin. Their own deadlines are shorter, and are kept three times.
const ORIGIN_DEADLINE: Duration = Duration::from_secs(30);

/// Runs the checks of this file.
pub(super) async fn check(scene: &Scene) -> Vec<Finding> {
    let mut findings = vec![check_configuration(scene)];
    findings.extend(check_daemon(scene).await);
    findings.extend(check_disk(&scene.config));
    findings.extend(allow_lists(&scene.config));
    findings.extend(check_registries(&scene.config).await);
    findings.extend(check_buckets(&scene.config).await);
    findings.push(check_clock(&scene.config).await);
    findings
}

fn check_configuration(scene: &Scene) -> Finding {
    match Config::load(scene.config_path.as_deref(), config::process_environment()) {
        Ok(_) => Finding::pass(CONFIGURATION, "read and consistent"),
        Err(error) => {
            let cure = "correct what it names; `windlass serve --check` says whether it is right";
            Finding::fail(CONFIGURATION, error.to_string(), "the daemon does not start with it", cure)
        }
    }
}

async fn check_daemon(scene: &Scene) -> Vec<Finding> {
    let stats: Result<Stats, _> = scene.daemon.get("/v1/stats").await;
    let daemon = match stats {
        Ok(stats) if stats.ready => {
            Finding::pass(DAEMON, format!("{} runs, version {}", stats.node, stats.version))
        }
        Ok(stats) => Finding::fail(
            DAEMON,
            format!("{} is not ready: it waits for {}", stats.node, stats.waiting_for.join(", ")),
            "until then it serves nobody",
            "wait a moment and run this again; its log says what takes so long",
        ),
        Err(error) => Finding::fail(
            DAEMON,
            error.to_string(),
            "without it this node pulls everything from the registry",
            "start `windlass serve`; in Kubernetes: kubectl -n windlass get pods -o wide, and kubectl logs of this node's",
        ),
    };
    let listener = match mirror::ask(&scene.mirror).await {
        Ok(()) => Finding::pass(LISTENER, format!("answers at {}", scene.mirror.url())),
        Err(why) => Finding::fail(
            LISTENER,
            why,
            "containerd goes to the registry itself",
            format!(
                "let `registry.listen` be {}, and the daemon run in the node's network (hostNetwork)",
                scene.mirror.url()
            ),
        ),
    };
    vec![daemon, listener]
}

fn check_disk(config: &Config) -> Vec<Finding> {
    let store = &config.store;
    let directory = nearest_existing(&store.data_dir);
    let room = match rustix::fs::statvfs(directory) {
        Ok(found) => found,
        Err(error) => return vec![Finding::skip(DISK, format!("{}: {error}", store.data_dir.display()))],
    };
    let free = room.f_bavail * room.f_frsize;
    let held = held_bytes(&store.data_dir);
    let room = judge_room(&store.data_dir, free, held, store.budget.as_u64(), store.free_floor.as_u64());
    vec![room, check_reflink(&store.data_dir)]
}

fn nearest_existing(path: &Path) -> &Path {
    path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or_else(|| Path::new("/"))
}

/// Bytes on disk below `directory`, as far as they can be read.
fn held_bytes(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut left = vec![directory.to_owned()];
    let mut bytes = 0;
    while let Some(path) = left.pop() {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(found) if found.is_dir() => left.push(entry.path()),
                // Blocks of 512 bytes, whatever the file system's are (stat(2)): the files are sparse.
                Ok(found) => bytes += found.blocks() * 512,
                Err(_) => {}
            }
        }
    }
    bytes
}

fn judge_room(directory: &Path, free: u64, held: u64, budget: u64, floor: u64) -> Finding {
    let size = |bytes| ByteSize::b(bytes).display().iec().to_string();
    let shown = directory.display();
    let usable = (free + held).saturating_sub(floor);
    if free < floor {
        return Finding::fail(
            DISK,
            format!("{shown} has {} free, below store.free_floor of {}", size(free), size(floor)),
            "nothing new is cached: every byte comes from peers or the origin again",
            "free room on that file system, or put store.data_dir on a larger one (with Karpenter: \
             instanceStorePolicy: RAID0, or a larger blockDeviceMappings volume)",
        );
    }
    if usable < budget {
        return Finding::warn(
            DISK,
            format!("{shown} can hold {}, and store.budget is {}", size(usable), size(budget)),
            "others on that file system decide how much is cached, by the free floor",
            format!("store.budget = \"{}\"", size(usable)),
        );
    }
    Finding::pass(
        DISK,
        format!("{shown}: {} free, {} cached, budget {}", size(free), size(held), size(budget)),
    )
}

/// Tries it, for no name of a file system says it: XFS may be made without.
fn check_reflink(directory: &Path) -> Finding {
    let try_it = || -> std::io::Result<bool> {
        let source = tempfile_in(directory)?;
        let target = tempfile_in(directory)?;
        Ok(rustix::fs::ioctl_ficlone(&target, &source).is_ok())
    };
    match try_it() {
        Ok(true) => Finding::pass(REFLINK, "the file system shares blocks between files"),
        Ok(false) => Finding::warn(
            REFLINK,
            format!("the file system of {} does not share blocks between files", directory.display()),
            "what `windlass fetch` places is a hard link, which is read-only, or a second copy",
            "use XFS (mkfs.xfs -m reflink=1, the default since xfsprogs 5.1) or btrfs for store.data_dir",
        ),
        Err(error) => Finding::skip(REFLINK, format!("cannot write to {}: {error}", directory.display())),
    }
}

/// A file without a name: gone when it is closed.
fn tempfile_in(directory: &Path) -> std::io::Result<fs::File> {
    use rustix::fs::{Mode, OFlags, open};
    let file = open(directory, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?;
    Ok(fs::File::from(file))
}

fn allow_lists(config: &Config) -> Vec<Finding> {
    let origins = &config.registry.origins;
    let registries = if origins.is_empty() {
        Finding::warn(
            ALLOWED,
            "registry.origins is empty",
            "no image is mirrored",
            "[[registry.origins]]\nname = \"123456789012.dkr.ecr.eu-west-1.amazonaws.com\"",
        )
    } else {
        let names: Vec<_> = origins.iter().map(|origin| origin.name.as_str()).collect();
        Finding::pass(ALLOWED, format!("registries: {}", names.join(", ")))
    };
    let buckets: Vec<String> = bucket_rules(config);
    let s3 = if buckets.is_empty() {
        Finding::skip(ALLOWED, "s3.buckets is empty: no object may be read")
    } else {
        Finding::pass(ALLOWED, format!("buckets: {}", buckets.join(", ")))
    };
    vec![registries, s3]
}

/// The rules of `s3.buckets` as they are written.
fn bucket_rules(config: &Config) -> Vec<String> {
    let written = toml::Table::try_from(&config.s3).ok();
    let rules = written.as_ref().and_then(|s3| s3.get("buckets")?.as_array());
    rules.into_iter().flatten().filter_map(|rule| rule.as_str().map(str::to_owned)).collect()
}

async fn check_registries(config: &Config) -> Vec<Finding> {
    let origins = config.registry.origins.clone();
    let registries = match RegistryOrigin::new(origins, &origin::Metrics::default()) {
        Ok(registries) => registries,
        Err(error) => {
            let cure = "correct `registry.origins`";
            return vec![Finding::fail(
                REGISTRY,
                error.to_string(),
                "the daemon does not start with it",
                cure,
            )];
        }
    };
    let mut findings = Vec::new();
    for name in registries.names() {
        let Some(registry) = registries.get(name) else { continue };
        let repository = format!("{}/{}", canary::REPOSITORY, "doctor");
        let (Ok(repository), Ok(tag)) = (repository.parse::<RepositoryName>(), "check".parse::<Tag>()) else {
            continue;
        };
        let asked =
            tokio::time::timeout(ORIGIN_DEADLINE, registry.resolve(&repository, &Reference::Tag(tag), None))
                .await;
        findings.push(judge_registry(name, asked.ok().map(|answer| answer.map(drop))));
    }
    findings
}

/// Nobody has the image that was asked for, so a registry that says so lets us in.
fn judge_registry(name: &str, asked: Option<Result<(), OriginError>>) -> Finding {
    let why = "this node cannot fetch from it, and no peer can for this node";
    match asked {
        Some(Ok(()) | Err(OriginError::NotFound { .. })) => {
            Finding::pass(REGISTRY, format!("{name} answers, and takes the credential"))
        }
        Some(Err(error @ OriginError::Denied { .. })) => Finding::warn(
            REGISTRY,
            error.to_string(),
            "Docker Hub and Harbor say so of a repository that does not exist, too; if they say it of yours, nothing \
             is fetched",
            "username and password_file, or docker_config, in its [[registry.origins]] table; on EKS a role with \
             ecr:GetAuthorizationToken, ecr:BatchGetImage and ecr:GetDownloadUrlForLayer",
        ),
        Some(Err(error)) => Finding::fail(
            REGISTRY,
            error.to_string(),
            why,
            "let this node reach it: route, security group, egress rules of the NetworkPolicy, proxy, and `ca_file` for \
             a private authority",
        ),
        None => Finding::fail(
            REGISTRY,
            format!("{name} does not answer within {} s", ORIGIN_DEADLINE.as_secs()),
            why,
            "let this node reach it: route, security group, egress rules of the NetworkPolicy",
        ),
    }
}

async fn check_buckets(config: &Config) -> Vec<Finding> {
    let rules = bucket_rules(config);
    let s3 = match S3Origin::new(config.s3.clone(), &origin::Metrics::default()) {
        Ok(s3) => s3,
        Err(error) => {
            let cure = "name a PEM file with certificates, or leave the key out";
            return vec![Finding::fail(S3, "the object store cannot be asked", error.to_string(), cure)];
        }
    };
    let mut findings = Vec::new();
    for rule in rules {
        if rule == "*" {
            findings
                .push(Finding::skip(S3, "s3.buckets allows all: no bucket is named that could be asked for"));
            continue;
        }
        let (bucket, prefix) = rule.split_once('/').unwrap_or((&rule, ""));
        let page = PageRequest { prefix: prefix.to_owned(), max_keys: Some(1), ..PageRequest::default() };
        let asked = tokio::time::timeout(ORIGIN_DEADLINE, s3.list_page(bucket, &page)).await;
        findings.push(judge_bucket(&rule, asked.ok().map(|answer| answer.map(drop))));
    }
    findings
}

fn judge_bucket(rule: &str, asked: Option<Result<(), OriginError>>) -> Finding {
    let error = match asked {
        Some(Ok(())) => return Finding::pass(S3, format!("s3://{rule} can be listed")),
        Some(Err(error)) => error.to_string(),
        None => format!("s3://{rule}: no answer within {} s", ORIGIN_DEADLINE.as_secs()),
    };
    Finding::fail(
        S3,
        error,
        "`windlass fetch` and the S3 endpoint cannot read it",
        format!(
            "allow the daemon's role s3:ListBucket on the bucket and s3:GetObject on arn:aws:s3:::{rule}*, and \
             kms:Decrypt on its key; check that it gets the role: IRSA or Pod Identity on the service account"
        ),
    )
}

/// Compares with what the registries' answers are dated.
async fn check_clock(config: &Config) -> Finding {
    for origin in &config.registry.origins {
        if let Some((date, asked)) = date_of(origin).await {
            let skew = date.duration_since(asked).unwrap_or_else(|behind| behind.duration());
            return judge_clock(&origin.name, skew);
        }
    }
    Finding::skip(CLOCK, "no registry says what time it is")
}

/// The `Date` of its answer and the middle of the time that it took.
async fn date_of(origin: &RegistryConfig) -> Option<(SystemTime, SystemTime)> {
    let url: Url = origin.endpoint_url().ok()?.join("/v2/").ok()?;
    let mut client = reqwest::Client::builder().timeout(ORIGIN_DEADLINE);
    if let Some(file) = &origin.ca_file {
        let pem = fs::read(file).ok()?;
        client = client.tls_certs_merge(reqwest::Certificate::from_pem_bundle(&pem).ok()?);
    }
    let began = SystemTime::now();
    let answer = client.build().ok()?.get(url).send().await.ok()?;
    let middle = began + began.elapsed().unwrap_or_default() / 2;
    let date = answer.headers().get(http::header::DATE)?.to_str().ok()?;
    Some((httpdate::parse_http_date(date).ok()?, middle))
}

fn judge_clock(name: &str, skew: Duration) -> Finding {
    let what = format!("{} s off the clock of {name}", skew.as_secs());
    let cure =
        "start chronyd (on EC2 it takes the time from 169.254.169.123): systemctl enable --now chronyd";
    if skew >= SKEW_REFUSED {
        let why = "S3 and ECR refuse signatures that are a quarter of an hour off, and peers certificates that are not \
                   valid yet or any more";
        return Finding::fail(CLOCK, what, why, cure);
    }
    if skew >= SKEW_WARNED {
        return Finding::warn(CLOCK, what, "nobody sets this clock, and it drifts on", cure);
    }
    Finding::pass(CLOCK, what)
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict::{Fail, Pass, Warn};
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn room_is_judged_by_what_the_cache_may_use() {
        let judged = |free, held| judge_room(Path::new("/d"), free, held, 100 * GIB, 5 * GIB);
        assert_eq!(judged(200 * GIB, 0).verdict, Pass);
        assert_eq!(judged(20 * GIB, 90 * GIB).verdict, Pass, "what is cached already counts");
        let small = judged(50 * GIB, 0);
        assert!(small.verdict == Warn && small.cure.contains("45.0 GiB"), "{small:?}");
        assert_eq!(judged(4 * GIB, 90 * GIB).verdict, Fail);
    }

    #[test]
    fn a_missing_image_is_a_registry_that_lets_us_in() {
        let missing = OriginError::NotFound { origin: "r".into(), what: "x".into() };
        assert_eq!(judge_registry("r", Some(Err(missing))).verdict, Pass);
        let denied = OriginError::Denied { origin: "r".into(), what: "x".into(), reason: "no".into() };
        assert_eq!(judge_registry("r", Some(Err(denied))).verdict, Warn);
        let failed = OriginError::Failed { origin: "r".into(), reason: "refused".into() };
        assert_eq!(judge_registry("r", Some(Err(failed))).verdict, Fail);
        assert_eq!(judge_registry("r", None).verdict, Fail);
    }

    #[test]
    fn a_clock_may_be_a_little_off() {
        assert_eq!(judge_clock("r", Duration::from_secs(2)).verdict, Pass);
        assert_eq!(judge_clock("r", Duration::from_secs(60)).verdict, Warn);
        assert_eq!(judge_clock("r", Duration::from_secs(3600)).verdict, Fail);
    }

    #[test]
    fn bucket_rules_are_shown_as_they_are_written() {
        let text = "[s3]\nbuckets = [\"models/released/\", \"*\"]\n";
        let config = Config::parse(text, Path::new("w.toml"), []).expect("right");
        assert_eq!(bucket_rules(&config), ["models/released/", "*"]);
    }
}

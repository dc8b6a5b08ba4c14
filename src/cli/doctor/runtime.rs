//! Whether this node's containerd asks the mirror: its version, its configuration, its `hosts.toml` files, and a canary.

use std::fs;
use std::path::Path;

use super::Scene;
use super::finding::Finding;
use crate::cli::canary::{Arrival, Canary};
use crate::containerd::config::{self, ReadError, Settings};
use crate::containerd::hosts::{FILE_NAME, Hosts};
use crate::containerd::roots::{Found, Roots};
use crate::containerd::socket::{CallError, Socket};

const CONTAINERD: &str = "containerd";
const CONFIG: &str = "containerd-config";
const SNAPSHOTTER: &str = "snapshotter";
const HOSTS: &str = "hosts.toml";
const CANARY: &str = "canary";

/// What containerd 2.2 takes for `config_path` when nothing is written.
const DEFAULT_CONFIG_PATH: &str = "/etc/containerd/certs.d:/etc/docker/certs.d";

/// Major and minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

impl Version {
    /// From `1.6.20~ds1` or `v2.2.4`.
    fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.trim_start_matches('v').split(['.', '~', '-', '+']);
        Some(Self(numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }
}

/// The first that pulls the kubelet's images through the transfer service, which takes a `config_path` with colons for
/// one directory (containerd issues 12415 and 12808).
const TRANSFER_PULLS: Version = Version(2, 1);

/// The first with a `config_path` that nobody wrote.
const HAS_DEFAULT_PATH: Version = Version(2, 2);

/// The oldest that reads `config_path`, and that this program was tried with.
const OLDEST: Version = Version(1, 6);

/// Runs the checks of this file.
pub(super) async fn check(scene: &Scene) -> Vec<Finding> {
    let socket = Socket::new(scene.containerd_socket.clone());
    let version = socket.version().await;
    let known = version.as_deref().ok().and_then(Version::parse);
    let mut findings = vec![judge_version(&version)];
    let settings = config::read(&scene.host_root, &scene.containerd_config);
    match &settings {
        Err(error) if error.is_missing() && version.is_err() => {
            findings.push(Finding::skip(CONFIG, format!("{error}: there seems to be no containerd here")));
        }
        _ => findings.extend(judge_config(&settings, known)),
    }
    findings.push(judge_snapshotter(settings.as_ref().ok()));
    let roots = effective_roots(settings.as_ref().ok(), known);
    findings.extend(check_hosts(scene, &roots));
    findings.extend(check_canaries(scene, &socket).await);
    findings
}

fn judge_version(version: &Result<String, CallError>) -> Finding {
    match version {
        Ok(text) => match Version::parse(text) {
            Some(version) if version < OLDEST => Finding::fail(
                CONTAINERD,
                format!("version {text}"),
                "it is older than any that this mirror was tried with",
                "update the node image to one with containerd 1.6 or newer",
            ),
            _ => Finding::pass(CONTAINERD, format!("version {text}")),
        },
        Err(error) => Finding::skip(
            CONTAINERD,
            format!("{error}; run this as root on a node, or name it with --containerd-socket"),
        ),
    }
}

fn judge_config(settings: &Result<Settings, ReadError>, version: Option<Version>) -> Vec<Finding> {
    let settings = match settings {
        Ok(settings) => settings.clone(),
        Err(error) if error.is_missing() => Settings::default(),
        Err(error) => {
            let cure = "mend the file; `containerd config dump` shows whether containerd accepts it";
            return vec![Finding::fail(CONFIG, error.to_string(), "containerd does not start with it", cure)];
        }
    };
    let mut findings = Vec::new();
    if settings.has_no_cri {
        findings.push(Finding::fail(
            CONFIG,
            "the CRI plugin is among disabled_plugins",
            "the kubelet cannot pull images through this containerd",
            "take \"cri\" out of disabled_plugins in config.toml and restart containerd",
        ));
    }
    if settings.has_legacy_registry {
        findings.push(legacy(&settings, version));
    }
    findings.extend(judge_path(&settings, version));
    findings
}

fn legacy(settings: &Settings, version: Option<Version>) -> Finding {
    let why = if settings.config_path.is_some() {
        "containerd refuses to load its CRI plugin when both config_path and these are set"
    } else {
        "while they are set, containerd does not look into certs.d, where the mirror is wired"
    };
    let cure =
        format!("remove the registry.mirrors and registry.configs tables, then\n{}", set_path(version));
    Finding::fail(CONFIG, "registry.mirrors or registry.configs is set", why, cure)
}

fn judge_path(settings: &Settings, version: Option<Version>) -> Option<Finding> {
    let has_default = version.is_some_and(|version| version >= HAS_DEFAULT_PATH);
    let path = match &settings.config_path {
        Some(path) => path.as_str(),
        None if settings.has_legacy_registry => return None,
        None if has_default => DEFAULT_CONFIG_PATH,
        None => {
            let why =
                "containerd looks into certs.d only when it is told where that is: the mirror is never asked";
            return Some(Finding::fail(CONFIG, "registry.config_path is not set", why, set_path(version)));
        }
    };
    let pulls_by_transfer = version.is_none_or(|version| version >= TRANSFER_PULLS);
    if !path.contains(':') || !pulls_by_transfer || settings.use_local_image_pull {
        return Some(Finding::pass(CONFIG, format!("config_path is {path}")));
    }
    let what = format!("config_path is {path}");
    let takes_for_one =
        "the transfer service takes a path with colons for one directory, which does not exist";
    if settings.discard_unpacked_layers {
        let why = format!(
            "{takes_for_one}; the mirror is asked only because discard_unpacked_layers makes containerd fall back to \
             its local pull, and is not when somebody turns that off"
        );
        return Some(Finding::warn(CONFIG, what, why, set_path(version)));
    }
    if version.is_none() {
        let why = format!("if this is containerd 2.1 or newer, {takes_for_one}, and no mirror is ever asked");
        return Some(Finding::warn(CONFIG, what, why, set_path(version)));
    }
    let why = format!("{takes_for_one}: no hosts.toml is read, no mirror is asked, and nothing is logged");
    Some(Finding::fail(CONFIG, what, why, set_path(version)))
}

/// The change that makes containerd look into one directory.
fn set_path(version: Option<Version>) -> String {
    let (section, format) = match version {
        Some(Version(1, _)) => ("io.containerd.grpc.v1.cri", 2),
        _ => ("io.containerd.cri.v1.images", 3),
    };
    format!(
        "in /etc/containerd/config.toml (version = {format}), then restart containerd:\n\
         [plugins.\"{section}\".registry]\n\
         config_path = \"/etc/containerd/certs.d\"\n\
         on EKS AL2023, in the node's user data (with Karpenter: spec.userData of the EC2NodeClass):\n\
         apiVersion: node.eks.aws/v1alpha1\n\
         kind: NodeConfig\n\
         spec:\n\
         \x20 containerd:\n\
         \x20   config: |\n\
         \x20     [plugins.\"{section}\".registry]\n\
         \x20     config_path = \"/etc/containerd/certs.d\""
    )
}

fn judge_snapshotter(settings: Option<&Settings>) -> Finding {
    match settings.and_then(|settings| settings.snapshotter.as_deref()) {
        Some(name) if name.contains("soci") => Finding::fail(
            SNAPSHOTTER,
            format!("images are unpacked by {name}"),
            "SOCI fetches layers from the registry by itself and asks no mirror: only manifests come through windlass",
            "turn it off where windlass is to serve layers: on EKS AL2023 leave FastImagePull out of the NodeConfig's \
             spec.featureGates, on Bottlerocket set settings.container-runtime.snapshotter = \"overlayfs\"; or leave \
             these nodes out of the DaemonSet",
        ),
        Some(name) => Finding::pass(SNAPSHOTTER, name),
        None => Finding::pass(SNAPSHOTTER, "containerd's default"),
    }
}

fn effective_roots(settings: Option<&Settings>, version: Option<Version>) -> Roots {
    let written =
        settings.and_then(|settings| settings.config_path.as_deref()).and_then(|path| path.parse().ok());
    let default = || {
        let has_default = version.is_some_and(|version| version >= HAS_DEFAULT_PATH);
        let path = if has_default { DEFAULT_CONFIG_PATH } else { crate::cli::wire::USUAL_ROOT };
        path.parse().ok()
    };
    written.or_else(default).unwrap_or_else(|| unreachable!("the defaults are absolute paths"))
}

/// One finding per registry.
fn check_hosts(scene: &Scene, roots: &Roots) -> Vec<Finding> {
    let seen = roots.below(&scene.host_root);
    let names = scene.config.registry.origins.iter().map(|origin| origin.name.as_str());
    names.map(|name| check_registry(scene, &seen, name)).collect()
}

fn check_registry(scene: &Scene, roots: &Roots, registry: &str) -> Finding {
    let wire = format!("windlass wire {registry}");
    let (Found::Own(directory) | Found::Default(directory)) = roots.find(registry) else {
        let what = format!("{registry} has no directory in {roots}");
        return Finding::fail(HOSTS, what, "containerd goes to the registry itself", wire);
    };
    let file = directory.join(FILE_NAME);
    match fs::read_to_string(&file) {
        Ok(text) => judge_hosts(&file, registry, &text, &scene.mirror.url()),
        Err(error) => {
            let what = format!("cannot read {}: {error}", file.display());
            Finding::fail(HOSTS, what, "containerd goes to the registry itself", wire)
        }
    }
}

fn judge_hosts(file: &Path, registry: &str, text: &str, mirror: &str) -> Finding {
    let shown = file.display();
    let wire = format!("windlass wire {registry}");
    let hosts = match Hosts::parse(text) {
        Ok(hosts) => hosts,
        Err(why) => {
            let what = format!("{shown} is not valid TOML: {why}");
            let cure = format!("mend the line, or remove the file, then\n{wire}");
            return Finding::fail(
                HOSTS,
                what,
                "containerd ignores the whole file, its server line included",
                cure,
            );
        }
    };
    let same = |url: &str| url.trim_end_matches('/') == mirror;
    if hosts.server.as_deref().is_some_and(same) {
        let what = format!("{shown}: server is the mirror itself");
        let cure = format!("server = \"https://{registry}\"");
        return Finding::fail(HOSTS, what, "when the daemon stops, containerd has nowhere else to go", cure);
    }
    let Some(place) = hosts.position(mirror) else {
        let what = format!("{shown} does not name {mirror}");
        return Finding::fail(HOSTS, what, "containerd goes to the registry itself", wire);
    };
    let host = &hosts.hosts[place];
    if host.has_tls {
        let what = format!("{shown}: [host.\"{mirror}\"] has skip_verify, ca or client");
        let cure = "remove these keys from the mirror's table";
        return Finding::fail(
            HOSTS,
            what,
            "containerd then tries TLS on it first and may skip the mirror",
            cure,
        );
    }
    if !host.resolves() {
        let what = format!("{shown}: the mirror lacks pull or resolve");
        let cure = "capabilities = [\"pull\", \"resolve\"]";
        return Finding::warn(HOSTS, what, "tags are looked up at the registry, from every node", cure);
    }
    if place > 0 {
        let what = format!("{shown}: {place} other host(s) are asked before the mirror");
        return Finding::warn(
            HOSTS,
            what,
            "what they serve never comes from peers",
            "move the mirror's table up",
        );
    }
    Finding::pass(HOSTS, format!("{shown}: {registry} is asked at {mirror} first"))
}

/// One finding per registry.
async fn check_canaries(scene: &Scene, socket: &Socket) -> Vec<Finding> {
    let mut findings = Vec::new();
    for origin in &scene.config.registry.origins {
        findings.push(send_canary(scene, socket, &origin.name).await);
    }
    if findings.is_empty() {
        findings.push(Finding::skip(CANARY, "no registry is configured"));
    }
    findings
}

async fn send_canary(scene: &Scene, socket: &Socket, registry: &str) -> Finding {
    let canary =
        Canary { daemon: scene.daemon.clone(), socket: socket.clone(), registry: registry.to_owned() };
    match canary.send().await {
        Arrival::Came => {
            Finding::pass(CANARY, format!("a pull from {registry} through containerd arrives at the mirror"))
        }
        Arrival::Unknown(why) => Finding::skip(CANARY, why),
        Arrival::Missing(said) => Finding::fail(
            CANARY,
            format!("a pull from {registry} through containerd does not arrive at the mirror: {said}"),
            "every image of this registry comes from the registry, once per node",
            "mend what failed above and run this again; when nothing did, restart containerd, which reads its \
             configuration only then",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict::{self, Fail, Pass, Warn};
    use super::*;

    const MIRROR: &str = "http://127.0.0.1:5100";

    fn verdicts(settings: Settings, version: &str) -> Vec<Verdict> {
        judge_config(&Ok(settings), Version::parse(version))
            .into_iter()
            .map(|finding| finding.verdict)
            .collect()
    }

    fn path(path: &str) -> Settings {
        Settings { config_path: Some(path.into()), ..Settings::default() }
    }

    #[test]
    fn the_colon_path_is_judged_by_who_reads_it() {
        assert_eq!(verdicts(path("/a:/b"), "1.7.34"), [Pass]);
        assert_eq!(verdicts(path("/a:/b"), "v2.0.11"), [Pass]);
        assert_eq!(verdicts(path("/a:/b"), "2.2.4"), [Fail]);
        assert_eq!(verdicts(path("/a"), "2.2.4"), [Pass]);
        assert_eq!(verdicts(Settings { use_local_image_pull: true, ..path("/a:/b") }, "2.2.4"), [Pass]);
        assert_eq!(verdicts(Settings { discard_unpacked_layers: true, ..path("/a:/b") }, "2.2.4"), [Warn]);
        assert_eq!(verdicts(path("/a:/b"), "?"), [Warn], "when the version is not known");
    }

    #[test]
    fn a_path_that_nobody_wrote_is_containerds_default() {
        assert_eq!(verdicts(Settings::default(), "1.6.20~ds1"), [Fail]);
        assert_eq!(verdicts(Settings::default(), "2.1.5"), [Fail]);
        assert_eq!(verdicts(Settings::default(), "2.2.4"), [Fail], "its default has a colon");
        let local = Settings { use_local_image_pull: true, ..Settings::default() };
        assert_eq!(verdicts(local, "2.2.4"), [Pass]);
    }

    #[test]
    fn legacy_mirrors_and_a_missing_cri_fail_with_the_section_of_this_version() {
        let legacy = Settings { has_legacy_registry: true, ..Settings::default() };
        let findings = judge_config(&Ok(legacy.clone()), Version::parse("1.6.20"));
        assert_eq!(findings.len(), 1, "one cause, one finding");
        assert!(findings[0].cure.contains("io.containerd.grpc.v1.cri"), "{}", findings[0].cure);
        assert!(set_path(Version::parse("2.2.4")).contains("io.containerd.cri.v1.images"));
        assert_eq!(verdicts(Settings { has_no_cri: true, ..path("/a") }, "1.6.20"), [Fail, Pass]);
    }

    #[test]
    fn soci_fails_and_overlayfs_does_not() {
        let with = |name: &str| Settings { snapshotter: Some(name.into()), ..Settings::default() };
        assert_eq!(judge_snapshotter(Some(&with("soci"))).verdict, Fail);
        assert_eq!(judge_snapshotter(Some(&with("overlayfs"))).verdict, Pass);
        assert_eq!(judge_snapshotter(None).verdict, Pass);
    }

    #[test]
    fn a_hosts_file_is_judged_as_containerd_reads_it() {
        let judged = |text: &str| judge_hosts(Path::new("hosts.toml"), "reg", text, MIRROR);
        let verdict = |text: &str| judged(text).verdict;
        let ours = "[host.\"http://127.0.0.1:5100\"]\ncapabilities = [\"pull\", \"resolve\"]\n";
        assert_eq!(verdict(&format!("server = \"https://reg\"\n{ours}")), Pass);
        assert_eq!(verdict(&format!("[host.\"https://m\"]\n{ours}")), Warn);
        assert_eq!(verdict("server = \"https://reg\"\n"), Fail);
        assert_eq!(verdict(&format!("server = \"{MIRROR}\"\n{ours}")), Fail);
        assert_eq!(verdict(&format!("{ours}skip_verify = true\n")), Fail);
        assert_eq!(verdict(&ours.replace(", \"resolve\"", "")), Warn);
        let broken = judged(&ours.replace("]\ncap", "\ncap"));
        assert!(broken.verdict == Fail && broken.what.contains("line 1"), "{broken:?}");
    }
}

//! containerd's `config.toml`, as far as it decides how images are pulled.
//!
//! Every version of the format (2 of containerd 1.x, 3 of 2.x) is read, wherever a key stands in it, for containerd 2
//! migrates version 2 when it starts. A section of an imported file replaces the same section of the files before it,
//! as containerd merges them.

use std::path::{Path, PathBuf};

use globset::Glob;
use serde::Deserialize;
use toml::{Table, Value};

use super::roots::below;

/// Where containerd looks for its configuration unless it is told otherwise.
pub const DEFAULT_PATH: &str = "/etc/containerd/config.toml";

/// Plugins that pull images: the CRI plugin of containerd 1.x, its image half in 2.x.
const CRI_V1: &str = "io.containerd.grpc.v1.cri";
const CRI_V2: &str = "io.containerd.cri.v1.images";
const TRANSFER: &str = "io.containerd.transfer.v1.local";

/// Files read at most, imports included: a directory of drop-ins has a handful.
const FILES_MAX: usize = 64;

/// What of it decides how images are pulled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `version`; containerd takes a missing one for 1.
    pub version: i64,
    /// `registry.config_path` as it is written; nothing when it is not.
    pub config_path: Option<String>,
    /// `config_path` of the transfer service, for pulls that do not come from the kubelet.
    pub transfer_config_path: Option<String>,
    /// `registry.mirrors` or `registry.configs` has an entry.
    pub has_legacy_registry: bool,
    pub discard_unpacked_layers: bool,
    pub use_local_image_pull: bool,
    /// Nothing means overlayfs.
    pub snapshotter: Option<String>,
    /// The CRI plugin is among `disabled_plugins`.
    pub has_no_cri: bool,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Document {
    version: i64,
    imports: Vec<String>,
    disabled_plugins: Vec<String>,
    plugins: Table,
}

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("cannot read {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{}: {message}", path.display())]
    Syntax { path: PathBuf, message: String },
    #[error("{} imports more than {FILES_MAX} files", path.display())]
    TooMany { path: PathBuf },
}

impl ReadError {
    /// Whether there is no such file, which is a configuration too: containerd's defaults.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Unreadable { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    }
}

/// Reads `path` of the node whose root is at `host_root`, and what it imports.
///
/// # Errors
/// [`ReadError`]
pub fn read(host_root: &Path, path: &Path) -> Result<Settings, ReadError> {
    let mut merged = Document::default();
    let mut queue = vec![path.to_owned()];
    let mut seen: Vec<PathBuf> = Vec::new();
    while let Some(next) = queue.pop() {
        if seen.contains(&next) {
            continue;
        }
        if seen.len() == FILES_MAX {
            return Err(ReadError::TooMany { path: path.to_owned() });
        }
        let seen_at = below(host_root, &next);
        let text = std::fs::read_to_string(&seen_at)
            .map_err(|source| ReadError::Unreadable { path: next.clone(), source })?;
        let document = parse(&text, &next)?;
        // The last import is read last and wins, so it goes to the bottom of the stack.
        queue.extend(document.imports.iter().rev().flat_map(|import| matching(host_root, &next, import)));
        merge(&mut merged, document);
        seen.push(next);
    }
    Ok(settings(&merged))
}

fn parse(text: &str, path: &Path) -> Result<Document, ReadError> {
    toml::from_str(text).map_err(|error| ReadError::Syntax {
        path: path.to_owned(),
        message: error.to_string().lines().map(str::trim).collect::<Vec<_>>().join(" "),
    })
}

fn merge(into: &mut Document, from: Document) {
    into.version = into.version.max(from.version);
    into.disabled_plugins.extend(from.disabled_plugins);
    into.plugins.extend(from.plugins);
}

/// The files that an import names, last first; a relative one is taken from the directory of the file that imports it.
fn matching(host_root: &Path, importer: &Path, import: &str) -> Vec<PathBuf> {
    let path = importer.parent().unwrap_or_else(|| Path::new("/")).join(import);
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str()))
    else {
        return Vec::new();
    };
    if !name.contains(['*', '?', '[']) {
        return vec![path];
    }
    let Ok(glob) = Glob::new(name).map(|glob| glob.compile_matcher()) else { return Vec::new() };
    let entries = std::fs::read_dir(below(host_root, directory)).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter(|entry| glob.is_match(entry.file_name()))
        .map(|entry| directory.join(entry.file_name()))
        .collect();
    found.sort();
    found.reverse();
    found
}

fn settings(document: &Document) -> Settings {
    let plugin = |name: &str| document.plugins.get(name).and_then(Value::as_table);
    let (old, new, transfer) = (plugin(CRI_V1), plugin(CRI_V2), plugin(TRANSFER));
    // containerd 1.x keeps what concerns images one table further down.
    let below_old = old.and_then(|table| table.get("containerd")).and_then(Value::as_table);
    let first = |key: &str| [new, old, below_old].into_iter().flatten().find_map(|table| table.get(key));
    let text = |value: Option<&Value>| {
        value.and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned)
    };
    let holds = |key: &str| first(key).and_then(Value::as_bool).unwrap_or(false);
    let registry = |key: &str| {
        let tables = [new, old].into_iter().flatten().filter_map(|table| table.get("registry")?.as_table());
        tables.filter_map(|table| table.get(key)).next()
    };
    let has_entries =
        |key: &str| registry(key).and_then(Value::as_table).is_some_and(|table| !table.is_empty());
    Settings {
        version: document.version,
        config_path: text(registry("config_path")),
        transfer_config_path: text(transfer.and_then(|table| table.get("config_path"))),
        has_legacy_registry: has_entries("mirrors") || has_entries("configs"),
        discard_unpacked_layers: holds("discard_unpacked_layers"),
        use_local_image_pull: holds("use_local_image_pull"),
        snapshotter: text(first("snapshotter")),
        has_no_cri: document
            .disabled_plugins
            .iter()
            .any(|name| [CRI_V1, CRI_V2, "cri"].contains(&name.as_str())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Settings {
        settings(&parse(text, Path::new("config.toml")).expect("TOML"))
    }

    #[test]
    fn the_same_is_read_from_both_formats() {
        let old = of(
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/a:/b\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"soci\"\ndiscard_unpacked_layers = true",
        );
        let new = of("version = 3\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'soci'\n\
             discard_unpacked_layers = true\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/a:/b'");
        assert_eq!(Settings { version: 3, ..old.clone() }, new);
        assert_eq!(old.config_path.as_deref(), Some("/a:/b"));
        assert!(old.discard_unpacked_layers && old.snapshotter.as_deref() == Some("soci"));
        assert!(!old.has_legacy_registry && !old.use_local_image_pull && !old.has_no_cri);
    }

    #[test]
    fn legacy_mirrors_and_a_missing_cri_are_seen() {
        let text = "disabled_plugins = [\"cri\"]\n\
            [plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = [\"https://m\"]";
        assert!(of(text).has_legacy_registry && of(text).has_no_cri);
        let empty = of("[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors]\n");
        assert!(!empty.has_legacy_registry, "what `containerd config default` writes is no entry");
    }

    #[test]
    fn imports_replace_sections_in_their_order() {
        let node = tempfile::tempdir().expect("a temporary directory");
        let etc = node.path().join("etc/containerd");
        std::fs::create_dir_all(etc.join("conf.d")).expect("writable");
        let write = |name: &str, text: &str| std::fs::write(etc.join(name), text).expect("writable");
        write(
            "config.toml",
            "version = 3\nimports = [\"conf.d/*.toml\"]\n\
            [plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'soci'",
        );
        write("conf.d/10.toml", "[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/one'");
        write("conf.d/20.toml", "[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/two'");
        let settings = read(node.path(), Path::new(DEFAULT_PATH)).expect("reads");
        assert_eq!(settings.config_path.as_deref(), Some("/two"));
        assert_eq!(settings.snapshotter, None, "the section was replaced");
        let missing = read(node.path(), Path::new("/etc/none.toml")).expect_err("not there");
        assert!(missing.is_missing());
    }
}

//! Bottlerocket, where `/etc` belongs to the system: the settings to apply instead of files.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::Context;
use serde_json::json;

use super::Wish;
use crate::containerd::roots::{DEFAULT, below};

/// Whether the node whose root is at `host_root` runs Bottlerocket.
pub(super) fn is_bottlerocket(host_root: &Path) -> bool {
    let release = fs::read_to_string(below(host_root, Path::new("/etc/os-release"))).unwrap_or_default();
    release.lines().any(|line| matches!(line.trim(), "ID=bottlerocket" | "ID=\"bottlerocket\""))
}

/// Prints the settings; the registry itself stays the last resort there, too.
pub(super) fn print(wishes: &[Wish], json: bool) -> anyhow::Result<()> {
    let text = if json { as_json(wishes) } else { as_toml(wishes) };
    io::stdout().write_all(text.as_bytes()).context("cannot print the settings")
}

fn as_toml(wishes: &[Wish]) -> String {
    let mut text = String::from(
        "# This node runs Bottlerocket, whose /etc cannot be written. Put this into its user data (with Karpenter: \
         spec.userData of the EC2NodeClass):\n",
    );
    for wish in wishes {
        let registry = pattern(wish);
        let _ = write!(
            text,
            "\n[[settings.container-registry.mirrors]]\nregistry = \"{registry}\"\nendpoint = [\"{}\"]\n",
            wish.mirror.url
        );
    }
    text
}

fn as_json(wishes: &[Wish]) -> String {
    let mirror = |wish: &Wish| json!({ "registry": pattern(wish), "endpoint": [wish.mirror.url] });
    let mirrors: Vec<_> = wishes.iter().map(mirror).collect();
    format!("{:#}\n", json!({ "settings": { "container-registry": { "mirrors": mirrors } } }))
}

fn pattern(wish: &Wish) -> &str {
    if wish.registry == DEFAULT { "*" } else { &wish.registry }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containerd::hosts::Mirror;

    #[test]
    fn the_settings_are_what_bottlerocket_reads() {
        let mirror = |name: &str| Wish {
            registry: name.into(),
            mirror: Mirror { url: "http://127.0.0.1:5100".into(), server: None },
        };
        let wishes = [mirror(DEFAULT), mirror("a.example")];
        let toml: toml::Value = toml::from_str(&as_toml(&wishes)).expect("TOML");
        let json: toml::Value = serde_json::from_str(&as_json(&wishes)).expect("JSON");
        assert_eq!(toml, json);
        let mirrors = toml["settings"]["container-registry"]["mirrors"].as_array().expect("a list").clone();
        assert_eq!(mirrors[0]["registry"].as_str(), Some("*"));
        assert_eq!(mirrors[1]["endpoint"][0].as_str(), Some("http://127.0.0.1:5100"));
    }

    #[test]
    fn the_system_is_told_by_its_release_file() {
        let node = tempfile::tempdir().expect("a temporary directory");
        assert!(!is_bottlerocket(node.path()));
        fs::create_dir_all(node.path().join("etc")).expect("writable");
        fs::write(node.path().join("etc/os-release"), "NAME=Bottlerocket\nID=bottlerocket\n")
            .expect("writable");
        assert!(is_bottlerocket(node.path()));
    }
}

//! Holds `config/windlass.toml` to its promise: every key is there, commented, with its default.

use std::path::Path;

use windlass::config::{Config, ConfigError};

const FILE: &str = include_str!("../config/windlass.toml");

/// No section has a key of this name.
const PROBE: &str = "probe-for-known-keys";

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("config/windlass.toml"), [])
}

#[test]
fn the_file_is_the_default() {
    let shown = |config: &Config| config.to_toml().expect("it has a form");
    assert_eq!(shown(&parse(FILE).expect("it parses")), shown(&Config::default()));
}

#[test]
fn the_file_names_every_key() {
    let missing: Vec<_> = leaves(&[]).into_iter().filter(|path| !is_named(path)).collect();
    assert!(missing.is_empty(), "config/windlass.toml does not name {missing:?}");
}

#[test]
fn every_line_of_the_file_that_is_commented_out_is_right() {
    // `# key = value` shows a key that has no default. With one mark taken away, it must parse.
    let uncommented: Vec<_> = FILE.lines().map(|line| line.strip_prefix("#~ ").unwrap_or(line)).collect();
    parse(&uncommented.join("\n")).expect("the examples parse");
}

/// Whether the section of `path` has a line for its key, which may be an example behind `#~`.
fn is_named(path: &[String]) -> bool {
    let (Some(key), section) = (path.last(), path[..path.len() - 1].join(".")) else { return false };
    let mut inside = false;
    for line in FILE.lines().map(|line| line.strip_prefix("#~ ").unwrap_or(line)) {
        if line.starts_with('[') {
            inside = line.trim_matches(['[', ']']) == section;
        } else if inside && line.strip_prefix(key).is_some_and(|rest| rest.starts_with(" = ")) {
            return true;
        }
    }
    false
}

/// Every key that is no table, found by asking each table for a key that it does not have: serde answers with those
/// that it does.
fn leaves(path: &[String]) -> Vec<Vec<String>> {
    let Some(known) = known_keys(path) else { return vec![path.to_vec()] };
    known.into_iter().flat_map(|key| leaves(&[path, &[key.to_owned()]].concat())).collect()
}

/// The keys of the table, or of the tables in the list, at `path`; nothing if it is neither.
fn known_keys(path: &[String]) -> Option<Vec<&'static str>> {
    let (last, parents) = path.split_last().map_or((None, path), |(last, parents)| (Some(last), parents));
    let inside = |header: &str| {
        let parents = if parents.is_empty() { String::new() } else { format!("{}.", parents.join(".")) };
        last.map_or_else(|| format!("{PROBE} = 1"), |key| header.replace("PATH", &format!("{parents}{key}")))
    };
    ["[PATH]\nPROBE = 1", "[[PATH]]\nPROBE = 1"].iter().find_map(|header| {
        match parse(&inside(&header.replace("PROBE", PROBE))) {
            Err(ConfigError::UnknownKey { key, known, .. }) if key.ends_with(PROBE) => Some(known.to_vec()),
            _ => None,
        }
    })
}

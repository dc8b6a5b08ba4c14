//! Holds the house's floors up: a module imports only from the modules its row of [`MAY_IMPORT`] names.
//!
//! One crate has no compiler walls, so this test reads `src/**/*.rs`, takes comments and literals out, expands every
//! path (`use crate::{a, b::c}`, inline `crate::a::f()`, `super::super::a`) and fails with the file, the line and what
//! would have been allowed. Test code inside a module obeys the same rule.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Pure: no tokio, no sockets, no files, no clock, no global randomness.
const FLOOR_0: &[&str] = &["content", "oci", "wire", "swarm"];
/// Leaf I/O.
const FLOOR_1: &[&str] = &["store", "origin", "transport"];

/// For each top-level module, what it may import besides itself. `daemon` and its neighbours on floor 4 see all.
const MAY_IMPORT: &[(&str, &[&[&str]])] = &[
    ("content", &[]),
    ("oci", &[&["content"]]),
    ("wire", &[&["content"]]),
    ("swarm", &[&["content", "wire"]]),
    ("store", &[&["content"]]),
    ("origin", &[&["content", "oci"]]),
    ("transport", &[&["content", "wire"]]),
    ("containerd", &[]),
    ("cache", &[FLOOR_0, FLOOR_1]),
    ("gossip", &[FLOOR_0, &["transport"]]),
    ("provider", &[FLOOR_0, &["store", "transport", "cache"]]),
    ("fetch", &[FLOOR_0, FLOOR_1, &["cache"]]),
    ("http", &[FLOOR_0, FLOOR_1, &["cache", "gossip", "fetch"]]),
    ("config", ALL),
    ("telemetry", ALL),
    ("cli", ALL),
    ("daemon", ALL),
    // Roots, named after their files: `lib` declares modules and uses none, `main` hands over to the commands.
    ("lib", &[]),
    ("main", &[&["cli"]]),
];

const ALL: &[&[&str]] = &[
    FLOOR_0,
    FLOOR_1,
    &["containerd", "cache", "gossip", "provider", "fetch", "http", "config", "telemetry", "cli", "daemon"],
];

/// What floor 0 must not name, as consecutive path segments. `std::net::SocketAddr` is only data, so it may.
const IMPURE: &[&[&str]] = &[
    &["tokio"],
    &["tokio_util"],
    &["std", "fs"],
    &["net", "TcpListener"],
    &["net", "TcpStream"],
    &["net", "UdpSocket"],
    &["unix", "net"],
    &["time", "Instant"],
    &["time", "SystemTime"],
    &["rand", "rng"],
    &["rand", "random"],
    &["rand", "thread_rng"],
];

#[test]
fn imports_point_down() {
    let mut faults = Vec::new();
    for file in rust_files(&source_root()) {
        let text = std::fs::read_to_string(&file).expect("a listed source file is readable");
        faults.extend(faults_in(&file, &text));
    }
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

/// Every rule that `text` breaks as the file at `file`, one line each.
fn faults_in(file: &Path, text: &str) -> Vec<String> {
    let home = module_path(file);
    let shown = file.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap_or(file).display().to_string();
    let top = home.first().cloned().unwrap_or_default();
    let Some(allowed) = allowed_imports(&top) else {
        return vec![format!(
            "{shown}: `{top}` has no floor yet; give it a row in tests/floors.rs::MAY_IMPORT"
        )];
    };
    let mut faults = Vec::new();
    for path in paths(&tokens(text), &home) {
        let written = path.segments.join("::");
        if let Some(target) = path.target()
            && target != top
            && !allowed.contains(&target)
        {
            let list = if allowed.is_empty() { "nothing".to_owned() } else { allowed.join(", ") };
            faults.push(format!(
                "{shown}:{}: `{top}` imports `{written}`, but may import only: {list}",
                path.line
            ));
        }
        if FLOOR_0.contains(&top.as_str()) && is_impure(&path.segments) {
            faults.push(format!(
                "{shown}:{}: `{top}` is pure and must not use `{written}`; take time, bytes and randomness as arguments",
                path.line
            ));
        }
    }
    faults
}

fn allowed_imports(top: &str) -> Option<Vec<&'static str>> {
    let (_, rows) = MAY_IMPORT.iter().find(|(module, _)| *module == top)?;
    Some(rows.iter().flat_map(|row| row.iter().copied()).collect())
}

fn is_impure(segments: &[String]) -> bool {
    IMPURE.iter().any(|banned| segments.windows(banned.len()).any(|window| window == *banned))
}

fn source_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).expect("src is a readable directory") {
        let path = entry.expect("a directory entry is readable").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// `src/store/index.rs` is `store::index`, `src/store/mod.rs` is `store`, `src/main.rs` stands for itself.
fn module_path(file: &Path) -> Vec<String> {
    let relative = file.strip_prefix(source_root()).unwrap_or(file).with_extension("");
    let mut segments: Vec<_> =
        relative.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
    if segments.len() > 1 && segments.last().is_some_and(|last| last == "mod") {
        segments.pop();
    }
    segments
}

#[derive(Debug, PartialEq)]
enum Token {
    Ident(String),
    PathSeparator,
    Other(char),
}

/// A path as written, made absolute where it begins with `crate`, `super` or this crate's name.
#[derive(Debug, PartialEq)]
struct UsedPath {
    line: usize,
    segments: Vec<String>,
    /// Whether `segments[0]` stands for this crate's root.
    from_root: bool,
}

impl UsedPath {
    /// The top-level module of this crate that the path enters; a glob of the root counts as the module `*`.
    fn target(&self) -> Option<&str> {
        self.from_root.then(|| self.segments.get(1).map(String::as_str)).flatten()
    }
}

/// Idents, `::` and other characters with their line numbers; comments, strings and character literals are gone.
fn tokens(text: &str) -> Vec<(usize, Token)> {
    let chars: Vec<char> = text.chars().collect();
    let (mut found, mut line, mut at) = (Vec::new(), 1, 0);
    while at < chars.len() {
        let (token, next) = token_at(&chars, at);
        if let Some(token) = token {
            found.push((line, token));
        }
        line += chars[at..next].iter().filter(|c| **c == '\n').count();
        at = next;
    }
    found
}

/// The token that begins at `at`, if it is one worth keeping, and where the next begins.
fn token_at(chars: &[char], at: usize) -> (Option<Token>, usize) {
    let next = chars.get(at + 1).copied();
    match chars[at] {
        '/' if next == Some('/') => (None, line_end(chars, at)),
        '/' if next == Some('*') => (None, block_comment_end(chars, at)),
        '"' => (None, string_end(chars, at)),
        '\'' => (None, quote_end(chars, at)),
        ':' if next == Some(':') => (Some(Token::PathSeparator), at + 2),
        c if c.is_alphabetic() || c == '_' => ident_at(chars, at),
        c if c.is_whitespace() => (None, at + 1),
        c => (Some(Token::Other(c)), at + 1),
    }
}

/// An identifier, or the raw string that an `r`, `br` or `cr` opens.
fn ident_at(chars: &[char], at: usize) -> (Option<Token>, usize) {
    let end = position(chars, at, |c| !(c.is_alphanumeric() || c == '_'));
    let word: String = chars[at..end].iter().collect();
    if matches!(word.as_str(), "r" | "br" | "cr") {
        let quote = position(chars, end, |c| c != '#');
        if chars.get(quote) == Some(&'"') {
            return (None, raw_string_end(chars, quote, quote - end));
        }
    }
    (Some(Token::Ident(word)), end)
}

fn position(chars: &[char], from: usize, stop: impl Fn(char) -> bool) -> usize {
    (from..chars.len()).find(|at| stop(chars[*at])).unwrap_or(chars.len())
}

fn line_end(chars: &[char], at: usize) -> usize {
    position(chars, at, |c| c == '\n')
}

fn block_comment_end(chars: &[char], at: usize) -> usize {
    let (mut depth, mut at) = (1, at + 2);
    while at + 1 < chars.len() && depth > 0 {
        match (chars[at], chars[at + 1]) {
            ('/', '*') => (depth, at) = (depth + 1, at + 2),
            ('*', '/') => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
    }
    if depth == 0 { at } else { chars.len() }
}

fn string_end(chars: &[char], open: usize) -> usize {
    let mut at = open + 1;
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(chars.len())
}

fn raw_string_end(chars: &[char], quote: usize, hashes: usize) -> usize {
    let closes = |at: usize| chars[at] == '"' && chars[at + 1..].iter().take(hashes).all(|c| *c == '#');
    (quote + 1..chars.len())
        .find(|at| closes(*at))
        .map_or(chars.len(), |at| (at + 1 + hashes).min(chars.len()))
}

/// A character literal ends at its closing quote; a lifetime has none and ends with its quote sign.
fn quote_end(chars: &[char], open: usize) -> usize {
    match (chars.get(open + 1), chars.get(open + 2)) {
        (Some('\\'), _) => (position(chars, open + 3, |c| c == '\'') + 1).min(chars.len()),
        (Some(_), Some('\'')) => open + 3,
        _ => open + 1,
    }
}

/// Every path of two or more segments, and every single one after `use`, with `super` resolved against `home` and
/// the inline modules around it.
fn paths(tokens: &[(usize, Token)], home: &[String]) -> Vec<UsedPath> {
    let (mut found, mut scopes, mut at): (_, Vec<Option<String>>, _) = (Vec::new(), Vec::new(), 0);
    while at < tokens.len() {
        let before = at.checked_sub(1).map(|before| &tokens[before].1);
        match &tokens[at].1 {
            Token::Other('{') => scopes.push(inline_module(tokens, at)),
            Token::Other('}') => {
                scopes.pop();
            }
            Token::Ident(_)
                if matches!(tokens.get(at + 1), Some((_, Token::PathSeparator)))
                    || before == Some(&Token::Ident("use".into())) =>
            {
                let mut written = Vec::new();
                at = read_tree(tokens, at, &mut Vec::new(), &mut written);
                let here: Vec<_> = home.iter().chain(scopes.iter().flatten()).cloned().collect();
                found.extend(written.into_iter().map(|(line, segments)| resolve(line, segments, &here)));
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    found
}

/// The name of the module that the brace at `at` opens, if it opens one.
fn inline_module(tokens: &[(usize, Token)], at: usize) -> Option<String> {
    match (&tokens.get(at.checked_sub(2)?)?.1, &tokens.get(at - 1)?.1) {
        (Token::Ident(word), Token::Ident(name)) if word == "mod" => Some(name.clone()),
        _ => None,
    }
}

/// Reads the path or use tree at `at`, appends each leaf to `found`, returns where it ends.
fn read_tree(
    tokens: &[(usize, Token)],
    mut at: usize,
    prefix: &mut Vec<String>,
    found: &mut Vec<(usize, Vec<String>)>,
) -> usize {
    let depth = prefix.len();
    while let Some((line, token)) = tokens.get(at) {
        match token {
            Token::Ident(name) => prefix.push(name.clone()),
            Token::Other('*') => prefix.push("*".into()),
            Token::Other('{') => {
                at = read_group(tokens, at + 1, prefix, found);
                break;
            }
            _ => {
                found.push((*line, prefix.clone()));
                break;
            }
        }
        at += 1;
        if !matches!(tokens.get(at), Some((_, Token::PathSeparator))) {
            found.push((*line, prefix.clone()));
            break;
        }
        at += 1;
    }
    prefix.truncate(depth);
    at
}

/// Reads `a, b::c as d, …}` after an opening brace, returns where it ends.
fn read_group(
    tokens: &[(usize, Token)],
    mut at: usize,
    prefix: &mut Vec<String>,
    found: &mut Vec<(usize, Vec<String>)>,
) -> usize {
    while let Some((_, token)) = tokens.get(at) {
        match token {
            Token::Other('}') => return at + 1,
            Token::Other(',') => at += 1,
            // A rename is no path: step over `as` and the new name.
            Token::Ident(word) if word == "as" => at += 2,
            _ => at = read_tree(tokens, at, prefix, found).max(at + 1),
        }
    }
    at
}

fn resolve(line: usize, segments: Vec<String>, here: &[String]) -> UsedPath {
    let supers = segments.iter().take_while(|segment| *segment == "super").count();
    let root = || std::iter::once("crate".to_owned());
    let (segments, from_root) = match segments[0].as_str() {
        "crate" | "windlass" => (root().chain(segments[1..].iter().cloned()).collect(), true),
        "super" => {
            let kept = here.len().saturating_sub(supers);
            let absolute = root().chain(here[..kept].iter().chain(&segments[supers..]).cloned());
            (absolute.collect(), true)
        }
        _ => (segments, false),
    };
    UsedPath { line, segments, from_root }
}

#[test]
fn the_reader_sees_every_way_to_write_an_import() {
    let seen = |text: &str| {
        let mut shown = String::new();
        for path in paths(&tokens(text), &["content".into(), "digest".into()]) {
            let _ = write!(shown, "{}:{} ", path.line, path.segments.join("::"));
        }
        shown
    };
    assert_eq!(
        seen("use crate::{oci, wire::{self, Frame as F}};"),
        "1:crate::oci 1:crate::wire::self 1:crate::wire::Frame "
    );
    assert_eq!(seen("fn f() {\n crate::store::open() }"), "2:crate::store::open ");
    assert_eq!(seen("use super::id;"), "1:crate::content::id ");
    assert_eq!(seen("mod tests { use super::*; }"), "1:crate::content::digest::* ");
    assert_eq!(seen("use super::super::cache;"), "1:crate::cache ");
    assert_eq!(seen("Vec::<crate::cache::Cache>::new()"), "1:Vec 1:crate::cache::Cache ");
    assert_eq!(seen("use tokio;"), "1:tokio ");
}

#[test]
fn the_reader_skips_comments_and_literals() {
    let text = r###"// crate::a
        /* crate::b /* crate::c */ crate::d */ "crate::e \" crate::f" r#"crate::g " crate::h"# b"crate::i" '"' '\'' '\u{7f}'
        fn f<'a>(x: &'a str) {}"###;
    assert_eq!(paths(&tokens(text), &["content".into()]), []);
}

#[test]
fn a_fault_names_the_place_the_import_and_what_is_allowed() {
    let faults = |name: &str, text: &str| faults_in(&source_root().join(name), text);
    assert_eq!(
        faults("oci/route.rs", "\nuse crate::cache::Cache;"),
        ["src/oci/route.rs:2: `oci` imports `crate::cache::Cache`, but may import only: content"]
    );
    assert_eq!(faults("oci/route.rs", "use crate::{content::Digest, oci::Name};"), [""; 0]);
    assert_eq!(faults("main.rs", "fn main() { windlass::cli::run() }"), [""; 0]);
    assert_eq!(faults("main.rs", "use windlass::daemon;").len(), 1);
    assert_eq!(faults("swarm/mod.rs", "use std::{net::SocketAddr, time::{Duration, Instant}};").len(), 1);
    assert_eq!(faults("swarm/mod.rs", "let x = rand::rng();").len(), 1);
    assert!(faults("misc/mod.rs", "")[0].contains("`misc` has no floor yet"));
}

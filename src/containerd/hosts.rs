//! One `hosts.toml`: reading it as containerd does, and putting a mirror into it or taking it out again.
//!
//! Invariant: [`wire`] changes nothing outside its marks, and [`unwire`] gives back the text that [`wire`] was given.
//! What cannot be done so is refused with the reason. Pure: text in, text out.

use std::fmt::Write as _;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The name under which containerd looks for the file.
pub const FILE_NAME: &str = "hosts.toml";

const BEGIN: &str = "# >>> windlass wire";
const END: &str = "# <<< windlass wire: `windlass unwire` removes what is between these two lines";

/// How long containerd (2.0.7 and newer) waits for a connection to the mirror. On the loopback a daemon that runs
/// answers in microseconds and one that does not refuses at once; this is for a machine that does neither.
const DIAL_TIMEOUT: &str = "200ms";

/// What containerd reads in one file, in its order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hosts {
    /// Asked last; nothing means the registry itself.
    pub server: Option<String>,
    /// Asked first, in this order.
    pub hosts: Vec<Host>,
}

/// One `[host."URL"]` table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    pub url: String,
    /// Empty means all of them.
    pub capabilities: Vec<String>,
    /// Whether `skip_verify`, `ca` or `client` is set: containerd then tries TLS even on an `http://` host.
    pub has_tls: bool,
}

impl Host {
    /// Whether containerd asks it what a tag stands for.
    #[must_use]
    pub fn resolves(&self) -> bool {
        let has = |wanted: &str| self.capabilities.iter().any(|c| c.eq_ignore_ascii_case(wanted));
        self.capabilities.is_empty() || (has("pull") && has("resolve"))
    }
}

impl Hosts {
    /// # Errors
    /// When it is not TOML: containerd then ignores the whole file. The text says where and why, on one line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let root = DeTable::parse(text).map_err(|error| syntax(text, &error))?;
        let root = root.get_ref();
        let server = string(root.get("server"));
        let Some(DeValue::Table(tables)) = root.get("host").map(Spanned::get_ref) else {
            return Ok(Self { server, hosts: Vec::new() });
        };
        let mut placed: Vec<_> =
            tables.iter().map(|(url, table)| (url.span().start, host(url.get_ref(), table))).collect();
        placed.sort_by_key(|(place, _)| *place);
        Ok(Self { server, hosts: placed.into_iter().map(|(_, host)| host).collect() })
    }

    /// Whether `url` is among the hosts; a slash at the end makes no difference.
    #[must_use]
    pub fn has(&self, url: &str) -> bool {
        self.position(url).is_some()
    }

    /// The place of `url` among the hosts; 0 is asked first.
    #[must_use]
    pub fn position(&self, url: &str) -> Option<usize> {
        self.hosts.iter().position(|host| host.url.trim_end_matches('/') == url.trim_end_matches('/'))
    }
}

fn syntax(text: &str, error: &toml::de::Error) -> String {
    let offset = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = 1 + text.as_bytes()[..offset].iter().filter(|byte| **byte == b'\n').count();
    format!("line {line}: {}", error.message())
}

fn string(value: Option<&Spanned<DeValue<'_>>>) -> Option<String> {
    match value.map(Spanned::get_ref) {
        Some(DeValue::String(text)) => Some(text.to_string()),
        _ => None,
    }
}

fn host(url: &str, table: &Spanned<DeValue<'_>>) -> Host {
    let mut host = Host { url: url.to_owned(), capabilities: Vec::new(), has_tls: false };
    if let DeValue::Table(table) = table.get_ref() {
        if let Some(DeValue::Array(capabilities)) = table.get("capabilities").map(Spanned::get_ref) {
            host.capabilities = capabilities.iter().filter_map(|value| string(Some(value))).collect();
        }
        host.has_tls = ["skip_verify", "ca", "client"].iter().any(|key| table.contains_key(*key));
    }
    host
}

/// What a `hosts.toml` is to say first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// `http://127.0.0.1:5100`
    pub url: String,
    /// Where the registry is, for a file that does not say so. `None` in `_default`, which stands for all of them.
    pub server: Option<String>,
}

/// What did not exist before, and goes again with the marks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Made {
    pub file: bool,
    /// The directory that the file is in.
    pub directory: bool,
    /// The directory that containerd's `config_path` names.
    pub root: bool,
}

/// Certificates beside a missing `hosts.toml`. containerd reads them only as long as there is none, so a file that is
/// made there has to name them (`docs/hosts.md`, "certificate files in Docker's layout").
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Certificates {
    /// `*.crt`
    pub authorities: Vec<String>,
    /// `*.cert`, and the `*.key` of the same name where there is one.
    pub clients: Vec<(String, Option<String>)>,
}

impl Certificates {
    /// Picks them out of the names in a directory.
    #[must_use]
    pub fn among(names: &[String]) -> Self {
        let mut found = Self::default();
        for name in names {
            if name.ends_with(".crt") {
                found.authorities.push(name.clone());
            } else if let Some(stem) = name.strip_suffix(".cert") {
                let key = format!("{stem}.key");
                found.clients.push((name.clone(), names.contains(&key).then_some(key)));
            }
        }
        found.authorities.sort();
        found.clients.sort();
        found
    }

    fn lines(&self) -> String {
        let mut lines = String::new();
        if !self.authorities.is_empty() {
            let _ = writeln!(lines, "ca = [{}]", quoted(&self.authorities));
        }
        if !self.clients.is_empty() {
            let pair = |(certificate, key): &(String, Option<String>)| match key {
                Some(key) => format!("[{}, {}]", quote(certificate), quote(key)),
                None => quote(certificate),
            };
            let pairs: Vec<_> = self.clients.iter().map(pair).collect();
            let _ = writeln!(lines, "client = [{}]", pairs.join(", "));
        }
        lines
    }
}

/// What came of [`wire`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wired {
    /// It says so already.
    Unchanged,
    /// Somebody wrote the mirror into it; it is theirs.
    ByHand,
    /// The new text.
    Text(String),
}

/// Puts `mirror` before the other hosts of `existing`, in place of what an earlier call put there. `made` is what would
/// be made now; what the marks say was made earlier is kept.
///
/// # Errors
/// Why `existing` cannot be extended, and what to do.
pub fn wire(
    existing: Option<&str>,
    mirror: &Mirror,
    made: Made,
    certificates: &Certificates,
) -> Result<Wired, String> {
    let whole = existing.unwrap_or_default();
    let (foreign, made) = match unwire(whole)? {
        Some(earlier) => (earlier.text, earlier.made),
        None => (whole.to_owned(), made),
    };
    let before = Hosts::parse(&foreign).map_err(|why| {
        format!("it is not valid TOML ({why}), so containerd ignores it: mend it or remove it first")
    })?;
    if before.has(&mirror.url) {
        return Ok(Wired::ByHand);
    }
    let is_bare = before == Hosts::default();
    let table = table(mirror);
    // What containerd would have taken by itself has to be said in a file of its own; an empty one counts as none.
    let carried = if foreign.is_empty() { certificates.lines() } else { String::new() };
    let block = if is_bare { format!("{}{carried}\n{table}", server(mirror)) } else { table };
    let text = insert(&foreign, &block, made, &before, mirror).ok_or_else(|| {
        format!("no place was found in it for [host.{}]: put it first by hand", quote(&mirror.url))
    })?;
    Ok(if existing == Some(text.as_str()) { Wired::Unchanged } else { Wired::Text(text) })
}

/// A text without what [`wire`] put there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unwired {
    pub text: String,
    pub made: Made,
}

/// Takes out what is between the marks; nothing when there are none.
///
/// # Errors
/// When the marks are damaged, so that it cannot be told what is ours.
pub fn unwire(text: &str) -> Result<Option<Unwired>, String> {
    let Some((begin, flags)) = marked_line(text, BEGIN) else { return Ok(None) };
    let Some((end, _)) = marked_line(&text[begin.end..], END) else {
        return Err(format!("the line `{BEGIN}` has no line `{END}` after it: remove by hand what is ours"));
    };
    let has = |word: &str| flags.split([' ', ',', '(', ')']).any(|flag| flag == word);
    let made = Made { file: has("file"), directory: has("directory"), root: has("root") };
    let mut kept = text[..begin.start].to_owned();
    if has("newline") {
        kept.pop();
    }
    kept.push_str(&text[begin.end + end.end..]);
    Ok(Some(Unwired { text: kept, made }))
}

/// The first line that begins with `mark`, with its end, and what it says after the mark.
fn marked_line<'a>(text: &'a str, mark: &str) -> Option<(Range<usize>, &'a str)> {
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        if let Some(rest) = line.strip_prefix(mark) {
            return Some((start..start + line.len(), rest.trim_end()));
        }
        start += line.len();
    }
    None
}

fn server(mirror: &Mirror) -> String {
    mirror.server.as_ref().map_or_else(String::new, |server| format!("server = {}\n", quote(server)))
}

fn table(mirror: &Mirror) -> String {
    format!(
        "[host.{}]\n  capabilities = [\"pull\", \"resolve\"]\n  dial_timeout = \"{DIAL_TIMEOUT}\"\n",
        quote(&mirror.url)
    )
}

/// TOML's tables end where the next one begins, so there is a place for ours before each of them and at the end. The
/// first one where the whole still says what it said, with ours first, is taken.
fn insert(foreign: &str, block: &str, made: Made, before: &Hosts, mirror: &Mirror) -> Option<String> {
    let says_the_same = |text: &str| {
        Hosts::parse(text).is_ok_and(|after| {
            let server_kept = before.server.is_none() || after.server == before.server;
            after.position(&mirror.url) == Some(0) && after.hosts[1..] == before.hosts[..] && server_kept
        })
    };
    let mut start = 0;
    let mut places = Vec::new();
    for line in foreign.split_inclusive('\n') {
        if line.trim_start().starts_with('[') {
            places.push(start);
        }
        start += line.len();
    }
    places.push(foreign.len());
    let texts = places.into_iter().map(|place| {
        let newline = place > 0 && !foreign[..place].ends_with('\n');
        let joint = if newline { "\n" } else { "" };
        let mark = format!("{BEGIN}{}\n", flags(made, newline));
        format!("{}{joint}{mark}{block}{END}\n{}", &foreign[..place], &foreign[place..])
    });
    texts.into_iter().find(|text| says_the_same(text))
}

/// What the first mark remembers for [`unwire`].
fn flags(made: Made, newline: bool) -> String {
    let words =
        [("file", made.file), ("directory", made.directory), ("root", made.root), ("newline", newline)];
    let said: Vec<_> = words.iter().filter(|(_, holds)| *holds).map(|(word, _)| *word).collect();
    if said.is_empty() { String::new() } else { format!(" (made: {})", said.join(", ")) }
}

fn quoted(texts: &[String]) -> String {
    texts.iter().map(|text| quote(text)).collect::<Vec<_>>().join(", ")
}

/// A TOML basic string.
fn quote(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const URL: &str = "http://127.0.0.1:5100";

    fn mirror() -> Mirror {
        Mirror { url: URL.into(), server: Some("https://reg.example".into()) }
    }

    fn wired(existing: Option<&str>) -> String {
        match wire(existing, &mirror(), Made::default(), &Certificates::default()) {
            Ok(Wired::Text(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    fn undone(text: &str) -> String {
        unwire(text).expect("whole marks").expect("marks").text
    }

    #[test]
    fn a_new_file_names_the_registry_and_the_mirror() {
        let made = Made { file: true, directory: true, root: false };
        let Ok(Wired::Text(text)) = wire(None, &mirror(), made, &Certificates::default()) else {
            panic!("a new file")
        };
        let hosts = Hosts::parse(&text).expect("TOML");
        assert_eq!(hosts.server.as_deref(), Some("https://reg.example"));
        assert_eq!(hosts.position(URL), Some(0));
        assert!(hosts.hosts[0].resolves() && !hosts.hosts[0].has_tls);
        assert_eq!(unwire(&text), Ok(Some(Unwired { text: String::new(), made })));
        assert_eq!(
            wire(Some(&text), &mirror(), Made::default(), &Certificates::default()),
            Ok(Wired::Unchanged)
        );
    }

    #[test]
    fn certificates_in_the_directory_stay_in_use() {
        let names = ["ca.crt", "client.cert", "client.key", "lone.cert"].map(String::from);
        let found = Certificates::among(&names);
        let Ok(Wired::Text(text)) = wire(None, &mirror(), Made::default(), &found) else {
            panic!("a new file")
        };
        assert!(text.contains("ca = [\"ca.crt\"]\n"), "{text}");
        assert!(text.contains("client = [[\"client.cert\", \"client.key\"], \"lone.cert\"]\n"), "{text}");
        Hosts::parse(&text).expect("TOML");
    }

    #[test]
    fn foreign_hosts_keep_their_place_behind_ours() {
        for foreign in [
            "server = \"https://a\"\n",
            "# mine\nserver = \"https://a\"",
            "server = \"https://a\"\n\n[host.\"https://b\"]\n  capabilities = [\"pull\"]\n[host.\"https://c\"]\n",
            "ca = [\n  \"a.crt\",\n]\nclient = [\n[\"a.cert\", \"a.key\"],\n]\n[host.\"https://b\"]\n",
            "[host]\n[host.\"https://b\"]\n[host.\"https://b\".header]\nx = \"y\"\n",
            "[host.'https://b']\r\ncapabilities = ['pull']\r\n",
            "",
            "\n\n# nothing here",
        ] {
            let text = wired(Some(foreign));
            assert_eq!(undone(&text), foreign);
            let (before, after) = (Hosts::parse(foreign).unwrap(), Hosts::parse(&text).unwrap());
            assert_eq!(after.hosts[0].url, URL, "{text}");
            assert_eq!(after.hosts[1..], before.hosts[..]);
        }
    }

    #[test]
    fn another_port_replaces_the_old_one() {
        let old = wired(Some("server = \"https://a\""));
        let moved = Mirror { url: "http://127.0.0.1:6100".into(), ..mirror() };
        let Ok(Wired::Text(new)) = wire(Some(&old), &moved, Made::default(), &Certificates::default()) else {
            panic!("a new text")
        };
        assert!(!Hosts::parse(&new).unwrap().has(URL), "{new}");
        assert_eq!(undone(&new), "server = \"https://a\"");
    }

    #[test]
    fn what_is_not_ours_or_not_toml_is_left_alone() {
        let by_hand = "[host.\"http://127.0.0.1:5100/\"]\n";
        let none = Certificates::default();
        assert_eq!(wire(Some(by_hand), &mirror(), Made::default(), &none), Ok(Wired::ByHand));
        let broken = "server = \"https://a\"\n[host.\"b]\n";
        let why = wire(Some(broken), &mirror(), Made::default(), &none).expect_err("broken");
        assert!(why.contains("line 2"), "{why}");
        assert!(unwire(&format!("{BEGIN}\nserver = \"a\"\n")).is_err(), "a mark without its end");
        assert_eq!(unwire("server = \"a\"\n"), Ok(None));
    }

    proptest! {
        #[test]
        fn whatever_was_there_comes_back(
            head in "[a-z #=\"\n]{0,40}",
            hosts in proptest::collection::vec("[a-z]{1,8}", 0..4),
            tail in "(\n|# [a-z]{0,9}| |\r\n){0,3}",
        ) {
            let tables: String = hosts.iter().map(|host| format!("[host.\"https://{host}\"]\n")).collect();
            let foreign = format!("{head}\n{tables}{tail}");
            if let Ok(Wired::Text(text)) = wire(Some(&foreign), &mirror(), Made::default(), &Certificates::default()) {
                prop_assert_eq!(undone(&text), foreign);
            }
        }
    }
}

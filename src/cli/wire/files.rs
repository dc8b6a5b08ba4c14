//! The files of `certs.d`: which one is a registry's, what is to be written, and writing it.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Wish;
use crate::containerd::hosts::{self, Certificates, FILE_NAME, Hosts, Made, Unwired, Wired};
use crate::containerd::roots::{DEFAULT, Found, Roots};

/// Longest `hosts.toml` that is read: containerd's own are some hundred bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

const FILE_MODE: u32 = 0o644;

/// What was done about one registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Change {
    registry: String,
    file: PathBuf,
    pub(super) outcome: Outcome,
    /// Why, where that is not plain.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    Written,
    /// It says so already.
    Unchanged,
    Removed,
    /// Left as it is, and that is wrong.
    Refused,
}

impl Change {
    fn new(registry: &str, file: &Path, outcome: Outcome) -> Self {
        Self { registry: registry.to_owned(), file: file.to_owned(), outcome, reason: None }
    }

    fn because(mut self, reason: impl Into<String>) -> Self {
        self.reason = Some(reason.into());
        self
    }

    fn refused(registry: &str, file: &Path, reason: impl Into<String>) -> Self {
        Self::new(registry, file, Outcome::Refused).because(reason)
    }

    pub(super) const fn is_new(&self) -> bool {
        matches!(self.outcome, Outcome::Written | Outcome::Removed | Outcome::Refused)
    }

    pub(super) fn line(&self, dry_run: bool) -> String {
        let done = match (self.outcome, dry_run) {
            (Outcome::Written, false) => "wrote",
            (Outcome::Written, true) => "would write",
            (Outcome::Removed, false) => "took out of",
            (Outcome::Removed, true) => "would take out of",
            (Outcome::Unchanged, _) => "unchanged",
            (Outcome::Refused, _) => "refused",
        };
        let reason = self.reason.as_ref().map_or_else(String::new, |reason| format!(": {reason}"));
        format!("{done} {} for {}{reason}", self.file.display(), self.registry)
    }
}

/// Wires every wish; each stands for itself, so one refusal does not stop the others.
pub(super) fn wire(roots: &Roots, wishes: &[Wish], has_default: bool, dry_run: bool) -> Vec<Change> {
    let made_root = !roots.first().exists();
    wishes.iter().map(|wish| wire_one(roots, wish, has_default, made_root, dry_run)).collect()
}

fn wire_one(roots: &Roots, wish: &Wish, has_default: bool, made_root: bool, dry_run: bool) -> Change {
    let name = &wish.registry;
    let own = roots.first().join(name);
    let directory = match roots.find(name) {
        Found::Own(directory) => directory,
        Found::Default(default) if name == DEFAULT => default,
        Found::Default(default) if has_default => {
            return Change::new(name, &default.join(FILE_NAME), Outcome::Unchanged)
                .because("_default stands for it");
        }
        Found::Default(default) => match what_default_says(&default) {
            Ok(false) => own,
            Ok(true) => {
                let reason = "_default rules this registry, and a directory of its own would hide what others wrote \
                              there; wire _default itself with --default";
                return Change::refused(name, &default.join(FILE_NAME), reason);
            }
            Err(error) => return Change::refused(name, &default.join(FILE_NAME), error),
        },
        Found::Nothing if has_default && name != DEFAULT => {
            // Only in a dry run: _default comes first, and would be there by now.
            let default = roots.first().join(DEFAULT).join(FILE_NAME);
            return Change::new(name, &default, Outcome::Unchanged).because("_default stands for it");
        }
        Found::Nothing => own,
    };
    let file = directory.join(FILE_NAME);
    match prepare(&file, wish, made_root) {
        Ok(Wired::Unchanged) => Change::new(name, &file, Outcome::Unchanged),
        Ok(Wired::ByHand) => {
            Change::new(name, &file, Outcome::Unchanged).because("the mirror is in it already")
        }
        Ok(Wired::Text(_)) if dry_run => Change::new(name, &file, Outcome::Written),
        Ok(Wired::Text(text)) => match write(&file, &text) {
            Ok(()) => Change::new(name, &file, Outcome::Written),
            Err(error) => Change::refused(name, &file, format!("cannot write it: {error}")),
        },
        Err(reason) => Change::refused(name, &file, reason),
    }
}

fn prepare(file: &Path, wish: &Wish, made_root: bool) -> Result<Wired, String> {
    let directory = file.parent().unwrap_or_else(|| Path::new("/"));
    let existing = read(file)?;
    let made = Made { file: existing.is_none(), directory: !directory.exists(), root: made_root };
    hosts::wire(existing.as_deref(), &wish.mirror, made, &certificates(directory))
}

/// Whether `_default` holds anything that is not ours.
fn what_default_says(default: &Path) -> Result<bool, String> {
    let text = read(&default.join(FILE_NAME))?.unwrap_or_default();
    let foreign = hosts::unwire(&text)?.map_or(text, |unwired| unwired.text);
    let says = Hosts::parse(&foreign).is_ok_and(|hosts| hosts != Hosts::default());
    Ok(says || certificates(default) != Certificates::default())
}

fn certificates(directory: &Path) -> Certificates {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    Certificates::among(&names)
}

/// Takes our marks out of every file below `roots`, of whatever registry, so that it works when the configuration that
/// wired them is gone.
pub(super) fn unwire(roots: &Roots, registries: &[String], dry_run: bool) -> Vec<Change> {
    let mut changes = Vec::new();
    for root in roots.paths() {
        let mut made_root = false;
        for (name, file) in files_below(root) {
            if !registries.is_empty() && !registries.contains(&name) {
                continue;
            }
            match unwire_one(&file, dry_run) {
                Ok(None) => {}
                Ok(Some(made)) => {
                    made_root |= made.root;
                    changes.push(Change::new(&name, &file, Outcome::Removed));
                }
                Err(reason) => changes.push(Change::refused(&name, &file, reason)),
            }
        }
        if made_root && !dry_run {
            // Stays when something else is in it by now.
            let _ = fs::remove_dir(root);
        }
    }
    changes
}

fn files_below(root: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    let mut files: Vec<_> = entries
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path().join(FILE_NAME))))
        .filter(|(_, file)| file.is_file())
        .collect();
    files.sort();
    files
}

fn unwire_one(file: &Path, dry_run: bool) -> Result<Option<Made>, String> {
    let Some(text) = read(file)? else { return Ok(None) };
    let Some(Unwired { text, made }) = hosts::unwire(&text)? else { return Ok(None) };
    if dry_run {
        return Ok(Some(made));
    }
    let undone = if made.file && text.trim().is_empty() { remove(file, made) } else { write(file, &text) };
    undone.map(|()| Some(made)).map_err(|error| format!("cannot undo it: {error}"))
}

fn remove(file: &Path, made: Made) -> io::Result<()> {
    fs::remove_file(file)?;
    if let Some(directory) = file.parent().filter(|_| made.directory) {
        // Stays when something else is in it by now.
        let _ = fs::remove_dir(directory);
    }
    Ok(())
}

/// Nothing when there is no such file.
fn read(file: &Path) -> Result<Option<String>, String> {
    match fs::metadata(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Ok(found) if found.len() > FILE_BYTES_MAX => return Err("it is longer than any hosts.toml".into()),
        _ => {}
    }
    fs::read_to_string(file).map(Some).map_err(|error| format!("cannot read it: {error}"))
}

/// Writes beside the file and renames, so that containerd, which reads it at every pull, sees the old text or the new
/// one. Owner and mode stay; a link stays a link.
fn write(file: &Path, text: &str) -> io::Result<()> {
    let target = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let directory = target.parent().unwrap_or_else(|| Path::new("/"));
    fs::create_dir_all(directory)?;
    let temporary = directory.join(format!(".{FILE_NAME}.windlass"));
    let written = (|| {
        // What a killed run left is in nobody's use.
        let mut new =
            OpenOptions::new().write(true).create(true).truncate(true).mode(FILE_MODE).open(&temporary)?;
        match fs::metadata(&target) {
            Ok(old) => {
                new.set_permissions(old.permissions())?;
                fchown(&new, Some(old.uid()), Some(old.gid()))?;
            }
            // Whatever the umask: containerd and its people read it.
            Err(_) => new.set_permissions(Permissions::from_mode(FILE_MODE))?,
        }
        new.write_all(text.as_bytes())?;
        new.sync_all()?;
        fs::rename(&temporary, &target)?;
        fs::File::open(directory)?.sync_all()
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::containerd::hosts::Mirror;

    const URL: &str = "http://127.0.0.1:5100";

    fn wish(registry: &str) -> Wish {
        let server = (registry != DEFAULT).then(|| format!("https://{registry}"));
        Wish { registry: registry.into(), mirror: Mirror { url: URL.into(), server } }
    }

    fn outcomes(changes: &[Change]) -> Vec<Outcome> {
        changes.iter().map(|change| change.outcome).collect()
    }

    /// Every path below `root` with its mode and, for a file, its bytes.
    fn picture(root: &Path) -> BTreeMap<PathBuf, (u32, Option<Vec<u8>>)> {
        let mut picture = BTreeMap::new();
        let mut left = vec![root.to_owned()];
        while let Some(path) = left.pop() {
            let Ok(found) = fs::symlink_metadata(&path) else { continue };
            if found.is_dir() {
                left.extend(
                    fs::read_dir(&path).expect("readable").map(|entry| entry.expect("an entry").path()),
                );
            }
            let bytes = found.is_file().then(|| fs::read(&path).expect("readable"));
            picture.insert(path, (found.mode(), bytes));
        }
        picture
    }

    fn put(path: &Path, text: &str, mode: u32) {
        fs::create_dir_all(path.parent().expect("below a root")).expect("writable");
        fs::write(path, text).expect("writable");
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("ours");
    }

    #[test]
    fn a_directory_with_foreign_entries_is_the_same_after_unwire() {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let (one, two) = (scratch.path().join("one"), scratch.path().join("two"));
        let roots: Roots = format!("{}:{}", one.display(), two.display()).parse().expect("two roots");
        put(&one.join("a.example/hosts.toml"), "server = \"https://a.example\"\n[host.\"https://m\"]", 0o600);
        put(&one.join("b.example/ca.crt"), "a certificate", 0o644);
        put(&one.join("c.example/hosts.toml"), "", 0o644);
        fs::create_dir_all(one.join("d.example")).expect("writable");
        put(&two.join("e.example:5000/hosts.toml"), "# only a comment", 0o640);
        put(&one.join("z.example/hosts.toml"), "[host.\"https://theirs\"]\n", 0o644);
        let before = picture(scratch.path());

        let names = ["a.example", "b.example", "c.example", "d.example", "e.example:5000", "new.example"];
        let wishes: Vec<_> = names.iter().map(|name| wish(name)).collect();
        let would = wire(&roots, &wishes, false, true);
        assert_eq!(picture(scratch.path()), before, "a dry run writes nothing");
        assert_eq!(wire(&roots, &wishes, false, false), would);
        assert_eq!(outcomes(&would), [Outcome::Written; 6]);
        assert_eq!(outcomes(&wire(&roots, &wishes, false, false)), [Outcome::Unchanged; 6]);
        for name in names {
            let Found::Own(directory) = roots.find(name) else { panic!("{name} has a directory") };
            let text = fs::read_to_string(directory.join(FILE_NAME)).expect("a file");
            assert_eq!(Hosts::parse(&text).expect("TOML").position(URL), Some(0), "{text}");
        }
        assert!(
            fs::read_to_string(one.join("b.example/hosts.toml"))
                .expect("a file")
                .contains("ca = [\"ca.crt\"]")
        );

        assert_eq!(outcomes(&unwire(&roots, &[], false)), [Outcome::Removed; 6]);
        assert_eq!(picture(scratch.path()), before);
        assert_eq!(unwire(&roots, &[], false), []);
    }

    #[test]
    fn a_root_that_was_made_goes_again() {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let root = scratch.path().join("certs.d");
        let roots: Roots = root.display().to_string().parse().expect("a root");
        wire(&roots, &[wish("a"), wish("b")], false, false);
        unwire(&roots, &["a".into()], false);
        assert!(root.join("b").exists() && !root.join("a").exists());
        wire(&roots, &[wish("a")], false, false);
        unwire(&roots, &[], false);
        assert!(!root.exists());
    }

    #[test]
    fn what_rules_a_registry_by_default_is_not_hidden() {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let roots: Roots = scratch.path().display().to_string().parse().expect("a root");
        put(&scratch.path().join("_default/hosts.toml"), "[host.\"https://corporate\"]\n", 0o644);
        let before = picture(scratch.path());
        assert_eq!(outcomes(&wire(&roots, &[wish("a")], false, false)), [Outcome::Refused]);
        let both = [wish(DEFAULT), wish("a")];
        assert_eq!(outcomes(&wire(&roots, &both, true, false)), [Outcome::Written, Outcome::Unchanged]);
        assert!(!scratch.path().join("a").exists(), "_default stands for it");
        unwire(&roots, &[], false);
        assert_eq!(picture(scratch.path()), before);
    }

    #[test]
    fn a_broken_file_is_refused_and_the_others_are_wired() {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let roots: Roots = scratch.path().display().to_string().parse().expect("a root");
        put(&scratch.path().join("a/hosts.toml"), "server = \n", 0o644);
        let changes = wire(&roots, &[wish("a"), wish("b")], false, false);
        assert_eq!(outcomes(&changes), [Outcome::Refused, Outcome::Written]);
        assert!(changes[0].line(false).contains("line 1"), "{}", changes[0].line(false));
    }
}

//! A disk as a power cut leaves it: what was synced is there, of the rest any part that a file system may have written.
//!
//! The rules are weaker than those of ext4 and XFS, so that what holds here holds there: of a file's unsynced changes
//! any subset survives, each write by sectors, and a new sector that does not may show what some other file had there
//! before; names change in the order of the calls within each directory, and a
//! rename is one change of both of its directories; syncing a file does not make its name durable.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::content::ByteRange;
use crate::store::disk::trial::Event;

const SECTOR: usize = 512;

type Id = u64;

/// Files and directories, live and durable, after a prefix of a record.
#[derive(Clone, Debug)]
pub(super) struct Medium {
    root: PathBuf,
    next: Id,
    files: BTreeMap<Id, FileState>,
    by_inode: HashMap<u64, Id>,
    live: Names,
    durable: Names,
    pending: Vec<Rename>,
    /// What short writes wrote, of whatever file: what a sector may hold that was somebody else's.
    stale: VecDeque<Vec<u8>>,
}

/// Enough for the sidecars of several contents.
const STALE_MAX: usize = 64;

#[derive(Clone, Debug, Default)]
struct FileState {
    durable: Vec<u8>,
    pending: Vec<Change>,
}

#[derive(Clone, Debug)]
enum Change {
    Write(usize, Vec<u8>),
    Resize(usize),
    Punch(usize, usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Dir(Id),
    File(Id),
}

/// Entries of every directory.
#[derive(Clone, Debug, Default)]
struct Names(BTreeMap<Id, BTreeMap<OsString, Node>>);

/// A name that goes, a name that comes, or both at once.
#[derive(Clone, Debug)]
struct Rename {
    gone: Option<(Id, OsString)>,
    come: Option<(Id, OsString, Node)>,
}

const ROOT: Id = 0;

/// How much of what was not synced survives a crash.
#[derive(Clone, Copy, Debug)]
pub(super) enum Luck {
    Nothing,
    Everything,
    /// By a coin, which this seeds.
    Some(u64),
    /// Names and lengths, and in each sector that a file used for the first time what some other file had there, as a
    /// coin chooses.
    Stale(u64),
}

/// Files, and directories (`None`), by path; a directory comes before what is in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Remains(BTreeMap<PathBuf, Option<Vec<u8>>>);

impl Remains {
    pub(super) fn write_below(&self, target: &Path) {
        for (path, file) in &self.0 {
            let path = target.join(path);
            match file {
                None => fs::create_dir(&path).unwrap(),
                Some(bytes) => fs::write(&path, bytes).unwrap(),
            }
        }
    }

    pub(super) fn file(&self, path: &str) -> Option<&[u8]> {
        self.0.get(Path::new(path))?.as_deref()
    }
}

struct Coin(u64);

impl Coin {
    /// xorshift64*: good enough to choose sectors, and the same everywhere.
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn heads(&mut self) -> bool {
        self.next() >> 63 == 1
    }
}

impl Medium {
    /// Nothing below `root`, which is durable itself.
    pub(super) fn new(root: &Path) -> Self {
        let names = Names(BTreeMap::from([(ROOT, BTreeMap::new())]));
        Self {
            root: root.to_owned(),
            next: ROOT + 1,
            files: BTreeMap::new(),
            by_inode: HashMap::new(),
            live: names.clone(),
            durable: names,
            pending: Vec::new(),
            stale: VecDeque::new(),
        }
    }

    pub(super) fn apply(&mut self, event: &Event) {
        match event {
            Event::Opened { path, inode } => self.opened(path, *inode),
            Event::Wrote { inode, at, bytes } => {
                if bytes.len() <= SECTOR {
                    self.stale.truncate(STALE_MAX - 1);
                    self.stale.push_front(bytes.clone());
                }
                self.change(*inode, Change::Write(index(*at), bytes.clone()));
            }
            Event::Resized { inode, bytes } => self.change(*inode, Change::Resize(index(*bytes))),
            Event::Punched { inode, range } => {
                self.change(*inode, Change::Punch(index(range.start()), index(range.end())));
            }
            Event::Synced { inode } => {
                if let Some(file) = self.by_inode.get(inode).and_then(|id| self.files.get_mut(id)) {
                    let pending = std::mem::take(&mut file.pending);
                    pending.iter().for_each(|change| change.apply(&mut file.durable));
                }
            }
            Event::SyncedDir { path } => {
                let Some((Node::Dir(dir), ..)) = self.find(path) else { return };
                self.sync_dir(dir);
            }
            Event::MadeDir { path } => {
                let id = self.fresh_id();
                self.live.0.insert(id, BTreeMap::new());
                self.durable.0.insert(id, BTreeMap::new());
                self.link(path, Node::Dir(id));
            }
            Event::Renamed { from, to } => {
                let Some((node, dir, name)) = self.find(from) else { return };
                let Some((to_dir, to_name)) = self.place(to) else { return };
                self.rename(Rename { gone: Some((dir, name)), come: Some((to_dir, to_name, node)) });
            }
            Event::Removed { path } => {
                let Some((_, dir, name)) = self.find(path) else { return };
                self.rename(Rename { gone: Some((dir, name)), come: None });
            }
        }
    }

    /// What a crash now would leave.
    pub(super) fn crash(&self, luck: Luck) -> Remains {
        let mut coin = Coin(match luck {
            Luck::Some(seed) | Luck::Stale(seed) => seed | 1,
            Luck::Nothing | Luck::Everything => 1,
        });
        let mut names = self.durable.clone();
        let mut stopped: BTreeSet<Id> = BTreeSet::new();
        for change in &self.pending {
            let lives = match luck {
                Luck::Nothing => false,
                Luck::Everything | Luck::Stale(_) => true,
                Luck::Some(_) => !coin.next().is_multiple_of(4),
            };
            if lives && change.dirs().all(|dir| !stopped.contains(&dir)) {
                names.apply(change);
            } else {
                stopped.extend(change.dirs());
            }
        }
        let mut remains = Remains::default();
        self.collect(&names, (ROOT, Path::new("")), luck, &mut coin, &mut remains);
        remains
    }

    fn collect(
        &self,
        names: &Names,
        (dir, at): (Id, &Path),
        luck: Luck,
        coin: &mut Coin,
        remains: &mut Remains,
    ) {
        for (name, node) in names.0.get(&dir).into_iter().flatten() {
            let path = at.join(name);
            match node {
                Node::Dir(id) => {
                    remains.0.insert(path.clone(), None);
                    self.collect(names, (*id, &path), luck, coin, remains);
                }
                Node::File(id) => {
                    remains.0.insert(path, Some(self.files[id].after_crash(luck, coin, &self.stale)));
                }
            }
        }
    }

    fn opened(&mut self, path: &Path, inode: u64) {
        if let Some((Node::File(id), ..)) = self.find(path) {
            self.by_inode.insert(inode, id);
            return;
        }
        let id = self.fresh_id();
        self.files.insert(id, FileState::default());
        self.by_inode.insert(inode, id);
        self.link(path, Node::File(id));
    }

    fn change(&mut self, inode: u64, change: Change) {
        if let Some(file) = self.by_inode.get(&inode).and_then(|id| self.files.get_mut(id)) {
            file.pending.push(change);
        }
    }

    fn link(&mut self, path: &Path, node: Node) {
        if let Some((dir, name)) = self.place(path) {
            self.rename(Rename { gone: None, come: Some((dir, name, node)) });
        }
    }

    fn rename(&mut self, change: Rename) {
        self.live.apply(&change);
        self.pending.push(change);
    }

    /// Everything that touches `dir` becomes durable, and what other directories saw before it.
    fn sync_dir(&mut self, dir: Id) {
        let mut wanted = BTreeSet::from([dir]);
        let mut kept = Vec::new();
        for change in std::mem::take(&mut self.pending).into_iter().rev() {
            if change.dirs().any(|touched| wanted.contains(&touched)) {
                wanted.extend(change.dirs());
                kept.push((true, change));
            } else {
                kept.push((false, change));
            }
        }
        for (durable, change) in kept.into_iter().rev() {
            if durable {
                self.durable.apply(&change);
            } else {
                self.pending.push(change);
            }
        }
    }

    fn fresh_id(&mut self) -> Id {
        self.next += 1;
        self.next
    }

    /// The directory and the name in it that `path` stands for; none outside the root.
    fn place(&self, path: &Path) -> Option<(Id, OsString)> {
        let parent = path.parent()?;
        let name = path.file_name()?.to_owned();
        if parent == self.root {
            return Some((ROOT, name));
        }
        match self.find(parent)? {
            (Node::Dir(id), ..) => Some((id, name)),
            (Node::File(_), ..) => None,
        }
    }

    fn find(&self, path: &Path) -> Option<(Node, Id, OsString)> {
        if path == self.root {
            return Some((Node::Dir(ROOT), ROOT, OsString::new()));
        }
        let (dir, name) = self.place(path)?;
        let node = *self.live.0.get(&dir)?.get(&name)?;
        Some((node, dir, name))
    }
}

impl FileState {
    fn after_crash(&self, luck: Luck, coin: &mut Coin, stale: &VecDeque<Vec<u8>>) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        for change in &self.pending {
            match (luck, change) {
                (Luck::Nothing, _) => {}
                (Luck::Everything, change) => change.apply(&mut bytes),
                (Luck::Some(_), Change::Write(at, new)) => tear(&mut bytes, *at, new, coin),
                (Luck::Stale(_), Change::Write(at, new)) => grow_old(&mut bytes, *at, new.len(), coin, stale),
                (Luck::Stale(_), change) => change.apply(&mut bytes),
                (Luck::Some(_), change) => {
                    if coin.heads() {
                        change.apply(&mut bytes);
                    }
                }
            }
        }
        bytes
    }
}

/// Each sector of the write makes it or does not.
fn tear(bytes: &mut Vec<u8>, at: usize, new: &[u8], coin: &mut Coin) {
    let mut from = 0;
    while from < new.len() {
        let to = (from + SECTOR - (at + from) % SECTOR).min(new.len());
        if coin.heads() {
            Change::Write(at + from, new[from..to].to_vec()).apply(bytes);
        }
        from = to;
    }
}

/// The file is as long as the write made it. What was no part of it before is as an earlier user of the sector left it.
fn grow_old(bytes: &mut Vec<u8>, at: usize, len: usize, coin: &mut Coin, stale: &VecDeque<Vec<u8>>) {
    let end = bytes.len();
    for start in (at..at + len).filter(|start| start.is_multiple_of(SECTOR) && *start >= end) {
        let number = usize::try_from(coin.next() % stale.len().max(1) as u64).unwrap();
        let old = stale.get(number).map(Vec::as_slice).unwrap_or_default();
        Change::Write(start, old[..old.len().min(at + len - start)].to_vec()).apply(bytes);
    }
    if bytes.len() < at + len {
        bytes.resize(at + len, 0);
    }
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(at, new) => {
                if bytes.len() < at + new.len() {
                    bytes.resize(at + new.len(), 0);
                }
                bytes[*at..at + new.len()].copy_from_slice(new);
            }
            Self::Resize(len) => bytes.resize(*len, 0),
            Self::Punch(from, to) => {
                let end = bytes.len();
                bytes[(*from).min(end)..(*to).min(end)].fill(0);
            }
        }
    }
}

impl Names {
    fn apply(&mut self, change: &Rename) {
        if let Some((dir, name)) = &change.gone
            && let Some(entries) = self.0.get_mut(dir)
        {
            entries.remove(name);
        }
        if let Some((dir, name, node)) = &change.come
            && let Some(entries) = self.0.get_mut(dir)
        {
            entries.insert(name.clone(), *node);
        }
    }
}

impl Rename {
    fn dirs(&self) -> impl Iterator<Item = Id> + '_ {
        let gone = self.gone.as_ref().map(|(dir, _)| *dir);
        let come = self.come.as_ref().map(|(dir, ..)| *dir);
        gone.into_iter().chain(come)
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

#[test]
fn only_what_was_synced_is_sure() {
    let root = Path::new("/r");
    let mut medium = Medium::new(root);
    let file = root.join("f");
    let range = ByteRange::new(0, 2);
    for event in [
        Event::Opened { path: file.clone(), inode: 7 },
        Event::Wrote { inode: 7, at: 0, bytes: b"abcd".to_vec() },
        Event::Synced { inode: 7 },
        Event::Punched { inode: 7, range },
    ] {
        medium.apply(&event);
    }
    let left = |medium: &Medium, luck| medium.crash(luck).file("f").map(<[u8]>::to_vec);
    assert_eq!(left(&medium, Luck::Nothing), None, "its name was not synced");
    assert_eq!(left(&medium, Luck::Everything).unwrap(), b"\0\0cd");
    medium.apply(&Event::SyncedDir { path: root.to_owned() });
    assert_eq!(left(&medium, Luck::Nothing).unwrap(), b"abcd");
    medium.apply(&Event::Renamed { from: file, to: root.join("g") });
    assert!(left(&medium, Luck::Nothing).is_some() && left(&medium, Luck::Everything).is_none());
}

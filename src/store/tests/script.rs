//! A scripted workload of more than 200 operations, with what each of them promised to outlive.
//!
//! It fills six contents where four fit, seals, pins, removes, reads, restarts and kills. `crash` cuts the power after
//! each of its writes and syncs; `faults` fails each of its calls.

use std::collections::BTreeMap;
use std::fs;

use super::*;

pub(super) const CONTENTS: usize = 6;
const CHUNKS: u32 = 3;
const SIZE: usize = 25_000;
/// Four of six contents fit.
pub(super) const BUDGET: u64 = 4 * SIZE as u64;

pub(super) const ROOM_FOR_ALL: u64 = (CONTENTS * SIZE) as u64;

#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Put(usize, u32),
    Seal(usize),
    Remove(usize, u32),
    Pin(usize, bool),
    Read(usize, u32),
    Flush,
    CoolDown,
    Restart,
    Kill,
}

/// The same steps each time: contents are filled and sealed in turns, everything else happens in between.
pub(super) fn steps() -> Vec<Step> {
    let mut steps = Vec::new();
    for round in 0..34 {
        let content = round * 5 % CONTENTS;
        let other = (content + 1 + round / 3) % CONTENTS;
        for chunk in [1, 0, 2] {
            // Every fourth is left for later.
            if round % 4 != 3 || chunk != 2 {
                steps.push(Step::Put(content, chunk));
            }
        }
        steps.push(Step::Seal(content));
        steps.push(Step::Read(content, 1));
        match round % 9 {
            0 => steps.push(Step::Pin(content, round % 2 == 0)),
            1 => steps.push(Step::Pin(other, false)),
            2 => steps.push(Step::Flush),
            3 => steps.extend([Step::Remove(content, 0), Step::Put(content, 0), Step::Seal(content)]),
            4 => steps.extend([Step::Put(other, 1), Step::Kill, Step::Read(content, 0)]),
            5 => steps.push(Step::CoolDown),
            6 => steps.extend([Step::Remove(other, 1), Step::Put(other, 1)]),
            7 => steps.extend([Step::Restart, Step::Read(other, 2)]),
            _ => steps.extend([Step::Read(other, 0), Step::Put(other, 2)]),
        }
    }
    steps
}

/// Something that is true of every start after event `from` of the record and before event `until`.
#[derive(Clone, Debug)]
pub(super) struct Promise {
    pub content: usize,
    pub what: What,
    pub from: usize,
    pub until: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Sealed,
    Pinned,
}

/// The files of an index, as a clean end left them.
pub(super) type IndexFiles = Vec<(PathBuf, Vec<u8>)>;

/// The workload under way.
pub(super) struct Script {
    pub rig: Rig,
    store: Option<Store>,
    pub data: Vec<Vec<u8>>,
    pub promises: Vec<Promise>,
    /// By the text of the mark that vouches for each.
    pub indexes: BTreeMap<Vec<u8>, IndexFiles>,
}

impl Script {
    /// Nothing is opened yet.
    pub(super) fn new() -> Self {
        let rig = Rig { budget: BUDGET, ..Rig::new() };
        let data = (0..CONTENTS).map(|content| bytes(content as u64, SIZE)).collect();
        Self { rig, store: None, data, promises: Vec::new(), indexes: BTreeMap::new() }
    }

    pub(super) fn key(&self, content: usize) -> ContentKey {
        blob(&self.data[content]).key(CHUNK)
    }

    pub(super) async fn run(&mut self) {
        self.open();
        for step in steps() {
            self.step(step).await;
        }
        self.store = None;
    }

    /// Until it works: the fault under test may hit it, and ends by itself.
    fn open(&mut self) {
        for _ in 0..100 {
            let faults = self.rig.disk.trial.faults_injected();
            match self.rig.try_open() {
                Ok(store) => {
                    self.store = Some(store);
                    return;
                }
                Err(error) => {
                    assert!(self.rig.disk.trial.faults_injected() > faults, "without a fault: {error}");
                }
            }
        }
        panic!("the store does not open any more");
    }

    async fn step(&mut self, step: Step) {
        let began = self.rig.disk.trial.recorded();
        let faults = self.rig.disk.trial.faults_injected();
        self.perform(step).await;
        let unhurt = self.rig.disk.trial.faults_injected() == faults;
        self.withdraw(step, began, unhurt);
    }

    async fn perform(&mut self, step: Step) {
        let faults = self.rig.disk.trial.faults_injected();
        let unhurt = |script: &Self| script.rig.disk.trial.faults_injected() == faults;
        match step {
            Step::Put(content, chunk) => {
                let Some(entry) = self.entry(content, faults) else { return };
                match put(&entry, &self.data[content], chunk).await {
                    Ok(_) => assert!(entry.holds(ChunkIndex(chunk)) || !unhurt(self)),
                    Err(InsertError::NoSpace { .. }) => {}
                    Err(other) => panic!("{step:?}: {other}"),
                }
            }
            Step::Seal(content) => {
                let Some(entry) = self.entry(content, faults) else { return };
                let full = entry.have().is_full(&entry.layout());
                let sealed = entry.seal().await;
                assert!(sealed.is_ok() == full || !unhurt(self), "{step:?}: {sealed:?}");
                if sealed.is_ok() {
                    self.promise(content, What::Sealed);
                }
            }
            Step::Remove(content, chunk) => {
                let Some(entry) = self.entry(content, faults) else { return };
                entry.remove(&[ChunkIndex(chunk)].into_iter().collect()).await;
                assert!(!entry.holds(ChunkIndex(chunk)));
            }
            Step::Pin(content, pinned) => {
                let Some(entry) = self.entry(content, faults) else { return };
                if entry.set_pin(if pinned { Pin::Forever } else { Pin::Not }).await.is_ok() && pinned {
                    self.promise(content, What::Pinned);
                }
            }
            Step::Read(content, chunk) => self.read(content, chunk, faults).await,
            Step::Flush => drop(self.store().flush()),
            Step::CoolDown => self.store().handle.shared.cool_down(now_ms() + 120_000),
            Step::Restart => {
                let closed = self.store().close();
                assert!(closed.is_ok() || !unhurt(self), "{closed:?}");
                self.store = None;
                self.keep_index();
                self.open();
            }
            Step::Kill => {
                self.store = None;
                self.open();
            }
        }
    }

    /// Whatever else happens, what is held is read unless the disk refuses just now, and what is read is right.
    async fn read(&self, content: usize, chunk: u32, faults: u64) {
        let Some(entry) = self.entry(content, faults) else { return };
        let held = entry.holds(ChunkIndex(chunk));
        let range = entry.layout().chunk_range(ChunkIndex(chunk));
        match entry.read(range).await {
            Ok(read) => assert_eq!(read, expected(&self.data[content], range)),
            Err(error) => {
                let unhurt = self.rig.disk.trial.faults_injected() == faults;
                assert!(!(held && unhurt), "content {content}, chunk {chunk}: {error}");
            }
        }
    }

    fn entry(&self, content: usize, faults: u64) -> Option<Arc<Entry>> {
        let data = &self.data[content];
        match self.store().create(&blob(data), layout(data)) {
            Ok(entry) => Some(entry),
            Err(error) => {
                assert!(self.rig.disk.trial.faults_injected() > faults, "without a fault: {error}");
                None
            }
        }
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn promise(&mut self, content: usize, what: What) {
        if !self.active().any(|promise| promise.content == content && promise.what == what) {
            let from = self.rig.disk.trial.recorded();
            self.promises.push(Promise { content, what, from, until: usize::MAX });
        }
    }

    fn active(&self) -> impl Iterator<Item = &Promise> {
        self.promises.iter().filter(|promise| promise.until == usize::MAX)
    }

    /// Ends promises that the step took back: by removing, unpinning or evicting, or because a fault hit a read.
    fn withdraw(&mut self, step: Step, began: usize, unhurt: bool) {
        for content in 0..CONTENTS {
            let key = self.key(content);
            let entry = self.store().get(&key);
            let sealed = entry.as_ref().is_some_and(|entry| entry.is_sealed());
            let pinned = entry.as_ref().is_some_and(|entry| entry.is_pinned());
            let asked = match step {
                Step::Remove(at, _) => at == content,
                Step::Pin(at, pinned) => at == content && !pinned,
                _ => false,
            };
            for promise in self.promises.iter_mut().filter(|p| p.until == usize::MAX && p.content == content)
            {
                let kept = if promise.what == What::Sealed { sealed } else { pinned };
                if !kept {
                    assert!(asked || entry.is_none() || !unhurt, "{step:?} broke {promise:?}");
                    promise.until = began;
                }
            }
        }
    }

    fn keep_index(&mut self) {
        let Ok(mark) = fs::read(self.rig.data_dir().join("clean")) else { return };
        let mut files = IndexFiles::new();
        collect(&self.rig.data_dir().join("index"), Path::new(""), &mut files);
        self.indexes.insert(mark, files);
    }

    /// After everything: the disk is well again, and the store does all that a store does.
    pub(super) async fn check_recovery(&mut self) {
        self.rig.disk.trial.clear();
        // What a fault kept from being recorded as gone is back, and takes room.
        self.rig.budget = ROOM_FOR_ALL;
        self.open();
        for content in 0..CONTENTS {
            let promised: Vec<What> = self
                .active()
                .filter(|promise| promise.content == content)
                .map(|promise| promise.what)
                .collect();
            check_content(self.store(), &self.data[content], &promised).await;
        }
        for content in 0..CONTENTS {
            if let Some(entry) = self.store().get(&self.key(content)) {
                entry.set_pin(Pin::Not).await.unwrap();
            }
        }
        for content in [0, 3] {
            let data = self.data[content].clone();
            let entry = put_sealed(self.store(), &blob(&data), &data).await;
            assert_eq!(get_all(&entry).await.unwrap(), data);
        }
        self.store().close().unwrap();
        self.open();
        assert!(!self.store().handle.shared.after_crash);
        for content in [0, 3] {
            check_content(self.store(), &self.data[content], &[What::Sealed]).await;
        }
        self.store = None;
    }
}

fn collect(dir: &Path, below: &Path, files: &mut IndexFiles) {
    for file in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = below.join(file.file_name());
        if file.path().is_dir() {
            collect(&file.path(), &name, files);
        } else {
            files.push((name, fs::read(file.path()).unwrap()));
        }
    }
}

fn expected(data: &[u8], range: ByteRange) -> Bytes {
    let (start, end) = (usize::try_from(range.start()).unwrap(), usize::try_from(range.end()).unwrap());
    Bytes::copy_from_slice(&data[start..end])
}

/// What a store claims of a content is there and right, before and after doubts were settled, and it keeps `promised`.
pub(super) async fn check_content(store: &Store, data: &[u8], promised: &[What]) {
    let key = blob(data).key(CHUNK);
    let Some(entry) = store.get(&key) else {
        assert!(promised.is_empty(), "a content is gone that was promised as {promised:?}");
        return;
    };
    for settled in [false, true] {
        if settled {
            entry.settle().await;
            assert!(!entry.is_in_doubt());
        }
        for chunk in entry.have().iter() {
            let range = entry.layout().chunk_range(chunk);
            let read = entry.read(range).await;
            let read = read.unwrap_or_else(|error| panic!("chunk {} is claimed: {error}", chunk.0));
            assert_eq!(read, expected(data, range), "chunk {}", chunk.0);
        }
    }
    assert!(!entry.is_sealed() || entry.have().len() == CHUNKS);
    for what in promised {
        match what {
            What::Sealed => assert!(entry.is_sealed(), "a sealed content is not sealed any more"),
            What::Pinned => assert!(entry.is_pinned(), "a pinned content is not pinned any more"),
        }
    }
}

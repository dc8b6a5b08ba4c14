//! A scripted workload of more than 200 operations, with what each of them promised to outlive.
//!
//! It fills six contents where four fit, seals, pins, removes, reads, restarts and kills. `crash` cuts the power after
//! each of its writes and syncs; `faults` fails each of its calls, and begins for each at the start of the store before:
//! a store carries nothing over a start but what lies on the disk.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;

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
    /// A file of its own gets the content's bytes, by a link where it can: what follows must not change it.
    Place(usize),
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
            3 => steps.extend([
                Step::Place(other),
                Step::Remove(other, 0),
                Step::Put(other, 0),
                Step::Seal(other),
                Step::Remove(content, 0),
                Step::Put(content, 0),
            ]),
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// Of `data`, in its order: hashing it anew for each look would take half of a run's time.
    ids: Vec<ContentId>,
    keys: Vec<ContentKey>,
    /// The step under way.
    at: usize,
    /// Where the store was closed, if somebody wants to begin there.
    stops: Option<Vec<Stop>>,
    pub promises: Vec<Promise>,
    /// By the text of the mark that vouches for each.
    pub indexes: BTreeMap<Vec<u8>, IndexFiles>,
}

impl Script {
    /// Nothing is opened yet.
    pub(super) fn new() -> Self {
        let rig = Rig { budget: BUDGET, ..Rig::new() };
        let data: Vec<Vec<u8>> = (0..CONTENTS).map(|content| bytes(content as u64, SIZE)).collect();
        let ids: Vec<ContentId> = data.iter().map(|data| blob(data)).collect();
        let keys = ids.iter().map(|id| id.key(CHUNK)).collect();
        Self {
            rig,
            store: None,
            data,
            ids,
            keys,
            at: 0,
            stops: None,
            promises: Vec::new(),
            indexes: BTreeMap::new(),
        }
    }

    pub(super) fn key(&self, content: usize) -> ContentKey {
        self.keys[content]
    }

    pub(super) async fn run(&mut self) {
        self.run_steps(0..steps().len()).await;
    }

    pub(super) async fn run_steps(&mut self, range: Range<usize>) {
        self.open();
        for (number, step) in steps().into_iter().enumerate().take(range.end).skip(range.start) {
            self.at = number;
            self.step(step).await;
        }
        self.store = None;
        let placed =
            (0..CONTENTS).filter_map(|content| Some((content, fs::read(self.placed(content)).ok()?)));
        for (content, bytes) in placed {
            assert_eq!(bytes, self.data[content], "what was placed has changed");
        }
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
            Step::Place(content) => {
                let Some(entry) = self.entry(content, faults) else { return };
                let sealed = entry.is_sealed();
                let placed = self.placed(content);
                let outcome = entry.place(&placed, PlaceOptions::default()).await;
                assert!(outcome.is_ok() == sealed || !unhurt(self), "{step:?}: {outcome:?}");
            }
            Step::Read(content, chunk) => self.read(content, chunk, faults).await,
            Step::Flush => drop(self.store().flush()),
            Step::CoolDown => self.store().handle.shared.cool_down(now_ms() + 120_000),
            Step::Restart => {
                let closed = self.store().close();
                assert!(closed.is_ok() || !unhurt(self), "{closed:?}");
                self.store = None;
                self.keep_index();
                self.note_stop();
                self.open();
            }
            Step::Kill => {
                self.store = None;
                self.note_stop();
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

    fn placed(&self, content: usize) -> PathBuf {
        self.rig.dir.path().join(format!("placed-{content}"))
    }

    fn entry(&self, content: usize, faults: u64) -> Option<Arc<Entry>> {
        let data = &self.data[content];
        match self.store().create(&self.ids[content], layout(data)) {
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

    fn note_stop(&mut self) {
        let Some(stops) = &mut self.stops else { return };
        let left = tempfile::tempdir_in(self.rig.dir.path().parent().unwrap()).unwrap();
        copy(self.rig.dir.path(), left.path());
        let promises = self.promises.iter().filter(|promise| promise.until == usize::MAX).cloned().collect();
        stops.push(Stop { left, promises, step: self.at, calls: self.rig.disk.trial.calls() });
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
            let entry = put_sealed(self.store(), &self.ids[content], &data).await;
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

/// A closed store in the middle of the script.
struct Stop {
    left: tempfile::TempDir,
    promises: Vec<Promise>,
    /// The one that closed it.
    step: usize,
    /// Of the disk, until then.
    calls: u64,
}

/// The steps from one start of the store to the next.
pub(super) struct Section {
    /// What lies there at its beginning; nothing at the first.
    stop: Option<Stop>,
    /// Its steps and those of the section behind it, where a fault of its last calls shows.
    steps: Range<usize>,
    /// Of the disk, in every healthy run.
    pub calls: u64,
}

/// Threads of the store do not always come to the same number of calls: what every run comes to is counted.
const HEALTHY_RUNS: u32 = 5;

impl Section {
    /// All of the script.
    pub(super) async fn all() -> Vec<Self> {
        let mut sections = Self::of_a_run().await;
        for _ in 1..HEALTHY_RUNS {
            for (section, again) in sections.iter_mut().zip(Self::of_a_run().await) {
                section.calls = section.calls.min(again.calls);
            }
        }
        sections
    }

    async fn of_a_run() -> Vec<Self> {
        let mut script = Script::new();
        script.stops = Some(Vec::new());
        script.run().await;
        let stops = script.stops.take().unwrap();
        let begins: Vec<usize> = [0].into_iter().chain(stops.iter().map(|stop| stop.step + 1)).collect();
        let calls: Vec<u64> =
            stops.iter().map(|stop| stop.calls).chain([script.rig.disk.trial.calls()]).collect();
        let stops = [None].into_iter().chain(stops.into_iter().map(Some));
        let section = |(number, stop): (usize, Option<Stop>)| Self {
            stop,
            steps: begins[number]..begins.get(number + 2).copied().unwrap_or_else(|| steps().len()),
            calls: calls[number] - number.checked_sub(1).map_or(0, |before| calls[before]),
        };
        stops.enumerate().map(section).collect()
    }

    /// A run from here, and the steps that it is to make.
    pub(super) fn begin(&self) -> (Script, Range<usize>) {
        let mut script = Script::new();
        if let Some(stop) = &self.stop {
            copy(stop.left.path(), script.rig.dir.path());
            script.promises.clone_from(&stop.promises);
        }
        (script, self.steps.clone())
    }
}

fn copy(from: &Path, to: &Path) {
    for file in fs::read_dir(from).unwrap().flatten() {
        let there = to.join(file.file_name());
        if file.path().is_dir() {
            fs::create_dir(&there).unwrap();
            copy(&file.path(), &there);
        } else {
            fs::copy(file.path(), there).unwrap();
        }
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

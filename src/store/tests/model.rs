//! The store against a map: any sequence of inserts, reads, removals, seals, evictions, restarts and kills.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use tokio::runtime::Runtime;

use super::*;

const CONTENTS: u64 = 4;
const CHUNKS: u32 = 4;
const SIZE: usize = 35_000;

#[derive(Clone, Debug)]
enum Op {
    Insert(u64, u32),
    InsertLie(u64, u32),
    Read(u64, u32),
    Remove(u64, u32),
    Seal(u64),
    Hold(u64),
    LetGo(u64),
    Pin(u64, bool),
    Flush,
    Restart,
    /// Whether what is in doubt is settled at once, or waits until something else comes along.
    Kill(bool),
    Settle(u64),
    CoolDown,
}

fn op() -> impl Strategy<Value = Op> {
    let place = || (0..CONTENTS, 0..CHUNKS);
    prop_oneof![
        12 => place().prop_map(|(content, chunk)| Op::Insert(content, chunk)),
        1 => place().prop_map(|(content, chunk)| Op::InsertLie(content, chunk)),
        6 => place().prop_map(|(content, chunk)| Op::Read(content, chunk)),
        1 => place().prop_map(|(content, chunk)| Op::Remove(content, chunk)),
        3 => (0..CONTENTS).prop_map(Op::Seal),
        1 => (0..CONTENTS).prop_map(Op::Hold),
        1 => (0..CONTENTS).prop_map(Op::LetGo),
        1 => ((0..CONTENTS), any::<bool>()).prop_map(|(content, pinned)| Op::Pin(content, pinned)),
        1 => Just(Op::Flush),
        1 => Just(Op::Restart),
        1 => any::<bool>().prop_map(Op::Kill),
        1 => (0..CONTENTS).prop_map(Op::Settle),
        1 => Just(Op::CoolDown),
    ]
}

/// What must be true of one content. Evictions take a content away at any time it is not held, so the model says
/// what may be there, and what must be.
#[derive(Clone, Debug, Default)]
struct Model {
    may: BTreeSet<u32>,
    /// Durable and not evictable since it was made so.
    must: BTreeSet<u32>,
}

struct World {
    rig: Rig,
    store: Option<Store>,
    held: BTreeMap<u64, Arc<Entry>>,
    /// Survives restarts and kills.
    pinned: BTreeSet<u64>,
    models: Vec<Model>,
    data: Vec<Vec<u8>>,
}

impl World {
    fn new(budget: u64) -> Self {
        let rig = Rig { budget, ..Rig::new() };
        let store = Some(rig.open());
        let data = (0..CONTENTS).map(|content| bytes(content, SIZE)).collect();
        let models = vec![Model::default(); usize::try_from(CONTENTS).unwrap()];
        Self { rig, store, held: BTreeMap::new(), pinned: BTreeSet::new(), models, data }
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn data(&self, content: u64) -> &[u8] {
        &self.data[usize::try_from(content).unwrap()]
    }

    fn model(&mut self, content: u64) -> &mut Model {
        &mut self.models[usize::try_from(content).unwrap()]
    }

    fn entry(&self, content: u64) -> Arc<Entry> {
        let data = self.data(content);
        self.store().create(&blob(data), layout(data)).unwrap()
    }

    async fn apply(&mut self, op: Op) {
        match op {
            Op::Insert(content, chunk) => self.insert(content, chunk).await,
            Op::InsertLie(content, chunk) => {
                let entry = self.entry(content);
                let lie = Attestation { digest: ChunkDigest([9; 32]), attester: PEER };
                let inserted =
                    entry.insert(ChunkIndex(chunk), pieces(self.data(content), chunk), Expect::Attested(lie));
                match inserted.await {
                    Err(InsertError::Mismatch { .. }) => assert!(!entry.holds(ChunkIndex(chunk))),
                    Ok(held) => assert_eq!(held.attester, ME),
                    Err(other) => panic!("{other}"),
                }
            }
            Op::Read(content, chunk) => self.read(content, chunk).await,
            Op::Remove(content, chunk) => {
                let entry = self.entry(content);
                entry.remove(&[ChunkIndex(chunk)].into_iter().collect()).await;
                assert!(!entry.is_sealed() || entry.have().is_full(&entry.layout()));
                let model = self.model(content);
                model.may.remove(&chunk);
                model.must.remove(&chunk);
            }
            Op::Seal(content) => {
                let entry = self.entry(content);
                let full = entry.have().is_full(&entry.layout());
                assert_eq!(entry.seal().await.is_ok(), full);
                if full && (self.held.contains_key(&content) || self.pinned.contains(&content)) {
                    self.model(content).must = (0..CHUNKS).collect();
                }
            }
            Op::Hold(content) => {
                let entry = self.entry(content);
                self.held.insert(content, entry);
            }
            Op::LetGo(content) => {
                self.held.remove(&content);
                if !self.pinned.contains(&content) {
                    self.model(content).must.clear();
                }
            }
            Op::Pin(content, pinned) => self.pin(content, pinned).await,
            Op::Flush => self.flush(),
            Op::Restart => {
                self.flush();
                self.store().close().unwrap();
                self.reopen(true).await;
            }
            Op::Kill(settle) => {
                self.expect_all_of_the_held();
                self.reopen(settle).await;
            }
            Op::Settle(content) => {
                let key = blob(self.data(content)).key(CHUNK);
                if let Some(entry) = self.store().settle(&key).await {
                    assert!(!entry.is_in_doubt());
                }
            }
            Op::CoolDown => self.store().handle.shared.cool_down(now_ms() + 120_000),
        }
    }

    async fn insert(&mut self, content: u64, chunk: u32) {
        let entry = self.entry(content);
        match put(&entry, self.data(content), chunk).await {
            Ok(_) => {
                assert!(entry.holds(ChunkIndex(chunk)));
                self.model(content).may.insert(chunk);
            }
            Err(InsertError::NoSpace { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }

    async fn pin(&mut self, content: u64, pinned: bool) {
        let entry = self.entry(content);
        entry.set_pin(if pinned { Pin::Forever } else { Pin::Not }).await.unwrap();
        if pinned {
            self.pinned.insert(content);
        } else {
            self.pinned.remove(&content);
            if !self.held.contains_key(&content) {
                self.model(content).must.clear();
            }
        }
    }

    fn flush(&mut self) {
        self.store().flush().unwrap();
        self.expect_all_of_the_held();
    }

    /// Nothing that was written to what somebody holds may go from here on, whatever ends this run.
    fn expect_all_of_the_held(&mut self) {
        for content in self.held.keys().chain(&self.pinned) {
            let have = self.entry(*content).have();
            let model = &mut self.models[usize::try_from(*content).unwrap()];
            model.must = have.iter().map(|chunk| chunk.0).collect();
        }
    }

    /// What was held is there again.
    async fn reopen(&mut self, settle: bool) {
        self.held.clear();
        self.store = None;
        self.store = Some(self.rig.open());
        for content in 0..CONTENTS {
            let entry = self.entry(content);
            if settle {
                entry.settle().await;
            } else if entry.is_in_doubt() {
                continue;
            }
            let have: BTreeSet<u32> = entry.have().iter().map(|chunk| chunk.0).collect();
            let model = self.model(content);
            assert!(have.is_superset(&model.must), "{have:?} lacks some of {model:?}");
        }
        for content in 0..CONTENTS {
            if !self.pinned.contains(&content) || self.entry(content).is_in_doubt() {
                self.model(content).must.clear();
            }
        }
    }

    async fn read(&self, content: u64, chunk: u32) {
        let entry = self.entry(content);
        let range = entry.layout().chunk_range(ChunkIndex(chunk));
        let (start, end) = (usize::try_from(range.start()).unwrap(), usize::try_from(range.end()).unwrap());
        match entry.read(range).await {
            Ok(read) => assert_eq!(read[..], self.data(content)[start..end]),
            Err(ReadError::NotHeld(missing)) => assert_eq!(missing, ChunkIndex(chunk)),
            Err(other) => panic!("{other}"),
        }
    }

    fn check(&self) {
        let store = self.store();
        let usage = store.usage();
        assert!(usage.stored_bytes <= usage.budget_bytes);
        let mut total = 0;
        for content in 0..CONTENTS {
            let entry = self.entry(content);
            let model = &self.models[usize::try_from(content).unwrap()];
            let have: BTreeSet<u32> = entry.have().iter().map(|chunk| chunk.0).collect();
            assert!(have.is_subset(&model.may), "{have:?} has more than {model:?}");
            assert!(have.is_superset(&model.must), "{have:?} lacks some of {model:?}");
            assert!(!entry.is_sealed() || have.len() == CHUNKS as usize);
            assert_eq!(entry.is_pinned(), self.pinned.contains(&content));
            total += entry.stored_bytes();
        }
        assert_eq!(total, usage.stored_bytes, "the account is exact");
    }
}

/// Cases that one store lives through: opening one costs more than a case does.
const CASES_PER_STORE: usize = 50;

/// More than 10,000 cases: each a list of operations on a store that has lived through the ones before it.
///
/// A failure prints the seed; `WINDLASS_MODEL_SEED` runs that store's life again, `WINDLASS_MODEL_STORES` more of them.
#[test]
fn behaves_like_a_map_that_may_forget() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (seeds, stores) = match number("WINDLASS_MODEL_SEED") {
        Some(seed) => (seed..seed + 1, 1),
        None => (0..number("WINDLASS_MODEL_STORES").unwrap_or(204), 4),
    };
    let seeds = parking_lot::Mutex::new(seeds);
    let live = || {
        let mut cases = 0;
        loop {
            let next = seeds.lock().next();
            let Some(seed) = next else { return cases };
            let life = std::panic::AssertUnwindSafe(|| Runtime::new().unwrap().block_on(life(seed)));
            if let Err(panic) = std::panic::catch_unwind(life) {
                eprintln!("WINDLASS_MODEL_SEED={seed}");
                std::panic::resume_unwind(panic);
            }
            cases += CASES_PER_STORE;
        }
    };
    let cases: usize = std::thread::scope(|scope| {
        let lives: Vec<_> = (0..stores).map(|_| scope.spawn(live)).collect();
        lives.into_iter().map(|life| life.join().unwrap()).sum()
    });
    println!("{cases} cases");
}

async fn life(seed: u64) {
    let mut runner = TestRunner::new_with_rng(
        ProptestConfig::default(),
        TestRng::from_seed(RngAlgorithm::ChaCha, blake3::hash(&seed.to_le_bytes()).as_bytes()),
    );
    let mut world = World::new(if seed.is_multiple_of(2) { 60_000 } else { 1 << 20 });
    let case = proptest::collection::vec(op(), 1..20);
    for _ in 0..CASES_PER_STORE {
        for op in case.new_tree(&mut runner).unwrap().current() {
            world.apply(op).await;
            world.check();
        }
    }
}

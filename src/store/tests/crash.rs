//! The power goes after every single write and sync: nothing sealed is lost, nothing torn is claimed or served.

use std::collections::HashSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;

use super::medium::{Luck, Medium, Remains};
use super::script::{self, IndexFiles, Promise, Script, What};
use super::*;
use crate::store::disk::trial::Event;

/// Opening a store waits for a disk more than for a core.
const CHECKERS: usize = 4;

/// A power cut to look at.
struct Cut {
    at: usize,
    luck: Luck,
    dir: tempfile::TempDir,
    promised: Vec<(usize, What)>,
}

#[test]
fn the_power_goes_after_each_write_and_each_sync() {
    assert!(script::steps().len() >= 200, "{}", script::steps().len());
    let mut script = Script::new();
    script.rig.disk.trial.start_record();
    runtime().block_on(script.run());
    let events = script.rig.disk.trial.take_record();
    let (cuts, to_check) = sync_channel::<Cut>(CHECKERS);
    let (to_check, failed) = (parking_lot::Mutex::new(to_check), AtomicBool::new(false));
    let work = || {
        let mut checked = 0;
        loop {
            let next = to_check.lock().recv();
            let Ok(cut) = next else { return checked };
            if !is_sound(&script, &cut) {
                failed.store(true, Ordering::Relaxed);
            }
            checked += 1;
        }
    };
    let mut alike = 0;
    let checked = thread::scope(|scope| {
        let checkers: Vec<_> = (0..CHECKERS).map(|_| scope.spawn(work)).collect();
        let mut medium = Medium::new(&script.rig.data_dir());
        // Where a call leaves the medium as it was, so that a crash after it is the one before it.
        let mut looked_at = HashSet::new();
        for (number, event) in events.iter().enumerate() {
            medium.apply(event);
            // The 256 shelves of an empty store are one moment, not 256.
            if matches!(event, Event::MadeDir { path } if is_shelf(path)) || failed.load(Ordering::Relaxed) {
                continue;
            }
            let seed = number as u64 * 7_919 + 1;
            for luck in [Luck::Nothing, Luck::Everything, Luck::Some(seed), Luck::Stale(seed)] {
                let (remains, promised) = (medium.crash(luck), promised(&script, number + 1));
                if looked_at.insert(fingerprint(&remains, &promised)) {
                    cuts.send(cut(&script, &remains, promised, number + 1, luck)).unwrap();
                } else {
                    alike += 1;
                }
            }
        }
        drop(cuts);
        checkers.into_iter().map(|checker| checker.join().unwrap()).sum::<usize>()
    });
    assert!(!failed.into_inner());
    println!(
        "{} operations made {} writes and syncs; {checked} power cuts checked, {alike} more left the same behind",
        script::steps().len(),
        events.len()
    );
    assert!(checked > script::steps().len());
}

fn is_shelf(path: &Path) -> bool {
    path.parent().is_some_and(|parent| parent.ends_with("contents"))
}

/// What was promised to outlive a crash after `at` events.
fn promised(script: &Script, at: usize) -> Vec<(usize, What)> {
    let holds = |promise: &&Promise| promise.from <= at && at <= promise.until;
    script.promises.iter().filter(holds).map(|promise| (promise.content, promise.what)).collect()
}

fn fingerprint(remains: &Remains, promised: &[(usize, What)]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (remains, promised).hash(&mut hasher);
    hasher.finish()
}

fn cut(script: &Script, remains: &Remains, promised: Vec<(usize, What)>, at: usize, luck: Luck) -> Cut {
    let dir = tempfile::tempdir_in(script.rig.dir.path().parent().unwrap()).unwrap();
    let data_dir = dir.path().join("data");
    fs::create_dir(&data_dir).unwrap();
    remains.write_below(&data_dir);
    restore_index(script, &data_dir);
    Cut { at, luck, dir, promised }
}

/// The index that the surviving mark vouches for, else any: it must not be believed.
fn restore_index(script: &Script, data_dir: &Path) {
    let mark = fs::read(data_dir.join("clean")).unwrap_or_default();
    let index: Option<&IndexFiles> = script.indexes.get(&mark).or_else(|| script.indexes.values().next());
    for (name, bytes) in index.into_iter().flatten() {
        let path = data_dir.join("index").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

fn is_sound(script: &Script, cut: &Cut) -> bool {
    // What was evicted may be back. With room for it, nothing that was promised has to give way to it.
    let rig = Rig { budget: script::ROOM_FOR_ALL, ..Rig::at(cut.dir.path()) };
    let looked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        runtime().block_on(async {
            let store = rig.open();
            for (content, data) in script.data.iter().enumerate() {
                let promised: Vec<What> =
                    cut.promised.iter().filter(|(of, _)| *of == content).map(|(_, what)| *what).collect();
                script::check_content(&store, data, &promised).await;
            }
            assert!(!store.handle.shared.room.is_over_budget());
            // It goes on.
            if cut.at.is_multiple_of(5) {
                put_sealed(&store, &blob(b"one more"), b"one more").await;
                store.close().unwrap();
            }
        });
    }));
    if looked.is_err() {
        eprintln!("power cut after event {}, {:?} survived of what was not synced", cut.at, cut.luck);
    }
    looked.is_ok()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

//! A disk that refuses: nothing stored is lost, nothing wrong is served, and it goes on once the disk does.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use super::script::Section;
use super::*;
use crate::store::disk::Op;

#[tokio::test]
async fn a_full_or_broken_disk_means_pass_through() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(1, 95_000);
    let entry = store.create(&blob(&data), layout(&data)).unwrap();
    put(&entry, &data, 0).await.unwrap();
    for errno in [Errno::NOSPC, Errno::DQUOT, Errno::IO, Errno::ROFS] {
        rig.disk.trial.fail(Op::Write, 0, errno);
        let refused = put(&entry, &data, 1).await;
        assert!(matches!(refused, Err(InsertError::NoSpace { .. })), "{refused:?}");
        rig.disk.trial.clear();
        assert_eq!(entry.have().len(), 1);
        assert_eq!(entry.read(ByteRange::new(0, 10)).await.unwrap()[..], data[..10]);
    }
    assert_eq!(store.handle.shared.metrics.pass_throughs.get(), 4);
    assert_eq!(store.usage().stored_bytes, 10_000);
    put_all(&store, &blob(&data), &data).await.seal().await.unwrap();
}

#[tokio::test]
async fn a_disk_fuller_than_it_says_costs_the_oldest_content() {
    let rig = Rig::new();
    let store = rig.open();
    let (old, new) = (bytes(7, 25_000), bytes(8, 25_000));
    drop(put_sealed(&store, &blob(&old), &old).await);
    let entry = store.create(&blob(&new), layout(&new)).unwrap();
    put(&entry, &new, 0).await.unwrap();
    while Arc::strong_count(&store.get(&blob(&old).key(CHUNK)).unwrap()) > 2 {
        tokio::task::yield_now().await;
    }
    rig.disk.trial.fail(Op::Write, 0, Errno::NOSPC);
    assert!(put(&entry, &new, 1).await.is_err());
    rig.disk.trial.clear();
    assert!(store.get(&blob(&old).key(CHUNK)).is_none());
    put_all(&store, &blob(&new), &new).await.seal().await.unwrap();
}

#[tokio::test]
async fn chunks_whose_sync_failed_are_not_believed() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(2, 45_000);
    let entry = put_all(&store, &blob(&data), &data).await;
    rig.disk.trial.fail(Op::Sync, 0, Errno::IO);
    assert!(matches!(entry.seal().await, Err(SealError::Io { .. })));
    assert!(!entry.is_sealed());
    assert!(entry.have().is_empty(), "the kernel may have dropped the pages");
    rig.disk.trial.clear();
    put_sealed(&store, &blob(&data), &data).await;
    drop((entry, store));
    let store = rig.open();
    let entry = store.get(&blob(&data).key(CHUNK)).unwrap();
    assert!(entry.is_sealed());
    assert_eq!(get_all(&entry).await.unwrap(), data);
}

#[tokio::test]
async fn a_sidecar_that_cannot_be_written_is_written_later() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(3, 45_000);
    let entry = put_all(&store, &blob(&data), &data).await;
    store.flush().unwrap();
    entry.remove(&[ChunkIndex(1)].into_iter().collect()).await;
    put(&entry, &data, 1).await.unwrap();
    // Opening the sidecar fails, before any of it is changed.
    rig.disk.trial.fail(Op::Write, 0, Errno::NOSPC);
    assert!(entry.seal().await.is_err());
    assert!(entry.have().is_full(&entry.layout()), "the data is there, only the word of it is missing");
    rig.disk.trial.clear();
    entry.seal().await.unwrap();
    assert!(entry.is_sealed());
    drop((entry, store));
    assert!(rig.open().get(&blob(&data).key(CHUNK)).unwrap().is_sealed());
}

#[tokio::test]
async fn an_unreadable_sector_costs_its_chunk_only() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(4, 45_000);
    let entry = put_sealed(&store, &blob(&data), &data).await;
    rig.disk.trial.fail(Op::Read, 0, Errno::IO);
    let read = entry.read(ByteRange::new(20_000, 20_010)).await;
    assert!(matches!(read, Err(ReadError::Corrupt(ChunkIndex(2)))), "{read:?}");
    rig.disk.trial.clear();
    assert_eq!(entry.have().len(), 4);
    put(&entry, &data, 2).await.unwrap();
    entry.seal().await.unwrap();
}

/// Fails `times` calls of the scripted workload from the n-th on, for every `stride`-th n.
///
/// `script` checks on the way that whatever the fault did not hit works, that nothing wrong is read, and that every
/// promise is kept; afterwards that all is well again.
fn fail_each_call(errno: Errno, times: u64, stride: usize) {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let sections = runtime().block_on(Section::all());
    let faults: Vec<(&Section, u64)> =
        sections.iter().flat_map(|section| (0..section.calls).map(move |nth| (section, nth))).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let runtime = runtime();
        let mut hit = 0;
        loop {
            let Some((section, nth)) = faults.get(next.fetch_add(stride, Ordering::Relaxed)) else {
                return hit;
            };
            let (mut script, steps) = section.begin();
            script.rig.disk.trial.fail_any(*nth, times, errno);
            let run = AssertUnwindSafe(|| {
                runtime.block_on(async {
                    script.run_steps(steps.clone()).await;
                    script.check_recovery().await;
                });
            });
            if let Err(panic) = catch_unwind(run) {
                eprintln!("{errno:?} from call {nth} on, {times} times, in steps {steps:?}");
                resume_unwind(panic);
            }
            hit += usize::from(script.rig.disk.trial.faults_injected() > 0);
        }
    };
    let hit: usize = thread::scope(|scope| {
        let workers: Vec<_> = (0..4).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).sum()
    });
    let runs = faults.len().div_ceil(stride);
    println!(
        "{errno:?} at every {stride}th of {} calls in {} sections, {times} in a row: {hit} runs met it",
        faults.len(),
        sections.len()
    );
    assert!(hit >= runs - runs / 20, "{hit} of {runs}");
}

#[test]
fn any_call_may_fail_once_for_want_of_room() {
    fail_each_call(Errno::NOSPC, 1, 1);
}

#[test]
fn any_call_may_fail_once_for_a_bad_sector() {
    fail_each_call(Errno::IO, 1, 1);
}

#[test]
fn twenty_calls_in_a_row_may_fail_for_want_of_room() {
    fail_each_call(Errno::NOSPC, 20, 10);
}

#[test]
fn twenty_calls_in_a_row_may_fail_for_a_broken_disk() {
    fail_each_call(Errno::IO, 20, 10);
}

#[tokio::test]
async fn what_is_written_becomes_durable_without_being_asked_for() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(6, 25_000);
    let entry = put_all(&store, &blob(&data), &data).await;
    for _ in 0..100 {
        if !entry.has_pending() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop((entry, store));
    assert_eq!(rig.open().get(&blob(&data).key(CHUNK)).unwrap().have().len(), 3);
}

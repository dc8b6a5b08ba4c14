//! Budget, free floor, eviction, pins.

use std::sync::atomic::Ordering;

use super::*;

/// Three contents of 30,000 bytes fit.
fn small() -> Rig {
    Rig { budget: 95_000, ..Rig::new() }
}

/// The syncer holds an entry until it is durable; waits until only those of the test are held.
fn settle(store: &Store, held: usize) {
    store.flush().unwrap();
    // One count is the catalog's, one is ours.
    let is_held = |entry: &&Arc<Entry>| Arc::strong_count(entry) > 2;
    while store.handle.shared.catalog.warm().iter().filter(is_held).count() > held {
        std::thread::yield_now();
    }
}

/// Uses are told apart by the millisecond.
fn tick() {
    std::thread::sleep(std::time::Duration::from_millis(2));
}

async fn fill(store: &Store, seeds: impl IntoIterator<Item = u64>) -> Vec<(ContentId, Vec<u8>)> {
    fill_beside(store, seeds, 0).await
}

async fn fill_beside(
    store: &Store,
    seeds: impl IntoIterator<Item = u64>,
    held: usize,
) -> Vec<(ContentId, Vec<u8>)> {
    let mut contents = Vec::new();
    for seed in seeds {
        let data = bytes(seed, 30_000);
        put_sealed(store, &blob(&data), &data).await;
        contents.push((blob(&data), data));
        // Or the next one finds this one in use.
        settle(store, held);
        tick();
    }
    contents
}

fn is_stored(store: &Store, id: &ContentId) -> bool {
    store.list().iter().any(|summary| summary.id == *id)
}

#[tokio::test]
async fn the_least_recently_used_leaves_first_and_is_announced() {
    let rig = small();
    let store = rig.open();
    let mut evictions = store.losses();
    let contents = fill(&store, 0..3).await;
    // Used again: now 1 is the oldest.
    let _ = store.get(&contents[0].0.key(CHUNK));
    tick();
    let more = fill(&store, 3..4).await;
    assert!(is_stored(&store, &contents[0].0) && is_stored(&store, &more[0].0));
    assert!(!is_stored(&store, &contents[1].0));
    assert_eq!(evictions.try_recv().unwrap(), Loss::Content(contents[1].0.key(CHUNK)));
    assert!(evictions.try_recv().is_err());
    assert_eq!(store.usage().stored_bytes, 90_000);
    assert!(!rig.content_dir(&contents[1].0.key(CHUNK)).exists());
}

#[tokio::test]
async fn what_others_have_too_leaves_sooner() {
    let rig = small();
    let store = rig.open();
    let contents = fill(&store, 0..3).await;
    let keys: Vec<_> = contents.iter().map(|(id, _)| id.key(CHUNK)).collect();
    for node in 10..13 {
        store.peer_gave(&keys[2], NodeId([node; 16]));
    }
    let unused_ms = |content: usize| {
        let of = |summary: &&Summary| summary.key == keys[content];
        now_ms() - store.list().iter().find(of).unwrap().last_used_ms
    };
    // Three copies elsewhere make it four times as old.
    while 4 * unused_ms(2) <= 2 * unused_ms(0) {
        tick();
    }
    settle(&store, 0);
    fill(&store, 3..4).await;
    assert!(!is_stored(&store, &contents[2].0) && is_stored(&store, &contents[0].0));
    store.peer_asks(&blob(b"not here").key(CHUNK), PEER);
    assert_eq!(store.held().len(), 3, "asking makes nothing");
}

#[tokio::test]
async fn the_last_known_copy_of_what_a_peer_fetches_stays() {
    let rig = small();
    let store = rig.open();
    let contents = fill(&store, 0..3).await;
    let keys: Vec<_> = contents.iter().map(|(id, _)| id.key(CHUNK)).collect();
    store.peer_asks(&keys[0], PEER);
    fill(&store, 3..5).await;
    assert!(is_stored(&store, &contents[0].0), "it was the oldest by far");
    assert!(!is_stored(&store, &contents[1].0) && !is_stored(&store, &contents[2].0));
    store.peer_gave(&keys[0], NodeId([3; 16]));
    fill(&store, 5..6).await;
    assert!(!is_stored(&store, &contents[0].0), "another has it as well");
    // Nothing may go: what comes passes through.
    let contents = fill(&store, 6..9).await;
    contents.iter().for_each(|(id, _)| store.peer_asks(&id.key(CHUNK), PEER));
    let data = bytes(9, 30_000);
    let entry = store.create(&blob(&data), layout(&data)).unwrap();
    assert!(matches!(put(&entry, &data, 0).await, Err(InsertError::NoSpace { .. })));
}

#[tokio::test]
async fn held_and_pinned_contents_stay_whatever_happens() {
    let rig = small();
    let store = rig.open();
    let contents = fill(&store, 0..3).await;
    let held = store.get(&contents[0].0.key(CHUNK)).unwrap();
    store.get(&contents[1].0.key(CHUNK)).unwrap().set_pin(Pin::Forever).await.unwrap();
    settle(&store, 1);
    fill_beside(&store, 3..8, 1).await;
    assert!(is_stored(&store, &contents[0].0) && is_stored(&store, &contents[1].0));
    assert_eq!(get_all(&held).await.unwrap(), contents[0].1);
    // A pin survives a restart.
    store.close().unwrap();
    drop((store, held));
    let store = rig.open();
    fill(&store, 8..12).await;
    assert!(is_stored(&store, &contents[1].0) && !is_stored(&store, &contents[0].0));
}

#[tokio::test]
async fn with_nothing_to_evict_chunks_are_passed_through() {
    let rig = small();
    let store = rig.open();
    let contents = fill(&store, 0..3).await;
    let held: Vec<_> = contents.iter().map(|(id, _)| store.get(&id.key(CHUNK)).unwrap()).collect();
    let data = bytes(9, 30_000);
    let entry = store.create(&blob(&data), layout(&data)).unwrap();
    let refused = put(&entry, &data, 0).await;
    assert!(matches!(refused, Err(InsertError::NoSpace { .. })), "{refused:?}");
    assert_eq!(store.handle.shared.metrics.pass_throughs.get(), 1);
    assert_eq!(store.usage().stored_bytes, 90_000);
    drop(held);
    put(&entry, &data, 0).await.unwrap();
}

#[tokio::test]
async fn the_free_floor_is_never_crossed() {
    let rig = Rig { free_floor: u64::MAX / 2, ..Rig::new() };
    let store = rig.open();
    let data = bytes(1, 30_000);
    let entry = store.create(&blob(&data), layout(&data)).unwrap();
    let Err(InsertError::NoSpace { reason }) = put(&entry, &data, 0).await else { panic!("stored") };
    assert!(reason.contains("store.free_floor"), "{reason}");
    drop((entry, store));
}

#[tokio::test]
async fn partial_contents_are_evicted_too_and_come_back_empty() {
    let rig = small();
    let store = rig.open();
    let data = bytes(1, 50_000);
    let entry = store.create(&blob(&data), layout(&data)).unwrap();
    put(&entry, &data, 2).await.unwrap();
    drop(entry);
    settle(&store, 0);
    tick();
    fill(&store, 10..13).await;
    fill(&store, 13..14).await;
    assert!(!is_stored(&store, &blob(&data)));
    let entry = store.create(&blob(&data), layout(&data)).unwrap();
    assert!(entry.have().is_empty());
    assert!(matches!(entry.read(ByteRange::new(20_000, 20_001)).await, Err(ReadError::NotHeld(_))));
    put_all(&store, &blob(&data), &data).await.seal().await.unwrap();
}

#[tokio::test]
async fn a_lowered_budget_is_kept_from_the_start_on() {
    let rig = small();
    let store = rig.open();
    let contents = fill(&store, 0..3).await;
    store.close().unwrap();
    drop(store);
    let rig = Rig { budget: 40_000, ..rig };
    let store = rig.open();
    while store.usage().stored_bytes > 40_000 {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    assert!(is_stored(&store, &contents[2].0), "the oldest go first");
    let more = fill(&store, 5..6).await;
    assert_eq!(store.usage().stored_bytes, 30_000);
    assert!(is_stored(&store, &more[0].0));
}

#[tokio::test]
async fn idle_contents_give_their_descriptor_back_and_return() {
    let rig = Rig::new();
    let store = rig.open();
    let contents = fill(&store, 0..3).await;
    let shared = &store.handle.shared;
    shared.cool_down(now_ms() + 59_000);
    assert_eq!(shared.catalog.warm().len(), 3);
    let held = store.get(&contents[0].0.key(CHUNK)).unwrap();
    let empty = bytes(7, 10);
    drop(store.create(&blob(&empty), layout(&empty)).unwrap());
    shared.cool_down(now_ms() + 61_000);
    assert_eq!(shared.catalog.warm().len(), 1, "only what is held stays warm");
    assert_eq!(store.list().len(), 3, "what never stored anything is forgotten");
    for (id, data) in &contents {
        let entry = store.get(&id.key(CHUNK)).unwrap();
        assert!(entry.is_sealed());
        assert_eq!(&get_all(&entry).await.unwrap(), data);
    }
    drop(held);
}

#[tokio::test]
async fn a_large_content_gives_up_its_end_and_the_rest_stays_of_use() {
    let rig = Rig { budget: 100_000, ..Rig::new() };
    let store = rig.open();
    store.handle.shared.catalog.whole_max_bytes.store(40_000, Ordering::Relaxed);
    let mut losses = store.losses();
    let data = bytes(1, 90_000);
    let key = blob(&data).key(CHUNK);
    drop(put_sealed(&store, &blob(&data), &data).await);
    settle(&store, 0);
    tick();
    fill(&store, 5..6).await;
    let entry = store.get(&key).unwrap();
    let have: Vec<u32> = entry.have().iter().map(|chunk| chunk.0).collect();
    assert_eq!(have, (0..7).collect::<Vec<_>>(), "one chunk fitted, two had to go");
    assert!(!entry.is_sealed());
    let given_up = [ChunkIndex(8)].into_iter().collect();
    assert_eq!(losses.try_recv().unwrap(), Loss::Chunks(key, given_up));
    assert_eq!(entry.read(ByteRange::new(60_000, 70_000)).await.unwrap()[..], data[60_000..70_000]);
    assert_eq!(store.usage().stored_bytes, 100_000);
    let file = std::fs::metadata(rig.content_dir(&key).join("data")).unwrap();
    assert_eq!(file.len(), 90_000);
    assert!(std::os::unix::fs::MetadataExt::blocks(&file) * 512 < 88_000, "its room was given back");
    // Its missing chunks come back, at the cost of what is older now.
    drop(entry);
    settle(&store, 0);
    put_sealed(&store, &blob(&data), &data).await;
    assert!(!is_stored(&store, &blob(&bytes(5, 30_000))));
}

#[tokio::test]
async fn pins_end_and_the_configuration_pins_by_name() {
    let rig = small();
    let store = rig.open();
    let contents = fill(&store, 0..3).await;
    let pin = |n: usize, pin| {
        let entry = store.get(&contents[n].0.key(CHUNK)).unwrap();
        async move { entry.set_pin(pin).await.unwrap() }
    };
    pin(0, Pin::Until(now_ms() + 3_600_000)).await;
    pin(1, Pin::Until(now_ms() - 1)).await;
    settle(&store, 0);
    fill(&store, 3..8).await;
    assert!(is_stored(&store, &contents[0].0), "its lease runs");
    assert!(!is_stored(&store, &contents[1].0), "its lease is over");
    let lasting = store.get(&contents[0].0.key(CHUNK)).unwrap();
    let before = lasting.pin();
    lasting.pin_at_least(Pin::Until(now_ms())).await.unwrap();
    assert_eq!(lasting.pin(), before, "a shorter lease does not end a longer one");
    lasting.set_pin(Pin::Not).await.unwrap();
    drop(lasting);

    // By name, also where it was stored before it was named, and no longer once it is not named any more.
    let named = &contents[0].0;
    let key = named.key(CHUNK);
    let mut store = store;
    for pinned in [true, false] {
        store.close().unwrap();
        drop(store);
        let pins = if pinned { vec![named.to_string().parse().unwrap()] } else { Vec::new() };
        let rig = Rig { pins, budget: 95_000, ..Rig::at(rig.dir.path()) };
        store = rig.open();
        assert!(!store.handle.shared.after_crash, "a change of pins is no crash");
        assert_eq!(store.get(&key).unwrap().is_pinned(), pinned);
        fill(&store, if pinned { 20..24 } else { 30..34 }).await;
        assert_eq!(is_stored(&store, named), pinned);
    }
}

//! Restarts: clean ones, killed ones, and ones after somebody or something spoilt the files.

use std::fs;
use std::os::unix::fs::FileExt;

use super::*;

/// Bytes of one slot of a sidecar's log.
const SLOT: u64 = 64;

fn have(store: &Store, key: &ContentKey) -> Vec<u32> {
    store.get(key).map_or_else(Vec::new, |entry| entry.have().iter().map(|chunk| chunk.0).collect())
}

#[tokio::test]
async fn everything_survives_a_clean_restart() {
    let rig = Rig::new();
    let store = rig.open();
    let (whole, part) = (bytes(1, 95_000), bytes(2, 1_500_000));
    let sealed = put_sealed(&store, &blob(&whole), &whole).await;
    let partial = store.create(&object("part", &part), layout(&part)).unwrap();
    for chunk in [0, 64, 149] {
        put(&partial, &part, chunk).await.unwrap();
    }
    partial.set_pin(Pin::Forever).await.unwrap();
    let mut before = store.list();
    store.close().unwrap();
    assert!(matches!(sealed.read(ByteRange::new(0, 1)).await, Err(ReadError::Closed)));
    assert!(matches!(put(&partial, &part, 1).await, Err(InsertError::Closed)));
    assert!(matches!(store.create(&blob(&whole), layout(&whole)), Err(CreateError::Closed)));
    // These wait for a sync, and there is none any more.
    assert!(partial.set_pin(Pin::Not).await.is_err());
    partial.remove(&[ChunkIndex(0)].into_iter().collect()).await;
    drop((store, sealed, partial));

    let store = rig.open();
    assert!(!store.handle.shared.after_crash);
    let mut after = store.list();
    before.sort_by_key(|summary| summary.key);
    after.sort_by_key(|summary| summary.key);
    assert_eq!(before, after);
    assert_eq!(store.usage().stored_bytes, 95_000 + 3 * 10_000);
    let entry = store.get(&blob(&whole).key(CHUNK)).unwrap();
    assert_eq!(get_all(&entry).await.unwrap(), whole);
}

/// A store that was killed with chunks 0 and 7 durable and 3 merely written.
async fn killed(rig: &Rig, data: &[u8]) {
    let store = rig.open();
    let entry = store.create(&blob(data), layout(data)).unwrap();
    put(&entry, data, 0).await.unwrap();
    put(&entry, data, 7).await.unwrap();
    store.flush().unwrap();
    put(&entry, data, 3).await.unwrap();
}

fn open_to_write(path: PathBuf) -> fs::File {
    fs::File::options().write(true).open(path).unwrap()
}

#[tokio::test]
async fn a_kill_loses_nothing_that_was_written() {
    let rig = Rig::new();
    let data = bytes(3, 95_000);
    let key = blob(&data).key(CHUNK);
    killed(&rig, &data).await;

    let store = rig.open();
    assert!(store.handle.shared.after_crash);
    assert_eq!(store.in_doubt(), [key]);
    assert_eq!(store.usage().stored_bytes, 30_000, "what may be there takes room");
    let entry = store.get(&key).unwrap();
    assert_eq!(have(&store, &key), [0, 7], "nothing is claimed before it was hashed");
    assert!(matches!(entry.read(ByteRange::new(30_000, 30_001)).await, Err(ReadError::NotHeld(_))));
    store.settle(&key).await.unwrap();
    assert_eq!(have(&store, &key), [0, 3, 7]);
    assert_eq!(store.handle.shared.metrics.recovered_bytes.get(), 10_000);
    assert_eq!(store.usage().stored_bytes, 30_000);
    store.flush().unwrap();
    drop((entry, store));

    let store = rig.open();
    assert!(store.in_doubt().is_empty(), "durable by now");
    assert_eq!(have(&store, &key), [0, 3, 7]);
    let entry = put_all(&store, &blob(&data), &data).await;
    entry.seal().await.unwrap();
    drop((entry, store));

    let store = rig.open();
    let entry = store.get(&key).unwrap();
    assert!(entry.is_sealed(), "what seal() said yes to survives a kill");
    assert_eq!(get_all(&entry).await.unwrap(), data);
}

#[tokio::test]
async fn the_first_chunk_of_a_content_survives_a_kill_too() {
    let rig = Rig::new();
    let data = bytes(13, 15_000);
    let store = rig.open();
    put_all(&store, &blob(&data), &data).await;
    drop(store);
    let store = rig.open();
    let entry = store.settle(&blob(&data).key(CHUNK)).await.unwrap();
    entry.seal().await.unwrap();
    assert_eq!(get_all(&entry).await.unwrap(), data);
}

#[tokio::test]
async fn a_written_chunk_that_is_torn_is_dropped_unseen() {
    for byte in [30_000, 39_999] {
        let rig = Rig::new();
        let data = bytes(3, 95_000);
        let key = blob(&data).key(CHUNK);
        killed(&rig, &data).await;
        let spoilt = [!data[byte]];
        open_to_write(rig.content_dir(&key).join("data")).write_all_at(&spoilt, byte as u64).unwrap();

        let store = rig.open();
        let entry = store.settle(&key).await.unwrap();
        assert_eq!(have(&store, &key), [0, 7]);
        assert_eq!(store.usage().stored_bytes, 20_000);
        store.flush().unwrap();
        drop((entry, store));
        let store = rig.open();
        assert!(store.in_doubt().is_empty(), "the verdict is durable");
        put_sealed(&store, &blob(&data), &data).await;
        assert_eq!(store.usage().stored_bytes, 95_000);
    }
}

#[tokio::test]
async fn the_word_of_a_written_chunk_may_be_torn_or_gone() {
    for lost in [1, SLOT - 1, SLOT] {
        let rig = Rig::new();
        let data = bytes(3, 95_000);
        let key = blob(&data).key(CHUNK);
        killed(&rig, &data).await;
        let sidecar = open_to_write(rig.content_dir(&key).join("sidecar"));
        sidecar.set_len(sidecar.metadata().unwrap().len() - lost).unwrap();
        let store = rig.open();
        assert!(store.in_doubt().is_empty());
        assert_eq!(have(&store, &key), [0, 7]);
        put_sealed(&store, &blob(&data), &data).await;
        store.close().unwrap();
        drop(store);
        assert!(rig.open().get(&key).unwrap().is_sealed());
    }
}

/// A power cut before the first sync may leave any part of the files.
#[tokio::test]
async fn a_content_that_was_never_synced_may_lose_any_of_its_files() {
    let data = bytes(14, 25_000);
    for (name, len) in [("sidecar", 0), ("sidecar", 47), ("sidecar", 130), ("data", 0), ("data", 9_999)] {
        let rig = Rig::new();
        let store = rig.open();
        put_all(&store, &blob(&data), &data).await;
        drop(store);
        let dir = rig.content_dir(&blob(&data).key(CHUNK));
        open_to_write(dir.join(name)).set_len(len).unwrap();
        let store = rig.open();
        if let Some(entry) = store.settle(&blob(&data).key(CHUNK)).await {
            assert!(entry.have().is_empty(), "{name} {len}");
        }
        assert_eq!(store.usage().stored_bytes, 0);
        put_sealed(&store, &blob(&data), &data).await;
    }
}

#[tokio::test]
async fn a_chunk_in_doubt_may_be_written_again_or_removed() {
    for remove in [false, true] {
        let rig = Rig::new();
        let data = bytes(3, 95_000);
        let key = blob(&data).key(CHUNK);
        killed(&rig, &data).await;
        let store = rig.open();
        let entry = store.get(&key).unwrap();
        if remove {
            entry.remove(&[ChunkIndex(3)].into_iter().collect()).await;
            assert_eq!(store.usage().stored_bytes, 20_000);
        } else {
            put(&entry, &data, 3).await.unwrap();
            assert_eq!(store.usage().stored_bytes, 30_000);
        }
        assert!(!entry.is_in_doubt());
        entry.settle().await;
        drop((entry, store));
        let store = rig.open();
        let entry = store.settle(&key).await.unwrap();
        assert_eq!(entry.have().contains(ChunkIndex(3)), !remove);
    }
}

/// The index lists no chunk in doubt: a content of which nothing else is there would be forgotten on disk.
#[tokio::test]
async fn a_clean_end_does_not_vouch_for_doubts() {
    let rig = Rig::new();
    let data = bytes(15, 25_000);
    let key = blob(&data).key(CHUNK);
    let store = rig.open();
    put_all(&store, &blob(&data), &data).await;
    drop(store);
    for touched in [false, true] {
        let store = rig.open();
        if touched {
            drop(store.get(&key).unwrap());
            store.handle.shared.cool_down(now_ms() + 120_000);
        }
        assert_eq!(store.in_doubt(), [key]);
        store.close().unwrap();
    }
    let store = rig.open();
    assert!(store.handle.shared.after_crash);
    store.settle(&key).await.unwrap().seal().await.unwrap();
    store.close().unwrap();
    drop(store);
    let store = rig.open();
    assert!(!store.handle.shared.after_crash);
    assert!(store.get(&key).unwrap().is_sealed());
}

#[tokio::test]
async fn an_index_deleted_or_spoilt_is_rebuilt_even_after_a_clean_end() {
    let rig = Rig::new();
    let data = bytes(4, 95_000);
    let store = rig.open();
    put_sealed(&store, &blob(&data), &data).await;
    store.close().unwrap();
    drop(store);
    let index = rig.data_dir().join("index");
    for spoil in [
        |index: &Path| fs::remove_dir_all(index).unwrap(),
        |index: &Path| {
            for file in fs::read_dir(index).unwrap() {
                let path = file.unwrap().path();
                if path.is_file() {
                    fs::write(path, bytes(9, 100_000)).unwrap();
                }
            }
        },
        |index: &Path| {
            fs::remove_dir_all(index).unwrap();
            fs::write(index, "not even a directory").unwrap();
        },
    ] {
        spoil(&index);
        let store = rig.open();
        assert!(store.handle.shared.after_crash);
        let entry = store.get(&blob(&data).key(CHUNK)).unwrap();
        assert!(entry.is_sealed());
        assert_eq!(get_all(&entry).await.unwrap(), data);
        store.close().unwrap();
        drop((entry, store));
        let store = rig.open();
        assert!(!store.handle.shared.after_crash, "the rebuilt index is believed");
        store.close().unwrap();
    }
}

#[tokio::test]
async fn a_torn_sidecar_loses_its_tail_and_goes_on() {
    let rig = Rig::new();
    let data = bytes(5, 95_000);
    let key = blob(&data).key(CHUNK);
    let store = rig.open();
    let entry = store.create(&blob(&data), layout(&data)).unwrap();
    for chunk in 0..5 {
        put(&entry, &data, chunk).await.unwrap();
    }
    store.flush().unwrap();
    drop((entry, store));
    let sidecar = rig.content_dir(&key).join("sidecar");
    let file = fs::File::options().write(true).open(&sidecar).unwrap();
    file.set_len(file.metadata().unwrap().len() - SLOT - 11).unwrap();

    let store = rig.open();
    assert_eq!(have(&store, &key), [0, 1, 2]);
    let entry = put_all(&store, &blob(&data), &data).await;
    entry.seal().await.unwrap();
    drop((entry, store));
    let store = rig.open();
    assert!(store.get(&key).unwrap().is_sealed());
}

#[tokio::test]
async fn a_flipped_bit_is_found_at_the_first_read_and_never_served() {
    let rig = Rig::new();
    let data = bytes(6, 95_000);
    let key = blob(&data).key(CHUNK);
    for clean in [true, false] {
        let store = rig.open();
        put_sealed(&store, &blob(&data), &data).await;
        if clean {
            store.close().unwrap();
        }
        drop(store);
        let path = rig.content_dir(&key).join("data");
        let file = fs::File::options().write(true).open(path).unwrap();
        file.write_all_at(&[!data[44_444]], 44_444).unwrap();

        let store = rig.open();
        let entry = store.get(&key).unwrap();
        // Not even another byte of the same chunk.
        let read = entry.read(ByteRange::new(40_000, 40_001)).await;
        assert!(matches!(read, Err(ReadError::Corrupt(ChunkIndex(4)))), "{read:?}");
        assert!(!entry.is_sealed() && !entry.holds(ChunkIndex(4)));
        assert_eq!(store.handle.shared.metrics.corrupt_chunks.get(), 1);
        assert_eq!(&entry.read(ByteRange::new(50_000, 50_005)).await.unwrap()[..], &data[50_000..50_005]);
        put(&entry, &data, 4).await.unwrap();
        entry.seal().await.unwrap();
        assert_eq!(get_all(&entry).await.unwrap(), data);
        store.close().unwrap();
    }
}

#[tokio::test]
async fn a_vanished_or_shortened_data_file_is_never_read_as_zeros() {
    let rig = Rig::new();
    let data = bytes(7, 95_000);
    let key = blob(&data).key(CHUNK);
    let store = rig.open();
    put_sealed(&store, &blob(&data), &data).await;
    store.close().unwrap();
    drop(store);
    let path = rig.content_dir(&key).join("data");
    fs::File::options().write(true).open(&path).unwrap().set_len(45_000).unwrap();
    let store = rig.open();
    let entry = store.get(&key).unwrap();
    assert!(matches!(
        entry.read(ByteRange::new(90_000, 90_001)).await,
        Err(ReadError::Corrupt(ChunkIndex(9)))
    ));
    assert_eq!(entry.read(ByteRange::new(0, 10)).await.unwrap()[..], data[..10]);
    store.close().unwrap();
    drop((store, entry));
    fs::remove_file(&path).unwrap();
    let store = rig.open();
    let entry = store.get(&key).unwrap();
    assert!(matches!(entry.read(ByteRange::new(0, 10)).await, Err(ReadError::Corrupt(ChunkIndex(0)))));
}

#[tokio::test]
async fn leftovers_are_swept_away() {
    let rig = Rig::new();
    let data = bytes(8, 25_000);
    let key = blob(&data).key(CHUNK);
    drop(rig.open());
    let orphan = rig.data_dir().join("contents/aa").join("aa".repeat(32));
    fs::create_dir_all(&orphan).unwrap();
    fs::write(orphan.join("data"), "x").unwrap();
    fs::write(rig.data_dir().join("trash").join("0"), "old").unwrap();
    let store = rig.open();
    assert!(!orphan.exists());
    put_sealed(&store, &blob(&data), &data).await;
    store.close().unwrap();
    assert_eq!(fs::read_dir(rig.data_dir().join("trash")).unwrap().count(), 0);
    drop(store);
    // A directory that vanished behind our back is noticed when it is asked for.
    fs::remove_dir_all(rig.content_dir(&key)).unwrap();
    let store = rig.open();
    assert!(store.get(&key).is_none());
    assert_eq!(store.usage().stored_bytes, 0);
    put_sealed(&store, &blob(&data), &data).await;
}

#[tokio::test]
async fn a_sidecar_of_a_newer_program_stops_the_scan() {
    let rig = Rig::new();
    let data = bytes(9, 25_000);
    let store = rig.open();
    put_sealed(&store, &blob(&data), &data).await;
    drop(store);
    let path = rig.content_dir(&blob(&data).key(CHUNK)).join("sidecar");
    fs::File::options().write(true).open(&path).unwrap().write_all_at(&[9], 8).unwrap();
    let error = rig.try_open().unwrap_err().to_string();
    assert!(error.contains("format 9") && error.contains("run that version"), "{error}");
}

#[test]
fn a_second_store_on_the_same_directory_is_refused() {
    let rig = Rig::new();
    let store = rig.open();
    assert!(matches!(rig.try_open(), Err(OpenError::Locked { .. })));
    store.close().unwrap();
    drop(rig.open());
}

/// Bits flip on the medium while the store runs and believes the chunks checked: the scrubber finds each.
#[tokio::test]
async fn the_scrubber_finds_every_flipped_bit_and_none_is_served() {
    const SIZE: usize = 300_000;
    let rig = Rig::new();
    let store = rig.open();
    let contents: Vec<Vec<u8>> = (0..10).map(|seed| bytes(100 + seed, SIZE)).collect();
    for data in &contents {
        let entry = put_sealed(&store, &blob(data), data).await;
        get_all(&entry).await.unwrap();
    }
    // Ten in each content, each in a chunk of its own.
    let mut flipped = Vec::new();
    for (n, data) in contents.iter().enumerate() {
        let file = open_to_write(rig.content_dir(&blob(data).key(CHUNK)).join("data"));
        for m in 0..10usize {
            let at = (m * 3 + n % 3) * CHUNK as usize + (n * 977 + m * 3_571) % CHUNK as usize;
            file.write_all_at(&[data[at] ^ (1 << (m % 8))], at as u64).unwrap();
            flipped.push((n, at));
        }
    }
    let mut losses = store.losses();
    store.handle.shared.scrub_all();
    assert_eq!(store.handle.shared.metrics.corrupt_chunks.get(), 100);
    let mut lost = 0;
    while losses.try_recv().is_ok() {
        lost += 1;
    }
    assert_eq!(lost, 100);
    for (n, at) in flipped {
        let entry = store.get(&blob(&contents[n]).key(CHUNK)).unwrap();
        assert!(!entry.is_sealed());
        let read = entry.read(ByteRange::new(at as u64, at as u64 + 1)).await;
        assert!(matches!(read, Err(ReadError::NotHeld(_))), "{read:?}");
    }
    for data in &contents {
        let entry = put_sealed(&store, &blob(data), data).await;
        assert_eq!(&get_all(&entry).await.unwrap(), data);
    }
    let held: u64 = contents.len() as u64 * SIZE as u64;
    assert_eq!(store.usage().stored_bytes, held);
    store.handle.shared.scrub_all();
    assert_eq!(store.handle.shared.metrics.corrupt_chunks.get(), 100);
}

/// After a restart nothing is believed before it was hashed: a hundred random bits in all that is stored.
#[tokio::test]
async fn a_hundred_random_flipped_bits_are_found_by_reading() {
    const SIZE: usize = 2_000_000;
    let rig = Rig::new();
    let data = bytes(200, SIZE);
    let key = blob(&data).key(CHUNK);
    let store = rig.open();
    put_sealed(&store, &blob(&data), &data).await;
    store.close().unwrap();
    drop(store);
    let file = open_to_write(rig.content_dir(&key).join("data"));
    let random = bytes(201, 800);
    let mut spoilt = std::collections::BTreeSet::new();
    let mut on_disk = data.clone();
    for word in random.as_chunks::<8>().0 {
        let at = usize::try_from(u64::from_le_bytes(*word) % SIZE as u64).unwrap();
        on_disk[at] ^= 1 << (word[7] % 8);
        file.write_all_at(&on_disk[at..=at], at as u64).unwrap();
        spoilt.insert(u32::try_from(at).unwrap() / CHUNK);
    }
    let store = rig.open();
    let entry = store.get(&key).unwrap();
    for chunk in entry.layout().chunks() {
        let range = entry.layout().chunk_range(chunk);
        let read = entry.read(range).await;
        assert_eq!(read.is_err(), spoilt.contains(&chunk.0), "chunk {}", chunk.0);
    }
    assert_eq!(store.handle.shared.metrics.corrupt_chunks.get(), spoilt.len() as u64);
}

/// 400 GB of sparse files with 50,000 chunks: what a big node has after months.
#[tokio::test]
async fn a_large_store_starts_fast_whatever_became_of_its_index() {
    const CONTENTS: u64 = 200;
    const CHUNKS: u64 = 250;
    const CHUNK_BYTES: u32 = 8 << 20;
    let rig = Rig { budget: 1 << 40, ..Rig::new() };
    drop(rig.open());
    let layout = Layout::new(CHUNKS * u64::from(CHUNK_BYTES), CHUNK_BYTES).unwrap();
    for number in 0..CONTENTS {
        let id = object(&format!("shard-{number}"), &[]);
        let key = id.key(CHUNK_BYTES);
        let dir = rig.content_dir(&key);
        fs::create_dir_all(&dir).unwrap();
        fs::File::create(dir.join("data")).unwrap().set_len(layout.size()).unwrap();
        let mut log = sidecar::header(&id, &layout);
        let attestation = Attestation { digest: ChunkDigest([3; 32]), attester: ME };
        for chunk in layout.chunks() {
            sidecar::append(&mut log, 0, &key, &sidecar::Record::Held(chunk, attestation));
        }
        sidecar::append(&mut log, 0, &key, &sidecar::Record::Sealed);
        fs::write(dir.join("sidecar"), log).unwrap();
    }
    let index = rig.data_dir().join("index");
    for what in ["killed", "stopped", "index deleted", "index garbage"] {
        match what {
            "index deleted" => fs::remove_dir_all(&index).unwrap(),
            "index garbage" => fs::write(index.join("db"), bytes(9, 1 << 20)).unwrap(),
            _ => {}
        }
        let begun = std::time::Instant::now();
        let store = rig.open();
        let seconds = begun.elapsed().as_secs_f64();
        let held = store.held();
        let chunks: u32 = held.iter().map(|(.., have)| have.len()).sum();
        println!("{what}: {chunks} chunks, {} bytes, open after {seconds:.3} s", store.usage().stored_bytes);
        assert_eq!((held.len() as u64, u64::from(chunks)), (CONTENTS, CONTENTS * CHUNKS));
        assert_eq!(store.handle.shared.after_crash, what != "stopped");
        assert_eq!(store.handle.shared.metrics.index_rebuilds.get(), u64::from(what != "stopped"));
        store.close().unwrap();
    }
}

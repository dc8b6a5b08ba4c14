//! A disk that refuses: nothing stored is lost, nothing wrong is served, and it goes on once the disk does.

use std::time::Duration;

use rustix::io::Errno;

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
        rig.disk.faults.fail(Op::Write, 0, errno);
        let refused = put(&entry, &data, 1).await;
        assert!(matches!(refused, Err(InsertError::NoSpace { .. })), "{refused:?}");
        rig.disk.faults.clear();
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
    rig.disk.faults.fail(Op::Write, 0, Errno::NOSPC);
    assert!(put(&entry, &new, 1).await.is_err());
    rig.disk.faults.clear();
    assert!(store.get(&blob(&old).key(CHUNK)).is_none());
    put_all(&store, &blob(&new), &new).await.seal().await.unwrap();
}

#[tokio::test]
async fn chunks_whose_sync_failed_are_not_believed() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(2, 45_000);
    let entry = put_all(&store, &blob(&data), &data).await;
    rig.disk.faults.fail(Op::Sync, 0, Errno::IO);
    assert!(matches!(entry.seal().await, Err(SealError::Io { .. })));
    assert!(!entry.is_sealed());
    assert!(entry.have().is_empty(), "the kernel may have dropped the pages");
    rig.disk.faults.clear();
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
    rig.disk.faults.fail(Op::Write, 0, Errno::NOSPC);
    assert!(entry.seal().await.is_err());
    assert!(entry.have().is_full(&entry.layout()), "the data is there, only the word of it is missing");
    rig.disk.faults.clear();
    entry.seal().await.unwrap();
    drop((entry, store));
    assert!(rig.open().get(&blob(&data).key(CHUNK)).unwrap().is_sealed());
}

#[tokio::test]
async fn an_unreadable_sector_costs_its_chunk_only() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(4, 45_000);
    let entry = put_sealed(&store, &blob(&data), &data).await;
    rig.disk.faults.fail(Op::Read, 0, Errno::IO);
    let read = entry.read(ByteRange::new(20_000, 20_010)).await;
    assert!(matches!(read, Err(ReadError::Corrupt(ChunkIndex(2)))), "{read:?}");
    rig.disk.faults.clear();
    assert_eq!(entry.have().len(), 4);
    put(&entry, &data, 2).await.unwrap();
    entry.seal().await.unwrap();
}

/// Every write and sync of a small workload fails once, from then on for a while; afterwards all is well.
#[tokio::test]
async fn whichever_call_fails_first_the_store_recovers() {
    let data = bytes(5, 25_000);
    let id = blob(&data);
    for op in [Op::Write, Op::Sync] {
        for nth in 0..12 {
            let rig = Rig::new();
            let store = rig.open();
            rig.disk.faults.fail(op, nth, Errno::IO);
            let entry = store.create(&id, layout(&data)).unwrap();
            for chunk in 0..3 {
                match put(&entry, &data, chunk).await {
                    Ok(_) | Err(InsertError::NoSpace { .. }) => {}
                    Err(other) => panic!("{op:?} {nth}: {other}"),
                }
            }
            let sealed = entry.seal().await.is_ok();
            drop((entry, store));
            rig.disk.faults.clear();

            let store = rig.open();
            let kept = store.get(&id.key(CHUNK));
            assert!(!sealed || kept.as_ref().is_some_and(|entry| entry.is_sealed()), "{op:?} {nth}");
            if let Some(entry) = kept {
                for chunk in entry.have().iter() {
                    entry.read(entry.layout().chunk_range(chunk)).await.unwrap();
                }
            }
            let entry = put_sealed(&store, &id, &data).await;
            assert_eq!(get_all(&entry).await.unwrap(), data);
        }
    }
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

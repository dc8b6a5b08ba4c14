//! Files at their destinations.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;

const COPY: PlaceOptions = PlaceOptions { mode: 0o640, owner: None, allow_hard_link: false };
const LINK: PlaceOptions = PlaceOptions { mode: 0o644, owner: None, allow_hard_link: true };

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_placed_file_is_whole_and_alone() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(1, 2_345_678);
    let entry = put_sealed(&store, &blob(&data), &data).await;
    let destination = rig.dir.path().join("new/dir/model.bin");
    let foreseen = store.check_destination(destination.parent().unwrap(), 2_345_678, COPY).await.unwrap();
    assert!(names(destination.parent().unwrap()).is_empty(), "a probe leaves nothing behind");
    let placed = entry.place(&destination, COPY).await.unwrap();
    assert_eq!(placed, Placement { method: foreseen, bytes: 2_345_678 });
    assert!(matches!(placed.method, Method::Reflink | Method::KernelCopy), "{placed:?}");
    assert_eq!(fs::read(&destination).unwrap(), data);
    assert_eq!(fs::metadata(&destination).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(names(destination.parent().unwrap()), ["model.bin"]);
    // Again, over the one that is there.
    fs::write(&destination, "old").unwrap();
    entry.place(&destination, COPY).await.unwrap();
    assert_eq!(fs::read(&destination).unwrap(), data);
}

#[tokio::test]
async fn a_hard_link_shares_the_file_until_the_store_has_to_write() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(2, 45_000);
    let key = blob(&data).key(CHUNK);
    let entry = put_sealed(&store, &blob(&data), &data).await;
    let destination = rig.dir.path().join("model.bin");
    let placed = entry.place(&destination, LINK).await.unwrap();
    if placed.method == Method::Reflink {
        return; // this file system has something better
    }
    assert_eq!(placed.method, Method::HardLink);
    let own = rig.content_dir(&key).join("data");
    assert_eq!(fs::metadata(&own).unwrap().ino(), fs::metadata(&destination).unwrap().ino());
    assert_eq!(fs::metadata(&destination).unwrap().permissions().mode() & 0o777, 0o444);
    assert_eq!(entry.place(&destination, LINK).await.unwrap().method, Method::HardLink);
    assert_eq!(names(rig.dir.path()), ["data", "model.bin"]);

    // A chunk is taken out and another comes in: the placed file does not change.
    entry.remove(&[ChunkIndex(1)].into_iter().collect()).await;
    assert_eq!(fs::read(&destination).unwrap(), data);
    let other = bytes(3, 45_000);
    put(&entry, &other, 1).await.unwrap();
    assert_eq!(fs::read(&destination).unwrap(), data);
    assert_ne!(fs::metadata(&own).unwrap().ino(), fs::metadata(&destination).unwrap().ino());
    assert_eq!(entry.read(ByteRange::new(10_000, 20_000)).await.unwrap()[..], other[10_000..20_000]);
    assert_eq!(entry.read(ByteRange::new(20_000, 45_000)).await.unwrap()[..], data[20_000..]);
}

/// Read-only is meant for others, but holds for a daemon that is not root as well.
#[tokio::test]
async fn a_hard_linked_content_is_read_and_mended_after_a_restart() {
    let rig = Rig::new();
    let data = bytes(8, 45_000);
    let key = blob(&data).key(CHUNK);
    let destination = rig.dir.path().join("model.bin");
    let store = rig.open();
    let entry = put_sealed(&store, &blob(&data), &data).await;
    entry.place(&destination, LINK).await.unwrap();
    for still_placed in [true, false] {
        store.close().unwrap();
        let store = rig.open();
        let entry = store.get(&key).unwrap();
        assert_eq!(get_all(&entry).await.unwrap(), data);
        entry.remove(&[ChunkIndex(2)].into_iter().collect()).await;
        put(&entry, &data, 2).await.unwrap();
        entry.seal().await.unwrap();
        if still_placed {
            assert_eq!(fs::read(&destination).unwrap(), data);
            entry.place(&destination, LINK).await.unwrap();
            fs::remove_file(&destination).unwrap();
        }
        store.close().unwrap();
    }
}

#[tokio::test]
async fn a_placed_file_outlives_the_store() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(4, 45_000);
    let entry = put_sealed(&store, &blob(&data), &data).await;
    let destination = rig.dir.path().join("model.bin");
    entry.place(&destination, LINK).await.unwrap();
    drop((entry, store));
    fs::remove_dir_all(rig.data_dir()).unwrap();
    assert_eq!(fs::read(&destination).unwrap(), data);
}

#[tokio::test]
async fn only_what_is_sealed_and_sound_is_placed() {
    let rig = Rig::new();
    let data = bytes(5, 45_000);
    let destination = rig.dir.path().join("model.bin");
    let store = rig.open();
    let entry = put_all(&store, &blob(&data), &data).await;
    assert!(matches!(entry.place(&destination, COPY).await, Err(PlaceError::NotSealed)));
    entry.seal().await.unwrap();
    drop((entry, store));
    let path = rig.content_dir(&blob(&data).key(CHUNK)).join("data");
    let mut spoilt = data.clone();
    spoilt[30_001] ^= 4;
    fs::write(path, spoilt).unwrap();
    let store = rig.open();
    let entry = store.get(&blob(&data).key(CHUNK)).unwrap();
    assert!(matches!(entry.place(&destination, COPY).await, Err(PlaceError::Corrupt(ChunkIndex(3)))));
    assert!(!destination.exists());
}

#[tokio::test]
async fn destinations_that_cannot_be_are_named() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(6, 25_000);
    let entry = put_sealed(&store, &blob(&data), &data).await;
    let file = rig.dir.path().join("file");
    fs::write(&file, "x").unwrap();
    for (path, says) in [
        (rig.dir.path().to_owned(), "it is a directory"),
        (file.join("below"), "not a directory"),
        (PathBuf::from("relative/model.bin"), "not an absolute path"),
        (PathBuf::from("/proc/windlass/model.bin"), "/proc/windlass"),
    ] {
        let error = entry.place(&path, COPY).await.unwrap_err().to_string();
        assert!(error.contains(says), "{}: {error}", path.display());
    }
    let error = store.check_destination(&file, 1, COPY).await.unwrap_err();
    assert!(matches!(error, PlaceError::BadDestination { .. }), "{error}");
    let here = rig.dir.path().join("new");
    match store.check_destination(&here, u64::MAX, COPY).await {
        Err(PlaceError::TooSmall { needed_bytes: u64::MAX, .. }) | Ok(Method::Reflink) => {}
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn another_file_system_gets_a_copy() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(7, 2_345_678);
    let entry = put_sealed(&store, &blob(&data), &data).await;
    let elsewhere = tempfile::tempdir().unwrap();
    if fs::metadata(elsewhere.path()).unwrap().dev() == fs::metadata(rig.dir.path()).unwrap().dev() {
        return; // there is only one here
    }
    let destination = elsewhere.path().join("model.bin");
    let placed = entry.place(&destination, LINK).await.unwrap();
    assert!(placed.method.takes_room(), "{placed:?}");
    assert_eq!(fs::read(&destination).unwrap(), data);
    assert_eq!(names(elsewhere.path()), ["model.bin"]);
}

#[tokio::test]
async fn a_file_for_somebody_else_is_theirs_and_no_hard_link() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(9, 25_000);
    let entry = put_sealed(&store, &blob(&data), &data).await;
    let destination = rig.dir.path().join("model.bin");
    let options = PlaceOptions { owner: Some(Owner { uid: 1_234, gid: 2_345 }), ..LINK };
    if !rustix::process::geteuid().is_root() {
        let error = store.check_destination(rig.dir.path(), 1, options).await.unwrap_err().to_string();
        assert!(error.contains("1234:2345") && error.contains("as root"), "{error}");
        return;
    }
    let placed = entry.place(&destination, options).await.unwrap();
    assert_ne!(placed.method, Method::HardLink);
    let there = fs::metadata(&destination).unwrap();
    assert_eq!((there.uid(), there.gid(), there.permissions().mode() & 0o777), (1_234, 2_345, 0o644));
    let own = fs::metadata(rig.content_dir(entry.key()).join("data")).unwrap();
    assert_eq!((own.uid(), own.permissions().mode() & 0o777), (0, 0o600));
}

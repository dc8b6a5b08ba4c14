//! The store as its users see it: what goes in comes out, or an error does.

mod bounds;
mod crash;
mod faults;
mod medium;
mod model;
mod place;
mod recovery;
mod script;

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use bytesize::ByteSize;
use sha2::{Digest as _, Sha256};

use super::disk::Disk;
use super::*;
use crate::content::{
    Algorithm, Attestation, ByteRange, ChunkDigest, ChunkIndex, Digest, ETag, NodeId, ObjectVersion,
};

/// Small, and no power of two, so that the last chunk is short and nothing is aligned by luck.
const CHUNK: u32 = 10_000;

const ME: NodeId = NodeId([1; 16]);
const PEER: NodeId = NodeId([2; 16]);

/// Removed with the rig, or somebody else's.
enum Dir {
    Own(tempfile::TempDir),
    At(PathBuf),
}

impl Dir {
    fn path(&self) -> &Path {
        match self {
            Self::Own(dir) => dir.path(),
            Self::At(path) => path,
        }
    }
}

/// A data directory, and the disk under the store that is opened on it.
struct Rig {
    dir: Dir,
    disk: Disk,
    budget: u64,
    free_floor: u64,
    pins: Vec<PinName>,
    scrub_rate: u64,
}

impl Rig {
    fn new() -> Self {
        // In memory where there is such a place: a sync cannot be told from none within one process, and costs most of
        // a test's time on a disk.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        Self {
            dir: Dir::Own(dir),
            disk: Disk::default(),
            budget: 10 << 20,
            free_floor: 0,
            pins: Vec::new(),
            scrub_rate: 0,
        }
    }

    /// A rig on what another one left behind.
    fn at(path: &Path) -> Self {
        Self {
            dir: Dir::At(path.to_owned()),
            disk: Disk::default(),
            budget: 10 << 20,
            free_floor: 0,
            pins: Vec::new(),
            scrub_rate: 0,
        }
    }

    fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn try_open(&self) -> Result<Store, OpenError> {
        let config = Config {
            data_dir: self.data_dir(),
            budget: ByteSize(self.budget),
            free_floor: ByteSize(self.free_floor),
            pins: self.pins.clone(),
            scrub_rate: ByteSize(self.scrub_rate),
            io_threads: 2,
        };
        Store::open_on(self.disk.clone(), &config, Metrics::default())
    }

    fn open(&self) -> Store {
        self.try_open().unwrap()
    }

    /// The directory of a content.
    fn content_dir(&self, key: &ContentKey) -> PathBuf {
        self.data_dir().join("contents").join(&key.hex()[..2]).join(key.hex())
    }
}

/// Bytes that differ between contents and between chunks.
fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

fn blob(data: &[u8]) -> ContentId {
    ContentId::Blob(sha256(data))
}

fn sha256(data: &[u8]) -> Digest {
    Digest::from_bytes(Algorithm::Sha256, &Sha256::digest(data)).unwrap()
}

fn object(name: &str, data: &[u8]) -> ContentId {
    ContentId::Object(ObjectVersion {
        bucket: "models".into(),
        key: name.into(),
        etag: ETag("\"1\"".into()),
        size: data.len() as u64,
    })
}

fn layout(data: &[u8]) -> Layout {
    Layout::new(data.len() as u64, CHUNK).unwrap()
}

/// A chunk of `data` in the uneven pieces that a network would deliver.
fn pieces(data: &[u8], chunk: u32) -> Vec<Bytes> {
    let range = layout(data).chunk_range(ChunkIndex(chunk));
    let (start, end) = (usize::try_from(range.start()).unwrap(), usize::try_from(range.end()).unwrap());
    data[start..end].chunks(1_439).map(Bytes::copy_from_slice).collect()
}

async fn put(entry: &Arc<Entry>, data: &[u8], chunk: u32) -> Result<Attestation, InsertError> {
    entry.insert(ChunkIndex(chunk), pieces(data, chunk), Expect::Attest(ME)).await
}

async fn put_all(store: &Store, id: &ContentId, data: &[u8]) -> Arc<Entry> {
    let entry = store.create(id, layout(data)).unwrap();
    for chunk in entry.layout().chunks() {
        put(&entry, data, chunk.0).await.unwrap();
    }
    entry
}

async fn put_sealed(store: &Store, id: &ContentId, data: &[u8]) -> Arc<Entry> {
    let entry = put_all(store, id, data).await;
    entry.seal().await.unwrap();
    entry
}

async fn get_all(entry: &Arc<Entry>) -> Result<Vec<u8>, ReadError> {
    let mut out = Vec::new();
    while (out.len() as u64) < entry.layout().size() {
        let start = out.len() as u64;
        let range = ByteRange::new(start, (start + 7_777).min(entry.layout().size()));
        out.extend_from_slice(&entry.read(range).await?);
    }
    Ok(out)
}

#[tokio::test]
async fn what_goes_in_in_any_order_comes_out() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(1, 95_000);
    let entry = store.create(&blob(&data), layout(&data)).unwrap();
    for chunk in [4, 0, 9, 1, 3, 2, 7, 8, 6] {
        put(&entry, &data, chunk).await.unwrap();
    }
    assert_eq!(entry.have().len(), 9);
    assert!(matches!(
        entry.read(ByteRange::new(49_990, 50_010)).await,
        Err(ReadError::NotHeld(ChunkIndex(5)))
    ));
    assert_eq!(&entry.read(ByteRange::new(19_990, 40_010)).await.unwrap()[..], &data[19_990..40_010]);
    assert!(matches!(entry.seal().await, Err(SealError::Incomplete { missing: 1 })));
    put(&entry, &data, 5).await.unwrap();
    entry.seal().await.unwrap();
    assert!(entry.is_sealed());
    assert_eq!(get_all(&entry).await.unwrap(), data);
    assert_eq!(store.usage().stored_bytes, 95_000);
}

#[tokio::test]
async fn bounds_of_reads_and_chunks_are_checked() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(2, 25_000);
    let entry = put_all(&store, &blob(&data), &data).await;
    assert!(entry.read(ByteRange::new(25_000, 25_000)).await.unwrap().is_empty());
    for range in [ByteRange::new(24_999, 25_001), ByteRange::new(0, READ_MAX_BYTES + 1)] {
        assert!(matches!(entry.read(range).await, Err(ReadError::OutOfBounds { .. })));
    }
    for (chunk, from) in [(2, 0), (3, 2), (0, 2)] {
        let wrong = entry.insert(ChunkIndex(chunk), pieces(&data, from), Expect::Attest(ME)).await;
        assert!(matches!(wrong, Err(InsertError::WrongLength { .. })), "{wrong:?}");
    }
    assert!(matches!(
        entry.insert(ChunkIndex(3), vec![], Expect::Attest(ME)).await,
        Err(InsertError::WrongLength { .. })
    ));
}

#[tokio::test]
async fn a_peers_chunk_must_have_the_attested_digest() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(3, 15_000);
    let entry = store.create(&blob(&data), layout(&data)).unwrap();
    let good = Attestation { digest: ChunkDigest::of(&data[..10_000]), attester: PEER };
    let lie = Attestation { digest: ChunkDigest([0; 32]), attester: PEER };
    let refused = entry.insert(ChunkIndex(0), pieces(&data, 0), Expect::Attested(lie)).await;
    assert!(
        matches!(refused, Err(InsertError::Mismatch { chunk: ChunkIndex(0), attester: PEER })),
        "{refused:?}"
    );
    assert!(entry.have().is_empty());
    assert_eq!(entry.insert(ChunkIndex(0), pieces(&data, 0), Expect::Attested(good)).await.unwrap(), good);
    // Held already: the first attestation stands.
    assert_eq!(put(&entry, &data, 0).await.unwrap(), good);
    assert_eq!(entry.attestation(ChunkIndex(0)), Some(good));
}

#[tokio::test]
async fn a_whole_that_is_wrong_is_not_sealed_until_it_is_right() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(4, 45_000);
    let mut wrong = data.clone();
    wrong[33_333] ^= 1;
    let entry = put_all(&store, &blob(&data), &wrong).await;
    let Err(SealError::Mismatch { expected, actual }) = entry.seal().await else { panic!("sealed") };
    assert_eq!((expected, actual), (sha256(&data), sha256(&wrong)));
    entry.remove(&[ChunkIndex(3)].into_iter().collect()).await;
    assert_eq!(store.usage().stored_bytes, 35_000);
    assert!(matches!(entry.read(ByteRange::new(30_000, 30_001)).await, Err(ReadError::NotHeld(_))));
    put(&entry, &data, 3).await.unwrap();
    entry.seal().await.unwrap();
    assert_eq!(get_all(&entry).await.unwrap(), data);
}

#[tokio::test]
async fn an_object_is_sealed_with_and_without_a_supplied_digest() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(5, 45_000);
    let entry = put_all(&store, &object("a", &data), &data).await;
    let error = entry.seal_matching(&sha256(b"other")).await.unwrap_err();
    assert!(matches!(error, SealError::Mismatch { .. }));
    entry.seal_matching(&sha256(&data)).await.unwrap();
    let entry = put_all(&store, &object("b", &data), &data).await;
    entry.seal().await.unwrap();
    assert!(entry.is_sealed());
}

#[tokio::test]
async fn an_empty_content_and_sha512_work() {
    let rig = Rig::new();
    let store = rig.open();
    put_sealed(&store, &blob(b""), b"").await;
    let data = bytes(6, 12_345);
    let digest = Digest::from_bytes(Algorithm::Sha512, &sha2::Sha512::digest(&data)).unwrap();
    put_sealed(&store, &ContentId::Blob(digest), &data).await;
    store.close().unwrap();
    let store = rig.open();
    let sealed = store.list().iter().filter(|summary| summary.sealed).count();
    assert_eq!(sealed, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_writers_and_readers_of_one_content_agree() {
    let rig = Rig::new();
    let store = rig.open();
    let data: &'static [u8] = bytes(7, 300_000).leak();
    let entry = store.create(&blob(data), layout(data)).unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..90u32 {
        let entry = Arc::clone(&entry);
        tasks.spawn(async move {
            let chunk = n * 7 % 30;
            put(&entry, data, chunk).await.unwrap();
            let range = entry.layout().chunk_range(ChunkIndex(chunk));
            let read = entry.read(range).await.unwrap();
            assert_eq!(ChunkDigest::of(&read), entry.attestation(ChunkIndex(chunk)).unwrap().digest);
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    entry.seal().await.unwrap();
    assert_eq!(store.usage().stored_bytes, 300_000);
}

#[tokio::test]
async fn the_announced_size_may_be_corrected_while_nobody_relies_on_it() {
    let rig = Rig::new();
    let store = rig.open();
    let data = bytes(8, 20_000);
    let wrong = Layout::new(30_000, CHUNK).unwrap();
    let held = store.create(&blob(&data), wrong).unwrap();
    put(&held, &data, 0).await.unwrap();
    assert!(matches!(store.create(&blob(&data), layout(&data)), Err(CreateError::SizeConflict { .. })));
    store.flush().unwrap();
    drop(held);
    // The syncer lets go of the entry once it is durable.
    let entry = loop {
        match store.create(&blob(&data), layout(&data)) {
            Ok(entry) => break entry,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    assert!(entry.have().is_empty());
    drop(entry);
    put_sealed(&store, &blob(&data), &data).await;
    assert!(matches!(store.create(&blob(&data), wrong), Err(CreateError::SizeConflict { .. })));
}

//! What the disk loses is fetched again: while a content is open, and when it is opened next.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use futures_util::TryStreamExt;

use super::testing::Node;
use super::{Content, ReadError};
use crate::content::{ByteRange, ContentId, DEFAULT_CHUNK_BYTES};
use crate::origin::Source;
use crate::origin::fake::FakeSource;

const CHUNK: u64 = DEFAULT_CHUNK_BYTES as u64;

/// Three chunks, the last one short.
const SIZE: u64 = 2 * CHUNK + 54_321;

/// Somewhere in the second chunk.
const SPOT: u64 = CHUNK + 4_321;

const WHOLE: ByteRange = ByteRange::new(0, SIZE);

fn id(source: &FakeSource) -> ContentId {
    ContentId::Blob(source.digest())
}

async fn open(node: &Node, source: &Arc<FakeSource>) -> Content {
    node.cache().open(id(source), SIZE, Arc::clone(source) as Arc<dyn Source>).await.unwrap()
}

async fn read(content: &Content) -> Result<Vec<u8>, ReadError> {
    Ok(content.read(WHOLE).try_collect::<Vec<_>>().await?.concat())
}

/// What a tired disk does.
fn flip(data_dir: &Path, source: &FakeSource) {
    let key = id(source).key(DEFAULT_CHUNK_BYTES).hex();
    let path = data_dir.join("contents").join(&key[..2]).join(key).join("data");
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, SPOT).unwrap();
    file.write_all_at(&[!byte[0]], SPOT).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_scrubber_drops_is_fetched_again_while_the_content_is_open() {
    let node = Node::alone();
    let source = FakeSource::new(1, SIZE);
    let content = open(&node, &source).await;
    content.fill().await.unwrap();
    flip(node.data_dir(), &source);
    node.store().scrub();
    assert!(!node.cache().stat(content.id()).unwrap().sealed);
    assert!(read(&content).await.unwrap() == source.bytes(WHOLE));
    content.fill().await.unwrap();
    assert!(node.cache().stat(content.id()).unwrap().sealed, "the whole was compared again");
    assert_eq!(source.sent_bytes(), SIZE + CHUNK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_scrubber_drops_is_fetched_when_the_content_is_opened_next() {
    let node = Node::alone();
    let source = FakeSource::new(2, SIZE);
    open(&node, &source).await.fill().await.unwrap();
    flip(node.data_dir(), &source);
    node.store().scrub();
    assert_eq!(node.cache().stat(&id(&source)).unwrap().have_bytes, SIZE - CHUNK);
    let content = open(&node, &source).await;
    assert!(read(&content).await.unwrap() == source.bytes(WHOLE));
    assert!(node.cache().stat(content.id()).unwrap().sealed);
    assert_eq!(source.sent_bytes(), SIZE + CHUNK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_first_read_after_a_start_finds_bad_is_fetched_under_the_reader() {
    let node = Node::alone();
    let source = FakeSource::new(3, SIZE);
    open(&node, &source).await.fill().await.unwrap();
    let data = node.end().await;
    flip(data.path(), &source);
    let node = Node::on(data);
    let content = open(&node, &source).await;
    assert!(node.cache().stat(content.id()).unwrap().sealed, "nobody has looked yet");
    assert!(read(&content).await.unwrap() == source.bytes(WHOLE));
    assert!(node.cache().stat(content.id()).unwrap().sealed, "the whole was compared again");
    assert_eq!(source.sent_bytes(), SIZE + CHUNK);
}

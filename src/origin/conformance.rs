//! What every [`Source`] promises, checked the same way on each.

use std::sync::Arc;

use futures_util::TryStreamExt;

use super::{OriginError, Source};
use crate::content::ByteRange;

/// Reads all of one range.
///
/// # Errors
/// Whatever the source fails with, before or in the body.
pub async fn read(source: &dyn Source, range: ByteRange) -> Result<Vec<u8>, OriginError> {
    source.read(range).await?.map_ok(|piece| piece.to_vec()).try_concat().await
}

/// Checks that `source` delivers `bytes`, the content's, whatever the range.
///
/// # Panics
/// When it does not.
pub async fn check(source: Arc<dyn Source>, bytes: &[u8]) {
    let size = bytes.len();
    assert!(size >= 4, "the suite needs a content of at least four bytes");
    assert!(!source.label().is_empty());
    for (start, end) in [(0, size), (0, 1), (size - 1, size), (1, size - 1), (size / 2, size)] {
        let range = ByteRange::new(start as u64, end as u64);
        assert_eq!(read(&*source, range).await.expect("a range inside the content"), bytes[start..end]);
    }
    // Many at once, each its own bytes: nothing is shared between two bodies.
    let reads = (0..4).map(|quarter| {
        let (start, end) = (size * quarter / 4, size * (quarter + 1) / 4);
        let source = Arc::clone(&source);
        async move { (start, end, read(&*source, ByteRange::new(start as u64, end as u64)).await) }
    });
    for (start, end, got) in futures_util::future::join_all(reads).await {
        assert_eq!(got.expect("a range inside the content"), bytes[start..end]);
    }
    // A body dropped half way leaves the source whole.
    drop(source.read(ByteRange::new(0, size as u64)).await.expect("a body"));
    assert_eq!(read(&*source, ByteRange::new(0, 2)).await.expect("two bytes"), bytes[..2]);
}

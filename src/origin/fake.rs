//! An origin for tests: seeded bytes, and faults on demand.
//!
//! Invariant: it fails only as told; the bytes of a seed are the same in every run and at every offset.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, stream};
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;

use super::{Body, OriginError, Source};
use crate::content::{Algorithm, ByteRange, Digest};

/// Length of the pieces of a body, 64 KiB: the order of what a socket delivers.
const PIECE_BYTES: u64 = 64 << 10;

/// What goes wrong with one read.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The request fails before its headers.
    Refuse(OriginError),
    /// No headers until [`FakeSource::release`].
    StallBefore,
    /// No more bytes after this many, until [`FakeSource::release`].
    StallAfter(u64),
    /// The connection breaks after this many bytes.
    Short(u64),
    /// The byte at this offset of the content is wrong.
    Corrupt(u64),
}

/// A content made of a seed.
#[derive(Debug)]
pub struct FakeSource {
    seed: u64,
    size: u64,
    plans: Mutex<Vec<Plan>>,
    requests: Mutex<Vec<ByteRange>>,
    sent_bytes: Arc<AtomicU64>,
    released: Arc<Notify>,
}

#[derive(Debug)]
struct Plan {
    offset: u64,
    times: u32,
    fault: Fault,
}

impl FakeSource {
    #[must_use]
    pub fn new(seed: u64, size: u64) -> Arc<Self> {
        Arc::new(Self {
            seed,
            size,
            plans: Mutex::default(),
            requests: Mutex::default(),
            sent_bytes: Arc::default(),
            released: Arc::default(),
        })
    }

    /// The right bytes of `range`.
    #[must_use]
    pub fn bytes(&self, range: ByteRange) -> Bytes {
        seeded_bytes(self.seed, range)
    }

    /// SHA-256 of the whole content.
    ///
    /// # Panics
    /// Never: a SHA-256 has the length of a SHA-256.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let mut hasher = Sha256::new();
        for piece in 0..self.size.div_ceil(PIECE_BYTES) {
            let start = piece * PIECE_BYTES;
            hasher.update(self.bytes(ByteRange::new(start, (start + PIECE_BYTES).min(self.size))));
        }
        Digest::from_bytes(Algorithm::Sha256, &hasher.finalize()).expect("SHA-256 has 32 bytes")
    }

    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The next `times` reads whose range covers `offset` meet `fault`.
    pub fn inject(&self, offset: u64, times: u32, fault: Fault) {
        self.plans.lock().push(Plan { offset, times, fault });
    }

    /// Lets every read that stalls now go on.
    pub fn release(&self) {
        self.released.notify_waiters();
    }

    /// Reads so far, in the order in which they came.
    #[must_use]
    pub fn requests(&self) -> Vec<ByteRange> {
        self.requests.lock().clone()
    }

    /// Reads so far whose range covers `offset`.
    #[must_use]
    pub fn requests_at(&self, offset: u64) -> usize {
        self.requests.lock().iter().filter(|range| covers(**range, offset)).count()
    }

    /// Body bytes handed out so far.
    #[must_use]
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }

    /// The fault that the next read of `range` meets, used up by this.
    fn fault(&self, range: ByteRange) -> Option<Fault> {
        let mut plans = self.plans.lock();
        let index = plans.iter().position(|plan| covers(range, plan.offset))?;
        plans[index].times -= 1;
        let fault = plans[index].fault.clone();
        plans.retain(|plan| plan.times > 0);
        Some(fault)
    }

    fn body(&self, range: ByteRange, fault: Option<Fault>) -> Body {
        let (seed, sent) = (self.seed, Arc::clone(&self.sent_bytes));
        let (corrupt, stall, end) = match fault {
            Some(Fault::Corrupt(offset)) => (Some(offset), None, None),
            Some(Fault::StallAfter(n)) => (None, Some(range.start() + n), None),
            Some(Fault::Short(n)) => (None, None, Some(range.start() + n)),
            _ => (None, None, None),
        };
        let stop = end.unwrap_or(u64::MAX).min(range.end());
        let released = Arc::clone(&self.released);
        let pieces = stream::unfold((range.start(), stall), move |(at, stall)| {
            let (sent, released) = (Arc::clone(&sent), Arc::clone(&released));
            async move {
                if at >= stop {
                    return None;
                }
                let mut next = (at + PIECE_BYTES).min(stop);
                let mut ahead = stall;
                match stall {
                    Some(offset) if offset <= at => {
                        released.notified().await;
                        ahead = None;
                    }
                    Some(offset) => next = next.min(offset),
                    None => {}
                }
                let piece = corrupted(seeded_bytes(seed, ByteRange::new(at, next)), at, corrupt);
                sent.fetch_add(next - at, Ordering::Relaxed);
                Some((Ok(piece), (next, ahead)))
            }
        });
        match end {
            Some(_) => pieces.chain(stream::once(async { Err(connection_lost()) })).boxed(),
            None => pieces.boxed(),
        }
    }
}

impl Source for FakeSource {
    fn read(&self, range: ByteRange) -> BoxFuture<'_, Result<Body, OriginError>> {
        self.requests.lock().push(range);
        let fault = self.fault(range);
        async move {
            match fault {
                Some(Fault::Refuse(error)) => return Err(error),
                Some(Fault::StallBefore) => self.released.notified().await,
                _ => {}
            }
            Ok(self.body(range, fault))
        }
        .boxed()
    }

    fn label(&self) -> &'static str {
        "fake"
    }
}

/// Bytes of `range` in the endless content of `seed`: BLAKE3's output stream, so any offset costs the same.
#[must_use]
pub fn seeded_bytes(seed: u64, range: ByteRange) -> Bytes {
    let mut reader = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    reader.set_position(range.start());
    let mut bytes = vec![0; usize::try_from(range.len()).unwrap_or(usize::MAX)];
    reader.fill(&mut bytes);
    Bytes::from(bytes)
}

fn corrupted(piece: Bytes, start: u64, corrupt: Option<u64>) -> Bytes {
    let index = corrupt.and_then(|offset| usize::try_from(offset.checked_sub(start)?).ok());
    let Some(index) = index.filter(|index| *index < piece.len()) else { return piece };
    let mut bytes = piece.to_vec();
    bytes[index] ^= 0xff;
    Bytes::from(bytes)
}

fn connection_lost() -> OriginError {
    OriginError::Failed { origin: "fake".to_owned(), reason: "connection lost".to_owned() }
}

const fn covers(range: ByteRange, offset: u64) -> bool {
    range.start() <= offset && offset < range.end()
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::*;

    const SIZE: u64 = 300_000;

    fn whole() -> ByteRange {
        ByteRange::new(0, SIZE)
    }

    #[tokio::test]
    async fn conforms() {
        let fake = FakeSource::new(1, SIZE);
        let bytes = fake.bytes(whole());
        conformance::check(fake, &bytes).await;
    }

    #[tokio::test]
    async fn each_fault_strikes_once_where_it_was_put() {
        let fake = FakeSource::new(1, SIZE);
        let right = fake.bytes(whole());
        fake.inject(100_000, 1, Fault::Corrupt(100_000));
        assert_eq!(conformance::read(&*fake, ByteRange::new(0, 10)).await.unwrap(), right[..10]);
        let wrong = conformance::read(&*fake, whole()).await.unwrap();
        let differ: Vec<_> = (0..right.len()).filter(|i| wrong[*i] != right[*i]).collect();
        assert_eq!(differ, [100_000]);
        fake.inject(0, 1, Fault::Short(70_000));
        assert!(conformance::read(&*fake, whole()).await.is_err());
        assert_eq!(conformance::read(&*fake, whole()).await.unwrap(), right);
        assert_eq!(fake.requests_at(5), 4);
    }

    #[tokio::test]
    async fn a_stalled_read_goes_on_when_released() {
        let fake = FakeSource::new(1, SIZE);
        fake.inject(0, 1, Fault::StallAfter(1_000));
        let mut body = fake.read(whole()).await.unwrap();
        assert_eq!(body.next().await.unwrap().unwrap().len(), 1_000);
        assert!(futures_util::poll!(body.next()).is_pending());
        let mut waiting = body.next();
        assert!(futures_util::poll!(&mut waiting).is_pending());
        fake.release();
        assert!(waiting.await.unwrap().is_ok());
    }
}

//! Buffers for what is served, used again and again.
//!
//! A piece of 256 KiB is just large enough that an allocator gives its memory back to the kernel and gets it again, page
//! by page, for every piece; and a buffer that was used a moment ago is still in the core's cache. Invariant: at most
//! [`SPARES_MAX`] lie about unused. What one holds is overwritten before anybody sees it.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

/// Bytes of a buffer: a piece as readers take it.
pub(super) const SPARE_BYTES: usize = 256 << 10;

/// Eight MiB at most: as many pieces as some tens of clients have under way between a read and a full socket.
const SPARES_MAX: usize = 32;

/// A smaller piece does not keep a whole buffer busy while a slow client takes it.
const WORTH_BYTES: usize = SPARE_BYTES / 4;

/// The unused buffers of a store; cloning shares them.
#[derive(Clone, Debug, Default)]
pub(super) struct Spares(Arc<Mutex<Vec<Box<[u8]>>>>);

/// `len` bytes of memory that return to where they came from.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Box<[u8]>,
    len: usize,
    home: Spares,
}

impl Spares {
    /// `len` bytes, whatever is in them.
    pub(super) fn take(&self, len: usize) -> Buffer {
        let fits = (WORTH_BYTES..=SPARE_BYTES).contains(&len);
        let spare = if fits { self.0.lock().pop() } else { None };
        let bytes = spare.unwrap_or_else(|| vec![0; if fits { SPARE_BYTES } else { len }].into_boxed_slice());
        Buffer { bytes, len, home: self.clone() }
    }
}

impl Buffer {
    pub(super) fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl From<Buffer> for Bytes {
    fn from(buffer: Buffer) -> Self {
        Self::from_owner(buffer)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes.len() != SPARE_BYTES {
            return;
        }
        let mut spares = self.home.0.lock();
        if spares.len() < SPARES_MAX {
            spares.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_return_and_few_are_kept() {
        let spares = Spares::default();
        let mut buffer = spares.take(SPARE_BYTES - 1);
        buffer.as_mut().fill(7);
        let bytes = Bytes::from(buffer);
        let part = bytes.slice(..10);
        drop(bytes);
        assert_eq!(spares.0.lock().len(), 0, "a part of it is still in use");
        assert_eq!(part, [7; 10][..]);
        drop(part);
        assert_eq!(spares.0.lock().len(), 1);
        let many: Vec<Buffer> = (0..SPARES_MAX + 5).map(|_| spares.take(SPARE_BYTES)).collect();
        assert_eq!(spares.0.lock().len(), 0);
        drop(many);
        assert_eq!(spares.0.lock().len(), SPARES_MAX);
        drop(spares.take(10));
        assert_eq!((spares.0.lock().len(), spares.take(10).as_ref().len()), (SPARES_MAX, 10));
    }
}

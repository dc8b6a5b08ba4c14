//! Bytes that exist only while they are read.
//!
//! Invariant: every byte is a function of the recipe and its offset alone, so any range can be read, again and by
//! anyone, without a disk behind it, and the bytes are the same in every run.
//! This module refuses to know what the bytes pretend to be.

use bytes::Bytes;

use crate::content::ByteRange;

/// How the bytes of one content come about.
#[derive(Clone)]
pub(super) struct Recipe {
    segments: Vec<Segment>,
    len: u64,
}

/// A run of bytes of one kind.
#[derive(Clone)]
pub(super) enum Segment {
    Literal(Bytes),
    Zeros(u64),
    /// The BLAKE3 output stream of a name: incompressible, seekable, and made at several GB/s a core.
    Random {
        stream: Box<blake3::OutputReader>,
        len: u64,
    },
}

impl Segment {
    /// `len` pseudo-random bytes that differ from those of every other `name`.
    #[must_use]
    pub(super) fn random(name: &str, len: u64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("windlass demo bytes v1");
        Self::Random { stream: Box::new(hasher.update(name.as_bytes()).finalize_xof()), len }
    }

    fn len(&self) -> u64 {
        match self {
            Self::Literal(bytes) => bytes.len() as u64,
            Self::Zeros(len) | Self::Random { len, .. } => *len,
        }
    }

    /// Fills `out`, which is zeroed, with the bytes from `offset` on.
    fn fill(&self, offset: u64, out: &mut [u8]) {
        match self {
            Self::Literal(bytes) => {
                let start = index(offset);
                out.copy_from_slice(&bytes[start..start + out.len()]);
            }
            Self::Zeros(_) => {}
            Self::Random { stream, .. } => {
                let mut stream = stream.clone();
                stream.set_position(offset);
                stream.fill(out);
            }
        }
    }
}

impl Recipe {
    #[must_use]
    pub(super) fn new(segments: Vec<Segment>) -> Self {
        let len = segments.iter().map(Segment::len).sum();
        Self { segments, len }
    }

    /// Bytes in all.
    #[must_use]
    pub(super) const fn size(&self) -> u64 {
        self.len
    }

    /// The bytes of `range`, as far as it lies inside.
    #[must_use]
    pub(super) fn read(&self, range: ByteRange) -> Bytes {
        let range = range.intersect(ByteRange::new(0, self.len));
        let mut out = vec![0; index(range.len())];
        let mut start = 0;
        for segment in &self.segments {
            let whole = ByteRange::new(start, start + segment.len());
            let part = range.intersect(whole);
            if !part.is_empty() {
                let into = index(part.start() - range.start())..index(part.end() - range.start());
                segment.fill(part.start() - start, &mut out[into]);
            }
            start = whole.end();
        }
        out.into()
    }
}

impl From<Vec<u8>> for Recipe {
    fn from(bytes: Vec<u8>) -> Self {
        Self::new(vec![Segment::Literal(bytes.into())])
    }
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("what is read at once was allocated, so its length is a usize")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mixed() -> Recipe {
        Recipe::new(vec![
            Segment::Literal(Bytes::from_static(b"header")),
            Segment::random("a", 10_000),
            Segment::Zeros(513),
            Segment::random("b", 777),
        ])
    }

    proptest! {
        #[test]
        fn any_range_reads_as_the_whole_does(a in 0u64..12_000, b in 0u64..12_000) {
            let whole = mixed().read(ByteRange::new(0, u64::MAX));
            let (start, end) = (a.min(b), a.max(b).min(11_296));
            let expected = whole.get(index(start)..index(end)).unwrap_or_default();
            prop_assert_eq!(&mixed().read(ByteRange::new(start, end))[..], expected);
        }
    }

    #[test]
    fn names_make_different_bytes_and_runs_the_same() {
        let read = |name| Recipe::new(vec![Segment::random(name, 64)]).read(ByteRange::new(0, 64));
        assert_ne!(read("a"), read("b"));
        assert_eq!(read("a"), read("a"));
        assert_eq!(mixed().size(), 6 + 10_000 + 513 + 777);
    }
}

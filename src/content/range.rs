//! Byte ranges, and the one place where a `Range` header meets a size (RFC 9110 section 14).

use serde::{Deserialize, Serialize};

/// Bytes `start..end`, end exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// `end` below `start` makes an empty range at `start`.
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start, end: if end < start { start } else { end } }
    }

    #[must_use]
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// One past the last byte.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.end
    }

    #[must_use]
    pub const fn len(&self) -> u64 {
        self.end - self.start
    }

    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The part that both ranges cover.
    #[must_use]
    pub fn intersect(&self, other: Self) -> Self {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// As a `Range` request header value. Callers never ask for an empty range.
    #[must_use]
    pub fn to_header(&self) -> String {
        format!("bytes={}-{}", self.start, self.end.saturating_sub(1))
    }
}

/// A parsed `Range` request header that we honour: exactly one byte range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeHeader {
    /// `bytes=a-`
    From(u64),
    /// `bytes=a-b`, b inclusive as on the wire
    FromTo(u64, u64),
    /// `bytes=-n`
    Suffix(u64),
}

/// The range starts past the end: answer 416 with `Content-Range: bytes */size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("range starts beyond the end of a content of {size} bytes")]
pub struct RangeError {
    pub size: u64,
}

impl RangeHeader {
    /// `None` for what RFC 9110 tells a server to ignore: another unit, a malformed value. Several ranges are
    /// ignored too, which it allows; no client of ours sends them.
    #[must_use]
    pub fn parse(value: &str) -> Option<Self> {
        let spec = value.trim().strip_prefix("bytes=")?.trim();
        let (first, last) = spec.split_once('-')?;
        match (first.is_empty(), last.is_empty()) {
            (false, true) => Some(Self::From(number(first)?)),
            (true, false) => Some(Self::Suffix(number(last)?)),
            (false, false) => {
                let (first, last) = (number(first)?, number(last)?);
                (first <= last).then_some(Self::FromTo(first, last))
            }
            (true, true) => None,
        }
    }

    /// The bytes meant, given the size of what they are taken from.
    ///
    /// # Errors
    /// [`RangeError`] when no byte of the content is in the range.
    pub fn resolve(self, size: u64) -> Result<ByteRange, RangeError> {
        let range = match self {
            Self::From(first) => ByteRange::new(first, size),
            Self::FromTo(first, last) => ByteRange::new(first, last.saturating_add(1).min(size)),
            Self::Suffix(n) => ByteRange::new(size.saturating_sub(n), size),
        };
        if range.is_empty() || range.start() >= size {
            return Err(RangeError { size });
        }
        Ok(range)
    }
}

fn number(text: &str) -> Option<u64> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(header: &str, size: u64) -> Option<Result<(u64, u64), RangeError>> {
        Some(RangeHeader::parse(header)?.resolve(size).map(|r| (r.start(), r.end())))
    }

    #[test]
    fn rfc_9110_examples() {
        assert_eq!(resolved("bytes=0-499", 10_000), Some(Ok((0, 500))));
        assert_eq!(resolved("bytes=500-999", 10_000), Some(Ok((500, 1_000))));
        assert_eq!(resolved("bytes=-500", 10_000), Some(Ok((9_500, 10_000))));
        assert_eq!(resolved("bytes=9500-", 10_000), Some(Ok((9_500, 10_000))));
        assert_eq!(resolved("bytes=0-0", 10_000), Some(Ok((0, 1))));
    }

    #[test]
    fn ends_are_clamped_and_starts_are_not() {
        assert_eq!(resolved("bytes=5-99", 10), Some(Ok((5, 10))));
        assert_eq!(resolved("bytes=-99", 10), Some(Ok((0, 10))));
        assert_eq!(resolved("bytes=10-", 10), Some(Err(RangeError { size: 10 })));
        assert_eq!(resolved("bytes=-0", 10), Some(Err(RangeError { size: 10 })));
        assert_eq!(resolved("bytes=0-", 0), Some(Err(RangeError { size: 0 })));
        assert_eq!(resolved("bytes=0-18446744073709551615", 10), Some(Ok((0, 10))));
    }

    #[test]
    fn what_is_not_one_byte_range_is_ignored() {
        for header in
            ["items=0-1", "bytes=", "bytes=-", "bytes=2-1", "bytes=0-1,3-4", "bytes=a-b", "bytes=+1-2"]
        {
            assert_eq!(RangeHeader::parse(header), None, "{header}");
        }
    }
}

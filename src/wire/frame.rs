//! Framing: length prefix, bound, postcard.

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

/// Length of the prefix in front of every frame's body.
pub const FRAME_PREFIX_BYTES: usize = 4;

/// What may travel as a frame.
pub trait Frame: Serialize + DeserializeOwned {
    /// Longest body in bytes, prefix excluded. Bounds what a peer can make us buffer before we know what it is.
    const MAX_BODY_BYTES: usize;

    /// Whether the collections and numbers inside keep their bounds.
    fn is_within_bounds(&self) -> bool {
        true
    }
}

/// Why bytes are not a frame of the expected kind. The peer is at fault: drop what it sent, or the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("a frame of {len} bytes is longer than the {max} its kind may have")]
    TooLong { len: usize, max: usize },
    #[error("the frame's length prefix does not match its bytes")]
    WrongLength,
    #[error("the frame does not parse: the peer may run an incompatible version")]
    Malformed,
    #[error("a field of the frame is out of bounds")]
    OutOfBounds,
}

/// The complete frame, prefix included.
#[must_use]
pub fn encode<T: Frame>(value: &T) -> Bytes {
    debug_assert!(value.is_within_bounds(), "the sender keeps its own bounds");
    let mut frame = postcard::to_extend(value, vec![0; FRAME_PREFIX_BYTES])
        .expect("plain data serialises into memory: no frame type has a Serialize of its own");
    let body_len = u32::try_from(frame.len() - FRAME_PREFIX_BYTES).unwrap_or(u32::MAX);
    frame[..FRAME_PREFIX_BYTES].copy_from_slice(&body_len.to_le_bytes());
    frame.into()
}

/// Length of the body that follows `prefix`: what an asynchronous reader reads next.
///
/// # Errors
/// [`DecodeError::TooLong`] when a `T` cannot be that long; nothing more should be read from the stream.
pub fn body_len<T: Frame>(prefix: [u8; FRAME_PREFIX_BYTES]) -> Result<usize, DecodeError> {
    let len = u32::from_le_bytes(prefix) as usize;
    if len > T::MAX_BODY_BYTES {
        return Err(DecodeError::TooLong { len, max: T::MAX_BODY_BYTES });
    }
    Ok(len)
}

/// Decodes a body whose length [`body_len`] gave.
///
/// # Errors
/// When the bytes are not exactly one `T` within its bounds.
pub fn decode_body<T: Frame>(body: &[u8]) -> Result<T, DecodeError> {
    if body.len() > T::MAX_BODY_BYTES {
        return Err(DecodeError::TooLong { len: body.len(), max: T::MAX_BODY_BYTES });
    }
    let (value, rest) = postcard::take_from_bytes::<T>(body).map_err(|_| DecodeError::Malformed)?;
    if !rest.is_empty() {
        return Err(DecodeError::Malformed);
    }
    if !value.is_within_bounds() {
        return Err(DecodeError::OutOfBounds);
    }
    Ok(value)
}

/// Decodes a complete frame, prefix included.
///
/// # Errors
/// As [`body_len`] and [`decode_body`], and when the prefix disagrees with the number of bytes.
pub fn decode<T: Frame>(frame: &[u8]) -> Result<T, DecodeError> {
    let (prefix, body) = frame.split_first_chunk().ok_or(DecodeError::WrongLength)?;
    if body_len::<T>(*prefix)? != body.len() {
        return Err(DecodeError::WrongLength);
    }
    decode_body(body)
}

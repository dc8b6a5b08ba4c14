//! The two halves of a stream, as callers see them, whatever carries them.
//!
//! Invariant: a half that is dropped before its end was agreed tells the peer so (code [`DROPPED`]); a cut stream
//! never looks like a finished one.

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::wire::{self, DecodeError, FRAME_PREFIX_BYTES, Frame};

/// The code a peer sees when a half was dropped without `finish`, `reset` or `stop`.
pub const DROPPED: u32 = 0;

/// Sending half of a stream. Dropping it before [`Self::finish`] resets it.
pub struct SendStream(pub(super) Box<dyn SendHalf>);

/// Receiving half of a stream. Dropping it before the end stops the sender.
pub struct RecvStream(pub(super) Box<dyn RecvHalf>);

/// What an implementation provides; callers use [`SendStream`].
pub(super) trait SendHalf: Send + 'static {
    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), StreamError>>;
    fn finish(&mut self) -> Result<(), StreamError>;
    fn reset(&mut self, code: u32);
}

/// What an implementation provides; callers use [`RecvStream`].
pub(super) trait RecvHalf: Send + 'static {
    fn read<'a>(
        &'a mut self,
        into: &'a mut Vec<Bytes>,
        limit: usize,
    ) -> BoxFuture<'a, Result<usize, StreamError>>;
    fn stop(&mut self, code: u32);
}

impl SendStream {
    /// Queues `bytes` without copying; waits while the peer's window is full. 128 to 256 KiB at a time is fastest.
    ///
    /// # Errors
    /// When the peer stopped the stream or is gone.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), StreamError> {
        self.0.write(bytes).await
    }

    /// No more bytes will follow.
    ///
    /// # Errors
    /// When the stream is already closed.
    pub fn finish(&mut self) -> Result<(), StreamError> {
        self.0.finish()
    }

    /// Abandons the stream; the peer's reads fail with `code`.
    pub fn reset(&mut self, code: u32) {
        self.0.reset(code);
    }
}

impl RecvStream {
    /// Appends at most `limit` bytes, as the pieces they arrived in, to `into`. Returns their number; 0 is the end.
    /// Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// When the peer reset the stream or is gone.
    pub async fn read(&mut self, into: &mut Vec<Bytes>, limit: usize) -> Result<usize, StreamError> {
        self.0.read(into, limit).await
    }

    /// Reads exactly `len` bytes into one buffer: for headers and trailers.
    ///
    /// # Errors
    /// As [`Self::read`]; [`StreamError::Ended`] when the stream ends first.
    pub async fn read_exact(&mut self, len: usize) -> Result<Bytes, StreamError> {
        let mut pieces = Vec::new();
        let mut got = 0;
        while got < len {
            match self.read(&mut pieces, len - got).await? {
                0 => return Err(StreamError::Ended),
                n => got += n,
            }
        }
        Ok(if pieces.len() == 1 { pieces.swap_remove(0) } else { pieces.concat().into() })
    }

    /// Reads one frame of the peer protocol.
    ///
    /// # Errors
    /// When the stream breaks or ends first, or the bytes are no such frame.
    pub async fn read_frame<T: Frame>(&mut self) -> Result<T, FrameError> {
        let prefix = self.read_exact(FRAME_PREFIX_BYTES).await?;
        let mut length = [0; FRAME_PREFIX_BYTES];
        length.copy_from_slice(&prefix);
        let body = self.read_exact(wire::body_len::<T>(length)?).await?;
        Ok(wire::decode_body(&body)?)
    }

    /// Tells the peer to stop sending.
    pub fn stop(&mut self, code: u32) {
        self.0.stop(code);
    }
}

/// Why no frame was read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// Why a stream broke.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The peer reset its sending half or stopped ours.
    #[error("the peer gave the stream up (code {0})")]
    GivenUp(u32),
    #[error("the connection was lost: {0}")]
    Lost(String),
    #[error("the stream ended early")]
    Ended,
}

//! quinn's stream halves behind the transport's. Each keeps its connection marked as used.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use quinn::{ReadError, VarInt, WriteError};

use super::connection::{Connection, InUse};
use crate::transport::stream::{DROPPED, RecvHalf, RecvStream, SendHalf, SendStream, StreamError};

/// Pieces taken from quinn per lock. More was not faster.
const PIECES_PER_READ: usize = 32;

pub(super) fn wrap(
    connection: &Arc<Connection>,
    send: quinn::SendStream,
    recv: quinn::RecvStream,
) -> (SendStream, RecvStream) {
    let send = Sending { stream: send, closed: false, _in_use: InUse::new(connection) };
    let recv = Receiving { stream: recv, spare: VecDeque::new(), _in_use: InUse::new(connection) };
    (SendStream(Box::new(send)), RecvStream(Box::new(recv)))
}

struct Sending {
    stream: quinn::SendStream,
    closed: bool,
    _in_use: InUse,
}

impl SendHalf for Sending {
    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), StreamError>> {
        Box::pin(async move { self.stream.write_chunk(bytes).await.map_err(write_error) })
    }

    fn finish(&mut self) -> Result<(), StreamError> {
        self.closed = true;
        self.stream.finish().map_err(|_| StreamError::Ended)
    }

    fn reset(&mut self, code: u32) {
        self.closed = true;
        // An error means that the stream is closed already, which is what was asked for.
        let _ = self.stream.reset(VarInt::from_u32(code));
    }
}

impl Drop for Sending {
    /// quinn would finish the stream, and a cut transfer would look complete.
    fn drop(&mut self) {
        if !self.closed {
            self.reset(DROPPED);
        }
    }
}

struct Receiving {
    stream: quinn::RecvStream,
    /// Received, but beyond the caller's last limit.
    spare: VecDeque<Bytes>,
    _in_use: InUse,
}

impl Receiving {
    /// Moves at most `limit` bytes out of `spare`.
    fn take(&mut self, into: &mut Vec<Bytes>, limit: usize) -> usize {
        let mut taken = 0;
        while let Some(front) = self.spare.front_mut().filter(|_| taken < limit) {
            let room = limit - taken;
            taken += front.len().min(room);
            if front.len() > room {
                into.push(front.split_to(room));
            } else {
                into.extend(self.spare.pop_front());
            }
        }
        taken
    }
}

impl RecvHalf for Receiving {
    fn read<'a>(
        &'a mut self,
        into: &'a mut Vec<Bytes>,
        limit: usize,
    ) -> BoxFuture<'a, Result<usize, StreamError>> {
        Box::pin(async move {
            if self.spare.is_empty() {
                let mut pieces = [const { Bytes::new() }; PIECES_PER_READ];
                let Some(n) = self.stream.read_chunks(&mut pieces).await.map_err(read_error)? else {
                    return Ok(0);
                };
                self.spare.extend(pieces.into_iter().take(n));
            }
            Ok(self.take(into, limit))
        })
    }

    fn stop(&mut self, code: u32) {
        // An error means that the stream has ended already.
        let _ = self.stream.stop(VarInt::from_u32(code));
    }
}

fn write_error(error: WriteError) -> StreamError {
    match error {
        WriteError::Stopped(code) => StreamError::GivenUp(narrow(code)),
        WriteError::ConnectionLost(reason) => StreamError::Lost(reason.to_string()),
        WriteError::ClosedStream | WriteError::ZeroRttRejected => StreamError::Ended,
    }
}

fn read_error(error: ReadError) -> StreamError {
    match error {
        ReadError::Reset(code) => StreamError::GivenUp(narrow(code)),
        ReadError::ConnectionLost(reason) => StreamError::Lost(reason.to_string()),
        ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
            StreamError::Ended
        }
    }
}

/// Peers of this protocol send codes of 32 bits; a wider one says nothing we know.
fn narrow(code: VarInt) -> u32 {
    u32::try_from(code.into_inner()).unwrap_or(u32::MAX)
}

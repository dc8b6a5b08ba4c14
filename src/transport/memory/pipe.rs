//! One direction of a stream between two nodes of the same process.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio_util::sync::CancellationToken;

use super::link::{Item, Outbox};
use crate::transport::stream::{DROPPED, RecvHalf, RecvStream, SendHalf, SendStream, StreamError};

/// What a writer may be ahead of its reader, bytes. Less than QUIC's window, so that tests meet the limit sooner.
const WINDOW_BYTES: usize = 1 << 20;

struct Pipe {
    state: Mutex<State>,
    changed: Notify,
    /// The link that carries it is gone.
    lost: CancellationToken,
}

#[derive(Default)]
struct State {
    pieces: VecDeque<Bytes>,
    bytes: usize,
    finished: bool,
    reset: Option<u32>,
    stopped: Option<u32>,
}

/// The four halves of a new stream: two for the side that opens it, and two that reach the other side through
/// `outbox` when the opener first writes.
pub(super) fn stream(
    lost: &CancellationToken,
    outbox: Arc<Outbox>,
    permit: OwnedSemaphorePermit,
) -> (SendStream, RecvStream) {
    let (there, back) = (Pipe::new(lost), Pipe::new(lost));
    let theirs = Item::Stream(
        SendStream(Box::new(Sending { pipe: Arc::clone(&back), announce: None })),
        RecvStream(Box::new(Receiving { pipe: Arc::clone(&there), _permit: None })),
    );
    let send = Sending { pipe: there, announce: Some((outbox, theirs)) };
    let recv = Receiving { pipe: back, _permit: Some(permit) };
    (SendStream(Box::new(send)), RecvStream(Box::new(recv)))
}

impl Pipe {
    fn new(lost: &CancellationToken) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), changed: Notify::new(), lost: lost.clone() })
    }

    /// Tries `step` now and whenever something changed, until it yields.
    async fn until<T>(&self, mut step: impl FnMut(&mut State) -> Option<T>) -> Result<T, StreamError> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            // Looked at first: what was sent before the link was lost can still be read.
            let lost = self.lost.is_cancelled();
            if let Some(done) = step(&mut self.state.lock()) {
                self.changed.notify_waiters();
                return Ok(done);
            }
            if lost {
                return Err(StreamError::Lost("the link was cut".into()));
            }
            tokio::select! {
                () = changed => {}
                () = self.lost.cancelled() => {}
            }
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock());
        self.changed.notify_waiters();
    }
}

struct Sending {
    pipe: Arc<Pipe>,
    announce: Option<(Arc<Outbox>, Item)>,
}

impl Sending {
    fn announce(&mut self) {
        if let Some((outbox, theirs)) = self.announce.take() {
            outbox.push_stream(theirs);
        }
    }

    fn close(&mut self, change: impl FnOnce(&mut State)) -> Result<(), StreamError> {
        self.announce();
        let mut outcome = Err(StreamError::Ended);
        self.pipe.change(|state| {
            if !state.finished && state.reset.is_none() {
                change(state);
                outcome = Ok(());
            }
        });
        outcome
    }
}

impl SendHalf for Sending {
    fn write(&mut self, mut bytes: Bytes) -> BoxFuture<'_, Result<(), StreamError>> {
        self.announce();
        Box::pin(async move {
            while !bytes.is_empty() {
                let taken = self.pipe.until(|state| state.take_from(&mut bytes)).await?;
                taken?;
                if self.pipe.lost.is_cancelled() {
                    return Err(StreamError::Lost("the link was cut".into()));
                }
            }
            Ok(())
        })
    }

    fn finish(&mut self) -> Result<(), StreamError> {
        self.close(|state| state.finished = true)
    }

    fn reset(&mut self, code: u32) {
        // An error means that the half is closed already, which is what was asked for.
        let _ = self.close(|state| state.reset = Some(code));
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        if self.announce.is_none() {
            self.reset(DROPPED);
        }
    }
}

struct Receiving {
    pipe: Arc<Pipe>,
    /// The opener's right to one more stream.
    _permit: Option<OwnedSemaphorePermit>,
}

impl RecvHalf for Receiving {
    fn read<'a>(
        &'a mut self,
        into: &'a mut Vec<Bytes>,
        limit: usize,
    ) -> BoxFuture<'a, Result<usize, StreamError>> {
        Box::pin(async move { self.pipe.until(|state| state.give_to(into, limit)).await? })
    }

    fn stop(&mut self, code: u32) {
        self.pipe.change(|state| {
            state.stopped.get_or_insert(code);
            state.pieces.clear();
            state.bytes = 0;
        });
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.stop(DROPPED);
    }
}

impl State {
    /// Moves what fits into the window; `None` when nothing does.
    fn take_from(&mut self, bytes: &mut Bytes) -> Option<Result<(), StreamError>> {
        if let Some(code) = self.stopped {
            return Some(Err(StreamError::GivenUp(code)));
        }
        if self.finished || self.reset.is_some() {
            return Some(Err(StreamError::Ended));
        }
        let fits = bytes.len().min(WINDOW_BYTES - self.bytes);
        (fits > 0).then(|| {
            self.bytes += fits;
            self.pieces.push_back(bytes.split_to(fits));
            Ok(())
        })
    }

    /// Moves at most `limit` bytes; `None` when there are none yet.
    fn give_to(&mut self, into: &mut Vec<Bytes>, limit: usize) -> Option<Result<usize, StreamError>> {
        if let Some(code) = self.reset {
            return Some(Err(StreamError::GivenUp(code)));
        }
        let mut given = 0;
        while given < limit {
            let Some(mut piece) = self.pieces.pop_front() else { break };
            let rest = piece.split_off(piece.len().min(limit - given));
            given += piece.len();
            into.push(piece);
            if !rest.is_empty() {
                self.pieces.push_front(rest);
            }
        }
        self.bytes -= given;
        (given > 0 || self.finished).then_some(Ok(given))
    }
}

//! The one gate that a response's body passes on its way to a [`Source`](super::Source)'s caller.
//!
//! Invariant: exactly the bytes that were asked for come out, or an error ends the stream; no wait for the next
//! bytes is longer than the progress timeout; every byte is counted when it arrives.

use std::fmt::Display;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};

use super::metrics::{Kind, OriginMetrics};
use super::{Body, OriginError, awake};

/// What to take out of a response's body.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// Bytes to drop first: not zero when the origin answered 200 to a range.
    pub skip: u64,
    /// Bytes to deliver.
    pub want: u64,
    /// Longest wait for more bytes.
    pub progress_timeout: Duration,
    pub metrics: OriginMetrics,
}

impl Delivery {
    /// Delivers from `body`, and drops it as soon as the last wanted byte is there.
    pub fn from<E: Display + Send>(
        self,
        body: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    ) -> Body {
        let state = Some((self, Box::pin(body)));
        stream::unfold(state, |state| async move {
            let (mut delivery, mut body) = state?;
            match delivery.next(&mut body).await {
                Ok(None) => None,
                Ok(Some(piece)) => Some((Ok(piece), Some((delivery, body)))),
                Err(error) => Some((Err(error), None)),
            }
        })
        .boxed()
    }

    async fn next<E: Display + Send>(
        &mut self,
        body: impl Stream<Item = Result<Bytes, E>> + Send,
    ) -> Result<Option<Bytes>, OriginError> {
        let mut body = pin!(body);
        while self.want > 0 {
            let piece = match awake::timeout(self.progress_timeout, body.next()).await {
                Ok(Some(Ok(piece))) => piece,
                Ok(Some(Err(error))) => return Err(self.broken(format!("connection lost: {error}"))),
                Ok(None) => return Err(self.broken("body ended early".to_owned())),
                Err(_) => {
                    let waited = self.progress_timeout.as_millis();
                    return Err(self.broken(format!("no bytes for {waited} ms")));
                }
            };
            let wanted = self.take(piece);
            if !wanted.is_empty() {
                return Ok(Some(wanted));
            }
        }
        Ok(None)
    }

    /// The part of `piece` that was asked for.
    fn take(&mut self, mut piece: Bytes) -> Bytes {
        let received = piece.len() as u64;
        self.metrics.received(Kind::Content, received);
        let skipped = self.skip.min(received);
        let wanted = self.want.min(received - skipped);
        self.skip -= skipped;
        self.want -= wanted;
        self.metrics.wasted(received - wanted);
        // Both are at most the piece's length, which is a usize.
        let start = usize::try_from(skipped).unwrap_or(piece.len());
        let mut rest = piece.split_off(start);
        rest.truncate(usize::try_from(wanted).unwrap_or(usize::MAX));
        rest
    }

    fn broken(&self, what: String) -> OriginError {
        self.metrics.broken_body();
        let reason = format!("{what}, {} bytes missing", self.skip + self.want);
        OriginError::Failed { origin: self.metrics.label().to_owned(), reason }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Metrics;
    use super::*;
    use futures_util::TryStreamExt;
    use proptest::prelude::*;

    fn delivery(skip: u64, want: u64) -> Delivery {
        let metrics = Metrics::default().origin("test");
        Delivery { skip, want, progress_timeout: Duration::from_millis(20), metrics }
    }

    fn pieces(bytes: &[u8], size: usize) -> Vec<Result<Bytes, OriginError>> {
        bytes.chunks(size).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect()
    }

    async fn collect(
        delivery: Delivery,
        pieces: Vec<Result<Bytes, OriginError>>,
    ) -> Result<Vec<u8>, OriginError> {
        delivery.from(stream::iter(pieces)).map_ok(|piece| piece.to_vec()).try_concat().await
    }

    proptest! {
        #[test]
        fn exactly_the_wanted_bytes_or_an_error(skip in 0usize..40, want in 0usize..40, have in 0usize..80, size in 1usize..20) {
            let bytes: Vec<u8> = (0..80).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let got = runtime.block_on(collect(delivery(skip as u64, want as u64), pieces(&bytes[..have], size)));
            if want == 0 || skip + want <= have {
                prop_assert_eq!(got.unwrap(), bytes[skip..skip + want].to_vec());
            } else {
                prop_assert!(got.is_err());
            }
        }
    }

    #[tokio::test]
    async fn what_was_not_asked_for_is_counted_as_waste() {
        let delivery = delivery(3, 4);
        let metrics = delivery.metrics.clone();
        assert_eq!(collect(delivery, pieces(b"abcdefghij", 5)).await.unwrap(), b"defg");
        assert_eq!((metrics.bytes_received(Kind::Content), metrics.bytes_wasted()), (10, 6));
    }

    #[tokio::test]
    async fn a_stall_ends_with_an_error() {
        let stalled = stream::iter(pieces(b"abc", 3)).chain(stream::pending());
        let mut body = delivery(0, 4).from(stalled);
        assert_eq!(body.next().await.unwrap().unwrap(), "abc");
        assert!(body.next().await.unwrap().unwrap_err().is_transient());
        assert!(body.next().await.is_none());
    }
}

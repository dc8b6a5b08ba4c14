//! `POST /v1/fetch` on the control socket.

use std::convert::Infallible;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use futures_util::{FutureExt, StreamExt};
use http::{Request, Response, header};
use http_body::{Body, Frame};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, StreamBody};
use tokio::sync::mpsc;

use super::{Event, FetchRequest, Fetcher, posted};

/// Of the request: sources, globs, and for each of some thousand objects a proof of 2 KiB.
const REQUEST_BYTES_MAX: usize = 8 << 20;

/// Events that a client may be behind before the fetch waits for it: 16 seconds of progress.
const EVENTS_MAX: usize = 64;

/// Body of every answer.
pub type ResponseBody = UnsyncBoxBody<Bytes, Infallible>;

impl Fetcher {
    /// Answers with a stream of [`Event`]s, one JSON object per line, or with 400 and a line of text.
    ///
    /// The fetch lives in the response's body: when the client closes the connection, it is cancelled.
    pub async fn handle<B>(&self, request: Request<B>) -> Response<ResponseBody>
    where
        B: Body<Data = Bytes> + Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        match posted(request, REQUEST_BYTES_MAX).await {
            Ok(request) => stream_of(self.events(request)),
            Err(refusal) => refusal,
        }
    }

    /// The events of one fetch, which goes on while they are polled.
    fn events(&self, request: FetchRequest) -> impl Stream<Item = Event> + Send + use<> {
        let (sender, mut receiver) = mpsc::channel(EVENTS_MAX);
        let fetcher = self.clone();
        let work = async move { fetcher.run(request, sender).await };
        let events = stream::poll_fn(move |cx| receiver.poll_recv(cx));
        stream::select(events, work.into_stream().filter_map(async |()| None))
    }
}

fn stream_of(events: impl Stream<Item = Event> + Send + 'static) -> Response<ResponseBody> {
    let lines = events.map(|event| {
        let mut line = serde_json::to_vec(&event).expect("an event has only string keys and plain values");
        line.push(b'\n');
        Ok(Frame::data(Bytes::from(line)))
    });
    let lines: Pin<Box<dyn Stream<Item = Result<Frame<Bytes>, Infallible>> + Send>> = Box::pin(lines);
    let mut response = Response::new(StreamBody::new(lines).boxed_unsync());
    let ndjson = header::HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(header::CONTENT_TYPE, ndjson);
    response
}

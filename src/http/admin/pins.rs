//! `POST /v1/pins` on the control socket: exempts stored contents from eviction, for a while or for good, or ends that.
//!
//! This file refuses to fetch: what is not stored here cannot be pinned.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body::Body;
use http_body_util::{BodyExt, Full};
use serde::{Deserialize, Serialize};

use super::view::Content;
use crate::fetch::{ResponseBody, posted, text};
use crate::store::{Pin, PinName, Store};

/// Path of the control socket's route.
pub const PINS_PATH: &str = "/v1/pins";

/// Of the request: some thousand names.
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// Body of the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinRequest {
    /// `sha256:…`, `s3://bucket/key`, or `s3://bucket/prefix/` for all below it.
    pub names: Vec<PinName>,
    pub pin: PinChange,
}

/// What becomes of the pins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PinChange {
    /// Until it is taken off.
    Forever,
    ForSeconds(u64),
    Off,
}

impl PinChange {
    fn starting_now(self) -> Pin {
        match self {
            Self::Forever => Pin::Forever,
            Self::Off => Pin::Not,
            Self::ForSeconds(seconds) => {
                let end = SystemTime::now() + Duration::from_secs(seconds.min(u64::from(u32::MAX)));
                let since = end.duration_since(UNIX_EPOCH).unwrap_or_default();
                Pin::Until(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
            }
        }
    }
}

/// Why nothing, or not everything, was done.
#[derive(Debug, thiserror::Error)]
enum PinError {
    #[error("nothing stored on this node is named {0}; fetch it first, or look at `windlass contents`")]
    NotStored(PinName),
    #[error("{name} could not be recorded as pinned: {source}; see the daemon's log")]
    Disk { name: String, source: std::io::Error },
}

/// Answers with the contents that were meant, as `/v1/contents` shows them, or with a line of text.
pub(super) async fn answer<B>(store: &Store, request: Request<B>) -> Response<ResponseBody>
where
    B: Body<Data = Bytes> + Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let request: PinRequest = match posted(request, REQUEST_BYTES_MAX).await {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    match pin(store, &request).await {
        Ok(contents) => json(&contents),
        Err(error @ PinError::NotStored(_)) => text(StatusCode::NOT_FOUND, error.to_string()),
        Err(error @ PinError::Disk { .. }) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

async fn pin(store: &Store, request: &PinRequest) -> Result<Vec<Content>, PinError> {
    let lister = store.clone();
    // It reads the sidecars of what was not used lately.
    let stored = tokio::task::spawn_blocking(move || lister.list()).await.unwrap_or_default();
    let nobody = |name: &&PinName| !stored.iter().any(|content| name.names(&content.id));
    if let Some(name) = request.names.iter().find(nobody) {
        return Err(PinError::NotStored(name.clone()));
    }
    let mut changed = Vec::new();
    for content in stored.iter().filter(|content| request.names.iter().any(|name| name.names(&content.id))) {
        let Some(entry) = store.get(&content.key) else { continue };
        let set = entry.set_pin(request.pin.starting_now()).await;
        set.map_err(|source| PinError::Disk { name: content.id.to_string(), source })?;
        changed.push(Content::of(&entry.summary()));
    }
    Ok(changed)
}

pub(super) fn json<T: Serialize>(answer: &[T]) -> Response<ResponseBody> {
    let body = serde_json::to_vec(answer).expect("answers have only string keys and plain values");
    let mut response = Response::new(Full::from(body).boxed_unsync());
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::{ContentId, ETag, Layout, NodeId, ObjectVersion};
    use crate::store::{self, Expect};

    async fn ask(store: &Store, json: &str) -> (StatusCode, String) {
        let request = Request::post(PINS_PATH).body(Full::from(json.to_owned())).unwrap();
        let response = answer(store, request).await;
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn what_is_stored_is_pinned_by_name_and_the_rest_is_named() {
        let data = tempfile::tempdir().unwrap();
        let config = store::Config {
            data_dir: data.path().into(),
            free_floor: bytesize::ByteSize(0),
            ..store::Config::default()
        };
        let store = Store::open(config, store::Metrics::default()).unwrap();
        for key in ["m/a", "m/b", "n"] {
            let (bucket, etag) = ("models".into(), ETag("\"1\"".into()));
            let id = ContentId::Object(ObjectVersion { bucket, key: key.into(), etag, size: 3 });
            let entry = store.create(&id, Layout::new(3, 1 << 20).unwrap()).unwrap();
            let pieces = vec![Bytes::from_static(b"abc")];
            let me = Expect::Attest(NodeId::from_name("me"));
            entry.insert(crate::content::ChunkIndex(0), pieces, me).await.unwrap();
            entry.seal().await.unwrap();
        }
        let pinned = |store: &Store| store.list().iter().filter(|content| content.pin != Pin::Not).count();
        let (status, body) = ask(&store, r#"{"names":["s3://models/m/"],"pin":"forever"}"#).await;
        let contents: Vec<Content> = serde_json::from_str(&body).unwrap();
        assert_eq!((status, contents.len(), pinned(&store)), (StatusCode::OK, 2, 2));
        assert!(contents.iter().all(|content| content.pinned && content.pinned_seconds.is_none()));
        let (_, body) = ask(&store, r#"{"names":["s3://models/n"],"pin":{"for_seconds":60}}"#).await;
        let contents: Vec<Content> = serde_json::from_str(&body).unwrap();
        assert!(contents[0].pinned_seconds.is_some_and(|left| left <= 60.0), "{body}");
        assert_eq!(ask(&store, r#"{"names":["s3://models/"],"pin":"off"}"#).await.0, StatusCode::OK);
        assert_eq!(pinned(&store), 0);
        let (status, body) =
            ask(&store, r#"{"names":["s3://models/n","s3://models/x"],"pin":"forever"}"#).await;
        assert!(status == StatusCode::NOT_FOUND && body.contains("s3://models/x"), "{body}");
        assert_eq!(pinned(&store), 0, "all or nothing");
        assert_eq!(ask(&store, "{}").await.0, StatusCode::BAD_REQUEST);
    }
}

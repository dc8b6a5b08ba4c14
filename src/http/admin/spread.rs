//! `POST /v1/spread` on the control socket: offers stored contents to other nodes, and says how far they are with them.
//!
//! One question, one answer: who wants to see the end asks again. This file refuses to fetch, and to choose nodes.

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use serde::{Deserialize, Serialize};

use super::pins::json;
use crate::cache::{Cache, Reply};
use crate::content::NodeId;
use crate::fetch::{ResponseBody, posted};
use crate::store::{PinName, Summary};

/// Path of the control socket's route.
pub const SPREAD_PATH: &str = "/v1/spread";

/// Of the request: some thousand names of contents and of nodes.
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// Body of the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpreadRequest {
    /// `sha256:…`, `s3://bucket/key`, or `s3://bucket/prefix/` for all below it.
    pub names: Vec<PinName>,
    /// Names of the nodes that shall have them.
    pub nodes: Vec<String>,
}

/// One content on one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spread {
    pub content: String,
    pub node: String,
    pub state: SpreadState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpreadState {
    /// It has all of it.
    There,
    /// So many chunks are still to come.
    Coming(u32),
    /// It has no room without evicting something, or leaves.
    Refused,
    /// It did not answer in time.
    Silent,
}

/// Answers with a list of [`Spread`], or with a line of text.
pub(super) async fn answer<B>(cache: &Cache, request: Request<B>) -> Response<ResponseBody>
where
    B: Body<Data = Bytes> + Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let request: SpreadRequest = match posted(request, REQUEST_BYTES_MAX).await {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    let is_named = |summary: &Summary| request.names.iter().any(|name| name.names(&summary.id));
    let nodes: Vec<_> = request.nodes.iter().map(|node| NodeId::from_name(node)).collect();
    let replies = cache.offer(is_named, &nodes).await;
    let spread = replies.into_iter().map(|(content, node, reply)| Spread {
        content: content.to_string(),
        node: named(&request.nodes, node),
        state: match reply {
            Some(Reply { accepted: true, missing: 0 }) => SpreadState::There,
            Some(Reply { accepted: true, missing }) => SpreadState::Coming(missing),
            Some(Reply { accepted: false, .. }) => SpreadState::Refused,
            None => SpreadState::Silent,
        },
    });
    json(&spread.collect::<Vec<_>>())
}

fn named(names: &[String], node: NodeId) -> String {
    let name = names.iter().find(|name| NodeId::from_name(name) == node);
    name.cloned().unwrap_or_else(|| node.to_string())
}

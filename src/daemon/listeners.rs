//! The HTTP listeners: bound together before anything runs, so that a taken port stops the start and not a daemon that
//! already promised something to its peers.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body::Body;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, Span};

use super::DaemonError;
use crate::config::Config;
use crate::http::admin::{self, Control, bind_control};
use crate::http::canary::{self, Canaries};
use crate::http::object::Endpoint;
use crate::http::registry::{Mirror, MirrorBody};
use crate::http::server::{DEFAULT_MAX_CONNECTIONS, Limits, Listener, Metrics};

/// For people, probes and commands.
pub(super) struct OwnListeners {
    pub(super) admin: Listener,
    pub(super) control: Listener,
}

/// For clients.
pub(super) struct FaceListeners {
    pub(super) registry: Listener,
    pub(super) object: Listener,
}

/// Binds all of them; none accepts yet.
///
/// # Errors
/// The first that cannot be bound, with its address and its key.
pub(super) async fn bind(config: &Config) -> Result<(OwnListeners, FaceListeners), DaemonError> {
    let faces = FaceListeners {
        registry: Listener::bind("registry", "registry.listen", config.registry.listen).await?,
        object: Listener::bind("object", "object.listen", config.object.listen).await?,
    };
    let own = OwnListeners {
        admin: Listener::bind("admin", "admin.listen", config.admin.listen).await?,
        control: bind_control(&config.control).await?,
    };
    Ok((own, faces))
}

/// What serving a listener takes, whichever it is.
pub(super) struct Serving {
    pub(super) metrics: Metrics,
    pub(super) tasks: TaskTracker,
    /// No new connections from then on; what is in flight has `drain` to finish.
    pub(super) stop: CancellationToken,
    pub(super) drain: Duration,
}

impl Serving {
    /// Serves `listener` as a task.
    fn spawn<S, F, B>(&self, listener: Listener, connections: usize, service: S)
    where
        S: Fn(Request<Incoming>) -> F + Clone + Send + Sync + Unpin + 'static,
        F: Future<Output = Response<B>> + Send + 'static,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let limits = Limits { connections, drain: self.drain };
        self.tasks.spawn(listener.serve(service, limits, self.metrics.clone(), self.stop.clone()));
    }
}

impl OwnListeners {
    pub(super) fn serve(self, control: &Control, serving: &Serving) {
        let admin = control.admin().clone();
        serving.spawn(self.admin, admin::CONNECTIONS_MAX, move |request| {
            let admin = admin.clone();
            async move { admin.answer(request).await }
        });
        let control = control.clone();
        serving.spawn(self.control, admin::CONNECTIONS_MAX, move |request| {
            let control = control.clone();
            async move { control.answer(request).await }
        });
    }
}

impl FaceListeners {
    pub(super) fn serve(self, mirror: Mirror, canaries: Canaries, endpoint: Endpoint, serving: &Serving) {
        serving.spawn(self.registry, DEFAULT_MAX_CONNECTIONS, move |request| {
            let (mirror, canaries) = (mirror.clone(), canaries.clone());
            let (parts, body) = request.into_parts();
            let span = span("registry", &parts.method, parts.uri.path());
            let answer = async move {
                match canaries.answer(&parts) {
                    Some(answer) => canary::response(answer, whole),
                    None => mirror.answer(Request::from_parts(parts, body)).await,
                }
            };
            answer.instrument(span)
        });
        serving.spawn(self.object, DEFAULT_MAX_CONNECTIONS, move |request| {
            let endpoint = endpoint.clone();
            let span = span("object", request.method(), request.uri().path());
            async move { endpoint.handle(request).await }.instrument(span)
        });
    }
}

/// The root of a request's trace. The path alone: a query may carry a signature.
fn span(face: &'static str, method: &Method, path: &str) -> Span {
    tracing::info_span!(target: "windlass::trace", "request", face, %method, path)
}

/// A body that is all there.
fn whole(text: String) -> MirrorBody {
    Full::from(text).map_err(|never| match never {}).boxed_unsync()
}

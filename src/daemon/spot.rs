//! EC2's notice that a spot instance is about to be interrupted: two minutes in which others can take what only this node
//! holds. Kubernetes' own SIGTERM may come late in them, or not at all.
//!
//! Invariant: the node goes on to serve; a notice only begins the offers early. What does not answer is asked again, and
//! an instance that is no spot instance answers 404 for ever.
//! This file refuses to end anything, and to ask any path but two of the metadata service (IMDSv2: a token, and the
//! notice).

use std::time::Duration;

use reqwest::Client;
use reqwest::redirect::Policy;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::DaemonError;
use super::config::ShutdownConfig;
use crate::cache::Cache;

/// AWS recommends every five seconds.
const INTERVAL: Duration = Duration::from_secs(5);

/// The service is on the host's own hypervisor.
const CALL_DEADLINE: Duration = Duration::from_secs(2);

/// The notice comes two minutes ahead; what is not taken ten seconds before the end would not arrive.
const PARTING_DEADLINE: Duration = Duration::from_secs(110);

/// Of the token, for one question.
const TOKEN_LIFETIME_S: &str = "60";

/// Watches for a notice.
#[derive(Debug)]
pub(super) struct Notices {
    client: Client,
    service: Url,
}

impl Notices {
    /// Nothing when nobody is to be asked.
    ///
    /// # Errors
    /// When what is configured is no address.
    pub(super) fn from_config(config: &ShutdownConfig) -> Result<Option<Self>, DaemonError> {
        if config.instance_metadata.is_empty() {
            return Ok(None);
        }
        let refused = || DaemonError::InstanceMetadata(config.instance_metadata.clone());
        let service: Url = config.instance_metadata.parse().map_err(|_| refused())?;
        if service.scheme() != "http" || service.host().is_none() {
            return Err(refused());
        }
        // Plain HTTP to a link-local address: neither a proxy nor a redirect has a place here.
        let client = Client::builder().timeout(CALL_DEADLINE).no_proxy().redirect(Policy::none());
        Ok(Some(Self { client: client.build().map_err(|_| refused())?, service }))
    }

    /// Asks until there is a notice, then has `cache` part; ends at `stop`.
    pub(super) async fn watch(self, cache: Cache, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(INTERVAL);
        let noticed = async {
            loop {
                ticks.tick().await;
                match self.notice().await {
                    Ok(Some(notice)) => return notice,
                    Ok(None) => {}
                    Err(error) => tracing::debug!(%error, "the instance metadata do not answer"),
                }
            }
        };
        let Some(notice) = stop.run_until_cancelled(noticed).await else { return };
        tracing::warn!(
            notice,
            "this instance is about to be interrupted: what only it holds is offered to others"
        );
        stop.run_until_cancelled(cache.part(PARTING_DEADLINE)).await;
    }

    /// The notice, if there is one.
    async fn notice(&self) -> Result<Option<String>, reqwest::Error> {
        let at = |path: &str| {
            let mut url = self.service.clone();
            url.set_path(path);
            url
        };
        let token = self.client.put(at("/latest/api/token"));
        let token = token.header("X-aws-ec2-metadata-token-ttl-seconds", TOKEN_LIFETIME_S);
        let token = token.send().await?.error_for_status()?.text().await?;
        let asked = self.client.get(at("/latest/meta-data/spot/instance-action"));
        let answer = asked.header("X-aws-ec2-metadata-token", token).send().await?;
        if answer.status() == http::StatusCode::NOT_FOUND {
            return Ok(None);
        }
        answer.error_for_status()?.text().await.map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use bytes::Bytes;
    use http::{Method, Request, Response, StatusCode};
    use http_body_util::Full;
    use hyper::body::Incoming;
    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;

    use super::*;

    /// Instance metadata that know a notice once `is_due`.
    async fn metadata(is_due: Arc<AtomicBool>) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("it is bound");
        let answer = move |request: Request<Incoming>| {
            let is_due = is_due.load(Ordering::Acquire);
            async move {
                let header =
                    |name: &str| request.headers().get(name).map(|value| value.as_bytes().to_owned());
                let (status, body) = match (request.method(), request.uri().path()) {
                    (&Method::PUT, "/latest/api/token") => {
                        assert!(header("x-aws-ec2-metadata-token-ttl-seconds").is_some());
                        (StatusCode::OK, "secret")
                    }
                    (&Method::GET, "/latest/meta-data/spot/instance-action") => {
                        match header("x-aws-ec2-metadata-token").as_deref() {
                            Some(b"secret") if is_due => (StatusCode::OK, r#"{"action":"terminate"}"#),
                            Some(b"secret") => (StatusCode::NOT_FOUND, ""),
                            _ => (StatusCode::UNAUTHORIZED, ""),
                        }
                    }
                    _ => (StatusCode::BAD_REQUEST, ""),
                };
                let mut response = Response::new(Full::<Bytes>::from(body));
                *response.status_mut() = status;
                Ok::<_, Infallible>(response)
            }
        };
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let service = service_fn(answer.clone());
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        format!("http://{address}")
    }

    fn config(instance_metadata: &str) -> ShutdownConfig {
        ShutdownConfig { instance_metadata: instance_metadata.into(), ..ShutdownConfig::default() }
    }

    #[tokio::test]
    async fn a_notice_is_asked_for_with_a_token() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let is_due = Arc::new(AtomicBool::new(false));
        let service = metadata(Arc::clone(&is_due)).await;
        let notices = Notices::from_config(&config(&service)).expect("an address").expect("to be asked");
        assert_eq!(notices.notice().await.expect("answers"), None);
        is_due.store(true, Ordering::Release);
        let notice = notices.notice().await.expect("answers");
        assert_eq!(notice.as_deref(), Some(r#"{"action":"terminate"}"#));
    }

    #[test]
    fn nobody_is_asked_unless_an_address_is_given() {
        assert!(Notices::from_config(&config("")).expect("is off").is_none());
        for wrong in ["169.254.169.254", "https://169.254.169.254", "yes"] {
            let error = Notices::from_config(&config(wrong)).expect_err("no address").to_string();
            assert!(error.contains("shutdown.instance_metadata"), "{error}");
        }
    }
}

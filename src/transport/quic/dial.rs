//! How connections come to be: dialling, being dialled, and both at once.
//!
//! When two nodes dial each other at the same moment, the one with the smaller id wins: it refuses the other's
//! connection while its own dial to that address is under way, and the other waits for it. Every other connection
//! that proves its name is admitted, and the newest is used: a peer that restarted must not be locked out by the
//! connection it no longer knows.
//!
//! This module refuses to dial anything but the address it is given.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use quinn::ConnectionError;
use rustls::pki_types::CertificateDer;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, warn};

use super::Shared;
use super::connection::{self, CloseCode, Connection, Greeted};
use super::metrics::{DialOutcome, DropReason, RefusalReason};
use super::peer::{Abandoned, Link, Peer, same_address};
use crate::content::NodeId;
use crate::transport::tls::{PeerName, explain};
use crate::transport::{Incoming, OpenError, PeerAddr};

/// Handshakes under way before strangers must prove that their address is theirs (RFC 9000, section 8.1.2), which
/// costs them a round trip and us no memory.
const UNPROVEN_HANDSHAKES: usize = 128;

/// TLS alerts in QUIC's error codes (RFC 9001, section 4.8).
const CRYPTO_ERRORS: std::ops::Range<u64> = 0x100..0x200;

/// Why a dial brought no connection.
enum DialError {
    /// The peer's own dial is to be used.
    Duplicate,
    /// We answered ourselves.
    Ourselves,
    Failed(OpenError),
}

impl Shared {
    /// The connection to `to`, made now if need be.
    pub(super) async fn connection(self: &Arc<Self>, to: &PeerAddr) -> Result<Arc<Connection>, OpenError> {
        loop {
            let peer = self.peer(to.node).ok_or_else(|| self.too_many(&to.name, to.addr))?;
            let changed = peer.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match peer.link(to.addr) {
                Link::Up(connection) => return Ok(connection),
                Link::Failed(error) => return Err(error),
                Link::Dialling { yours } => {
                    if yours {
                        self.dial(&peer, to);
                    }
                    tokio::select! {
                        () = changed => {}
                        () = self.closing.cancelled() => return Err(OpenError::Closed),
                    }
                }
            }
        }
    }

    /// Makes a connection in the background. The caller got [`Link::Dialling`] with `yours`.
    pub(super) fn dial(self: &Arc<Self>, peer: &Arc<Peer>, to: &PeerAddr) {
        let (shared, peer, to) = (Arc::clone(self), Arc::clone(peer), to.clone());
        self.tasks.spawn(async move {
            let deadline = Instant::now() + shared.config.connect_timeout();
            match shared.try_dial(&to, deadline).await {
                Ok((connection, greeted)) => {
                    shared.metrics.dialled(DialOutcome::Connected);
                    peer.dialled(&connection);
                    shared.run(&peer, connection, greeted).await;
                }
                Err(error) => shared.dial_failed(&peer, &to, error, deadline).await,
            }
        });
    }

    async fn try_dial(
        &self,
        to: &PeerAddr,
        deadline: Instant,
    ) -> Result<(Arc<Connection>, Greeted), DialError> {
        let not_authentic = |reason: String| {
            DialError::Failed(OpenError::NotAuthentic { peer: to.name.clone(), addr: to.addr, reason })
        };
        let expected = PeerName::new(self.identity.name().cluster(), &to.name)
            .map_err(|error| not_authentic(error.to_string()))?;
        if expected.node_id() != to.node {
            return Err(not_authentic(format!("the node id {} is not of that name", to.node)));
        }
        self.connect(to.addr, Some(&expected), deadline).await
    }

    async fn dial_failed(&self, peer: &Peer, to: &PeerAddr, error: DialError, deadline: Instant) {
        let error = match error {
            DialError::Duplicate if self.superseded(peer, deadline).await => {
                return self.metrics.dialled(DialOutcome::Duplicate);
            }
            DialError::Duplicate => self.unreachable(&to.name, to.addr, "it wanted to dial us, but did not"),
            DialError::Ourselves => OpenError::NotAuthentic {
                peer: to.name.clone(),
                addr: to.addr,
                reason: "this node itself answers there".into(),
            },
            DialError::Failed(error) => error,
        };
        match &error {
            OpenError::NotAuthentic { .. } => {
                warn!(peer = %to.name, addr = %to.addr, %error, "peer refused");
                self.metrics.dialled(DialOutcome::NotAuthentic);
            }
            _ => {
                debug!(peer = %to.name, addr = %to.addr, %error, "dial failed");
                self.metrics.dialled(DialOutcome::Unreachable);
            }
        }
        self.given_up(to.node, peer.dial_failed(error)).await;
    }

    /// Waits for the connection that the peer makes instead of ours.
    async fn superseded(&self, peer: &Peer, deadline: Instant) -> bool {
        let arrived = async {
            loop {
                let changed = peer.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if peer.dial_superseded() {
                    return;
                }
                changed.await;
            }
        };
        tokio::select! {
            arrived = timeout_at(deadline, arrived) => arrived.is_ok(),
            () = self.stopped.cancelled() => false,
        }
    }

    /// Dials an address whose name is not known yet. The answer may be this node itself.
    pub(super) async fn resolve(self: &Arc<Self>, addr: SocketAddr) -> Result<PeerAddr, OpenError> {
        let at = |name: &PeerName| PeerAddr { node: name.node_id(), name: name.node().to_owned(), addr };
        if let Some(known) = self.connected_to(addr) {
            return Ok(at(&known.name));
        }
        let deadline = Instant::now() + self.config.connect_timeout();
        let (connection, greeted) = match self.connect(addr, None, deadline).await {
            Ok(connected) => connected,
            Err(DialError::Ourselves) => return Ok(at(self.identity.name())),
            Err(DialError::Duplicate) => {
                return match self.connected_to(addr) {
                    Some(known) => Ok(at(&known.name)),
                    None => Err(self.unreachable("some node", addr, "it is dialling us at this moment")),
                };
            }
            Err(DialError::Failed(error)) => return Err(error),
        };
        let resolved = at(&connection.name);
        let Some(peer) = self.peer(resolved.node) else {
            CloseCode::Limit.close(&connection.quic);
            return Err(self.too_many(&resolved.name, addr));
        };
        peer.dialled(&connection);
        let shared = Arc::clone(self);
        self.tasks.spawn(async move { shared.run(&peer, connection, greeted).await });
        Ok(resolved)
    }

    fn connected_to(&self, addr: SocketAddr) -> Option<Arc<Connection>> {
        let is_there = |c: &Arc<Connection>| c.is_open() && same_address(c.quic.remote_address(), addr);
        self.live().into_iter().find(is_there)
    }

    /// Handshake and greeting with whoever answers at `addr`.
    async fn connect(
        &self,
        addr: SocketAddr,
        expected: Option<&PeerName>,
        deadline: Instant,
    ) -> Result<(Arc<Connection>, Greeted), DialError> {
        let who = expected.map_or("some node", PeerName::node);
        if self.endpoint.open_connections() >= self.config.max_connections as usize {
            return Err(DialError::Failed(self.too_many(who, addr)));
        }
        // An address as server name asks for any node of the cluster; see `tls::verify`.
        let server_name = expected.map_or_else(|| addr.ip().to_string(), PeerName::dns);
        let connecting = self
            .endpoint
            .connect_with(self.client.clone(), addr, &server_name)
            .map_err(|error| DialError::Failed(self.unreachable(who, addr, &error.to_string())))?;
        let attempt = async {
            let quic = connecting.await?;
            let name = peer_name(&quic)?;
            if name.node_id() == self.node {
                CloseCode::Ourselves.close(&quic);
                return Ok(None);
            }
            let connection = Connection::new(quic, name);
            let greeted = connection.greet().await?;
            Ok(Some((connection, greeted)))
        };
        let outcome = tokio::select! {
            outcome = timeout_at(deadline, attempt) => outcome,
            () = self.stopped.cancelled() => return Err(DialError::Failed(OpenError::Closed)),
        };
        match outcome.unwrap_or(Err(ConnectionError::TimedOut)) {
            Ok(Some(connected)) => Ok(connected),
            Ok(None) => Err(DialError::Ourselves),
            Err(error) if CloseCode::Duplicate.is(&error) => Err(DialError::Duplicate),
            Err(error) if CloseCode::Ourselves.is(&error) => Err(DialError::Ourselves),
            Err(error) => Err(DialError::Failed(self.classify(who, addr, &error))),
        }
    }

    fn classify(&self, who: &str, addr: SocketAddr, error: &ConnectionError) -> OpenError {
        let not_authentic = |reason: String| OpenError::NotAuthentic { peer: who.to_owned(), addr, reason };
        match error {
            ConnectionError::TransportError(e) if CRYPTO_ERRORS.contains(&u64::from(e.code)) => {
                not_authentic(explain(&e.reason).to_owned())
            }
            ConnectionError::ConnectionClosed(close)
                if CRYPTO_ERRORS.contains(&u64::from(close.error_code)) =>
            {
                not_authentic(format!("it does not accept this node's certificate: {close}"))
            }
            ConnectionError::TimedOut => self.unreachable(
                who,
                addr,
                &format!("no answer within {} ms", self.config.connect_timeout_ms),
            ),
            other => self.unreachable(who, addr, &other.to_string()),
        }
    }

    /// Answers dials until the endpoint closes.
    pub(super) async fn accept(self: Arc<Self>) {
        while let Some(incoming) = self.endpoint.accept().await {
            if self.endpoint.open_connections() >= self.config.max_connections as usize {
                self.metrics.refused(RefusalReason::Limit);
                incoming.refuse();
            } else if self.handshakes.load(Ordering::Relaxed) >= UNPROVEN_HANDSHAKES && incoming.may_retry() {
                // It can fail only for those that may not retry.
                let _ = incoming.retry();
            } else {
                self.handshakes.fetch_add(1, Ordering::Relaxed);
                let shared = Arc::clone(&self);
                self.tasks.spawn(async move { shared.answer(incoming).await });
            }
        }
    }

    async fn answer(self: Arc<Self>, incoming: quinn::Incoming) {
        let addr = incoming.remote_address();
        let deadline = Instant::now() + self.config.connect_timeout();
        let handshake = async {
            let quic = incoming.accept()?.await?;
            let name = peer_name(&quic)?;
            Ok(Connection::new(quic, name))
        };
        let outcome = timeout_at(deadline, handshake).await.unwrap_or(Err(ConnectionError::TimedOut));
        self.handshakes.fetch_sub(1, Ordering::Relaxed);
        let connection = match outcome {
            Ok(connection) => connection,
            Err(error) => return self.not_authentic(addr, &error),
        };
        let peer = match self.admit(&connection) {
            Ok(peer) => peer,
            Err(code) => return self.refuse(&connection, code),
        };
        match timeout_at(deadline, connection.greet()).await.unwrap_or(Err(ConnectionError::TimedOut)) {
            Ok(greeted) => self.run(&peer, connection, greeted).await,
            Err(error) => {
                debug!(%addr, %error, "a connection ended before its greeting");
                CloseCode::Protocol.close(&connection.quic);
                self.given_up(connection.node, peer.ended(&connection)).await;
            }
        }
    }

    fn admit(&self, connection: &Arc<Connection>) -> Result<Arc<Peer>, CloseCode> {
        if connection.node == self.node {
            return Err(CloseCode::Ourselves);
        }
        let peer = self.peer(connection.node).ok_or(CloseCode::Limit)?;
        if self.node < connection.node && peer.is_dialling(connection.quic.remote_address()) {
            return Err(CloseCode::Duplicate);
        }
        if peer.accepted(connection) { Ok(peer) } else { Err(CloseCode::Limit) }
    }

    fn refuse(&self, connection: &Connection, code: CloseCode) {
        code.close(&connection.quic);
        self.metrics.refused(match code {
            CloseCode::Duplicate => RefusalReason::Duplicate,
            CloseCode::Ourselves => RefusalReason::Ourselves,
            _ => RefusalReason::Limit,
        });
    }

    fn not_authentic(&self, addr: SocketAddr, error: &ConnectionError) {
        let (code, reason) = match error {
            ConnectionError::TransportError(e) => (u64::from(e.code), explain(&e.reason).to_owned()),
            ConnectionError::ConnectionClosed(close) => {
                (u64::from(close.error_code), format!("it does not accept this node's certificate: {close}"))
            }
            other => (0, other.to_string()),
        };
        if !CRYPTO_ERRORS.contains(&code) {
            return debug!(%addr, reason, "a dial to this node failed");
        }
        self.metrics.refused(RefusalReason::NotAuthentic);
        if self.may_warn() {
            warn!(%addr, reason, "a connection from another node was not made");
        }
    }

    /// Serves a connection to its end and tells the owner when it was the last.
    async fn run(&self, peer: &Peer, connection: Arc<Connection>, greeted: Greeted) {
        debug!(peer = %connection.name, addr = %connection.quic.remote_address(), "connected");
        self.metrics.connections.inc();
        connection::run(self, peer, &connection, greeted).await;
        self.metrics.connections.dec();
        self.count(&connection);
        debug!(peer = %connection.name, reason = ?connection.quic.close_reason(), "disconnected");
        self.given_up(connection.node, peer.ended(&connection)).await;
    }

    async fn given_up(&self, node: NodeId, abandoned: Abandoned) {
        self.metrics.messages_lost.inc_by(abandoned.messages as u64);
        self.metrics.dropped(DropReason::NotConnected, abandoned.datagrams);
        if let Some(incoming) =
            self.incoming().filter(|_| abandoned.disconnected && !self.closing.is_cancelled())
        {
            tokio::select! {
                // Nobody listens any more: nobody needs to know.
                _ = incoming.send(Incoming::Disconnected { from: node }) => {}
                () = self.stopped.cancelled() => {}
            }
        }
    }

    fn too_many(&self, who: &str, addr: SocketAddr) -> OpenError {
        let limit = self.config.max_connections;
        self.unreachable(
            who,
            addr,
            &format!("this node has {limit} connections; raise transport.max_connections"),
        )
    }

    pub(super) fn unreachable(&self, who: &str, addr: SocketAddr, reason: &str) -> OpenError {
        if self.closing.is_cancelled() {
            return OpenError::Closed;
        }
        OpenError::Unreachable { peer: who.to_owned(), addr, reason: reason.to_owned() }
    }
}

/// The name in the certificate that the handshake verified.
fn peer_name(quic: &quinn::Connection) -> Result<PeerName, ConnectionError> {
    let identity = quic.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let name = identity.and_then(|chain| PeerName::from_certificate(chain.first()?).ok());
    name.ok_or_else(|| {
        CloseCode::Protocol.close(quic);
        ConnectionError::LocallyClosed
    })
}

//! Why a daemon did not start.

use super::address::AddressError;
use super::identity::ProofError;
use crate::http::admin::ControlError;
use crate::http::server::BindError;
use crate::origin::{registry, s3};
use crate::swarm::ZoneTooLong;
use crate::swarm::membership::BadName;
use crate::{store, transport};

/// The parts' own errors, which name the configuration key and say what to change.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error(transparent)]
    Identity(#[from] ProofError),
    #[error(transparent)]
    Transport(#[from] transport::BindError),
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error("node.name: {0}")]
    Name(#[from] BadName),
    #[error("node.zone: {0}")]
    Zone(#[from] ZoneTooLong),
    #[error(transparent)]
    Store(#[from] store::OpenError),
    #[error("registry.origins: {0}")]
    Registry(#[from] registry::ConfigError),
    #[error(transparent)]
    S3(#[from] s3::CaError),
    #[error(transparent)]
    Listener(#[from] BindError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(
        "shutdown.instance_metadata: {0:?} is no http:// address; write \"http://169.254.169.254\", or \"\" to ask nobody"
    )]
    InstanceMetadata(String),
    /// A part that does blocking work at the start died of a fault in this program.
    #[error("the start broke off: {0}; this is a fault in windlass, please report it")]
    Broken(#[from] tokio::task::JoinError),
}

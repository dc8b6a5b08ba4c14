//! Why the cache could not deliver.

use std::time::Duration;

use crate::content::{Digest, LayoutError};
use crate::origin::OriginError;

/// Why a content cannot be opened.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error("the daemon is shutting down")]
    Shutdown,
}

/// Why a read ended early. Cloned to everyone who waits for the same chunk.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// The origin said no, and no peer has the bytes.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// The bytes are whole and not what their name says, even straight from the origin.
    #[error("{content} does not match its digest: expected {expected}, the origin sent something else")]
    Verification { content: String, expected: Digest },
    /// No byte came from anywhere, the origin included, for this long.
    #[error("no byte of {content} arrived for {}", humantime::format_duration(*.waited))]
    Stalled { content: String, waited: Duration },
    /// The disk, or the room on it.
    #[error("cannot keep {content}: {reason}")]
    Store { content: String, reason: String },
    #[error("the daemon is shutting down")]
    Shutdown,
}

//! The grammar of the OCI distribution and image specifications, as far as pulling needs it.
//!
//! Invariant: a name, tag, digest or route of these types obeys the specification; nothing further in checks text
//! again. Parsing never panics, whatever comes in.
//! This module refuses to re-serialise a manifest: its bytes are its digest, so they are relayed as they came.

mod error;
mod manifest;
mod name;
mod platform;
mod route;

pub use error::{ErrorCode, error_body};
pub use manifest::{Descriptor, MAX_MANIFEST_BYTES, Manifest, ManifestError, media_type};
pub use name::{NameError, Reference, RepositoryName, Tag};
pub use platform::Platform;
pub use route::{Route, RouteError, Target};

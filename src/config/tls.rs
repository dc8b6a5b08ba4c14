//! How this node proves who it is.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Section `[tls]`. PEM files, named as cert-manager and `windlass certs issue` name them; they are read again when
/// they change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsConfig {
    /// The cluster's certificate authority: whoever it signed is a peer.
    pub ca: PathBuf,
    /// This node's certificate, with any intermediates.
    pub certificate: PathBuf,
    /// Key of `certificate`.
    pub key: PathBuf,
    /// Key of `ca`. With it, this node signs its own certificate, and `certificate` and `key` are not read.
    pub ca_key: Option<PathBuf>,
}

impl Default for TlsConfig {
    fn default() -> Self {
        Self {
            ca: "/etc/windlass/tls/ca.crt".into(),
            certificate: "/etc/windlass/tls/tls.crt".into(),
            key: "/etc/windlass/tls/tls.key".into(),
            ca_key: None,
        }
    }
}

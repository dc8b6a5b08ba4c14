//! Values that are right alone and wrong together.

use super::{Config, ConfigError};
use crate::content::DEFAULT_CHUNK_BYTES;
use crate::origin;
use crate::origin::access::Access;
use crate::origin::registry::RegistryOrigin;
use crate::origin::s3::S3Origin;
use crate::transport::tls::{NameError, PeerName};

impl Config {
    /// # Errors
    /// The first contradiction.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        self.check_names()?;
        self.check_tls_files()?;
        self.check_store()?;
        self.check_listeners()?;
        RegistryOrigin::new(self.registry.origins.clone(), &origin::Metrics::default())
            .map_err(|error| ConfigError::conflict("registry.origins", error.to_string()))?;
        S3Origin::new(self.s3.clone(), &origin::Metrics::default())
            .map_err(|error| ConfigError::conflict("s3.ca_file", error.to_string()))?;
        self.check_access()?;
        self.log.filter().map_err(|error| ConfigError::conflict("log.level", error.to_string()))?;
        self.control.check().map_err(|error| ConfigError::conflict("control.socket", error.to_string()))?;
        Ok(())
    }

    /// Where a proof points is compared with what this node would sign.
    fn check_access(&self) -> Result<(), ConfigError> {
        if self.s3.access == Access::Caller && self.s3.anonymous {
            let reason =
                "proofs of callers are compared with this node's own signed requests; set one of the two";
            return Err(ConfigError::conflict("s3.access, s3.anonymous", reason.to_owned()));
        }
        Ok(())
    }

    /// A name that cannot stand in a certificate is nobody's.
    fn check_names(&self) -> Result<(), ConfigError> {
        PeerName::new(&self.node.cluster, &self.node.name).map(|_| ()).map_err(|error| {
            let key = match error {
                NameError::Cluster(_) => "node.cluster",
                NameError::Node(_) => "node.name",
                NameError::TooLong => "node.name, node.cluster",
            };
            ConfigError::conflict(key, error.to_string())
        })
    }

    fn check_store(&self) -> Result<(), ConfigError> {
        if self.store.data_dir.is_relative() {
            let reason = format!(
                "{} depends on where the daemon is started; write it from the root, as in /var/lib/windlass",
                self.store.data_dir.display()
            );
            return Err(ConfigError::conflict("store.data_dir", reason));
        }
        // One chunk each way is the least that anything can pass through.
        let least = 2 * u64::from(DEFAULT_CHUNK_BYTES);
        if self.store.budget.as_u64() < least {
            let reason =
                format!("{} holds not even two chunks; give it {least} bytes or more", self.store.budget);
            return Err(ConfigError::conflict("store.budget", reason));
        }
        Ok(())
    }

    /// Two listeners on one port: the second would not start.
    fn check_listeners(&self) -> Result<(), ConfigError> {
        let listeners = [
            ("registry.listen", self.registry.listen),
            ("object.listen", self.object.listen),
            ("admin.listen", self.admin.listen),
        ];
        for (index, (key, one)) in listeners.iter().enumerate() {
            for (other_key, other) in &listeners[..index] {
                let overlap =
                    one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified();
                if one.port() == other.port() && one.port() != 0 && overlap {
                    let reason = format!("{other} and {one} are the same port; give each its own");
                    return Err(ConfigError::conflict(format!("{other_key}, {key}"), reason));
                }
            }
        }
        Ok(())
    }

    /// Without a certificate nobody would talk to this node, which is better said now than in every log.
    fn check_tls_files(&self) -> Result<(), ConfigError> {
        if self.node.standalone {
            return Ok(());
        }
        let own = match &self.tls.ca_key {
            Some(ca_key) => vec![("tls.ca_key", ca_key)],
            None => vec![("tls.certificate", &self.tls.certificate), ("tls.key", &self.tls.key)],
        };
        let missing = [("tls.ca", &self.tls.ca)].into_iter().chain(own).find(|(_, path)| !path.exists());
        missing.map_or(Ok(()), |(key, path)| {
            let reason = format!(
                "{} does not exist; make certificates with `windlass certs`, \
                 or set `node.standalone = true` to run without other nodes",
                path.display()
            );
            Err(ConfigError::conflict(key, reason))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standalone() -> Config {
        let mut config = Config::default();
        config.node.standalone = true;
        config.node.name = "n1".into();
        config
    }

    fn fault(config: &Config) -> String {
        config.check().expect_err("it is wrong").to_string()
    }

    #[test]
    fn a_node_alone_needs_no_certificate_and_others_do() {
        standalone().check().expect("needs nothing");
        let mut config = standalone();
        config.node.standalone = false;
        config.tls.ca = "/nowhere/ca.crt".into();
        assert!(fault(&config).starts_with("tls.ca: /nowhere/ca.crt does not exist; make certificates"));
    }

    #[test]
    fn a_store_needs_a_place_and_some_room() {
        let mut config = standalone();
        config.store.data_dir = "cache".into();
        assert!(fault(&config).starts_with("store.data_dir: cache depends on where"));
        config = standalone();
        config.store.budget = bytesize::ByteSize(0);
        assert!(fault(&config).starts_with("store.budget: 0 B holds not even"));
    }

    #[test]
    fn a_port_belongs_to_one_listener() {
        let mut config = standalone();
        config.object.listen = ([127, 0, 0, 1], 5102).into();
        assert!(fault(&config).starts_with("object.listen, admin.listen: 127.0.0.1:5102 and 0.0.0.0:5102"));
        config.admin.listen = ([127, 0, 0, 2], 5102).into();
        config.check().expect("two addresses, two ports");
    }

    #[test]
    fn names_must_fit_a_certificate() {
        let mut config = standalone();
        config.node.name = "Node_1".into();
        assert!(fault(&config).starts_with("node.name: "));
        config.node.cluster = "a.b".into();
        assert!(fault(&config).starts_with("node.cluster: "));
    }
}

//! Configuration: TOML and environment to typed values.
//!
//! Invariant: a [`Config`] that [`Config::load`] returned can be built from: every key is known, every value has the
//! right form, and the values do not contradict each other. Unknown keys are errors, for a misspelt budget is a full disk.
//! This module refuses to own the sections: each module below keeps its own `Config`; here is only their sum.

mod check;
mod de;
mod error;
mod node;
mod tls;
mod tree;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use error::ConfigError;
pub use node::NodeConfig;
pub use tls::TlsConfig;
pub use tree::Place;

use crate::http::{admin, object, registry};
use crate::origin::access;
use crate::origin::s3::S3Config;
use crate::swarm::{self, membership};
use crate::{cache, daemon, fetch, gossip, provider, store, telemetry, transport};

/// Where the configuration is when nobody says otherwise. It may be missing: every key has a default.
pub const DEFAULT_PATH: &str = "/etc/windlass/windlass.toml";

/// `WINDLASS_STORE__BUDGET=500GiB` sets `store.budget`.
pub const ENV_PREFIX: &str = "WINDLASS_";

/// This process's environment, for [`Config::load`]. A variable that is not UTF-8 is none of ours.
pub fn process_environment() -> impl Iterator<Item = (String, String)> {
    let text =
        |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
    std::env::vars_os().filter_map(text)
}

/// The sum of the modules' configurations; each field is a section.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub node: NodeConfig,
    pub tls: TlsConfig,
    pub transport: transport::Config,
    pub gossip: gossip::Config,
    pub membership: membership::Config,
    pub store: store::Config,
    pub cache: cache::Config,
    pub swarm: swarm::Config,
    pub provider: provider::Config,
    pub registry: registry::Config,
    pub access: access::Config,
    pub s3: S3Config,
    pub object: object::Config,
    pub fetch: fetch::Config,
    pub admin: admin::Config,
    pub control: admin::ControlConfig,
    pub log: telemetry::Config,
    pub traces: telemetry::TracesConfig,
    pub shutdown: daemon::ShutdownConfig,
}

impl Config {
    /// Reads `path`, or [`DEFAULT_PATH`] where that exists, lays `environment` over it, fills in what this machine
    /// knows (its name) and checks the whole.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place, key, value and what would be right.
    pub fn load(
        path: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let config = Self::read(path, environment)?;
        config.check()?;
        Ok(config)
    }

    /// As [`Self::load`], without the check of the whole: for commands that only want to know what is configured, and may
    /// run where the daemon's certificates are not.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn read(
        path: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let environment: Vec<_> = environment.into_iter().collect();
        let file = path.unwrap_or_else(|| Path::new(DEFAULT_PATH));
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(ConfigError::Unreadable { path: PathBuf::from(file), source }),
        };
        let mut config = Self::parse(&text, file, environment.clone())?;
        config.node.fill_in(&environment);
        Ok(config)
    }

    /// The typed form of `text` and `environment`, without this machine's name and without the checks across keys.
    /// `file` is only for messages.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn parse(
        text: &str,
        file: &Path,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let mut root = tree::parse_document(text, file)?;
        tree::overlay(&mut root, environment);
        let place = Place::Line { file: Arc::from(file), line: 1 };
        de::from_table(root, &place).map_err(|fault| ConfigError::from_fault(fault, &place))
    }

    /// The effective configuration as TOML.
    ///
    /// # Errors
    /// When a value has no form in TOML: a number beyond 2^63, for example.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string_pretty(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let environment = environment.iter().map(|(name, value)| ((*name).into(), (*value).into()));
        Config::parse(text, Path::new("w.toml"), environment)
    }

    fn fault(text: &str, environment: &[(&str, &str)]) -> String {
        parse(text, environment).expect_err("it is wrong").to_string()
    }

    fn shown(config: &Config) -> String {
        config.to_toml().expect("has a form")
    }

    #[test]
    fn nothing_written_is_the_default() {
        assert_eq!(shown(&parse("", &[]).expect("empty is fine")), shown(&Config::default()));
    }

    #[test]
    fn an_unknown_key_is_named_with_its_place_and_the_nearest_one() {
        assert_eq!(
            fault("\n[node]\nzoen = \"a\"\n", &[]),
            "w.toml:3: unknown key node.zoen; did you mean node.zone?"
        );
        assert_eq!(fault("[nodes]\n", &[]), "w.toml:1: unknown key nodes; did you mean node?");
        assert_eq!(
            fault("[shutdown]\ncolour = 1", &[]),
            "w.toml:2: unknown key shutdown.colour; shutdown knows drain_deadline_ms, offer_sole_copies, instance_metadata"
        );
        assert_eq!(
            fault("", &[("WINDLASS_NODE__ZOEN", "a")]),
            "environment variable WINDLASS_NODE__ZOEN: unknown key node.zoen; did you mean node.zone?"
        );
    }

    #[test]
    fn a_wrong_value_is_named_with_what_is_expected() {
        assert_eq!(
            fault("[shutdown]\ndrain_deadline_ms = \"long\"", &[]),
            "w.toml:2: shutdown.drain_deadline_ms = \"long\" is wrong: expected a whole number, 0 or more"
        );
        assert_eq!(
            fault("log.format = \"xml\"", &[]),
            "w.toml:1: log.format = \"xml\" is wrong: expected one of text, json"
        );
        assert_eq!(fault("[node]\nseed = 1", &[]), "w.toml:2: node.seed = 1 is wrong: expected a boolean");
        assert_eq!(
            fault("shutdown.drain_deadline_ms = -1", &[]),
            "w.toml:1: shutdown.drain_deadline_ms = -1 is wrong: expected a whole number, 0 or more"
        );
        assert_eq!(fault("node = 3", &[]), "w.toml:1: node = 3 is wrong: expected a table");
        assert_eq!(
            fault("", &[("WINDLASS_NODE__SEED", "maybe")]),
            "environment variable WINDLASS_NODE__SEED: node.seed = \"maybe\" is wrong: expected a boolean"
        );
        let text = fault("[node]\nname = \"a\"\n[node]\n", &[]);
        assert_eq!(text, "w.toml:3: this is not TOML: duplicate key: [node]");
    }

    #[test]
    fn the_environment_goes_before_the_file_and_reads_by_the_wanted_type() {
        let text = "[node]\nname = \"file\"\nzone = \"a\"";
        let environment = [
            ("WINDLASS_NODE__NAME", "42"),
            ("WINDLASS_NODE__SEED", "true"),
            ("WINDLASS_SHUTDOWN__DRAIN_DEADLINE_MS", "7"),
            ("WINDLASS_LOG__FORMAT", "json"),
            // What Kubernetes sets for a Service called windlass is not ours.
            ("WINDLASS_SERVICE_HOST", "10.0.0.1"),
            ("WINDLASS_PORT_5102_TCP", "tcp://10.0.0.1:5102"),
        ];
        let config = parse(text, &environment).expect("right");
        assert_eq!((config.node.name.as_str(), config.node.zone.as_str()), ("42", "a"));
        assert!(config.node.seed);
        assert_eq!(config.shutdown.drain_deadline_ms, 7);
        assert_eq!(config.log.format, telemetry::Format::Json);
    }

    #[test]
    fn what_is_printed_reads_back() {
        let text = shown(&Config::default());
        assert_eq!(shown(&parse(&text, &[]).expect("reads back")), text);
    }
}

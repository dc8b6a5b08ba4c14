//! Structured logs: one line per event on stderr, text for people or JSON for collectors.

use std::io::IsTerminal;

use serde::{Deserialize, Serialize};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer};

use super::traces::{self, EndpointError, Exporter, TracesConfig};

/// Overrides what is configured: at `trace`, presigning shows the session token that it signs with; and the spans of traces
/// would stand before every line.
const NEVER: [&str; 2] = ["aws_sigv4=off", "windlass::trace=off"];

/// Section `[log]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `error`, `warn`, `info`, `debug` or `trace`, or directives such as `info,windlass::swarm=debug`.
    /// The environment variable `RUST_LOG` goes before it.
    pub level: String,
    /// Form of each line.
    pub format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    Text,
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self { level: "info".into(), format: Format::Text }
    }
}

impl Config {
    /// The filter that `level` describes, without what would show credentials.
    ///
    /// # Errors
    /// When a directive does not parse.
    pub fn filter(&self) -> Result<EnvFilter, InitError> {
        let failed = |source| InitError::Level { level: self.level.clone(), source };
        let mut parsed = EnvFilter::builder().parse(&self.level).map_err(failed)?;
        for never in NEVER {
            parsed = parsed.add_directive(never.parse().map_err(failed)?);
        }
        Ok(parsed)
    }
}

/// Why logging could not start.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error(
        "{level:?} is no log level: {source}; write a level (error, warn, info, debug, trace) or target=level directives"
    )]
    Level { level: String, source: tracing_subscriber::filter::ParseError },
    #[error(transparent)]
    Traces(#[from] EndpointError),
    #[error("logging was already set up in this process: {0}")]
    Twice(#[from] TryInitError),
}

/// Sends this process's events to stderr from now on, and its traces to what is returned. `RUST_LOG`, when set, replaces the
/// configured level.
///
/// # Errors
/// [`InitError`]; nothing is logged then.
pub fn init(config: &Config, traces: &TracesConfig) -> Result<Option<Exporter>, InitError> {
    let filter = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(level) if !level.is_empty() => Config { level, ..config.clone() }.filter()?,
        _ => config.filter()?,
    };
    let (recorder, exporter) = traces::layer(traces)?.unzip();
    let subscriber = tracing_subscriber::registry().with(recorder);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match config.format {
        Format::Text => {
            let lines = lines.with_ansi(std::io::stderr().is_terminal());
            subscriber.with(lines.with_filter(filter)).try_init()?;
        }
        Format::Json => {
            subscriber.with(lines.json().flatten_event(true).with_filter(filter)).try_init()?;
        }
    }
    Ok(exporter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_that_does_not_parse_is_named() {
        let config = Config { level: "windlass=loud".into(), ..Config::default() };
        let message = config.filter().expect_err("loud is no level").to_string();
        assert!(message.contains("windlass=loud") && message.contains("write a level"), "{message}");
        Config::default().filter().expect("the default parses");
    }
}

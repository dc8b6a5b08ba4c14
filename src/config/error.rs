//! What can be wrong with a configuration, in one line that says where, what, and what would be right.

use std::path::PathBuf;

use super::de::{Fault, FaultKind};
use super::tree::Place;

/// Why no configuration came of it. The command exits with 64.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{place}: this is not TOML: {message}")]
    Syntax { place: Place, message: String },
    #[error("{place}: unknown key {key}; {}", suggestion(key, nearest.as_deref(), known))]
    UnknownKey { place: Place, key: String, nearest: Option<String>, known: &'static [&'static str] },
    #[error("{place}: {key} is missing; every entry of this table needs it")]
    Missing { place: Place, key: String },
    #[error("{place}: {key} = {value} is wrong: {reason}")]
    WrongValue { place: Place, key: String, value: String, reason: String },
    /// Each value is right on its own, and together they cannot work.
    #[error("{keys}: {reason}")]
    Conflict { keys: String, reason: String },
}

impl ConfigError {
    pub(super) fn conflict(keys: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Conflict { keys: keys.into(), reason: reason.into() }
    }

    /// `fallback` is the place when the fault is about the document as a whole.
    pub(super) fn from_fault(fault: Fault, fallback: &Place) -> Self {
        let key = fault.key();
        let place = fault.place.unwrap_or_else(|| fallback.clone());
        let value = fault.value.unwrap_or_else(|| "(nothing)".into());
        match fault.kind {
            FaultKind::UnknownKey { known } => {
                let nearest = nearest(key.rsplit('.').next().unwrap_or(&key), known);
                Self::UnknownKey { place, key, nearest, known }
            }
            FaultKind::Missing => Self::Missing { place, key },
            FaultKind::Expected(what) => {
                Self::WrongValue { place, key, value, reason: format!("expected {what}") }
            }
            FaultKind::Refused(reason) => Self::WrongValue { place, key, value, reason },
        }
    }
}

fn suggestion(key: &str, nearest: Option<&str>, known: &[&str]) -> String {
    match (key.rsplit_once('.'), nearest) {
        (Some((table, _)), Some(nearest)) => format!("did you mean {table}.{nearest}?"),
        (None, Some(nearest)) => format!("did you mean {nearest}?"),
        (Some((table, _)), None) => format!("{table} knows {}", known.join(", ")),
        (None, None) => format!("the sections are {}", known.join(", ")),
    }
}

/// The known key that takes the fewest edits, unless most of the word would have to change.
fn nearest(key: &str, known: &[&'static str]) -> Option<String> {
    let distance = |candidate: &str| strsim::damerau_levenshtein(key, candidate);
    let best = known.iter().min_by_key(|candidate| distance(candidate))?;
    (distance(best) * 2 <= key.len().max(best.len())).then(|| (*best).to_owned())
}

//! Configuration as it was written: a tree of values that remember their place, from TOML and from the environment.
//!
//! Invariant: every value knows the line or the variable it came from, so that an error can name it.
//! This file refuses to know which keys exist.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::ConfigError;

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A line of a file, counted from 1.
    Line { file: Arc<Path>, line: usize },
    /// An environment variable.
    Variable(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line { file, line } => write!(f, "{}:{line}", file.display()),
            Self::Variable(name) => write!(f, "environment variable {name}"),
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Value {
    pub(super) place: Place,
    pub(super) node: Node,
}

pub(super) type Table = BTreeMap<String, Value>;

#[derive(Clone, Debug)]
pub(super) enum Node {
    Boolean(bool),
    Integer(i64),
    Float(f64),
    String(String),
    /// From the environment: read as whatever type is wanted of it.
    Text(String),
    Array(Vec<Value>),
    Table(Table),
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boolean(value) => write!(f, "{value}"),
            Self::Integer(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value}"),
            Self::String(value) | Self::Text(value) => write!(f, "{value:?}"),
            Self::Array(_) => f.write_str("[…]"),
            Self::Table(_) => f.write_str("{…}"),
        }
    }
}

/// Reads a whole TOML document; `file` is only for the places.
pub(super) fn parse_document(text: &str, file: &Path) -> Result<Table, ConfigError> {
    let lines = Lines { text, place: |line| Place::Line { file: file.into(), line } };
    match DeTable::parse(text) {
        Ok(table) => lines.table(table.into_inner()),
        Err(error) => {
            let offset = error.span().map_or(0, |span| span.start);
            let message = format!("{}: {}", error.message(), lines.line_around(offset));
            Err(ConfigError::Syntax { place: lines.place(offset), message })
        }
    }
}

/// Reads one TOML value out of an environment variable; nothing when it is not TOML, and then it is plain text.
pub(super) fn parse_value(text: &str, place: &Place) -> Option<Node> {
    let parsed = DeValue::parse(text).ok()?;
    let lines = Lines { text, place: |_| place.clone() };
    lines.node(parsed.into_inner(), place).ok()
}

/// Overlays `WINDLASS_SECTION__KEY=value` on `root`.
///
/// Only names with a double underscore after the prefix are ours: Kubernetes sets `WINDLASS_SERVICE_HOST` and its kind
/// in every pod of a namespace that has a Service called windlass.
pub(super) fn overlay(root: &mut Table, environment: impl IntoIterator<Item = (String, String)>) {
    let mut ours: Vec<_> = environment.into_iter().filter_map(setting).collect();
    // The parent before the child, whatever the order of the environment.
    ours.sort();
    for (path, variable, text) in ours {
        let value = Value { place: Place::Variable(variable), node: Node::Text(text) };
        insert(root, &path, value);
    }
}

/// The key path, the variable's name and its text, if the variable is one of ours.
fn setting((variable, text): (String, String)) -> Option<(Vec<String>, String, String)> {
    let path: Vec<_> =
        variable.strip_prefix(super::ENV_PREFIX)?.split("__").map(str::to_ascii_lowercase).collect();
    (path.len() > 1).then_some((path, variable, text))
}

fn insert(table: &mut Table, path: &[String], value: Value) {
    match path {
        [] => {}
        [key] => {
            table.insert(key.clone(), value);
        }
        [key, rest @ ..] => {
            let place = value.place.clone();
            let below = table
                .entry(key.clone())
                .or_insert_with(|| Value { place: place.clone(), node: Node::Table(Table::new()) });
            if let Node::Text(text) = &below.node
                && let Some(parsed) = parse_value(text, &below.place)
            {
                below.node = parsed;
            }
            if !matches!(below.node, Node::Table(_)) {
                *below = Value { place, node: Node::Table(Table::new()) };
            }
            if let Node::Table(inner) = &mut below.node {
                insert(inner, rest, value);
            }
        }
    }
}

/// Turns byte offsets in `text` into places.
struct Lines<'a, P> {
    text: &'a str,
    place: P,
}

impl<P: Fn(usize) -> Place> Lines<'_, P> {
    fn place(&self, offset: usize) -> Place {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        (self.place)(1 + before.iter().filter(|byte| **byte == b'\n').count())
    }

    fn line_around(&self, offset: usize) -> &str {
        let (before, after) = self.text.split_at_checked(offset).unwrap_or((self.text, ""));
        let start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let end = after.find('\n').map_or(self.text.len(), |newline| offset + newline);
        self.text.get(start..end).unwrap_or_default().trim()
    }

    fn table(&self, table: DeTable<'_>) -> Result<Table, ConfigError> {
        let entry = |(key, value): (Spanned<_>, Spanned<DeValue<'_>>)| {
            let place = self.place(key.span().start);
            let node = self.node(value.into_inner(), &place)?;
            Ok((String::from(key.into_inner()), Value { place, node }))
        };
        table.into_iter().map(entry).collect()
    }

    fn array_element(&self, element: Spanned<DeValue<'_>>) -> Result<Value, ConfigError> {
        let place = self.place(element.span().start);
        let node = self.node(element.into_inner(), &place)?;
        Ok(Value { place, node })
    }

    fn node(&self, value: DeValue<'_>, place: &Place) -> Result<Node, ConfigError> {
        let wrong = |message: String| ConfigError::Syntax { place: place.clone(), message };
        Ok(match value {
            DeValue::String(text) => Node::String(text.into()),
            DeValue::Boolean(value) => Node::Boolean(value),
            DeValue::Integer(number) => Node::Integer(
                i64::from_str_radix(number.as_str(), number.radix())
                    .map_err(|error| wrong(format!("{}: {error}", number.as_str())))?,
            ),
            DeValue::Float(number) => Node::Float(
                number.as_str().parse().map_err(|error| wrong(format!("{}: {error}", number.as_str())))?,
            ),
            // No key of ours is a date; one that is written so fails as a string of the wrong form.
            DeValue::Datetime(when) => Node::String(when.to_string()),
            DeValue::Array(elements) => {
                Node::Array(elements.into_iter().map(|e| self.array_element(e)).collect::<Result<_, _>>()?)
            }
            DeValue::Table(table) => Node::Table(self.table(table)?),
        })
    }
}

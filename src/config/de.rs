//! From the tree to typed configuration, by serde, with errors that know the key, its value and its place.
//!
//! Invariant: the first thing wrong is reported whole: where, which key, what was written, what would have been right.
//! This file refuses to know any section: serde tells it the fields at each level.

use std::fmt;

use serde::de::value::{MapAccessDeserializer, StringDeserializer};
use serde::de::{
    self, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor,
};
use serde::forward_to_deserialize_any;

use super::tree::{Node, Place, Table, Value, parse_value};

/// What is wrong, before the tables around it have put their names to it.
#[derive(Debug)]
pub(super) struct Fault {
    /// Innermost key first.
    path: Vec<String>,
    pub(super) place: Option<Place>,
    pub(super) value: Option<String>,
    pub(super) kind: FaultKind,
}

#[derive(Debug)]
pub(super) enum FaultKind {
    /// `known` are the keys that this table has.
    UnknownKey {
        known: &'static [&'static str],
    },
    Missing,
    /// What would have been right.
    Expected(String),
    /// What a type's own parser said.
    Refused(String),
}

impl Fault {
    fn new(kind: FaultKind) -> Self {
        Self { path: Vec::new(), place: None, value: None, kind }
    }

    fn keyed(kind: FaultKind, key: &str) -> Self {
        Self { path: vec![key.to_owned()], ..Self::new(kind) }
    }

    /// The innermost place and value win: they are the most exact.
    fn at(mut self, place: &Place, value: Option<&Node>) -> Self {
        self.place.get_or_insert_with(|| place.clone());
        if self.value.is_none() && self.path.is_empty() {
            self.value = value.map(ToString::to_string);
        }
        self
    }

    fn under(mut self, key: String) -> Self {
        self.path.push(key);
        self
    }

    /// `section.key`, outermost first.
    pub(super) fn key(&self) -> String {
        self.path.iter().rev().map(String::as_str).collect::<Vec<_>>().join(".").replace(".[", "[")
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?}", self.key(), self.kind)
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(FaultKind::Refused(message.to_string()))
    }

    fn invalid_type(_: Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::new(FaultKind::Expected(plain(&expected.to_string())))
    }

    fn invalid_value(_: Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::new(FaultKind::Expected(plain(&expected.to_string())))
    }

    fn unknown_field(field: &str, known: &'static [&'static str]) -> Self {
        Self::keyed(FaultKind::UnknownKey { known }, field)
    }

    fn unknown_variant(_: &str, known: &'static [&'static str]) -> Self {
        Self::new(FaultKind::Expected(format!("one of {}", known.join(", "))))
    }

    fn missing_field(field: &'static str) -> Self {
        Self::keyed(FaultKind::Missing, field)
    }
}

/// serde's names for types, in the words of people who write configuration.
fn plain(expected: &str) -> String {
    match expected {
        "u8" => "a whole number from 0 to 255".into(),
        "u16" => "a whole number from 0 to 65535".into(),
        "u32" | "u64" | "usize" => "a whole number, 0 or more".into(),
        "i32" | "i64" | "isize" => "a whole number".into(),
        "f32" | "f64" => "a number".into(),
        // bytesize's two ways of saying so.
        "an integer or string" | "parsable string" => "a size such as \"500GiB\" or a number of bytes".into(),
        "a sequence" => "a list in [ ]".into(),
        "path string" => "a path".into(),
        _ if expected.starts_with("a nonzero ") => "a whole number, 1 or more".into(),
        _ if expected.starts_with("struct ") || expected == "a map" => "a table".into(),
        _ => expected.to_owned(),
    }
}

/// Deserializes the root table.
pub(super) fn from_table<T: de::DeserializeOwned>(root: Table, place: &Place) -> Result<T, Fault> {
    T::deserialize(Value { place: place.clone(), node: Node::Table(root) })
}

impl Value {
    fn expected(&self, what: &str) -> Fault {
        Fault::new(FaultKind::Expected(what.to_owned())).at(&self.place, Some(&self.node))
    }

    /// Environment text read as TOML where a list, a table or an undecided type is wanted.
    fn decided(self) -> Self {
        match &self.node {
            Node::Text(text) => {
                let node = parse_value(text, &self.place).unwrap_or_else(|| Node::String(text.clone()));
                Self { node, ..self }
            }
            _ => self,
        }
    }

    /// Environment text as the number or the boolean that is wanted.
    fn read_as<T: std::str::FromStr>(&self) -> Option<T> {
        match &self.node {
            Node::Text(text) => text.trim().parse().ok(),
            _ => None,
        }
    }
}

macro_rules! text_as {
    ($($method:ident $visit:ident $ty:ty),* $(,)?) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
            match self.read_as::<$ty>() {
                Some(value) => {
                    visitor.$visit(value).map_err(|fault: Fault| fault.at(&self.place, Some(&self.node)))
                }
                None => self.deserialize_any(visitor),
            }
        }
    )*};
}

impl<'de> Deserializer<'de> for Value {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let Self { place, node } = self.decided();
        let shown = node.clone();
        match node {
            Node::Boolean(value) => visitor.visit_bool(value),
            Node::Integer(value) => visitor.visit_i64(value),
            Node::Float(value) => visitor.visit_f64(value),
            Node::String(value) | Node::Text(value) => visitor.visit_string(value),
            Node::Array(elements) => visitor.visit_seq(Elements { rest: elements.into_iter(), index: 0 }),
            Node::Table(table) => visitor.visit_map(Entries::new(table)),
        }
        .map_err(|fault| fault.at(&place, Some(&shown)))
    }

    text_as! {
        deserialize_bool visit_bool bool,
        deserialize_i8 visit_i64 i64, deserialize_i16 visit_i64 i64,
        deserialize_i32 visit_i64 i64, deserialize_i64 visit_i64 i64,
        deserialize_u8 visit_u64 u64, deserialize_u16 visit_u64 u64,
        deserialize_u32 visit_u64 u64, deserialize_u64 visit_u64 u64,
        deserialize_f32 visit_f64 f64, deserialize_f64 visit_f64 f64,
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.node {
            // `WINDLASS_NODE__NAME=42` names the node 42; only quoted text is TOML here.
            Node::Text(text) if !text.starts_with(['"', '\'']) => visitor
                .visit_string(text.clone())
                .map_err(|fault: Fault| fault.at(&self.place, Some(&self.node))),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.deserialize_string(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let expected = self.expected(&format!("one of {}", variants.join(", ")));
        let (place, node) = (self.place.clone(), self.node.clone());
        match self.node {
            Node::String(name) | Node::Text(name) => {
                let name: StringDeserializer<Fault> = name.into_deserializer();
                visitor.visit_enum(name)
            }
            Node::Table(table) => visitor.visit_enum(MapAccessDeserializer::new(Entries::new(table))),
            _ => Err(expected),
        }
        .map_err(|fault| fault.at(&place, Some(&node)))
    }

    forward_to_deserialize_any! {
        i128 u128 char bytes byte_buf unit unit_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

struct Entries {
    rest: std::collections::btree_map::IntoIter<String, Value>,
    current: Option<(String, Value)>,
}

impl Entries {
    fn new(table: Table) -> Self {
        Self { rest: table.into_iter(), current: None }
    }
}

impl<'de> MapAccess<'de> for Entries {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        let Some((key, value)) = self.rest.next() else { return Ok(None) };
        let name: StringDeserializer<Fault> = key.clone().into_deserializer();
        let read = seed.deserialize(name).map_err(|fault| fault.at(&value.place, None));
        self.current = Some((key, value));
        read.map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        match self.current.take() {
            Some((key, value)) => seed.deserialize(value).map_err(|fault| fault.under(key)),
            None => Err(de::Error::custom("a value was asked for before its key")),
        }
    }
}

struct Elements {
    rest: std::vec::IntoIter<Value>,
    index: usize,
}

impl<'de> SeqAccess<'de> for Elements {
    type Error = Fault;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Fault> {
        let Some(element) = self.rest.next() else { return Ok(None) };
        let index = self.index;
        self.index += 1;
        seed.deserialize(element).map(Some).map_err(|fault| fault.under(format!("[{index}]")))
    }
}

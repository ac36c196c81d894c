//! Command line values of the form `key=value,key,key=value`, read into plain serde structs.
//!
//! The struct's types decide what a value means, so a device's configuration is written once and is the same
//! in a flag, in JSON and in TOML. A key alone means `true`; a comma within a value is doubled.
//! A key whose type is a list may be given several times.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, MapAccess, SeqAccess, Visitor};

/// What is wrong with a command line value, as a sentence for whoever typed it.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParamError {
    /// Two commas in a row are a literal comma, so this is a comma at the start, or at the end.
    #[error("there is nothing before or after one of the commas; write ',,' for a comma within a value")]
    Empty,
    /// The key does not exist.
    #[error("unknown key '{key}'; {}", Known(.known))]
    Unknown {
        /// The key as written.
        key: String,
        /// Keys that exist.
        known: &'static [&'static str],
    },
    /// The key is there twice.
    #[error("the key '{key}' is given twice; give it once")]
    Duplicate {
        /// The key.
        key: String,
    },
    /// A key without which it does not work.
    #[error("'{key}' is missing; add {key}=VALUE")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// The key stands alone, but is not a switch.
    #[error("'{key}' needs a value; write {key}=VALUE")]
    NoValue {
        /// The key.
        key: String,
    },
    /// The value does not fit.
    #[error("{key}={value}: {problem}")]
    Value {
        /// The key.
        key: String,
        /// The value as written.
        value: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A type refused what it was given, without knowing where it came from.
    #[error("{0}")]
    Refused(String),
}

/// Lists the keys that exist.
struct Known<'a>(&'a [&'static str]);

impl fmt::Display for Known<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("there are no keys here"),
            [only] => write!(f, "the only key is {only}"),
            many => write!(f, "the keys are {}", many.join(", ")),
        }
    }
}

impl de::Error for ParamError {
    fn custom<T: fmt::Display>(problem: T) -> Self {
        Self::Refused(problem.to_string())
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::Refused(format!("there is no '{variant}'; choose one of {}", expected.join(", ")))
    }

    fn missing_field(key: &'static str) -> Self {
        Self::Missing { key }
    }
}

/// Reads `key=value,key,key=value` into a struct. The first item, if it has no `=`, is the value of
/// `bare_key` if there is one.
///
/// ```
/// #[derive(serde::Deserialize)]
/// struct Disk {
///     path: String,
///     #[serde(default)]
///     ro: bool,
/// }
///
/// let disk: Disk = devices::params::from_str("data.img,ro", Some("path"))?;
/// assert!(disk.path == "data.img" && disk.ro);
/// # Ok::<(), devices::params::ParamError>(())
/// ```
pub fn from_str<T: DeserializeOwned>(text: &str, bare_key: Option<&str>) -> Result<T, ParamError> {
    T::deserialize(Params { items: split(text, bare_key)? })
}

/// Whether a configuration need not write `value` down: for `skip_serializing_if`.
pub fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// One key, with the values that it is given, in their order; `None` is that of a key alone.
struct Item {
    key: String,
    values: Vec<Option<String>>,
}

fn split(text: &str, bare_key: Option<&str>) -> Result<Vec<Item>, ParamError> {
    let mut items: Vec<Item> = Vec::new();
    if text.is_empty() {
        return Ok(items);
    }
    let mut rest = text.chars().peekable();
    loop {
        let mut item = String::new();
        let mut more = false;
        while let Some(c) = rest.next() {
            if c == ',' && rest.next_if_eq(&',').is_none() {
                more = true;
                break;
            }
            item.push(c);
        }
        if item.is_empty() {
            return Err(ParamError::Empty);
        }
        let (key, value) = match (item.split_once('='), bare_key) {
            (Some((key, value)), _) => (key.into(), Some(value.into())),
            (None, Some(key)) if items.is_empty() => (key.into(), Some(item)),
            (None, _) => (item, None),
        };
        match items.iter_mut().find(|other| other.key == key) {
            Some(other) => other.values.push(value),
            None => items.push(Item { key, values: vec![value] }),
        }
        if !more {
            return Ok(items);
        }
    }
}

/// The whole value, as a struct.
struct Params {
    items: Vec<Item>,
}

impl<'de> de::Deserializer<'de> for Params {
    type Error = ParamError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamError> {
        visitor.visit_map(Items { items: self.items.into_iter(), value: None })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ParamError> {
        match self.items.iter().find(|item| !known.contains(&item.key.as_str())) {
            Some(item) => Err(ParamError::Unknown { key: item.key.clone(), known }),
            None => self.deserialize_any(visitor),
        }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

struct Items {
    items: std::vec::IntoIter<Item>,
    /// The item whose key was handed out last.
    value: Option<Item>,
}

impl<'de> MapAccess<'de> for Items {
    type Error = ParamError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, ParamError> {
        self.value = self.items.next();
        let key = self.value.as_ref().map(|item| item.key.as_str());
        key.map(|key| seed.deserialize(StrDeserializer::new(key))).transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, ParamError> {
        let item = self.value.take().ok_or(ParamError::Empty)?;
        // Only here is it known which value a type refused.
        let value = Value { key: &item.key, values: &item.values };
        seed.deserialize(value).map_err(|error| value.explain(error))
    }
}

/// The values of a key, which become whatever type is asked for.
#[derive(Clone, Copy)]
struct Value<'a> {
    key: &'a str,
    values: &'a [Option<String>],
}

impl<'a> Value<'a> {
    /// The only one: every type but a list has one.
    fn single(&self) -> Result<Option<&'a str>, ParamError> {
        match self.values {
            [value] => Ok(value.as_deref()),
            _ => Err(ParamError::Duplicate { key: self.key.into() }),
        }
    }

    fn text(&self) -> Result<&'a str, ParamError> {
        self.single()?.ok_or_else(|| ParamError::NoValue { key: self.key.into() })
    }

    /// Says which value it was that a type refused.
    fn explain(&self, error: ParamError) -> ParamError {
        match (error, self.values) {
            (ParamError::Refused(problem), [Some(value)]) => {
                ParamError::Value { key: self.key.into(), value: value.clone(), problem }
            }
            (ParamError::Refused(_), [None]) => ParamError::NoValue { key: self.key.into() },
            (error, _) => error,
        }
    }

    fn number<T: std::str::FromStr>(&self, range: impl fmt::Display) -> Result<T, ParamError> {
        self.text()?.parse().map_err(|_| ParamError::Refused(format!("expected a number {range}")))
    }
}

macro_rules! numbers {
    ($($method:ident => $visit:ident: $number:ty,)+) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamError> {
            visitor.$visit(self.number(format_args!("from {} to {}", <$number>::MIN, <$number>::MAX))?)
        }
    )+};
}

impl<'de> de::Deserializer<'de> for Value<'_> {
    type Error = ParamError;

    numbers! {
        deserialize_i8 => visit_i8: i8,
        deserialize_i16 => visit_i16: i16,
        deserialize_i32 => visit_i32: i32,
        deserialize_i64 => visit_i64: i64,
        deserialize_u8 => visit_u8: u8,
        deserialize_u16 => visit_u16: u16,
        deserialize_u32 => visit_u32: u32,
        deserialize_u64 => visit_u64: u64,
        deserialize_f32 => visit_f32: f32,
        deserialize_f64 => visit_f64: f64,
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamError> {
        match self.single()? {
            Some(text) => visitor.visit_str(text),
            None => visitor.visit_bool(true),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamError> {
        visitor.visit_bool(match self.single()? {
            None | Some("true" | "on") => true,
            Some("false" | "off") => false,
            Some(_) => return Err(ParamError::Refused("expected on, off, true or false".into())),
        })
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamError> {
        visitor.visit_str(self.text()?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamError> {
        visitor.visit_some(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ParamError> {
        visitor.visit_seq(Values(self))
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, ParamError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ParamError> {
        visitor.visit_enum(self.text()?.into_deserializer())
    }

    serde::forward_to_deserialize_any! {
        i128 u128 char bytes byte_buf unit unit_struct tuple tuple_struct map struct identifier ignored_any
    }
}

/// The values of a key, one after the other.
struct Values<'a>(Value<'a>);

impl<'de> SeqAccess<'de> for Values<'_> {
    type Error = ParamError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, ParamError> {
        let Some((first, rest)) = self.0.values.split_first() else { return Ok(None) };
        let value = Value { values: std::slice::from_ref(first), ..self.0 };
        self.0.values = rest;
        seed.deserialize(value).map(Some).map_err(|error| value.explain(error))
    }
}

#[cfg(test)]
#[path = "params_tests.rs"]
mod tests;

//! JSON bodies, taken strictly.
//!
//! What serde derives takes an array for a struct, its fields in their order. No description of the API says so, and a
//! client that sends one has made a mistake.

use serde::Deserializer;
use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{DeserializeOwned, Error as _, IntoDeserializer, Unexpected, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::{Error, Value};

/// Reads `text`, in which structs are objects.
pub fn from_slice<T: DeserializeOwned>(text: &[u8]) -> Result<T, Error> {
    // The first look knows lines and columns, and keys that are there twice.
    serde_json::from_slice::<T>(text)?;
    T::deserialize(Strict(serde_json::from_slice(text)?))
}

struct Strict(Value);

impl IntoDeserializer<'_, Error> for Strict {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Strict {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Object(map) => visitor
                .visit_map(MapDeserializer::new(map.into_iter().map(|(key, value)| (key, Self(value))))),
            Value::Array(list) => visitor.visit_seq(SeqDeserializer::new(list.into_iter().map(Self))),
            other => other.deserialize_any(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(_) => Err(Error::invalid_type(Unexpected::Seq, &"an object")),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.0.deserialize_enum(name, variants, visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::super::firecracker::types::{Action, Entropy, FullConfiguration, MachineConfiguration};
    use super::*;

    fn refused<T: DeserializeOwned>(text: &str) -> String {
        from_slice::<T>(text.as_bytes()).err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn an_array_is_no_object_however_deep_it_is() {
        for text in ["[null]", r#"{"rate_limiter": [null, null]}"#, r#"{"rate_limiter": {"ops": [1, 2, 3]}}"#]
        {
            assert!(
                serde_json::from_str::<Entropy>(text).is_ok(),
                "serde has learned it: this module can go"
            );
            assert!(refused::<Entropy>(text).contains("sequence"), "{text}");
        }
        assert!(!refused::<Entropy>("[]").is_empty());
        assert!(refused::<MachineConfiguration>("[1, 128, false, null, false, \"2M\"]").contains("sequence"));
        let drive = r#"["a", true, null, null, null, "Unsafe", "Sync", null, null]"#;
        assert!(refused::<FullConfiguration>(&format!(r#"{{"drives": [{drive}]}}"#)).contains("sequence"));
    }

    #[test]
    fn what_is_right_is_taken_and_what_is_wrong_is_told_with_its_place() {
        let text = r#"{"drives": [{"drive_id": "a", "is_root_device": true, "io_engine": "Async", "path_on_host": null}],
                       "machine-config": {"vcpu_count": 2, "mem_size_mib": 64, "huge_pages": "2M"}}"#;
        let full: FullConfiguration = from_slice(text.as_bytes()).unwrap();
        assert_eq!(full, serde_json::from_str(text).unwrap());
        assert!(from_slice::<Action>(br#"{"action_type": "InstanceStart"}"#).is_ok());
        assert!(refused::<Action>(r#"{"action_type": "Dance"}"#).contains("line 1 column"));
        assert!(refused::<Entropy>(r#"{"rate_limiter": null, "rate_limiter": null}"#).contains("duplicate"));
    }
}

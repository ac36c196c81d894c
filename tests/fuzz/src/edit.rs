//! Changes of values that are otherwise in order, since bytes of any content are hardly ever a state.

use arbitrary::Arbitrary;
use ciborium::Value;

/// A value that is likely to matter.
#[derive(Arbitrary, Clone, Debug)]
pub enum Leaf {
    Null,
    Bool(bool),
    Small(u8),
    Number(i64),
    Largest,
    Float(f64),
    Text(String),
    Bytes(Vec<u8>),
    /// So many numbers.
    List(u16),
    /// So deep.
    Nested(u8),
}

impl Leaf {
    fn value(&self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::Bool(bit) => Value::Bool(*bit),
            Self::Small(number) => Value::from(*number),
            Self::Number(number) => Value::from(*number),
            Self::Largest => Value::from(u64::MAX),
            Self::Float(number) => Value::from(*number),
            Self::Text(text) => Value::from(text.as_str()),
            Self::Bytes(bytes) => Value::Bytes(bytes.clone()),
            Self::List(count) => Value::Array(vec![Value::from(0); (*count).into()]),
            Self::Nested(depth) => (0..*depth).fold(Value::Null, |inner, _| Value::Array(vec![inner])),
        }
    }
}

/// What is done to one value.
#[derive(Arbitrary, Clone, Debug)]
pub enum Change {
    Replace(Leaf),
    Remove,
    Twice,
    Add(i16),
    Page,
    /// A byte of a byte string.
    Byte {
        at: u16,
        bits: u8,
    },
}

/// A change somewhere in a value.
#[derive(Arbitrary, Clone, Debug)]
pub struct Edit {
    at: u16,
    change: Change,
}

impl Edit {
    /// Makes it.
    pub fn apply(&self, value: &mut Value) {
        let count = count(value);
        if let Some(value) = nth(value, &mut (usize::from(self.at) % count)) {
            self.change.apply(value);
        }
    }
}

impl Change {
    fn apply(&self, value: &mut Value) {
        let add = |value: &mut Value, more: i128| {
            if let Some(number) = value.as_integer() {
                let sum = i128::from(number) + more;
                *value = u64::try_from(sum).map_or(Value::Null, Value::from);
            }
        };
        match (self, value) {
            (Self::Replace(leaf), value) => *value = leaf.value(),
            (Self::Remove, Value::Array(items)) => _ = items.pop(),
            (Self::Remove, Value::Map(entries)) => _ = entries.pop(),
            (Self::Remove, Value::Bytes(bytes)) => _ = bytes.pop(),
            (Self::Remove, value) => *value = Value::Null,
            (Self::Twice, Value::Array(items)) => items.extend(items.clone()),
            (Self::Twice, Value::Map(entries)) => entries.extend(entries.clone()),
            (Self::Twice, Value::Bytes(bytes)) => bytes.extend(bytes.clone()),
            (Self::Twice, value) => *value = Value::Array(vec![value.clone(), value.clone()]),
            (Self::Add(more), value) => add(value, (*more).into()),
            (Self::Page, value) => add(value, 4096),
            (Self::Byte { at, bits }, Value::Bytes(bytes)) if !bytes.is_empty() => {
                let at = usize::from(*at) % bytes.len();
                bytes[at] ^= bits;
            }
            (Self::Byte { .. }, _) => {}
        }
    }
}

/// How many values there are in a value, itself included.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Map(entries) => entries.iter().map(|(_, value)| count(value)).sum(),
        _ => 0,
    }
}

/// The value number `left` of those in `value`.
fn nth<'a>(value: &'a mut Value, left: &mut usize) -> Option<&'a mut Value> {
    if *left == 0 {
        return Some(value);
    }
    *left -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| nth(item, left)),
        Value::Map(entries) => entries.iter_mut().find_map(|(_, value)| nth(value, left)),
        _ => None,
    }
}

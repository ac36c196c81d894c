//! What a part of a machine puts into a snapshot, and how it takes it back.
//!
//! A machine is restored as it is built, from the same configuration; then every part that has a state of its own takes
//! it over, and then the guest goes on. So a part saves what the guest and time have made of it, and nothing that the
//! configuration says anyway.

use ciborium::Value;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Something whose state is part of a snapshot. Nothing runs while it is called.
pub trait Snapshot: Send + Sync {
    /// The state, which stays as it is.
    fn save(&self) -> Result<Saved, SnapshotError>;

    /// Takes over what [`Self::save`] gave, perhaps in another process and another version. The state comes from a file, so
    /// it may be anything. After an error the machine is of no use.
    fn restore(&self, saved: &Saved) -> Result<(), SnapshotError>;
}

/// A type of state, with the version of its form.
///
/// A field may be added without a new version if `#[serde(default)]` is right for snapshots that lack it, and if a reader
/// which does not know it may ignore it. Everything else is a new version, whose reader knows the older ones.
pub trait State: Serialize + DeserializeOwned {
    /// The version that is written, from 1.
    const VERSION: u16;
}

/// A state in the form that is written into a file: self-describing, so that a reader can show what it does not know.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// [`State::VERSION`] of the writer.
    pub version: u16,
    /// The state.
    pub value: Value,
}

impl Saved {
    /// Writes a state.
    pub fn of<S: State>(state: &S) -> Result<Self, SnapshotError> {
        Ok(Self { version: S::VERSION, value: to_value(state)? })
    }

    /// Reads a state.
    pub fn get<S: State>(&self) -> Result<S, SnapshotError> {
        match self.version {
            0 => Err(SnapshotError::impossible("version 0")),
            found if found > S::VERSION => Err(SnapshotError::Newer { found, known: S::VERSION }),
            _ => from_value(self.value.clone()),
        }
    }
}

/// `state` as a value of its own, for a state that has parts of many types.
pub fn to_value(state: &impl Serialize) -> Result<Value, SnapshotError> {
    Value::serialized(state).map_err(|error| SnapshotError::Malformed(error.to_string()))
}

/// The opposite of [`to_value`].
pub fn from_value<T: DeserializeOwned>(value: Value) -> Result<T, SnapshotError> {
    value.deserialized().map_err(|error| SnapshotError::Malformed(error.to_string()))
}

/// A state could not be saved or taken over.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum SnapshotError {
    /// A newer program wrote it.
    #[error(
        "it has version {found}, and this program knows up to {known}; use the program that made the snapshot, or a newer one"
    )]
    Newer {
        /// Its version.
        found: u16,
        /// The newest version that can be read.
        known: u16,
    },
    /// It is not what its version says.
    #[error("it is damaged: {0}")]
    Malformed(String),
    /// It is in order, and this machine is another one.
    #[error("the snapshot's machine has {what} {saved}, and this one {found}")]
    Differs {
        /// What is different.
        what: &'static str,
        /// In the snapshot.
        saved: String,
        /// In this machine.
        found: String,
    },
    /// The host refused it.
    #[error("{call} failed: {reason}")]
    Host {
        /// What was called.
        call: &'static str,
        /// Why it failed.
        reason: String,
    },
}

impl SnapshotError {
    /// A value that cannot be, in a state of the right form.
    pub fn impossible(what: &str) -> Self {
        Self::Malformed(format!("an impossible {what}"))
    }

    /// Fails unless the machines are alike in `what`.
    pub fn unless_same<T: PartialEq + std::fmt::Display>(
        what: &'static str,
        saved: T,
        found: T,
    ) -> Result<(), Self> {
        match saved == found {
            true => Ok(()),
            false => Err(Self::Differs { what, saved: saved.to_string(), found: found.to_string() }),
        }
    }
}

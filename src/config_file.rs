//! A machine's configuration in a file: JSON or TOML.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::anyhow;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use vmm_core::VmConfig;
use vmm_core::config::CpuProfile;

use crate::exit::UsageError;

/// Larger files are no configurations.
const MAX_BYTES: u64 = 1 << 20;

/// What a configuration file says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConfigFile {
    /// The machine; what the file does not mention has its default.
    pub config: VmConfig,
    /// The file lists the devices, so the machine has no others.
    pub lists_devices: bool,
}

/// Only whether the list is there: an empty one is not none.
#[derive(Deserialize)]
struct Presence {
    devices: Option<IgnoredAny>,
}

/// Reads the configuration at `path`.
pub fn load(path: &Path) -> anyhow::Result<ConfigFile> {
    let shown = path.display();
    let text = read(path).map_err(|error| {
        let reason = match error.kind() {
            std::io::ErrorKind::NotFound => "no such file".into(),
            std::io::ErrorKind::PermissionDenied => "permission denied".into(),
            _ => error.to_string(),
        };
        anyhow!("cannot read configuration '{shown}': {reason}; pass --config FILE")
    })?;
    let json = is_json(path, &text);
    let wrong = |problem| UsageError(format!("configuration '{shown}' is not valid: {problem}"));
    let config = parse(json, &text).map_err(wrong)?;
    let presence: Presence = parse(json, &text).map_err(wrong)?;
    Ok(ConfigFile { config, lists_devices: presence.devices.is_some() })
}

/// Reads the value of `--cpu-profile`; an error is a sentence.
pub fn cpu_profile(text: &str) -> Result<CpuProfile, String> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct List {
        features: Vec<String>,
    }

    if let Some(profile) = CpuProfile::named(text) {
        return Ok(profile);
    }
    let path = Path::new(text);
    let list = read(path).map_err(|error| {
        format!("it is neither host nor a level from v1 to v4, and no file that can be read: {error}")
    })?;
    let names = match list.trim_start().starts_with('[') {
        true => parse(true, &list),
        false => parse(is_json(path, &list), &list).map(|List { features }| features),
    };
    CpuProfile::of(names?)
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    match text.len() as u64 {
        0..=MAX_BYTES => Ok(text),
        _ => Err(std::io::Error::other("it is larger than 1 MiB")),
    }
}

/// By the file's extension, or else by its first character.
fn is_json(path: &Path, text: &str) -> bool {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => true,
        Some("toml") => false,
        _ => text.trim_start().starts_with('{'),
    }
}

/// Parses `text`; the error says what is wrong and where.
fn parse<T: DeserializeOwned>(json: bool, text: &str) -> Result<T, String> {
    if json {
        return serde_json::from_str(text).map_err(|error| error.to_string());
    }
    toml::from_str(text).map_err(|error| match error.span() {
        Some(span) => {
            let before = text.get(..span.start).unwrap_or(text);
            format!("{} at line {}", error.message(), before.matches('\n').count() + 1)
        }
        None => error.message().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_text(name: &str, text: &str) -> Result<ConfigFile, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        load(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn both_formats_say_the_same() {
        let toml = "cpus = 2\nmemory = \"1G\"\n[[devices]]\nkind = \"disk\"\npath = \"a.img\"\n";
        let json = r#" {"cpus": 2, "memory": "1G", "devices": [{"kind": "disk", "path": "a.img"}]}"#;
        let want = load_text("a.toml", toml).unwrap();
        assert_eq!((want.config.cpus, want.lists_devices), (2, true));
        for (name, text) in [("a.json", json), ("config", json), ("config", toml)] {
            assert_eq!(load_text(name, text), Ok(want.clone()), "{name}");
        }
    }

    #[test]
    fn an_empty_list_of_devices_is_a_list() {
        assert!(load_text("a.json", r#"{"devices": []}"#).unwrap().lists_devices);
        assert!(!load_text("a.json", "{}").unwrap().lists_devices);
        assert!(!load_text("a.toml", "").unwrap().lists_devices);
    }

    #[test]
    fn mistakes_are_named_with_their_place_and_what_would_be_right() {
        for (name, text, wants) in [
            ("a.json", r#"{"cpu": 2}"#, &["unknown field `cpu`", "`cpus`", "`memory`", "line 1"][..]),
            ("a.toml", "\ncpu = 2\n", &["unknown field `cpu`", "`cpus`", "line 2"]),
            ("a.toml", "[[devices]]\nkind = \"floppy\"\n", &["unknown variant `floppy`", "`disk`", "line "]),
            ("a.toml", "memory = \"lots\"", &["'lots' is not a size", "line 1"]),
            ("a.json", "[1", &["line 1"]),
            ("a.json", "{} {}", &["trailing characters"]),
            ("a.toml", "cpus = [", &["line 1"]),
        ] {
            let error = load_text(name, text).unwrap_err();
            for want in wants {
                assert!(error.contains(want), "{text}: {error}");
            }
        }
    }
}

//! What command line values mean, and what the sentences say when they mean nothing.

use std::path::PathBuf;

use proptest::prelude::*;
use serde::Deserialize;

use super::*;
use crate::size::ByteSize;

#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Cache {
    #[default]
    Writeback,
    None,
}

#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sample {
    path: PathBuf,
    #[serde(default)]
    ro: bool,
    id: Option<String>,
    queues: Option<u8>,
    shift: Option<i16>,
    ratio: Option<f64>,
    #[serde(default)]
    cache: Cache,
    size: Option<ByteSize>,
    #[serde(default)]
    port: Vec<u16>,
}

fn read(text: &str) -> Result<Sample, ParamError> {
    from_str(text, Some("path"))
}

fn sentence(text: &str) -> String {
    read(text).expect_err(text).to_string()
}

#[test]
fn types_decide_what_a_value_means() {
    let all = "path=/a,ro=on,id=x=y,queues=255,shift=-3,ratio=0.5,cache=none,size=2M,port=1,port=2";
    let want = Sample {
        path: "/a".into(),
        ro: true,
        id: Some("x=y".into()),
        queues: Some(255),
        shift: Some(-3),
        ratio: Some(0.5),
        cache: Cache::None,
        size: Some(ByteSize(2 << 20)),
        port: vec![1, 2],
    };
    assert_eq!(read(all), Ok(want));
}

#[test]
fn the_first_item_may_leave_its_key_out() {
    let ro = |path: &str| Sample { path: path.into(), ro: true, ..Sample::default() };
    assert_eq!(read("/a/b.img,ro"), Ok(ro("/a/b.img")));
    assert_eq!(read("ro,path=x"), Err(ParamError::Duplicate { key: "path".into() }));
    assert_eq!(from_str("ro,path=x", None), Ok(ro("x")));
}

#[test]
fn a_comma_in_a_value_is_doubled() {
    for (text, path) in [("a,,b", "a,b"), ("path=a,,,,b", "a,,b"), ("a,,", "a,"), (",,a", ",a")] {
        assert_eq!(read(text).map(|s| s.path), Ok(path.into()), "{text}");
    }
    assert!(read("a,,,ro").is_ok_and(|s| s.path.as_os_str() == "a," && s.ro));
}

#[test]
fn switches_turn_off_too() {
    for (text, ro) in [("a,ro", true), ("a,ro=true", true), ("a,ro=off", false), ("a,ro=false", false)] {
        assert_eq!(read(text).map(|s| s.ro), Ok(ro), "{text}");
    }
}

#[test]
fn mistakes_are_sentences() {
    for (text, want) in [
        ("", "'path' is missing; add path=VALUE"),
        ("ro=on", "'path' is missing; add path=VALUE"),
        ("a,rw", "unknown key 'rw'; the keys are path, ro, id, queues, shift, ratio, cache, size, port"),
        ("a,", "there is nothing before or after one of the commas; write ',,' for a comma within a value"),
        ("a,ro,ro=off", "the key 'ro' is given twice; give it once"),
        ("a,ro=maybe", "ro=maybe: expected on, off, true or false"),
        ("a,id", "'id' needs a value; write id=VALUE"),
        ("a,queues=256", "queues=256: expected a number from 0 to 255"),
        ("a,queues", "'queues' needs a value; write queues=VALUE"),
        ("a,cache=some", "cache=some: there is no 'some'; choose one of writeback, none"),
        (
            "a,size=1X",
            "size=1X: '1X' is not a size; write a number of bytes, or one with K, M, G or T, such as 256M",
        ),
        ("a,port=1,port=x", "port=x: expected a number from 0 to 65535"),
        ("a,port=1,port", "'port' needs a value; write port=VALUE"),
        ("a,id=1,ro,id=2", "the key 'id' is given twice; give it once"),
        ("a,size", "'size' needs a value; write size=VALUE"),
    ] {
        assert_eq!(sentence(text), want, "{text}");
    }
}

#[test]
fn a_struct_without_keys_takes_none() {
    #[derive(Debug, PartialEq, Deserialize)]
    struct Nothing {}
    assert_eq!(from_str("", None), Ok(Nothing {}));
    let error = from_str::<Nothing>("x", None).expect_err("no keys");
    assert_eq!(error.to_string(), "unknown key 'x'; there are no keys here");
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,40}") {
        _ = read(&text);
        _ = from_str::<Sample>(&text, None);
    }

    #[test]
    fn near_misses_do_not_panic(text in "(path|ro|id|port|queues|cache|size|,|=|[0-9]|-|on|none|M){0,12}") {
        _ = read(&text);
    }

    #[test]
    fn any_value_survives(path in "\\PC{1,40}") {
        let text = format!("path={}", path.replace(',', ",,"));
        prop_assert_eq!(read(&text).map(|s| s.path), Ok(PathBuf::from(path)));
    }
}

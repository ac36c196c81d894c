//! A hostile driver of one kind of device of the registry: the one that `$VMM_FUZZ_KIND` names, on the
//! transport that `$VMM_TEST_TRANSPORT` names.
#![no_main]

use std::sync::LazyLock;

use devices::registry::{KINDS, Kind};

static KIND: LazyLock<&'static Kind> = LazyLock::new(|| {
    let name = std::env::var("VMM_FUZZ_KIND").unwrap_or_default();
    let names: Vec<&str> = KINDS.iter().map(|kind| kind.name).collect();
    let kind = KINDS.iter().find(|kind| kind.name == name);
    kind.unwrap_or_else(|| panic!("VMM_FUZZ_KIND is '{name}'; set it to one of {}", names.join(", ")))
});

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::drive((KIND.specimen)(), input));

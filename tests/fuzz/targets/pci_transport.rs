//! Registers, MSI-X table and PCI configuration space accessed in any order and width, on a device of any kind that
//! nobody has started.
#![no_main]

use devices::registry::KINDS;
use devices::virtio::test_driver::Driver;
use devices::virtio::test_wire::Kind;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((&choice, input)) = input.split_first() else { return };
    let kind = &KINDS[usize::from(choice) % KINDS.len()];
    fuzz::run(&mut Driver::on(Kind::Pci, (kind.specimen)()), input);
});

//! A hostile driver inside a real guest: takes each virtio device from Linux, breaks the specification in every way that a
//! driver can, and then asks the device for something honest, which must work. Every device is given back at the end, to
//! the driver that it was taken from.
//!
//! `hostile-driver SEED [DEVICE...]` attacks all but the devices named, such as `virtio0` or `vda`. It prints a line for each
//! device and group of attacks.

mod attack;
mod driver;
mod kinds;
mod memory;
mod registers;
mod sysfs;

use std::process::ExitCode;

use anyhow::{Context, Result};

use attack::{GROUPS, Ground};
use driver::{Driver, PAGES};
use memory::Pages;
use registers::{Field, Registers};
use sysfs::Device;

fn main() -> ExitCode {
    match run() {
        Ok(count) => {
            println!("hostile: {count} devices attacked");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("hostile: FAILED {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<usize> {
    let mut arguments = std::env::args().skip(1);
    let seed: u64 = arguments.next().context("usage: hostile-driver SEED [DEVICE...]")?.parse()?;
    let spared: Vec<String> = arguments.collect();
    let pages = Pages::take(PAGES)?;
    let mut victims = sysfs::devices()?;
    victims.retain(|device| !spared.iter().any(|word| device.is(word)));
    for device in &victims {
        attack(device, seed, &pages)
            .with_context(|| format!("{} ({})", device.name, kinds::name(device.id)))?;
    }
    Ok(victims.len())
}

fn attack(device: &Device, seed: u64, pages: &Pages) -> Result<()> {
    let driver_path = device.unbind()?;
    let regs = Registers::of(device)?;
    let end_of_ram = sysfs::ram()?.last().context("RAM")?.1;
    let ground = Ground { id: device.id, seed, end_of_ram };
    for (group, attack) in GROUPS {
        let mut driver = Driver::new(&regs, pages)?;
        attack(&mut driver, &ground).context(group)?;
        driver.start(0).context(group)?;
        kinds::honest(device.id, &mut driver).with_context(|| format!("after {group}"))?;
        println!("hostile: {} {} {} {group} ok", device.name, kinds::name(device.id), regs.transport());
    }
    Driver::new(&regs, pages)?;
    // As Linux leaves a device without a driver: it does not begin anew when it gets one.
    regs.set(Field::Status, driver::ACKNOWLEDGE);
    if let Some(path) = driver_path {
        device.bind(&path)?;
    }
    Ok(())
}

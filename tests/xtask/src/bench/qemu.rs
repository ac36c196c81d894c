//! QEMU's microvm machine, set up to do as little as it can.

use anyhow::Result;
use harness::packages;

use super::measure::Subject;

/// Machine options that leave out every device which the benchmarks do not use.
const MACHINE: &str = "-M microvm,x-option-roms=off,rtc=off,isa-serial=";
/// QEMU 7.2 fails to set IA32_ARCH_CAPABILITIES on a KVM without hardware behind it, so it is left out.
const COMMON: &str = "-accel kvm -cpu host,-arch-capabilities -smp 1 -m 128 -no-user-config -nodefaults -no-reboot -display none";

/// QEMU with `arguments`; `serial` says whether there is a serial port, whose output leads nowhere.
pub fn microvm(name: &str, serial: bool, machine: &str, arguments: &str) -> Result<Subject> {
    packages::ensure(&["qemu-system-x86"])?;
    let program = packages::find_program("qemu-system-x86_64")?;
    let (on, port) = if serial { ("on", "-serial null") } else { ("off", "") };
    let arguments = format!("{MACHINE}{on}{machine} {COMMON} {port} {arguments}");
    Ok(Subject::new(name, &program.display().to_string(), &arguments))
}

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

/// Machine options of a microvm whose kernel finds its devices on the command line. QEMU would put them at its end,
/// where they are arguments of init.
pub const WITHOUT_ACPI: &str = ",acpi=off,pit=on,pic=on,auto-kernel-cmdline=off";

/// Machine options of a microvm whose kernel finds its devices through ACPI. Its devices then have level-triggered
/// interrupts: measured here, three for each request to a disk where there is one without ACPI, so only the time of a boot
/// is compared with it.
pub const WITH_ACPI: &str = ",acpi=on,pit=off,pic=off";

/// Where the first two devices of a machine without ACPI are.
pub const TWO_DEVICES: &str = "virtio_mmio.device=512@0xfeb00e00:12 virtio_mmio.device=512@0xfeb00c00:11";

/// The same machine with its serial port on standard output, where ours always is.
pub fn with_serial_on_stdout(subject: Subject) -> Subject {
    let argv = subject.argv.iter().map(|arg| if arg == "null" { "stdio".into() } else { arg.clone() });
    Subject { argv: argv.collect(), ..subject }
}

/// A machine without ACPI that has a root disk and one device more: init is a shell, on standard input and output.
pub fn at_shell(name: &str, arguments: &str) -> Result<Subject> {
    // Names of threads tell vCPUs.
    let arguments = format!("-name bench,debug-threads=on {arguments} -append");
    let subject = microvm(name, true, WITHOUT_ACPI, &arguments)?
        .arg(format!("console=ttyS0 quiet reboot=t panic=-1 root=/dev/vda ro {TWO_DEVICES} -- sh"));
    Ok(with_serial_on_stdout(subject))
}

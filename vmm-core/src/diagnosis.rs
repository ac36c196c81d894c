//! What to tell an operator when a vCPU cannot go on: the instruction, its address, and the usual cause.

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

use crate::hypervisor::VcpuFailure;

/// Whether this host's processors have VMX or SVM, so that KVM runs guest kernels on hardware.
pub fn has_hardware_virtualisation() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| cpuinfo_has_vmx_or_svm(&text))
}

fn cpuinfo_has_vmx_or_svm(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.strip_prefix("flags")?.split_once(':'))
        .any(|(_, flags)| flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// The instruction at the start of `bytes`, in Intel syntax, with the bytes it takes. `None` if it is none.
pub fn decode(bytes: &[u8], rip: u64, long_mode: bool) -> Option<(String, usize)> {
    let bitness = if long_mode { 64 } else { 32 };
    let instruction = Decoder::with_ip(bitness, bytes, rip, DecoderOptions::NONE).decode();
    if instruction.is_invalid() {
        return None;
    }
    let mut text = String::new();
    IntelFormatter::new().format(&instruction, &mut text);
    Some((text, instruction.len()))
}

/// One sentence on `failure` of the vCPU `id`. `hardware`: see [`has_hardware_virtualisation`].
pub fn explain(id: u8, failure: &VcpuFailure, hardware: bool) -> String {
    match failure {
        VcpuFailure::Emulation { rip, bytes, cpl, long_mode } => {
            let what = match decode(bytes, *rip, *long_mode) {
                Some((text, len)) => format!("the instruction '{text}' ({})", hex(&bytes[..len])),
                None if bytes.is_empty() => "an instruction that it did not name".into(),
                None => format!("the bytes {}", hex(bytes)),
            };
            let cause = match (hardware, *cpl) {
                (false, 0) => {
                    "this host's processors offer no VMX or SVM, so KVM emulates what a guest's kernel does at \
                     privilege level 0 and does not know this one; use the ring-3 kernel (leave --kernel out), \
                     or a host with hardware virtualisation"
                }
                (false, _) => "this host's processors offer no VMX or SVM, and KVM's emulator is incomplete",
                (true, _) => {
                    "KVM emulates only accesses to device memory, so this is usually a jump to a wrong address, \
                     or code in a place where the guest has no RAM"
                }
            };
            format!("KVM could not emulate {what} at {rip:#x} on vCPU {id}: {cause}")
        }
        VcpuFailure::Internal { suberror, rip } => {
            let name = match suberror {
                2 => "a second exception while delivering a first one",
                3 => "an exit while delivering an event",
                4 => "an exit that the processor should not make",
                _ => "an internal error",
            };
            format!("KVM gave up on vCPU {id} at {rip:#x}: {name} (suberror {suberror})")
        }
        VcpuFailure::Entry { reason } => format!(
            "the processor refused to run vCPU {id} (hardware reason {reason:#x}): the guest put it in a state \
             that it does not accept"
        ),
        VcpuFailure::Unexpected { exit } => {
            format!("vCPU {id} stopped with an exit that no machine of ours asks for: {exit}")
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emulation_failure_names_the_instruction() {
        let failure = VcpuFailure::Emulation {
            rip: 0x10_0000,
            bytes: vec![0xf3, 0x0f, 0xb8, 0xc3, 0x90, 0x90],
            cpl: 0,
            long_mode: true,
        };
        let text = explain(0, &failure, false);
        assert!(text.contains("'popcnt eax,ebx' (f3 0f b8 c3) at 0x100000 on vCPU 0"), "{text}");
        assert!(text.contains("no VMX or SVM"), "{text}");
        assert!(!explain(0, &failure, true).contains("no VMX or SVM"));
    }

    #[test]
    fn cpu_flags_are_words() {
        assert!(cpuinfo_has_vmx_or_svm("processor: 0\nflags\t\t: fpu svm sse\n"));
        assert!(!cpuinfo_has_vmx_or_svm("flags\t\t: fpu svm_lock sse\nbugs: vmx\nvmx flags: svm\n"));
    }
}

//! Names of processor features, as Linux has them in /proc/cpuinfo: to say which ones a guest would miss.

use kvm_bindings::kvm_cpuid_entry2;

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Features in one register, from bit 0 on. `-` is a bit that is no feature, or that the guest itself changes.
struct Word {
    leaf: u32,
    subleaf: u32,
    register: Register,
    names: &'static str,
}

/// SDM vol. 2, CPUID; AMD64 APM vol. 3, appendix E.
const WORDS: &[Word] = &[
    Word {
        leaf: 1,
        subleaf: 0,
        register: Register::Ecx,
        // OSXSAVE (27) is the guest's own, and 31 says that there is a hypervisor.
        names: "pni pclmulqdq dtes64 - ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 \
                x2apic movbe popcnt tsc_deadline_timer aes xsave - avx f16c rdrand -",
    },
    Word {
        leaf: 1,
        subleaf: 0,
        register: Register::Edx,
        // The local APIC (9) can be switched off by the guest, and 28 says how many processors there are.
        names: "fpu vme de pse tsc msr pae mce cx8 - - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse \
                sse2 ss - tm ia64 pbe",
    },
    Word {
        leaf: 7,
        subleaf: 0,
        register: Register::Ebx,
        names: "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a avx512f avx512dq rdseed \
                adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    },
    Word {
        leaf: 7,
        subleaf: 0,
        register: Register::Ecx,
        // OSPKE (4) is the guest's own.
        names: "prefetchwt1 avx512vbmi umip pku - waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
                avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b \
                enqcmd sgx_lc pks",
    },
    Word {
        leaf: 7,
        subleaf: 0,
        register: Register::Edx,
        names: "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear - - - serialize - \
                tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d \
                arch_capabilities core_capabilities spec_ctrl_ssbd",
    },
    Word {
        leaf: 7,
        subleaf: 1,
        register: Register::Eax,
        names: "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred \
                lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam",
    },
    Word { leaf: 0xd, subleaf: 1, register: Register::Eax, names: "xsaveopt xsavec xgetbv1 xsaves xfd" },
    Word {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: Register::Ecx,
        // CmpLegacy (1) says how many processors there are.
        names: "lahf_lm - svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce \
                - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    },
    Word {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: Register::Edx,
        names: "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    },
    Word {
        leaf: 0x8000_0008,
        subleaf: 0,
        register: Register::Ebx,
        names: "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - - - - - - - - \
                amd_ssbd virt_ssbd - - amd_psfd",
    },
];

impl Word {
    fn value(&self, leaves: &[kvm_cpuid_entry2]) -> u32 {
        let leaf = leaves.iter().find(|leaf| leaf.function == self.leaf && leaf.index == self.subleaf);
        leaf.map_or(0, |leaf| match self.register {
            Register::Eax => leaf.eax,
            Register::Ebx => leaf.ebx,
            Register::Ecx => leaf.ecx,
            Register::Edx => leaf.edx,
        })
    }

    fn set(&self, leaves: &mut [kvm_cpuid_entry2], value: u32) {
        let found = leaves.iter_mut().find(|leaf| leaf.function == self.leaf && leaf.index == self.subleaf);
        if let Some(leaf) = found {
            *match self.register {
                Register::Eax => &mut leaf.eax,
                Register::Ebx => &mut leaf.ebx,
                Register::Ecx => &mut leaf.ecx,
                Register::Edx => &mut leaf.edx,
            } = value;
        }
    }

    /// Bits that are no features of their own: what the guest changes, what the machine says of itself, and what AMD has in
    /// two places.
    fn others(&self) -> u32 {
        match (self.leaf, self.register) {
            (1, Register::Ecx) => 1 << 27 | 1 << 31,
            (1, Register::Edx) => 1 << 9 | 1 << 28,
            (7, Register::Ecx) => 1 << 4,
            (0x8000_0001, Register::Ecx) => 1 << 1,
            (0x8000_0001, Register::Edx) => 0x0183_f3ff,
            _ => 0,
        }
    }

    /// Names of the bits that are set in `value`.
    fn names(&self, value: u32) -> impl Iterator<Item = &'static str> {
        let names = self.names.split_whitespace().enumerate();
        names.filter(move |&(bit, name)| value & 1 << bit != 0 && name != "-").map(|(_, name)| name)
    }
}

/// Features that a guest with these CPUID leaves sees.
pub fn features(leaves: &[kvm_cpuid_entry2]) -> Vec<&'static str> {
    WORDS.iter().flat_map(|word| word.names(word.value(leaves))).collect()
}

/// Features that a guest with the leaves `saved` sees, and would not see with `offered`.
pub fn missing(saved: &[kvm_cpuid_entry2], offered: &[kvm_cpuid_entry2]) -> Vec<&'static str> {
    WORDS.iter().flat_map(|word| word.names(word.value(saved) & !word.value(offered))).collect()
}

/// Whether there is a feature of this name.
pub fn is_known(name: &str) -> bool {
    name != "-" && WORDS.iter().any(|word| word.names.split_whitespace().any(|known| known == name))
}

/// Takes away all features but those that are allowed, also those without a name here.
pub fn mask(leaves: &mut [kvm_cpuid_entry2], allowed: impl Fn(&str) -> bool) {
    for word in WORDS {
        let names = word.names.split_whitespace().enumerate();
        let kept =
            names.filter(|(_, name)| allowed(name)).fold(word.others(), |kept, (bit, _)| kept | 1 << bit);
        word.set(leaves, word.value(leaves) & kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ecx, edx, ..Default::default() }
    }

    #[test]
    fn bits_have_the_names_of_the_manuals() {
        let names = |leaf| features(&[leaf]);
        assert_eq!(names(leaf(1, 1 << 12 | 1 << 25 | 1 << 28, 1 << 25)), ["fma", "aes", "avx", "sse"]);
        assert_eq!(names(leaf(0x8000_0001, 1 << 5, 1 << 29 | 1 << 11)), ["abm", "syscall", "lm"]);
        let seven =
            kvm_cpuid_entry2 { function: 7, ebx: 1 << 5 | 1 << 16, ecx: 1 << 22, ..Default::default() };
        assert_eq!(names(seven), ["avx2", "avx512f", "rdpid"]);
        for word in WORDS {
            assert!(word.names.split_whitespace().count() <= 32, "{:#x} {:?}", word.leaf, word.register);
        }
    }

    #[test]
    fn what_the_guest_changes_itself_is_not_missing() {
        let saved = [leaf(1, u32::MAX, u32::MAX)];
        let offered = [leaf(1, !(1 << 27 | 1 << 31 | 1 << 3), !(1 << 9 | 1 << 28))];
        assert_eq!(missing(&saved, &offered), [""; 0]);
        assert_eq!(missing(&saved, &[leaf(1, !(1 << 28), u32::MAX)]), ["avx"]);
        assert_eq!(missing(&[], &saved), [""; 0]);
    }
}

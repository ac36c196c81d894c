//! The CPUID leaves that a guest sees: what KVM supports, with the machine's own topology in it.
//!
//! Leaf numbers and fields: SDM vol. 2, CPUID; AMD64 APM vol. 3, appendix E. Every field that names an APIC ID
//! or counts processors is written here, so nothing of the host's topology is left in.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use vmm_sys_util::fam;

const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
/// Legacy multi-core bit of AMD (Fn8000_0001 ECX CmpLegacy).
const AMD_CMP_LEGACY: u32 = 1 << 1;

/// Leaves that tell how an APIC ID is made up, one subleaf a level.
const TOPOLOGY_LEAVES: [u32; 3] = [0xb, 0x1f, 0x8000_0026];

/// The leaves for the vCPU with APIC ID `id` in a machine of one package with `cpus` cores of one thread.
pub fn for_vcpu(supported: &CpuId, id: u8, cpus: u8) -> Result<CpuId, fam::Error> {
    let (id, cpus) = (u32::from(id), u32::from(cpus));
    // Bits that tell cores apart in an APIC ID.
    let core_bits = cpus.next_power_of_two().trailing_zeros();
    let (topology, mut entries): (Vec<_>, Vec<_>) =
        supported.as_slice().iter().copied().partition(|entry| TOPOLOGY_LEAVES.contains(&entry.function));
    for entry in &mut entries {
        match entry.function {
            0x1 => feature_leaf(entry, id, cpus),
            0x4 => cache_leaf(entry, core_bits),
            0x8000_0001 => {
                entry.ecx &= !AMD_CMP_LEGACY;
                entry.ecx |= if cpus > 1 { AMD_CMP_LEGACY } else { 0 };
            }
            // ApicIdSize and the number of threads minus one.
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | core_bits << 12 | (cpus - 1),
            0x8000_001d => amd_cache_leaf(entry, cpus),
            // Extended APIC ID; one thread a core, and the core's ID; one node.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
    // KVM names only the first level of these, and of that the host's: a machine of several packages.
    for leaf in TOPOLOGY_LEAVES {
        if topology.iter().any(|entry| entry.function == leaf) {
            entries.extend(topology_leaves(leaf, id, cpus, core_bits));
        }
    }
    CpuId::from_entries(&entries)
}

fn feature_leaf(entry: &mut kvm_cpuid_entry2, id: u32, cpus: u32) {
    // Initial APIC ID, logical processors of the package (a power of two), CLFLUSH size as it was.
    entry.ebx = (entry.ebx & 0xffff) | cpus.next_power_of_two() << 16 | id << 24;
    entry.ecx |= LEAF1_ECX_HYPERVISOR | LEAF1_ECX_TSC_DEADLINE;
    entry.edx &= !LEAF1_EDX_HTT;
    entry.edx |= if cpus > 1 { LEAF1_EDX_HTT } else { 0 };
}

/// Intel's cache leaf: the last level is shared by the package, the others belong to a core.
fn cache_leaf(entry: &mut kvm_cpuid_entry2, core_bits: u32) {
    let (kind, level) = (entry.eax & 0x1f, entry.eax >> 5 & 7);
    if kind == 0 {
        return;
    }
    let sharing = if level >= 3 { (1 << core_bits) - 1 } else { 0 };
    entry.eax = (entry.eax & 0x3fff) | sharing << 14 | ((1 << core_bits) - 1) << 26;
}

fn amd_cache_leaf(entry: &mut kvm_cpuid_entry2, cpus: u32) {
    let (kind, level) = (entry.eax & 0x1f, entry.eax >> 5 & 7);
    if kind == 0 {
        return;
    }
    let sharing = if level >= 3 { cpus - 1 } else { 0 };
    entry.eax = (entry.eax & !(0xfff << 14)) | sharing << 14;
}

/// The levels of an extended topology leaf: threads, cores, none. AMD's numbers its types alike (core, complex), and
/// with one thread a core and one complex the levels mean the same.
fn topology_leaves(function: u32, id: u32, cpus: u32, core_bits: u32) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    let level = |index: u32, (eax, ebx, kind): (u32, u32, u32)| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: kind | index,
        edx: id,
        ..Default::default()
    };
    [level(0, (0, 1, THREAD)), level(1, (core_bits, cpus, CORE)), level(2, (0, 0, 0))]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> CpuId {
        let entry = |function, index, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        // A host with 64 threads, on APIC ID 37, which must not show through.
        CpuId::from_entries(&[
            entry(0x1, 0, 0, 0x2540_0800, 0, LEAF1_EDX_HTT),
            entry(0x4, 3, 0xfc1f_c163, 0, 0, 0),
            entry(0xb, 0, 1, 2, 0x100, 37),
            entry(0x8000_0008, 0, 0x3030, 0, 0x603f, 0),
            entry(0x8000_001d, 3, 0x7fc163, 0, 0, 0),
            entry(0x8000_001e, 0, 37, 0x112, 0x305, 0),
            entry(0x8000_0026, 0, 1, 2, 0x100, 37),
            entry(0x8000_0026, 2, 7, 64, 0x302, 37),
        ])
        .unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn every_vcpu_has_its_own_id_and_the_machines_topology() {
        for (cpus, bits) in [(1u8, 0u32), (2, 1), (3, 2), (4, 2), (32, 5)] {
            for id in 0..cpus {
                let cpuid = for_vcpu(&host(), id, cpus).unwrap();
                let one = leaf(&cpuid, 1, 0);
                assert_eq!(one.ebx >> 24, u32::from(id));
                assert_eq!(one.ebx >> 16 & 0xff, 1 << bits);
                assert_eq!(one.ebx & 0xffff, 0x800, "CLFLUSH size stays");
                assert_eq!(one.edx & LEAF1_EDX_HTT != 0, cpus > 1);
                assert_ne!(one.ecx & LEAF1_ECX_HYPERVISOR, 0);
                assert_eq!(leaf(&cpuid, 0xb, 0).edx, u32::from(id));
                let cores = leaf(&cpuid, 0xb, 1);
                assert_eq!((cores.eax, cores.ebx, cores.edx), (bits, u32::from(cpus), u32::from(id)));
                assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx & 0xff, u32::from(cpus) - 1);
                assert_eq!(leaf(&cpuid, 0x8000_001e, 0).eax, u32::from(id));
                assert_eq!(leaf(&cpuid, 0x8000_0026, 0).edx, u32::from(id));
                assert_eq!(leaf(&cpuid, 0x8000_0026, 2).ebx, 0, "there is no third level");
                assert_eq!(leaf(&cpuid, 0x8000_001d, 3).eax >> 14 & 0xfff, u32::from(cpus) - 1);
                assert_eq!(leaf(&cpuid, 4, 3).eax >> 14 & 0xfff, (1 << bits) - 1);
            }
        }
    }
}

//! Profiles: a guest sees the features of a level of processors, on whatever processor it runs, so that its snapshots can be
//! restored on all hosts of a fleet.
//!
//! Levels: System V ABI for x86-64, table 3.1.

use std::collections::BTreeSet;
use std::fmt;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::features;

/// What every x86-64 processor has, and what KVM does without the processor. A guest sees it with any profile.
const EVERYWHERE: &str = "fpu vme de pse tsc msr pae mce cx8 sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 syscall nx \
                          lm x2apic tsc_deadline_timer tsc_adjust";

/// Levels, each with the ones before it: what a host must have.
const LEVELS: [(&str, &str); 4] = [
    ("v1", "cmov cx8 fpu fxsr mmx syscall sse sse2"),
    ("v2", "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"),
    ("v3", "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"),
    ("v4", "avx512f avx512bw avx512cd avx512dq avx512vl"),
];

/// Components of the extended state (SDM vol. 1, 13.1), and the feature that each belongs to.
const COMPONENTS: [(u32, &str); 9] = [
    (2, "avx"),
    (3, "mpx"),
    (4, "mpx"),
    (5, "avx512f"),
    (6, "avx512f"),
    (7, "avx512f"),
    (9, "pku"),
    (17, "amx_tile"),
    (18, "amx_tile"),
];
/// x87 and SSE, which are always there.
const XCR0_LEGACY: u32 = 3;
/// Bytes of these and of the header (SDM vol. 1, 13.4).
const XSAVE_LEGACY_BYTES: u32 = 576;

/// Leaves about what no level has: performance counters, SGX, processor trace, AMX, AVX10, SVM, IBS, memory encryption.
const NOT_IN_LEVELS: [u32; 14] = [
    0xa,
    0x12,
    0x14,
    0x19,
    0x1c,
    0x1d,
    0x1e,
    0x24,
    0x8000_000a,
    0x8000_001b,
    0x8000_001f,
    0x8000_0020,
    0x8000_0021,
    0x8000_0022,
];

/// Which features of the host's processor a guest sees. Written as `host`, a level from `v1` to `v4`, or a list of features
/// by Linux's names, among which levels may be.
///
/// ```
/// use vmm_core::config::CpuProfile;
///
/// let profile: CpuProfile = serde_json::from_str(r#"["v2", "aes"]"#)?;
/// assert_eq!(serde_json::to_string(&profile)?, r#"["v2","aes"]"#);
/// assert_eq!(serde_json::from_str::<CpuProfile>(r#""host""#)?, CpuProfile::default());
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuProfile {
    /// None stands for all that the host has.
    names: Option<Vec<String>>,
}

impl CpuProfile {
    /// The profile of this name: `host`, or a level.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "host" => Some(Self::default()),
            name => level(name).map(|_| Self { names: Some(vec![name.into()]) }),
        }
    }

    /// A profile of features by Linux's names, and of levels. An error is a sentence.
    pub fn of(names: Vec<String>) -> Result<Self, String> {
        match names.iter().find(|name| level(name).is_none() && !features::is_known(name)) {
            Some(unknown) => Err(format!(
                "'{unknown}' is no feature of a processor; use the names of /proc/cpuinfo, and v1 to v4 for levels"
            )),
            None => Ok(Self { names: Some(names) }),
        }
    }

    /// Features that a host must have.
    fn demanded(&self) -> BTreeSet<&str> {
        let names = self.names.iter().flatten();
        names.flat_map(|name| level(name).unwrap_or_else(|| vec![name])).collect()
    }

    /// Takes out of `supported` what the profile does not have. Fails with what is missing for it.
    pub(crate) fn cut(&self, supported: &CpuId) -> Result<CpuId, Vec<String>> {
        if self.names.is_none() {
            return Ok(supported.clone());
        }
        let demanded = self.demanded();
        let mut entries = supported.as_slice().to_vec();
        let there = features::features(&entries);
        let missing: Vec<_> =
            demanded.iter().filter(|name| !there.contains(name)).map(|name| (*name).into()).collect();
        if !missing.is_empty() {
            return Err(missing);
        }
        let mut allowed: BTreeSet<&str> = EVERYWHERE.split_whitespace().chain(demanded).collect();
        // Their state is of no use without it.
        if COMPONENTS.iter().any(|(_, name)| allowed.contains(name)) {
            allowed.insert("xsave");
        }
        features::mask(&mut entries, |name| allowed.contains(name));
        for entry in &mut entries {
            match (entry.function, entry.index) {
                // Features that nothing here has a name for.
                (7, 1) => (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0),
                (7, 2..) => clear(entry),
                (leaf, _) if NOT_IN_LEVELS.contains(&leaf) => clear(entry),
                _ => {}
            }
        }
        cut_xsave(&mut entries, |name| allowed.contains(name));
        // There are no more than there were.
        CpuId::from_entries(&entries).map_err(|_| Vec::new())
    }
}

/// The features of a level with those of the levels before it.
fn level(name: &str) -> Option<Vec<&'static str>> {
    let at = LEVELS.iter().position(|(level, _)| *level == name)?;
    Some(LEVELS[..=at].iter().flat_map(|(_, names)| names.split_whitespace()).collect())
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

/// Cuts the leaves of the extended state to components of allowed features.
fn cut_xsave(entries: &mut [kvm_cpuid_entry2], allowed: impl Fn(&str) -> bool) {
    let components = COMPONENTS.iter().filter(|(_, name)| allowed(name)).map(|(component, _)| 1 << component);
    let mut xcr0 = components.fold(XCR0_LEGACY, |all, bit: u32| all | bit);
    if !allowed("xsave") {
        xcr0 = 0;
    }
    let leaves = || entries.iter().filter(|entry| entry.function == 0xd);
    let supported = leaves().find(|entry| entry.index == 0).map_or(0, |entry| entry.eax);
    xcr0 &= supported;
    let ends = leaves().filter(|entry| entry.index >= 2 && entry.index < 32 && xcr0 & 1 << entry.index != 0);
    let bytes = ends.map(|entry| entry.eax.saturating_add(entry.ebx)).fold(XSAVE_LEGACY_BYTES, u32::max);
    for entry in entries.iter_mut().filter(|entry| entry.function == 0xd) {
        match entry.index {
            _ if xcr0 == 0 => clear(entry),
            // KVM itself writes into EBX what the guest has switched on.
            0 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (xcr0, XSAVE_LEGACY_BYTES, bytes, 0),
            // No state of the supervisor.
            1 => (entry.ecx, entry.edx) = (0, 0),
            2..32 if xcr0 & 1 << entry.index != 0 => {}
            _ => clear(entry),
        }
    }
}

impl fmt::Display for CpuProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.names {
            None => f.write_str("host"),
            Some(names) => f.write_str(&names.join(" ")),
        }
    }
}

impl Serialize for CpuProfile {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.names.as_deref() {
            None => serializer.serialize_str("host"),
            Some([name]) if level(name).is_some() => serializer.serialize_str(name),
            Some(names) => names.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for CpuProfile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "host, a level from v1 to v4, or a list of features")]
        enum Either {
            Name(String),
            Names(Vec<String>),
        }

        match Either::deserialize(deserializer)? {
            Either::Name(name) => Self::named(&name).ok_or_else(|| {
                de::Error::custom(format!(
                    "'{name}' is no profile of a processor; use host, v1, v2, v3, v4 or a list of features"
                ))
            }),
            Either::Names(names) => Self::of(names).map_err(de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// A host that has everything.
    fn host() -> Vec<kvm_cpuid_entry2> {
        const ALL: [u32; 4] = [u32::MAX; 4];
        let plain = [(1, 0), (7, 1), (7, 2), (0xa, 0), (0x8000_0001, 0), (0x8000_0008, 0), (0x8000_0021, 0)];
        let mut entries: Vec<_> = plain.into_iter().map(|(leaf, index)| entry(leaf, index, ALL)).collect();
        entries.push(entry(7, 0, [2, u32::MAX, u32::MAX, u32::MAX]));
        let sizes =
            [(2, 256, 576), (3, 64, 960), (4, 64, 1024), (5, 64, 1088), (6, 512, 1152), (7, 1024, 1664)];
        let more = [(9, 8, 2688), (17, 64, 2752), (18, 8192, 2816)];
        entries.push(entry(0xd, 0, [0x602ff, 11008, 11008, 0]));
        entries.push(entry(0xd, 1, [0x1f, 0, 0x1900, 0]));
        entries.extend(sizes.into_iter().chain(more).map(|(i, size, at)| entry(0xd, i, [size, at, 0, 0])));
        entries.extend([entry(0xd, 11, [16, 0, 1, 0]), entry(0xd, 63, [1, 1, 1, 1])]);
        entries
    }

    fn cut(profile: &CpuProfile, host: &[kvm_cpuid_entry2]) -> Result<Vec<kvm_cpuid_entry2>, String> {
        let supported = CpuId::from_entries(host).unwrap();
        profile.cut(&supported).map(|cut| cut.as_slice().to_vec()).map_err(|missing| missing.join(" "))
    }

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let entry = entries.iter().find(|entry| (entry.function, entry.index) == (function, index)).unwrap();
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    #[test]
    fn a_guest_of_a_level_sees_that_level_on_every_host() {
        let all = cut(&CpuProfile::default(), &host()).unwrap();
        assert_eq!(all, host());
        let mut before = BTreeSet::new();
        for (name, own) in LEVELS {
            let cut = cut(&CpuProfile::named(name).unwrap(), &host()).unwrap();
            let seen: BTreeSet<_> = features::features(&cut).into_iter().collect();
            let want: BTreeSet<_> = EVERYWHERE.split_whitespace().chain(level(name).unwrap()).collect();
            assert_eq!(seen, want, "{name}");
            assert!(
                seen.is_superset(&before) && own.split_whitespace().all(|own| seen.contains(own)),
                "{name}"
            );
            for left in [(7, 2), (0xa, 0), (0x8000_0021, 0)] {
                assert_eq!(leaf(&cut, left.0, left.1), [0; 4], "{name} {left:?}");
            }
            assert_eq!(leaf(&cut, 7, 1), [0; 4], "{name}");
            // How many processors there are, and that there is a hypervisor, is no feature.
            assert_eq!(leaf(&cut, 1, 0)[3] >> 28 & 1, 1, "{name}");
            assert_eq!(leaf(&cut, 1, 0)[2] >> 31, 1, "{name}");
            before = seen;
        }
    }

    #[test]
    fn the_extended_state_is_that_of_the_features() {
        let xsave = |names: &[&str]| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            let cut = cut(&CpuProfile::of(names).unwrap(), &host()).unwrap();
            let components: Vec<u32> = (2..19)
                .filter(|i| {
                    cut.iter().any(|entry| (entry.function, entry.index) == (0xd, *i) && entry.eax != 0)
                })
                .collect();
            let [xcr0, _, bytes, _] = leaf(&cut, 0xd, 0);
            (xcr0, bytes, components, leaf(&cut, 0xd, 1))
        };
        assert_eq!(xsave(&["v2"]), (0, 0, vec![], [0; 4]));
        assert_eq!(xsave(&["v3"]), (7, 832, vec![2], [0; 4]));
        assert_eq!(xsave(&["v4"]), (0xe7, 2688, vec![2, 5, 6, 7], [0; 4]));
        assert_eq!(xsave(&["v3", "xsavec", "pku"]), (0x207, 2696, vec![2, 9], [2, 0, 0, 0]));
        assert_eq!(xsave(&["avx"]), (7, 832, vec![2], [0; 4]), "it brings what it needs");
        assert_eq!(xsave(&["amx_tile"]).2, [17, 18]);
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let mut host = host();
        let seven = host.iter_mut().find(|entry| (entry.function, entry.index) == (7, 0)).unwrap();
        seven.ebx &= !(1 << 5 | 1 << 8);
        assert_eq!(cut(&CpuProfile::named("v3").unwrap(), &host).unwrap_err(), "avx2 bmi2");
        assert_eq!(
            cut(&CpuProfile::of(vec!["bmi2".into(), "aes".into()]).unwrap(), &host).unwrap_err(),
            "bmi2"
        );
        assert!(cut(&CpuProfile::named("v2").unwrap(), &host).is_ok());
        assert!(cut(&CpuProfile::named("v1").unwrap(), &[]).unwrap_err().contains("sse2"));
    }

    #[test]
    fn profiles_are_written_as_they_are_read() {
        for text in [r#""host""#, r#""v1""#, r#""v4""#, r#"["aes"]"#, r#"["v2","sha_ni"]"#, "[]"] {
            let profile: CpuProfile = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&profile).unwrap(), text);
        }
        for (text, want) in [
            (r#""v5""#, "'v5' is no profile"),
            (r#""/etc/passwd""#, "is no profile"),
            (r#"["avx3"]"#, "'avx3' is no feature"),
            (r#"["-"]"#, "'-' is no feature"),
            ("7", "a list of features"),
        ] {
            let error = serde_json::from_str::<CpuProfile>(text).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
        let all = LEVELS.iter().map(|(_, names)| *names).chain([EVERYWHERE]);
        assert!(all.flat_map(str::split_whitespace).all(features::is_known));
    }

    proptest! {
        #[test]
        fn a_guest_sees_nothing_else(words in prop::collection::vec(any::<[u32; 4]>(), 12), level in 0..4usize) {
            let mut host = host();
            for (entry, word) in host.iter_mut().zip(words) {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (word[0], word[1], word[2], word[3]);
            }
            let name = LEVELS[level].0;
            match cut(&CpuProfile::named(name).unwrap(), &host) {
                Ok(cut) => {
                    let want: BTreeSet<_> = EVERYWHERE.split_whitespace().chain(super::level(name).unwrap()).collect();
                    prop_assert!(features::features(&cut).into_iter().all(|feature| want.contains(feature)));
                }
                Err(missing) => prop_assert!(!missing.is_empty()),
            }
        }
    }
}

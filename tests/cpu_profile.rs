//! What guests see of the processor, where the hardware lets a hypervisor decide it.

use anyhow::{Context, Result};
use harness::{Guest, Kernel, Machines, Needs, Place, PlacedMachines, local_kvm};

mod hardware {
    use std::collections::BTreeSet;

    use vmm_core::Snapshot;

    use super::*;

    /// The flags of /proc/cpuinfo in a guest with this profile.
    fn flags(profile: &str) -> Result<BTreeSet<String>> {
        let guest = Guest::new().kernel(Kernel::Standard).arg("--cpu-profile").arg(profile);
        let run = guest.shell("grep -m1 ^flags /proc/cpuinfo | sed 's/.*: /flags=/'").run()?;
        let flags = run.ok()?.value_of("flags=").context("it has flags")?;
        Ok(flags.split_whitespace().map(str::to_owned).collect())
    }

    #[test]
    fn a_guest_sees_the_features_of_its_profile() -> Result<()> {
        let (host, v2) = (flags("host")?, flags("v2")?);
        // The KVM of the lab has neither XSAVE nor AVX to offer.
        let v3 = if host.contains("avx2") { flags("v3")? } else { BTreeSet::new() };
        let has = |flags: &BTreeSet<String>, names: &str| names.split(' ').all(|name| flags.contains(name));
        assert!(has(&host, "sse4_2 popcnt"), "{host:?}");
        assert!(v3.is_empty() || has(&v3, "avx avx2 bmi1 bmi2 fma movbe xsave sse4_2"), "{v3:?}");
        assert!(has(&v2, "sse4_1 sse4_2 ssse3 popcnt cx16 lahf_lm sse2 nx lm"), "{v2:?}");
        let never = "avx avx2 bmi1 bmi2 fma f16c movbe abm xsave avx512f pku aes sha_ni svm rdrand fsgsbase";
        assert!(never.split(' ').all(|name| !v2.contains(name)), "{v2:?}");
        assert!(!has(&v3, "svm") && !has(&v3, "pku") && !has(&v3, "avx512f"), "{v3:?}");
        // What Linux derives from other leaves, or finds out by itself, is not ours to say.
        assert!(
            v2.is_subset(&host) && v3.is_subset(&host),
            "{:?} {:?}",
            v2.difference(&host),
            v3.difference(&host)
        );
        Ok(())
    }

    #[test]
    fn a_snapshot_of_a_better_processor_is_refused_by_the_names_of_what_is_missing() -> Result<()> {
        let (Place::Lab(lab), Some(_)) = (Place::choose(Needs::Hardware)?, local_kvm()) else {
            eprintln!("left out: there are no two processors here");
            return Ok(());
        };
        let here = Machines::new(env!("CARGO_BIN_EXE_vmm"))?;
        here.ok("run --detach --name web IDLE")?;
        here.ok("snapshot web --to saved")?;
        let there = PlacedMachines::new(&Place::Lab(lab.clone()))?;
        for file in ["manifest.json", "state", "memory"] {
            let file = format!("saved/{file}");
            lab.put(&here.dir().join(&file), &there.files().path(&file))?;
        }
        let seen = Snapshot::open(&here.dir().join("saved"))?.cpu_features();
        let said = there.refused("restore saved --name web", 1)?;
        let missing = said.split_once("this host lacks: ").and_then(|(_, rest)| rest.split_once(';'));
        let (missing, _) = missing.context(said.clone())?;
        for name in missing.split(", ") {
            assert!(seen.contains(&name), "{name} of {missing} is not in {seen:?}");
        }
        there.ok("restore saved --name web --detach --force")?;
        let row = there.ok("ps --format json")?;
        assert!(row.contains(r#""state": "running""#), "{row}");
        Ok(())
    }
}

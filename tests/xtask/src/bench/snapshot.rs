//! How long a machine stands still while it is saved, and what that takes on the disk.

use anyhow::Result;

use super::answering::{self, Parent, SIZES};
use super::measure::{median_of, p95_of};
use super::qemu_file::Migrating;
use super::table::Table;

/// Saves each machine `runs` times, in turn.
pub fn run(runs: usize) -> Result<Table> {
    let mut table = Table::new(
        format!("snapshot: a machine of 1 vCPU is saved, and goes on; medians of {runs}"),
        ["paused ms", "p95 ms", "in all ms", "MiB on disk"],
    );
    for (memory, filled) in SIZES {
        let plain = Parent::boot(memory, filled, "")?;
        let tracked = Parent::boot(memory, filled, "--track-dirty")?;
        let mut theirs = Migrating::boot(memory, filled)?;
        let (base, to) = (tracked.path("base"), tracked.path("to"));
        let (mut full, mut diff, mut file) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..=runs {
            let at = plain.path("to");
            let times = plain.save(&at, "full")?;
            let our = [&times[..], &[answering::on_disk(&at)?]].concat();
            // A diff to the snapshot before it, with what the guest did for one answer.
            tracked.save(&base, "full")?;
            answering::answered(&tracked.path("v"))?;
            let times = tracked.save(&to, "diff")?;
            let our_diff = [&times[..], &[answering::on_disk(&to)?]].concat();
            std::fs::remove_dir_all(&to)?;
            let their = theirs.save()?;
            if round > 0 {
                full.push(our);
                diff.push(our_diff);
                file.push(their);
            }
        }
        for (name, values) in [("full", &full), ("diff", &diff), ("QEMU migrate", &file)] {
            let (middle, high) = (median_of(values), p95_of(values));
            table.row(&format!("{memory} MiB  {name}"), &[middle[0], high[0], middle[1], middle[2]]);
        }
    }
    table.notes.push("a guest of 128 MiB has 32 MiB of random bytes in a tmpfs, one of 1 GiB has 256 MiB; it is asked once between a full snapshot and its diff".into());
    table.notes.push("paused, of QEMU: the downtime that it reports, in whole ms; both write most of the memory before, while the guest runs".into());
    Ok(table)
}

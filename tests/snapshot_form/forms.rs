//! No saved type changes without a new version.

use std::path::Path;

use anyhow::Result;
use vmm_core::devices::shape::Shapes;
use vmm_core::devices::snapshot::{Saved, to_value};
use vmm_core::snapshot::manifest;
use vmm_core::{Snapshot, SnapshotKind};

use crate::GOLDEN;
use crate::host::{Host, TRANSPORTS};

#[test]
fn no_saved_type_changes_without_its_version() -> Result<()> {
    let mut shapes = Shapes::default();
    for transport in TRANSPORTS {
        let host = Host::new()?;
        let vm = host.machine(transport)?;
        vm.snapshot(&host.path("full"), SnapshotKind::Full)?;
        vm.snapshot(&host.path("diff"), SnapshotKind::Diff)?;
        let snapshot = Snapshot::open(&host.path("diff"))?;
        for section in snapshot.sections().iter() {
            shapes.add(&format!("{} on {transport}", section.name), &section.saved);
        }
        let saved = Saved { version: manifest::FORMAT as u16, value: to_value(snapshot.manifest())? };
        shapes.add(&format!("manifest on {transport}"), &saved);
    }
    shapes.assert_kept(&Path::new(GOLDEN).join("forms.txt"));
    Ok(())
}

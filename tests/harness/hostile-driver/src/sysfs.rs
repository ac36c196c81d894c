//! Virtio devices as Linux shows them: where they are, and whose they are.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

const DEVICES: &str = "/sys/bus/virtio/devices";

/// One device.
pub struct Device {
    /// Linux's name, such as `virtio0`.
    pub name: String,
    /// Virtio device ID.
    pub id: u32,
    /// What it is attached to: a PCI function or a platform device.
    pub parent: PathBuf,
}

/// All devices, in Linux's order.
pub fn devices() -> Result<Vec<Device>> {
    let entries = fs::read_dir(DEVICES).context(DEVICES)?;
    let mut devices = entries.map(|entry| device(&entry?.path())).collect::<Result<Vec<_>>>()?;
    devices.sort_by_key(|device| (device.name.len(), device.name.clone()));
    Ok(devices)
}

fn device(link: &Path) -> Result<Device> {
    let name = file_name(link);
    let id = fs::read_to_string(link.join("device")).with_context(|| name.clone())?;
    let id = u32::from_str_radix(id.trim().trim_start_matches("0x"), 16).context("a device ID")?;
    let path = fs::canonicalize(link)?;
    Ok(Device { name, id, parent: path.parent().context("a parent")?.to_owned() })
}

impl Device {
    /// Takes the device away from its driver, whose path is returned. There may be none.
    pub fn unbind(&self) -> Result<Option<PathBuf>> {
        let Ok(driver) = fs::canonicalize(Path::new(DEVICES).join(&self.name).join("driver")) else {
            return Ok(None);
        };
        fs::write(driver.join("unbind"), &self.name).with_context(|| format!("unbind {}", self.name))?;
        Ok(Some(driver))
    }

    /// Gives the device to the driver at this path, which must accept it.
    pub fn bind(&self, driver: &Path) -> Result<()> {
        fs::write(driver.join("bind"), &self.name)
            .with_context(|| format!("{} does not work for {}", self.name, driver.display()))
    }

    /// Whether it is on a PCI bus.
    pub fn is_pci(&self) -> bool {
        self.parent.join("config").exists()
    }

    /// The physical address of its registers: BAR 0 on PCI.
    pub fn address(&self) -> Result<u64> {
        let start = if self.is_pci() {
            let resources = fs::read_to_string(self.parent.join("resource")).context("BARs")?;
            resources.split_whitespace().next().context("a BAR")?.trim_start_matches("0x").to_owned()
        } else {
            let name = file_name(&self.parent);
            let map = fs::read_to_string("/proc/iomem").context("/proc/iomem")?;
            let line = map.lines().find(|line| line.split_whitespace().any(|word| word == name));
            let line = line.with_context(|| format!("/proc/iomem has no {name}"))?;
            line.trim().split('-').next().context("an address")?.to_owned()
        };
        Ok(u64::from_str_radix(&start, 16)?)
    }

    /// The physical address of a PCI function's configuration space, as the firmware's table has it (PCI Firmware
    /// 3.2 §4.1.2).
    pub fn configuration_address(&self) -> Result<u64> {
        const MCFG: &str = "/sys/firmware/acpi/tables/MCFG";
        let table = fs::read(MCFG).context(MCFG)?;
        let base = table.get(44..52).and_then(|base| base.try_into().ok()).context("an address")?;
        // Such as 0000:00:01.0.
        let name = file_name(&self.parent);
        let parts: Vec<u64> = name
            .split([':', '.'])
            .map(|part| u64::from_str_radix(part, 16))
            .collect::<Result<_, _>>()
            .context(name.clone())?;
        let [_, bus, device, function] = parts[..] else { bail!("'{name}' is no PCI function") };
        Ok(u64::from_le_bytes(base) + (bus << 20 | device << 15 | function << 12))
    }

    /// Whether `word` names it, or a disk of it.
    pub fn is(&self, word: &str) -> bool {
        let disk = fs::canonicalize(Path::new("/sys/block").join(word).join("device"));
        self.name == word || disk.is_ok_and(|disk| file_name(&disk) == self.name)
    }
}

/// First addresses of what /proc/iomem calls RAM, and the first behind it.
pub fn ram() -> Result<Vec<(u64, u64)>> {
    let map = fs::read_to_string("/proc/iomem").context("/proc/iomem")?;
    let ranges = map.lines().filter(|line| line.ends_with(": System RAM")).filter_map(|line| {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()? + 1))
    });
    Ok(ranges.collect())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

//! What a process has mapped, as /proc/PID/smaps tells it.

use anyhow::{Context, Result};

/// One mapping; sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// What is mapped, such as a path.
    pub name: String,
    /// Resident.
    pub rss: u64,
    /// Resident, each page divided by how many processes have it.
    pub pss: u64,
    /// Resident and nobody else's.
    pub anonymous: u64,
    /// In transparent huge pages.
    pub anonymous_huge: u64,
    /// Of a page.
    pub page: u64,
    /// Two letters each, as in proc(5).
    pub flags: Vec<String>,
}

impl Mapping {
    /// Bytes.
    pub fn size(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it has this flag.
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|have| have == flag)
    }
}

/// Reads the text of a smaps file.
pub fn parse(text: &str) -> Result<Vec<Mapping>> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some((first, rest)) = words.split_first() else { continue };
        let address = |text: &str| u64::from_str_radix(text, 16).ok();
        let range = first.split_once('-').map(|(start, end)| (address(start), address(end)));
        if let Some((Some(start), Some(end))) = range {
            let name = rest.get(4..).unwrap_or_default().join(" ");
            mappings.push(Mapping { start, end, name, ..Mapping::default() });
            continue;
        }
        let mapping = mappings.last_mut().context("smaps starts without a mapping")?;
        let bytes = || Ok::<u64, anyhow::Error>(rest.first().context("a value")?.parse::<u64>()? << 10);
        match *first {
            "Rss:" => mapping.rss = bytes()?,
            "Pss:" => mapping.pss = bytes()?,
            "Anonymous:" => mapping.anonymous = bytes()?,
            "AnonHugePages:" => mapping.anonymous_huge = bytes()?,
            "KernelPageSize:" => mapping.page = bytes()?,
            "VmFlags:" => mapping.flags = rest.iter().map(|&flag| flag.to_owned()).collect(),
            _ => {}
        }
    }
    Ok(mappings)
}

/// The run of adjacent mappings that is guest RAM: the only writable one of at least `bytes`. Advice on a part of it
/// splits it up.
pub fn ram(mappings: &[Mapping], bytes: u64) -> Result<&[Mapping]> {
    let size = |run: &&[Mapping]| run.iter().map(Mapping::size).sum::<u64>() >= bytes;
    let adjacent = |a: &Mapping, b: &Mapping| a.end == b.start && a.has("wr") == b.has("wr");
    let mut runs = mappings.chunk_by(adjacent).filter(|run| run[0].has("wr"));
    runs.find(size).context("no mapping is as large as guest RAM")
}

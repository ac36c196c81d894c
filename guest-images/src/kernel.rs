//! Guest kernels: two flavours of Debian's linux-source-6.12, built on this host and cached by their recipe.

mod compile;
mod recipe;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::cache::{self, CacheError, Shelf};
use crate::packages::PackageError;
use crate::progress::Progress;

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The compiler or the source is missing.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// A step of the build failed.
    #[error("cannot build the {flavour} kernel: {step} failed; {log} says why")]
    Step {
        /// Which kernel.
        flavour: Flavour,
        /// Which step.
        step: &'static str,
        /// All that the build said.
        log: PathBuf,
    },
    /// Options of the recipe that the kernel's configuration did not keep.
    #[error("cannot build the {flavour} kernel: these options did not survive: {options}")]
    OptionsLost {
        /// Which kernel.
        flavour: Flavour,
        /// The lost lines, separated by commas.
        options: String,
    },
    /// A file cannot be read or written.
    #[error("cannot use {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Which of the two kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// For KVM with VMX or SVM behind it: up to 32 CPUs, 32-bit programs, all of a kernel's defences.
    Standard,
    /// For KVM that emulates privileged code: runs at CPL 3 (docs/guest-images.md says how, and what it cannot do).
    Ring3,
}

impl Flavour {
    /// The flavour that runs on this host: ring-3 when no CPU offers `vmx` or `svm`.
    #[must_use]
    pub fn for_host() -> Self {
        Self::for_cpuinfo(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
    }

    fn for_cpuinfo(cpuinfo: &str) -> Self {
        let mut flags = cpuinfo.lines().filter(|line| line.starts_with("flags"));
        if flags.any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm")) {
            Self::Standard
        } else {
            Self::Ring3
        }
    }

    /// As in file names and messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Ring3 => "ring3",
        }
    }
}

impl std::fmt::Display for Flavour {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.name())
    }
}

/// A built kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artefacts {
    /// The ELF image, stripped: 64-bit Linux boot and PVH.
    pub vmlinux: PathBuf,
    /// The compressed image; the ring-3 flavour has none (its decompression would be emulated).
    pub bzimage: Option<PathBuf>,
    /// Addresses and names of the kernel's symbols.
    pub system_map: PathBuf,
}

impl Artefacts {
    fn in_directory(flavour: Flavour, directory: &Path) -> Self {
        Self {
            vmlinux: directory.join(compile::VMLINUX),
            bzimage: (flavour == Flavour::Standard).then(|| directory.join(compile::BZIMAGE)),
            system_map: directory.join(compile::SYSTEM_MAP),
        }
    }
}

/// The kernel, if it is in the cache: then [`build_or_cached`] returns it at once.
#[must_use]
pub fn cached(flavour: Flavour) -> Option<Artefacts> {
    cached_in(&cache::directory().ok()?, flavour)
}

fn cached_in(base: &Path, flavour: Flavour) -> Option<Artefacts> {
    let entry = base.join(SHELF).join(entry_name(flavour, &recipe::of(flavour)));
    entry.exists().then(|| Artefacts::in_directory(flavour, &entry))
}

/// Where kernels are in the cache.
const SHELF: &str = "kernel";

fn entry_name(flavour: Flavour, recipe: &recipe::Recipe) -> String {
    format!("{flavour}-{}", recipe.hash())
}

/// The kernel from the cache, `kernel/<flavour>-<hash of the recipe>/`; built first when it is not there, which
/// takes minutes. Processes that want the same kernel wait for the one that builds it. An interrupted build
/// leaves no kernel, and its files go with the next build.
///
/// # Errors
/// No cache directory, packages missing, or a build that fails.
pub fn build_or_cached(flavour: Flavour, progress: &mut dyn Progress) -> Result<Artefacts, KernelError> {
    build_or_cached_in(&cache::directory()?, flavour, progress)
}

/// As [`build_or_cached`], in the cache at `base`.
///
/// # Errors
/// As [`build_or_cached`].
pub fn build_or_cached_in(
    base: &Path,
    flavour: Flavour,
    progress: &mut dyn Progress,
) -> Result<Artefacts, KernelError> {
    let shelf = Shelf::open(base, SHELF)?;
    let recipe = recipe::of(flavour);
    let name = entry_name(flavour, &recipe);
    let entry = shelf.entry(&name);
    if !entry.exists() {
        let lock = shelf.lock(&name)?;
        // Somebody else may have built it while we waited for the lock.
        if !entry.exists() {
            let workspace = shelf.workspace(&name, &lock)?;
            let log = shelf.entry(&format!("{name}.log"));
            let built = compile::compile(&recipe, workspace.path(), &log, progress);
            progress.finish();
            shelf.publish(&built?, &name, &lock)?;
        }
    }
    Ok(Artefacts::in_directory(flavour, &entry))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flavour_follows_the_flags() {
        let cpuinfo =
            |flags| format!("processor\t: 0\nvendor_id\t: X\nflags\t\t: fpu {flags} sse2\nbugs\t: vmx\n");
        assert_eq!(Flavour::for_cpuinfo(&cpuinfo("vmx")), Flavour::Standard);
        assert_eq!(Flavour::for_cpuinfo(&cpuinfo("svm")), Flavour::Standard);
        assert_eq!(Flavour::for_cpuinfo(&cpuinfo("vmxnet svm_lock")), Flavour::Ring3);
        assert_eq!(Flavour::for_cpuinfo(""), Flavour::Ring3);
    }

    #[test]
    fn a_cached_kernel_is_not_built_again() {
        let base = tempfile::tempdir().unwrap();
        for flavour in [Flavour::Standard, Flavour::Ring3] {
            assert_eq!(cached_in(base.path(), flavour), None);
            let entry = base.path().join(SHELF).join(entry_name(flavour, &recipe::of(flavour)));
            fs::create_dir_all(&entry).unwrap();
            fs::write(entry.join("vmlinux"), "kernel").unwrap();
            let artefacts = build_or_cached_in(base.path(), flavour, &mut NoSteps).unwrap();
            assert_eq!(cached_in(base.path(), flavour).as_ref(), Some(&artefacts));
            assert_eq!(fs::read(&artefacts.vmlinux).unwrap(), b"kernel");
            assert_eq!(artefacts.bzimage.is_some(), flavour == Flavour::Standard);
        }
    }

    /// Progress of something that must not do anything.
    struct NoSteps;

    impl Progress for NoSteps {
        fn step(&mut self, what: &str, _: Option<u64>) {
            panic!("a cached kernel needs no step, and this one began: {what}");
        }
        fn advance(&mut self, _: u64, _: &str) {}
        fn finish(&mut self) {}
    }
}

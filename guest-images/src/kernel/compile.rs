//! The steps from Debian's source package to a kernel.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::recipe::Recipe;
use super::{Artefacts, KernelError};
use crate::packages::{self, Need};
use crate::progress::Progress;

/// Names in a cache entry.
pub(super) const VMLINUX: &str = "vmlinux";
pub(super) const BZIMAGE: &str = "bzImage";
pub(super) const SYSTEM_MAP: &str = "System.map";

/// Debian's package linux-source-6.12 puts the source here.
const SOURCE: &str = "/usr/src/linux-source-6.12.tar.xz";
const NEEDS: [Need; 13] = [
    Need { probe: SOURCE, package: "linux-source-6.12" },
    Need { probe: "tar", package: "tar" },
    Need { probe: "xz", package: "xz-utils" },
    Need { probe: "patch", package: "patch" },
    Need { probe: "make", package: "make" },
    Need { probe: "gcc", package: "gcc" },
    Need { probe: "/usr/include/stdio.h", package: "libc6-dev" },
    Need { probe: "ld", package: "binutils" },
    Need { probe: "flex", package: "flex" },
    Need { probe: "bison", package: "bison" },
    Need { probe: "bc", package: "bc" },
    Need { probe: "lz4", package: "lz4" },
    // objtool reads object files with it.
    Need { probe: "/usr/include/gelf.h", package: "libelf-dev" },
];

/// The same recipe makes the same bytes, whoever builds it and when.
const REPRODUCIBLE: [(&str, &str); 4] = [
    ("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970"),
    ("KBUILD_BUILD_USER", "vmm"),
    ("KBUILD_BUILD_HOST", "vmm"),
    ("KBUILD_BUILD_VERSION", "1"),
];

struct Build<'a> {
    recipe: &'a Recipe,
    log: &'a Path,
    source: PathBuf,
    progress: &'a mut dyn Progress,
}

/// Builds the kernel in `workspace` and returns the directory that is to be its cache entry. Everything that the
/// tools say goes to `log`, which is removed again when all went well.
pub(super) fn compile(
    recipe: &Recipe,
    workspace: &Path,
    log: &Path,
    progress: &mut dyn Progress,
) -> Result<PathBuf, KernelError> {
    packages::provide(&NEEDS, progress)?;
    File::create(log).map_err(|source| file_error(log, source))?;
    let source = workspace.join("linux-source-6.12");
    let mut build = Build { recipe, log, source, progress };
    build.unpack(workspace)?;
    build.configure()?;
    build.make()?;
    let entry = build.collect(workspace)?;
    // It says nothing of interest now.
    let _ = fs::remove_file(log);
    Ok(entry)
}

impl Build<'_> {
    fn unpack(&mut self, workspace: &Path) -> Result<(), KernelError> {
        self.progress.step("unpacking the kernel source", None);
        self.run("unpacking", Command::new("tar").args(["-xJf", SOURCE, "-C"]).arg(workspace))?;
        if let Some(patch) = self.recipe.patch {
            let path = workspace.join("patch");
            fs::write(&path, patch).map_err(|source| file_error(&path, source))?;
            self.run(
                "patching",
                Command::new("patch").args(["-p1", "--fuzz=0", "-i"]).arg(path).current_dir(&self.source),
            )?;
        }
        Ok(())
    }

    /// All options off, but those of the recipe; and an error when one of these is not as asked for.
    fn configure(&mut self) -> Result<(), KernelError> {
        self.progress.step("configuring the kernel", None);
        let fragment = self.source.join("vmm.config");
        fs::write(&fragment, self.recipe.fragment()).map_err(|source| file_error(&fragment, source))?;
        self.run("configuring", self.kbuild().arg("allnoconfig").env("KCONFIG_ALLCONFIG", &fragment))?;
        let path = self.source.join(".config");
        let config = fs::read_to_string(&path).map_err(|source| file_error(&path, source))?;
        let lost = self.recipe.lost_options(&config);
        if lost.is_empty() {
            return Ok(());
        }
        Err(KernelError::OptionsLost { flavour: self.recipe.flavour, options: lost.join(", ") })
    }

    /// Compiles, and counts what make says it makes: a line such as `  CC      kernel/fork.o`.
    fn make(&mut self) -> Result<(), KernelError> {
        let what = format!("compiling the {} kernel", self.recipe.flavour);
        self.progress.step(&what, Some(self.recipe.objects));
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let mut command = self.kbuild();
        command
            .arg(format!("-j{jobs}"))
            .args(self.recipe.targets)
            .stdout(Stdio::piped())
            .stderr(self.log_file()?);
        let failed = || self.failed("compiling");
        let mut child = command.spawn().map_err(|_| failed())?;
        let mut log = self.log_file()?;
        let mut count = 0;
        for line in child.stdout.take().into_iter().flat_map(|output| BufReader::new(output).lines()) {
            let Ok(line) = line else { break };
            // A full disk shows in make's own failure.
            let _ = writeln!(log, "{line}");
            if let [_, file] = line.split_whitespace().collect::<Vec<_>>()[..] {
                count += 1;
                self.progress.advance(count, file);
            }
        }
        match child.wait() {
            Ok(status) if status.success() => Ok(()),
            _ => Err(self.failed("compiling")),
        }
    }

    /// Gathers what is worth keeping.
    fn collect(&mut self, workspace: &Path) -> Result<PathBuf, KernelError> {
        let entry = workspace.join("entry");
        fs::create_dir(&entry).map_err(|source| file_error(&entry, source))?;
        let artefacts = Artefacts::in_directory(self.recipe.flavour, &entry);
        let mut strip = Command::new("strip");
        self.run(
            "stripping",
            strip.arg("--strip-all").arg("-o").arg(&artefacts.vmlinux).arg(self.source.join(VMLINUX)),
        )?;
        let mut copies = vec![(SYSTEM_MAP, artefacts.system_map), (".config", entry.join("config"))];
        copies.extend(artefacts.bzimage.map(|target| ("arch/x86/boot/bzImage", target)));
        for (from, to) in copies {
            fs::copy(self.source.join(from), &to).map_err(|source| file_error(&to, source))?;
        }
        Ok(entry)
    }

    fn kbuild(&self) -> Command {
        let mut make = Command::new("make");
        make.arg("ARCH=x86_64")
            .current_dir(&self.source)
            .envs(REPRODUCIBLE)
            .env("LC_ALL", "C")
            .stdin(Stdio::null());
        // An outer make must not lend us its job server, nor a host's settings its flags.
        for name in ["MAKEFLAGS", "MAKELEVEL", "MFLAGS", "CFLAGS", "KCFLAGS", "LDFLAGS", "LOCALVERSION"] {
            make.env_remove(name);
        }
        make
    }

    fn run(&self, step: &'static str, command: &mut Command) -> Result<(), KernelError> {
        command.stdin(Stdio::null()).stdout(self.log_file()?).stderr(self.log_file()?);
        match command.status() {
            Ok(status) if status.success() => Ok(()),
            _ => Err(self.failed(step)),
        }
    }

    fn failed(&self, step: &'static str) -> KernelError {
        KernelError::Step { flavour: self.recipe.flavour, step, log: self.log.to_owned() }
    }

    fn log_file(&self) -> Result<File, KernelError> {
        File::options().append(true).open(self.log).map_err(|source| file_error(self.log, source))
    }
}

fn file_error(path: &Path, source: std::io::Error) -> KernelError {
    KernelError::File { path: path.to_owned(), source }
}

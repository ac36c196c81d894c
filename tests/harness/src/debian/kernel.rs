//! Debian's stock cloud kernel 6.12, downloaded and unpacked, never installed: the lab host runs on it, and it is the
//! "any distribution's kernel" that guests boot.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{cache, command, packages};

/// An unpacked kernel package.
#[derive(Clone, Debug)]
pub struct DebianKernel {
    /// The compressed kernel image (bzImage).
    pub vmlinuz: PathBuf,
    /// Release as `uname -r` prints it.
    pub release: String,
    /// The directory that holds `lib/modules`.
    root: PathBuf,
}

impl DebianKernel {
    /// The newest signed 6.12 cloud kernel that apt offers.
    pub fn prepare() -> Result<Self> {
        packages::ensure(&["xz-utils", "kmod"])?;
        let metas = ["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"];
        let version = packages::newest(&metas, "linux-image-6.12.")?;
        let release = version.package.trim_start_matches("linux-image-").to_owned();
        let recipe = format!("{} {} format 1", version.package, version.version);
        let root = cache::build_once("debian-kernel", &recipe, |dir| {
            eprintln!("unpacking {} {}", version.package, version.version);
            packages::unpack(&version, dir)?;
            let depmod = packages::find_program("depmod")?;
            command::run(Command::new(depmod).arg("-b").arg(dir).arg(&release))
        })?;
        Ok(Self { vmlinuz: root.join(format!("boot/vmlinuz-{release}")), release, root })
    }

    /// Unpacks these modules and all that they need below `into/lib/modules/…`, and returns their paths there, as seen
    /// from `into`, in an order in which they can be loaded. What the kernel has built in is left out.
    pub fn install_modules(&self, names: &[&str], into: &Path) -> Result<Vec<String>> {
        let dir = format!("lib/modules/{}", self.release);
        let dependencies = fs::read_to_string(self.root.join(&dir).join("modules.dep"))?;
        let builtin = fs::read_to_string(self.root.join(&dir).join("modules.builtin"))?;
        let mut order =
            Order { lines: dependencies.lines().collect(), seen: HashSet::new(), paths: Vec::new() };
        for name in names {
            if let Some(path) = order.find(name) {
                order.add(path);
                continue;
            }
            let built_in = builtin.lines().any(|path| module_name(path) == name.replace('-', "_"));
            ensure!(built_in, "Debian's kernel {} has no module '{name}'", self.release);
        }
        let paths = order.paths;
        paths.into_iter().map(|path| self.install_module(&dir, path, into)).collect()
    }

    fn install_module(&self, dir: &str, path: &str, into: &Path) -> Result<String> {
        let target = format!("/{dir}/{}", path.trim_end_matches(".xz"));
        let file = into.join(&target[1..]);
        fs::create_dir_all(file.parent().context("module without a directory")?)?;
        let mut xz = Command::new("xz");
        xz.arg("-dc").arg(self.root.join(dir).join(path)).stdout(File::create(&file)?);
        command::run(&mut xz)?;
        Ok(target)
    }
}

/// `kernel/net/foo-bar.ko.xz` is the module `foo_bar`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// Collects modules so that each comes after those which it needs.
struct Order<'a> {
    /// Of modules.dep: `PATH: PATH PATH…`.
    lines: Vec<&'a str>,
    seen: HashSet<&'a str>,
    paths: Vec<&'a str>,
}

impl<'a> Order<'a> {
    fn find(&self, name: &str) -> Option<&'a str> {
        let name = name.replace('-', "_");
        self.lines
            .iter()
            .filter_map(|line| line.split_once(':'))
            .find_map(|(path, _)| (module_name(path) == name).then_some(path))
    }

    fn add(&mut self, path: &'a str) {
        if !self.seen.insert(path) {
            return;
        }
        let needed = self.lines.iter().filter_map(|line| line.split_once(':')).find(|(of, _)| *of == path);
        for other in needed.map(|(_, needed)| needed).unwrap_or_default().split_whitespace() {
            self.add(other);
        }
        self.paths.push(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let lines = vec!["k/a-b.ko.xz: k/c.ko.xz k/d.ko.xz", "k/c.ko.xz: k/d.ko.xz", "k/d.ko.xz:"];
        let mut order = Order { lines, seen: HashSet::new(), paths: Vec::new() };
        let path = order.find("a_b").unwrap();
        order.add(path);
        assert_eq!(order.paths, ["k/d.ko.xz", "k/c.ko.xz", "k/a-b.ko.xz"]);
        assert!(order.find("b").is_none());
    }
}

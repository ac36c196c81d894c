//! Root file systems: any directory as an ext4 image, and the project's own small one (BusyBox, our init, a
//! shell without login).

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cache::{self, CacheError, Shelf};
pub use crate::ext4::{DEFAULT_UUID, Ext4Error, Options as Ext4Options, build as build_ext4};
use crate::packages::{self, Need, PackageError};
use crate::progress::Progress;

/// Why there is no root file system.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// The cache cannot be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The image cannot be built.
    #[error(transparent)]
    Image(#[from] Ext4Error),
    /// A tool is missing.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// No BusyBox to be had.
    #[error("no static busybox: {0}; install one with `sudo apt-get install busybox-static`")]
    NoBusybox(String),
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

/// Files of the image besides BusyBox and init: path, permissions, content. Part of the recipe's hash.
const FILES: &[(&str, u32, &str)] = &[
    ("etc/passwd", 0o644, "root::0:0:root:/root:/bin/sh\nnobody:*:65534:65534:nobody:/:/bin/false\n"),
    ("etc/group", 0o644, "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    ("etc/hostname", 0o644, "vmm\n"),
    // What a clone is given is bound over it where the root is read-only.
    ("etc/machine-id", 0o444, ""),
    ("etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 vmm\n"),
    ("etc/os-release", 0o644, "NAME=\"vmm demo guest\"\nID=vmm-demo\nPRETTY_NAME=\"vmm demo guest\"\n"),
    ("etc/nsswitch.conf", 0o644, "hosts: files dns\n"),
    ("etc/profile", 0o644, "PS1='\\u@\\h:\\w\\$ '\nexport PS1\n[ -f /etc/motd ] && cat /etc/motd\n"),
    (
        "etc/motd",
        0o644,
        "\nThis is a guest with a kernel of its own. `poweroff` (or leaving this shell) ends it.\n\n",
    ),
];

/// Directories: path and permissions.
const DIRECTORIES: &[(&str, u32)] = &[
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sbin", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("usr/bin", 0o755),
    ("usr/sbin", 0o755),
    ("var/tmp", 0o1777),
];

/// Raised when the code below makes another image of the same parts.
const LAYOUT: &[u8] = b"2";
const IMAGE_SIZE: u64 = 128 << 20;

/// The demo image's path in the cache, built first when it is not there. Guests must not write to it: give them
/// a copy, or the image read-only.
///
/// # Errors
/// No cache, no BusyBox, or no e2fsprogs.
pub fn demo(progress: &mut dyn Progress) -> Result<PathBuf, RootfsError> {
    demo_in(&cache::directory()?, progress)
}

/// As [`demo`], in the cache at `base`.
///
/// # Errors
/// As [`demo`].
pub fn demo_in(base: &Path, progress: &mut dyn Progress) -> Result<PathBuf, RootfsError> {
    let busybox_path = busybox(base, progress)?;
    let busybox = read(&busybox_path)?;
    let mut parts: Vec<&[u8]> = vec![LAYOUT, crate::INIT, &busybox];
    parts.extend(FILES.iter().flat_map(|(path, _, content)| [path.as_bytes(), content.as_bytes()]));
    parts.extend(DIRECTORIES.iter().map(|(path, _)| path.as_bytes()));
    let name = format!("demo-{}.ext4", cache::hash(parts));

    let shelf = Shelf::open(base, "rootfs")?;
    let entry = shelf.entry(&name);
    if entry.exists() {
        return Ok(entry);
    }
    let lock = shelf.lock(&name)?;
    if entry.exists() {
        return Ok(entry);
    }
    progress.step("building the demo root file system", None);
    let workspace = shelf.workspace(&name, &lock)?;
    let tree = workspace.path().join("tree");
    plant(&tree, &busybox_path)?;
    let image = workspace.path().join("image");
    // Guests get copies that die with them, so a journal would only cost time at boot.
    let options = Ext4Options { size: Some(IMAGE_SIZE), journal: false, ..Ext4Options::default() };
    build_ext4(&tree, &image, &options)?;
    let published = shelf.publish(&image, &name, &lock)?;
    progress.finish();
    Ok(published)
}

/// Lays the demo image's files out below `tree`, which is made: for images that have more than the demo.
///
/// # Errors
/// As [`demo`].
pub fn demo_tree(tree: &Path, progress: &mut dyn Progress) -> Result<(), RootfsError> {
    plant(tree, &busybox(&cache::directory()?, progress)?)
}

/// Lays the demo's files out below `tree`, which is made.
fn plant(tree: &Path, busybox: &Path) -> Result<(), RootfsError> {
    let set_mode = |path: &Path, mode| {
        fs::set_permissions(path, Permissions::from_mode(mode)).map_err(|source| file_error(path, source))
    };
    for (path, mode) in DIRECTORIES {
        let path = tree.join(path);
        fs::create_dir_all(&path).map_err(|source| file_error(&path, source))?;
        set_mode(&path, *mode)?;
    }
    set_mode(tree, 0o755)?;
    let write = |path: &str, mode, content: &[u8]| {
        let path = tree.join(path);
        fs::write(&path, content).map_err(|source| file_error(&path, source))?;
        set_mode(&path, mode)
    };
    for (path, mode, content) in FILES {
        write(path, *mode, content.as_bytes())?;
    }
    // Name servers are what the kernel was told, on its command line or by DHCP.
    let names = tree.join("etc/resolv.conf");
    symlink("/proc/net/pnp", &names).map_err(|source| file_error(&names, source))?;
    write("bin/busybox", 0o755, &read(busybox)?)?;
    write("sbin/init", 0o755, crate::INIT)?;
    for applet in applets(busybox)? {
        let link = tree.join(&applet);
        // BusyBox's own name, and init, which is ours.
        if link.exists() {
            continue;
        }
        if let Some(directory) = link.parent() {
            fs::create_dir_all(directory).map_err(|source| file_error(directory, source))?;
        }
        symlink("/bin/busybox", &link).map_err(|source| file_error(&link, source))?;
    }
    Ok(())
}

/// Where BusyBox wants its links, without the leading slash.
fn applets(busybox: &Path) -> Result<Vec<String>, RootfsError> {
    let output = Command::new(busybox).arg("--list-full").stdin(Stdio::null()).output();
    let output = output.map_err(|source| file_error(busybox, source))?;
    let list = String::from_utf8_lossy(&output.stdout).into_owned();
    let safe =
        |path: &&str| !path.is_empty() && !path.starts_with('/') && !path.split('/').any(|part| part == "..");
    Ok(list.lines().filter(safe).map(str::to_owned).collect())
}

/// The host's static BusyBox, or Debian's, fetched into the cache without installing it.
fn busybox(base: &Path, progress: &mut dyn Progress) -> Result<PathBuf, RootfsError> {
    if let Some(found) = packages::find("busybox").filter(|path| is_static(path)) {
        return Ok(found);
    }
    const NAME: &str = "busybox";
    let shelf = Shelf::open(base, "tools")?;
    let entry = shelf.entry(NAME);
    if entry.exists() {
        return Ok(entry);
    }
    let needs = [Need { probe: "apt-get", package: "apt" }, Need { probe: "dpkg-deb", package: "dpkg" }];
    packages::provide(&needs, progress)?;
    let lock = shelf.lock(NAME)?;
    if entry.exists() {
        return Ok(entry);
    }
    progress.step("fetching busybox-static", None);
    let workspace = shelf.workspace(NAME, &lock)?;
    let run = |program: &str, arguments: &[&str]| {
        let output =
            Command::new(program).args(arguments).current_dir(workspace.path()).stdin(Stdio::null()).output();
        match output {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(RootfsError::NoBusybox(last_line(&output.stderr))),
            Err(error) => Err(RootfsError::NoBusybox(error.to_string())),
        }
    };
    run("apt-get", &["download", "-qq", "busybox-static"])?;
    let package = fs::read_dir(workspace.path())
        .map_err(|source| file_error(workspace.path(), source))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| RootfsError::NoBusybox("apt-get has downloaded nothing".to_owned()))?;
    run("dpkg-deb", &["-x", &package.to_string_lossy(), "tree"])?;
    let unpacked = ["tree/bin/busybox", "tree/usr/bin/busybox"].map(|path| workspace.path().join(path));
    let found = unpacked.iter().find(|path| is_static(path));
    let found = found.ok_or_else(|| RootfsError::NoBusybox("the package has none".to_owned()))?;
    let published = shelf.publish(found, NAME, &lock)?;
    Ok(published)
}

fn last_line(text: &[u8]) -> String {
    String::from_utf8_lossy(text).trim().lines().next_back().unwrap_or("no reason given").to_owned()
}

/// Whether a file is an ELF program that names no interpreter (its path would end in `ld-linux-x86-64.so.2`).
fn is_static(path: &Path) -> bool {
    const INTERPRETER: &[u8] = b"/ld-linux";
    /// PT_INTERP's string stands right behind the headers.
    const BEGINNING: usize = 4096;
    fs::read(path).is_ok_and(|file| {
        let beginning = &file[..file.len().min(BEGINNING)];
        beginning.starts_with(b"\x7fELF")
            && !beginning.windows(INTERPRETER.len()).any(|part| part == INTERPRETER)
    })
}

fn read(path: &Path) -> Result<Vec<u8>, RootfsError> {
    fs::read(path).map_err(|source| file_error(path, source))
}

fn file_error(path: &Path, source: io::Error) -> RootfsError {
    RootfsError::File { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn output(program: &str, arguments: &[&str]) -> String {
        let output = Command::new(packages::find(program).unwrap()).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn the_demo_image_is_built_once() {
        let base = tempfile::tempdir().unwrap();
        let image = demo_in(base.path(), &mut ()).unwrap();
        let before = image.metadata().unwrap();
        output("e2fsck", &["-fn", image.to_str().unwrap()]);
        let sbin = output("debugfs", &["-R", "ls -l /sbin", image.to_str().unwrap()]);
        let init = sbin.lines().find(|line| line.ends_with(" init")).unwrap();
        assert!(init.contains("100755") && init.contains(&crate::INIT.len().to_string()), "{init}");
        assert!(
            output("debugfs", &["-R", "stat /bin/sh", image.to_str().unwrap()]).contains("\"/bin/busybox\"")
        );

        assert_eq!(demo_in(base.path(), &mut ()).unwrap(), image);
        let after = image.metadata().unwrap();
        assert_eq!((before.ino(), before.mtime_nsec()), (after.ino(), after.mtime_nsec()));
    }

    #[test]
    fn static_programs_are_told_from_others() {
        let directory = tempfile::tempdir().unwrap();
        let init = directory.path().join("init");
        fs::write(&init, crate::INIT).unwrap();
        assert!(is_static(&init));
        assert!(!is_static(&std::env::current_exe().unwrap()));
        fs::write(&init, "#!/bin/sh\n").unwrap();
        assert!(!is_static(&init));
    }
}

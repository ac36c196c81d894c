//! Finds the running lab, or starts one.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab_agent::{ID_PARAMETER, IDLE_PARAMETER, PORT, READY};

use super::image::{self, Image};
use super::{IDLE, Lab};
use crate::{cache, command, packages};

/// The lab host's memory in MiB, taken from this machine only as it is used.
const MEMORY: u32 = 4096;
/// Size of the file system at /scratch, nearly all of it holes.
const SCRATCH: &str = "32G";
/// Ends the wait for a lab that does not come up; it takes 3 to 6 s on an idle machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// The lab that runs already, or a new one.
pub fn running_or_new() -> Result<Lab> {
    let dir = cache::directory()?.join("lab/run").join(sources());
    let _lock = cache::Lock::take(&dir.join("lock"))?;
    let state = dir.join("name");
    if let Ok(name) = fs::read_to_string(&state) {
        let lab = Lab::from_name(name.trim())?;
        if lab.hold().is_ok() {
            return Ok(lab);
        }
        fs::remove_file(&state)?;
    }
    let lab = start(&image::prepare()?, &dir)?;
    fs::write(&state, lab.name())?;
    Ok(lab)
}

/// Stands for the sources of agent and image: a lab which other sources have made is not ours.
fn sources() -> String {
    cache::hash(concat!(
        include_str!("image.rs"),
        include_str!("start.rs"),
        include_str!("../../agent/src/lib.rs"),
        include_str!("../../agent/src/sparse.rs"),
        include_str!("../../agent/src/main.rs"),
        include_str!("../../agent/src/host.rs"),
        include_str!("../../agent/src/serve.rs"),
        include_str!("../../agent/src/exec.rs"),
        include_str!("../../agent/src/files.rs"),
    ))
}

fn start(image: &Image, dir: &Path) -> Result<Lab> {
    let began = Instant::now();
    let console = dir.join("console.log");
    let scratch = scratch(dir)?;
    // Another program may take the port between our look and QEMU's: then QEMU ends at once.
    for _ in 0..3 {
        let lab = Lab { address: free_address()?, id: random_id()? };
        let mut qemu = qemu(image, &lab, &scratch, &console)?;
        if wait_for_agent(&console, &mut qemu)? {
            lab.hold()?;
            // QEMU has it open; without a name nothing is left of it when QEMU ends.
            fs::remove_file(&scratch)?;
            eprintln!("started a lab host in {:.1} s", began.elapsed().as_secs_f32());
            return Ok(lab);
        }
    }
    let said = fs::read_to_string(&console).unwrap_or_default();
    bail!("the lab host ended as it started; its console, {}:\n{said}", console.display())
}

/// True when the agent listens, false when QEMU has ended. A connection made earlier would only be answered when QEMU's network
/// tries again, seconds later.
fn wait_for_agent(console: &Path, qemu: &mut Child) -> Result<bool> {
    let end = Instant::now() + DEADLINE;
    while Instant::now() < end {
        if qemu.try_wait()?.is_some() {
            return Ok(false);
        }
        if fs::read_to_string(console)?.contains(READY) {
            return Ok(true);
        }
        thread::sleep(Duration::from_millis(20));
    }
    qemu.kill()?;
    qemu.wait()?;
    bail!("the lab host did not answer within {} s", DEADLINE.as_secs())
}

fn qemu(image: &Image, lab: &Lab, scratch: &Path, console: &Path) -> Result<Child> {
    let log = File::create(console).with_context(|| format!("create {}", console.display()))?;
    let append = format!(
        "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on {ID_PARAMETER}{} {IDLE_PARAMETER}{}",
        lab.id,
        IDLE.as_secs()
    );
    // One CPU: KVM rewrites the host kernel's code when VMs come and go, and of two emulated CPUs one has been seen to
    // run into a half-written instruction (int3 in __schedule).
    let mut qemu =
        command::words("qemu-system-x86_64 -accel tcg -M q35 -cpu max -smp 1 -nodefaults -no-reboot");
    qemu.args(["-display", "none", "-serial", "stdio", "-m", &MEMORY.to_string()])
        .args(["-append", &append])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        .args(["-device", "virtio-blk-pci,drive=scratch", "-drive"])
        .arg(format!("if=none,id=scratch,format=raw,cache=unsafe,discard=unmap,file={}", scratch.display()))
        // The lab host reaches nothing; only the agent's port is led in, from this machine alone.
        .args(["-device", "virtio-net-pci,netdev=net", "-netdev"])
        .arg(format!("user,id=net,restrict=on,hostfwd=tcp:{}-10.0.2.15:{PORT}", lab.address))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // It outlives the test that started it.
        .process_group(0);
    qemu.spawn().context("cannot run qemu-system-x86_64")
}

/// An empty ext4 image for the lab host to keep files in.
fn scratch(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("scratch.img");
    let _ = fs::remove_file(&path);
    let mkfs = packages::find_program("mkfs.ext4")?;
    let options = ["-q", "-F", "-O", "^has_journal", "-m", "0", "-E", "lazy_itable_init=1,root_owner=0:0"];
    command::run(Command::new(mkfs).args(options).arg(&path).arg(SCRATCH))?;
    Ok(path)
}

fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

fn random_id() -> Result<String> {
    let mut bytes = [0; 8];
    std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut bytes)?;
    Ok(cache::hex(&bytes))
}

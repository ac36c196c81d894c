//! Boots a guest as a user would, with `vmm run`, wherever it can run.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::disk::Disk;
use crate::kernel::Kernel;
use crate::lab::Lab;
use crate::net::{GUEST_ADDRESS, HOST_ADDRESS, NetNs, TAP};
use crate::place::{Acceleration, Needs, Place};
use crate::process::{Exit, Process, Program, Signal};
use crate::smaps::{self, Mapping};
use crate::{binaries, report};

/// Only there to end a hang; stretched in the lab.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Names what is one of a kind in this process.
static COUNT: AtomicU32 = AtomicU32::new(0);
/// A variable in the environment of each VMM, by which it is found wherever it runs.
const MARK: &str = "VMM_TEST_GUEST";

/// A guest to boot. What is not said is `vmm run`'s default, but for the root file system: that is our demo image, read-only.
pub struct Guest<'a> {
    needs: Needs,
    kernel: Kernel,
    initrd: Option<PathBuf>,
    rootfs: Rootfs<'a>,
    images: Vec<(&'static str, &'a Disk, &'a str)>,
    net: Option<&'a NetNs>,
    within: Option<&'a NetNs>,
    append: Vec<String>,
    command: Option<String>,
    arguments: Vec<String>,
    prefix: Vec<String>,
    deadline: Duration,
}

enum Rootfs<'a> {
    Demo,
    None,
    Disk(&'a Disk),
    ReadOnly(PathBuf),
}

impl<'a> Guest<'a> {
    /// A guest with all defaults.
    #[expect(clippy::new_without_default, reason = "a guest to boot is nobody's default value")]
    pub fn new() -> Self {
        Self {
            needs: Needs::AnyKvm,
            kernel: Kernel::Default,
            initrd: None,
            rootfs: Rootfs::Demo,
            images: Vec::new(),
            net: None,
            within: None,
            append: Vec::new(),
            command: None,
            arguments: Vec::new(),
            prefix: Vec::new(),
            deadline: DEADLINE,
        }
    }

    /// What the test needs; a kernel or several CPUs that need hardware imply it.
    pub fn needs(mut self, needs: Needs) -> Self {
        self.needs = needs;
        self
    }

    /// What it boots.
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        if kernel.needs() == Needs::Hardware {
            self.needs = Needs::Hardware;
        }
        if matches!(kernel, Kernel::Micro(_)) && matches!(self.rootfs, Rootfs::Demo) {
            self.rootfs = Rootfs::None;
        }
        self.kernel = kernel;
        self
    }

    /// `--initrd`, and no root file system unless one is named.
    pub fn initrd(mut self, path: impl Into<PathBuf>) -> Self {
        self.initrd = Some(path.into());
        if matches!(self.rootfs, Rootfs::Demo) {
            self.rootfs = Rootfs::None;
        }
        self
    }

    /// `--rootfs`, writable.
    pub fn rootfs(mut self, disk: &'a Disk) -> Self {
        self.rootfs = Rootfs::Disk(disk);
        self
    }

    /// `--rootfs`, read-only.
    pub fn rootfs_read_only(mut self, image: impl Into<PathBuf>) -> Self {
        self.rootfs = Rootfs::ReadOnly(image.into());
        self
    }

    /// `--disk`, writable.
    pub fn disk(self, disk: &'a Disk) -> Self {
        self.disk_with(disk, "")
    }

    /// `--disk` with more options, such as `,ro`.
    pub fn disk_with(mut self, disk: &'a Disk, options: &'a str) -> Self {
        self.images.push(("--disk", disk, options));
        self
    }

    /// `--pmem` with more options, such as `,ro`; no root file system besides one that is on it.
    pub fn pmem(mut self, image: &'a Disk, options: &'a str) -> Self {
        if options.contains(",root") && matches!(self.rootfs, Rootfs::Demo) {
            self.rootfs = Rootfs::None;
        }
        self.images.push(("--pmem", image, options));
        self
    }

    /// `--net` with the namespace's tap; the guest has [`GUEST_ADDRESS`], and the VMM runs within the namespace.
    pub fn net(mut self, net: &'a NetNs) -> Self {
        self.net = Some(net);
        self.within(net)
    }

    /// Runs the VMM within the namespace; which device is in it is up to [`Guest::arg`].
    pub fn within(mut self, net: &'a NetNs) -> Self {
        self.within = Some(net);
        self
    }

    /// `--cpus`.
    pub fn cpus(mut self, count: u32) -> Self {
        if count > 1 {
            self.needs = Needs::Hardware;
        }
        self.arguments.extend(["--cpus".to_owned(), count.to_string()]);
        self
    }

    /// `--memory`.
    pub fn memory(self, size: &str) -> Self {
        self.arg("--memory").arg(size)
    }

    /// `--transport`: `mmio` or `pci`.
    pub fn transport(self, name: &str) -> Self {
        self.arg("--transport").arg(name)
    }

    /// More kernel parameters.
    pub fn append(mut self, parameters: &str) -> Self {
        self.append.push(parameters.to_owned());
        self
    }

    /// What our init runs in the guest before it powers off; for a line of shell see [`Guest::shell`].
    pub fn command(mut self, command: &str) -> Self {
        self.command = Some(command.to_owned());
        self
    }

    /// A line of shell to run in the guest; no double quotes in it, they are the kernel's.
    pub fn shell(self, line: &str) -> Self {
        self.command(&format!("sh -c \"{line}\""))
    }

    /// Any other argument of `vmm run`.
    pub fn arg(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// A program that runs the VMM: its words come before the VMM's own.
    pub fn through(mut self, words: &[&str]) -> Self {
        self.prefix = words.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// Runs the VMM as an ordinary account, with no capabilities in its network namespace.
    pub fn unprivileged(self) -> Self {
        self.through(&["unshare", "-U", "--map-user=1000", "--map-group=1000"])
    }

    /// When to give up, on hardware; longer in the lab.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Boots the guest and waits until `vmm run` has ended.
    pub fn run(self) -> Result<Run> {
        self.start()?.wait()
    }

    /// Boots the guest and returns while it runs.
    pub fn start(self) -> Result<Running<'a>> {
        let place = match self.within {
            Some(net) => net.place().clone(),
            None => Place::choose(self.needs)?,
        };
        ensure!(
            self.needs == Needs::AnyKvm || place.acceleration() == Acceleration::Hardware,
            "the test needs hardware, and {place} has none"
        );
        report::check_module(self.needs)?;
        let kernel = self.kernel.at(&place);
        report::boots(&kernel.describe(), &place)?;
        let mut lent = Vec::new();
        let argv = [self.prefix.clone(), self.arguments(&kernel, &place, &mut lent)?].concat();
        let mut program = Program::new(argv);
        if let Some(net) = self.within {
            program = net.within(&program);
        }
        Running::start(program, place, self.deadline, lent, kernel)
    }

    /// The whole command line of `vmm run`.
    fn arguments(&self, kernel: &Kernel, place: &Place, lent: &mut Vec<Lent<'a>>) -> Result<Vec<String>> {
        let mut arguments = vec![place.provide(&binaries::vmm()?)?, "run".into()];
        if matches!(self.rootfs, Rootfs::None) {
            arguments.push("--no-rootfs".into());
        }
        let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        option("--kernel", place.provide(&kernel.file()?)?);
        if let Some(initrd) = &self.initrd {
            option("--initrd", place.provide(initrd)?);
        }
        match &self.rootfs {
            Rootfs::Demo => option("--rootfs", place.provide(&crate::demo_image()?)? + ",ro"),
            Rootfs::None => {}
            Rootfs::Disk(disk) => option("--rootfs", lend(disk, place, lent)?),
            Rootfs::ReadOnly(image) => option("--rootfs", place.provide(image)? + ",ro"),
        }
        for (flag, disk, options) in &self.images {
            // What nobody writes can be one file for all guests, wherever they are.
            let path = match options.split(',').any(|option| option == "ro") {
                true => place.provide(disk.path())?,
                false => lend(disk, place, lent)?,
            };
            option(flag, format!("path={path}{options}"));
        }
        let mut append = self.append.clone();
        if self.net.is_some() {
            option("--net", format!("tap={TAP}"));
            append.push(format!("ip={GUEST_ADDRESS}::{HOST_ADDRESS}:255.255.255.0::eth0:off"));
        }
        append.extend(self.command.iter().map(|command| format!("-- {command}")));
        if !append.is_empty() {
            option("--append", append.join(" "));
        }
        arguments.extend(self.arguments.iter().cloned());
        Ok(arguments)
    }
}

/// A disk that a guest in the lab writes to: a copy, which comes back when the guest has ended.
pub(crate) struct Lent<'a> {
    disk: &'a Disk,
    lab: Lab,
    path: String,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let _ = self.lab.remove(&self.path);
    }
}

/// The path of a writable disk at `place`.
fn lend<'a>(disk: &'a Disk, place: &Place, lent: &mut Vec<Lent<'a>>) -> Result<String> {
    let Place::Lab(lab) = place else { return Ok(disk.path().display().to_string()) };
    let path = format!("/scratch/disks/{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    lab.copy(&lab.provide(disk.path())?, &path)?;
    lent.push(Lent { disk, lab: lab.clone(), path: path.clone() });
    Ok(path)
}

/// A guest that runs.
pub struct Running<'a> {
    process: Process,
    mark: String,
    place: Place,
    deadline: Duration,
    lent: Vec<Lent<'a>>,
    /// Keeps the file of a micro guest.
    _kernel: Kernel,
}

impl<'a> Running<'a> {
    /// Starts a program that is a VMM.
    pub(crate) fn start(
        mut program: Program,
        place: Place,
        deadline: Duration,
        lent: Vec<Lent<'a>>,
        kernel: Kernel,
    ) -> Result<Self> {
        let mark = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        program.env.push((MARK.into(), mark.clone()));
        let process = place.start(&program)?;
        let deadline = deadline * place.slowness();
        Ok(Self { process, mark, deadline, place, lent, _kernel: kernel })
    }

    /// See [`Process::expect_from`].
    pub(crate) fn expect_from(&self, from: usize, text: &str) -> Result<(String, usize)> {
        self.process.expect_from(from, text, self.deadline)
    }

    /// Waits until `text` appears on the console, after what earlier calls waited for, and returns what came before it.
    pub fn expect(&mut self, text: &str) -> Result<String> {
        self.process.expect(text, self.deadline)
    }

    /// What the VMM has mapped now.
    pub fn smaps(&self) -> Result<Vec<Mapping>> {
        let line = format!(
            "for p in /proc/[0-9]*; do grep -qsa '{MARK}={}' $p/environ && cat $p/smaps; done; true",
            self.mark
        );
        smaps::parse(&self.place.shell(&line)?.ok()?)
    }

    /// Where it runs.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Types on the console.
    pub fn send(&mut self, text: impl AsRef<[u8]>) -> Result<()> {
        self.process.send(text)
    }

    /// Ends the console's input.
    pub fn close_stdin(&mut self) {
        self.process.close_stdin();
    }

    /// Sends the VMM a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Waits until the VMM has ended; disks have the guest's writes after this.
    pub fn wait(self) -> Result<Run> {
        let output = self.process.wait(self.deadline)?;
        for lent in &self.lent {
            lent.lab.get(&lent.path, lent.disk.path())?;
        }
        Ok(Run {
            exit: output.exit,
            output: output.stdout.clone(),
            console: String::from_utf8_lossy(&output.stdout).replace('\r', ""),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            place: self.place,
        })
    }
}

/// How a guest's run went.
#[derive(Clone, Debug)]
pub struct Run {
    /// How `vmm run` ended.
    pub exit: Exit,
    /// What the guest printed, byte by byte.
    pub output: Vec<u8>,
    /// What the guest printed, as text without carriage returns.
    pub console: String,
    /// What the VMM said.
    pub stderr: String,
    /// Where it ran.
    pub place: Place,
}

impl Run {
    /// The VMM ended with status 0.
    pub fn ok(&self) -> Result<&Self> {
        self.status(0)
    }

    /// The VMM ended with this status.
    pub fn status(&self, status: i32) -> Result<&Self> {
        if self.exit != Exit::Status(status) {
            bail!("vmm ended with {}, not with status {status}; {}", self.exit, self.all());
        }
        Ok(self)
    }

    /// The guest printed this line, and nothing else on it but spaces around.
    pub fn expect_line(&self, line: &str) -> Result<&Self> {
        ensure!(
            self.console.lines().any(|have| have.trim() == line),
            "the guest did not print '{line}'; {}",
            self.all()
        );
        Ok(self)
    }

    /// The guest printed this text, on any line.
    pub fn expect_text(&self, text: &str) -> Result<&Self> {
        ensure!(self.console.contains(text), "the guest did not print '{text}'; {}", self.all());
        Ok(self)
    }

    /// What follows `prefix` on the first line that starts with it, spaces removed at both ends.
    pub fn value_of(&self, prefix: &str) -> Result<&str> {
        match self.console.lines().find_map(|line| line.strip_prefix(prefix)) {
            Some(value) => Ok(value.trim()),
            None => bail!("the guest printed no line that starts with '{prefix}'; {}", self.all()),
        }
    }

    fn all(&self) -> String {
        format!("its console:\n{}\n--- the VMM said:\n{}", self.console, self.stderr)
    }
}

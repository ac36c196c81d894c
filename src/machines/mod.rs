//! Machines with a name: a directory for each, which holds its sockets, its log and what became of it.
//!
//! ```text
//! STATE/.lock            held while a machine is added or removed
//! STATE/.new, .old       a machine while it is added or removed
//! STATE/NAME/lock        locked by the machine's process as long as it lives: its number, then how it ended
//! STATE/NAME/api.sock    its control API
//! STATE/NAME/vsock.sock  its vsock, when it comes from a snapshot
//! STATE/NAME/log, log.1  what was on its console
//! STATE/NAME/vmm-log, vmm-log.1  what its process has said in the background
//! ```
//!
//! The kernel frees a lock whose process dies, however it dies. So a machine is alive exactly while its lock is held,
//! and nothing that a killed process leaves behind is mistaken for a living machine.

pub mod client;
pub mod log;
pub mod replay;

use std::cell::Cell;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use rustix::fs::FileType;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Longest name of a machine in bytes; with it, the path of its sockets has to fit into a socket's address.
const NAME_MAX: usize = 32;
/// Directory of a machine that is being added; no machine has such a name.
const NEW: &str = ".new";
/// Directory of a machine that is being removed.
const OLD: &str = ".old";
/// How often somebody who waits for a machine's end looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// The directory with all machines of a user.
#[derive(Clone, Debug)]
pub struct StateDir(PathBuf);

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Exit status of its process.
    pub status: u8,
    /// A sentence.
    pub reason: String,
}

/// A machine of this process.
#[derive(Debug)]
pub struct Registered {
    machine: Machine,
    state: StateDir,
    lock: File,
    /// Everything of it goes with this value.
    remove: Cell<bool>,
}

/// A look at a machine's process, which outlives the machine's directory.
#[derive(Debug)]
pub struct Watch(File);

/// A machine, alive or dead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Its name.
    pub name: String,
    dir: PathBuf,
}

impl StateDir {
    /// The directory at `path`, or the user's: `$XDG_RUNTIME_DIR/vmm`, or `/run/vmm` for root, or one below `/tmp`.
    /// It is made with the first machine.
    pub fn open(path: Option<&Path>) -> anyhow::Result<Self> {
        let state = Self(path.map_or_else(default_path, Path::to_owned));
        state.check_owner()?;
        Ok(state)
    }

    /// Below /tmp, somebody else may have made it first.
    fn check_owner(&self) -> anyhow::Result<()> {
        let shown = self.0.display();
        let me = rustix::process::geteuid().as_raw();
        match rustix::fs::stat(&self.0) {
            Ok(stat) if !FileType::from_raw_mode(stat.st_mode).is_dir() => {
                bail!("the state directory '{shown}' is a file; pass --state-dir PATH")
            }
            Ok(stat) if stat.st_uid != me => {
                bail!("the state directory '{shown}' belongs to somebody else; pass --state-dir PATH")
            }
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot use the state directory '{shown}'")),
        }
    }

    fn make(&self) -> anyhow::Result<()> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.0);
        made.with_context(|| format!("cannot make the state directory '{}'", self.0.display()))?;
        self.check_owner()
    }

    fn lock(&self) -> io::Result<File> {
        let file = File::options().create(true).append(true).mode(0o600).open(self.0.join(".lock"))?;
        file.lock()?;
        Ok(file)
    }

    /// The directory of a machine of this name.
    pub fn directory_of(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Takes `name` for a machine of this process. Nothing of it stays unless [`Registered::keep`] is called.
    pub fn register(&self, name: &str) -> anyhow::Result<Registered> {
        self.make()?;
        let _guard = self.lock()?;
        let machine = Machine { name: name.into(), dir: self.0.join(name) };
        ensure!(
            !machine.is_alive(),
            "a machine named '{name}' runs already; choose another name or say 'vmm stop {name}'"
        );
        ensure!(
            !machine.dir.exists(),
            "there is a machine named '{name}' that has ended; say 'vmm rm {name}', or choose another name"
        );
        self.add(machine)
    }

    /// As [`Self::register`], with `name` and the first number from `first` on that is free.
    pub fn register_next(&self, name: &str, first: u32) -> anyhow::Result<(u32, Registered)> {
        let _guard = self.lock()?;
        let numbers = (first..).map(|number| (number, format!("{name}-{number}")));
        let free = |(_, name): &(u32, String)| !self.0.join(name).exists();
        let (number, name) = numbers.into_iter().find(free).context("no number is free")?;
        let name = check_name(&name).map_err(|why| anyhow!("'{name}' is no name of a machine: {why}"))?;
        Ok((number, self.add(Machine { dir: self.0.join(&name), name })?))
    }

    /// Makes the directory of a machine, which there is none of. We hold the lock.
    fn add(&self, machine: Machine) -> anyhow::Result<Registered> {
        // Whoever looks sees all of it or nothing, and so it is when we are killed here.
        let new = Machine { name: machine.name.clone(), dir: self.0.join(NEW) };
        let made = self.clean_up().and_then(|()| fs::DirBuilder::new().mode(0o700).create(&new.dir));
        let locked = made.and_then(|()| new.take_lock());
        let there = locked.and_then(|lock| fs::rename(&new.dir, &machine.dir).map(|()| lock));
        if there.is_err() {
            // Such as a full disk: nothing half-made stays.
            _ = self.clean_up();
        }
        let lock = there.with_context(|| format!("cannot write below '{}'", self.0.display()))?;
        Ok(Registered { machine, state: self.clone(), lock, remove: Cell::new(true) })
    }

    /// Removes what a process has left that was killed while it held the lock, as we do.
    fn clean_up(&self) -> io::Result<()> {
        [NEW, OLD].into_iter().try_for_each(|name| match fs::remove_dir_all(self.0.join(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        })
    }

    /// Removes a machine: at once for whoever looks, whatever becomes of us. We hold the lock.
    fn discard(&self, machine: &Machine) -> io::Result<()> {
        self.clean_up()?;
        match fs::rename(&machine.dir, self.0.join(OLD)) {
            // Somebody else was faster.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            renamed => renamed.and_then(|()| self.clean_up()),
        }
    }

    /// All machines, by name.
    pub fn list(&self) -> anyhow::Result<Vec<Machine>> {
        let mut machines = Vec::new();
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(machines),
            entries => entries.with_context(|| format!("cannot read '{}'", self.0.display()))?,
        };
        for entry in entries {
            let entry = entry?;
            if let Ok(name) = entry.file_name().into_string()
                && check_name(&name).is_ok()
                && entry.path().join("lock").exists()
            {
                machines.push(Machine { name, dir: entry.path() });
            }
        }
        machines.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(machines)
    }

    /// The machine of this name, or the only one whose name begins like this.
    pub fn find(&self, name: &str) -> anyhow::Result<Machine> {
        let machines = self.list()?;
        if let Some(exact) = machines.iter().find(|machine| machine.name == name) {
            return Ok(exact.clone());
        }
        // Everything begins with nothing, which is more likely a script's mistake.
        let begins = |machine: &&Machine| !name.is_empty() && machine.name.starts_with(name);
        let matching: Vec<&Machine> = machines.iter().filter(begins).collect();
        match matching[..] {
            [one] => Ok(one.clone()),
            [] => match similar(name, &machines) {
                Some(similar) => bail!("there is no machine '{name}'; did you mean '{similar}'?"),
                None => bail!("there is no machine '{name}'; 'vmm ps' lists them"),
            },
            _ => {
                let names: Vec<_> = matching.iter().map(|machine| machine.name.as_str()).collect();
                bail!("'{name}' could be any of {}", names.join(", "))
            }
        }
    }

    /// Removes everything of a machine that has ended.
    pub fn remove(&self, machine: &Machine) -> anyhow::Result<()> {
        let _guard = self.lock()?;
        ensure!(
            !machine.is_alive(),
            "'{0}' runs; say 'vmm stop {0}' first, or 'vmm rm --force {0}'",
            machine.name
        );
        self.discard(machine).with_context(|| format!("cannot remove '{}'", machine.dir.display()))
    }
}

/// The name that was meant, perhaps: a mistake for every three letters.
fn similar<'a>(name: &str, machines: &'a [Machine]) -> Option<&'a str> {
    let mistakes = |other: &Machine| strsim::damerau_levenshtein(name, &other.name);
    let nearest = machines.iter().min_by_key(|machine| mistakes(machine))?;
    let letters = name.chars().count();
    (mistakes(nearest) <= (letters / 3).max(1) && mistakes(nearest) < letters).then_some(&nearest.name)
}

fn default_path() -> PathBuf {
    let user = rustix::process::geteuid();
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir).join("vmm"),
        None if user.is_root() => "/run/vmm".into(),
        None => PathBuf::from(format!("/tmp/vmm-{}", user.as_raw())),
    }
}

/// A name that a machine can have.
pub fn check_name(name: &str) -> Result<String, String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let starts = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    match starts && name.len() <= NAME_MAX && name.bytes().all(allowed) {
        true => Ok(name.into()),
        false => Err(format!(
            "use 1 to {NAME_MAX} letters, digits, '.', '_' and '-', the first a letter or a digit"
        )),
    }
}

impl Registered {
    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Lets the machine's directory outlive this process.
    pub fn keep(&self) {
        self.remove.set(false);
    }

    /// Leaves the machine to a process that was forked from this one, which has this value too.
    pub fn leave_to_child(self) {
        self.keep();
    }

    /// The other side of [`Self::leave_to_child`].
    pub fn become_ours(&self) -> io::Result<()> {
        self.lock.set_len(0)?;
        writeln!(&self.lock, "{}", std::process::id())
    }

    /// Writes down how it ended. What is cut off on a full disk is as if it were not there.
    pub fn finish(&self, outcome: &Outcome) -> anyhow::Result<()> {
        Ok(writeln!(&self.lock, "{}", serde_json::to_string(outcome)?)?)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if self.remove.get() {
            let _guard = self.state.lock();
            _ = self.state.discard(&self.machine);
        }
    }
}

impl Machine {
    /// A file of its own.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The socket of its API.
    pub fn api(&self) -> PathBuf {
        self.path("api.sock")
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.path("log")
    }

    /// What its process has said in the background.
    pub fn own_log(&self) -> PathBuf {
        self.path("vmm-log")
    }

    fn take_lock(&self) -> io::Result<File> {
        let mut file = File::options().create_new(true).append(true).mode(0o600).open(self.path("lock"))?;
        file.lock()?;
        writeln!(file, "{}", std::process::id())?;
        Ok(file)
    }

    /// Looks at its process.
    pub fn watch(&self) -> io::Result<Watch> {
        File::open(self.path("lock")).map(Watch)
    }

    /// Whether its process lives.
    pub fn is_alive(&self) -> bool {
        self.watch().is_ok_and(|watch| watch.is_alive())
    }

    /// Number of its process.
    pub fn pid(&self) -> Option<i32> {
        self.watch().ok()?.lines().ok()?.next()?.parse().ok()
    }

    /// How it ended, if it had the time to say so.
    pub fn outcome(&self) -> Option<Outcome> {
        self.watch().ok()?.outcome()
    }
}

impl Watch {
    /// Whether the process lives.
    pub fn is_alive(&self) -> bool {
        match self.0.try_lock_shared() {
            Err(TryLockError::WouldBlock) => true,
            _ => {
                // Nobody else is to take us for it.
                _ = self.0.unlock();
                false
            }
        }
    }

    fn lines(&self) -> io::Result<std::vec::IntoIter<String>> {
        let mut text = String::new();
        let mut file = &self.0;
        file.seek(SeekFrom::Start(0))?;
        file.take(64 << 10).read_to_string(&mut text)?;
        Ok(text.lines().map(str::to_owned).collect::<Vec<_>>().into_iter())
    }

    /// Waits until the process has ended; at most for `timeout`, if there is one. Returns whether it has.
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        let start = Instant::now();
        while self.is_alive() {
            if timeout.is_some_and(|timeout| start.elapsed() >= timeout) {
                return false;
            }
            thread::sleep(LOOK_INTERVAL);
        }
        true
    }

    /// How it ended, if it had the time to say so.
    pub fn outcome(&self) -> Option<Outcome> {
        serde_json::from_str(&self.lines().ok()?.nth(1)?).ok()
    }
}

/// The machine of this name, which has to be alive.
pub fn find_alive(state: &StateDir, name: &str) -> anyhow::Result<Machine> {
    let machine = state.find(name)?;
    match machine.is_alive() {
        true => Ok(machine),
        false => bail!("'{}' has ended", machine.name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> (tempfile::TempDir, StateDir) {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(Some(&dir.path().join("state"))).unwrap();
        (dir, state)
    }

    #[test]
    fn a_machine_is_alive_exactly_while_its_process_holds_its_lock() {
        let (_dir, state) = state();
        let web = state.register("web").unwrap();
        web.keep();
        let machine = web.machine().clone();
        assert!(machine.is_alive());
        assert_eq!(machine.pid(), Some(std::process::id() as i32));
        assert!(state.register("web").unwrap_err().to_string().contains("runs already"));
        assert!(state.remove(&machine).unwrap_err().to_string().contains("vmm stop web"));
        let watch = machine.watch().unwrap();
        assert!(!watch.wait(Some(Duration::ZERO)));
        let outcome = Outcome { status: 3, reason: "x".into() };
        web.finish(&outcome).unwrap();
        drop(web);
        assert!(!machine.is_alive() && watch.wait(None));
        assert_eq!(machine.outcome().as_ref(), Some(&outcome));
        assert!(state.register("web").unwrap_err().to_string().contains("vmm rm web"));
        state.remove(&machine).unwrap();
        assert_eq!(watch.outcome(), Some(outcome), "who waits still sees it");
        drop(state.register("web").unwrap());
        assert_eq!(state.list().unwrap(), []);
    }

    #[test]
    fn names_are_found_by_what_is_unique_of_them() {
        let (_dir, state) = state();
        let _machines = ["db", "web", "web-2"].map(|name| state.register(name).unwrap());
        let find =
            |name: &str| state.find(name).map(|machine| machine.name).map_err(|error| error.to_string());
        assert_eq!(find("d"), Ok("db".into()));
        assert_eq!(find("web"), Ok("web".into()));
        assert_eq!(find("web-"), Ok("web-2".into()));
        assert_eq!(find("w"), Err("'w' could be any of web, web-2".into()));
        assert_eq!(find("wbe"), Err("there is no machine 'wbe'; did you mean 'web'?".into()));
        assert!(find("x").unwrap_err().contains("vmm ps"));
        assert!(find("").unwrap_err().contains("vmm ps"), "nothing is no name");
    }

    #[test]
    fn names_are_no_paths() {
        for name in ["", ".", "..", "a/b", "-a", "ä", &"x".repeat(33)] {
            assert!(check_name(name).is_err(), "{name}");
        }
        for name in ["a", "7", "web-1.x_y", &"x".repeat(32)] {
            assert!(check_name(name).is_ok(), "{name}");
        }
    }
}

//! QEMU's microvm that is saved to a file and comes back from it, by its migration.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::{Process, Program, Signal};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::answering::{self, faults, fill, millis};
use super::measure::Subject;
use super::qemu;

/// Only there to end a hang.
const DEADLINE: Duration = Duration::from_secs(120);

/// QEMU with a guest at its shell.
pub struct Migrating {
    dir: TempDir,
    subject: Subject,
    process: Process,
}

impl Migrating {
    /// Boots it, and fills its memory.
    pub fn boot(memory: u32, filled: u32) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (kernel, root) = answering::kernel_and_root()?;
        let arguments = format!(
            "-m {memory} -qmp unix:{},server=on,wait=off -kernel {kernel} -drive \
             file={root},format=raw,readonly=on,if=none,id=root -device virtio-blk-device,drive=root",
            dir.path().join("qmp").display()
        );
        let subject = qemu::at_shell("QEMU microvm", &arguments)?;
        let mut process = Process::start_local(&Program::new(subject.argv.clone()))?;
        process.expect("# ", DEADLINE)?;
        process.send(format!("{}; echo @fil''led\n", fill(filled)))?;
        process.expect("@filled", DEADLINE)?;
        Ok(Self { dir, subject, process })
    }

    /// Where the file is.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Migrates it to the file, and lets it go on: milliseconds that it stood still, and in all, and MiB on the disk.
    pub fn save(&mut self) -> Result<Vec<f64>> {
        let file = self.dir.path().join("file");
        let mut qmp = Qmp::connect(&self.dir.path().join("qmp"))?;
        let began = Instant::now();
        // Without this it keeps to 128 MiB/s.
        qmp.ask("migrate-set-parameters", &json!({ "max-bandwidth": 1_u64 << 40 }))?;
        qmp.ask("migrate", &json!({ "uri": format!("exec:cat > {}", file.display()) }))?;
        let done = loop {
            let state = qmp.ask("query-migrate", &json!({}))?;
            match state["status"].as_str() {
                Some("completed") => break state,
                Some("failed" | "cancelled") => anyhow::bail!("QEMU cannot migrate here: {state}"),
                _ => ensure!(began.elapsed() < DEADLINE, "QEMU does not migrate: {state}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        // As lasting as ours.
        File::open(&file)?.sync_all()?;
        let all = millis(began);
        qmp.ask("cont", &json!({}))?;
        let size = std::fs::metadata(&file)?.blocks() as f64 * 512.0 / f64::from(1 << 20);
        Ok(vec![done["downtime"].as_f64().context("downtime")?, all, size])
    }

    /// Starts another one from the file: NaN, as it does not tell its first exit, milliseconds to the first answer, and
    /// faults up to it.
    pub fn restore(&self) -> Result<Vec<f64>> {
        let (here, other) = (self.dir.path().join("qmp"), self.dir.path().join("qmp2"));
        let replaced = |arg: &String| arg.replace(&*here.display().to_string(), &other.display().to_string());
        let incoming = format!("exec:cat {}", self.dir.path().join("file").display());
        let argv = self.subject.argv.iter().map(replaced).chain(["-incoming".into(), incoming]);
        let program = Program::new(argv);
        let began = Instant::now();
        let mut process = Process::start_local(&program)?;
        // The shell's line editor may have waited in the middle of a key.
        process.send("\n\necho @he''re\n")?;
        process.expect("@here", DEADLINE)?;
        let answer = millis(began);
        let [minor, major] = faults(process.local_pid().context("it runs here")?)?;
        process.signal(Signal::KILL)?;
        process.wait(DEADLINE)?;
        Ok(vec![f64::NAN, answer, minor, major])
    }
}

impl Drop for Migrating {
    fn drop(&mut self) {
        _ = self.process.signal(Signal::KILL);
    }
}

/// QEMU's control socket.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect(path: &Path) -> Result<Self> {
        let mut qmp = Self(BufReader::new(UnixStream::connect(path)?));
        // It greets, and takes nothing before this.
        qmp.line()?;
        qmp.ask("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn ask(&mut self, what: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": what, "arguments": arguments });
        self.0.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.line()?;
            ensure!(answer.get("error").is_none(), "{what}: {answer}");
            // Events come in between.
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("no JSON: '{line}'"))
    }
}

//! What a machine has counted: as one line of JSON for Firecracker's clients, and as text for Prometheus.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::OFlags;
use serde_json::{Map, Value, json};
use vmm_core::Vm;
use vmm_core::exits::ExitCount;

/// Where Firecracker's clients want metrics written, if anywhere.
#[derive(Default)]
pub struct MetricsFile(Mutex<Option<Sink>>);

struct Sink {
    file: File,
    /// The end of a line that a FIFO had no room for: it comes before the next line.
    rest: Vec<u8>,
}

impl MetricsFile {
    /// Opens the file or FIFO at `path`; an error is a sentence. A FIFO needs no reader yet.
    pub fn open(&self, path: &Path) -> Result<(), String> {
        let file = open_sink(path)
            .map_err(|error| format!("Cannot open metrics_path '{}': {error}.", path.display()))?;
        let mut slot = self.0.lock().unwrap_or_else(|e| e.into_inner());
        match &*slot {
            Some(_) => Err("The metrics file is set already.".into()),
            None => {
                *slot = Some(Sink { file, rest: Vec::new() });
                Ok(())
            }
        }
    }

    /// Whether there is such a file.
    pub fn is_open(&self) -> bool {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).is_some()
    }

    /// Writes one line with everything that is counted; an error is a sentence.
    pub fn flush(&self, vm: Option<&Vm>) -> Result<(), String> {
        let mut slot = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let Some(sink) = &mut *slot else { return Ok(()) };
        let line = line(vm).to_string() + "\n";
        sink.write(line.as_bytes()).map_err(|error| format!("Cannot write the metrics: {error}."))
    }
}

impl Sink {
    /// Writes a line whole or not at all, as whoever reads it sees it, and waits for nobody.
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        while !self.rest.is_empty() {
            let written = self.file.write(&self.rest)?;
            self.rest.drain(..written);
        }
        let mut left = line;
        while !left.is_empty() {
            match self.file.write(left) {
                Ok(written) => left = &left[written..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if left.len() == line.len() => return Err(error),
                Err(_) => {
                    self.rest = left.to_vec();
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// Opens a file for appending, or a FIFO that may be without a reader and is never waited for.
pub fn open_sink(path: &Path) -> std::io::Result<File> {
    let flags = OFlags::NONBLOCK.bits() as i32;
    // Reading as well, as a FIFO without a reader cannot be opened else.
    File::options().read(true).append(true).create(true).mode(0o600).custom_flags(flags).open(path)
}

fn line(vm: Option<&Vm>) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut line = Map::from_iter([("utc_timestamp_ms".to_owned(), json!(now.as_millis() as u64))]);
    if let Some(vm) = vm {
        let exits: Map<_, _> =
            exits(vm).into_iter().map(|(name, count)| (format!("exits_{name}"), json!(count))).collect();
        line.insert("vcpu".into(), exits.into());
        for device in vm.devices() {
            let counters: Map<_, _> = device
                .counters
                .all()
                .into_iter()
                .map(|(name, count)| (name.to_owned(), json!(count)))
                .collect();
            line.insert(device.name.clone(), counters.into());
        }
    }
    line.into()
}

/// Exits of all vCPUs by cause, with names that stay.
pub fn exits(vm: &Vm) -> Vec<(&'static str, u64)> {
    let all: Vec<ExitCount> = vm.exits().into_iter().flatten().collect();
    let total = |cause| all.iter().filter(|entry| entry.cause == cause).map(|entry| entry.count).sum();
    let causes = vmm_core::exits::ExitCause::ALL;
    causes.map(|cause| (cause.name(), total(cause))).into()
}

/// The text that Prometheus reads. docs/metrics.md lists the names.
pub fn prometheus(id: &str, vm: Option<&Vm>) -> String {
    let mut text = String::new();
    let id = label(id);
    // Writing to a string does not fail.
    let mut family = |name: &str, kind: &str, help: &str, samples: &[(String, f64)]| {
        _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            _ = writeln!(text, "{name}{{vm=\"{id}\"{labels}}} {value}");
        }
    };
    let running = vm.is_some_and(|vm| matches!(vm.state(), vmm_core::VmState::Running));
    family("vmm_running", "gauge", "1 while the guest runs", &[(String::new(), f64::from(running))]);
    let Some(vm) = vm else { return text };
    let exits: Vec<_> =
        exits(vm).into_iter().map(|(name, count)| (format!(",cause=\"{name}\""), count as f64)).collect();
    family("vmm_exits_total", "counter", "Exits of vCPUs to this program", &exits);
    if let Ok(usage) = vm.usage() {
        let vcpus = usage
            .vcpus
            .iter()
            .enumerate()
            .map(|(i, time)| (format!(",thread=\"vcpu{i}\""), time.as_secs_f64()));
        let devices = (",thread=\"devices\"".to_owned(), usage.devices.as_secs_f64());
        let threads: Vec<_> = vcpus.into_iter().chain([devices]).collect();
        family("vmm_cpu_seconds_total", "counter", "CPU time of threads", &threads);
        let memory = usage.memory as f64;
        family(
            "vmm_guest_memory_resident_bytes",
            "gauge",
            "Guest memory that the host holds",
            &[(String::new(), memory)],
        );
    }
    let counters: Vec<_> = vm.devices().iter().map(|device| (device, device.counters.all())).collect();
    let mut names: Vec<&str> =
        counters.iter().flat_map(|(_, all)| all.iter().map(|(name, _)| *name)).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let samples: Vec<_> = counters
            .iter()
            .filter_map(|(device, all)| {
                let value = all.iter().find(|(other, _)| *other == name)?.1;
                Some((format!(",device=\"{}\",kind=\"{}\"", label(&device.name), device.kind), value as f64))
            })
            .collect();
        family(
            &format!("vmm_device_{name}"),
            "untyped",
            "Counter of a device, see docs/metrics.md",
            &samples,
        );
    }
    text
}

/// A label's value.
fn label(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_longer_than_a_fifo_has_room_for_is_not_torn() {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let mut sink = Sink { file: writer.into(), rest: Vec::new() };
        let line = |byte: u8| [&vec![byte; 50_000][..], b"\n"].concat();
        let mut read = Vec::new();
        let mut take = || {
            let mut bytes = vec![0; 1 << 20];
            let n = rustix::io::read(&reader, &mut bytes).unwrap();
            read.extend_from_slice(&bytes[..n]);
        };
        sink.write(&line(b'a')).unwrap();
        sink.write(&line(b'b')).unwrap();
        sink.write(&line(b'c')).unwrap_err();
        take();
        sink.write(&line(b'd')).unwrap();
        take();
        sink.write(b"e\n").unwrap();
        take();
        assert!(read == [&line(b'a')[..], &line(b'b'), &line(b'd'), b"e\n"].concat());
    }
}

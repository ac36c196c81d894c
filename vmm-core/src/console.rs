//! The guest's console as two streams of bytes, with no terminal assumed.
//!
//! Output goes through a bounded buffer: when nobody reads, either the oldest bytes are lost (and counted) or
//! the guest waits. Input waits in a bounded buffer until the guest's driver listens.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, Weak};
use std::time::Duration;

use devices::legacy::serial::SerialPort;
use devices::log_file::{LogFile, LogFileError};
use devices::model::BusDevice;

/// Bytes of output that wait for a reader.
pub const OUTPUT_BUFFER: usize = 256 << 10;
/// Bytes of input that wait for the guest.
pub const INPUT_BUFFER: usize = 16 << 10;

/// What happens to output when the buffer is full.
///
/// ```no_run
/// use vmm_core::{Vm, VmConfig, console::WhenFull};
///
/// # fn build(config: VmConfig) -> Result<Vm, vmm_core::BuildError> {
/// // This program reads it all, so no byte is to be lost.
/// Vm::builder(config).console_when_full(WhenFull::Wait).build()
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// The oldest bytes are dropped and counted: for readers that may never come.
    #[default]
    DropOldest,
    /// The guest waits: for a reader that must see every byte.
    Wait,
}

#[derive(Default)]
struct Output {
    bytes: VecDeque<u8>,
    dropped: u64,
    closed: bool,
    /// Nobody waits for room: the machine is being paused.
    open: bool,
}

/// The buffer between the serial port and the reader of its output.
#[derive(Default)]
struct OutputBuffer {
    state: Mutex<Output>,
    changed: Condvar,
    when_full: WhenFull,
}

impl OutputBuffer {
    fn lock(&self) -> MutexGuard<'_, Output> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The serial port on its bus, in front of which the guest waits for room in the output: not behind its lock, which
/// input and other vCPUs take as well.
pub(crate) struct ConsolePort {
    port: Arc<SerialPort>,
    output: Arc<OutputBuffer>,
}

impl ConsolePort {
    pub(crate) fn new(port: Arc<SerialPort>, output: &OutputControl) -> Self {
        Self { port, output: output.0.clone() }
    }
}

impl BusDevice for ConsolePort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.port.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if self.output.when_full == WhenFull::Wait {
            let full =
                |state: &mut Output| state.bytes.len() >= OUTPUT_BUFFER && !state.closed && !state.open;
            drop(self.output.changed.wait_while(self.output.lock(), full));
        }
        self.port.write(offset, data);
    }
}

/// The serial port's end of the output. It never waits, so each vCPU may go past the bound by one byte.
pub(crate) struct OutputWriter(Arc<OutputBuffer>);

impl Write for OutputWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock();
        if state.closed {
            return Ok(data.len());
        }
        if state.bytes.is_empty() {
            self.0.changed.notify_all();
        }
        state.bytes.extend(data);
        let excess = state.bytes.len().saturating_sub(OUTPUT_BUFFER);
        if self.0.when_full == WhenFull::DropOldest && excess > 0 {
            state.bytes.drain(..excess);
            state.dropped += excess as u64;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the machine does to its console's output.
pub(crate) struct OutputControl(Arc<OutputBuffer>);

impl OutputControl {
    /// Ends the output: readers see the rest and then the end, and the guest no longer waits for them.
    pub(crate) fn close(&self) {
        self.0.lock().closed = true;
        self.0.changed.notify_all();
    }

    /// Lets vCPUs that wait for room go on, so that they can be paused.
    pub(crate) fn set_open(&self, open: bool) {
        self.0.lock().open = open;
        self.0.changed.notify_all();
    }
}

/// Reads what the guest writes to its console. A read waits for output, and returns 0 when the machine has
/// stopped and everything is read.
///
/// ```no_run
/// use std::io::{BufRead, BufReader};
///
/// # fn follow(vm: &vmm_core::Vm) -> std::io::Result<()> {
/// let Some(console) = vm.take_console() else { return Ok(()) };
/// for line in BufReader::new(console).lines() {
///     println!("guest: {}", line?);
/// }
/// # Ok(())
/// # }
/// ```
pub struct ConsoleReader(Arc<OutputBuffer>);

impl ConsoleReader {
    /// Bytes that were lost because nobody read them in time.
    pub fn dropped(&self) -> u64 {
        self.0.lock().dropped
    }

    /// As [`Read::read`], but after the first byte of a burst waits for up to `settle` for more: a guest writes
    /// byte by byte, and a system call for each of them costs more than they do. The end cuts the wait short.
    pub fn read_burst(&mut self, buf: &mut [u8], settle: Duration) -> io::Result<usize> {
        let state = self.0.lock();
        let quiet = |state: &mut Output| state.bytes.is_empty() && !state.closed;
        let state = self.0.changed.wait_while(state, quiet).unwrap_or_else(|e| e.into_inner());
        let unsettled = |state: &mut Output| state.bytes.len() < buf.len() && !state.closed;
        let waited = self.0.changed.wait_timeout_while(state, settle, unsettled);
        drop(waited.unwrap_or_else(|e| e.into_inner()));
        self.read(buf)
    }
}

impl Drop for ConsoleReader {
    /// Nobody is going to read any more, so the guest does not wait for it.
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.changed.notify_all();
    }
}

impl Read for ConsoleReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut state = self.0.lock();
        while state.bytes.is_empty() && !state.closed && !buf.is_empty() {
            state = self.0.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        let n = state.bytes.read(buf)?;
        self.0.changed.notify_all();
        Ok(n)
    }
}

pub(crate) fn output(when_full: WhenFull) -> (OutputWriter, ConsoleReader, OutputControl) {
    let buffer = Arc::new(OutputBuffer { when_full, ..OutputBuffer::default() });
    (OutputWriter(buffer.clone()), ConsoleReader(buffer.clone()), OutputControl(buffer))
}

#[derive(Default)]
struct Input {
    bytes: VecDeque<u8>,
    closed: bool,
}

/// Writes to the guest's console, as a keyboard would. Cheap to clone, usable from any thread.
///
/// ```no_run
/// use std::io::Write;
///
/// # fn type_in(vm: &vmm_core::Vm) -> std::io::Result<()> {
/// vm.console_input().write_all(b"uname -a\n")
/// # }
/// ```
#[derive(Clone, Default)]
pub struct ConsoleInput(Arc<InputBuffer>);

#[derive(Default)]
struct InputBuffer {
    state: Mutex<Input>,
    changed: Condvar,
    port: OnceLock<Weak<SerialPort>>,
}

impl ConsoleInput {
    pub(crate) fn connect(&self, port: &Arc<SerialPort>) {
        // Only the builder connects, once.
        _ = self.0.port.set(Arc::downgrade(port));
    }

    /// Moves waiting bytes to the port as far as the guest takes them.
    pub(crate) fn pump(&self) {
        let Some(port) = self.0.port.get().and_then(Weak::upgrade) else { return };
        let mut state = self.0.state.lock().unwrap_or_else(|e| e.into_inner());
        while !state.bytes.is_empty() {
            let taken = port.input(state.bytes.as_slices().0);
            if taken == 0 {
                break;
            }
            state.bytes.drain(..taken);
            self.0.changed.notify_all();
        }
    }

    pub(crate) fn close(&self) {
        self.0.state.lock().unwrap_or_else(|e| e.into_inner()).closed = true;
        self.0.changed.notify_all();
    }

    /// Waits until everything that was written has reached the guest, or the machine has stopped.
    pub fn drain(&self) {
        let mut state = self.0.state.lock().unwrap_or_else(|e| e.into_inner());
        while !state.bytes.is_empty() && !state.closed {
            state = self.0.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }
}

impl ConsoleInput {
    /// Takes as much of `data` as there is room for, without waiting; fails when the machine has stopped.
    pub fn offer(&self, data: &[u8]) -> io::Result<usize> {
        self.take(self.0.state.lock().unwrap_or_else(|e| e.into_inner()), data)
    }

    fn take(&self, mut state: MutexGuard<'_, Input>, data: &[u8]) -> io::Result<usize> {
        if state.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let n = data.len().min(INPUT_BUFFER - state.bytes.len());
        state.bytes.extend(&data[..n]);
        drop(state);
        self.pump();
        Ok(n)
    }
}

impl Write for ConsoleInput {
    /// Waits while the buffer is full; fails when the machine has stopped.
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut state = self.0.state.lock().unwrap_or_else(|e| e.into_inner());
        while state.bytes.len() >= INPUT_BUFFER && !state.closed {
            state = self.0.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        self.take(state, data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The last line of a console's file that is full.
const NOTICE: &[u8] = b"\n[vmm: the console file is full, the rest is not written]\n";

/// A file as the serial port's output, which is dropped once the file is full, with a last line that says so.
pub(crate) struct ConsoleFile(LogFile);

impl ConsoleFile {
    /// Opens a file for `limit` bytes of output.
    pub(crate) fn open(path: &Path, limit: u64) -> Result<Self, LogFileError> {
        LogFile::open(path, limit + NOTICE.len() as u64).map(Self)
    }

    /// Output is going to come, see [`LogFile::begin`].
    pub(crate) fn begin(&mut self) -> io::Result<()> {
        self.0.begin()
    }
}

impl Write for ConsoleFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let room = self.0.room().saturating_sub(NOTICE.len());
        let fits = &data[..data.len().min(room)];
        self.0.write_all(fits)?;
        if fits.len() == room && room > 0 {
            self.0.write_all(NOTICE)?;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_reader_the_newest_output_is_kept() {
        let (mut writer, mut reader, closer) = output(WhenFull::DropOldest);
        writer.write_all(&vec![b'a'; OUTPUT_BUFFER]).unwrap();
        writer.write_all(b"end").unwrap();
        closer.close();
        assert_eq!(reader.dropped(), 3);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), OUTPUT_BUFFER);
        assert!(all.ends_with(b"end"));
    }

    struct Nothing;

    impl devices::model::IrqLine for Nothing {
        fn trigger(&self) {}
    }

    impl devices::model::MachineEvents for Nothing {
        fn raise(&self, _event: devices::model::MachineEvent) {}
    }

    fn port(when_full: WhenFull) -> (ConsolePort, ConsoleReader, OutputControl) {
        let (writer, reader, control) = output(when_full);
        let serial = SerialPort::new(Arc::new(Nothing), Arc::new(Nothing), Box::new(writer), Box::new(|| ()));
        (ConsolePort::new(Arc::new(serial), &control), reader, control)
    }

    #[test]
    fn a_waiting_guest_loses_nothing_and_is_freed_by_the_end() {
        let (port, mut reader, control) = port(WhenFull::Wait);
        let total = 2 * OUTPUT_BUFFER;
        let guest = std::thread::spawn(move || {
            (0..total).for_each(|_| port.write(0, b"x"));
            port
        });
        let (mut seen, mut buf) = (0, [0; 4096]);
        while seen < total {
            seen += reader.read(&mut buf).unwrap();
        }
        let port = guest.join().unwrap();
        let guest = std::thread::spawn(move || (0..=OUTPUT_BUFFER).for_each(|_| port.write(0, b"y")));
        control.close();
        guest.join().unwrap();
    }

    #[test]
    fn a_waiting_guest_is_freed_by_a_pause_and_by_a_reader_that_leaves() {
        let (port, reader, control) = port(WhenFull::Wait);
        (0..OUTPUT_BUFFER).for_each(|_| port.write(0, b"x"));
        control.set_open(true);
        port.write(0, b"paused");
        port.write(0, b"p");
        control.set_open(false);
        drop(reader);
        (0..10).for_each(|_| port.write(0, b"z"));
    }

    #[test]
    fn a_console_file_stops_growing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut file = ConsoleFile::open(&path, 10).unwrap();
        file.begin().unwrap();
        for _ in 0..5 {
            file.write_all(b"1234567").unwrap();
        }
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.starts_with("1234567123\n[vmm: "), "{text}");
        assert_eq!(text.lines().count(), 2);
    }
}

//! The serial port, a 16550: the guest's console.
//!
//! The registers are vm-superio's. Around them: one lock, input that waits until the guest can take it, and a
//! look at the output for a kernel's last words.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use crate::model::{BusDevice, IrqLine, MachineEvent, MachineEvents};
use crate::snapshot::{Saved, Snapshot, SnapshotError, State};

/// First I/O port of COM1.
pub const PORT: u16 = 0x3f8;
/// Number of ports.
pub const PORTS: u16 = 8;
/// The interrupt line of COM1.
pub const IRQ: u32 = 4;

/// Offset of the modem control register.
const MCR: u8 = 4;
/// IER: received data available.
const IER_RECEIVE: u8 = 1 << 0;
/// MCR: OUT2, which connects the port to the interrupt controller.
const MCR_OUT2: u8 = 1 << 3;
/// MCR: what the guest sends, it receives.
const MCR_LOOP: u8 = 1 << 4;

/// A serial port.
pub struct SerialPort {
    uart: Mutex<Uart>,
    input_wanted: Box<dyn Fn() + Send + Sync>,
    output_errors: AtomicU64,
}

struct Uart {
    registers: Serial<Line, NoEvents, OutputWatch<Box<dyn Write + Send>>>,
    /// Input was offered that could not be taken.
    refused: bool,
}

impl SerialPort {
    /// A port that raises `irq` and writes what the guest sends to `output`. `input_wanted` is called, with no
    /// lock held, when input that [`Self::input`] did not take can be offered again. `events` hears of the first
    /// byte of output and of a kernel's last words.
    pub fn new(
        irq: Arc<dyn IrqLine>,
        events: Arc<dyn MachineEvents>,
        output: Box<dyn Write + Send>,
        input_wanted: Box<dyn Fn() + Send + Sync>,
    ) -> Self {
        let mut registers = Serial::new(Line(irq), OutputWatch { output, events, begun: false, matched: 0 });
        // As after a power-on: OUT2 is off until a driver opens the port.
        _ = registers.write(MCR, 0);
        Self {
            uart: Mutex::new(Uart { registers, refused: false }),
            input_wanted,
            output_errors: AtomicU64::new(0),
        }
    }

    /// Offers input. Returns how many bytes were taken; the rest is to be offered again when `input_wanted`
    /// is called.
    ///
    /// Nothing is taken before the guest has enabled the receive interrupt and connected it (OUT2): a driver
    /// throws away what the port holds when it opens it, and its probe enables the interrupt for a moment.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut uart = self.lock();
        let taken = match uart.receives() {
            true => uart.registers.enqueue_raw_bytes(bytes).unwrap_or(0),
            false => 0,
        };
        uart.refused = taken < bytes.len();
        taken
    }

    /// How many bytes of output were lost because writing them failed.
    pub fn output_errors(&self) -> u64 {
        self.output_errors.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Calls `input_wanted` if the access that just ended made room for input that was refused.
    fn ask_for_input(&self, mut uart: MutexGuard<'_, Uart>) {
        if uart.refused && uart.receives() && uart.registers.state().in_buffer.is_empty() {
            uart.refused = false;
            drop(uart);
            (self.input_wanted)();
        }
    }
}

impl Uart {
    fn receives(&self) -> bool {
        let SerialState { interrupt_enable, modem_control, .. } = self.registers.state();
        interrupt_enable & IER_RECEIVE != 0 && modem_control & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2
    }
}

/// The state of the port for a snapshot: vm-superio's, by the names of its fields.
#[derive(Serialize, Deserialize)]
struct PortState {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

impl State for PortState {
    const VERSION: u16 = 1;
}

impl Snapshot for SerialPort {
    fn save(&self) -> Result<Saved, SnapshotError> {
        let state = self.lock().registers.state();
        Saved::of(&PortState {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        })
    }

    fn restore(&self, saved: &Saved) -> Result<(), SnapshotError> {
        let saved: PortState = saved.get()?;
        let state = SerialState {
            baud_divisor_low: saved.baud_divisor[0],
            baud_divisor_high: saved.baud_divisor[1],
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.in_buffer,
        };
        let mut uart = self.lock();
        let line = Line(uart.registers.interrupt_evt().0.clone());
        let before = uart.registers.writer_mut();
        let output = OutputWatch {
            output: std::mem::replace(&mut before.output, Box::new(io::sink())),
            events: before.events.clone(),
            begun: before.begun,
            matched: 0,
        };
        uart.registers = Serial::from_state(&state, line, NoEvents, output)
            .map_err(|_| SnapshotError::impossible("number of bytes in the serial port"))?;
        // What has come in since cannot be known here, so it is asked for.
        uart.refused = true;
        Ok(())
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(offset @ 0..8)) = (data, u8::try_from(offset)) {
            let mut uart = self.lock();
            *byte = uart.registers.read(offset);
            self.ask_for_input(uart);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset @ 0..8)) = (data, u8::try_from(offset)) {
            let mut uart = self.lock();
            if uart.registers.write(offset, *byte).is_err() {
                self.output_errors.fetch_add(1, Ordering::Relaxed);
            }
            self.ask_for_input(uart);
        }
    }
}

/// An interrupt line, as vm-superio wants it.
struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.trigger();
        Ok(())
    }
}

/// What Linux prints first when it panics. No character of it but the first is a `K`, which makes matching it
/// in a stream simple.
const LAST_WORDS: &[u8] = b"Kernel panic - not syncing";

/// Passes output on, and raises [`MachineEvent::ConsoleOutput`] at its first byte and [`MachineEvent::LastWords`] whenever
/// a line with a kernel's last words ends.
///
/// Kernels without a pvpanic driver have no other way to tell a panic from a reboot. A program in the guest
/// can print the same words, so they are no panic yet; and they count each time, or a program that says them
/// first would hide a panic that comes later.
struct OutputWatch<W> {
    output: W,
    events: Arc<dyn MachineEvents>,
    /// There was a byte.
    begun: bool,
    /// How much of [`LAST_WORDS`] was seen.
    matched: usize,
}

impl<W> OutputWatch<W> {
    fn watch(&mut self, byte: u8) {
        if !std::mem::replace(&mut self.begun, true) {
            self.events.raise(MachineEvent::ConsoleOutput);
        }
        if self.matched < LAST_WORDS.len() {
            self.matched = match byte {
                _ if byte == LAST_WORDS[self.matched] => self.matched + 1,
                _ => usize::from(byte == LAST_WORDS[0]),
            };
        } else if byte == b'\n' {
            // Not before the end of the line: whoever hears of it may stop the guest, and the reason is there.
            self.matched = 0;
            self.events.raise(MachineEvent::LastWords);
        }
    }
}

impl<W: Write> Write for OutputWatch<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let result = self.output.write(bytes);
        // Words count as spoken even if the output is gone.
        bytes[..*result.as_ref().unwrap_or(&bytes.len())].iter().for_each(|&byte| self.watch(byte));
        result
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

#[cfg(test)]
#[path = "serial_tests.rs"]
mod tests;

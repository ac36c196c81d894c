//! The keyboard controller of a PC, with a keyboard on which only Ctrl-Alt-Del is ever pressed, and its reset line.
//!
//! Our ACPI tables say that there is none, which spares the guests that read them the search for it. One without ACPI
//! has no power button, and hears by the keyboard that it is to end: see [`I8042::press_ctrl_alt_del`]. There is no mouse.
//!
//! Source: *8042 Keyboard Controller* in the IBM PS/2 Hardware Interface Technical Reference; the keyboard's
//! commands and scan codes are those of an IBM Enhanced Keyboard.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::{answer, byte};
use crate::model::{BusDevice, IrqLine, MachineEvent, MachineEvents};
use crate::snapshot::{Saved, Snapshot, SnapshotError, State};

/// First I/O port.
pub const PORT: u16 = 0x60;
/// Number of ports.
pub const PORTS: u16 = 5;
/// The interrupt of the keyboard.
pub const IRQ: u32 = 1;

/// Offset of the data register.
const DATA: u64 = 0;
/// Offset of the status register, when read, and of the command register, when written.
const COMMAND: u64 = 4;

/// Status: there is a byte to be read.
const OUTPUT_FULL: u8 = 1 << 0;
/// Status: the controller has passed its self-test.
const SYSTEM: u8 = 1 << 2;
/// Status: the keyboard is not locked by a key.
const UNLOCKED: u8 = 1 << 4;

/// Command byte: a byte to be read raises the interrupt.
const INTERRUPT: u8 = 1 << 0;
/// Command byte: the keyboard is off.
const DISABLED: u8 = 1 << 4;
/// Command byte: there is no mouse.
const MOUSE_DISABLED: u8 = 1 << 5;
/// Command byte: scan codes of set 2 are turned into those of set 1.
const TRANSLATE: u8 = 1 << 6;

/// Commands of the controller.
mod command {
    pub const READ_COMMAND_BYTE: u8 = 0x20;
    pub const WRITE_COMMAND_BYTE: u8 = 0x60;
    pub const TEST_MOUSE: u8 = 0xa9;
    pub const SELF_TEST: u8 = 0xaa;
    pub const TEST_KEYBOARD: u8 = 0xab;
    pub const DISABLE_KEYBOARD: u8 = 0xad;
    pub const ENABLE_KEYBOARD: u8 = 0xae;
    pub const READ_OUTPUT_PORT: u8 = 0xd0;
    pub const WRITE_OUTPUT_PORT: u8 = 0xd1;
    pub const ECHO_AS_KEYBOARD: u8 = 0xd2;
    pub const ECHO_AS_MOUSE: u8 = 0xd3;
    pub const TO_MOUSE: u8 = 0xd4;
    /// Pulse output line 0, which is the CPU's reset line.
    pub const RESET: u8 = 0xfe;
}

/// Commands of the keyboard.
mod keyboard {
    pub const SET_LEDS: u8 = 0xed;
    pub const ECHO: u8 = 0xee;
    pub const SCAN_CODE_SET: u8 = 0xf0;
    pub const IDENTIFY: u8 = 0xf2;
    pub const SET_RATE: u8 = 0xf3;
    pub const ENABLE: u8 = 0xf4;
    pub const DISABLE: u8 = 0xf5;
    pub const SET_DEFAULTS: u8 = 0xf6;
    pub const RESET: u8 = 0xff;

    pub const ACKNOWLEDGE: u8 = 0xfa;
    pub const RESEND: u8 = 0xfe;
    pub const TEST_PASSED: u8 = 0xaa;
}

/// The keys are pressed and let go again, in scan codes of set 1 and set 2.
const CTRL_ALT_DEL: [&[u8]; 2] = [
    &[0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d],
    &[0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14],
];

/// Bytes that wait to be read, at most: what a keyboard keeps.
const FIFO: usize = 16;

/// A keyboard controller with its keyboard.
pub struct I8042 {
    line: Arc<dyn IrqLine>,
    events: Arc<dyn MachineEvents>,
    state: Mutex<KeyboardState>,
}

/// What a snapshot keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KeyboardState {
    command_byte: u8,
    /// The command of the controller that waits for its byte.
    pending: Option<u8>,
    /// The command of the keyboard that waits for its byte.
    keyboard_pending: Option<u8>,
    /// The keyboard tells of keys.
    scanning: bool,
    /// Bytes that wait to be read.
    output: VecDeque<u8>,
}

impl State for KeyboardState {
    const VERSION: u16 = 1;
}

impl Default for KeyboardState {
    /// As firmware leaves it that has found a keyboard and wants to hear no more of it.
    fn default() -> Self {
        Self {
            command_byte: TRANSLATE | MOUSE_DISABLED | SYSTEM,
            pending: None,
            keyboard_pending: None,
            scanning: true,
            output: VecDeque::new(),
        }
    }
}

impl KeyboardState {
    /// Whether the guest has a driver that waits for keys.
    fn listens(&self) -> bool {
        self.scanning && self.command_byte & (INTERRUPT | DISABLED) == INTERRUPT
    }

    fn put(&mut self, bytes: &[u8]) {
        // A guest that asks and does not read loses what it asked for.
        if self.output.len() + bytes.len() <= FIFO {
            self.output.extend(bytes);
        }
    }

    /// A command of the controller that is no reset.
    fn command(&mut self, command: u8) {
        self.pending = None;
        match command {
            command::READ_COMMAND_BYTE => self.put(&[self.command_byte]),
            command::SELF_TEST => self.put(&[0x55]),
            command::TEST_KEYBOARD => self.put(&[0]),
            // "The clock line is stuck low": there is no mouse.
            command::TEST_MOUSE => self.put(&[1]),
            // Not in reset, address line 20 is on.
            command::READ_OUTPUT_PORT => self.put(&[3]),
            command::DISABLE_KEYBOARD => self.command_byte |= DISABLED,
            command::ENABLE_KEYBOARD => self.command_byte &= !DISABLED,
            command::WRITE_COMMAND_BYTE
            | command::WRITE_OUTPUT_PORT
            | command::ECHO_AS_KEYBOARD
            | command::ECHO_AS_MOUSE
            | command::TO_MOUSE => self.pending = Some(command),
            _ => {}
        }
    }

    /// A byte for the controller, if it waits for one, or for the keyboard.
    fn data(&mut self, value: u8) {
        match self.pending.take() {
            None => self.keyboard(value),
            Some(command::WRITE_COMMAND_BYTE) => self.command_byte = value | MOUSE_DISABLED,
            // The status does not say that it comes from a mouse, from which a driver sees that there is none.
            Some(command::ECHO_AS_KEYBOARD | command::ECHO_AS_MOUSE) => self.put(&[value]),
            Some(_) => {}
        }
    }

    fn keyboard(&mut self, value: u8) {
        match self.keyboard_pending.take() {
            Some(keyboard::SCAN_CODE_SET) if value == 0 => return self.put(&[keyboard::ACKNOWLEDGE, 2]),
            Some(_) => return self.put(&[keyboard::ACKNOWLEDGE]),
            None => {}
        }
        match value {
            keyboard::ECHO => return self.put(&[keyboard::ECHO]),
            keyboard::IDENTIFY => {
                // A driver that finds out what is there takes keys for answers, and would find nothing. It enables the
                // keyboard when it is done.
                self.scanning = false;
                let second = if self.command_byte & TRANSLATE != 0 { 0x41 } else { 0x83 };
                return self.put(&[keyboard::ACKNOWLEDGE, 0xab, second]);
            }
            keyboard::RESET => {
                self.scanning = true;
                return self.put(&[keyboard::ACKNOWLEDGE, keyboard::TEST_PASSED]);
            }
            keyboard::SET_LEDS | keyboard::SCAN_CODE_SET | keyboard::SET_RATE => {
                self.keyboard_pending = Some(value);
            }
            keyboard::ENABLE => self.scanning = true,
            keyboard::DISABLE => self.scanning = false,
            keyboard::SET_DEFAULTS => {}
            _ => return self.put(&[keyboard::RESEND]),
        }
        self.put(&[keyboard::ACKNOWLEDGE]);
    }
}

impl I8042 {
    /// A controller with this interrupt, whose reset line tells `events`.
    pub fn new(line: Arc<dyn IrqLine>, events: Arc<dyn MachineEvents>) -> Self {
        Self { line, events, state: Mutex::default() }
    }

    /// Presses Ctrl, Alt and Delete, and lets them go, if the guest has a driver for the keyboard.
    pub fn press_ctrl_alt_del(&self) {
        self.change(|state| {
            if state.listens() {
                let [first, second] = CTRL_ALT_DEL;
                state.put(if state.command_byte & TRANSLATE != 0 { first } else { second });
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, KeyboardState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Changes the state, and raises the interrupt if there is something to be read which the guest has not been told of.
    fn change(&self, change: impl FnOnce(&mut KeyboardState)) {
        let mut state = self.lock();
        let told = !state.output.is_empty() && state.command_byte & INTERRUPT != 0;
        change(&mut state);
        if !told {
            self.tell(&state);
        }
    }

    fn tell(&self, state: &KeyboardState) {
        if !state.output.is_empty() && state.command_byte & INTERRUPT != 0 {
            self.line.trigger();
        }
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        match offset {
            DATA if data.len() == 1 => {
                answer(data, state.output.pop_front().unwrap_or(0));
                // One interrupt for each byte.
                self.tell(&state);
            }
            COMMAND => {
                let full = if state.output.is_empty() { 0 } else { OUTPUT_FULL };
                answer(data, full | UNLOCKED | state.command_byte & SYSTEM);
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, byte(data)) {
            (COMMAND, Some(command::RESET)) => self.events.raise(MachineEvent::Reset),
            (COMMAND, Some(command)) => self.change(|state| state.command(command)),
            (DATA, Some(value)) => self.change(|state| state.data(value)),
            _ => {}
        }
    }
}

impl Snapshot for I8042 {
    fn save(&self) -> Result<Saved, SnapshotError> {
        Saved::of(&*self.lock())
    }

    fn restore(&self, saved: &Saved) -> Result<(), SnapshotError> {
        let state: KeyboardState = saved.get()?;
        if state.output.len() > FIFO {
            return Err(SnapshotError::impossible("number of bytes from the keyboard"));
        }
        *self.lock() = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::super::test_events::Raised;
    use super::*;

    #[derive(Default)]
    struct Line(AtomicU32);

    impl IrqLine for Line {
        fn trigger(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A controller as a driver sees it.
    struct Driver {
        controller: I8042,
        line: Arc<Line>,
        events: Arc<Raised>,
    }

    impl Driver {
        fn new() -> Self {
            let (line, events) = (Arc::<Line>::default(), Raised::new());
            Self { controller: I8042::new(line.clone(), events.clone()), line, events }
        }

        fn command(&self, command: u8) -> &Self {
            self.controller.write(COMMAND, &[command]);
            self
        }

        fn data(&self, value: u8) -> &Self {
            self.controller.write(DATA, &[value]);
            self
        }

        /// All that there is to be read.
        fn read(&self) -> Vec<u8> {
            let register = |offset| {
                let mut value = [0];
                self.controller.read(offset, &mut value);
                value[0]
            };
            std::iter::from_fn(|| (register(COMMAND) & OUTPUT_FULL != 0).then(|| register(DATA))).collect()
        }

        fn interrupts(&self) -> u32 {
            self.line.0.swap(0, Ordering::Relaxed)
        }

        /// What a driver does before it waits for keys.
        fn listen(&self, command_byte: u8) {
            self.command(0x60).data(command_byte);
            self.data(0xf4);
            assert_eq!(self.read(), [0xfa]);
            self.interrupts();
        }
    }

    #[test]
    fn the_reset_command_and_nothing_else_resets() {
        let driver = Driver::new();
        for (offset, data) in [(0, &[0xfe][..]), (4, &[0xaa]), (4, &[0xfe, 0]), (4, &[])] {
            driver.controller.write(offset, data);
            assert_eq!(driver.events.take(), [], "{offset} {data:?}");
        }
        driver.command(0xfe);
        assert_eq!(driver.events.take(), [MachineEvent::Reset]);
    }

    #[test]
    fn a_driver_finds_a_keyboard_and_no_mouse() {
        let driver = Driver::new();
        assert!(driver.read().is_empty(), "nothing to flush");
        for (command, answer) in
            [(0xaa, &[0x55][..]), (0xab, &[0]), (0x20, &[0x64]), (0xa9, &[1]), (0xa8, &[])]
        {
            assert_eq!(driver.command(command).read(), answer, "{command:#x}");
        }
        assert_eq!(driver.command(0x60).data(0x05).command(0x20).read(), [0x25], "and the mouse stays off");
        assert_eq!(driver.command(0xd3).data(0x5a).read(), [0x5a]);
        for (byte, answer) in
            [(0xf2, &[0xfa, 0xab, 0x83][..]), (0xff, &[0xfa, 0xaa]), (0xee, &[0xee]), (0x12, &[0xfe])]
        {
            assert_eq!(driver.data(byte).read(), answer, "{byte:#x}");
        }
        for (byte, parameter, answer) in
            [(0xed, 0xf2, &[0xfa][..]), (0xf0, 0, &[0xfa, 2]), (0xf3, 0xff, &[0xfa])]
        {
            assert_eq!(driver.data(byte).read(), [0xfa], "{byte:#x}");
            assert_eq!(driver.data(parameter).read(), answer, "{byte:#x}");
        }
    }

    #[test]
    fn keys_reach_a_driver_that_waits_for_them_with_an_interrupt_a_byte() {
        for (command_byte, keys) in [(0x45, CTRL_ALT_DEL[0]), (0x05, CTRL_ALT_DEL[1])] {
            let driver = Driver::new();
            let press = || driver.controller.press_ctrl_alt_del();
            press();
            assert!(driver.read().is_empty() && driver.interrupts() == 0, "nobody waits");
            driver.listen(command_byte);
            press();
            assert_eq!(driver.interrupts(), 1);
            assert_eq!(driver.read(), keys);
            assert_eq!(driver.interrupts() as usize, keys.len() - 1);
            driver.command(0xad);
            press();
            assert!(driver.command(0xae).read().is_empty(), "it was off");
            for command in [0xf5, 0xf2] {
                driver.data(command).read();
                press();
                assert!(driver.read().is_empty(), "it was told to be silent, or has been asked what it is");
                driver.data(0xf4).read();
                press();
                assert_eq!(driver.read(), keys);
            }
        }
    }

    #[test]
    fn an_interrupt_that_is_turned_on_late_comes() {
        let driver = Driver::new();
        driver.data(0xee);
        assert_eq!(driver.interrupts(), 0);
        driver.command(0x60).data(0x45);
        assert_eq!(driver.interrupts(), 1);
        driver.data(0xee);
        assert_eq!((driver.interrupts(), driver.read().len(), driver.interrupts()), (0, 2, 1));
    }

    #[test]
    fn what_is_never_read_is_bounded() {
        let driver = Driver::new();
        driver.listen(0x45);
        for _ in 0..1000 {
            driver.data(0xf2).command(0xaa);
            driver.controller.press_ctrl_alt_del();
        }
        assert!(driver.read().len() <= FIFO);
    }

    #[test]
    fn a_saved_keyboard_goes_on() {
        let driver = Driver::new();
        driver.listen(0x45);
        driver.controller.press_ctrl_alt_del();
        driver.command(0x60);
        let saved = driver.controller.save().expect("it is saved");
        let other = Driver::new();
        other.controller.restore(&saved).expect("it is restored");
        assert_eq!(other.data(0x25).read(), CTRL_ALT_DEL[0]);
        assert_eq!(other.command(0x20).read(), [0x25]);

        let long = KeyboardState { output: vec![0; FIFO + 1].into(), ..KeyboardState::default() };
        let saved = Saved::of(&long).expect("it has a form");
        assert!(other.controller.restore(&saved).is_err());
    }
}

//! Whole machines on the fake hypervisor: builder, buses, runner, state machine and errors, without KVM.

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use harness::micro::Micro;
use vmm_core::devices::registry::{DeviceConfig, Patch};
use vmm_core::devices::virtio::rng;
use vmm_core::hypervisor::VcpuFailure;
use vmm_core::hypervisor::fake::{FakeHypervisor, Step};
use vmm_core::{SnapshotKind, StopReason, Vm, VmConfig, VmError, VmState};

/// Only ends a hang.
const DEADLINE: Duration = Duration::from_secs(30);
const VIRTIO: u64 = 0xd000_0000;

/// A machine whose guest does `script`. The directory keeps its kernel, which nothing executes.
fn machine(script: Vec<Step>, change: impl FnOnce(&mut VmConfig)) -> (Vm, FakeHypervisor, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    Micro::new().reset().write(&kernel).unwrap();
    let mut config = VmConfig { kernel: Some(kernel), ..VmConfig::default() };
    change(&mut config);
    let hypervisor = FakeHypervisor::new(script);
    let vm = Vm::builder(config).hypervisor(Box::new(hypervisor.clone())).build().unwrap();
    (vm, hypervisor, dir)
}

fn ended(script: Vec<Step>) -> StopReason {
    let (vm, _, _dir) = machine(script, |_| ());
    vm.start().unwrap();
    vm.wait_timeout(DEADLINE).expect("the machine ends")
}

fn out(port: u16, byte: u8) -> Step {
    Step::Out(port, vec![byte])
}

#[test]
fn a_guest_ends_its_machine_in_every_way_it_can() {
    assert_eq!(ended(vec![out(0x64, 0xfe)]), StopReason::GuestReset);
    assert_eq!(ended(vec![Step::TripleFault]), StopReason::GuestReset);
    assert_eq!(ended(vec![out(0x602, 1)]), StopReason::GuestReset);
    assert_eq!(ended(vec![out(0x600, 5 << 2 | 1 << 5)]), StopReason::GuestPowerOff);
    assert_eq!(ended(vec![out(0x505, 1), Step::TripleFault]), StopReason::GuestPanic);
    assert_eq!(ended(vec![out(0x505, 1)]), StopReason::GuestPanic, "it does not hang after a panic either");
}

#[test]
fn the_kernels_last_words_count_as_a_panic() {
    let words = b"\n[    0.1] Kernel panic - not syncing: VFS\n";
    let mut script: Vec<Step> = words.iter().map(|&byte| out(0x3f8, byte)).collect();
    script.push(Step::TripleFault);
    assert_eq!(ended(script), StopReason::GuestPanic);
}

#[test]
fn a_program_that_prints_the_last_words_does_not_end_its_machine() {
    let words = b"Kernel panic - not syncing: just a log\n";
    let mut script: Vec<Step> = words.iter().map(|&byte| out(0x3f8, byte)).collect();
    script.push(out(0x600, 5 << 2 | 1 << 5));
    assert_eq!(ended(script), StopReason::GuestPowerOff);
}

#[test]
fn a_machine_whose_console_nobody_reads_can_be_paused_and_stopped() {
    let script = vec![Step::Out(0x3f8, vec![b'x'; 1]); 300 << 10];
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    Micro::new().reset().write(&kernel).unwrap();
    let config = VmConfig { kernel: Some(kernel), ..VmConfig::default() };
    let hypervisor = FakeHypervisor::new(script);
    let builder = Vm::builder(config).hypervisor(Box::new(hypervisor.clone()));
    let vm = builder.console_when_full(vmm_core::console::WhenFull::Wait).build().unwrap();
    vm.start().unwrap();
    while hypervisor.steps_done() < 256 << 10 {
        assert!(vm.wait_timeout(Duration::from_millis(5)).is_none());
    }
    vm.pause().unwrap();
    vm.resume().unwrap();
    assert!(hypervisor.steps_done() < 300 << 10, "the guest waits for a reader");
    vm.kill();
    assert_eq!(vm.wait(), StopReason::Requested);
}

#[test]
fn the_console_does_not_empty_a_disk_nor_a_file_of_a_machine_that_is_not_built() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    Micro::new().reset().write(&path("kernel")).unwrap();
    std::fs::write(path("disk"), [7; 512]).unwrap();
    std::fs::write(path("log"), "old").unwrap();
    let config = VmConfig { kernel: Some(path("kernel")), ..VmConfig::default() };
    let disk = format!("path={}", path("disk").display());
    let disk = (vmm_core::devices::registry::KINDS[0].parse)(&disk).unwrap();
    let serial = |name: &str| format!("file={}", path(name).display()).parse().unwrap();
    let build =
        |config: VmConfig| Vm::builder(config).hypervisor(Box::new(FakeHypervisor::default())).build();
    let clash = VmConfig { devices: vec![disk], serial: serial("disk"), ..config.clone() };
    assert!(build(clash).err().unwrap().to_string().contains("in use"));
    assert_eq!(std::fs::read(path("disk")).unwrap(), [7; 512]);
    // With the device's parameters the command line is too long, which shows late.
    let devices = vec![DeviceConfig::Rng(rng::Config::default())];
    let long = VmConfig { append: Some("x".repeat(1990)), devices, serial: serial("log"), ..config.clone() };
    assert!(build(long).err().unwrap().to_string().contains("command line"));
    assert_eq!(std::fs::read(path("log")).unwrap(), b"old");
    build(VmConfig { serial: serial("log"), ..config }).unwrap();
    assert_eq!(std::fs::read(path("log")).unwrap(), b"");
}

#[test]
fn a_kernel_file_that_promises_too_much_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kernel");
    let elf = Micro::new().reset().elf();
    // Offset of a field in the first and second program header.
    for (at, value) in [(64 + 0x20, u64::MAX), (64 + 56 + 0x20, 1 << 40), (0x38, 0xffff)] {
        let mut bytes = elf.clone();
        bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
        std::fs::write(&path, bytes).unwrap();
        let config = VmConfig { kernel: Some(path.clone()), ..VmConfig::default() };
        let built = Vm::builder(config).hypervisor(Box::new(FakeHypervisor::default())).build();
        assert!(built.err().unwrap().to_string().contains("damaged"), "{at:#x}");
    }
}

#[test]
fn a_failing_vcpu_and_a_bug_are_told_apart() {
    let failure = VcpuFailure::Emulation { rip: 0x1000, bytes: vec![0x0f, 0xa2], cpl: 0, long_mode: true };
    let StopReason::Failed(why) = ended(vec![Step::Fail(failure)]) else { panic!("it failed") };
    assert!(why.contains("'cpuid' (0f a2) at 0x1000 on vCPU 0"), "{why}");
    let StopReason::Failed(why) = ended(vec![Step::Panic]) else { panic!("it failed") };
    assert!(why.contains("the thread of vCPU 0 panicked"), "{why}");
}

#[test]
fn only_legal_transitions_succeed() {
    let (vm, _, _dir) = machine(vec![], |_| ());
    assert_eq!(vm.state(), VmState::Created);
    assert!(vm.pause().is_err());
    assert!(vm.resume().is_err());
    vm.start().unwrap();
    assert!(vm.start().is_err());
    assert!(vm.resume().is_err());
    for _ in 0..20 {
        vm.pause().unwrap();
        assert_eq!(vm.state(), VmState::Paused);
        assert!(vm.pause().is_err());
        vm.resume().unwrap();
        assert_eq!(vm.state(), VmState::Running);
    }
    vm.pause().unwrap();
    vm.kill();
    assert_eq!(vm.state(), VmState::Stopped(StopReason::Requested));
    assert!(vm.start().is_err());
    vm.kill();
}

#[test]
fn a_machine_that_never_ran_can_be_stopped_or_dropped() {
    let (vm, _, _dir) = machine(vec![], |config| config.cpus = 4);
    vm.kill();
    assert_eq!(vm.wait(), StopReason::Requested);
    drop(machine(vec![], |config| config.devices = vec![DeviceConfig::Rng(rng::Config::default())]));
}

#[test]
fn every_vcpu_is_made_and_only_the_first_has_an_entry() {
    let (vm, hypervisor, _dir) = machine(vec![], |config| config.cpus = 32);
    vm.start().unwrap();
    vm.kill();
    hypervisor.observed(|seen| {
        assert_eq!(seen.vcpus, 32);
        assert_eq!(seen.boot_regs.map(|regs| regs.rip), Some(0x10_0000));
    });
}

#[test]
fn the_console_is_taken_once_and_read_in_order() {
    let script = vec![out(0x3f8, b'a'), Step::Out(0x3f8, b"b".to_vec()), Step::TripleFault];
    let (vm, _, _dir) = machine(script, |_| ());
    let mut console = vm.take_console().unwrap();
    assert!(vm.take_console().is_none());
    vm.start().unwrap();
    let mut text = String::new();
    console.read_to_string(&mut text).unwrap();
    assert_eq!(text, "ab");
}

#[test]
fn input_reaches_a_guest_that_listens_and_a_stopped_machine_takes_none() {
    // OUT2 on, receive interrupt on; the byte is there when the line status says so.
    let script = vec![out(0x3fc, 8), out(0x3f9, 1), Step::In(0x3fd, 1), Step::In(0x3f8, 1)];
    let (vm, hypervisor, _dir) = machine(script, |_| ());
    vm.console_input().write_all(b"x").unwrap();
    vm.start().unwrap();
    while hypervisor.steps_done() < 4 {
        assert!(vm.wait_timeout(Duration::from_millis(5)).is_none());
    }
    vm.kill();
    hypervisor.observed(|seen| assert_eq!((seen.reads[0][0] & 1, &seen.reads[1][..]), (1, &b"x"[..])));
    assert!(vm.console_input().write_all(b"y").is_err());
}

/// Register writes that start a device with one queue of 8 at 0x20_0000.
fn activate(queue_at: u32) -> Vec<Step> {
    let write = |offset: u64, value: u32| Step::Write(VIRTIO + offset, value.to_le_bytes().to_vec());
    let mut script = vec![write(0x70, 0), write(0x70, 1), write(0x70, 3), write(0x24, 1), write(0x20, 1)];
    script.extend([write(0x70, 11), write(0x30, 0), write(0x38, 8)]);
    for (offset, addr) in [(0x80, queue_at), (0x90, queue_at + 0x1000), (0xa0, queue_at + 0x2000)] {
        script.push(write(offset, addr));
    }
    script.extend([write(0x44, 1), write(0x70, 15)]);
    script
}

fn rng_machine(script: Vec<Step>) -> (Vm, FakeHypervisor, tempfile::TempDir) {
    machine(script, |config| config.devices = vec![DeviceConfig::Rng(rng::Config::default())])
}

#[test]
fn a_request_goes_through_transport_runner_and_interrupt() {
    let queue = 0x20_0000;
    let mut script = activate(queue);
    // One writable descriptor of 16 bytes at 0x21_0000, made available; then the notification.
    let descriptor = [&0x21_0000u64.to_le_bytes()[..], &16u32.to_le_bytes(), &[2, 0, 0, 0]].concat();
    script.push(Step::Poke(queue.into(), descriptor));
    script.push(Step::Poke(u64::from(queue) + 0x1000, vec![0, 0, 1, 0, 0, 0]));
    script.push(Step::Write(VIRTIO + 0x50, vec![0; 4]));
    let (vm, hypervisor, _dir) = rng_machine(script);
    vm.start().unwrap();
    while hypervisor.observed(|seen| seen.interrupts.is_empty()) {
        assert!(vm.wait_timeout(Duration::from_millis(5)).is_none());
    }
    vm.kill();
    hypervisor.observed(|seen| assert_eq!(seen.interrupts, [5]));
}

#[test]
fn a_device_with_a_broken_queue_asks_for_a_reset_and_works_after_it() {
    // The queue lies outside the 256 MiB of RAM.
    let mut script = activate(0xb000_0000);
    script.push(Step::Read(VIRTIO + 0x70, 4));
    script.extend(activate(0x20_0000));
    script.push(Step::Read(VIRTIO + 0x70, 4));
    let steps = script.len() as u64;
    let (vm, hypervisor, _dir) = rng_machine(script);
    vm.start().unwrap();
    while hypervisor.steps_done() < steps {
        assert!(vm.wait_timeout(Duration::from_millis(5)).is_none());
    }
    vm.kill();
    hypervisor.observed(|seen| {
        let status: Vec<u8> = seen.reads.iter().map(|read| read[0]).collect();
        assert_eq!(status, [0x4f, 0x0f], "DEVICE_NEEDS_RESET, then a working device");
    });
}

#[test]
fn a_limit_that_is_lifted_while_the_machine_runs_lets_the_waiting_go_on() {
    let queue = 0x20_0000;
    let mut script = activate(queue);
    // Two requests of 16 bytes each; the bucket owes an hour after the first.
    for index in 0..2u64 {
        let descriptor = [&0x21_0000u64.to_le_bytes()[..], &16u32.to_le_bytes(), &[2, 0, 0, 0]].concat();
        script.push(Step::Poke(u64::from(queue) + 16 * index, descriptor));
    }
    script.push(Step::Poke(u64::from(queue) + 0x1000, vec![0, 0, 2, 0, 0, 0, 1, 0]));
    script.push(Step::Write(VIRTIO + 0x50, vec![0; 4]));
    let (vm, _, _dir) = machine(script, |config| {
        let rng = rng::Config { ops: "1/3600s".parse().ok(), ..Default::default() };
        config.devices = vec![DeviceConfig::Rng(rng)];
    });
    vm.start().unwrap();
    let counter = |name: &str| {
        let all = vm.devices()[0].counters.all();
        all.into_iter().find_map(|(known, value)| (known == name).then_some(value)).unwrap()
    };
    while counter("throttled") == 0 {
        assert!(vm.wait_timeout(Duration::from_millis(5)).is_none());
    }
    assert_eq!(counter("requests"), 1);
    let patch = |key: &str, value: serde_json::Value| Patch::from_iter([(key.to_owned(), value)]);
    for (name, patch, want) in [
        ("disk0", patch("ops", "1/1s".into()), "there is no device 'disk0'; there are rng0"),
        ("rng0", patch("ops", "soon".into()), "'soon' is not a limit"),
        ("rng0", patch("kind", "disk".into()), "rng: "),
    ] {
        let error = vm.update(name, patch).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    assert_eq!(counter("requests"), 1);
    vm.update("rng0", patch("ops", serde_json::Value::Null)).unwrap();
    while counter("requests") < 2 {
        assert!(vm.wait_timeout(Duration::from_millis(5)).is_none());
    }
    assert_eq!(vm.config().devices, [DeviceConfig::Rng(rng::Config::default())]);
}

#[test]
fn what_cannot_be_built_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let big = Micro::new().raw(&vec![0x90; 5 << 20]).elf();
    let kernel = file("kernel", &Micro::new().reset().elf());
    let plain = VmConfig { kernel: Some(kernel), ..VmConfig::default() };
    let with_kernel = |path: PathBuf| VmConfig { kernel: Some(path), ..plain.clone() };
    let initrd =
        |path: PathBuf| VmConfig { initrd: Some(path), memory: "4M".parse().unwrap(), ..plain.clone() };
    let cases = [
        (with_kernel(dir.path().join("none")), "no such file; name another file"),
        (with_kernel(dir.path().into()), "not a regular file"),
        (with_kernel(file("empty", b"")), "it is neither an ELF vmlinux nor a bzImage"),
        (with_kernel(file("gz", b"\x1f\x8b\x08")), "it is gzip data; decompress it first"),
        (with_kernel(file("nothing", &Micro::new().elf())), "nothing to load above 1 MiB"),
        (with_kernel(file("elf32", b"\x7fELF\x01\x01")), "not for x86-64"),
        (VmConfig { memory: "4M".parse().unwrap(), ..with_kernel(file("big", &big)) }, "give the guest more"),
        (initrd(file("initrd", &vec![1; 4 << 20])), "give the guest more"),
        (initrd(file("empty-initrd", b"")), "the file is empty"),
    ];
    for (config, want) in cases {
        let what = format!("{:?} {:?}", config.kernel, config.initrd);
        let built = Vm::builder(config).hypervisor(Box::new(FakeHypervisor::default())).build();
        let error = built.err().unwrap_or_else(|| panic!("{what} is refused")).to_string();
        assert!(error.contains(want) && !error.contains('\n'), "{error}");
    }
}

#[test]
fn a_machine_tells_what_happens_to_it() {
    use vmm_core::event::What;
    let (vm, _, _dir) = machine(vec![out(0x505, 1), out(0x600, 5 << 2 | 1 << 5)], |_| ());
    let live = std::thread::spawn({
        let events = vm.events();
        move || events.collect::<Vec<_>>()
    });
    vm.start().unwrap();
    assert_eq!(vm.wait(), StopReason::GuestPanic);
    let events: Vec<_> = vm.events().collect();
    assert_eq!(live.join().unwrap(), events);
    let position = |what: What| events.iter().position(|event| event.what == what).expect("it happened");
    let states =
        [VmState::Created, VmState::Running, VmState::Stopping, VmState::Stopped(StopReason::GuestPanic)];
    let states = states.map(|state| position(What::State(state)));
    assert!(states.is_sorted(), "{events:?}");
    assert!((states[1]..states[2]).contains(&position(What::GuestPanic)), "{events:?}");
    assert_eq!(states[3], events.len() - 1);
}

#[test]
fn exits_are_counted_and_traced() {
    use vmm_core::exits::{ExitCause, ExitCount};
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    Micro::new().reset().write(&kernel).unwrap();
    let script = vec![out(0x80, 1), out(0x80, 2), Step::TripleFault];
    let builder = Vm::builder(VmConfig { kernel: Some(kernel), ..VmConfig::default() });
    let vm = builder.hypervisor(Box::new(FakeHypervisor::new(script))).trace_exits(true).build().unwrap();
    assert!(vm.usage().unwrap().memory > 0, "the kernel is in memory");
    vm.start().unwrap();
    vm.wait();
    let entry = |cause, address, count| ExitCount { cause, address, count };
    let entries = [entry(ExitCause::PortWrite, Some(0x80), 2), entry(ExitCause::End, None, 1)];
    assert_eq!(vm.exits(), [entries]);
    assert!(vm.usage().is_err());
}

#[test]
fn a_guest_that_does_not_listen_to_the_power_button_is_killed_at_the_deadline() {
    let (vm, _, _dir) = machine(vec![], |_| ());
    vm.start().unwrap();
    assert_eq!(vm.stop(Duration::from_millis(20)), StopReason::Requested);
    assert_eq!(vm.stop(DEADLINE), StopReason::Requested);
    // The first of several deadlines counts, and one that no clock can say is none.
    let (vm, _, _dir) = machine(vec![], |_| ());
    vm.start().unwrap();
    [Duration::MAX, Duration::from_millis(20), DEADLINE].into_iter().for_each(|it| vm.request_stop(it));
    assert_eq!(vm.wait(), StopReason::Requested);
}

#[test]
fn a_machine_that_is_killed_while_it_is_saved_ends_and_leaves_no_draft() {
    // Enough that it takes a while.
    let script = vec![Step::Poke(16 << 20, vec![7; 96 << 20])];
    let (vm, hypervisor, dir) = machine(script, |_| ());
    vm.start().unwrap();
    while hypervisor.steps_done() == 0 {
        std::thread::yield_now();
    }
    let place = dir.path().join("saved");
    std::thread::scope(|scope| {
        let saving = scope.spawn(|| vm.snapshot(&place, SnapshotKind::Full));
        let is_draft = |entry: std::fs::DirEntry| {
            std::fs::metadata(entry.path().join("memory")).is_ok_and(|memory| memory.blocks() > 0)
        };
        while !std::fs::read_dir(dir.path()).unwrap().flatten().any(is_draft) && !saving.is_finished() {
            std::thread::yield_now();
        }
        vm.kill();
        assert_eq!(vm.wait_timeout(DEADLINE), Some(StopReason::Requested));
        let saved = saving.join().unwrap();
        assert!(matches!(saved, Ok(_) | Err(VmError::Gone)), "{saved:?}");
        let names = std::fs::read_dir(dir.path()).unwrap().flatten().map(|entry| entry.file_name());
        let mut names: Vec<_> = names.collect();
        names.sort();
        let want: &[&str] = if saved.is_ok() { &["kernel", "saved"] } else { &["kernel"] };
        assert_eq!(names, want);
    });
}

#[test]
fn a_paused_machine_that_is_stopped_while_it_is_saved_is_saved_and_two_to_one_place_are_refused() {
    let script = vec![Step::Poke(16 << 20, vec![7; 96 << 20])];
    let (vm, hypervisor, dir) = machine(script, |_| ());
    vm.start().unwrap();
    while hypervisor.steps_done() == 0 {
        std::thread::yield_now();
    }
    vm.pause().unwrap();
    let place = dir.path().join("saved");
    let save_and = |meanwhile: &dyn Fn()| {
        std::thread::scope(|scope| {
            let saving = scope.spawn(|| vm.snapshot(&place, SnapshotKind::Full));
            while !vm.is_saving() && !saving.is_finished() {
                std::thread::yield_now();
            }
            meanwhile();
            saving.join().unwrap().expect("the machine is in it");
        });
    };
    let refused = std::cell::Cell::new(false);
    // The other one may come late.
    (0..20).take_while(|_| !refused.get()).for_each(|_| {
        save_and(&|| match vm.snapshot(&place, SnapshotKind::Full) {
            Ok(_) => {}
            Err(error) => refused.set(error.to_string().ends_with("is being made already")),
        });
    });
    assert!(refused.get());
    save_and(&|| {
        vm.request_stop(DEADLINE);
        assert_eq!(vm.wait_timeout(DEADLINE), Some(StopReason::Requested));
    });
    vmm_core::Snapshot::open(&place).unwrap();
}

#[test]
fn a_guest_that_is_to_stop_is_asked_until_it_does() {
    let (vm, hypervisor, _dir) = machine(vec![], |_| ());
    vm.start().unwrap();
    vm.request_stop(DEADLINE);
    let presses = || hypervisor.observed(|seen| seen.interrupts.len());
    while presses() < 3 {
        assert!(vm.wait_timeout(Duration::from_millis(5)).is_none(), "{} times", presses());
    }
    // Who stands still is not asked, and later he is.
    vm.pause().unwrap();
    let paused = presses();
    assert!(vm.wait_timeout(Duration::from_millis(1500)).is_none());
    assert_eq!(presses(), paused);
    vm.resume().unwrap();
    while presses() == paused {
        assert!(vm.wait_timeout(Duration::from_millis(5)).is_none());
    }
    vm.kill();
}

#[test]
fn a_vcpu_with_something_under_way_runs_on_until_it_is_done() {
    let paused = |times| {
        let (vm, hypervisor, _dir) = machine(vec![], |_| ());
        hypervisor.set_unfinished(times);
        vm.start().unwrap();
        vm.pause().unwrap();
        hypervisor.unfinished()
    };
    assert_eq!([1, 20].map(paused), [0, 0]);
    // What is never done keeps nobody waiting.
    assert!((1..u32::MAX).contains(&paused(u32::MAX)));
}

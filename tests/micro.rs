//! Micro guests: a few bytes of machine code on real KVM that poke one device and report.

use anyhow::{Context, Result};
use harness::micro::Micro;
use harness::{Guest, Kernel, Run};
use serde_json::{Value, json};

const VIRTIO: u32 = 0xd000_0000;

fn run(guest: Micro) -> Result<Run> {
    Guest::new().kernel(Kernel::micro(&guest)?).arg("--memory").arg("16M").run()
}

/// What the guest printed, as bytes.
fn printed(guest: Micro) -> Result<Vec<u8>> {
    let run = run(guest.print("end").reset())?;
    run.ok()?;
    let bytes = run.output;
    anyhow::ensure!(bytes.ends_with(b"end"), "the guest did not come to its end: {bytes:?}");
    Ok(bytes[..bytes.len() - 3].to_vec())
}

#[test]
fn both_entries_reach_the_first_instruction() -> Result<()> {
    assert_eq!(printed(Micro::new().print("pvh"))?, b"pvh");
    assert_eq!(printed(Micro::new().linux_entry().print("linux"))?, b"linux");
    Ok(())
}

#[test]
fn a_triple_fault_ends_with_status_0() -> Result<()> {
    run(Micro::new().print("x").triple_fault())?.ok()?.expect_text("x")?;
    Ok(())
}

#[test]
fn pvpanic_ends_with_status_3() -> Result<()> {
    assert_eq!(printed(Micro::new().print_in8(0x505))?[0] & 1, 1, "the guest sees that it may report");
    run(Micro::new().out8(0x505, 1).triple_fault())?.status(3)?;
    Ok(())
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_named() -> Result<()> {
    // A call into the MMIO gap: no KVM executes what lies there.
    let guest = Micro::new().eax(0xfd00_0000).raw(&[0xff, 0xe0]); // jmp eax
    let run = run(guest)?;
    run.status(1)?;
    assert!(run.stderr.contains("0xfd000000 on vCPU 0"), "{}", run.stderr);
    assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
    Ok(())
}

#[test]
fn addresses_without_a_device_read_as_ones_and_swallow_writes() -> Result<()> {
    let guest = Micro::new()
        .out32(0x9999, 7)
        .print_in8(0x9999)
        .write32(0xe000_0000, 7)
        .print_read32(0xe000_0000)
        .print_read8(0xe000_0001);
    assert_eq!(printed(guest)?, [0xff; 6]);
    Ok(())
}

#[test]
fn the_virtio_registers_answer_by_the_book() -> Result<()> {
    let guest = Micro::new()
        .print_read32(VIRTIO)
        .print_read32(VIRTIO + 4)
        .print_read32(VIRTIO + 8)
        // Narrow and unaligned reads of registers are no reads.
        .print_read8(VIRTIO)
        .print_read32(VIRTIO + 2)
        // States cannot be skipped: DRIVER_OK alone is not taken.
        .write32(VIRTIO + 0x70, 4)
        .print_read32(VIRTIO + 0x70)
        .write32(VIRTIO + 0x70, 3)
        .print_read32(VIRTIO + 0x70);
    let want = [&b"virt"[..], &[2, 0, 0, 0], &[4, 0, 0, 0], &[0; 5], &[0; 4], &[3, 0, 0, 0]].concat();
    assert_eq!(printed(guest)?, want);
    Ok(())
}

/// Starts the entropy device with one queue of 8 at `queue`.
fn activate(guest: Micro, queue: u32) -> Micro {
    let mut guest = guest.write32(VIRTIO + 0x70, 0);
    for (offset, value) in [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x30, 0), (0x38, 8)] {
        guest = guest.write32(VIRTIO + offset, value);
    }
    for (offset, addr) in [(0x80, queue), (0x90, queue + 0x1000), (0xa0, queue + 0x2000)] {
        guest = guest.write32(VIRTIO + offset, addr);
    }
    guest.write32(VIRTIO + 0x44, 1).write32(VIRTIO + 0x70, 15)
}

/// Makes descriptor `index` available as the `nth` request, of `len` bytes at `addr`, and kicks.
fn request(guest: Micro, queue: u32, nth: u16, addr: u32, len: u32) -> Micro {
    let avail = queue + 0x1000;
    guest
        .write32(queue, addr)
        .write32(queue + 4, 0)
        .write32(queue + 8, len)
        .write32(queue + 12, 2) // VIRTQ_DESC_F_WRITE
        .write16(avail + 4 + 2 * u32::from(nth), 0)
        .write16(avail + 2, nth + 1)
        .write32(VIRTIO + 0x50, 0)
        .wait16(queue + 0x2002, nth + 1)
}

#[test]
fn a_request_is_served_through_ioeventfd_and_runner() -> Result<()> {
    let (queue, buffer) = (0x20_0000, 0x30_0000);
    let mut guest = request(activate(Micro::new(), queue), queue, 0, buffer, 64);
    guest = guest.print_read32(queue + 0x2008); // used.ring[0].len
    guest = request(guest, queue, 1, buffer + 64, 8).print_read32(queue + 0x2010);
    for word in 0..16 {
        guest = guest.print_read32(buffer + 4 * word);
    }
    let bytes = printed(guest)?;
    assert_eq!(bytes[..8], [64, 0, 0, 0, 8, 0, 0, 0]);
    let mut entropy = bytes[8..].to_vec();
    entropy.sort_unstable();
    entropy.dedup();
    assert!(entropy.len() > 16, "64 random bytes: {bytes:?}");
    Ok(())
}

#[test]
fn a_queue_outside_memory_makes_the_device_need_a_reset_and_nothing_else() -> Result<()> {
    let broken = activate(Micro::new(), 0xb000_0000).print_read32(VIRTIO + 0x70);
    let (queue, buffer) = (0x20_0000, 0x30_0000);
    let guest = activate(broken, queue).print_read32(VIRTIO + 0x70);
    let guest = request(guest, queue, 0, buffer, 4).print_read32(queue + 0x2008);
    assert_eq!(printed(guest)?, [0x4f, 0, 0, 0, 0x0f, 0, 0, 0, 4, 0, 0, 0]);
    Ok(())
}

#[test]
fn a_descriptor_outside_memory_is_given_back_unused() -> Result<()> {
    let queue = 0x20_0000;
    let guest = request(activate(Micro::new(), queue), queue, 0, 0xb000_0000, 64);
    let guest = guest.print_read32(queue + 0x2008).print_read32(VIRTIO + 0x70);
    assert_eq!(printed(guest)?, [0, 0, 0, 0, 0x0f, 0, 0, 0]);
    Ok(())
}

#[test]
fn a_flood_of_resets_is_survived() -> Result<()> {
    // mov ecx, 20000; again: mov [edi], ebx; dec ecx; jnz again — one exit each, to the status register.
    let flood = [0xb9, 0x20, 0x4e, 0, 0, 0x89, 0x1f, 0xff, 0xc9, 0x75, 0xfa];
    let guest = Micro::new().write32(VIRTIO + 0x70, 0).raw(&[0x31, 0xdb]).raw(&flood);
    assert_eq!(printed(guest)?, b"");
    Ok(())
}

#[test]
fn a_flood_of_mistakes_is_a_few_lines_of_a_log_that_tells_all() -> Result<()> {
    // mov ecx, 20000; again: mov [edi], ebx; dec ecx; jnz again — to a register that does not exist.
    let flood = [0xb9, 0x20, 0x4e, 0, 0, 0x89, 0x1f, 0xff, 0xc9, 0x75, 0xfa];
    let guest = Micro::new().write32(VIRTIO + 0x18, 0).raw(&[0x31, 0xdb]).raw(&flood).print("done").reset();
    let run = Guest::new().kernel(Kernel::micro(&guest)?).arg("-vv").run()?;
    run.ok()?.expect_text("done")?;
    let lines = run.stderr.lines().filter(|line| line.contains("register that does not exist")).count();
    // A few at once, and then one in ten seconds.
    assert!((1..100).contains(&lines), "{lines} lines, such as {:?}", run.stderr.lines().last());
    Ok(())
}

#[test]
fn every_log_line_of_a_machine_says_where_it_comes_from() -> Result<()> {
    let queue = 0x20_0000;
    let broken = activate(Micro::new(), queue)
        // More requests than the queue has room for.
        .write16(queue + 0x1002, 1000)
        .write32(VIRTIO + 0x50, 0)
        .write32(VIRTIO + 0x18, 0)
        .write32(VIRTIO + 0x70, 15)
        // again: mov eax, [edi]; test al, 0x40; jz again — until DEVICE_NEEDS_RESET.
        .raw(&[0x8b, 0x07, 0xa8, 0x40, 0x74, 0xfa]);
    let kernel = Kernel::micro(&broken.print("end").reset())?;
    let args = ["--no-balloon", "--log", "devices=debug,vmm_core=info", "--log-format", "json"];
    let run = args.into_iter().fold(Guest::new().kernel(kernel), |guest, arg| guest.arg(arg)).run()?;
    run.ok()?.expect_text("end")?;
    let lines: Vec<Value> = run.stderr.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let line = |text: &str| {
        let says = |line: &&Value| line["message"].as_str().is_some_and(|message| message.contains(text));
        lines.iter().find(says).with_context(|| format!("no line with '{text}': {}", run.stderr))
    };
    let span = |name: &str, id: &str| json!({ "name": name, "id": id });
    let vm = span("vm", "vmm");
    assert_eq!(line("kernel loaded")?["spans"], json!([vm]));
    assert_eq!(line("running")?["spans"], json!([vm, span("thread", "control")]));
    assert_eq!(line("first exit")?["spans"], json!([vm, span("thread", "vcpu0")]));
    let fault = line("broke a virtqueue")?;
    assert_eq!(fault["spans"], json!([vm, span("thread", "virtio"), span("device", "rng0")]));
    let odd = line("register that does not exist")?;
    assert_eq!((&odd["spans"], &odd["device"]), (&json!([vm, span("thread", "vcpu0")]), &json!("rng0")));
    Ok(())
}

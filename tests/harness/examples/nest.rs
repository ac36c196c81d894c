//! nest
use harness::{lab::Lab, *};
use std::time::*;
fn main() -> anyhow::Result<()> {
    let lab = Lab::shared()?;
    let t = Instant::now();
    let q = lab.provide("/work/scratch-lab/q.tar".as_ref())?;
    println!("q {:?}", t.elapsed());
    lab.shell(&format!("[ -d /scratch/q ] || tar xf {q} -C /scratch"))?.ok()?;
    let k = lab.provide(&debian::DebianKernel::prepare()?.vmlinuz)?;
    let i = lab.provide(&debian::initrd()?)?;
    let t = Instant::now();
    let d = lab.provide(&debian::rootfs()?)?;
    println!("rootfs up {:?}", t.elapsed());
    let t = Instant::now();
    lab.copy(&d, "/scratch/deb.ext4")?;
    println!("copy {:?}", t.elapsed());
    let sk = lab.provide("/work/kernels/standard-vmlinux".as_ref())?;
    let qemu = "cd /scratch/q; lib/ld-linux-x86-64.so.2 --library-path lib ./qemu-system-x86_64 -L share -M microvm,acpi=on -accel kvm -cpu host -m 512 -nodefaults -no-reboot -display none -serial stdio ";
    let t = Instant::now();
    let mut p =
        lab.spawn(&Program::shell(&format!("{qemu} -kernel {sk} -append 'console=ttyS0 panic=-1'")))?;
    p.expect("Kernel panic", Duration::from_secs(60))?;
    println!("standard to panic {:?}", t.elapsed());
    drop(p);
    let t = Instant::now();
    let mut p=lab.spawn(&Program::shell(&format!("{qemu} -smp 2 -kernel {k} -initrd {i} -append 'console=ttyS0 root=/dev/vda rw panic=-1' -device virtio-blk-device,drive=d -drive if=none,id=d,format=raw,file=/scratch/deb.ext4")))?;
    p.expect("systemd[1]", Duration::from_secs(200))?;
    println!("systemd {:?}", t.elapsed());
    p.expect("login:", Duration::from_secs(200))?;
    println!("login {:?}", t.elapsed());
    p.send("root\n")?;
    p.expect("~#", Duration::from_secs(200))?;
    println!("shell {:?}", t.elapsed());
    p.send("systemctl poweroff\n")?;
    println!("{}", p.wait(Duration::from_secs(200))?.exit);
    println!("off {:?}", t.elapsed());
    Ok(())
}

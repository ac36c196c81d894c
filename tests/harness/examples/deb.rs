//! deb
fn main() -> anyhow::Result<()> {
    let t = std::time::Instant::now();
    println!("{}", harness::debian::initrd()?.display());
    println!("{:?}", t.elapsed());
    println!("{}", harness::debian::rootfs()?.display());
    println!("{:?}", t.elapsed());
    println!("{}", harness::debian::DebianKernel::prepare()?.vmlinuz.display());
    println!("{:?}", t.elapsed());
    Ok(())
}

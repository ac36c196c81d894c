//! Builds guest images into the cache, or finds them there, and prints their paths:
//! `cargo run -p guest-images --example images -- [host|standard|ring3|demo]...`

use std::error::Error;
use std::process::ExitCode;

use guest_images::kernel::{self, Flavour};
use guest_images::{progress::Console, rootfs};

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("images: {error}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), Box<dyn Error>> {
    let mut progress = Console::new();
    for name in std::env::args().skip(1) {
        let flavour = match name.as_str() {
            "host" => Flavour::for_host(),
            "standard" => Flavour::Standard,
            "ring3" => Flavour::Ring3,
            "demo" => {
                println!("{}", rootfs::demo(&mut progress)?.display());
                continue;
            }
            _ => return Err(format!("'{name}' is none of host, standard, ring3, demo").into()),
        };
        let artefacts = kernel::build_or_cached(flavour, &mut progress)?;
        println!("{}", artefacts.vmlinux.display());
        if let Some(bzimage) = artefacts.bzimage {
            println!("{}", bzimage.display());
        }
    }
    Ok(())
}

//! Builds the guest's init, which the library carries as bytes: another profile (small, no unwinding) and other
//! flags (no libc, no start files) than the rest of the workspace, hence a cargo of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// A fixed address and nothing but ourselves in the file.
const RUSTFLAGS: &str = "-Ctarget-feature=+crt-static -Crelocation-model=static -Clink-arg=-nostartfiles \
                         -Clink-arg=-nostdlib -Clink-arg=-Wl,--build-id=none,-z,norelro,-z,noseparate-code";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=init");
    let manifest = Path::new(&variable("CARGO_MANIFEST_DIR")).join("init/Cargo.toml");
    let out = PathBuf::from(variable("OUT_DIR"));
    let target_directory = out.join("init-target");

    let mut cargo = Command::new(variable("CARGO"));
    // What the outer cargo or its caller chose (flags, wrappers such as clippy's, profiles) is not for the guest.
    for (name, _) in env::vars() {
        let kept = ["CARGO_HOME", "CARGO_NET_OFFLINE"].contains(&name.as_str());
        if (name.starts_with("CARGO") || name.starts_with("RUSTC_") || name == "RUSTFLAGS") && !kept {
            cargo.env_remove(name);
        }
    }
    cargo
        .args(["build", "--quiet", "--locked", "--release", "--target", TARGET, "--manifest-path"])
        .arg(manifest)
        .arg("--target-dir")
        .arg(&target_directory)
        .env("RUSTFLAGS", RUSTFLAGS)
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "z")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort");
    let status = cargo.status().expect("cargo starts");
    assert!(status.success(), "the guest's init does not build: {cargo:?}");

    let built = target_directory.join(TARGET).join("release/guest-init");
    fs::copy(&built, out.join("guest-init")).expect("the guest's init can be copied");
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"))
}

//! `cargo xtask public-api`: lists what the libraries have to offer, so that a change of it shows in review.
//!
//! The listings come from rustdoc's JSON, whose format belongs to a compiler: another one's is not read.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use harness::{binaries, command};

use crate::test::step;

/// The compiler whose JSON is read; a new one may take a new version of the crate `public-api`.
const COMPILER: &str = "1.95";
const LIBRARIES: [&str; 2] = ["vmm-core", "devices"];

/// List the public items of the libraries in docs/public-api
#[derive(clap::Args)]
pub struct PublicApi {
    /// Change nothing, and fail where a listing is not true any more
    #[arg(long)]
    check: bool,
}

impl PublicApi {
    /// Runs what was asked for.
    pub fn run(self) -> Result<ExitCode> {
        match self.check {
            true => check()?,
            false => {
                let cargo = cargo().with_context(|| missing("take"))?;
                for library in LIBRARIES {
                    let kept = kept(library);
                    fs::write(&kept, listing(cargo, library)?)?;
                    println!("{}", kept.display());
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Whether the listings are true; without the compiler nobody knows.
pub fn check() -> Result<()> {
    let Some(cargo) = cargo() else {
        step(&format!("public API: SKIPPED, {}", missing("takes")));
        return Ok(());
    };
    step("public API");
    for library in LIBRARIES {
        let kept = kept(library);
        let listed = fs::read_to_string(&kept).with_context(|| format!("read {}", kept.display()))?;
        let now = listing(cargo, library)?;
        if listed != now {
            let only = |text: &str, other: &str, sign| {
                let lines = text.lines().filter(|line| !other.lines().any(|kept| kept == *line));
                lines.map(|line| format!("{sign} {line}\n")).collect::<String>()
            };
            print!("{}{}", only(&listed, &now, '-'), only(&now, &listed, '+'));
            bail!("{library} offers something else than {} says; run cargo xtask public-api", kept.display());
        }
    }
    Ok(())
}

fn missing(takes: &str) -> String {
    format!("it {takes} Rust {COMPILER} (rustup toolchain install {COMPILER}.0)")
}

fn kept(library: &str) -> PathBuf {
    binaries::workspace().join(format!("docs/public-api/{library}.txt"))
}

/// How cargo of the right compiler is called.
fn cargo() -> Option<&'static str> {
    let wanted = format!("cargo {COMPILER}.");
    ["cargo", "cargo +1.95.0"].into_iter().find(|cargo| {
        let mut version = command::words(&format!("{cargo} --version"));
        version.env_remove("RUSTUP_TOOLCHAIN");
        command::output(&mut version).is_ok_and(|version| version.starts_with(&wanted))
    })
}

fn listing(cargo: &str, library: &str) -> Result<String> {
    // Of its own, since what the environment allows is part of what else would be built again.
    let target = binaries::target_dir().join("public-api");
    let mut rustdoc = command::words(&format!("{cargo} rustdoc --quiet --lib --package {library}"));
    rustdoc.arg("--target-dir").arg(&target).args(["--", "-Zunstable-options", "--output-format=json"]);
    // The JSON is for nightly compilers, unless one says that one knows what one does.
    rustdoc.env("RUSTC_BOOTSTRAP", "1").env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO");
    rustdoc.current_dir(binaries::workspace());
    ensure!(rustdoc.status().context("cannot run cargo")?.success(), "{library} cannot be documented");
    let json = target.join("doc").join(library.replace('-', "_") + ".json");
    let api = public_api::Builder::from_rustdoc_json(json)
        .omit_blanket_impls(true)
        .omit_auto_trait_impls(true)
        .omit_auto_derived_impls(true)
        .build()?;
    Ok(api.to_string())
}

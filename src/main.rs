//! The command `vmm`.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    // `--timings` counts from here.
    let start = Instant::now();
    vmm::cli::main(start).into()
}

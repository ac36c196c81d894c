//! The project's commands, run as `cargo xtask COMMAND`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod demo;
mod fuzz;
mod golden;
mod images;
mod lab;
mod public_api;
mod runner;
mod test;

/// The project's commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Bench(bench::Bench),
    Demo(demo::Demo),
    Fuzz(fuzz::Fuzz),
    Golden(golden::Golden),
    Test(test::Test),
    Lab(lab::Lab),
    Images(images::Images),
    PublicApi(public_api::PublicApi),
}

fn main() -> ExitCode {
    let done: Result<ExitCode> = match Arguments::parse().command {
        Command::Bench(bench) => bench.run(),
        Command::Demo(demo) => demo.run(),
        Command::Fuzz(fuzz) => fuzz.run(),
        Command::Golden(golden) => golden.run(),
        Command::Test(test) => test.run(),
        Command::Lab(lab) => lab.run(),
        Command::Images(images) => images.run(),
        Command::PublicApi(listing) => listing.run(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

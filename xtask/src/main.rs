//! Builds, runs, tests and packs Plinth: `cargo xtask ...`.
//!
//! Each subcommand is a module with its own `Args` and a `run` function that returns the
//! process's exit [`Code`]. Long work shows its progress through [`progress::Step`], and
//! everything that is made or fetched lives under `target/`.

mod apt;
mod bench;
mod check_config;
mod check_hw;
mod clean;
mod ctl;
mod deps;
mod emulator;
mod exit;
mod guests;
mod image;
mod initramfs;
mod lint;
mod paths;
mod process;
mod progress;
mod run;
mod sched_sim;
mod stub;
mod svg;
mod table;
mod terminal;
mod test;
mod toolchain;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use exit::{Code, Stop};

/// Build, run, test and pack Plinth.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong arguments or configuration, \
                  3 a program is missing, 124 time limit."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(Box<run::Args>),
    Test(test::Args),
    Bench(bench::Args),
    SchedSim(sched_sim::Args),
    Lint(lint::Args),
    Image(image::Args),
    Ctl(ctl::Args),
    CheckHw(check_hw::Args),
    CheckConfig(check_config::Args),
    Clean(clean::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli.command) {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("error: {error:#}");
            Stop::code_of(&error).into()
        }
    }
}

fn run(command: &Command) -> anyhow::Result<Code> {
    process::end_children_on_signals()?;
    match command {
        Command::Run(args) => run::run(args),
        Command::Test(args) => test::run(args),
        Command::Bench(args) => bench::run(args),
        Command::SchedSim(args) => sched_sim::run(args),
        Command::Lint(args) => lint::run(args),
        Command::Image(args) => image::run(args),
        Command::Ctl(args) => Ok(ctl::run(args)),
        Command::CheckHw(args) => check_hw::run(args),
        Command::CheckConfig(args) => check_config::run(args),
        Command::Clean(args) => clean::run(args),
    }
}

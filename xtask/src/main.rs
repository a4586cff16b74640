//! The project's own commands. `cargo xtask --help` lists them.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod archive;
mod bench;
mod boot;
mod browser;
mod cpp;
mod deny;
mod drakvuf;
mod elsewhere;
mod events;
mod fuzz;
mod install;
mod recover;
mod report;
mod storm;
mod test;
mod tools;
mod trace;

/// hyperbp's own commands.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Bench(bench::Bench),
    Boot(boot::Boot),
    Drakvuf(drakvuf::Drakvuf),
    Fuzz(fuzz::Fuzz),
    Install(install::Install),
    Storm(storm::Storm),
    Recover(recover::Recover),
    Report(report::Report),
    Test(test::Test),
    Trace(trace::Trace),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Bench(bench) => bench.run(),
        Command::Boot(boot) => boot.run(),
        Command::Drakvuf(drakvuf) => drakvuf.run(),
        Command::Fuzz(fuzz) => fuzz.run(),
        Command::Install(install) => install.run(),
        Command::Storm(storm) => storm.run(),
        Command::Recover(recover) => recover.run(),
        Command::Report(report) => report.run(),
        Command::Test(test) => test.run(),
        Command::Trace(trace) => trace.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// The repository.
fn repo() -> PathBuf {
    let xtask = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().map(PathBuf::from).unwrap_or(xtask)
}

/// Where cargo, and we, put what is built.
fn target() -> PathBuf {
    let named = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    // Absolute, for what is built is also used from other directories.
    named.and_then(|dir| std::path::absolute(dir).ok()).unwrap_or_else(|| repo().join("target"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}

//! The project's own commands. `cargo xtask --help` lists them.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use hyperbp_lab::{repo, target};

mod archive;
mod balloon;
mod bench;
mod boot;
mod browser;
mod budgets;
mod check;
mod checks;
mod cpp;
mod deny;
mod docs;
mod domains;
mod drakvuf;
mod elsewhere;
mod events;
mod files;
mod fuzz;
mod guest;
mod hostile;
mod install;
mod pair;
mod recover;
mod report;
mod shell;
mod smartvmi;
mod steps;
mod storm;
mod test;
mod ticks;
mod tools;
mod trace;
mod waiting;

/// hyperbp's own commands.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Balloon(balloon::Balloon),
    Bench(Box<bench::Bench>),
    Boot(boot::Boot),
    Check(check::Check),
    Budgets(budgets::Budgets),
    CheckHostile(hostile::Hostile),
    Docs(docs::Docs),
    Domains(domains::Domains),
    Drakvuf(drakvuf::Drakvuf),
    Fuzz(fuzz::Fuzz),
    Install(install::Install),
    Smartvmi(smartvmi::Smartvmi),
    Storm(storm::Storm),
    Recover(recover::Recover),
    Report(report::Report),
    Test(test::Test),
    Trace(trace::Trace),
    Waiting(waiting::Waiting),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Balloon(balloon) => balloon.run(),
        Command::Bench(bench) => bench.run(),
        Command::Boot(boot) => boot.run(),
        Command::Check(check) => check.run(),
        Command::Budgets(budgets) => budgets.run(),
        Command::CheckHostile(hostile) => hostile.run(),
        Command::Docs(docs) => docs.run(),
        Command::Domains(domains) => domains.run(),
        Command::Drakvuf(drakvuf) => drakvuf.run(),
        Command::Fuzz(fuzz) => fuzz.run(),
        Command::Install(install) => install.run(),
        Command::Smartvmi(smartvmi) => smartvmi.run(),
        Command::Storm(storm) => storm.run(),
        Command::Recover(recover) => recover.run(),
        Command::Report(report) => report.run(),
        Command::Test(test) => test.run(),
        Command::Trace(trace) => trace.run(),
        Command::Waiting(waiting) => waiting.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
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

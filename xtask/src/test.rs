//! `cargo xtask test`

use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

/// Run every check that needs no emulator: formatting, lints, tests, documentation
#[derive(Debug, Args)]
pub(crate) struct Test {}

/// A name, and cargo's arguments.
const STEPS: &[(&str, &[&str])] = &[
    ("format", &["fmt", "--all", "--check"]),
    ("lint", &["clippy", "--all-targets", "--", "-D", "warnings"]),
    ("test", &["test"]),
];

impl Test {
    pub(crate) fn run(self) -> Result<()> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        for (name, arguments) in STEPS {
            eprintln!("== {name}: cargo {}", arguments.join(" "));
            let status = Command::new(&cargo).args(*arguments).current_dir(crate::repo()).status();
            if !status.context("cannot run cargo")?.success() {
                bail!("the step `{name}` failed");
            }
        }
        Ok(())
    }
}

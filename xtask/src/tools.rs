//! Programs of others that our commands need, installed by cargo into `target/tools`.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// A program on crates.io.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tool {
    name: &'static str,
    version: &'static str,
}

/// Builds the fuzz targets.
pub(crate) const CARGO_FUZZ: Tool = Tool { name: "cargo-fuzz", version: "0.13.2" };
/// Checks what we depend on.
pub(crate) const CARGO_DENY: Tool = Tool { name: "cargo-deny", version: "0.20.2" };

/// They are run for seconds and compiled for minutes: so without what makes programs fast, which these ask for.
const PROFILE: [(&str, &str); 3] = [
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16"),
    ("CARGO_PROFILE_RELEASE_LTO", "off"),
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0"),
];

impl Tool {
    /// Installs it if this version of it is not there, and returns where it is.
    pub(crate) fn install(self) -> Result<PathBuf> {
        let Self { name, version } = self;
        let root = crate::target().join("tools");
        let program = root.join("bin").join(name);
        if !program.exists() {
            eprintln!("== {name} {version}: installing it in {} (a minute, once)", root.display());
        }
        let mut command = cargo();
        command
            .args(["install", "--quiet", "--locked", "--root"])
            .arg(root)
            .arg(format!("{name}@{version}"))
            .envs(PROFILE);
        ensure!(command.status().context("cannot run cargo")?.success(), "cannot install {name} {version}");
        Ok(program)
    }
}

/// The cargo that runs us, in the repository.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(crate::repo());
    command
}

//! Licences, sources and known flaws of what we depend on.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::steps::Steps;
use crate::tools::CARGO_DENY;

/// The workspaces.
const MANIFESTS: [&str; 4] =
    ["Cargo.toml", "bench/guest/Cargo.toml", "bench/vmi-rs/Cargo.toml", "plugin/fuzz/Cargo.toml"];
/// What needs nothing but the manifests.
const CHECKS: [&str; 3] = ["bans", "licenses", "sources"];
/// What needs a database that is elsewhere.
const ADVISORIES: &str = "advisories";

/// Runs cargo-deny's checks, `advisories` only if its database can be had.
pub(crate) fn run(steps: &Steps) -> Result<()> {
    let program = steps.time("build of cargo-deny", || CARGO_DENY.install())?;
    let deny = |manifest: &str| {
        let mut command = Command::new(&program);
        command.current_dir(crate::repo()).args(["--log-level", "error", "--manifest-path", manifest]);
        command
    };
    let mut checks = CHECKS.to_vec();
    let fetched = deny(MANIFESTS[0]).args(["fetch", "db"]).output().context("cannot run cargo-deny")?;
    if fetched.status.success() {
        checks.push(ADVISORIES);
    } else {
        steps.skip(format!("cargo deny check {ADVISORIES} (the database of advisories cannot be fetched from here)"));
    }
    for manifest in MANIFESTS {
        eprintln!("== dependencies of {manifest}: cargo deny check {}", checks.join(" "));
        let mut command = deny(manifest);
        command.arg("check").args(&checks);
        // Which allowance one of the workspaces has no use for is of no interest.
        for lint in ["license-not-encountered", "license-exception-not-encountered"] {
            command.args(["--allow", lint]);
        }
        let status = command.status().context("cannot run cargo-deny")?;
        ensure!(status.success(), "the dependencies of {manifest} are not as deny.toml wants them");
    }
    Ok(())
}

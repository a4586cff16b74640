//! Shell scripts are as shellcheck wants them.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Where scripts are.
const DIRECTORIES: [&str; 7] =
    [".ci", ".cargo", "bench/lab/dom0", "bench/lab/linux", "cpp-shim/patches", "drakvuf-patches", "smartvmi-patches"];

/// Checks all of them. Those of the lab run in BusyBox's shell, which has EPOCHREALTIME.
pub(crate) fn check() -> Result<()> {
    let mut files = Vec::new();
    for directory in DIRECTORIES {
        crate::files::below(&crate::repo().join(directory), &is_script, &mut files)?;
    }
    files.sort();
    eprintln!("== shellcheck, {} scripts", files.len());
    let mut command = Command::new("shellcheck");
    command.args(["--shell=dash", "--severity=warning", "--exclude=SC3028"]).args(files).current_dir(crate::repo());
    ensure!(command.status().context("cannot run shellcheck")?.success(), "shellcheck has found something");
    Ok(())
}

/// Whether a file ends in .sh, or begins with the line of a shell.
fn is_script(path: &Path) -> Result<bool> {
    if path.extension().is_some_and(|extension| extension == "sh") {
        return Ok(true);
    }
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let first = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    Ok(first.starts_with(b"#!") && first.ends_with(b"sh"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_without_an_extension_are_found() {
        let mut files = Vec::new();
        let mut add = |directory| crate::files::below(&crate::repo().join(directory), &is_script, &mut files);
        DIRECTORIES.into_iter().try_for_each(&mut add).unwrap();
        for script in [".ci/run", ".cargo/cc", "bench/lab/dom0/init", "drakvuf-patches/apply.sh"] {
            assert!(files.contains(&crate::repo().join(script)), "{script}");
        }
        assert!(!files.iter().any(|file| file.extension().is_some_and(|extension| extension == "cfg")));
    }
}

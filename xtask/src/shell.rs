//! Shell scripts are as shellcheck wants them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Where scripts are.
const DIRECTORIES: [&str; 7] =
    [".ci", ".cargo", "bench/lab/dom0", "bench/lab/linux", "cpp-shim/patches", "drakvuf-patches", "smartvmi-patches"];

/// Checks all of them. Those of the lab run in BusyBox's shell, which has EPOCHREALTIME.
pub(crate) fn check() -> Result<()> {
    let mut files = Vec::new();
    for directory in DIRECTORIES {
        scripts(&crate::repo().join(directory), &mut files)?;
    }
    files.sort();
    eprintln!("== shellcheck, {} scripts", files.len());
    let mut command = Command::new("shellcheck");
    command.args(["--shell=dash", "--severity=warning", "--exclude=SC3028"]).args(files).current_dir(crate::repo());
    ensure!(command.status().context("cannot run shellcheck")?.success(), "shellcheck has found something");
    Ok(())
}

/// The scripts below a directory: what ends in .sh, or begins with the line of a shell.
fn scripts(directory: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            scripts(&path, into)?;
        } else if path.extension().is_some_and(|extension| extension == "sh") || has_shell(&path)? {
            into.push(path);
        }
    }
    Ok(())
}

fn has_shell(path: &Path) -> Result<bool> {
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
        DIRECTORIES.iter().try_for_each(|directory| scripts(&crate::repo().join(directory), &mut files)).unwrap();
        for script in [".ci/run", ".cargo/cc", "bench/lab/dom0/init", "drakvuf-patches/apply.sh"] {
            assert!(files.contains(&crate::repo().join(script)), "{script}");
        }
        assert!(!files.iter().any(|file| file.extension().is_some_and(|extension| extension == "cfg")));
    }
}

//! The benchmark's program for an operating system, as the Linux guest runs it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Error, Host, Inputs, Progress, Result, Stages};

/// Where its sources are, and a Makefile.
pub const SOURCES: &str = "bench/guest/program";
/// What that makes for Linux.
const PROGRAM: &str = "hyperbp-guest";

/// Builds it from the sources of the repository in `repo`.
///
/// # Errors
/// [`Error::Build`]; [`Error::Io`] when there are no sources.
pub fn build(host: &Host, repo: &Path, stages: &Stages, progress: &Progress) -> Result<PathBuf> {
    let sources = repo.join(SOURCES);
    let entries = fs::read_dir(&sources).map_err(Error::io("list", &sources))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    let mut inputs = Inputs::new();
    for file in &files {
        inputs = inputs.with_file(&file.file_name().unwrap_or_default().to_string_lossy(), file)?;
    }
    let dir = stages.build("guest-program", &inputs, progress, |dir, log, task| {
        task.doing("compiling");
        log.run(host.command("make").arg("-C").arg(&sources).arg(format!("BUILD={}", dir.display())).arg("linux"))
    })?;
    Ok(dir.join(PROGRAM))
}

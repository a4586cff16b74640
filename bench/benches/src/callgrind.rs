//! Instructions of the core, as valgrind's callgrind counts them: on any machine, and the same each time.
//!
//! callgrind collects in those functions that do one call of the engine, but not in what the engine calls of the hypervisor. It
//! dumps at the end of [`begin`] and of [`count`], which take turns: every second dump is one of what is to be counted. (Of several
//! options for the same function, it takes one.)

use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hyperbp_lab::{Host, Log, Progress, tools};

use crate::{Case, Scene, What};

/// How often what is counted happens.
const TIMES: u64 = 1000;

/// Debian's packages that this takes.
const TOOLS: &[&str] = &["valgrind"];

/// Functions, as callgrind knows them.
const MEASURED: [&str; 3] = ["answer", "insert", "remove"];
const HYPERVISOR: &str = "<hyperbp_benches::machine::Machine as *";
const DUMPS: [&str; 2] = ["begin", "count"];

/// What was done until now is not counted.
#[inline(never)]
pub fn begin() {
    black_box(());
}

/// What is counted.
///
/// # Errors
/// Those of [`Scene::time`].
#[inline(never)]
pub fn count(scene: &mut Scene, what: What) -> Result<(), hyperbp::Error> {
    scene.time(what, TIMES).map(drop)
}

/// Runs `program`, which is `hyperbp-hits`, under callgrind, and returns how many instructions each case takes, rounded up.
/// Installs valgrind if it is missing. `target` is where cargo puts what is built.
///
/// # Errors
/// If valgrind cannot be installed, or if it or the program fails.
pub fn measure(program: &Path, target: &Path, progress: &Progress) -> Result<Vec<(Case, u64)>> {
    let log = Log::create(&target.join("benches").join("tools.log"), "tools")?;
    tools::install(&Host::this(), TOOLS, progress, &log)?;
    let task = progress.start("callgrind");
    task.doing("counting the core's instructions");
    let dir = tempfile::tempdir().context("cannot create a directory for callgrind's files")?;
    let out = dir.path().join("callgrind");
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--quiet", "--collect-atstart=no"]);
    command.args(MEASURED.map(|name| format!("--toggle-collect=hyperbp_benches::scene::measured::{name}")));
    command.arg(format!("--toggle-collect={HYPERVISOR}"));
    command.args(DUMPS.map(|name| format!("--dump-after=hyperbp_benches::callgrind::{name}")));
    command.arg(format!("--callgrind-out-file={}", out.display())).arg(program);
    let output = command.output().context("cannot run valgrind")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} has failed under valgrind ({}): {said}", program.display(), output.status);
    let counted = |(n, case): (u32, Case)| Ok((case, total(&dump(&out, 2 * n))?.div_ceil(TIMES)));
    (1..).zip(Case::all()).map(counted).collect()
}

/// The file of the `n`th dump.
fn dump(out: &Path, n: u32) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(format!(".{n}"));
    name.into()
}

/// What a dump counts in all.
fn total(dump: &Path) -> Result<u64> {
    let text = fs::read_to_string(dump).with_context(|| format!("callgrind has not written {}", dump.display()))?;
    let total = text.lines().find_map(|line| line.strip_prefix("summary: ")?.trim().parse().ok()).unwrap_or(0);
    ensure!(total > 0, "callgrind has counted nothing in {}: it knows the functions by other names", dump.display());
    Ok(total)
}

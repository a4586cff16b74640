//! `cargo xtask fuzz`

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use hyperbp_lab::{Host, Log, Progress, tools};

use crate::steps::Steps;
use crate::tools::CARGO_FUZZ;

const EXAMPLES: &str = "\
Examples:
  cargo xtask fuzz
      Every target, a minute each.
  cargo xtask fuzz --seconds 1200 events
      One target, for twenty minutes.

What was found interesting is kept in target/fuzz/corpus, and where the next run begins. A finding is in
target/fuzz/artifacts; exit code 1. docs/testing.md says what to do with it.";

/// Feed the core whatever a guest might, and see that nothing goes wrong (libFuzzer)
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Fuzz {
    /// How long to run each target
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,

    /// Which targets; all of them if none is named
    #[arg(value_name = "TARGET")]
    targets: Vec<Target>,
}

/// A fuzz target of `plugin/fuzz`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    /// Events in any order, from a hypervisor that refuses now and then
    Events,
    /// The interpreter, with any bytes, registers and memory
    Interpret,
    /// The walks of any page tables
    Paging,
}

impl Target {
    const ALL: &[Self] = &[Self::Events, Self::Interpret, Self::Paging];

    fn name(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::Interpret => "interpret",
            Self::Paging => "paging",
        }
    }
}

impl Fuzz {
    /// All targets, so long each.
    pub(crate) fn all(seconds: u64) -> Self {
        Self { seconds, targets: Vec::new() }
    }

    pub(crate) fn run(self) -> Result<()> {
        self.run_in(&Steps::new())
    }

    /// As [a part](Steps) of something longer.
    pub(crate) fn run_in(self, steps: &Steps) -> Result<()> {
        let dir = crate::target().join("fuzz");
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let progress = Progress::new();
        let host = Host::this();
        // libFuzzer is C++.
        if host.find("c++").is_none() {
            let log = Log::create(&dir.join("tools.log"), "tools")?;
            tools::install(&host, tools::TOOLS, &progress, &log)?;
        }
        let cargo_fuzz = steps.time("build of cargo-fuzz", || CARGO_FUZZ.install())?;
        steps.time("build of the fuzz targets", || build(&cargo_fuzz, &dir))?;
        let programs = dir.join(host_triple()?).join("release");
        let targets = if self.targets.is_empty() { Target::ALL } else { &self.targets };
        for target in targets {
            let run = || run(*target, &programs, &dir, self.seconds, &progress);
            steps.time(format!("fuzz target {}", target.name()), run)?;
        }
        Ok(())
    }
}

fn build(cargo_fuzz: &Path, dir: &Path) -> Result<()> {
    eprintln!("== fuzz targets: cargo fuzz build");
    let mut command = Command::new(cargo_fuzz);
    command.args(["fuzz", "build", "--fuzz-dir", "plugin/fuzz", "--target-dir"]).arg(dir).current_dir(crate::repo());
    // The sanitizers' flags are not stable, but a stable compiler has them, and their libraries.
    let status = command.env("RUSTC_BOOTSTRAP", "1").status().context("cannot run cargo-fuzz")?;
    ensure!(status.success(), "the fuzz targets cannot be built");
    Ok(())
}

/// What cargo-fuzz builds for.
fn host_triple() -> Result<String> {
    let output = Command::new("rustc").arg("-vV").output().context("cannot run rustc")?;
    let version = String::from_utf8_lossy(&output.stdout);
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc does not say what it runs on")
}

fn run(target: Target, programs: &Path, dir: &Path, seconds: u64, progress: &Progress) -> Result<()> {
    let name = target.name();
    let (corpus, artifacts) = (dir.join("corpus").join(name), dir.join("artifacts").join(name));
    for dir in [&corpus, &artifacts] {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let log = dir.join(format!("{name}.log"));
    let mut file = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
    let program = programs.join(name);
    let mut command = Command::new(&program);
    command.arg(&corpus).arg(format!("-artifact_prefix={}/", artifacts.display()));
    command.arg(format!("-max_total_time={seconds}")).arg("-timeout=10").stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
    let (mut last, mut found) = (None, Found::default());
    if let Some(stderr) = child.stderr.take() {
        let task = progress.start(name);
        for line in BufReader::new(stderr).split(b'\n') {
            let line = line.context("cannot read what the target says")?;
            let line = String::from_utf8_lossy(&line);
            writeln!(file, "{line}").with_context(|| format!("cannot write to {}", log.display()))?;
            if let Some(state) = State::parse(&line) {
                task.at(task.elapsed().min(Duration::from_secs(seconds)).as_secs(), seconds, &state.to_string());
                last = Some(state);
            }
            found.look_at(&line);
        }
    }
    let success = child.wait().context("cannot wait for the target")?.success();
    let state = last.map_or_else(|| "nothing executed".to_owned(), |state| state.to_string());
    if success {
        println!("{name}: {state}, no finding");
        return Ok(());
    }
    let what = found.panic.unwrap_or_else(|| "the target ended".to_owned());
    match found.artifact {
        Some(artifact) => bail!(
            "{name}: {state}, and a finding: {what}\n  {artifact}\nTo see it again: {program} {artifact}\nAll it said: {log}",
            artifact = artifact.display(),
            program = program.display(),
            log = log.display(),
        ),
        None => bail!("{name}: {what}, without a finding; see {}", log.display()),
    }
}

/// How far libFuzzer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    executions: u64,
    coverage: u64,
    corpus: u64,
}

impl State {
    /// Of a line such as `#8192 pulse cov: 3191 ft: 7722 corp: 280/180Kb lim: 913 exec/s: 2048 rss: 309Mb`.
    fn parse(line: &str) -> Option<Self> {
        let executions = line.strip_prefix('#')?.split_whitespace().next()?.parse().ok()?;
        let mut words = line.split_whitespace();
        let mut after = |name| words.find(|word| *word == name).and_then(|_| words.next());
        let coverage = after("cov:")?.parse().ok()?;
        let corpus = after("corp:")?.split('/').next()?.parse().ok()?;
        Some(Self { executions, coverage, corpus })
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { executions, coverage, corpus } = self;
        write!(f, "{executions} executions, {coverage} edges, {corpus} inputs kept")
    }
}

/// What a target says of a finding.
#[derive(Debug, Default)]
struct Found {
    /// Of a panic, what is wrong.
    panic: Option<String>,
    /// The input.
    artifact: Option<PathBuf>,
    /// The message of the panic is in the next line.
    next: bool,
}

impl Found {
    fn look_at(&mut self, line: &str) {
        if std::mem::take(&mut self.next) {
            self.panic.get_or_insert_with(|| line.to_owned());
        }
        self.next = line.contains(" panicked at ");
        if let Some((_, path)) = line.split_once("Test unit written to ") {
            self.artifact = Some(path.trim().into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libfuzzer_is_understood() {
        let line = "#8192\tpulse  cov: 3191 ft: 7722 corp: 280/180Kb lim: 913 exec/s: 2048 rss: 309Mb";
        assert_eq!(State::parse(line), Some(State { executions: 8192, coverage: 3191, corpus: 280 }));
        assert_eq!(State::parse("#2\tINITED exec/s: 0 rss: 35Mb"), None);
        assert_eq!(State::parse("INFO: Seed: 809646962"), None);
    }

    #[test]
    fn a_finding_is_told() {
        let mut found = Found::default();
        let lines = [
            "thread '<unnamed>' (28114) panicked at targets/events.rs:465:70:",
            "bytes are left in gfn 0x1",
            "stack backtrace:",
            "artifact_prefix='x/'; Test unit written to x/crash-1",
        ];
        lines.into_iter().for_each(|line| found.look_at(line));
        assert_eq!(found.panic.as_deref(), Some("bytes are left in gfn 0x1"));
        assert_eq!(found.artifact, Some("x/crash-1".into()));
    }
}

//! `cargo xtask report`: the page of a benchmark's results.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;
use hyperbp_report::{About, Breakdown, Collection};

/// Options that take a path of this machine, which says nothing to others.
const PATHS: [&str; 2] = ["--drakvuf", "--smartvmi"];

const EXAMPLES: &str = "\
Examples:
  cargo xtask report
      Make report.html and the pictures of the last `cargo xtask bench` again.
  cargo xtask report bench/results
      Those of the results that come with this repository.";

/// Make the report of results that are there: report.html, and its pictures
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Report {
    /// Directory with results.json and samples/; run.json and ticks.json are used if they are there
    #[arg(value_name = "DIR")]
    directory: Option<PathBuf>,

    /// Look at it in Chromium, too, which is installed if need be: in light and dark, on a desk and on a phone, and printed.
    /// The pictures are in DIR/browser
    #[arg(long)]
    check: bool,
}

impl Report {
    pub(crate) fn run(self) -> Result<()> {
        let directory = self.directory.unwrap_or_else(|| crate::target().join("bench"));
        println!("Report:   {}", write(&directory)?.display());
        if self.check {
            crate::browser::check(&directory)?;
            println!("Pictures: {}", directory.join("browser").display());
        }
        Ok(())
    }
}

/// Writes the report of the results in a directory, and says where it is.
pub(crate) fn write(directory: &Path) -> Result<PathBuf> {
    let collection = Collection::read(directory)?;
    let about = About::read(directory)?;
    let ticks = directory.join("ticks.json");
    let breakdown = match ticks.exists() {
        true => {
            let json = std::fs::read_to_string(&ticks).with_context(|| format!("cannot read {}", ticks.display()))?;
            Some(Breakdown::from_json(&json).with_context(|| format!("in {}", ticks.display()))?)
        }
        false => None,
    };
    let (about, breakdown) = (about.as_ref(), breakdown.as_ref());
    hyperbp_report::Report { collection: &collection, about, breakdown }.write(directory)?;
    let picture = directory.join("results.svg");
    std::fs::write(&picture, hyperbp_report::svg(collection.results()))
        .with_context(|| format!("cannot write {}", picture.display()))?;
    Ok(directory.join("report.html"))
}

/// How this run was started; paths of build trees are left out, for they are another's elsewhere.
pub(crate) fn command() -> String {
    command_of(std::env::args().skip(1))
}

fn command_of(arguments: impl Iterator<Item = String>) -> String {
    let mut command = "cargo xtask".to_owned();
    let mut is_path = false;
    for argument in arguments {
        command.push(' ');
        match argument.split_once('=') {
            _ if is_path => command.push_str("BUILD_DIR"),
            Some((option, _)) if PATHS.contains(&option) => command.push_str(&format!("{option}=BUILD_DIR")),
            _ => command.push_str(&argument),
        }
        is_path = !is_path && PATHS.contains(&&*argument);
    }
    command
}

/// The versions of what is here: hyperbp's, and of the trees that were named.
pub(crate) fn versions(trees: &[(&str, &Path)]) -> BTreeMap<String, String> {
    let ours = crate::repo();
    [("hyperbp", &*ours)]
        .iter()
        .chain(trees)
        .filter_map(|(name, tree)| Some(((*name).to_owned(), format!("commit {}", commit(tree)?))))
        .collect()
}

/// The commit a directory is at, if it is one of Git's.
fn commit(directory: &Path) -> Option<String> {
    let mut git = Command::new("git");
    git.arg("-C").arg(directory).args(["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]);
    let output = git.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_not_told() {
        let of = |line: &str| command_of(line.split(' ').map(str::to_owned));
        assert_eq!(
            of("bench --drakvuf /home/me/build --smartvmi=/x/y --quick"),
            "cargo xtask bench --drakvuf BUILD_DIR --smartvmi=BUILD_DIR --quick"
        );
    }
}

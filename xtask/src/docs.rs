//! `cargo xtask docs`: the tables of figures in the documentation.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;

const EXAMPLES: &str = "\
A table stands between the lines `<!-- table: NAME DIR -->` and `<!-- end of table -->`, where DIR has the results of a bench.
NAME is one of

  medians  all medians
  hosts    what a hit and a read take with the breakpoints of other hosts, and with hyperbp
  ticks    where the ticks of a hit go

Run this after bench/results has changed.";

/// Generate the tables of figures in README.md and docs/ from bench/results
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Docs {
    /// Change nothing, and fail if a table is not that of the results
    #[arg(long)]
    check: bool,
}

impl Docs {
    pub(crate) fn run(self) -> Result<()> {
        for path in files()? {
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let filled =
                hyperbp_report::fill(&text, &crate::repo()).with_context(|| format!("in {}", path.display()))?;
            if filled == text {
                continue;
            }
            ensure!(!self.check, "a table of {} is not that of the results: run `cargo xtask docs`", path.display());
            fs::write(&path, filled).with_context(|| format!("cannot write {}", path.display()))?;
            println!("{}", path.display());
        }
        Ok(())
    }
}

/// README.md, and the pages in docs/.
fn files() -> Result<Vec<PathBuf>> {
    let mut files = vec![crate::repo().join("README.md")];
    let is_page = |path: &Path| Ok(path.extension().is_some_and(|extension| extension == "md"));
    crate::files::below(&crate::repo().join("docs"), &is_page, &mut files)?;
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_of_the_documentation_are_those_of_the_results() {
        Docs { check: true }.run().unwrap();
    }
}

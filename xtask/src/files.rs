//! Files of the repository.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Adds those below a directory that are of a kind.
pub(crate) fn below(
    directory: &Path,
    is_of_kind: &dyn Fn(&Path) -> Result<bool>,
    into: &mut Vec<PathBuf>,
) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            below(&path, is_of_kind, into)?;
        } else if is_of_kind(&path)? {
            into.push(path);
        }
    }
    Ok(())
}

//! Where results come from: what a table cannot tell.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::collection::write_file;

/// How results were made. Its JSON is the file `run.json` beside `results.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The day, as `2026-01-31`.
    pub date: String,
    /// The command that makes them again.
    pub command: String,
    /// What took part, and its version.
    pub versions: BTreeMap<String, String>,
    /// Hosts that could not be measured, and why.
    pub missing: BTreeMap<String, String>,
}

impl About {
    /// Writes it into a directory of results.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, directory: &Path) -> Result<()> {
        write_file(&directory.join("run.json"), &(serde_json::to_string_pretty(self)? + "\n"))
    }

    /// Reads what [`Self::write`] wrote, if there is such a file: older results have none.
    ///
    /// # Errors
    /// If the file cannot be read or makes no sense.
    pub fn read(directory: &Path) -> Result<Option<Self>> {
        let path = directory.join("run.json");
        if !path.exists() {
            return Ok(None);
        }
        let json = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&json)
            .map(Some)
            .with_context(|| format!("{} does not say how results were made", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_as_it_was_written_and_need_not_be_there() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(About::read(directory.path()).unwrap(), None);
        let about = About {
            date: "2026-01-31".to_owned(),
            command: "cargo xtask bench".to_owned(),
            missing: [("drakvuf".to_owned(), "there is none".to_owned())].into(),
            ..About::default()
        };
        about.write(directory.path()).unwrap();
        assert_eq!(About::read(directory.path()).unwrap(), Some(about));
        fs::write(directory.path().join("run.json"), "[]").unwrap();
        assert!(About::read(directory.path()).is_err());
    }
}

//! Stages of the build: each a directory named after its inputs, there either completely or not at all.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};

use crate::command::Log;
use crate::{Error, Progress, Result};

/// The digest of a stage's inputs.
#[derive(Clone, Debug, Default)]
pub struct Inputs(Sha256);

impl Inputs {
    /// No inputs yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an input. Name and length are part of the digest, so no two lists of inputs run together.
    #[must_use]
    pub fn with(mut self, name: &str, content: impl AsRef<[u8]>) -> Self {
        let content = content.as_ref();
        for field in [name.as_bytes(), content] {
            self.0.update((field.len() as u64).to_le_bytes());
            self.0.update(field);
        }
        self
    }

    /// Adds the content of a file. Where the file is does not count.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn with_file(self, name: &str, path: &Path) -> Result<Self> {
        Ok(self.with(name, fs::read(path).map_err(Error::io("read", path))?))
    }

    fn name(&self) -> String {
        self.0.clone().finalize()[..8].iter().fold(String::new(), |mut name, byte| {
            // Writing to a String cannot fail.
            let _ = write!(name, "{byte:02x}");
            name
        })
    }
}

/// The directory all stages are in.
#[derive(Debug)]
pub struct Stages {
    dir: PathBuf,
}

impl Stages {
    /// Directories of earlier inputs that are kept for each stage, besides the newest.
    const KEEP: usize = 3;

    /// Stages in `dir`, which is created.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A new, empty log for `name`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn log(&self, name: &str) -> Result<Log> {
        Log::create(&self.dir.join("log").join(format!("{name}.log")), name)
    }

    /// Where the stage `name` is for these inputs, whether it is built or not.
    #[must_use]
    pub fn path(&self, name: &str, inputs: &Inputs) -> PathBuf {
        self.dir.join(format!("{name}-{}", inputs.name()))
    }

    /// The directory of the stage `name` for these inputs. When it is not there, `build` makes it: it is given an empty
    /// directory to fill, which gets its name only when `build` succeeds.
    ///
    /// # Errors
    /// Those of `build`; [`Error::Io`].
    pub fn build(
        &self,
        name: &str,
        inputs: &Inputs,
        progress: &Progress,
        build: impl FnOnce(&Path, &Log, &crate::progress::Task) -> Result<()>,
    ) -> Result<PathBuf> {
        let done = self.path(name, inputs);
        if !done.exists() {
            let task = progress.start(name);
            let log = self.log(name)?;
            // What an interrupted build left goes with it.
            let unfinished = self.dir.join(format!(".{name}.unfinished"));
            remove(&unfinished)?;
            fs::create_dir_all(&unfinished).map_err(Error::io("create", &unfinished))?;
            build(&unfinished, &log, &task)?;
            fs::rename(&unfinished, &done).map_err(Error::io("complete", &done))?;
            let seconds = task.elapsed().as_secs();
            drop(task);
            progress.note(&format!("{name:<10} {seconds:>4}s done"));
        }
        self.prune(name, &done)?;
        Ok(done)
    }

    /// Marks `current` as the newest and removes all but the newest few of the stage `name`.
    fn prune(&self, name: &str, current: &Path) -> Result<()> {
        let prefix = format!("{name}-");
        // The time of a stage's directory is when it was last used; where it cannot be set, it is when it was built.
        let _ = fs::File::open(current).and_then(|dir| dir.set_modified(SystemTime::now()));
        let mut others: Vec<(SystemTime, PathBuf)> = fs::read_dir(&self.dir)
            .map_err(Error::io("list", &self.dir))?
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let hash = entry.file_name().to_str()?.strip_prefix(&prefix)?.len();
                let ours = hash == 16 && entry.path() != current;
                ours.then(|| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))?
            })
            .collect();
        others.sort();
        for (_, old) in others.iter().rev().skip(Self::KEEP) {
            remove(old)?;
        }
        Ok(())
    }
}

/// Removes a directory if it is there.
pub(crate) fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", dir)(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_do_not_run_together() {
        let name = |pairs: &[(&str, &str)]| pairs.iter().fold(Inputs::new(), |i, (n, c)| i.with(n, c)).name();
        assert_eq!(name(&[("a", "b")]), name(&[("a", "b")]));
        assert_ne!(name(&[("a", "b")]), name(&[("ab", "")]));
        assert_ne!(name(&[("a", "b"), ("c", "d")]), name(&[("a", "bcd")]));
    }

    #[test]
    fn a_stage_is_built_once_and_only_completely() {
        let dir = tempfile::tempdir().unwrap();
        let stages = Stages::new(dir.path()).unwrap();
        let inputs = Inputs::new().with("version", "1");
        let failed = stages.build("thing", &inputs, &Progress::silent(), |dir, log, _| {
            fs::write(dir.join("half"), "").unwrap();
            log.run(&mut std::process::Command::new("false"))
        });
        assert!(matches!(failed, Err(Error::Build { .. })));
        assert!(!stages.path("thing", &inputs).exists());

        let built = stages
            .build("thing", &inputs, &Progress::silent(), |dir, _, _| {
                assert!(!dir.join("half").exists(), "left by the failed build");
                fs::write(dir.join("whole"), "").map_err(Error::io("write", dir))
            })
            .unwrap();
        assert!(built.join("whole").exists());
        let again = stages.build("thing", &inputs, &Progress::silent(), |_, _, _| panic!("built twice")).unwrap();
        assert_eq!(built, again);
    }

    #[test]
    fn old_builds_go_and_other_stages_stay() {
        let dir = tempfile::tempdir().unwrap();
        let stages = Stages::new(dir.path()).unwrap();
        let build = |name: &str, version: &str| {
            let inputs = Inputs::new().with("version", version);
            stages.build(name, &inputs, &Progress::silent(), |_, _, _| Ok(())).unwrap()
        };
        let other = build("thing-else", "1");
        let first = build("thing", "1");
        let all: Vec<PathBuf> = (2..8).map(|n| build("thing", &n.to_string())).collect();
        assert!(other.exists());
        assert!(!first.exists());
        assert!(all.last().unwrap().exists());
        assert_eq!(all.iter().filter(|path| path.exists()).count(), Stages::KEEP + 1);
    }
}

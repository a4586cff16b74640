//! Running a program with its output in a log.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use crate::error::Tail;
use crate::{Error, Host, Result};

/// The log of one stage: every command of the stage and what it printed.
#[derive(Clone, Debug)]
pub struct Log {
    path: PathBuf,
    what: String,
}

impl Log {
    /// A new, empty log at `path`, of `what`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: &Path, what: &str) -> Result<Self> {
        let dir = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        File::create(path).map_err(Error::io("create", path))?;
        Ok(Self { path: path.to_owned(), what: what.to_owned() })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its last lines.
    #[must_use]
    pub fn tail(&self) -> Tail {
        Tail::of_file(&self.path)
    }

    /// Adds a line.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn line(&self, text: &str) -> Result<()> {
        let mut file = self.append()?;
        writeln!(file, "{text}").map_err(Error::io("write to", &self.path))
    }

    fn append(&self) -> Result<File> {
        OpenOptions::new().append(true).open(&self.path).map_err(Error::io("open", &self.path))
    }

    /// Runs `command` to its end, its output in the log.
    ///
    /// # Errors
    /// [`Error::Spawn`]; [`Error::Build`] when it does not end with success.
    pub fn run(&self, command: &mut Command) -> Result<()> {
        let status = self.status(command)?;
        self.check(status)
    }

    /// Runs `command` to its end, its stderr in the log, and returns what it printed on stdout.
    ///
    /// # Errors
    /// As [`Log::run`].
    pub fn output(&self, command: &mut Command) -> Result<String> {
        self.line(&format!("$ {command:?}"))?;
        command.stdin(Stdio::null()).stderr(self.append()?);
        let output = command.output().map_err(|source| spawn_error(command, source))?;
        self.check(output.status)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs `command` to its end, its output in the log.
    ///
    /// # Errors
    /// [`Error::Spawn`]. An unsuccessful end is none: it is what is returned.
    pub fn status(&self, command: &mut Command) -> Result<ExitStatus> {
        self.line(&format!("$ {command:?}"))?;
        command.stdin(Stdio::null()).stdout(self.append()?).stderr(self.append()?);
        command.status().map_err(|source| spawn_error(command, source))
    }

    fn check(&self, status: ExitStatus) -> Result<()> {
        if status.success() {
            return Ok(());
        }
        Err(Error::Build { what: self.what.clone(), status, tail: self.tail() })
    }
}

impl Host {
    /// A command that finds itself and its helpers in [`Host::path`] and speaks English, so that its messages can be
    /// told apart.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let found = self.find(program.as_ref()).map_or_else(|| program.as_ref().to_owned(), PathBuf::into_os_string);
        let mut command = Command::new(found);
        command.env("PATH", &self.path).env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}

pub(crate) fn spawn_error(command: &Command, source: std::io::Error) -> Error {
    Error::Spawn { program: command.get_program().to_string_lossy().into_owned(), source }
}

//! What can go wrong in the lab, each with what to do about it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

/// The lab's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the lab could not be built, or a run in it failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host is not a Debian, so there are no packages to build from.
    #[error(
        "this is not a Debian system ({found}): the lab is built from Debian's packages. \
         Run it on Debian 12, for example in a container or a debootstrap chroot"
    )]
    NotDebian {
        /// What the system calls itself.
        found: String,
    },

    /// apt's configuration names no Debian mirror.
    #[error("no Debian mirror in {}: add a line such as `deb MIRROR {codename} main` to sources.list", apt.display())]
    NoMirror {
        /// apt's configuration directory.
        apt: PathBuf,
        /// The suite that was looked for.
        codename: String,
    },

    /// Build tools are missing, and this user may not install them.
    #[error("build tools are missing and installing them needs root; run:\n\n    {command}\n\nand then this again")]
    NoPermission {
        /// The command to run as root.
        command: String,
    },

    /// The file system is too full.
    #[error(
        "{} has {} MiB free and the lab needs {} MiB: make room, or set CARGO_TARGET_DIR to a roomier file system",
        path.display(), free >> 20, needed >> 20
    )]
    DiskSpace {
        /// Where the lab is built.
        path: PathBuf,
        /// Bytes free there.
        free: u64,
        /// Bytes needed.
        needed: u64,
    },

    /// A download failed.
    #[error("cannot download {what}: check the network and the mirror in /etc/apt, then run this again\n{tail}")]
    Download {
        /// What was to be downloaded.
        what: String,
        /// What the downloader said.
        tail: Tail,
    },

    /// A download is not what it should be.
    #[error(
        "{what} arrived with the wrong checksum: the mirror or a proxy on the way serves a damaged or different file; \
         try again, or use another mirror\n{tail}"
    )]
    WrongHash {
        /// What was downloaded.
        what: String,
        /// What the downloader said.
        tail: Tail,
    },

    /// A program the lab needs is not there.
    #[error("cannot run `{program}`: {source}; is its Debian package installed?")]
    Spawn {
        /// The program.
        program: String,
        /// Why not.
        source: io::Error,
    },

    /// A command of a build step failed.
    #[error("{what} failed ({status}); the end of its log:\n{tail}")]
    Build {
        /// What was being done.
        what: String,
        /// How the command ended.
        status: ExitStatus,
        /// The end of the log.
        tail: Tail,
    },

    /// A file in a download or a build product is not as expected.
    #[error("{}: {problem}", path.display())]
    Unexpected {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        problem: String,
    },

    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },

    /// There is no DRAKVUF to measure.
    #[error(
        "{} is no build of DRAKVUF ({problem}): build it first, in DRAKVUF's source, with \
         `meson setup --native-file llvm.ini BUILD_DIR && ninja -C BUILD_DIR`",
        build.display()
    )]
    NoDrakvuf {
        /// What was to be Meson's build directory.
        build: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// vmi-rs cannot be built here.
    #[error("{problem}")]
    NoVmiRs {
        /// Why not.
        problem: String,
    },

    /// There is no SmartVMI to measure.
    #[error(
        "{} is no build of SmartVMI ({problem}): build it first, in SmartVMI's source, with \
         `cmake -G Ninja -S vmicore -B BUILD_DIR && ninja -C BUILD_DIR vmicore`",
        build.display()
    )]
    NoSmartvmi {
        /// What was to be CMake's build directory.
        build: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// The emulator ended before the job did.
    #[error("{job}: the emulator ended before the job did ({status}); it said last:\n{tail}")]
    Died {
        /// The job.
        job: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of its log.
        tail: Tail,
    },

    /// The machine stood still.
    #[error("{job}: the machine printed nothing for {} s and was stopped; it had said:\n{tail}", silence.as_secs())]
    Hung {
        /// The job.
        job: String,
        /// For how long nothing came.
        silence: Duration,
        /// The end of its console.
        tail: Tail,
    },

    /// The job took longer than it may.
    #[error("{job}: not done after {} s and stopped; ask for fewer samples. It had said:\n{tail}", limit.as_secs())]
    TimedOut {
        /// The job.
        job: String,
        /// The limit.
        limit: Duration,
        /// The end of its console.
        tail: Tail,
    },

    /// Xen, dom0 or a guest crashed.
    #[error("{job}: {who} crashed; the end of the console:\n{tail}")]
    Crashed {
        /// The job.
        job: String,
        /// Who it was.
        who: &'static str,
        /// The end of the console.
        tail: Tail,
    },

    /// The job's script ended with a failure.
    #[error("{job}: failed in dom0 with exit code {code}; it had said:\n{tail}")]
    JobFailed {
        /// The job.
        job: String,
        /// The exit code.
        code: i32,
        /// The end of its console.
        tail: Tail,
    },

    /// The run was stopped, because another one failed.
    #[error("{job}: stopped, because another run failed")]
    Stopped {
        /// The job.
        job: String,
    },

    /// The results did not survive the way out of the machine.
    #[error("{job}: the results are damaged ({problem}); please report this with {}", log.display())]
    Results {
        /// The job.
        job: String,
        /// What is wrong.
        problem: String,
        /// Everything the machine printed.
        log: PathBuf,
    },
}

impl Error {
    /// Turns an [`io::Error`] of `action` on `path` into ours; for `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

/// The end of a log, and where all of it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tail {
    /// The last lines.
    pub lines: Vec<String>,
    /// The whole log.
    pub log: PathBuf,
}

impl Tail {
    /// Lines kept.
    pub const LINES: usize = 20;

    /// The end of the file `log`; empty when it cannot be read.
    #[must_use]
    pub fn of_file(log: &Path) -> Self {
        let text = std::fs::read(log).unwrap_or_default();
        Self::of_text(&String::from_utf8_lossy(&text), log)
    }

    /// The end of `text`, which is the content of `log`.
    #[must_use]
    pub fn of_text(text: &str, log: &Path) -> Self {
        let mut lines: Vec<String> = text.lines().rev().take(Self::LINES).map(|l| l.trim_end().to_owned()).collect();
        lines.reverse();
        Self { lines, log: log.to_owned() }
    }
}

impl fmt::Display for Tail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.lines {
            writeln!(f, "    {line}")?;
        }
        write!(f, "(all of it: {})", self.log.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_has_the_last_lines_in_order() {
        let text: String = (1..=30).map(|n| format!("line {n}\r\n")).collect();
        let tail = Tail::of_text(&text, Path::new("/log"));
        assert_eq!(tail.lines.len(), Tail::LINES);
        assert_eq!(tail.lines[0], "line 11");
        assert_eq!(tail.lines[19], "line 30");
        assert!(tail.to_string().ends_with("    line 30\n(all of it: /log)"));
    }

    #[test]
    fn a_missing_log_has_an_empty_tail() {
        assert!(Tail::of_file(Path::new("/no/such/log")).lines.is_empty());
    }
}

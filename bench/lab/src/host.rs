//! What the lab needs to know of the machine it is built on.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::{Error, Result};

/// The host. [`Host::this`] is the real one; tests make their own.
#[derive(Clone, Debug)]
pub struct Host {
    /// Where its file system is: `/`.
    pub root: PathBuf,
    /// Where its programs are: `PATH`.
    pub path: OsString,
    /// Whether packages may be installed without asking anyone: this user is root.
    pub privileged: bool,
}

impl Host {
    /// The machine this runs on. `/usr/sbin` and `/sbin` are searched even when the user's `PATH` leaves them out.
    #[must_use]
    pub fn this() -> Self {
        let mut path = env::var_os("PATH").unwrap_or_default();
        path.push(":/usr/sbin:/sbin");
        Self { root: "/".into(), path, privileged: rustix::process::geteuid().is_root() }
    }

    /// The codename of the Debian release, such as `bookworm`.
    ///
    /// # Errors
    /// [`Error::NotDebian`].
    pub fn codename(&self) -> Result<String> {
        let release = fs::read_to_string(self.root.join("etc/os-release")).unwrap_or_default();
        let field = |name: &str| {
            let line = release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
            Some(line.trim_matches('"').to_owned())
        };
        match (field("ID").as_deref(), field("VERSION_CODENAME")) {
            (Some("debian"), Some(codename)) if self.find("apt-get").is_some() => Ok(codename),
            (Some("debian"), Some(_)) => Err(Error::NotDebian { found: "Debian without apt-get".to_owned() }),
            (id, _) => Err(Error::NotDebian { found: field("PRETTY_NAME").or(id.map(Into::into)).unwrap_or_default() }),
        }
    }

    /// Where a program is, if it is in [`Host::path`].
    #[must_use]
    pub fn find(&self, program: impl AsRef<OsStr>) -> Option<PathBuf> {
        env::split_paths(&self.path).map(|dir| dir.join(program.as_ref())).find(|file| file.is_file())
    }

    /// Fails when `dir`'s file system has less than `needed` bytes free for this user.
    ///
    /// # Errors
    /// [`Error::DiskSpace`]; [`Error::Io`] when the file system cannot be asked.
    pub fn check_space(dir: &Path, needed: u64) -> Result<()> {
        let stat = rustix::fs::statvfs(dir).map_err(|e| Error::io("ask for the free space of", dir)(e.into()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free < needed {
            return Err(Error::DiskSpace { path: dir.to_owned(), free, needed });
        }
        Ok(())
    }
}

//! The file of a ledger: found or made, looked at, locked, and mapped.
//!
//! Whoever may write to the directory, or has put something there before us, must not get us to write to a file of somebody
//! else's. So no symbolic link is followed, and what is opened is looked at before anything is done to it.
//!
//! All of what is mapped is allocated. A store to a hole of a mapped file is a SIGBUS if the file system is full, and it
//! would come in the middle of a hit.

use std::fs::{DirBuilder, File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, posix_fallocate};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

use super::Error;

/// Bytes of a word.
const WORD: usize = size_of::<u64>();
/// Words at the beginning: a page. The file is doubled when it is full.
const FIRST: usize = 512;
/// Words at most: room for a million notes.
pub(super) const MOST: usize = 1 << 20;
/// How often a file that is replaced while it is opened is opened again.
const TRIES: usize = 16;
/// The permissions of the file.
const OWNER_ALONE: u32 = 0o600;

/// A file of words that is locked and mapped while this lives.
#[derive(Debug)]
pub(super) struct Words {
    directory: OwnedFd,
    path: PathBuf,
    file: File,
    map: MmapRaw,
    count: usize,
}

/// Whether a file is made if there is none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Absent {
    Make,
    Leave,
}

impl Words {
    /// The file of this name in `directory`, locked. None if there is none, or an empty one, and none is to be made.
    ///
    /// # Errors
    /// [`Error::Busy`] if it is locked; [`Error::Foreign`] if it, or the directory, is not what we would have made;
    /// [`Error::Io`].
    pub(super) fn open(directory: &Path, name: &str, absent: Absent) -> Result<Option<Self>, Error> {
        let path = directory.join(name);
        let io = |error: io::Error| Error::Io { path: path.clone(), source: error };
        let Some(directory) = open_directory(directory, absent)? else { return Ok(None) };
        for _ in 0..TRIES {
            let Some(file) = open_file(&directory, name, absent).map_err(|error| of_open(error, &path))? else {
                return Ok(None);
            };
            let file = File::from(file);
            let found = file.metadata().map_err(io)?;
            if let Some(problem) = problem_of_file(&found) {
                return Err(Error::Foreign { path, problem });
            }
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(Error::Busy(path)),
                Err(TryLockError::Error(source)) => return Err(io(source)),
            }
            // Whoever had it locked may have removed it in the meantime: then this is a file without a name.
            if !is_at(&directory, name, &found).map_err(io)? {
                continue;
            }
            let length = usize::try_from(file.metadata().map_err(io)?.len()).unwrap_or(usize::MAX);
            let count = match (length / WORD).min(MOST) {
                0 if absent == Absent::Leave => return Ok(None),
                count => count.max(FIRST),
            };
            allocate(&file, count).map_err(io)?;
            let map = map(&file, count).map_err(io)?;
            return Ok(Some(Self { directory, path, file, map, count }));
        }
        Err(io(io::Error::new(ErrorKind::ResourceBusy, "it is replaced again and again")))
    }

    /// How many there are.
    pub(super) const fn count(&self) -> usize {
        self.count
    }

    /// One of them.
    ///
    /// # Panics
    /// If there are not so many.
    pub(super) fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < self.count);
        // SAFETY: within the mapping, which has `count` words, by the assertion.
        let word = unsafe { self.map.as_mut_ptr().cast::<u64>().add(at) };
        // SAFETY: aligned, for a mapping begins with a page; mapped while `self` lives; only accessed atomically.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// Makes the file twice as long. What is new is zero.
    ///
    /// # Errors
    /// If it is as long as it may be, or the file system is full. Nothing has changed then.
    pub(super) fn grow(&mut self) -> io::Result<()> {
        if self.count >= MOST {
            return Err(io::Error::new(ErrorKind::StorageFull, "the ledger is full"));
        }
        let count = (self.count * 2).min(MOST);
        allocate(&self.file, count)?;
        self.map = map(&self.file, count)?;
        self.count = count;
        Ok(())
    }

    /// Makes all words zero, of as many as there are at the beginning.
    ///
    /// # Errors
    /// If the file system is full, or the file cannot be mapped.
    pub(super) fn empty(self) -> io::Result<Self> {
        let Self { directory, path, file, map: old, .. } = self;
        // A store to what is cut off would be a SIGBUS.
        drop(old);
        file.set_len(0)?;
        allocate(&file, FIRST)?;
        let map = map(&file, FIRST)?;
        Ok(Self { directory, path, file, map, count: FIRST })
    }

    /// Removes the file, if it is still the one of this name.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub(super) fn remove(self) -> io::Result<()> {
        let name = self.path.file_name().unwrap_or_default();
        if is_at(&self.directory, name, &self.file.metadata()?)? {
            unlinkat(&self.directory, name, UnlinkatFlags::NoRemoveDir)?;
        }
        Ok(())
    }
}

fn open_directory(path: &Path, absent: Absent) -> Result<Option<OwnedFd>, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    if absent == Absent::Make {
        // What is there already, whatever it is, is looked at below.
        match DirBuilder::new().recursive(true).mode(0o700).create(path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(io(error)),
            _ => {}
        }
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let directory = match open(path, flags, Mode::empty()) {
        Err(Errno::ENOENT) if absent == Absent::Leave => return Ok(None),
        // A symbolic link is no directory, if it is not followed.
        Err(Errno::ENOTDIR | Errno::ELOOP) => {
            return Err(Error::Foreign { path: path.to_owned(), problem: "it is no directory, or a symbolic link" });
        }
        opened => File::from(opened.map_err(|error| io(error.into()))?),
    };
    let found = directory.metadata().map_err(io)?;
    let problem = if found.uid() != geteuid().as_raw() {
        Some("its owner is somebody else")
    } else if found.mode() & 0o022 != 0 {
        Some("others may write to it")
    } else {
        None
    };
    match problem {
        Some(problem) => Err(Error::Foreign { path: path.to_owned(), problem }),
        None => Ok(Some(directory.into())),
    }
}

/// Opens what is there, or makes the file. It changes nothing of what is there.
fn open_file(directory: &OwnedFd, name: &str, absent: Absent) -> nix::Result<Option<OwnedFd>> {
    let mode = Mode::from_bits_truncate(OWNER_ALONE);
    // Of a device or a pipe, O_NONBLOCK waits for nobody.
    let flags = OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    for _ in 0..TRIES {
        match openat(directory, name, flags, Mode::empty()) {
            Err(Errno::ENOENT) if absent == Absent::Leave => return Ok(None),
            Err(Errno::ENOENT) => {}
            opened => return opened.map(Some),
        }
        match openat(directory, name, flags | OFlag::O_CREAT | OFlag::O_EXCL, mode) {
            // Somebody else was first.
            Err(Errno::EEXIST) => {}
            opened => return opened.map(Some),
        }
    }
    Err(Errno::EBUSY)
}

fn of_open(error: Errno, path: &Path) -> Error {
    let path = path.to_owned();
    match error {
        Errno::ELOOP => Error::Foreign { path, problem: "it is a symbolic link" },
        Errno::ENXIO | Errno::EISDIR | Errno::ENODEV => Error::Foreign { path, problem: "it is no regular file" },
        error => Error::Io { path, source: error.into() },
    }
}

/// What a file has that we did not give it.
fn problem_of_file(found: &std::fs::Metadata) -> Option<&'static str> {
    if !found.is_file() {
        Some("it is no regular file")
    } else if found.uid() != geteuid().as_raw() {
        Some("its owner is somebody else")
    } else if found.mode() & 0o7777 != OWNER_ALONE {
        Some("others than its owner may use it, or its owner may not (its mode is not 0600)")
    } else if found.nlink() > 1 {
        Some("it has another name, too")
    } else {
        None
    }
}

/// Whether the file of this name is the one that was found.
fn is_at<P: ?Sized + nix::NixPath>(directory: &OwnedFd, name: &P, found: &std::fs::Metadata) -> io::Result<bool> {
    match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok((stat.st_dev, stat.st_ino) == (found.dev(), found.ino())),
        Err(Errno::ENOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Gives the file room for so many words, with no hole in it.
fn allocate(file: &File, count: usize) -> io::Result<()> {
    let bytes = (count * WORD) as u64;
    // Beyond this limit there is a signal, not an error.
    let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE)?;
    if bytes > limit {
        return Err(io::Error::new(
            ErrorKind::FileTooLarge,
            "this process may not make files of this size (ulimit -f)",
        ));
    }
    for _ in 0..TRIES {
        match posix_fallocate(file.as_fd(), 0, bytes as i64) {
            // A signal has come.
            Err(Errno::EINTR) => {}
            allocated => return allocated.map_err(Into::into),
        }
    }
    Err(Errno::EINTR.into())
}

fn map(file: &File, count: usize) -> io::Result<MmapRaw> {
    MmapOptions::new().len(count * WORD).map_raw(file)
}

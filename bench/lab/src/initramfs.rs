//! dom0's file system: a newc cpio archive, byte for byte the same for the same content.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use cpio::newc;

use crate::{Error, Result};

/// What an entry is. Owner is always root, the time always 0.
#[derive(Debug)]
enum Entry {
    Directory,
    File { content: Vec<u8>, mode: u32 },
    Link { target: String },
    Device { major: u32, minor: u32 },
}

/// The file system being put together. Paths have no slash at the start.
#[derive(Debug, Default)]
pub struct Initramfs(BTreeMap<String, Entry>);

impl Initramfs {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn add(&mut self, path: &str, entry: Entry) {
        // An ancestor always sorts before what is in it, so the kernel finds directories made.
        for (at, _) in path.match_indices('/') {
            self.0.entry(path[..at].to_owned()).or_insert(Entry::Directory);
        }
        self.0.insert(path.to_owned(), entry);
    }

    /// Adds a directory.
    pub fn directory(&mut self, path: &str) {
        self.add(path, Entry::Directory);
    }

    /// Adds a file with the permissions `mode`.
    pub fn file(&mut self, path: &str, mode: u32, content: impl Into<Vec<u8>>) {
        self.add(path, Entry::File { content: content.into(), mode });
    }

    /// Adds a copy of the host's file `from`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn copy(&mut self, path: &str, mode: u32, from: &Path) -> Result<()> {
        self.file(path, mode, fs::read(from).map_err(Error::io("read", from))?);
        Ok(())
    }

    /// Adds a symbolic link to `target`.
    pub fn link(&mut self, path: &str, target: &str) {
        self.add(path, Entry::Link { target: target.to_owned() });
    }

    /// Adds a character device.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.add(path, Entry::Device { major, minor });
    }

    /// The archive.
    ///
    /// # Errors
    /// When something is too large for the format: 4 GiB.
    pub fn archive(&self) -> io::Result<Vec<u8>> {
        const DIRECTORY: u32 = 0o040_000;
        const FILE: u32 = 0o100_000;
        const LINK: u32 = 0o120_000;
        const CHARACTER_DEVICE: u32 = 0o020_000;
        let mut archive = Vec::new();
        // The kernel takes entries of one inode number for hard links of each other.
        for (inode, (path, entry)) in (1..).zip(&self.0) {
            let header = newc::Builder::new(path).ino(inode);
            let (header, content): (_, &[u8]) = match entry {
                Entry::Directory => (header.mode(DIRECTORY | 0o755).nlink(2), &[]),
                Entry::File { content, mode } => (header.mode(FILE | mode), content),
                Entry::Link { target } => (header.mode(LINK | 0o777), target.as_bytes()),
                Entry::Device { major, minor } => {
                    (header.mode(CHARACTER_DEVICE | 0o600).rdev_major(*major).rdev_minor(*minor), &[])
                }
            };
            let size = u32::try_from(content.len()).map_err(io::Error::other)?;
            let mut writer = header.write(&mut archive, size);
            writer.write_all(content)?;
            writer.finish()?;
        }
        newc::trailer(&mut archive)?;
        Ok(archive)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out_in_order() {
        let mut fs = Initramfs::new();
        fs.file("usr/bin/tool", 0o755, "content");
        fs.link("bin", "usr/bin");
        fs.device("dev/console", 5, 1);
        let archive = fs.archive().unwrap();

        let mut seen = Vec::new();
        let mut rest = io::Cursor::new(&archive[..]);
        loop {
            let reader = newc::Reader::new(rest).unwrap();
            let entry = reader.entry().clone();
            if entry.is_trailer() {
                break;
            }
            seen.push((entry.name().to_owned(), entry.mode(), entry.file_size(), entry.mtime()));
            rest = reader.finish().unwrap();
        }
        let expected = [
            ("bin", 0o120_777, 7),
            ("dev", 0o040_755, 0),
            ("dev/console", 0o020_600, 0),
            ("usr", 0o040_755, 0),
            ("usr/bin", 0o040_755, 0),
            ("usr/bin/tool", 0o100_755, 7),
        ];
        assert_eq!(seen, expected.map(|(name, mode, size)| (name.to_owned(), mode, size, 0)));
        assert_eq!(archive, fs.archive().unwrap());
    }
}

//! Debian's Xen, dom0 kernel and tools: which versions, and their files, unpacked but not installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::apt::{Apt, Package};
use crate::{Error, Host, Inputs, Progress, Result, Stages};

/// What is unpacked. `linux-image-amd64/depends` is the newest kernel: not `-cloud`, which lacks dom0 support.
pub const PACKAGES: &[&str] = &[
    "bochsbios",
    "busybox-static",
    "libxen-dev",
    "libxencall1",
    "libxendevicemodel1",
    "libxenevtchn1",
    "libxenforeignmemory1",
    "libxengnttab1",
    "libxenhypfs1",
    "libxenmisc4.17",
    "libxenstore4",
    "libxentoolcore1",
    "libxentoollog1",
    "libyajl2",
    "linux-image-amd64/depends",
    "vgabios",
    "xen-hypervisor-4.17-amd64",
    "xen-utils-4.17",
];

/// How long a choice of versions is good before the mirror is asked again.
const FRESH: Duration = Duration::from_secs(24 * 60 * 60);

/// Downloads and unpacks [`PACKAGES`], and returns the sysroot.
///
/// The mirror is asked for newer versions when `update` says so, or when the last answer is older than a day; when it
/// does not answer then, the last versions are used again.
///
/// # Errors
/// [`Error::Download`], [`Error::WrongHash`], [`Error::NoMirror`].
pub fn unpack(host: &Host, apt: &Apt, stages: &Stages, progress: &Progress, update: bool) -> Result<PathBuf> {
    let versions = versions(apt, stages, progress, update)?;
    let inputs = versions.iter().fold(Inputs::new(), |inputs, p| inputs.with(&p.name, &p.version));
    stages.build("packages", &inputs, progress, |dir, log, task| {
        let debs = dir.join("debs");
        fs::create_dir(&debs).map_err(Error::io("create", &debs))?;
        task.doing(&format!("downloading {} packages", versions.len()));
        apt.download(&versions, &debs, log)?;
        let mut files: Vec<PathBuf> =
            fs::read_dir(&debs).map_err(Error::io("list", &debs))?.flatten().map(|entry| entry.path()).collect();
        files.sort();
        for file in &files {
            task.doing(&format!("unpacking {}", file.file_name().unwrap_or_default().to_string_lossy()));
            log.run(host.command("dpkg-deb").arg("-x").arg(file).arg(dir))?;
        }
        crate::stage::remove(&debs)
    })
}

/// The versions to use.
pub(crate) fn versions(apt: &Apt, stages: &Stages, progress: &Progress, update: bool) -> Result<Vec<Package>> {
    // Named after what was asked for, so that an answer to another question is not taken for this one's.
    let question = PACKAGES.iter().fold(Inputs::new().with("mirror", apt.mirror()), |i, name| i.with("name", name));
    let file = stages.path("versions", &question);
    let known = read_versions(&file);
    if let Some((versions, age)) = &known
        && *age < FRESH
        && !update
    {
        return Ok(versions.clone());
    }
    let task = progress.start("versions");
    task.doing("asking the mirror for the newest versions");
    let log = stages.log("versions")?;
    match (apt.update(&log).and_then(|()| apt.resolve(PACKAGES, &log)), known) {
        (Ok(versions), _) => {
            let text: String = versions.iter().flat_map(|p| [&p.name, "=", &p.version, "\n"]).collect();
            fs::write(&file, text).map_err(Error::io("write", &file))?;
            Ok(versions)
        }
        (Err(Error::Download { .. }), Some((versions, _))) if !update => {
            progress.note("The mirror does not answer; using the package versions of the last run.");
            Ok(versions)
        }
        (Err(e), _) => Err(e),
    }
}

fn read_versions(file: &Path) -> Option<(Vec<Package>, Duration)> {
    let age = fs::metadata(file).ok()?.modified().ok()?.elapsed().unwrap_or_default();
    let parse = |line: &str| {
        let (name, version) = line.split_once('=')?;
        Some(Package { name: name.to_owned(), version: version.to_owned() })
    };
    let versions: Vec<Package> = fs::read_to_string(file).ok()?.lines().map(parse).collect::<Option<_>>()?;
    (versions.len() == PACKAGES.len()).then_some((versions, age))
}

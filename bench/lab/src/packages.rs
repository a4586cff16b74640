//! Debian's Xen, dom0 kernel and tools: which versions, and their files, unpacked but not installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::apt::{Apt, Package};
use crate::xen::Group;
use crate::{Error, Host, Inputs, Progress, Result, Stages, Xen};

/// How long a choice of versions is good before the mirror is asked again.
const FRESH: Duration = Duration::from_secs(24 * 60 * 60);

/// Downloads and unpacks what `xen` needs, and returns the sysroot. The apts have what they keep in `dir`.
///
/// The mirror is asked for newer versions when `update` says so, or when the last answer is older than a day; when it
/// does not answer then, the last versions are used again.
///
/// # Errors
/// [`Error::Download`], [`Error::WrongHash`], [`Error::NoMirror`].
pub fn unpack(
    host: &Host,
    xen: Xen,
    dir: &Path,
    stages: &Stages,
    progress: &Progress,
    update: bool,
) -> Result<PathBuf> {
    let mut chosen = Vec::new();
    for group in xen.packages() {
        let apt = apt(host, dir, group.release)?;
        let versions = versions(&apt, &group, stages, progress, update)?;
        chosen.push((apt, versions));
    }
    let all = chosen.iter().flat_map(|(_, versions)| versions);
    let inputs = all.clone().fold(Inputs::new(), |inputs, p| inputs.with(&p.name, &p.version));
    stages.build("packages", &inputs, progress, |dir, log, task| {
        let debs = dir.join("debs");
        fs::create_dir(&debs).map_err(Error::io("create", &debs))?;
        task.doing(&format!("downloading {} packages", all.count()));
        for (apt, versions) in &chosen {
            apt.download(versions, &debs, log)?;
        }
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

/// The apt of a Debian release, below `dir`.
///
/// # Errors
/// Those of [`Apt::new`].
pub fn apt(host: &Host, dir: &Path, release: &str) -> Result<Apt> {
    Apt::new(host, &dir.join(release), release)
}

/// The versions to use.
pub(crate) fn versions(
    apt: &Apt,
    group: &Group,
    stages: &Stages,
    progress: &Progress,
    update: bool,
) -> Result<Vec<Package>> {
    // Named after what was asked for, so that an answer to another question is not taken for this one's.
    let question = Inputs::new().with("mirror", apt.mirror()).with("release", group.release);
    let question = group.names.iter().fold(question, |i, name| i.with("name", name));
    let file = stages.path("versions", &question);
    let known = read_versions(&file, group.names.len());
    if let Some((versions, age)) = &known
        && *age < FRESH
        && !update
    {
        return Ok(versions.clone());
    }
    let task = progress.start("versions");
    task.doing(&format!("asking the mirror for the newest versions in {}", group.release));
    let log = stages.log("versions")?;
    match (apt.update(&log).and_then(|()| apt.resolve(&group.names, &log)), known) {
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

/// The last answer, if it is one for so many packages, and how old it is.
fn read_versions(file: &Path, count: usize) -> Option<(Vec<Package>, Duration)> {
    let age = fs::metadata(file).ok()?.modified().ok()?.elapsed().unwrap_or_default();
    let parse = |line: &str| {
        let (name, version) = line.split_once('=')?;
        Some(Package { name: name.to_owned(), version: version.to_owned() })
    };
    let versions: Vec<Package> = fs::read_to_string(file).ok()?.lines().map(parse).collect::<Option<_>>()?;
    (versions.len() == count).then_some((versions, age))
}

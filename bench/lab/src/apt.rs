//! An apt of our own: the mirror and the network settings of this machine's apt, everything else private.
//!
//! Nothing of the system's apt is changed or read beyond that: lists, cache, sources and hooks are ours, so the lab
//! builds the same on a desktop with many sources and in a bare chroot.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::Log;
use crate::{Error, Host, Result};

/// The archive key every Debian has, for [`Mirror`]s whose entry names none.
const KEYRING: &str = "usr/share/keyrings/debian-archive-keyring.gpg";

/// One suite on one mirror, as apt's configuration has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The mirror's address, without a slash at the end.
    pub uri: String,
    /// The suite, such as `bookworm-security`.
    pub suite: String,
}

/// Every binary source of apt's configuration in `etc`: `sources.list`, `*.list` and `*.sources`.
#[must_use]
pub fn sources(etc: &Path) -> Vec<Source> {
    let mut files: Vec<PathBuf> = fs::read_dir(etc.join("sources.list.d"))
        .map(|entries| entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
        .unwrap_or_default();
    files.sort();
    files.insert(0, etc.join("sources.list"));
    let mut sources = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap_or_default();
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(text.lines().filter_map(one_line)),
            Some("sources") => sources.extend(deb822(&text)),
            _ => {}
        }
    }
    sources
}

/// `deb [options] URI SUITE COMPONENT…`
fn one_line(line: &str) -> Option<Source> {
    let rest = line.split('#').next()?.trim().strip_prefix("deb")?;
    let rest = rest.strip_prefix(char::is_whitespace)?.trim_start();
    let rest = match rest.strip_prefix('[') {
        Some(options) => options.split_once(']')?.1,
        None => rest,
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    words.any(|component| component == "main").then(|| source(uri, suite))
}

/// Stanzas of `Field: values`, with values going on in indented lines.
fn deb822(text: &str) -> Vec<Source> {
    let without_comments: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let mut sources = Vec::new();
    for stanza in without_comments.split(|line| line.trim().is_empty()) {
        let field = |name: &str| -> Vec<&str> {
            let mut values = Vec::new();
            let mut inside = false;
            for line in stanza {
                if line.starts_with([' ', '\t']) {
                    values.extend(line.split_whitespace().filter(|_| inside));
                } else if let Some((field, value)) = line.split_once(':') {
                    inside = field.eq_ignore_ascii_case(name);
                    values.extend(value.split_whitespace().filter(|_| inside));
                }
            }
            values
        };
        let enabled = !field("Enabled").contains(&"no");
        if enabled && field("Types").contains(&"deb") && field("Components").contains(&"main") {
            for uri in field("URIs") {
                sources.extend(field("Suites").into_iter().map(|suite| source(uri, suite)));
            }
        }
    }
    sources
}

fn source(uri: &str, suite: &str) -> Source {
    Source { uri: uri.trim_end_matches('/').to_owned(), suite: suite.to_owned() }
}

/// What ends the name of a metapackage that is not meant itself.
const DEPENDS: &str = "/depends";

/// A package in the version that was chosen.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// The private apt.
#[derive(Debug)]
pub struct Apt {
    host: Host,
    dir: PathBuf,
    /// Where the release itself is: packages of any release are in its pool.
    mirror: String,
}

impl Apt {
    /// An apt of the Debian release with the codename `release` that keeps everything in `dir`, with the mirror `host`'s own apt has
    /// for its release.
    ///
    /// # Errors
    /// [`Error::NotDebian`]; [`Error::NoMirror`]; [`Error::Io`].
    pub fn new(host: &Host, dir: &Path, release: &str) -> Result<Self> {
        let codename = host.codename()?;
        let etc = host.root.join("etc/apt");
        let all = sources(&etc);
        let of = |suite: &str| all.iter().find(|source| source.suite == suite).map(|source| source.uri.clone());
        let Some(mirror) = of(&codename).or_else(|| of("stable")) else {
            return Err(Error::NoMirror { apt: etc, codename });
        };
        let mut list = String::new();
        let keyring = host.root.join(KEYRING);
        let mut add = |uri: &str, suite: &str| {
            // Writing to a String cannot fail.
            let _ = writeln!(list, "deb [signed-by={}] {uri} {suite} main", keyring.display());
        };
        add(&mirror, release);
        // Point releases hold security updates too, only later: a machine without those suites does without.
        for suffix in ["-updates", "-security"] {
            if let Some(uri) = of(&format!("{codename}{suffix}")) {
                add(&uri, &format!("{release}{suffix}"));
            }
        }
        for sub in ["lists/partial", "archives/partial"] {
            let sub = dir.join(sub);
            fs::create_dir_all(&sub).map_err(Error::io("create", &sub))?;
        }
        let write = |name: &str, text: &str| {
            let file = dir.join(name);
            fs::write(&file, text).map_err(Error::io("write", &file))
        };
        write("sources.list", &list)?;
        let apt = Self { host: host.clone(), dir: dir.to_owned(), mirror };
        write("apt.conf", &apt.configuration()?)?;
        Ok(apt)
    }

    /// Our directories, and of the system's configuration what concerns the network: proxies, time-outs, retries.
    fn configuration(&self) -> Result<String> {
        let mut dump = self.host.command("apt-config");
        let dump = dump.args(["dump", "Acquire"]).output().map_err(|e| crate::command::spawn_error(&dump, e))?;
        let mut conf: String = String::from_utf8_lossy(&dump.stdout)
            .lines()
            .filter(|line| !line.starts_with("Acquire::IndexTargets"))
            .flat_map(|line| [line, "\n"])
            .collect();
        let dir = self.dir.display();
        // The directories belong to this user, so apt's download user could not write to them.
        let _ = write!(
            conf,
            "Acquire::Languages \"none\";\n\
             APT::Sandbox::User \"\";\n\
             APT::Architecture \"amd64\";\n\
             APT::Architectures {{ \"amd64\"; }};\n\
             Dir::Etc::main \"/dev/null\";\n\
             Dir::Etc::parts \"/dev/null\";\n\
             Dir::Etc::preferences \"/dev/null\";\n\
             Dir::Etc::preferencesparts \"/dev/null\";\n\
             Dir::Etc::sourcelist \"{dir}/sources.list\";\n\
             Dir::Etc::sourceparts \"/dev/null\";\n\
             Dir::State::lists \"{dir}/lists\";\n\
             Dir::Cache \"{dir}\";\n\
             Dir::Cache::archives \"{dir}/archives\";\n\
             Dir::Cache::pkgcache \"\";\n\
             Dir::Cache::srcpkgcache \"\";\n"
        );
        Ok(conf)
    }

    /// The mirror of the release.
    #[must_use]
    pub fn mirror(&self) -> &str {
        &self.mirror
    }

    fn command(&self, program: &str) -> Command {
        let mut command = self.host.command(program);
        command.env("APT_CONFIG", self.dir.join("apt.conf"));
        command
    }

    /// Fetches the lists of packages.
    ///
    /// # Errors
    /// [`Error::Download`].
    pub fn update(&self, log: &Log) -> Result<()> {
        // Without this, a mirror that cannot be reached is only a warning.
        let mut update = self.command("apt-get");
        update.args(["update", "-qq", "-o", "APT::Update::Error-Mode=any"]);
        downloaded(log, &mut update, "the lists of Debian's packages")
    }

    /// The newest versions of `names`. A name that ends in `/depends` stands for what that metapackage depends on.
    ///
    /// # Errors
    /// [`Error::Build`] or [`Error::Unexpected`] when a name is unknown.
    pub fn resolve(&self, names: &[String], log: &Log) -> Result<Vec<Package>> {
        let plain: Vec<&str> = names.iter().map(|name| name.strip_suffix(DEPENDS).unwrap_or(name)).collect();
        let (metas, others): (Vec<_>, Vec<_>) =
            names.iter().zip(self.show(&plain, log)?).partition(|(name, _)| name.ends_with(DEPENDS));
        let first = |depends: &str| depends.split([' ', ',']).next().unwrap_or_default().to_owned();
        let behind: Vec<String> = metas.iter().map(|(_, (_, depends))| first(depends)).collect();
        let behind = self.show(&behind.iter().map(String::as_str).collect::<Vec<_>>(), log)?;
        let mut packages: Vec<Package> =
            others.into_iter().map(|(_, shown)| shown).chain(behind).map(|(package, _)| package).collect();
        packages.sort();
        Ok(packages)
    }

    /// The packages' newest versions, and their dependencies. All at once, for each time apt reads all there is.
    fn show(&self, names: &[&str], log: &Log) -> Result<Vec<(Package, String)>> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let text = log.output(self.command("apt-cache").args(["show", "--no-all-versions"]).args(names))?;
        let field = |stanza: &str, field: &str| {
            let value = stanza.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(": "));
            value.unwrap_or_default().to_owned()
        };
        let one = |name: &&str| {
            // Of a name that it does not know, beside others, it only says so.
            let stanza = text.split("\n\n").find(|stanza| field(stanza, "Package") == *name);
            let problem = || format!("there is no package {name} in these lists");
            let stanza =
                stanza.ok_or_else(|| Error::Unexpected { path: self.dir.join("lists"), problem: problem() })?;
            let package = Package { name: (*name).to_owned(), version: field(stanza, "Version") };
            Ok((package, field(stanza, "Depends")))
        };
        names.iter().map(one).collect()
    }

    /// Downloads and verifies packages into `dir`.
    ///
    /// # Errors
    /// [`Error::Download`]; [`Error::WrongHash`].
    pub fn download(&self, packages: &[Package], dir: &Path, log: &Log) -> Result<()> {
        let mut download = self.command("apt-get");
        download.current_dir(dir).args(["download", "-q"]);
        download.args(packages.iter().map(|package| format!("{}={}", package.name, package.version)));
        downloaded(log, &mut download, "Debian's packages")
    }

    /// Downloads a file of the mirror with the given SHA-256.
    ///
    /// # Errors
    /// As [`Apt::download`].
    pub fn download_file(&self, path: &str, sha256: &str, to: &Path, log: &Log) -> Result<()> {
        let uri = format!("{}/{path}", self.mirror);
        let helper = self.host.root.join("usr/lib/apt/apt-helper");
        let mut download = self.command(&helper.to_string_lossy());
        download.arg("download-file").arg(&uri).arg(to).arg(format!("SHA256:{sha256}"));
        downloaded(log, &mut download, &uri)
    }
}

/// Runs a downloader and tells a file that does not come from one that comes wrong.
fn downloaded(log: &Log, command: &mut Command, what: &str) -> Result<()> {
    if log.status(command)?.success() {
        return Ok(());
    }
    let (what, tail) = (what.to_owned(), log.tail());
    let wrong = tail.lines.iter().any(|line| line.contains("Hash Sum mismatch"));
    Err(if wrong { Error::WrongHash { what, tail } } else { Error::Download { what, tail } })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(uri: &str, suite: &str) -> Source {
        source(uri, suite)
    }

    #[test]
    fn one_line_sources() {
        let bookworm = Some(found("http://mirror/debian", "bookworm"));
        assert_eq!(one_line("deb http://mirror/debian bookworm main"), bookworm);
        assert_eq!(one_line("deb http://mirror/debian/ bookworm main contrib # all"), bookworm);
        assert_eq!(one_line("deb [arch=amd64 signed-by=/k.gpg]\thttp://mirror/debian bookworm main"), bookworm);
        assert_eq!(one_line("deb-src http://mirror/debian bookworm main"), None);
        assert_eq!(one_line("# deb http://mirror/debian bookworm main"), None);
        assert_eq!(one_line("deb http://mirror/other bookworm contrib"), None);
        assert_eq!(one_line(""), None);
    }

    #[test]
    fn deb822_sources() {
        let text = "\
Types: deb deb-src
# a comment
URIs: http://mirror/debian/
Suites: bookworm
 bookworm-updates
Components: main contrib
Signed-By: /k.gpg

Types: deb
Enabled: no
URIs: http://other/debian
Suites: bookworm
Components: main

types: deb-src
uris: http://source/debian
suites: trixie
components: main
";
        let mirror = "http://mirror/debian";
        assert_eq!(deb822(text), [found(mirror, "bookworm"), found(mirror, "bookworm-updates")]);
    }

    #[test]
    fn every_file_of_the_configuration_is_read() {
        let etc = tempfile::tempdir().unwrap();
        let parts = etc.path().join("sources.list.d");
        fs::create_dir(&parts).unwrap();
        fs::write(etc.path().join("sources.list"), "deb http://a/debian bookworm main\n").unwrap();
        fs::write(parts.join("b.list"), "deb http://b/debian bookworm-security main\n").unwrap();
        fs::write(parts.join("c.sources"), "Types: deb\nURIs: http://c/debian\nSuites: trixie\nComponents: main\n")
            .unwrap();
        fs::write(parts.join("d.list.disabled"), "deb http://d/debian bookworm main\n").unwrap();
        let uris: Vec<String> = sources(etc.path()).into_iter().map(|source| source.uri).collect();
        assert_eq!(uris, ["http://a/debian", "http://b/debian", "http://c/debian"]);
        assert!(sources(Path::new("/no/such/directory")).is_empty());
    }
}

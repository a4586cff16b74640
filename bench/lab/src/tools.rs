//! The build tools that are needed from the host's own Debian.

use std::fs;
use std::sync::{Mutex, PoisonError};

use crate::{Error, Host, Log, Progress, Result};

/// What the lab needs. The first column of `dpkg-query` must show each as installed.
pub const TOOLS: &[&str] = &[
    "g++",                    // Bochs, libFuzzer
    "grub-common",            // grub-mkimage
    "grub-pc-bin",            // GRUB's modules for a PC BIOS
    "libc6-dev",              // Bochs, the runner
    "libclang-common-14-dev", // bindgen: libclang's own headers
    "libclang1-14",           // bindgen, for Xen's headers
    "make",                   // Bochs
    "patch",                  // Bochs
    "tar",                    // Bochs
    "util-linux",             // setpriv
    "xorriso",                // the image
    "xz-utils",               // Bochs, the kernel
];

/// What the C++ side, its tests, and the check of the scripts need.
pub const CPP: &[&str] = &["clang-format", "cmake", "g++", "libgtest-dev", "make", "meson", "pkg-config", "shellcheck"];

/// Held by who installs: apt lets one at a time.
static INSTALLING: Mutex<()> = Mutex::new(());

/// Installs those of `packages` that are missing.
///
/// # Errors
/// [`Error::NotDebian`]; [`Error::NoPermission`] when this user may not; [`Error::Build`] when apt-get fails.
pub fn install(host: &Host, packages: &[&'static str], progress: &Progress, log: &Log) -> Result<()> {
    host.codename()?;
    let _alone = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
    let missing = missing(host, packages, log)?;
    if missing.is_empty() {
        return Ok(());
    }
    let task = progress.start("tools");
    task.doing(&format!("installing {}", missing.join(" ")));
    let prefix: &[&str] = if host.privileged { &[] } else { &["sudo", "-n"] };
    let update = [prefix, &["apt-get", "update"]].concat();
    let install = [prefix, &["apt-get", "install", "-y", "--no-install-recommends"], &missing].concat();
    if !host.privileged && !may_sudo(host, log) {
        return Err(Error::NoPermission { command: format!("apt-get update && {}", install[2..].join(" ")) });
    }
    let run = |command: &[&str]| log.run(host.command(command[0]).args(&command[1..]));
    if !has_lists(host) {
        run(&update)?;
    } else if run(&install).is_ok() {
        return Ok(());
    } else {
        // Lists older than the mirror name versions that are gone from it.
        run(&update)?;
    }
    run(&install)
}

/// Which versions of `packages` are installed. Those that are not are left out.
///
/// # Errors
/// [`Error::Spawn`].
pub fn versions(host: &Host, packages: &[&str]) -> Result<Vec<(String, String)>> {
    let mut query = host.command("dpkg-query");
    query.args(["-W", "-f", "${Package} ${Version}\n"]).args(packages);
    let output = query.output().map_err(|e| crate::command::spawn_error(&query, e))?;
    let line = |line: &str| line.split_once(' ').map(|(name, version)| (name.to_owned(), version.to_owned()));
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(line).collect())
}

fn may_sudo(host: &Host, log: &Log) -> bool {
    log.status(host.command("sudo").args(["-n", "true"])).is_ok_and(|status| status.success())
}

fn missing(host: &Host, packages: &[&'static str], log: &Log) -> Result<Vec<&'static str>> {
    // It fails when it does not know one of them; what it prints about the others is all that counts.
    let mut query = host.command("dpkg-query");
    query.args(["-W", "-f", "${db:Status-Status} ${Package}\n"]).args(packages);
    let output = query.output().map_err(|e| crate::command::spawn_error(&query, e))?;
    let installed = String::from_utf8_lossy(&output.stdout);
    log.line(&installed)?;
    let is_installed = |tool: &str| installed.lines().any(|line| line.strip_prefix("installed ") == Some(tool));
    Ok(packages.iter().copied().filter(|tool| !is_installed(tool)).collect())
}

/// Whether apt has lists of packages at all: a container's image usually has none.
fn has_lists(host: &Host) -> bool {
    fs::read_dir(host.root.join("var/lib/apt/lists"))
        .is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name().to_string_lossy().contains("_Packages")))
}

//! The program that serves the benchmark guest's breakpoint with vmi-rs.
//!
//! vmi-rs comes from where cargo gets crates, so no tree is needed; but its bindings want the libraries of Xen 4.20 or newer.

use std::fs;
use std::path::Path;

use crate::build::{self, Program};
use crate::{Elsewhere, Error, Host, Progress, Result, Stages, plan, tools};

/// Where Xen's development files say which version they are of, from the root of a file system.
const PACKAGE: &str = "usr/lib/x86_64-linux-gnu/pkgconfig/xencontrol.pc";
/// The oldest that will do, as major and minor number.
const NEEDED: (u32, u32) = (4, 20);

/// Builds the program of the repository in `repo` against Xen's libraries in `sysroot`, or else the system's.
///
/// # Errors
/// [`Error::NoVmiRs`] when these are missing or too old; [`Error::Build`]; those of [`tools::install`].
pub fn build(
    host: &Host,
    repo: &Path,
    sysroot: Option<&Path>,
    stages: &Stages,
    progress: &Progress,
) -> Result<Elsewhere> {
    check(sysroot.unwrap_or(&host.root))?;
    tools::install(host, &["pkg-config"], progress, &stages.log("tools")?)?;
    let program = build::build(Program::VmiRs, host, repo, sysroot, stages, progress)?;
    Ok(Elsewhere { host: plan::VMI_RS, program, has_hyperbp: false })
}

/// Whether Xen's libraries below `root` are new enough.
fn check(root: &Path) -> Result<()> {
    let needs = format!("its bindings need the libraries of Xen {}.{} or newer", NEEDED.0, NEEDED.1);
    let no = |what: &str| Error::NoVmiRs { problem: format!("{needs}, and {what}") };
    let text = fs::read_to_string(root.join(PACKAGE)).map_err(|_| no("there are none to build with"))?;
    let version = version(&text).ok_or_else(|| no("those that are here do not say what they are"))?;
    if version < NEEDED {
        return Err(no(&format!("these are of {}.{}", version.0, version.1)));
    }
    Ok(())
}

/// The version in a `.pc` file.
fn version(package: &str) -> Option<(u32, u32)> {
    let version = package.lines().find_map(|line| line.strip_prefix("Version:"))?;
    let mut numbers = version.trim().split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is wrong with libraries whose `.pc` file says this.
    fn problem(package: &str) -> Option<String> {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join(PACKAGE);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, package).unwrap();
        check(root.path()).err().map(|error| error.to_string())
    }

    #[test]
    fn xen_must_be_new_enough() {
        let of = |version: &str| problem(&format!("Name: Xencontrol\nVersion: {version}\nLibs: -lxenctrl\n"));
        assert_eq!(of("4.20.0"), None);
        assert_eq!(of("5.0"), None);
        assert!(of("4.17.5").unwrap().contains("4.20 or newer, and these are of 4.17"));
        assert!(of("4.9.0").unwrap().contains("4.9"));
        assert!(of("soon").unwrap().contains("do not say"));
        assert!(check(Path::new("/no/such")).unwrap_err().to_string().contains("none to build with"));
    }
}

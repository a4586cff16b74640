//! Other hosts than the runner: DRAKVUF and SmartVMI, as the user has built them, and vmi-rs, which is built here.

use std::path::{Path, PathBuf};

use clap::Args;
use hyperbp_lab::{Elsewhere, Error, Lab, Xen, plan};

/// Where they are built.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Trees {
    /// Measure in DRAKVUF, too: Meson's build directory of it, with or without drakvuf-patches
    #[arg(long, value_name = "BUILD_DIR")]
    drakvuf: Option<PathBuf>,

    /// Measure in SmartVMI, too: CMake's build directory of its vmicore, with or without smartvmi-patches
    #[arg(long, value_name = "BUILD_DIR")]
    smartvmi: Option<PathBuf>,
}

impl Trees {
    /// Builds the programs that serve breakpoints from inside those that were named.
    ///
    /// # Errors
    /// Those of [`Lab::drakvuf`] and [`Lab::smartvmi`].
    pub(crate) fn build(&self, lab: &Lab) -> hyperbp_lab::Result<Programs> {
        let drakvuf = self.drakvuf.as_deref().map(|tree| lab.drakvuf(tree));
        let smartvmi = self.smartvmi.as_deref().map(|tree| lab.smartvmi(tree));
        Ok(Programs { all: drakvuf.into_iter().chain(smartvmi).collect::<Result<_, _>>()?, without_vmi_rs: None })
    }

    /// Those that were named, by their names for people.
    pub(crate) fn named(&self) -> Vec<(&'static str, &Path)> {
        let trees = [("DRAKVUF", &self.drakvuf), ("SmartVMI", &self.smartvmi)];
        trees.into_iter().filter_map(|(name, tree)| Some((name, tree.as_deref()?))).collect()
    }
}

/// The programs there are.
#[derive(Clone, Debug, Default)]
pub(crate) struct Programs {
    pub(crate) all: Vec<Elsewhere>,
    /// Why vmi-rs is not among them, if that was tried.
    without_vmi_rs: Option<String>,
}

impl Programs {
    /// Adds the one on vmi-rs, if it can be built against `sysroot`'s Xen or the system's.
    pub(crate) fn add_vmi_rs(&mut self, lab: &Lab, sysroot: Option<&Path>) {
        match lab.vmi_rs(sysroot) {
            Ok(program) => self.all.push(program),
            Err(Error::Build { tail, .. }) => {
                self.without_vmi_rs = Some(format!("it does not build here: {} says why", tail.log.display()));
            }
            // The sysroot is the emulated machine's, and that can be another.
            Err(error @ Error::NoVmiRs { .. }) if sysroot.is_some() => {
                self.without_vmi_rs = Some(format!("{error}: --xen {} has them", Xen::V4_20));
            }
            Err(error) => self.without_vmi_rs = Some(error.to_string()),
        }
    }

    /// What of a host, of [`plan::ELSEWHERE`], is missing.
    pub(crate) fn skipped(&self, host: &str) -> Option<Skipped> {
        match (host, &self.without_vmi_rs) {
            (plan::VMI_RS, Some(why)) => Some(Skipped::Host(format!("vmi-rs ({why})"))),
            (plan::VMI_RS, None) => None,
            _ => skipped(host, &self.all),
        }
    }
}

/// What cannot be measured, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Skipped {
    /// The host: there is none.
    Host(String),
    /// hyperbp in it.
    Hyperbp(String),
}

/// What of a host that the user builds is missing.
fn skipped(host: &str, programs: &[Elsewhere]) -> Option<Skipped> {
    let title = title(host);
    match programs.iter().find(|program| program.host == host) {
        None => Some(Skipped::Host(format!(
            "{title} (to measure in it, build it, and name its build directory with --{host})"
        ))),
        Some(program) if !program.has_hyperbp => {
            Some(Skipped::Hyperbp(format!("hyperbp in {title} (this one was built without it: see {host}-patches)")))
        }
        Some(_) => None,
    }
}

/// How a host is called in messages.
pub(crate) fn title(host: &str) -> &str {
    match host {
        plan::DRAKVUF => "DRAKVUF",
        plan::SMARTVMI => "SmartVMI",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_skipped_is_named() {
        let program = |host, has_hyperbp| Elsewhere { host, program: PathBuf::new(), has_hyperbp };
        let programs = [program(plan::SMARTVMI, false)];
        let missing = skipped(plan::DRAKVUF, &programs);
        assert!(matches!(missing, Some(Skipped::Host(what)) if what.contains("DRAKVUF") && what.contains("--drakvuf")));
        let without = skipped(plan::SMARTVMI, &programs);
        assert!(matches!(without, Some(Skipped::Hyperbp(what)) if what.contains("smartvmi-patches")));
        assert_eq!(skipped(plan::SMARTVMI, &[program(plan::SMARTVMI, true)]), None);
    }

    #[test]
    fn vmi_rs_is_missing_for_a_reason() {
        let mut programs = Programs::default();
        assert_eq!(programs.skipped(plan::VMI_RS), None);
        programs.without_vmi_rs = Some("Xen is too old".to_owned());
        assert_eq!(programs.skipped(plan::VMI_RS), Some(Skipped::Host("vmi-rs (Xen is too old)".to_owned())));
        assert!(matches!(programs.skipped(plan::DRAKVUF), Some(Skipped::Host(_))));
    }
}

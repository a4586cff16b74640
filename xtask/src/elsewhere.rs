//! Other hosts than the runner: DRAKVUF and SmartVMI, as the user has built them.

use std::path::{Path, PathBuf};

use clap::Args;
use hyperbp_lab::{Elsewhere, Lab, plan};

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
    pub(crate) fn build(&self, lab: &Lab) -> hyperbp_lab::Result<Vec<Elsewhere>> {
        let drakvuf = self.drakvuf.as_deref().map(|tree| lab.drakvuf(tree));
        let smartvmi = self.smartvmi.as_deref().map(|tree| lab.smartvmi(tree));
        drakvuf.into_iter().chain(smartvmi).collect()
    }

    /// Those that were named, by their names for people.
    pub(crate) fn named(&self) -> Vec<(&'static str, &Path)> {
        let trees = [("DRAKVUF", &self.drakvuf), ("SmartVMI", &self.smartvmi)];
        trees.into_iter().filter_map(|(name, tree)| Some((name, tree.as_deref()?))).collect()
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

/// What of a host, of [`plan::ELSEWHERE`], is missing.
pub(crate) fn skipped(host: &str, programs: &[Elsewhere]) -> Option<Skipped> {
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

/// The programs for a selection; `place` says where the runner finds one.
pub(crate) fn named(programs: &[Elsewhere], place: impl Fn(&Elsewhere) -> String) -> Vec<(String, String)> {
    programs.iter().map(|program| (program.host.to_owned(), place(program))).collect()
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
}

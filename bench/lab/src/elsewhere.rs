//! Programs of ours that serve the benchmark guest's breakpoints with somebody else's monitor, such as DRAKVUF.

use std::path::PathBuf;

use crate::{Job, plan};

/// The script's variable with the runner's arguments for these programs.
const VARIABLE: &str = "ELSEWHERE";

/// A program, and what it can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elsewhere {
    /// The host it is: one of [`plan::ELSEWHERE`](crate::plan::ELSEWHERE).
    pub host: &'static str,
    /// The program, such as `drakvuf-bench`.
    pub program: PathBuf,
    /// Whether hyperbp is loaded in the monitor it is made of.
    pub has_hyperbp: bool,
}

/// Names of shared libraries that LibVMI, and DRAKVUF besides, load themselves. They leave out the version, and so are usually
/// found only where Xen's headers are installed.
pub(crate) const LOADS: [&str; 5] =
    ["libxenctrl.so", "libxenforeignmemory.so", "libxenlight.so", "libxenstore.so", "libxentoollog.so"];

impl Elsewhere {
    /// Puts the program, and what it needs, into the job's dom0. Its script has the runner's arguments for it, and for others
    /// that are put there, in `$ELSEWHERE`.
    pub fn put_into(&self, job: &mut Job) {
        let argument = format!("--{} {}", self.host, self.in_dom0());
        match job.variables.iter_mut().find(|(name, _)| name == VARIABLE) {
            Some((_, arguments)) => *arguments += &format!(" {argument}"),
            None => job.variables.push((VARIABLE.to_owned(), argument)),
        }
        job.programs.push(self.program.clone());
        // vmi-rs has no LibVMI.
        let loads = if self.host == plan::VMI_RS { &[][..] } else { &LOADS };
        for library in loads {
            if !job.libraries.iter().any(|loaded| loaded == library) {
                job.libraries.push((*library).to_owned());
            }
        }
    }

    /// These programs for [`Selection::elsewhere`](crate::plan::Selection::elsewhere): `place` says where the runner finds one.
    #[must_use]
    pub fn named(programs: &[Self], place: impl Fn(&Self) -> String) -> Vec<(String, String)> {
        programs.iter().map(|program| (program.host.to_owned(), place(program))).collect()
    }

    /// Those of them for [`Selection::stock`](crate::plan::Selection::stock): the ones without hyperbp.
    #[must_use]
    pub fn stock(programs: &[Self]) -> Vec<String> {
        programs.iter().filter(|program| !program.has_hyperbp).map(|program| program.host.to_owned()).collect()
    }

    /// Where it is then.
    #[must_use]
    pub fn in_dom0(&self) -> String {
        let name = self.program.file_name().unwrap_or_default();
        format!("/bin/{}", name.to_string_lossy())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::tests::empty;

    #[test]
    fn several_of_them_share_what_they_need() {
        let mut job = empty();
        let programs = [(plan::DRAKVUF, "/t/drakvuf-bench"), (plan::SMARTVMI, "/t/smartvmi-bench")];
        for (host, program) in programs {
            Elsewhere { host, program: program.into(), has_hyperbp: false }.put_into(&mut job);
        }
        let arguments = "--drakvuf /bin/drakvuf-bench --smartvmi /bin/smartvmi-bench".to_owned();
        assert_eq!(job.variables, [(VARIABLE.to_owned(), arguments)]);
        assert_eq!((job.programs.len(), job.libraries.len()), (2, LOADS.len()));
    }

    #[test]
    fn what_has_no_libvmi_loads_nothing() {
        let mut job = empty();
        Elsewhere { host: plan::VMI_RS, program: "/t/vmi-rs-bench".into(), has_hyperbp: false }.put_into(&mut job);
        assert_eq!((job.programs.len(), job.libraries.len()), (1, 0));
    }
}

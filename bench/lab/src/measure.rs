//! A bench, from a selection to collections of samples.

use std::path::{Path, PathBuf};

use crate::plan::{self, Selection};
use crate::{Bench, Elsewhere, Options, Result, memory_for_profile, profile};

/// What to measure.
#[derive(Clone, Debug)]
pub struct Measure<'a> {
    /// What, with the programs by their places in dom0: see [`Elsewhere::in_dom0`].
    pub selection: &'a Selection,
    /// These programs.
    pub programs: &'a [Elsewhere],
    /// The program that executes the breakpoint in a Linux guest, if it is not to be the benchmark guest.
    pub program: Option<&'a Path>,
    /// The profile of that guest's kernel, for hosts that then look up the process of each hit.
    pub profile: Option<&'a Path>,
    /// CPUs of the emulated machine; with 2, dom0 and the guest have one each.
    pub cpus: u32,
    /// What is not as usual in these machines.
    pub options: Options,
    /// How many emulated machines run at the same time.
    pub parallel: usize,
}

/// What came of one machine.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The directories of the collections that it has left.
    pub collections: Vec<PathBuf>,
    /// See [`Outcome::windows`](crate::Outcome::windows).
    pub windows: PathBuf,
}

impl Bench<'_> {
    /// Measures with the `runner`, in as many machines as it takes: [`plan`] says which. What each leaves
    /// is below `out`.
    ///
    /// # Errors
    /// Those of [`profile::check`], [`image`](Self::image), [`run`](Self::run) and
    /// [`Outcome::unpack`](crate::Outcome::unpack).
    pub fn measure(&self, runner: &Path, measure: &Measure<'_>, out: &Path) -> Result<Vec<Measured>> {
        let machines = plan::machines(measure.selection);
        let profile = measure.profile.map(|file| Ok((file, profile::check(file, &self.kernel)?))).transpose()?;
        let mut jobs = Vec::new();
        for (n, selections) in (1..).zip(&machines) {
            let name = format!("bench-{n}");
            let mut job = match measure.program {
                None => self.bench(&name, runner, selections, measure.cpus),
                Some(program) => {
                    self.bench_in_linux(&format!("{name}-linux"), runner, program, selections, measure.cpus)
                }
            };
            job.options = measure.options.clone();
            if let Some((file, size)) = profile {
                job.memory = memory_for_profile(size);
                job.files.push(("profile.json".to_owned(), file.to_owned()));
            }
            for program in measure.programs {
                program.put_into(&mut job);
            }
            let image = self.image(&job)?;
            jobs.push((job, image));
        }
        let outcomes = self.run(&jobs, measure.parallel)?;
        let mut measured = Vec::new();
        for ((n, outcome), selections) in outcomes.into_iter().enumerate().zip(&machines) {
            let dir = out.join(n.to_string());
            outcome.unpack(&dir)?;
            let collections = (0..selections.len()).map(|run| dir.join(run.to_string())).collect();
            measured.push(Measured { collections, windows: outcome.windows });
        }
        Ok(measured)
    }
}

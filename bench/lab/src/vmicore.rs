//! The whole of SmartVMI's vmicore on the Linux guest, as the user has built it, with the plugin that is among smartvmi-patches.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::smartvmi::Tree;
use crate::{Bench, Error, Job, Program, Result, elsewhere, profile};

const SCRIPT: &str = include_str!("../dom0/smartvmi.sh");

/// The plugin.
const PLUGIN: &str = "libhyperbp_smartvmi.so";
/// Where it is built when smartvmi-patches' README is followed, from CMake's source directory of vmicore.
const BUILT: &str = "../plugins/hyperbp/build/src";

/// What [`Bench::vmicore`] is to run.
#[derive(Clone, Copy, Debug)]
pub struct Introspection<'a> {
    /// The directory vmicore was built in.
    pub build: &'a Path,
    /// The plugin, or nothing for the one that is built beside vmicore.
    pub plugin: Option<&'a Path>,
    /// The profile of the guest's kernel.
    pub profile: &'a Path,
    /// What runs one after the other: `before` and `after` are passes without vmicore, `original` and `hyperbp` say who sets
    /// its breakpoints.
    pub passes: &'a [&'a str],
    /// The mechanism of hyperbp's.
    pub mechanism: &'a str,
    /// How many rounds the guest's processes work through in each pass.
    pub rounds: u32,
}

impl Bench<'_> {
    /// A job that runs vmicore on a Linux guest with two processes that share a page of code, and a breakpoint in one of them.
    /// It leaves what the guest said in `console`, and in a directory for each pass with vmicore what that has said (`log`,
    /// `errors`), what the plugin reports (`hyperbp.jsonl`), and in `ended` its exit code and, `early` or `late`, whether it was
    /// there to the end.
    ///
    /// # Errors
    /// [`Error::NoSmartvmi`] when there is no such vmicore or plugin; those of [`profile::check`] and of building the program
    /// that runs in the guest.
    pub fn vmicore(&self, what: &Introspection<'_>) -> Result<Job> {
        let Introspection { build, plugin, profile, passes, mechanism, rounds } = what;
        let lab = self.lab;
        let build = std::path::absolute(build).map_err(Error::io("find", build))?;
        let no = |problem: String| Error::NoSmartvmi { build: build.clone(), problem };
        let tree = Tree::read(&lab.host, &build, &lab.stages.log("smartvmi-tree")?)?;
        if passes.contains(&"hyperbp") && !tree.has_hyperbp {
            return Err(no("it was built without hyperbp: see smartvmi-patches".to_owned()));
        }
        let plugin = plugin.map_or_else(|| tree.source.join(BUILT).join(PLUGIN), PathBuf::from);
        let name = plugin.file_name().filter(|_| plugin.is_file());
        let name = name.map(|name| name.to_string_lossy().into_owned()).ok_or_else(|| {
            no(format!("there is no {}: smartvmi-patches/README.md says how the plugin is built", plugin.display()))
        })?;
        let size = profile::check(profile, &self.kernel)?;

        let mut job = self.job("smartvmi".to_owned(), SCRIPT, 1, Duration::from_secs(3600));
        job.linux = true;
        job.guest_programs.push(lab.build(Program::Pair, None)?);
        job.moved = crate::MOVED;
        job.memory = crate::memory_for_profile(size);
        job.files.push(("profile.json".to_owned(), profile.to_path_buf()));
        job.libraries.extend(elsewhere::LOADS.map(str::to_owned));
        job.programs.extend([tree.program, plugin]);
        let variables = [
            ("PLUGIN", name),
            ("PASSES", passes.join(" ")),
            ("MECHANISM", (*mechanism).to_owned()),
            ("ROUNDS", rounds.to_string()),
        ];
        job.variables.extend(variables.map(|(name, value)| (name.to_owned(), value)));
        Ok(job)
    }
}

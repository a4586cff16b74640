//! What a run of the machine is to do.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

/// Where in physical memory the machine has a ROM with [`Job::late`], for dom0's shell to read: a place for the firmware of
/// cards, which a PC's firmware passes over as this is none.
pub(crate) const LATE_AT: u32 = 0xd_0000;
/// How much the script has to read there.
pub(crate) const LATE_SIZE: usize = 2048;

/// Options that are not as usual, each after those that it may contradict: then the last counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// On Xen's command line, as `sched=null`.
    pub xen: Vec<String>,
    /// On that of dom0's kernel.
    pub dom0: Vec<String>,
    /// Lines of the guests' configuration, as `cpu_weight = 256`.
    pub guest: Vec<String>,
}

/// A script for dom0, and the machine it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its name, for logs and messages.
    pub name: String,
    /// The script, for BusyBox's `sh`. It may leave results in the directory `$OUT`.
    pub script: String,
    /// Shell variables that are set before the script.
    pub variables: Vec<(String, String)>,
    /// More of them, which are not in the image: until the script asks for them (in a ROM at physical address 0xd0000) machines with the same
    /// image do exactly the same.
    pub late: Vec<(String, String)>,
    /// Programs of ours that are put into dom0's `/bin`, dynamically linked or not.
    pub programs: Vec<PathBuf>,
    /// Shared libraries that these load by a name without a version, such as `libxenctrl.so`. They are looked for where Xen's are.
    pub libraries: Vec<String>,
    /// Other files that are put into dom0: the path there, without a slash at the start, and the file.
    pub files: Vec<(String, PathBuf)>,
    /// Kernel of the benchmark guest, `/guest/guest.elf` in dom0.
    pub guest: PathBuf,
    /// Whether there is a Linux guest, too: `/guest/linux.cfg` in dom0.
    pub linux: bool,
    /// Programs that are put into that guest's `/bin`: static ones, for it has no libraries.
    pub guest_programs: Vec<PathBuf>,
    /// How far that guest's kernel is moved in memory, in bytes: a multiple of 2 MiB.
    pub moved: u32,
    /// dom0's memory in MiB. What is in its file system is in there, too.
    pub memory: u32,
    /// CPUs of the machine: with 2, dom0 has the first and the guest the second.
    pub cpus: u32,
    /// What is not as usual.
    pub options: Options,
    /// How long the machine may run.
    pub limit: Duration,
    /// How long it may say nothing.
    pub silence: Duration,
}

impl Job {
    /// One job of several, for a machine that does one after the other, and has to boot only once. Each has a directory of its name
    /// in the results, and the guests it has left are destroyed after it. They must not have [late](Self::late) variables, or
    /// different [options](Self::options) or guests. `None` if there are none.
    #[must_use]
    pub fn in_turn(name: &str, jobs: Vec<Self>) -> Option<Self> {
        let script = jobs.iter().map(Self::part).collect();
        let all = jobs.into_iter().reduce(|mut all, job| {
            for program in job.programs {
                if !all.programs.contains(&program) {
                    all.programs.push(program);
                }
            }
            all.libraries.extend(job.libraries);
            all.files.extend(job.files);
            all.guest_programs.extend(job.guest_programs);
            all.linux |= job.linux;
            all.memory = all.memory.max(job.memory);
            all.cpus = all.cpus.max(job.cpus);
            all.limit += job.limit;
            all.silence = all.silence.max(job.silence);
            all
        })?;
        Some(Self { name: name.to_owned(), script, variables: Vec::new(), ..all })
    }

    /// Its script, for one of which it is a part.
    fn part(&self) -> String {
        let Self { name, .. } = self;
        let leave = "xl list | tail -n +3 | while read -r domain rest; do xl destroy \"$domain\"; done";
        format!("(\nOUT=$OUT/{name}\nmkdir \"$OUT\"\n{}\n) || exit\n{leave}\n", self.shell())
    }

    /// The machine's memory in MiB: what dom0 does not have is for Xen and the guests.
    #[must_use]
    pub fn machine_memory(&self) -> u32 {
        (2 * self.memory).next_power_of_two()
    }

    /// The script with its variables, quoted, in front.
    #[must_use]
    pub fn shell(&self) -> String {
        assignments(&self.variables) + &self.script
    }

    /// The ROM that holds the late variables, if there are any.
    #[must_use]
    pub fn rom(&self) -> Option<Vec<u8>> {
        let mut rom = assignments(&self.late).into_bytes();
        rom.resize(rom.len().next_multiple_of(LATE_SIZE), b'\n');
        (!self.late.is_empty()).then_some(rom)
    }
}

/// Variables, quoted, for a shell.
fn assignments(variables: &[(String, String)]) -> String {
    let mut shell = String::new();
    for (name, value) in variables {
        // Writing to a String cannot fail.
        let _ = writeln!(shell, "{name}='{}'", value.replace('\'', r"'\''"));
    }
    shell
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A job that does nothing.
    pub(crate) fn empty() -> Job {
        Job {
            name: "test".into(),
            script: String::new(),
            variables: vec![],
            late: vec![],
            programs: vec![],
            libraries: vec![],
            files: vec![],
            guest: PathBuf::new(),
            linux: false,
            guest_programs: vec![],
            moved: 0,
            memory: 0,
            cpus: 1,
            options: Options::default(),
            limit: Duration::ZERO,
            silence: Duration::ZERO,
        }
    }

    #[test]
    fn several_do_not_disturb_each_other() {
        let job = |name: &str, script: &str| Job {
            name: name.into(),
            script: format!("echo \"$X$1\" >$OUT/said\n{script}"),
            variables: vec![("X".into(), name.into())],
            programs: vec!["runner".into()],
            ..empty()
        };
        let all =
            Job::in_turn("all", vec![job("first", "X=9; true"), job("second", "exit 3"), job("third", "")]).unwrap();
        assert_eq!((all.name.as_str(), all.programs.len()), ("all", 1));
        let dir = tempfile::tempdir().unwrap();
        let mut shell = std::process::Command::new("sh");
        // There is nothing to destroy.
        shell.arg("-c").arg(format!("xl() {{ :; }}\n{}", all.shell())).env("OUT", dir.path());
        assert_eq!(shell.status().unwrap().code(), Some(3));
        let said = |name: &str| std::fs::read_to_string(dir.path().join(name).join("said")).unwrap_or_default();
        assert_eq!(["first", "second", "third"].map(said), ["first\n", "second\n", ""]);
    }

    #[test]
    fn variables_survive_the_shell() {
        let value = "it's $HOME; \"x\" `id`";
        let job =
            Job { script: "printf %s \"$VALUE\"".into(), variables: vec![("VALUE".into(), value.into())], ..empty() };
        let printed = std::process::Command::new("sh").arg("-c").arg(job.shell()).output().unwrap().stdout;
        assert_eq!(String::from_utf8(printed).unwrap(), value);
    }
}

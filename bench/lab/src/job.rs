//! What a run of the machine is to do.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

/// Where in physical memory the machine has a ROM with [`Job::late`], for dom0's shell to read: a place for the firmware of
/// cards, which a PC's firmware passes over as this is none.
pub(crate) const LATE_AT: u32 = 0xd_0000;
/// How much the script has to read there.
pub(crate) const LATE_SIZE: usize = 2048;

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
    /// The program that guest can run instead of its load, with `rdinit=/program`.
    pub program: Option<PathBuf>,
    /// How far that guest's kernel is moved in memory, in bytes: a multiple of 2 MiB.
    pub moved: u32,
    /// dom0's memory in MiB. What is in its file system is in there, too.
    pub memory: u32,
    /// CPUs of the machine: with 2, dom0 has the first and the guest the second.
    pub cpus: u32,
    /// How long the machine may run.
    pub limit: Duration,
    /// How long it may say nothing.
    pub silence: Duration,
}

impl Job {
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
            program: None,
            moved: 0,
            memory: 0,
            cpus: 1,
            limit: Duration::ZERO,
            silence: Duration::ZERO,
        }
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

//! What a run of the machine is to do.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

/// A script for dom0, and the machine it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its name, for logs and messages.
    pub name: String,
    /// The script, for BusyBox's `sh`. It may leave results in the directory `$OUT`.
    pub script: String,
    /// Shell variables that are set before the script.
    pub variables: Vec<(String, String)>,
    /// Programs of ours that are put into dom0's `/bin`, dynamically linked or not.
    pub programs: Vec<PathBuf>,
    /// Shared libraries that these load by a name without a version, such as `libxenctrl.so`. They are looked for where Xen's are.
    pub libraries: Vec<String>,
    /// Kernel of the benchmark guest, `/guest/guest.elf` in dom0.
    pub guest: PathBuf,
    /// Whether there is a Linux guest, too: `/guest/linux.cfg` in dom0. The machine has twice the memory then.
    pub linux: bool,
    /// CPUs of the machine: with 2, dom0 has the first and the guest the second.
    pub cpus: u32,
    /// How long the machine may run.
    pub limit: Duration,
    /// How long it may say nothing.
    pub silence: Duration,
}

impl Job {
    /// The script with its variables, quoted, in front.
    #[must_use]
    pub fn shell(&self) -> String {
        let mut shell = String::new();
        for (name, value) in &self.variables {
            // Writing to a String cannot fail.
            let _ = writeln!(shell, "{name}='{}'", value.replace('\'', r"'\''"));
        }
        shell + &self.script
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_survive_the_shell() {
        let value = "it's $HOME; \"x\" `id`";
        let job = Job {
            name: "test".into(),
            script: "printf %s \"$VALUE\"".into(),
            variables: vec![("VALUE".into(), value.into())],
            programs: vec![],
            libraries: vec![],
            guest: PathBuf::new(),
            linux: false,
            cpus: 1,
            limit: Duration::ZERO,
            silence: Duration::ZERO,
        };
        let printed = std::process::Command::new("sh").arg("-c").arg(job.shell()).output().unwrap().stdout;
        assert_eq!(String::from_utf8(printed).unwrap(), value);
    }
}

//! Our own programs, built by cargo.

use std::path::{Path, PathBuf};

use crate::{Error, Host, Progress, Result, Stages};

/// What to build.
#[derive(Clone, Copy, Debug)]
pub enum Program {
    /// The runner, which drives the benchmark guest from dom0.
    Runner,
    /// The benchmark guest's kernel.
    Guest,
    /// The way out of the machine.
    E9,
    /// What serves the breakpoint with vmi-rs.
    VmiRs,
    /// The two processes that share a page of code, for the Linux guest.
    Pair,
    /// What the core's instructions are counted in. It runs here.
    Hits,
}

impl Program {
    /// The name of the program, and of its log.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Runner => "hyperbp-bench",
            Self::Guest => "hyperbp-bench-guest",
            Self::E9 => "e9",
            Self::VmiRs => "vmi-rs-bench",
            Self::Pair => "pair",
            Self::Hits => "hyperbp-hits",
        }
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Runner => &["--package", "hyperbp-bench", "--bin", "hyperbp-bench"],
            // A workspace of its own: it is freestanding.
            Self::Guest => &["--manifest-path", "bench/guest/Cargo.toml"],
            Self::E9 => &["--package", "hyperbp-e9", "--bin", "e9"],
            // Another: it needs what the rest does not.
            Self::VmiRs => &["--manifest-path", "bench/vmi-rs/Cargo.toml"],
            // Static, for where it runs there is no libc.
            Self::Pair => &["--package", "hyperbp-pair", "--bin", "pair", "--", "-Ctarget-feature=+crt-static"],
            Self::Hits => &["--package", "hyperbp-benches", "--bin", "hyperbp-hits"],
        }
    }
}

/// Builds `program` of the repository in `repo`, against Xen's headers and libraries in `sysroot` or, without one, the
/// system's. Cargo knows what is up to date, so it is always asked.
///
/// # Errors
/// [`Error::Build`]; [`Error::Unexpected`] when cargo builds something else.
pub fn build(
    program: Program,
    host: &Host,
    repo: &Path,
    sysroot: Option<&Path>,
    stages: &Stages,
    progress: &Progress,
) -> Result<PathBuf> {
    let task = progress.start(program.name());
    task.doing("compiling");
    let log = stages.log(program.name())?;
    // Set by cargo for what it runs; else the one the user would run.
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = host.command(cargo);
    command.current_dir(repo).args(["rustc", "--release", "--message-format=json-render-diagnostics"]);
    command.args(program.arguments());
    if let Some(sysroot) = sysroot {
        command.env("HYPERBP_XEN_SYSROOT", sysroot);
        if let Program::VmiRs = program {
            // Its bindings are not ours: they ask pkg-config, and bindgen looks where it is told.
            command.env("PKG_CONFIG_SYSROOT_DIR", sysroot);
            command.env("PKG_CONFIG_LIBDIR", sysroot.join("usr/lib/x86_64-linux-gnu/pkgconfig"));
            command.env("BINDGEN_EXTRA_CLANG_ARGS", format!("\"-I{}\"", sysroot.join("usr/include").display()));
        }
    }
    let messages = log.output(&mut command)?;
    executable(&messages, program.name()).ok_or_else(|| Error::Unexpected {
        path: repo.to_owned(),
        problem: format!("cargo built no program `{}` in it", program.name()),
    })
}

/// The program `name` in cargo's JSON messages.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()).find_map(|message| {
        let ours = message["reason"] == "compiler-artifact" && message["target"]["name"] == name;
        ours.then(|| message["executable"].as_str().map(PathBuf::from))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_says_where_the_program_is() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"libc"},"executable":null}
not json
{"reason":"compiler-artifact","target":{"name":"e9"},"executable":"/t/release/e9"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(executable(messages, "e9"), Some(PathBuf::from("/t/release/e9")));
        assert_eq!(executable(messages, "libc"), None);
        assert_eq!(executable("", "e9"), None);
    }
}

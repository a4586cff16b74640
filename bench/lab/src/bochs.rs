//! Bochs 3.0, built from Debian's source: the emulator whose CPU has VMX with EPT, MTF and VMFUNC.

use std::fs;
use std::path::PathBuf;

use crate::apt::Apt;
use crate::{Error, Host, Inputs, Progress, Result, Stages};

/// The source, in the pool of every Debian mirror (trixie's version; bookworm's 2.7 has no MTF).
const SOURCE: &str = "pool/main/b/bochs/bochs_3.0+dfsg.orig.tar.xz";
const SHA256: &str = "78f6c73d4a6472d5130a87ab9dc306d02c7c71ed8e25b3a8ef642e2a7acd282b";

/// Our patches; each file says what it is for.
const PATCHES: &[(&str, &str)] = &[
    ("idt-vectoring.patch", include_str!("../patches/idt-vectoring.patch")),
    ("interrupt-mask.patch", include_str!("../patches/interrupt-mask.patch")),
];

/// Our instrumentation, which counts where ticks go; see its first lines.
const INSTRUMENT: &[(&str, &str)] = &[
    ("instrument.h", include_str!("../instrument/instrument.h")),
    ("instrument.cc", include_str!("../instrument/instrument.cc")),
];

/// What is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulator {
    /// The emulator.
    Plain,
    /// The emulator, which does exactly the same, and counts where ticks go meanwhile. It takes twice the time.
    Counting,
}

const CONFIGURE: &[&str] = &[
    "--enable-smp",
    "--enable-cpu-level=6",
    "--enable-x86-64",
    "--enable-vmx=2",
    "--enable-avx",
    "--enable-evex",
    // Without it no debug register ever matches anything.
    "--enable-x86-debugger",
    "--enable-all-optimizations",
    "--enable-pci",
    "--enable-long-phy-address",
    "--disable-plugins",
    "--disable-debugger",
    "--disable-debugger-gui",
    // Its signal handler logs while the log is locked: a deadlock.
    "--disable-show-ips",
    "--disable-docbook",
    "--disable-readline",
    "--with-nogui",
];

/// Where Bochs's source has instrumentation that does nothing.
const STUBS: &str = "instrument/stubs";

const CXXFLAGS: &str = "-O2 -pipe";

/// Builds the `emulator` on `jobs` cores and returns the program.
///
/// # Errors
/// [`Error::Download`], [`Error::WrongHash`]; [`Error::Build`] when a patch, configure or make fails.
pub fn build(
    emulator: Emulator,
    host: &Host,
    apt: &Apt,
    stages: &Stages,
    progress: &Progress,
    jobs: usize,
) -> Result<PathBuf> {
    let (stage, instrument) = match emulator {
        Emulator::Plain => ("bochs", &[][..]),
        Emulator::Counting => ("bochs-counting", INSTRUMENT),
    };
    let mut inputs =
        Inputs::new().with("source", SHA256).with("configure", CONFIGURE.join(" ")).with("flags", CXXFLAGS);
    for (name, content) in PATCHES.iter().chain(instrument) {
        inputs = inputs.with(name, content);
    }
    let dir = stages.build(stage, &inputs, progress, |dir, log, task| {
        task.doing("downloading the source");
        let archive = dir.join("bochs.tar.xz");
        apt.download_file(SOURCE, SHA256, &archive, log)?;
        let source = dir.join("source");
        fs::create_dir(&source).map_err(Error::io("create", &source))?;
        log.run(host.command("tar").arg("-xJf").arg(&archive).args(["--strip-components=1", "-C"]).arg(&source))?;
        for (name, patch) in PATCHES {
            let file = dir.join(name);
            fs::write(&file, patch).map_err(Error::io("write", &file))?;
            // No fuzz: a hunk that fits only roughly would be in the wrong place.
            let mut apply = host.command("patch");
            log.run(apply.current_dir(&source).args(["-p1", "-F0", "--batch", "-i"]).arg(&file))?;
        }
        task.doing("configuring");
        let mut configure = host.command("sh");
        configure.current_dir(&source).arg("./configure").args(CONFIGURE);
        if !instrument.is_empty() {
            // In place of the one that comes with Bochs and does nothing: its makefile will do.
            for (name, content) in instrument {
                let file = source.join(STUBS).join(name);
                fs::write(&file, content).map_err(Error::io("write", &file))?;
            }
            configure.arg(format!("--enable-instrumentation={STUBS}"));
        }
        log.run(configure.env("CFLAGS", CXXFLAGS).env("CXXFLAGS", CXXFLAGS))?;
        task.doing("compiling, a minute or two");
        log.run(host.command("make").current_dir(&source).arg(format!("-j{jobs}")))?;
        let built = source.join("bochs");
        fs::rename(&built, dir.join("bochs")).map_err(Error::io("move", &built))?;
        fs::remove_file(&archive).map_err(Error::io("remove", &archive))?;
        crate::stage::remove(&source)
    })?;
    Ok(dir.join("bochs"))
}

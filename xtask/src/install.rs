//! `cargo xtask install`

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::Value;

use crate::{archive, tools};

/// Build libhyperbp.a, with LibVMI, and install it with its headers and hyperbp.pc
#[derive(Debug, Args)]
pub(crate) struct Install {
    /// Where to: gets lib/ and include/
    #[arg(long, value_name = "DIR")]
    prefix: PathBuf,

    /// Features of hyperbp-ffi to build it with besides
    #[arg(long, value_delimiter = ',', value_name = "FEATURES")]
    features: Vec<String>,

    /// Cargo's profile to build it with
    #[arg(long, default_value = "release", value_name = "PROFILE")]
    profile: String,

    /// Without LibVMI, and so without the C API: for a host with a connection of its own
    #[arg(long)]
    without_libvmi: bool,
}

/// Headers that are there with LibVMI only.
const WITH_LIBVMI: [&str; 2] = ["backend.h", "vmi_event.hpp"];

/// What LibVMI's own .pc file names.
const OF_LIBVMI: [&str; 2] = ["-lglib-2.0", "-lvmi"];

/// How rustc begins the line that says what is to be linked, too.
const NEEDS: &str = "native-static-libs: ";

/// What came of building it.
pub(crate) struct Library {
    /// libhyperbp_ffi.a
    pub(crate) archive: PathBuf,
    /// Where cxx has put its headers.
    pub(crate) headers: PathBuf,
    /// What a program that is linked with it needs, as options of a linker.
    pub(crate) needs: String,
}

impl Install {
    /// Into `prefix`, for tests.
    pub(crate) fn for_tests(prefix: PathBuf, without_libvmi: bool) -> Self {
        Self { prefix, features: vec!["fault-injection".to_owned()], profile: "dev".to_owned(), without_libvmi }
    }

    pub(crate) fn run(self) -> Result<()> {
        let prefix = std::path::absolute(&self.prefix).context("--prefix")?;
        let mut features = self.features.clone();
        if !self.without_libvmi {
            features.push("libvmi".to_owned());
        }
        let library = build(&self.profile, &features)?;
        let (lib, include) = (prefix.join("lib"), prefix.join("include"));
        let archive = lib.join("libhyperbp.a");
        directory_of(&archive)?;
        archive::seal(&library.archive, &archive)?;
        let headers = crate::repo().join("cpp-shim/include/hyperbp");
        for entry in fs::read_dir(&headers).with_context(|| format!("cannot read {}", headers.display()))? {
            let name = entry?.file_name();
            if !(self.without_libvmi && WITH_LIBVMI.iter().any(|header| name == *header)) {
                copy(&headers.join(&name), &include.join("hyperbp").join(&name))?;
            }
        }
        for header in ["hyperbp/src/bridge.rs.h", "rust/cxx.h"] {
            copy(&library.headers.join(header), &include.join(header))?;
        }
        let pc = lib.join("pkgconfig/hyperbp.pc");
        write(&pc, &self.package(&prefix, &library))?;
        println!("hyperbp is in {}: PKG_CONFIG_PATH={}", prefix.display(), lib.join("pkgconfig").display());
        Ok(())
    }

    /// For pkg-config. LibVMI's libraries come after ours, for it is ours that needs them.
    fn package(&self, prefix: &Path, library: &Library) -> String {
        let requires = if self.without_libvmi { "" } else { "Requires: libvmi\n" };
        format!(
            "prefix={prefix}\n\
             libdir=${{prefix}}/lib\n\
             includedir=${{prefix}}/include\n\
             \n\
             Name: hyperbp\n\
             Description: Breakpoints set from outside a virtual machine, that the guest cannot see\n\
             Version: {version}\n\
             {requires}\
             Libs: -L${{libdir}} -lhyperbp {needs}\n\
             Cflags: -I${{includedir}}\n",
            prefix = prefix.display(),
            version = env!("CARGO_PKG_VERSION"),
            needs = library.needs
        )
    }
}

/// Builds the static library, with LTO if it is a release: as nothing but a static library, for cargo does none for one
/// that may be linked with more Rust. The objects in it are machine code, for any linker.
pub(crate) fn build(profile: &str, features: &[String]) -> Result<Library> {
    let mut command = tools::cargo();
    command
        .args(["rustc", "--package", "hyperbp-ffi", "--lib", "--crate-type", "staticlib", "--profile", profile])
        .args(["--features", &features.join(","), "--message-format", "json"])
        .args(["--", "--print", "native-static-libs"])
        .stdout(Stdio::piped());
    eprintln!("== build of hyperbp-ffi{}{}", if features.is_empty() { "" } else { " with " }, features.join(" and "));
    let output = command.spawn().context("cannot run cargo")?.wait_with_output().context("cannot run cargo")?;
    ensure!(output.status.success(), "hyperbp-ffi could not be built: the messages above say why");
    let (mut archive, mut headers, mut needs) = (None, None, None);
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<Value>(line) else { continue };
        if !message["package_id"].as_str().is_some_and(|id| id.contains("#hyperbp-ffi@")) {
            continue;
        }
        let text = |value: &Value| value.as_str().map(PathBuf::from);
        match message["reason"].as_str() {
            Some("compiler-artifact") => {
                let files = message["filenames"].as_array().into_iter().flatten().filter_map(text);
                archive = files.into_iter().find(|file| file.extension().is_some_and(|e| e == "a")).or(archive);
            }
            Some("build-script-executed") => {
                headers = text(&message["out_dir"]).map(|dir| dir.join("cxxbridge/include"))
            }
            Some("compiler-message") => match message["message"]["message"].as_str() {
                Some(said) if said.starts_with(NEEDS) => needs = Some(said[NEEDS.len()..].to_owned()),
                _ => eprint!("{}", message["message"]["rendered"].as_str().unwrap_or_default()),
            },
            _ => {}
        }
    }
    let needs = needs.context("rustc did not say what the library needs")?;
    let needs = needs.split_whitespace().filter(|library| !OF_LIBVMI.contains(library)).collect::<Vec<_>>().join(" ");
    let (archive, headers) = (archive.context("cargo built no archive")?, headers.context("cxx made no headers")?);
    Ok(Library { archive, headers, needs })
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    directory_of(to)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn write(to: &Path, text: &str) -> Result<()> {
    directory_of(to)?;
    fs::write(to, text).with_context(|| format!("cannot write {}", to.display()))
}

fn directory_of(file: &Path) -> Result<()> {
    let Some(directory) = file.parent() else { return Ok(()) };
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))
}

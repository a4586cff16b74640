//! The tests of `ffi/` and `cpp-shim/`: what Rust and C++ say to each other.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use hyperbp_lab::{Host, Log, Progress, tools};

use crate::install::Install;
use crate::steps::Steps;

/// Programs of [`tools::CPP`]: where they are all there, nothing is installed.
const PROGRAMS: [&str; 7] = ["c++", "clang-format", "cmake", "make", "meson", "pkg-config", "shellcheck"];
/// And a header of its.
const GTEST: &str = "usr/include/gtest/gtest.h";

/// Runs them. What needs LibVMI is told, if there is none.
pub(crate) fn run(steps: &Steps) -> Result<()> {
    let dir = crate::target().join("cpp");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let host = Host::this();
    if PROGRAMS.iter().any(|program| host.find(program).is_none()) || !host.root.join(GTEST).exists() {
        let log = Log::create(&dir.join("tools.log"), "tools")?;
        // bindgen's are among the lab's.
        tools::install(&host, &[tools::CPP, tools::TOOLS].concat(), &Progress::new(), &log)?;
    }
    steps.time("shellcheck", crate::shell::check)?;
    steps.time("format of the C++", format)?;
    packages(steps, "fault-injection")?;
    steps.time("libvmi-sys without LibVMI", || missing_libvmi(&dir))?;
    let installed = steps.time("install", || install(&dir, true))?;
    steps.time("session-test", || gtest(&dir, &installed, "session-test", true))?;
    consumers(steps, &dir, &installed)?;
    if !has_libvmi() {
        steps.skip(
            "lint, test and documentation of hyperbp-ffi with LibVMI, libvmi-test (the C API, and the translation of \
             LibVMI's events), for pkg-config does not find libvmi",
        );
        return Ok(());
    }
    packages(steps, "fault-injection,libvmi")?;
    let installed = steps.time("install with LibVMI", || install(&dir, false))?;
    steps.time("libvmi-test", || gtest(&dir, &installed, "libvmi-test", false))
}

/// Lints, tests and documentation of the packages, with these features besides.
fn packages(steps: &Steps, features: &str) -> Result<()> {
    let with = if features.contains("libvmi") { " with LibVMI" } else { "" };
    let step = |name: &str, command: &[&str], options: &[&str]| {
        let of_them = ["-p", "hyperbp-ffi", "--features", features];
        steps.cargo(&format!("{name} of hyperbp-ffi{with}"), &[command, &of_them, options].concat(), None)
    };
    step("lint", &["clippy"], &["--all-targets", "--", "-D", "warnings"])?;
    step("test", &["test"], &[])?;
    step("documentation", &["doc", "--no-deps"], &["--document-private-items"])
}

/// All C++ is as clang-format writes it.
fn format() -> Result<()> {
    let repo = crate::repo();
    let mut files = Vec::new();
    for dir in ["cpp-shim", "bench/smartvmi", "bench/guest/program"] {
        crate::files::below(&repo.join(dir), &is_source, &mut files)?;
    }
    files.sort();
    eprintln!("== format of the C++: clang-format, {} files", files.len());
    let style = format!("--style=file:{}", repo.join("cpp-shim/.clang-format").display());
    run_program(Command::new("clang-format").args(["--dry-run", "--Werror", &style]).args(files).current_dir(repo))
}

/// Whether a file is one of C or C++.
fn is_source(path: &Path) -> Result<bool> {
    Ok(path.extension().is_some_and(|e| ["c", "cpp", "h", "hpp"].iter().any(|known| e == *known)))
}

fn has_libvmi() -> bool {
    let mut command = Command::new("pkg-config");
    command.args(["--exists", "libvmi"]).status().is_ok_and(|status| status.success())
}

/// Without LibVMI, its bindings are not built, and whoever tries is told what to do.
fn missing_libvmi(dir: &Path) -> Result<()> {
    let empty = dir.join("no-packages");
    fs::create_dir_all(&empty).with_context(|| format!("cannot create {}", empty.display()))?;
    eprintln!("== libvmi-sys without LibVMI");
    let mut command = crate::tools::cargo();
    command.args(["check", "-p", "libvmi-sys"]);
    if has_libvmi() {
        // In a directory of its own, lest what was built with it is built again.
        command.arg("--target-dir").arg(dir.join("no-libvmi"));
    }
    command.env("PKG_CONFIG_PATH", "").env("PKG_CONFIG_LIBDIR", &empty);
    let output = command.output().context("cannot run cargo")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let helps =
        said.lines().any(|line| ["error", "install LibVMI", "PKG_CONFIG_PATH"].iter().all(|part| line.contains(part)));
    ensure!(!output.status.success() && helps, "libvmi-sys does not say what to do without LibVMI:\n{said}");
    Ok(())
}

/// Installs the library for the tests, and returns where its .pc file is.
fn install(dir: &Path, without_libvmi: bool) -> Result<PathBuf> {
    let prefix = dir.join(if without_libvmi { "prefix" } else { "prefix-libvmi" });
    Install::for_tests(prefix.clone(), without_libvmi).run()?;
    Ok(prefix.join("lib/pkgconfig"))
}

/// Builds a program of tests with CMake, with sanitizers, and runs it.
fn gtest(dir: &Path, installed: &Path, name: &str, without_libvmi: bool) -> Result<()> {
    eprintln!("== {name}: CMake, GoogleTest, AddressSanitizer and UndefinedBehaviorSanitizer");
    let build = dir.join(name);
    let with = if without_libvmi { "-DWITH_LIBVMI=OFF" } else { "-DWITH_LIBVMI=ON" };
    let mut configure = with_packages("cmake", installed);
    configure.args(["-DCMAKE_BUILD_TYPE=Debug", "-DSANITIZE=ON", with, "-S", "cpp-shim/tests", "-B"]).arg(&build);
    quietly(&mut configure)?;
    quietly(Command::new("cmake").arg("--build").arg(&build).args(["--parallel", "2"]))?;
    // What it says of failures is what counts, and not what panics that are asked for say. (To look for leaks needs
    // ptrace, which a container may not have.)
    let mut tests = Command::new(build.join(name));
    tests.arg("--gtest_brief=1").env("ASAN_OPTIONS", "detect_leaks=0").env("RUST_BACKTRACE", "0");
    let output = tests.stdin(Stdio::null()).output().with_context(|| format!("cannot run {name}"))?;
    print!("{}", String::from_utf8_lossy(&output.stdout));
    if !output.status.success() {
        bail!("{name} failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Builds a program that uses the library, as its users would, and runs it: as it is installed, and from this checkout.
fn consumers(steps: &Steps, dir: &Path, installed: &Path) -> Result<()> {
    let source = crate::repo().join("cpp-shim/tests/consumer");
    let (nowhere, checkout) = (dir.join("no-packages"), ["-DHYPERBP_FROM_SOURCE=ON", "-DHYPERBP_WITH_LIBVMI=OFF"]);
    for (name, packages, options) in [("installed", installed, &[][..]), ("from source", &nowhere, &checkout)] {
        let build = |tool: &str| dir.join(format!("consumer-{tool}-{}", name.replace(' ', "-")));
        steps.time(format!("a program with the library {name}: CMake"), || {
            with_cmake(&source, &build("cmake"), packages, options)
        })?;
        steps.time(format!("a program with the library {name}: Meson"), || {
            with_meson(&source, &dir.join("consumer-meson"), &build("meson"), packages)
        })?;
    }
    Ok(())
}

fn with_cmake(source: &Path, build: &Path, packages: &Path, options: &[&str]) -> Result<()> {
    eprintln!("== a program with the library: CMake in {}", build.display());
    let mut configure = with_packages("cmake", packages);
    configure.arg("-DHYPERBP_PROFILE=dev").args(options).arg("-S").arg(source).arg("-B").arg(build);
    quietly(&mut configure)?;
    quietly(Command::new("cmake").arg("--build").arg(build))?;
    quietly(&mut Command::new(build.join("consumer")))
}

fn with_meson(source: &Path, project: &Path, build: &Path, packages: &Path) -> Result<()> {
    eprintln!("== a program with the library: Meson in {}", build.display());
    copy_project(source, project)?;
    let mut setup = with_packages("meson", packages);
    setup.args(["setup", "-Dhyperbp:libvmi=false", "-Dhyperbp:profile=dev"]);
    if build.join("build.ninja").exists() {
        setup.arg("--wipe");
    }
    quietly(setup.arg(build).arg(project))?;
    quietly(Command::new("meson").args(["compile", "-C"]).arg(build))?;
    quietly(&mut Command::new(build.join("consumer")))
}

/// Meson wants subprojects inside of a project.
fn copy_project(source: &Path, project: &Path) -> Result<()> {
    let subprojects = project.join("subprojects");
    fs::create_dir_all(&subprojects).with_context(|| format!("cannot create {}", subprojects.display()))?;
    for file in ["main.cpp", "meson.build"] {
        fs::copy(source.join(file), project.join(file)).with_context(|| format!("cannot copy {file}"))?;
    }
    let link = subprojects.join("hyperbp");
    if !link.exists() {
        std::os::unix::fs::symlink(crate::repo().join("cpp-shim"), &link)
            .with_context(|| format!("cannot make {}", link.display()))?;
    }
    Ok(())
}

/// A program that asks pkg-config, which finds only what is in this directory, and what is there anyway.
fn with_packages(program: &str, directory: &Path) -> Command {
    let mut command = Command::new(program);
    let others = std::env::var_os("PKG_CONFIG_PATH").unwrap_or_default();
    let all = std::iter::once(directory.to_owned()).chain(std::env::split_paths(&others));
    command.current_dir(crate::repo()).env("PKG_CONFIG_PATH", std::env::join_paths(all).unwrap_or(others));
    command
}

/// Runs a program whose output is of interest only if it fails.
fn quietly(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!("{name} failed:\n{}", String::from_utf8_lossy(&said));
    }
    Ok(())
}

fn run_program(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    ensure!(command.status().with_context(|| format!("cannot run {name}"))?.success(), "{name} failed");
    Ok(())
}

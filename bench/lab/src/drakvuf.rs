//! The program that serves the benchmark guest's breakpoint from inside DRAKVUF, built against a DRAKVUF that the user has built.
//!
//! Nothing of DRAKVUF is here: its headers, static libraries, compiler and flags are those of the user's build tree, as Meson
//! describes it there (`meson-info/`, see "IDE integration" in Meson's manual).

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{Elsewhere, Error, Host, Inputs, Progress, Result, Stages, plan};

const PROGRAM: &str = "drakvuf-bench";
const SOURCE: &str = include_str!("../../drakvuf/drakvuf-bench.c");

/// DRAKVUF's static libraries, as Meson calls their targets.
const LIBRARIES: [&str; 2] = ["drakvuf", "xen_helper"];
/// What these need, as Meson calls the dependencies. The last is there only when DRAKVUF was built with it.
const DEPENDENCIES: [&str; 5] = ["glib-2.0", "libvmi", "json-c", "xenforeignmemory", HYPERBP];
const HYPERBP: &str = "hyperbp";

/// Where its own programs find its headers.
const HEADER: &str = "src/libdrakvuf/libdrakvuf.h";
/// What DRAKVUF has when it can be told to use hyperbp.
const SELECTOR: &str = "drakvuf_use_hyperbp";

/// Builds the program against the DRAKVUF in `tree`, Meson's build directory.
///
/// # Errors
/// [`Error::NoDrakvuf`] when that is something else, or DRAKVUF is not built in it; [`Error::Spawn`] when its compiler is gone;
/// [`Error::Build`].
pub fn build(host: &Host, tree: &Path, stages: &Stages, progress: &Progress) -> Result<Elsewhere> {
    let tree = Tree::read(&std::path::absolute(tree).map_err(Error::io("find", tree))?)?;
    let has_hyperbp = tree.has_hyperbp();
    let define = has_hyperbp.then_some("-DHYPERBP");
    let mut inputs = Inputs::new().with("program", SOURCE).with("define", define.unwrap_or_default());
    for argument in tree.compiler.iter().chain(&tree.flags).chain(&tree.link) {
        inputs = inputs.with("argument", argument);
    }
    for file in tree.parts()? {
        inputs = inputs.with_file(&file.to_string_lossy(), &file)?;
    }
    let dir = stages.build("drakvuf", &inputs, progress, |dir, log, task| {
        task.doing("compiling");
        let source = dir.join("drakvuf-bench.c");
        fs::write(&source, SOURCE).map_err(Error::io("write", &source))?;
        let mut command = host.command(&tree.compiler[0]);
        // Meson's paths may be relative to it.
        command.current_dir(&tree.build).args(&tree.compiler[1..]).args(&tree.flags).args(define);
        // DRAKVUF's own warnings are errors; ours are for who changes the program.
        command.arg("-Wno-error").arg("-I").arg(tree.source.join("src")).arg("-pie").arg("-o");
        command.arg(dir.join(PROGRAM)).arg(&source).args(&tree.link);
        log.run(&mut command)
    })?;
    Ok(Elsewhere { host: plan::DRAKVUF, program: dir.join(PROGRAM), has_hyperbp })
}

/// What there is to know of a build directory.
#[derive(Debug)]
struct Tree {
    build: PathBuf,
    source: PathBuf,
    /// The C compiler, and arguments that belong to it.
    compiler: Vec<String>,
    /// Arguments that libdrakvuf was compiled with.
    flags: Vec<String>,
    archives: Vec<PathBuf>,
    /// Arguments to link with it.
    link: Vec<String>,
    linked_with_hyperbp: bool,
}

impl Tree {
    fn read(build: &Path) -> Result<Self> {
        let no = |problem: String| Error::NoDrakvuf { build: build.to_owned(), problem };
        let info = |name: &str| -> Result<Value> {
            let file = build.join("meson-info").join(name);
            let text = fs::read(&file).map_err(|e| no(format!("cannot read {}: {e}", file.display())))?;
            serde_json::from_slice(&text).map_err(|e| no(format!("{} is not Meson's: {e}", file.display())))
        };
        let source = info("meson-info.json")?["directories"]["source"].as_str().map(PathBuf::from);
        let source = source.ok_or_else(|| no("Meson does not say where its source is".to_owned()))?;
        let targets = info("intro-targets.json")?;
        let target = |name: &str| {
            let all = targets.as_array().into_iter().flatten();
            let mut named = all.filter(|target| target["name"] == name && target["type"] == "static library");
            named.next().ok_or_else(|| no(format!("it has no static library `{name}`")))
        };
        let mut archives = Vec::new();
        for name in LIBRARIES {
            let archive = strings(&target(name)?["filename"]).next().map(|file| build.join(file)).unwrap_or_default();
            if !archive.is_file() {
                return Err(no(format!("{} is not built", archive.display())));
            }
            archives.push(archive);
        }
        let compiled = &target(LIBRARIES[0])?["target_sources"][0];
        let compiler: Vec<String> = strings(&compiled["compiler"]).map(str::to_owned).collect();
        if compiler.is_empty() {
            return Err(no("Meson does not say which compiler built it".to_owned()));
        }
        let flags: Vec<String> = strings(&compiled["parameters"]).map(str::to_owned).collect();
        let dependencies = info("intro-dependencies.json")?;
        let dependencies: Vec<&Value> = dependencies.as_array().into_iter().flatten().collect();
        let dependency = |name: &str| dependencies.iter().copied().find(|dependency| dependency["name"] == name);
        let libraries: Vec<String> = DEPENDENCIES
            .iter()
            .filter_map(|name| dependency(name))
            .flat_map(|dependency| strings(&dependency["link_args"]))
            .map(str::to_owned)
            .collect();
        let link = link(&flags, &archives, &libraries);
        let linked_with_hyperbp = dependency(HYPERBP).is_some();
        Ok(Self { build: build.to_owned(), source, compiler, flags, archives, link, linked_with_hyperbp })
    }

    /// Whether this DRAKVUF knows hyperbp, and was built with it.
    fn has_hyperbp(&self) -> bool {
        let header = fs::read_to_string(self.source.join(HEADER)).unwrap_or_default();
        self.linked_with_hyperbp && header.contains(SELECTOR)
    }

    /// The files the program is made of: DRAKVUF's header, the libraries, and the objects that a thin archive only names.
    fn parts(&self) -> Result<Vec<PathBuf>> {
        let mut parts = vec![self.source.join(HEADER), self.build.join("config.h")];
        for archive in &self.archives {
            parts.push(archive.clone());
            // Meson puts a target's objects beside it, in a directory with its name.
            let mut objects = archive.clone().into_os_string();
            objects.push(".p");
            let entries = fs::read_dir(&objects).into_iter().flatten().flatten().map(|entry| entry.path());
            let mut objects: Vec<PathBuf> = entries.filter(|file| file.extension() == Some(OsStr::new("o"))).collect();
            objects.sort();
            parts.extend(objects);
        }
        parts.extend(
            self.link.iter().map(PathBuf::from).filter(|argument| argument.is_absolute() && argument.is_file()),
        );
        Ok(parts)
    }
}

/// The strings of an array.
fn strings(array: &Value) -> impl Iterator<Item = &str> {
    array.as_array().into_iter().flatten().filter_map(Value::as_str)
}

/// Arguments to link with DRAKVUF's `archives` and the `libraries` they need.
fn link(flags: &[String], archives: &[PathBuf], libraries: &[String]) -> Vec<String> {
    let mut link = Vec::new();
    // The archives hold LLVM's bitcode then, which only its own linker reads.
    if flags.iter().any(|flag| flag == "-flto=thin") {
        link.push("-fuse-ld=lld".to_owned());
    }
    link.push("-Wl,--start-group".to_owned());
    link.extend(archives.iter().map(|archive| archive.to_string_lossy().into_owned()));
    link.extend(libraries.iter().cloned());
    link.push("-Wl,--end-group".to_owned());
    // A library may be where only the build knows it.
    let shared = libraries.iter().map(Path::new).filter(|library| library.extension() == Some(OsStr::new("so")));
    let mut dirs: Vec<&Path> = shared.filter_map(Path::parent).filter(|dir| dir.is_absolute()).collect();
    dirs.sort();
    dirs.dedup();
    link.extend(dirs.iter().map(|dir| format!("-Wl,-rpath,{}", dir.display())));
    link
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &str) -> Vec<String> {
        words.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn bitcode_is_linked_by_lld_and_libraries_are_found_again() {
        let libraries =
            words("-ldl /opt/vmi/lib/libvmi.so /usr/lib/libjson-c.so /opt/vmi/lib/libother.so /usr/lib/libx.a");
        let archives = [PathBuf::from("/build/libdrakvuf.a")];
        let expected = "-fuse-ld=lld -Wl,--start-group /build/libdrakvuf.a -ldl /opt/vmi/lib/libvmi.so \
            /usr/lib/libjson-c.so /opt/vmi/lib/libother.so /usr/lib/libx.a -Wl,--end-group \
            -Wl,-rpath,/opt/vmi/lib -Wl,-rpath,/usr/lib";
        assert_eq!(link(&words("-O3 -flto=thin"), &archives, &libraries).join(" "), expected);
        assert_eq!(link(&words("-O3"), &archives, &libraries).join(" "), expected.replace("-fuse-ld=lld ", ""));
    }
}

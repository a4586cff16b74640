//! The program that serves the benchmark guest's breakpoints from inside SmartVMI's vmicore, built against a vmicore that the user
//! has built.
//!
//! Nothing of SmartVMI is here: its headers, objects, libraries, compiler and flags are those of the user's build tree. How they
//! go together is asked of what builds `vmicore` there: Ninja (`ninja -t commands`), or the files that CMake writes for Make.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Elsewhere, Error, Host, Inputs, Log, Progress, Result, Stages, plan};

const PROGRAM: &str = "smartvmi-bench";
const SOURCE: &str = include_str!("../../smartvmi/smartvmi-bench.cpp");

/// vmicore's own program, which ours is linked like, and the objects that are not of its library.
const VMICORE: &str = "src/vmicore";
const OBJECTS: &str = "CMakeFiles/vmicore.dir/";
/// An object of its library, which ours is compiled like: where its files for Make are, and its place below.
const LIBRARY: &str = "CMakeFiles/vmicore-lib.dir/";
const SUPERVISOR: &str = "vmi/InterruptEventSupervisor.cpp.o";
/// With what a vmicore that has hyperbp is compiled.
const HYPERBP: &str = "-DVMICORE_HYPERBP";
/// Where its headers are, from CMake's source directory.
const SOURCES: &str = "src";

/// The arguments that make our program another than vmicore: its start of LibVMI is led to one for guests without an operating
/// system, and it is small, for all of it will be in dom0's memory.
const LINK: [&str; 3] = ["-Wl,--wrap=vmi_init_complete", "-Wl,--gc-sections", "-s"];

/// Builds the program against the vmicore in `tree`, CMake's build directory.
///
/// # Errors
/// [`Error::NoSmartvmi`] when that is something else, or vmicore is not built in it; [`Error::Spawn`] when its compiler or Ninja
/// is gone; [`Error::Build`].
pub fn build(host: &Host, tree: &Path, stages: &Stages, progress: &Progress) -> Result<Elsewhere> {
    let tree = std::path::absolute(tree).map_err(Error::io("find", tree))?;
    let tree = Tree::read(host, &tree, &stages.log("smartvmi-tree")?)?;
    let mut inputs = Inputs::new().with("program", SOURCE);
    for argument in tree.recipe.compile.iter().chain(&tree.recipe.link).chain(LINK.map(str::to_owned).iter()) {
        inputs = inputs.with("argument", argument);
    }
    for file in tree.parts() {
        inputs = inputs.with_file(&file.to_string_lossy(), &file)?;
    }
    let dir = stages.build("smartvmi", &inputs, progress, |dir, log, task| {
        task.doing("compiling");
        let (source, object) = (dir.join("smartvmi-bench.cpp"), dir.join("smartvmi-bench.o"));
        fs::write(&source, SOURCE).map_err(Error::io("write", &source))?;
        let run = |words: &[String], more: &[&str]| {
            let mut command = host.command(&words[0]);
            // Paths may be relative to it.
            log.run(command.current_dir(&tree.recipe.dir).args(&words[1..]).args(more))
        };
        let include = format!("-I{}", tree.source.join(SOURCES).display());
        let (source, object) = (source.to_string_lossy(), object.to_string_lossy());
        run(&tree.recipe.compile, &[&*include, "-o", &object, "-c", &source])?;
        let program = dir.join(PROGRAM);
        run(&tree.recipe.link, &[&[&*object, "-o", &program.to_string_lossy()], &LINK[..]].concat())
    })?;
    Ok(Elsewhere { host: plan::SMARTVMI, program: dir.join(PROGRAM), has_hyperbp: tree.has_hyperbp })
}

/// What there is to know of a build directory.
#[derive(Debug)]
pub(crate) struct Tree {
    /// CMake's source directory: SmartVMI's `vmicore`.
    pub(crate) source: PathBuf,
    /// vmicore.
    pub(crate) program: PathBuf,
    recipe: Recipe,
    /// Whether hyperbp is in it.
    pub(crate) has_hyperbp: bool,
}

impl Tree {
    pub(crate) fn read(host: &Host, build: &Path, log: &Log) -> Result<Self> {
        let no = |problem: String| Error::NoSmartvmi { build: build.to_owned(), problem };
        let cache = build.join("CMakeCache.txt");
        let cache = fs::read_to_string(&cache).map_err(|e| no(format!("cannot read {}: {e}", cache.display())))?;
        let entry = |name: &str| entry(&cache, name).ok_or_else(|| no(format!("its CMakeCache.txt has no {name}")));
        let source = PathBuf::from(entry("CMAKE_HOME_DIRECTORY")?);
        if entry("CMAKE_PROJECT_NAME")? != "vmicore" {
            return Err(no(format!("it is one of {}, and not of SmartVMI's directory vmicore", source.display())));
        }
        let program = build.join(VMICORE);
        if !program.is_file() {
            return Err(no(format!("{} is not built", program.display())));
        }
        let recipe = match &*entry("CMAKE_GENERATOR")? {
            "Ninja" => {
                let mut ninja = host.command(entry("CMAKE_MAKE_PROGRAM")?);
                Recipe::from_ninja(build, &log.output(ninja.arg("-C").arg(build).args(["-t", "commands", VMICORE]))?)
            }
            "Unix Makefiles" => {
                let dir = build.join("src");
                let read = |of: &str, name: &str| {
                    let file = dir.join(of).join(name);
                    fs::read_to_string(&file).map_err(|e| no(format!("cannot read {}: {e}", file.display())))
                };
                let (flags, link) = (read(&format!("lib/{LIBRARY}"), "flags.make")?, read(OBJECTS, "link.txt")?);
                Recipe::from_make(&dir, &entry("CMAKE_CXX_COMPILER")?, &flags, &link)
            }
            other => return Err(no(format!("it is made for {other}, and not for Ninja or Make"))),
        };
        let recipe = recipe.ok_or_else(|| no(format!("it does not say how {VMICORE} is built")))?;
        let has_hyperbp = recipe.compile.iter().any(|word| word == HYPERBP);
        Ok(Self { source, program, recipe, has_hyperbp })
    }

    /// The files the program is made of: vmicore's objects and the libraries it is linked with.
    fn parts(&self) -> Vec<PathBuf> {
        let files = self.recipe.link[1..].iter().map(|word| self.recipe.dir.join(word));
        files.filter(|file| file.is_file()).collect()
    }
}

/// The value of a variable in CMake's cache: `NAME:TYPE=VALUE`.
fn entry(cache: &str, name: &str) -> Option<String> {
    let mut values = cache.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.split_once('='));
    values.next().map(|(_, value)| value.to_owned())
}

/// How a program like vmicore's is built.
#[derive(Debug, PartialEq, Eq)]
struct Recipe {
    /// Where these commands are run.
    dir: PathBuf,
    /// The compiler, and arguments to compile any source with.
    compile: Vec<String>,
    /// The linker, and arguments to link vmicore without the objects that are only its program's.
    link: Vec<String>,
}

impl Recipe {
    /// From all the commands that Ninja would build vmicore with.
    fn from_ninja(build: &Path, commands: &str) -> Option<Self> {
        let all: Vec<Vec<String>> = commands.lines().filter_map(shlex::split).flat_map(simple).collect();
        let makes = |object: &str| all.iter().find(|words| output(words).is_some_and(|file| file.ends_with(object)));
        Some(Self {
            dir: build.to_owned(),
            compile: without_files(makes(&format!("{LIBRARY}{SUPERVISOR}"))?),
            link: without_program(makes(VMICORE)?),
        })
    }

    /// From the files that CMake writes for Make. Commands are run in `dir`.
    fn from_make(dir: &Path, compiler: &str, flags: &str, link: &str) -> Option<Self> {
        let mut compile = vec![compiler.to_owned()];
        for name in ["CXX_DEFINES", "CXX_INCLUDES", "CXX_FLAGS"] {
            let mut values = flags.lines().filter_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix('='));
            compile.extend(shlex::split(values.next()?)?);
        }
        let link = without_program(&shlex::split(link.trim())?);
        (link.len() > 1).then(|| Self { dir: dir.to_owned(), compile, link })
    }
}

/// The simple commands of a list with `&&`.
fn simple(words: Vec<String>) -> Vec<Vec<String>> {
    words.split(|word| word == "&&").map(<[String]>::to_vec).collect()
}

/// The file that a command of a compiler makes.
fn output(words: &[String]) -> Option<&String> {
    words.get(words.iter().position(|word| word == "-o")? + 1)
}

/// A compiler's command without what is of one source: the source, the object, and the file of what the object depends on.
fn without_files(words: &[String]) -> Vec<String> {
    let mut words = words.iter();
    let mut rest = Vec::new();
    while let Some(word) = words.next() {
        match &**word {
            "-o" | "-c" | "-MT" | "-MF" | "-MQ" => drop(words.next()),
            "-MD" | "-MMD" => {}
            _ => rest.push(word.clone()),
        }
    }
    rest
}

/// A linker's command without the program it makes, and the objects that are only the program's.
fn without_program(words: &[String]) -> Vec<String> {
    without_files(words).into_iter().filter(|word| !(word.contains(OBJECTS) && word.ends_with(".o"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &str) -> Vec<String> {
        words.split(' ').map(str::to_owned).collect()
    }

    const COMPILE: &str = r#"/usr/bin/c++ -DVERSION=\"a\ b\" -I/s/src/lib -O2 -std=gnu++20"#;

    #[test]
    fn ninja_s_commands_are_taken_apart() {
        let object = format!("src/lib/{LIBRARY}{SUPERVISOR}");
        let commands = format!(
            "cd /b/x && /usr/bin/cargo build\n\
             {COMPILE} -MD -MT {object} -MF {object}.d -o {object} -c /s/src/lib/vmi/InterruptEventSupervisor.cpp\n\
             : && /usr/bin/c++ -O2 -pie src/lib/CMakeFiles/vmicore-lib.dir/VmiHub.cpp.o \
             src/CMakeFiles/vmicore.dir/main.cpp.o src/CMakeFiles/vmicore.dir/Cmdline.cpp.o -o src/vmicore \
             -Wl,-rpath,/b/vmi: lib/libvmi.so -ljson-c && :\n"
        );
        let recipe = Recipe::from_ninja(Path::new("/b"), &commands).unwrap();
        assert_eq!(recipe.dir, Path::new("/b"));
        assert_eq!(recipe.compile, ["/usr/bin/c++", "-DVERSION=\"a b\"", "-I/s/src/lib", "-O2", "-std=gnu++20"]);
        let link = "/usr/bin/c++ -O2 -pie src/lib/CMakeFiles/vmicore-lib.dir/VmiHub.cpp.o -Wl,-rpath,/b/vmi: \
            lib/libvmi.so -ljson-c";
        assert_eq!(recipe.link, words(link));
    }

    #[test]
    fn make_s_files_say_the_same() {
        let flags = "# CMAKE generated\nCXX_DEFINES = -DVERSION=\\\"a\\ b\\\"\n\nCXX_INCLUDES = -I/s/src/lib\n\
            CXX_FLAGS = -O2 -std=gnu++20\n";
        let link = "/usr/bin/c++ -pie \"lib/CMakeFiles/vmicore-lib.dir/VmiHub.cpp.o\" CMakeFiles/vmicore.dir/main.cpp.o \
            -o vmicore  ../libvmi.so -lz \n";
        let recipe = Recipe::from_make(Path::new("/b/src"), "/usr/bin/c++", flags, link).unwrap();
        assert_eq!(recipe.compile, shlex::split(COMPILE).unwrap());
        assert_eq!(
            recipe.link,
            words("/usr/bin/c++ -pie lib/CMakeFiles/vmicore-lib.dir/VmiHub.cpp.o ../libvmi.so -lz")
        );
    }

    #[test]
    fn commands_of_something_else_are_not_taken_for_vmicore_s() {
        let none = |commands: &str| Recipe::from_ninja(Path::new("/b"), commands);
        assert_eq!(none(""), None);
        assert_eq!(
            none("c++ -o src/CMakeFiles/vmicore.dir/main.cpp.o -c main.cpp\nc++ -o src/vmicore main.cpp.o"),
            None
        );
        assert_eq!(none("c++ -o 'unterminated\n"), None);
        assert_eq!(Recipe::from_make(Path::new("/b"), "c++", "CXX_FLAGS = -O2\n", "c++ -o vmicore\n"), None);
    }

    #[test]
    fn cmake_s_cache_is_read() {
        let cache = "//Program\nCMAKE_MAKE_PROGRAM:FILEPATH=/usr/bin/ninja\n\
            CMAKE_MAKE_PROGRAM-ADVANCED:INTERNAL=1\nFLAGS:STRING=-DA=1\n";
        assert_eq!(entry(cache, "CMAKE_MAKE_PROGRAM").as_deref(), Some("/usr/bin/ninja"));
        assert_eq!(entry(cache, "FLAGS").as_deref(), Some("-DA=1"));
        assert_eq!(entry(cache, "CMAKE_MAKE"), None);
    }
}

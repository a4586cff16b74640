//! Everything that can go wrong, provoked with fakes: programs, mirrors and emulators that do what a test wants.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hyperbp_lab::apt::Apt;
use hyperbp_lab::{
    Elsewhere, Error, Host, Inputs, Job, Lab, Log, Machine, Outcome, Progress, Result, Stages, Xen, drakvuf, packages,
    smartvmi, tools,
};
use tempfile::TempDir;

/// A host of our own: a root with a Debian's files, and programs in front of the real ones.
struct Fake {
    dir: TempDir,
    host: Host,
    xen: Xen,
}

impl Fake {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        for sub in ["etc/apt", "var/lib/apt/lists", "usr/lib/apt"] {
            fs::create_dir_all(root.join(sub)).unwrap();
        }
        fs::create_dir(dir.path().join("bin")).unwrap();
        let path = format!("{}:/usr/bin:/bin", dir.path().join("bin").display()).into();
        let fake = Self { host: Host { root, path, privileged: true }, dir, xen: Xen::default() };
        fake.file("etc/os-release", "ID=debian\nVERSION_CODENAME=bookworm\n");
        fake.file("etc/apt/sources.list", "deb http://mirror/debian bookworm main\n");
        fake
    }

    fn file(&self, path: &str, content: &str) {
        fs::write(self.host.root.join(path), content).unwrap();
    }

    /// Puts a program in front of the real one of that name.
    fn program(&self, name: &str, script: &str) -> PathBuf {
        let file = self.dir.path().join("bin").join(name);
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        file
    }

    /// What programs have left in the file `name` of the fake's directory.
    fn trace(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(name)).unwrap_or_default()
    }

    fn log(&self) -> Log {
        Log::create(&self.dir.path().join("log"), "a stage").unwrap()
    }

    fn stages(&self) -> Stages {
        Stages::new(&self.dir.path().join("lab")).unwrap()
    }

    fn install_tools(&self) -> Result<()> {
        tools::install(&self.host, tools::TOOLS, &Progress::silent(), &self.log())
    }

    fn apt(&self) -> Result<Apt> {
        packages::apt(&self.host, &self.dir.path().join("apt"), hyperbp_lab::RELEASE)
    }

    fn unpack(&self, update: bool) -> Result<PathBuf> {
        packages::unpack(
            &self.host,
            self.xen,
            &self.dir.path().join("apt"),
            &self.stages(),
            &Progress::silent(),
            update,
        )
    }

    /// Runs a job in a machine whose emulator is this shell script.
    fn emulate(&self, script: &str) -> Result<Outcome> {
        self.emulate_with(script, &AtomicBool::new(false))
    }

    fn emulate_with(&self, script: &str, stop: &AtomicBool) -> Result<Outcome> {
        let machine = Machine {
            bochs: self.program("bochs", script),
            bios: PathBuf::new(),
            vga_bios: PathBuf::new(),
            runs: self.dir.path().join("runs"),
        };
        machine.run(&self.host, Path::new("/image"), &job(), &Progress::silent(), stop)
    }
}

fn job() -> Job {
    Job {
        name: "job".into(),
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
        memory: 256,
        cpus: 1,
        options: Default::default(),
        limit: Duration::from_secs(8),
        silence: Duration::from_secs(4),
    }
}

/// The user sees this.
fn message(error: &Error) -> String {
    error.to_string()
}

#[test]
fn another_distribution_is_refused() {
    let fake = Fake::new();
    fake.file("etc/os-release", "ID=fedora\nPRETTY_NAME=\"Fedora 42\"\n");
    let error = fake.install_tools().unwrap_err();
    assert!(matches!(&error, Error::NotDebian { found } if found == "Fedora 42"), "{error}");
    assert!(message(&error).contains("Debian 12"));
}

#[test]
fn a_debian_without_apt_is_refused() {
    let mut fake = Fake::new();
    fake.host.path = fake.dir.path().join("bin").into();
    assert!(matches!(fake.install_tools(), Err(Error::NotDebian { .. })));
}

#[test]
fn without_a_mirror_nothing_is_guessed() {
    let fake = Fake::new();
    fake.file("etc/apt/sources.list", "deb http://mirror/other somewhere contrib\n");
    let error = fake.apt().unwrap_err();
    assert!(matches!(error, Error::NoMirror { .. }), "{error}");
    assert!(message(&error).contains("bookworm main"));
}

#[test]
fn without_permission_the_command_to_run_is_named() {
    let mut fake = Fake::new();
    fake.host.privileged = false;
    fake.program("dpkg-query", "printf 'installed %s\\n' make patch; exit 1");
    fake.program("sudo", "exit 1");
    let error = fake.install_tools().unwrap_err();
    let Error::NoPermission { command } = &error else { panic!("{error}") };
    assert!(command.starts_with("apt-get update && apt-get install -y --no-install-recommends g++ "), "{command}");
    assert!(!command.contains(" make"), "make is installed: {command}");
}

#[test]
fn with_sudo_it_is_used() {
    let mut fake = Fake::new();
    fake.host.privileged = false;
    fake.program("dpkg-query", "exit 1");
    fake.program("sudo", &format!("printf '%s\\n' \"$*\" >> {}/sudo", fake.dir.path().display()));
    fake.install_tools().unwrap();
    let said = fake.trace("sudo");
    assert!(said.contains("-n apt-get update\n-n apt-get install -y"), "{said}");
}

#[test]
fn nothing_is_installed_twice() {
    let fake = Fake::new();
    fake.program("dpkg-query", "for tool; do printf 'installed %s\\n' \"$tool\"; done");
    fake.program("apt-get", &format!("touch {}/called", fake.dir.path().display()));
    fake.install_tools().unwrap();
    assert!(!fake.dir.path().join("called").exists());
}

#[test]
fn stale_lists_are_fetched_again() {
    let fake = Fake::new();
    fake.file("var/lib/apt/lists/mirror_Packages", "");
    fake.program("dpkg-query", "exit 1");
    let called = fake.dir.path().join("called");
    // Installing works only after an update.
    fake.program("apt-get", &format!("echo $1 >> {0}; grep -q update {0}", called.display()));
    fake.install_tools().unwrap();
    assert_eq!(fake.trace("called"), "install\nupdate\ninstall\n");
}

#[test]
fn a_full_disk_is_noticed_before_the_work() {
    let error = Host::check_space(Path::new("/"), u64::MAX).unwrap_err();
    assert!(matches!(error, Error::DiskSpace { .. }), "{error}");
    assert!(message(&error).contains("CARGO_TARGET_DIR"));
    Host::check_space(Path::new("/"), 0).unwrap();
}

/// A real apt and a port nobody listens on.
#[test]
fn a_mirror_that_does_not_answer_is_a_failed_download() {
    let fake = Fake::new();
    fake.file("etc/apt/sources.list", "deb http://127.0.0.1:1/debian bookworm main\n");
    let error = fake.unpack(false).unwrap_err();
    assert!(matches!(error, Error::Download { .. }), "{error}");
    assert!(message(&error).contains("127.0.0.1"), "{error}");
}

#[test]
fn a_mirror_that_stopped_answering_is_only_missed_for_an_update() {
    let fake = Fake::new();
    let offline = fake.dir.path().join("offline");
    fake.program("apt-get", &format!("! test -e {}", offline.display()));
    fake.program("apt-cache", "printf 'Package: %s\\nVersion: 1\\nDepends: linux-image-6.1 (= 1)\\n\\n' \"$@\"");
    let first = fake.unpack(false).unwrap();
    fs::write(&offline, "").unwrap();
    // Within a day nobody is asked; later, the last answer has to do.
    assert_eq!(fake.unpack(false).unwrap(), first);
    age_versions(&fake);
    assert_eq!(fake.unpack(false).unwrap(), first);
    assert!(matches!(fake.unpack(true), Err(Error::Download { .. })));
}

/// Makes the last answer of the mirror look two days old.
fn age_versions(fake: &Fake) {
    let entries = fs::read_dir(fake.stages().dir()).unwrap().flatten();
    let versions = entries.map(|e| e.path()).find(|p| p.to_string_lossy().contains("versions-")).unwrap();
    let then = std::time::SystemTime::now() - Duration::from_secs(2 * 24 * 60 * 60);
    fs::File::options().append(true).open(versions).unwrap().set_modified(then).unwrap();
}

/// A real apt, and a file that is not what it should be.
#[test]
fn a_wrong_checksum_is_told_from_a_failed_download() {
    let fake = Fake::new();
    let mirror = fake.dir.path().join("mirror");
    fs::create_dir(&mirror).unwrap();
    fs::write(mirror.join("source.tar"), "something else").unwrap();
    fake.file("etc/apt/sources.list", &format!("deb file://{} bookworm main\n", mirror.display()));
    std::os::unix::fs::symlink("/usr/lib/apt/apt-helper", fake.host.root.join("usr/lib/apt/apt-helper")).unwrap();
    let download = |path: &str, hash: &str| {
        fake.apt().unwrap().download_file(path, hash, &fake.dir.path().join("got"), &fake.log())
    };
    let hash = "0".repeat(64);
    let error = download("source.tar", &hash).unwrap_err();
    assert!(matches!(error, Error::WrongHash { .. }), "{error}");
    let error = download("missing.tar", &hash).unwrap_err();
    assert!(matches!(error, Error::Download { .. }), "{error}");
}

#[test]
fn a_failed_build_step_shows_the_end_of_its_log() {
    let fake = Fake::new();
    let make = fake.program("make", "seq 100; echo 'no rule to make it' >&2; exit 2");
    let build = |_: &Path, log: &Log, _: &hyperbp_lab::progress::Task| log.run(&mut Command::new(make));
    let error = fake.stages().build("bochs", &Inputs::new(), &Progress::silent(), build).unwrap_err();
    let Error::Build { what, tail, .. } = &error else { panic!("{error}") };
    assert_eq!(what, "bochs");
    assert_eq!(tail.lines.last().unwrap(), "no rule to make it");
    assert_eq!(tail.lines.len(), hyperbp_lab::Tail::LINES);
    assert!(message(&error).contains("log/bochs.log"));
}

#[test]
fn a_missing_program_is_named() {
    let fake = Fake::new();
    let error = fake.log().run(&mut fake.host.command("no-such-program")).unwrap_err();
    assert!(matches!(&error, Error::Spawn { program, .. } if program == "no-such-program"), "{error}");
}

#[test]
fn two_processes_do_not_build_in_the_same_place() {
    let fake = Fake::new();
    let open = || Lab::open(fake.dir.path(), fake.dir.path(), fake.host.clone(), Progress::silent()).unwrap();
    let first = open();
    thread::scope(|scope| {
        let second = scope.spawn(|| drop(open()));
        thread::sleep(Duration::from_millis(300));
        assert!(!second.is_finished());
        drop(first);
        second.join().unwrap();
    });
}

// DRAKVUF.

/// A directory that looks like a build of DRAKVUF, with a compiler that is this shell script.
struct Tree {
    fake: Fake,
    build: PathBuf,
}

impl Tree {
    fn new(compiler: &str) -> Self {
        let fake = Fake::new();
        let build = fake.dir.path().join("drakvuf/build");
        fake.program("drakvuf-cc", compiler);
        let tree = Self { fake, build };
        let target = |name: &str| {
            format!(
                r#"{{"name":"{name}","type":"static library","filename":["src/lib{name}.a"],
                "target_sources":[{{"compiler":["drakvuf-cc"],"parameters":["-O3","-flto=thin"]}}]}}"#
            )
        };
        let source = tree.fake.dir.path().join("drakvuf");
        tree.file("../src/libdrakvuf/libdrakvuf.h", "bool drakvuf_init(void);\n");
        tree.file("meson-info/meson-info.json", &format!(r#"{{"directories":{{"source":"{}"}}}}"#, source.display()));
        tree.file("meson-info/intro-targets.json", &format!("[{},{}]", target("drakvuf"), target("xen_helper")));
        tree.file("meson-info/intro-dependencies.json", r#"[{"name":"libvmi","link_args":["/opt/libvmi.so"]}]"#);
        tree.file("config.h", "");
        tree.file("src/libdrakvuf.a", "one");
        tree.file("src/libxen_helper.a", "two");
        tree
    }

    fn file(&self, path: &str, content: &str) {
        let file = self.build.join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, content).unwrap();
    }

    fn build(&self) -> Result<Elsewhere> {
        drakvuf::build(&self.fake.host, &self.build, &self.fake.stages(), &Progress::silent())
    }

    /// What is wrong, and where.
    fn problem(&self) -> String {
        let error = self.build().unwrap_err();
        assert!(matches!(error, Error::NoDrakvuf { .. }), "{error}");
        assert!(message(&error).contains("ninja -C"), "{error}");
        assert!(message(&error).contains(&*self.build.to_string_lossy()), "{error}");
        message(&error)
    }
}

/// Leaves its arguments beside the program it makes, and some program.
const COMPILER: &str = r#"for last; do [ "$previous" = -o ] && program=$last; previous=$last; done
    echo "$*" >"$program"; echo "$*""#;

#[test]
fn a_directory_without_drakvuf_is_refused() {
    let tree = Tree::new(COMPILER);
    fs::remove_file(tree.build.join("meson-info/meson-info.json")).unwrap();
    assert!(tree.problem().contains("cannot read"));
    tree.file("meson-info/meson-info.json", "not json");
    assert!(tree.problem().contains("not Meson's"));
    let other = Tree::new(COMPILER);
    other.file("meson-info/intro-targets.json", r#"[{"name":"drakvuf","type":"executable"}]"#);
    assert!(other.problem().contains("no static library `drakvuf`"));
}

#[test]
fn a_drakvuf_that_is_not_built_is_refused() {
    let tree = Tree::new(COMPILER);
    fs::remove_file(tree.build.join("src/libxen_helper.a")).unwrap();
    assert!(tree.problem().contains("libxen_helper.a is not built"));
}

#[test]
fn drakvuf_s_compiler_is_used_and_quoted() {
    let tree = Tree::new("echo 'no such flag' >&2; exit 1");
    let error = tree.build().unwrap_err();
    let Error::Build { what, tail, .. } = &error else { panic!("{error}") };
    assert_eq!((&**what, &**tail.lines.last().unwrap()), ("drakvuf", "no such flag"));
    fs::remove_file(tree.fake.dir.path().join("bin/drakvuf-cc")).unwrap();
    let error = tree.build().unwrap_err();
    assert!(matches!(&error, Error::Spawn { program, .. } if program == "drakvuf-cc"), "{error}");
}

#[test]
fn drakvuf_says_itself_whether_it_has_hyperbp() {
    let tree = Tree::new(COMPILER);
    let arguments = |drakvuf: &Elsewhere| fs::read_to_string(&drakvuf.program).unwrap();
    let stock = tree.build().unwrap();
    assert!(!stock.has_hyperbp && !arguments(&stock).contains("-DHYPERBP"));
    assert!(arguments(&stock).contains("-fuse-ld=lld"), "{}", arguments(&stock));

    // Patched, but built without it.
    tree.file("../src/libdrakvuf/libdrakvuf.h", "bool drakvuf_use_hyperbp(const char*);\n");
    assert!(!tree.build().unwrap().has_hyperbp);
    tree.file("meson-info/intro-dependencies.json", r#"[{"name":"hyperbp","link_args":["-lhyperbp"]}]"#);
    let loaded = tree.build().unwrap();
    assert!(loaded.has_hyperbp);
    assert!(arguments(&loaded).contains("-DHYPERBP") && arguments(&loaded).contains("-lhyperbp"));

    // Another library is another program; the same one is not built twice.
    assert_eq!(tree.build().unwrap(), loaded);
    tree.file("src/libdrakvuf.a", "three");
    assert_ne!(tree.build().unwrap().program, loaded.program);
}

// SmartVMI.

/// A directory that looks like a build of vmicore for Ninja, with a Ninja and a compiler that are shell scripts.
struct Vmicore {
    fake: Fake,
    build: PathBuf,
}

impl Vmicore {
    fn new(compiler: &str) -> Self {
        let fake = Fake::new();
        fake.program("smartvmi-cc", compiler);
        fake.program("smartvmi-ninja", r#"[ "$1 $3 $4 $5" = "-C -t commands src/vmicore" ] && cat "$2/commands""#);
        let build = fake.dir.path().join("smartvmi/build");
        let tree = Self { fake, build };
        tree.cache("vmicore", "Ninja");
        tree.commands("-DLIBRARY");
        tree.file("src/vmicore", "");
        tree.file("lib/VmiHub.cpp.o", "one");
        tree
    }

    fn cache(&self, project: &str, generator: &str) {
        let source = self.fake.dir.path().join("smartvmi/vmicore");
        let cache = format!(
            "CMAKE_HOME_DIRECTORY:INTERNAL={}\nCMAKE_PROJECT_NAME:STATIC={project}\nCMAKE_GENERATOR:INTERNAL={generator}\n\
             CMAKE_MAKE_PROGRAM:FILEPATH=smartvmi-ninja\nCMAKE_CXX_COMPILER:FILEPATH=smartvmi-cc\n",
            source.display()
        );
        self.file("CMakeCache.txt", &cache);
    }

    /// How it was built, with this definition.
    fn commands(&self, define: &str) {
        let object = "lib/CMakeFiles/vmicore-lib.dir/vmi/InterruptEventSupervisor.cpp.o";
        let commands = format!(
            "smartvmi-cc -O2 {define} -o {object} -c supervisor.cpp\n\
             : && smartvmi-cc -O2 lib/VmiHub.cpp.o src/CMakeFiles/vmicore.dir/main.cpp.o -o src/vmicore -lvmi && :\n"
        );
        self.file("commands", &commands);
    }

    fn file(&self, path: &str, content: &str) {
        let file = self.build.join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, content).unwrap();
    }

    fn build(&self) -> Result<Elsewhere> {
        smartvmi::build(&self.fake.host, &self.build, &self.fake.stages(), &Progress::silent())
    }

    /// What is wrong, and where.
    fn problem(&self) -> String {
        let error = self.build().unwrap_err();
        assert!(matches!(error, Error::NoSmartvmi { .. }), "{error}");
        assert!(message(&error).contains("ninja -C"), "{error}");
        assert!(message(&error).contains(&*self.build.to_string_lossy()), "{error}");
        message(&error)
    }
}

#[test]
fn a_directory_without_smartvmi_is_refused() {
    let tree = Vmicore::new(COMPILER);
    tree.file("commands", "cc -o other -c other.c\n");
    assert!(tree.problem().contains("does not say how src/vmicore is built"));
    tree.cache("vmicore", "Xcode");
    assert!(tree.problem().contains("made for Xcode"));
    tree.cache("vmicore", "Unix Makefiles");
    assert!(tree.problem().contains("flags.make"));
    fs::remove_file(tree.build.join("src/vmicore")).unwrap();
    assert!(tree.problem().contains("src/vmicore is not built"));
    tree.cache("drakvuf", "Ninja");
    assert!(tree.problem().contains("not of SmartVMI's directory vmicore"));
    tree.file("CMakeCache.txt", "");
    assert!(tree.problem().contains("no CMAKE_HOME_DIRECTORY"));
    fs::remove_file(tree.build.join("CMakeCache.txt")).unwrap();
    assert!(tree.problem().contains("cannot read"));
}

#[test]
fn smartvmi_s_compiler_is_used_and_quoted() {
    let tree = Vmicore::new("echo 'no such flag' >&2; exit 1");
    let error = tree.build().unwrap_err();
    let Error::Build { what, tail, .. } = &error else { panic!("{error}") };
    assert_eq!((&**what, &**tail.lines.last().unwrap()), ("smartvmi", "no such flag"));
}

#[test]
fn smartvmi_s_flags_say_whether_it_has_hyperbp() {
    let tree = Vmicore::new(COMPILER);
    let arguments = |smartvmi: &Elsewhere| {
        let read = |file: PathBuf| fs::read_to_string(file).unwrap();
        (read(smartvmi.program.with_extension("o")), read(smartvmi.program.clone()))
    };
    let stock = tree.build().unwrap();
    let (compile, link) = arguments(&stock);
    assert!(!stock.has_hyperbp);
    assert!(compile.starts_with("-O2 -DLIBRARY -I") && compile.contains("smartvmi/vmicore/src -o"), "{compile}");
    assert!(link.starts_with("-O2 lib/VmiHub.cpp.o -lvmi ") && !link.contains("main.cpp.o"), "{link}");
    assert!(link.contains("--wrap=vmi_init_complete"), "{link}");

    tree.commands("-DVMICORE_HYPERBP");
    let loaded = tree.build().unwrap();
    assert!(loaded.has_hyperbp && arguments(&loaded).0.contains("-DVMICORE_HYPERBP"));

    // Another object is another program; the same one is not built twice.
    assert_eq!(tree.build().unwrap(), loaded);
    tree.file("lib/VmiHub.cpp.o", "two");
    assert_ne!(tree.build().unwrap().program, loaded.program);
}

// The machine.

/// The end of every good run; the results are "hello".
const GOOD_END: &str = "echo @exit 0; echo @results-begin; echo aGVsbG8=; echo @results-end; echo @end";

#[test]
fn a_good_run_has_results_and_logs() {
    let fake = Fake::new();
    let outcome = fake.emulate(&format!("echo dom0 is up; echo @progress 1 2 half; {GOOD_END}")).unwrap();
    assert_eq!(outcome.results, b"hello");
    assert_eq!(fs::read_to_string(outcome.log).unwrap(), "dom0 is up\n@exit 0\n@end\n");
}

#[test]
fn a_job_that_fails_shows_what_it_said() {
    let error = Fake::new().emulate(&format!("echo error: no altp2m; echo @exit 4; {GOOD_END}").replace("@exit 0", ""));
    let error = error.unwrap_err();
    let Error::JobFailed { code: 4, tail, .. } = &error else { panic!("{error}") };
    assert!(tail.lines.contains(&"error: no altp2m".to_owned()));
}

#[test]
fn damaged_results_are_not_taken_for_good_ones() {
    for damage in ["s/aGVs/a!!s/", "/begin/,/results-end/d", "/@exit/d"] {
        let error = Fake::new().emulate(&format!("({GOOD_END}) | sed '{damage}'")).unwrap_err();
        assert!(matches!(error, Error::Results { .. }), "{damage}: {error}");
    }
}

#[test]
fn an_emulator_that_dies_is_noticed_and_quoted() {
    let error = Fake::new().emulate("echo '>>PANIC<< dlopen failed' > bochs.log; exit 1").unwrap_err();
    let Error::Died { status, tail, .. } = &error else { panic!("{error}") };
    assert_eq!(status.code(), Some(1));
    assert_eq!(tail.lines, [">>PANIC<< dlopen failed"]);
}

#[test]
fn a_silent_machine_is_stopped() {
    let begun = Instant::now();
    let error = Fake::new().emulate("echo dom0 is up; exec sleep 60").unwrap_err();
    let Error::Hung { tail, .. } = &error else { panic!("{error}") };
    assert_eq!(tail.lines, ["dom0 is up"]);
    assert!(begun.elapsed() < job().limit);
}

#[test]
fn a_machine_that_only_talks_is_stopped_too() {
    let error = Fake::new().emulate("while :; do echo still here; sleep 0.5; done").unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
}

#[test]
fn whoever_crashes_ends_the_run_at_once() {
    for (line, who) in [
        ("(XEN) Panic on CPU 0:", "Xen"),
        ("[    2.1] Kernel panic - not syncing: no init", "dom0's kernel"),
        ("(XEN) Domain 1 (vcpu#0) crashed on cpu#0:", "a guest"),
    ] {
        let script = format!("echo up; echo '{line}' > console.log; echo 'the reason' >> console.log; exec sleep 60");
        let begun = Instant::now();
        let error = Fake::new().emulate(&script).unwrap_err();
        let Error::Crashed { who: crashed, tail, .. } = &error else { panic!("{error}") };
        assert_eq!(*crashed, who);
        assert_eq!(tail.lines, [line, "the reason"]);
        assert!(begun.elapsed() < job().silence, "{who}");
    }
}

#[test]
fn a_crash_explains_the_emulators_end() {
    let error = Fake::new().emulate("echo '(XEN) Panic on CPU 0:' > console.log; exit 1").unwrap_err();
    assert!(matches!(error, Error::Crashed { who: "Xen", .. }), "{error}");
}

/// Whether a process with this number is alive.
fn alive(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn a_stopped_machine_leaves_no_process() {
    let fake = Fake::new();
    let stop = AtomicBool::new(false);
    let pid = fake.dir.path().join("pid");
    // A child of the emulator's own goes too: the whole process group is killed.
    let script = format!("sleep 60 & echo $$ $! > {}; wait", pid.display());
    thread::scope(|scope| {
        let run = scope.spawn(|| fake.emulate_with(&script, &stop));
        while fake.trace("pid").lines().count() == 0 {
            thread::sleep(Duration::from_millis(20));
        }
        stop.store(true, Ordering::Relaxed);
        assert!(matches!(run.join().unwrap(), Err(Error::Stopped { .. })));
    });
    let deadline = Instant::now() + Duration::from_secs(2);
    while fake.trace("pid").split_whitespace().any(alive) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    assert!(!fake.trace("pid").split_whitespace().any(alive));
}

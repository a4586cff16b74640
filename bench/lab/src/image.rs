//! The CD the machine boots: GRUB, Xen, dom0's kernel, and an initramfs with Xen's tools and the job.
//!
//! The same inputs give the same bytes, and in the emulator the same bytes give the same run.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::initramfs::Initramfs;
use crate::kernel::Kernel;
use crate::{Error, Host, Inputs, Job, Progress, Result, Stages, Xen, elf};

const INIT: &str = include_str!("../dom0/init");
const GUEST_CFG: &str = include_str!("../dom0/guest.cfg");
const LINUX_CFG: &str = include_str!("../dom0/linux.cfg");
const LINUX_INIT: &str = include_str!("../linux/init");
const LINUX_ROUNDS: &str = include_str!("../linux/rounds");
const LINUX_PAIR: &str = include_str!("../linux/pair");
const LINUX_PROGRAM: &str = include_str!("../linux/program");

/// Xen's programs, in the same directory of the sysroot and of dom0.
const XEN_PROGRAMS: &[&str] = &["libxl-save-helper", "xen-init-dom0", "xenconsoled", "xenstored", "xl"];
/// What the job needs besides, to talk to a Linux guest.
const XEN_CONSOLE: &str = "xenconsole";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// Xen's command line, without what depends on the number of CPUs and the guest.
///
/// The console costs nothing once the machine is up: Xen and dom0's kernel are silent then. Frequencies and idle states
/// are the host's business, mitigations only take instructions, and `apicv=0` keeps to the part of VMX every Xen host
/// has.
const XEN: &str = "console=com1 com1=115200,8n1,0x3f8,4 loglvl=warning guest_loglvl=all \
    altp2m=1 apicv=0 sched=credit dom0_max_vcpus=1 dom0_mem=$MEMORY,max:$MEMORY \
    bootscrub=0 edid=no edd=off spec-ctrl=no xpti=0 pv-l1tf=0 mce=0 iommu=0 \
    cpuidle=0 cpufreq=none watchdog=0 tsc=unstable noreboot=1";

/// dom0's command line. `pci=off` would break ACPI, and without ACPI nothing is missed.
///
/// What only takes instructions on an event's way is off: mitigations, hardening, accounting. An empty `lsm=` is what switches
/// security modules off: Debian's kernel ignores `selinux=0`, and with `apparmor=0` alone it runs SELinux. `nofsgsbase`: with
/// FSGSBASE a PV kernel reads a segment's base from an MSR at each switch, which Xen emulates; that is twice an event, and a
/// twelfth of what it costs.
const LINUX: &str = "console=hvc0 quiet panic=0 rdinit=/init acpi=off nokaslr mitigations=off lpj=500000 tsc=reliable \
    nowatchdog audit=0 lsm= init_on_alloc=0 hardened_usercopy=off psi=0 nofsgsbase";

/// GRUB's modules; those they need come with them.
const GRUB_MODULES: &[&str] = &["biosdisk", "iso9660", "multiboot2"];

/// What all images with the same Xen are made of.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// The release of Xen.
    pub xen: Xen,
    /// Where its packages, and the others, are unpacked.
    pub sysroot: &'a Path,
    /// dom0's kernel, and a Linux guest's.
    pub kernel: &'a Kernel,
    /// The way out of the machine.
    pub e9: &'a Path,
}

/// Builds the image of `job` and returns it.
///
/// # Errors
/// [`Error::Build`] of GRUB's or xorriso's; [`Error::Unexpected`] when a library is missing.
pub fn build(host: &Host, parts: &Parts<'_>, job: &Job, stages: &Stages, progress: &Progress) -> Result<PathBuf> {
    let kernel = parts.kernel;
    let initramfs =
        initramfs(host, parts, job)?.archive().map_err(Error::io("archive", Path::new("dom0's file system")))?;
    let xen = parts.sysroot.join(parts.xen.hypervisor());
    let xen_options = followed_by(xen_options(job.cpus, job.memory), &job.options.xen);
    let linux = followed_by(LINUX.to_owned(), &job.options.dom0);
    let grub = format!(
        "set root=cd\nmultiboot2 /boot/xen xen {xen_options}\nmodule2 /boot/vmlinux linux {linux}\n\
         module2 /boot/initramfs initramfs\nboot\n"
    );
    let inputs = Inputs::new()
        .with("initramfs", &initramfs)
        .with("grub", &grub)
        .with_file("xen", &xen)?
        .with_file("vmlinux", &kernel.vmlinux)?;
    let dir = stages.build(&format!("image-{}", job.name), &inputs, progress, |dir, log, _| {
        let boot = dir.join("cd/boot");
        fs::create_dir_all(&boot).map_err(Error::io("create", &boot))?;
        let write = |path: &Path, content: &[u8]| fs::write(path, content).map_err(Error::io("write", path));
        write(&boot.join("initramfs"), &initramfs)?;
        write(&boot.join("xen"), &gunzip(&xen)?)?;
        let vmlinux = boot.join("vmlinux");
        fs::copy(&kernel.vmlinux, &vmlinux).map_err(Error::io("copy to", &vmlinux))?;

        let config = dir.join("grub.cfg");
        write(&config, grub.as_bytes())?;
        let mut mkimage = host.command("grub-mkimage");
        mkimage.args(["--format=i386-pc-eltorito", "--prefix=(cd)/boot", "--compression=none", "--config"]);
        mkimage.arg(&config).arg("--output").arg(boot.join("grub")).args(GRUB_MODULES);
        log.run(&mut mkimage)?;

        for entry in walkdir::WalkDir::new(dir.join("cd")).contents_first(true).into_iter().flatten() {
            let set = File::open(entry.path()).and_then(|file| file.set_modified(SystemTime::UNIX_EPOCH));
            set.map_err(Error::io("set the time of", entry.path()))?;
        }
        let mut xorriso = host.command("xorriso");
        // Without it, the times of the build would be in the image.
        xorriso.env("SOURCE_DATE_EPOCH", "0");
        xorriso.args(["-as", "mkisofs", "-r", "-V", "HYPERBP", "-b", "boot/grub"]);
        xorriso.args(["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]);
        xorriso.args(["--modification-date=1970010100000000", "-o"]).arg(dir.join("lab.iso")).arg(dir.join("cd"));
        log.run(&mut xorriso)?;
        crate::stage::remove(&dir.join("cd"))
    })?;
    Ok(dir.join("lab.iso"))
}

/// With two CPUs, dom0 has the first for itself.
fn xen_options(cpus: u32, memory: u32) -> String {
    let pin = if cpus > 1 { " dom0_vcpus_pin" } else { "" };
    format!("{}{pin}", XEN.replace("$MEMORY", &format!("{memory}M")))
}

/// A command line with more options.
fn followed_by(line: String, options: &[String]) -> String {
    options.iter().fold(line, |line, option| line + " " + option)
}

/// A guest's configuration as the job wants it.
fn config(usual: &str, job: &Job) -> String {
    let mut config = pinned(usual, job.cpus);
    for line in &job.options.guest {
        let key = |line: &str| line.split('=').next().map(|key| key.trim().to_owned());
        config = config.lines().filter(|other| key(other) != key(line)).flat_map(|line| [line, "\n"]).collect();
        config.extend([line, "\n"]);
    }
    config
}

/// With two CPUs, the guest has the second for itself; with more, all but the first.
fn pinned(config: &str, cpus: u32) -> String {
    let pin = match cpus {
        0 | 1 => String::new(),
        2 => "cpus = \"1\"\n".to_owned(),
        _ => format!("cpus = \"1-{}\"\n", cpus - 1),
    };
    format!("{config}{pin}")
}

fn initramfs(host: &Host, parts: &Parts<'_>, job: &Job) -> Result<Initramfs> {
    let Parts { xen, sysroot, kernel, e9 } = *parts;
    let mut fs = Initramfs::new();
    // Where Xen's tools, the kernel and our init expect a directory.
    for directory in ["dev", "etc/xen", "proc", "run/xen", "run/xenstored", "sys", "tmp"] {
        fs.directory(directory);
    }
    for directory in ["var/lib/xen", "var/lib/xenstored", "var/lock", "var/log/xen"] {
        fs.directory(directory);
    }
    fs.link("var/run", "/run");
    fs.device("dev/console", 5, 1);
    fs.device("dev/null", 1, 3);
    fs.file("etc/passwd", 0o644, "root:x:0:0::/:/bin/sh\n");
    fs.file("etc/group", 0o644, "root:x:0:\n");
    fs.file("etc/xen/xl.conf", 0o644, "");
    fs.file("init", 0o755, INIT);
    fs.file("job.sh", 0o644, job.shell());
    fs.file("guest/guest.cfg", 0o644, config(GUEST_CFG, job));
    fs.copy("guest/guest.elf", 0o644, &job.guest)?;
    let busybox = sysroot.join("bin/busybox");
    fs.copy("bin/busybox", 0o755, &busybox)?;
    if job.linux {
        fs.file("guest/linux.cfg", 0o644, config(LINUX_CFG, job));
        fs.file("guest/vmlinux", 0o644, kernel.moved(job.moved)?);
        fs.file("guest/linux.cpio", 0o644, linux(&busybox, &job.guest_programs)?);
    }

    for (path, file) in &job.files {
        fs.copy(path, 0o644, file)?;
    }

    let mut order = String::new();
    for module in &kernel.modules {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        fs.copy(&format!("lib/modules/{name}"), 0o644, module)?;
        order.extend([&*name, "\n"]);
    }
    fs.file("lib/modules/order", 0o644, order);

    let console = job.linux.then_some(&XEN_CONSOLE);
    let bin = xen.programs();
    let xen: Vec<PathBuf> = XEN_PROGRAMS.iter().chain(console).map(|name| sysroot.join(&bin).join(name)).collect();
    let ours: Vec<&Path> = job.programs.iter().map(PathBuf::as_path).chain([e9]).collect();
    for (dir, program) in xen.iter().map(|p| (&*bin, p.as_path())).chain(ours.iter().map(|p| ("bin", *p))) {
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        fs.copy(&format!("{dir}/{name}"), 0o755, program)?;
    }
    // Xen's libraries from the sysroot. The C library, too, if they need a newer one than programs of this host; else the host's.
    let dirs = [sysroot.join(LIBRARIES), host.root.join(LIBRARIES), host.root.join("lib/x86_64-linux-gnu")];
    let loaded = elf::named(&job.libraries, &dirs)?;
    let programs = xen.iter().map(PathBuf::as_path).chain(ours).chain(loaded.iter().map(|library| &*library.file));
    let mut libraries = elf::libraries(&programs.collect::<Vec<_>>(), &dirs)?;
    for library in loaded {
        // Who asks for it by this name must get the file that others are linked with: it is loaded once.
        if library.name != library.soname {
            fs.link(&format!("lib/x86_64-linux-gnu/{}", library.name), &library.soname);
        }
        libraries.entry(library.soname).or_insert(library.file);
    }
    // glibc loads it by name when a thread ends, and xenstored's threads do.
    let unwinder = "libgcc_s.so.1";
    libraries.entry(unwinder.to_owned()).or_insert_with(|| dirs[2].join(unwinder));
    for (name, file) in &libraries {
        match name.strip_prefix('/') {
            Some(linker) => fs.copy(linker, 0o755, file)?,
            None => fs.copy(&format!("lib/x86_64-linux-gnu/{name}"), 0o644, file)?,
        }
    }
    Ok(fs)
}

/// The Linux guest's file system, with `programs` in it.
fn linux(busybox: &Path, programs: &[PathBuf]) -> Result<Vec<u8>> {
    let mut fs = Initramfs::new();
    for directory in ["dev", "proc", "tmp", "tracing"] {
        fs.directory(directory);
    }
    fs.device("dev/console", 5, 1);
    fs.device("dev/null", 1, 3);
    fs.device("dev/zero", 1, 5);
    fs.file("init", 0o755, LINUX_INIT);
    fs.file("rounds", 0o755, LINUX_ROUNDS);
    fs.file("pair", 0o755, LINUX_PAIR);
    fs.file("program", 0o755, LINUX_PROGRAM);
    fs.copy("bin/busybox", 0o755, busybox)?;
    for program in programs {
        fs.copy(&format!("bin/{}", program.file_name().unwrap_or_default().to_string_lossy()), 0o755, program)?;
    }
    fs.archive().map_err(Error::io("archive", Path::new("the Linux guest's file system")))
}

fn gunzip(file: &Path) -> Result<Vec<u8>> {
    let compressed = File::open(file).map_err(Error::io("open", file))?;
    let mut content = Vec::new();
    flate2::read::GzDecoder::new(compressed).read_to_end(&mut content).map_err(Error::io("decompress", file))?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_two_cpus_dom0_and_the_guest_have_one_each() {
        assert!(!xen_options(1, 256).contains("dom0_vcpus_pin"));
        assert!(xen_options(2, 256).contains("dom0_vcpus_pin"));
        for config in [GUEST_CFG, LINUX_CFG] {
            assert!(!pinned(config, 1).contains("\ncpus = "));
            assert!(pinned(config, 2).contains("\ncpus = \"1\""));
            assert!(pinned(config, 4).contains("\ncpus = \"1-3\""));
        }
    }

    #[test]
    fn what_a_job_asks_for_is_not_contradicted() {
        let mut job = crate::job::tests::empty();
        assert_eq!(config(GUEST_CFG, &job), pinned(GUEST_CFG, 1));
        job.options.guest = vec!["cpu_weight = 256".into(), "cpus = \"0\"".into()];
        let config = config(GUEST_CFG, &job);
        assert_eq!(config.matches("\ncpu_weight").count(), 1, "{config}");
        assert!(config.ends_with("\ncpu_weight = 256\ncpus = \"0\"\n"), "{config}");
        assert_eq!(followed_by("sched=credit".into(), &["sched=null".into()]), "sched=credit sched=null");
    }

    #[test]
    fn dom0_has_the_job_s_memory() {
        assert!(xen_options(1, 448).contains(" dom0_mem=448M,max:448M "));
    }
}

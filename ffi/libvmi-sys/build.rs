//! Finds LibVMI with pkg-config, and generates the bindings from its headers.

use std::env;
use std::path::PathBuf;

/// One that LibVMI got late, and forks may lack.
const LATE: &str = "vmi_mmap_guest_pa";

const FUNCTIONS: &[&str] = &[
    "vmi_get_num_vcpus",
    "vmi_get_vmid",
    "vmi_are_events_pending",
    LATE,
    "vmi_get_vcpureg",
    "vmi_(pause|resume)_vm",
    "vmi_slat_(create|destroy|switch|change_gfn)",
    "vmi_set_mem_event",
    "vmi_(get_singlestep_event|stop_single_step_vcpu|register_event)",
];

const CONSTANTS: &[&str] = &["VMI_MEMACCESS_.*", "VMI_EVENTS_VERSION", "MAX_SINGLESTEP_VCPUS", "RIP"];

const TYPES: &[&str] = &["vmi_instance_t", "vmi_event_t", "status_t"];

/// What one who lacks it is told.
const HELP: &str = "install LibVMI (https://github.com/libvmi/libvmi, built with ENABLE_XEN), and name the directory its \
                    libvmi.pc is in in PKG_CONFIG_PATH";

fn main() {
    println!("cargo::rerun-if-changed=wrapper.h");
    let found = match pkg_config::Config::new().probe("libvmi") {
        Ok(found) => found,
        Err(error) => {
            // Its message has many lines, and Cargo's errors have one.
            eprintln!("{error}");
            println!("cargo::error=pkg-config does not find libvmi: {HELP}");
            return;
        }
    };
    let mut builder = bindgen::Builder::default()
        .header("wrapper.h")
        .use_core()
        .layout_tests(false)
        .derive_default(true)
        .generate_comments(false)
        .prepend_enum_name(false)
        .merge_extern_blocks(true);
    for directory in &found.include_paths {
        builder = builder.clang_arg(format!("-I{}", directory.display()));
    }
    for pattern in FUNCTIONS {
        builder = builder.allowlist_function(pattern);
    }
    for pattern in CONSTANTS {
        builder = builder.allowlist_var(pattern);
    }
    for pattern in TYPES {
        builder = builder.allowlist_type(pattern);
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("Cargo sets OUT_DIR for build scripts"));
    let written = match builder.generate() {
        Ok(bindings) => {
            if bindings.to_string().contains(&format!("fn {LATE}(")) {
                println!("cargo::metadata={LATE}=1");
            }
            bindings.write_to_file(out.join("bindings.rs"))
        }
        Err(error) => {
            eprintln!("{error}");
            println!(
                "cargo::error=bindgen cannot read LibVMI's headers: install libclang-common-14-dev and libclang1-14, and \
                 what the headers include (libglib2.0-dev)"
            );
            return;
        }
    };
    if let Err(error) = written {
        println!("cargo::error=writing bindings.rs: {error}");
    }
    // For packages that link this one, and compile C++ against it.
    let directories: Vec<_> = found.include_paths.iter().map(|path| path.display().to_string()).collect();
    println!("cargo::metadata=include={}", directories.join(":"));
}

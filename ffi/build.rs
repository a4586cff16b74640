//! Generates the C++ side of the bridge, and compiles it with the shim into this crate.

use std::env;
use std::path::{Path, PathBuf};

/// What needs LibVMI's headers.
const WITH_LIBVMI: [&str; 3] = ["backend.cpp", "failed_emulation.cpp", "vmi_event.cpp"];

fn main() {
    let shim = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cpp-shim");
    println!("cargo::rerun-if-changed=src/bridge.rs");
    println!("cargo::rerun-if-changed={}", shim.join("include").display());
    println!("cargo::rerun-if-changed={}", shim.join("src").display());
    cxx_build::CFG.include_prefix = "hyperbp";
    println!("cargo::rustc-check-cfg=cfg(vmi_mmap_guest_pa)");
    let mut build = cxx_build::bridge("src/bridge.rs");
    build.std("c++17").include(shim.join("include")).warnings(true).extra_warnings(true);
    if env::var_os("CARGO_FEATURE_LIBVMI").is_some() {
        // From libvmi-sys, both.
        if env::var_os("DEP_VMI_VMI_MMAP_GUEST_PA").is_some() {
            println!("cargo::rustc-cfg=vmi_mmap_guest_pa");
        }
        let include = env::var_os("DEP_VMI_INCLUDE").unwrap_or_default();
        for directory in env::split_paths(&include).filter(|path| *path != PathBuf::new()) {
            build.flag("-isystem").flag(directory);
        }
        build.files(WITH_LIBVMI.map(|file| shim.join("src").join(file)));
    }
    build.compile("hyperbp-shim");
}

//! Tells the linker where Xen's libraries find the others they need, if they are in a sysroot.

use std::env;
use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=PKG_CONFIG_SYSROOT_DIR");
    if let Some(root) = env::var_os("PKG_CONFIG_SYSROOT_DIR").map(PathBuf::from) {
        println!("cargo::rustc-link-arg=-Wl,-rpath-link,{}", root.join("usr/lib/x86_64-linux-gnu").display());
        // They may be for a newer C library than this machine has. Where the program runs, there is that one.
        println!("cargo::rustc-link-arg=-Wl,--allow-shlib-undefined");
    }
}

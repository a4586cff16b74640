//! Tells the linker where Xen's libraries find the others they need.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if let Some(lib) = env::var_os("DEP_XENCTRL_LIB") {
        println!("cargo::rustc-link-arg=-Wl,-rpath-link,{}", lib.display());
        // They may be for a newer C library than this machine has. Where the program runs, there is that one.
        println!("cargo::rustc-link-arg=-Wl,--allow-shlib-undefined");
    }
}

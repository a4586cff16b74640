//! Tells the linker where Xen's libraries find the others they need.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if let Some(lib) = env::var_os("DEP_XENCTRL_LIB") {
        println!("cargo::rustc-link-arg=-Wl,-rpath-link,{}", lib.display());
    }
}

//! Links the kernel as what it is: a static ELF at fixed addresses, without a C runtime.
//!
//! The arguments are given here and not in `.cargo/config.toml`, because Cargo looks for that file from the current
//! directory upwards and so would miss it when called with `--manifest-path`.

use std::env;
use std::path::Path;

fn main() {
    let directory = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let script = Path::new(&directory).join("link.ld");
    println!("cargo::rerun-if-changed={}", script.display());

    for argument in [
        "-nostartfiles".to_owned(),
        "-static".to_owned(),
        // Comes after rustc's own -pie, and so wins: the addresses are final, there is nobody to relocate us.
        "-no-pie".to_owned(),
        format!("-Wl,-T,{}", script.display()),
        format!("-Wl,--defsym=CONTROL_GPA={:#x}", hyperbp_bench_abi::CONTROL_GPA),
        "-Wl,--build-id=none".to_owned(),
        "-Wl,--no-eh-frame-hdr".to_owned(),
        "-Wl,-z,max-page-size=4096".to_owned(),
        "-Wl,-z,norelro".to_owned(),
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}

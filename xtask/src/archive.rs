//! What is in libhyperbp.a: one object, of which a program sees what it is to use, and nothing else.
//!
//! A program may be linked with other static libraries that are written in Rust; each has the standard library, and symbols
//! that are the same in all.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// How the symbols begin that a program is to use, in C and in cxx's names.
const OURS: [&str; 2] = ["hyperbp_", "hyperbp$ffi$"];
/// And those of cxx, which other libraries may have, too. They are the same, so each may take the other's place.
const CXX: &str = "cxxbridge1$";
/// The same in C++: namespaces, as they are mangled.
const OUR_NAMESPACE: &str = "N7hyperbp";
const CXX_NAMESPACE: &str = "N4rust10cxxbridge1";

/// What `nm` calls weak.
const WEAK: [&str; 4] = ["V", "W", "u", "w"];

/// Makes one object of those in `archive`, without what is not needed, and of that the library `into`.
pub(crate) fn seal(archive: &Path, into: &Path) -> Result<()> {
    let listed = run(Command::new("nm").args(["--defined-only", "--extern-only", "--format=posix"]).arg(archive))?;
    // A name and a letter.
    let symbol = |line: &'_ str| -> Option<(String, bool)> {
        let mut words = line.split_whitespace();
        let (name, kind) = (words.next()?, words.next()?);
        Some((name.to_owned(), WEAK.contains(&kind)))
    };
    let (api, rest): (Vec<_>, Vec<_>) = listed.lines().filter_map(symbol).partition(|(name, _)| is_api(name));
    ensure!(!api.is_empty(), "{} has none of our functions", archive.display());
    // What is weak is also in other objects, of which the linker takes one: inline functions and templates of C++.
    let hidden: Vec<_> = rest.into_iter().filter(|(_, weak)| !weak).map(|(name, _)| name).collect();

    let directory = into.parent().context("a library is in a directory")?;
    let (object, names) = (directory.join("hyperbp.o"), directory.join("hyperbp.hidden"));
    let mut link = Command::new("ld");
    link.args(["--relocatable", "--gc-sections"]).args(api.iter().map(|(name, _)| format!("--undefined={name}")));
    run(link.arg("-o").arg(&object).arg(archive))?;

    fs::write(&names, hidden.join("\n")).with_context(|| format!("cannot write {}", names.display()))?;
    // Of the standard library there is bitcode that other versions of LLVM cannot read.
    let mut hide = Command::new("objcopy");
    hide.arg("--localize-symbols").arg(&names).args(["--remove-section", ".llvmbc", "--remove-section", ".llvmcmd"]);
    run(hide.arg(&object))?;
    // By itself, for with wildcards each name above would be compared with each symbol.
    let mut weaken = Command::new("objcopy");
    weaken.args(["--wildcard", "--weaken-symbol", "cxxbridge1$*"]);
    for names in [format!("_Z*{CXX_NAMESPACE}*"), format!("_ZNK{}*", &CXX_NAMESPACE[1..])] {
        weaken.arg("--weaken-symbol").arg(names);
    }
    run(weaken.arg(&object))?;

    if into.exists() {
        fs::remove_file(into).with_context(|| format!("cannot remove {}", into.display()))?;
    }
    run(Command::new("ar").arg("rcs").arg(into).arg(&object))?;
    for file in [object, names] {
        fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
    }
    Ok(())
}

/// Whether a symbol is for programs to use.
fn is_api(symbol: &str) -> bool {
    let mangled = symbol.strip_prefix("_Z");
    let ours = OURS.iter().any(|prefix| symbol.starts_with(prefix)) || symbol.starts_with(CXX);
    // What is before a namespace says what it is of something in it: a table of virtual functions, say; and `K`, that it is
    // a method that changes nothing.
    let of = |rest: &str, namespace: &str| {
        let rest = rest.trim_start_matches(|c: char| c != 'N' && c.is_ascii_uppercase());
        rest.starts_with(namespace) || rest.replacen("NK", "N", 1).starts_with(namespace)
    };
    ours || mangled
        .filter(|rest| !is_rust(rest))
        .is_some_and(|rest| [OUR_NAMESPACE, CXX_NAMESPACE].iter().any(|namespace| of(rest, namespace)))
}

/// Rust's own names look like C++'s, but end in a hash of 16 digits.
fn is_rust(mangled: &str) -> bool {
    let hash = mangled.rfind("17h").and_then(|at| mangled[at + 3..].get(..17));
    hash.is_some_and(|hash| hash.ends_with('E') && hash[..16].bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {name}: install binutils"))?;
    ensure!(output.status.success(), "{name} failed:\n{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_programs_use_is_kept() {
        for symbol in [
            "hyperbp_open",
            "hyperbp$ffi$cxxbridge1$205$Session$begin",
            "cxxbridge1$string$drop",
            "_ZN7hyperbp9translateERK9vmi_eventRNS_3ffi5EventE",
            "_ZNK7hyperbp3ffi7Session6failedEv",
            "_ZTIN7hyperbp10HypervisorE",
            "_ZTVN4rust10cxxbridge15ErrorE",
            "_ZNK4rust10cxxbridge16String4sizeEv",
        ] {
            assert!(is_api(symbol), "{symbol}");
        }
    }

    #[test]
    fn nothing_else_is() {
        for symbol in [
            "rust_eh_personality",
            "_ZN7hyperbp6engine6Engine5begin17h584b99e26319b7ddE",
            "_ZN7hyperbp6engine6Engine5begin17h584b99e26319b7ddE.llvm.6909748922607079528",
            "_ZN11hyperbp_ffi7session7Session5close17h72348a53df69fcc9E",
            "_ZNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEE9_M_appendEPKcm",
            "_RNvNtNtNtCsjrHSEGnQ3l9_3std6thread7current2id2ID",
            "__rust_alloc",
            "memcpy",
        ] {
            assert!(!is_api(symbol), "{symbol}");
        }
    }
}

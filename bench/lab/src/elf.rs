//! Which shared libraries programs need.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use goblin::elf::Elf;

use crate::{Error, Result};

/// Every shared library the `programs` need, directly or not, by the name they ask for, where it is first found in `dirs`. One
/// that whoever needs it wants from a place of its own is under its full path: two programs may each need another library of
/// the same name. So is the dynamic linker; where it is in `dirs`, that one is taken.
///
/// # Errors
/// [`Error::Unexpected`] when a library is in none of these places or a file is no ELF.
pub fn libraries(programs: &[&Path], dirs: &[PathBuf]) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut left: Vec<PathBuf> = programs.iter().map(|program| (*program).to_owned()).collect();
    while let Some(path) = left.pop() {
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        let unexpected = |problem: String| Error::Unexpected { path: path.clone(), problem };
        let elf = Elf::parse(&bytes).map_err(|e| unexpected(format!("not a readable ELF: {e}")))?;
        // glibc's own libraries name the linker as a library too, and find it loaded. It must be the one that came with them.
        if let Some(linker) = elf.interpreter {
            let name = Path::new(linker).file_name().unwrap_or_default();
            let beside = dirs.iter().map(|dir| dir.join(name)).find(|file| file.exists());
            found.entry(linker.to_owned()).or_insert_with(|| beside.unwrap_or_else(|| linker.into()));
        }
        for name in elf.libraries.into_iter().filter(|name| !name.starts_with("ld-linux")) {
            let places = elf.runpaths.iter().chain(&elf.rpaths).flat_map(|path| path.split(':')).map(Path::new);
            // What is in a usual place is found there.
            let own = places.filter(|dir| dir.is_absolute() && !dirs.iter().any(|usual| usual == dir));
            let is_there = |file: &PathBuf| file.exists();
            let (key, file) = if let Some(file) = own.map(|dir| dir.join(name)).find(is_there) {
                (file.to_string_lossy().into_owned(), file)
            } else if let Some(file) = dirs.iter().map(|dir| dir.join(name)).find(is_there) {
                (name.to_owned(), file)
            } else if found.keys().any(|known| Path::new(known).file_name() == Some(name.as_ref())) {
                // Who loads this library has loaded that one, from such a place.
                continue;
            } else {
                return Err(unexpected(format!("needs {name}, which is not in {dirs:?}")));
            };
            if found.insert(key, file.clone()).is_none() {
                left.push(file);
            }
        }
    }
    Ok(found)
}

/// A shared library that a program loads while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The name it is asked for by.
    pub name: String,
    /// The name programs that are linked with it ask for.
    pub soname: String,
    /// Where it is.
    pub file: PathBuf,
}

/// Shared libraries with these names, each where it is first found in `dirs`.
///
/// # Errors
/// Those of [`libraries`].
pub fn named(names: &[String], dirs: &[PathBuf]) -> Result<Vec<Named>> {
    let find = |name: &String| {
        let unexpected = |path: &Path, problem: String| Error::Unexpected { path: path.to_owned(), problem };
        let file = dirs.iter().map(|dir| dir.join(name)).find(|file| file.exists());
        let file = file.ok_or_else(|| unexpected(Path::new(name), format!("is in none of {dirs:?}")))?;
        let bytes = fs::read(&file).map_err(Error::io("read", &file))?;
        let elf = Elf::parse(&bytes).map_err(|e| unexpected(&file, format!("not a readable ELF: {e}")))?;
        Ok(Named { name: name.clone(), soname: elf.soname.unwrap_or(name).to_owned(), file })
    };
    names.iter().map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_very_program_needs_libc_and_the_linker() {
        let this = std::env::current_exe().unwrap();
        let dirs = [PathBuf::from("/lib/x86_64-linux-gnu"), PathBuf::from("/usr/lib/x86_64-linux-gnu")];
        let found = libraries(&[&this], &dirs).unwrap();
        assert!(found.contains_key("libc.so.6"), "{found:?}");
        assert!(found.contains_key("/lib64/ld-linux-x86-64.so.2"), "{found:?}");
    }

    #[test]
    fn the_linker_is_the_one_beside_libc() {
        let sysroot = tempfile::tempdir().unwrap();
        for name in ["libc.so.6", "ld-linux-x86-64.so.2"] {
            fs::copy(Path::new("/lib/x86_64-linux-gnu").join(name), sysroot.path().join(name)).unwrap();
        }
        let dirs = [sysroot.path().to_owned(), PathBuf::from("/lib/x86_64-linux-gnu")];
        let found = libraries(&[&std::env::current_exe().unwrap()], &dirs).unwrap();
        assert_eq!(found["libc.so.6"], sysroot.path().join("libc.so.6"));
        assert_eq!(found["/lib64/ld-linux-x86-64.so.2"], sysroot.path().join("ld-linux-x86-64.so.2"));
    }

    #[test]
    fn a_library_has_the_name_others_are_linked_with() {
        let dirs = [PathBuf::from("/lib/x86_64-linux-gnu"), PathBuf::from("/usr/lib/x86_64-linux-gnu")];
        let found = named(&["libc.so.6".to_owned()], &dirs).unwrap();
        assert_eq!((&*found[0].name, &*found[0].soname), ("libc.so.6", "libc.so.6"));
        let error = named(&["libnothing.so".to_owned()], &dirs).unwrap_err().to_string();
        assert!(error.contains("libnothing.so"), "{error}");
    }

    #[test]
    fn a_library_from_a_place_of_its_own_stays_there() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().to_string_lossy().into_owned();
        let compile = |arguments: &[&str], source: &str| {
            fs::write(dir.path().join("source.c"), source).unwrap();
            let mut compiler = std::process::Command::new("cc");
            assert!(compiler.current_dir(&dir).args(["source.c", "-o"]).args(arguments).status().unwrap().success());
        };
        compile(&["libown.so", "-shared", "-fPIC", "-Wl,-soname,libown.so"], "int own(void) { return 0; }");
        let rpath = format!("-Wl,-rpath,{own}:/usr/lib/x86_64-linux-gnu");
        compile(&["program", "libown.so", &rpath], "int own(void); int main(void) { return own(); }");
        let program = dir.path().join("program");
        let dirs = [PathBuf::from("/usr/lib/x86_64-linux-gnu")];
        let found = libraries(&[&program], &dirs).unwrap();
        assert!(found.contains_key(&format!("{own}/libown.so")) && found.contains_key("libc.so.6"), "{found:?}");
        // Where that is a usual place, it is one for all.
        let found = libraries(&[&program], &[dirs[0].clone(), dir.path().to_owned()]).unwrap();
        assert!(found.contains_key("libown.so"), "{found:?}");
    }

    #[test]
    fn a_library_that_is_nowhere_is_named() {
        let error = libraries(&[&std::env::current_exe().unwrap()], &[]).unwrap_err().to_string();
        assert!(error.contains(".so"), "{error}");
    }
}

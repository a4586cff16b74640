//! Where the functions of a Linux kernel are in a guest's memory.
//!
//! Linux on x86-64 maps its own text and data at [`KERNEL_MAP`], as they lie in physical memory
//! (`__START_KERNEL_map`, arch/x86/include/asm/page_64_types.h). With KASLR, both ends of that mapping are moved, each by a
//! multiple of [`ALIGNMENT`]: so `linux_banner`, whose text is known, is looked for.

use std::collections::HashMap;
use std::io::{self, BufRead};

use hyperbp::{Gpa, Hypervisor, PAGE_SIZE};

use crate::xen::Domain;

/// The kernel's own mapping: 1 GiB from here.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
const KERNEL_MAP_SIZE: u64 = 1 << 30;
/// `CONFIG_PHYSICAL_ALIGN`: where the kernel may lie.
const ALIGNMENT: u64 = 2 << 20;
/// A string in the kernel, and what it begins with.
const BANNER: &str = "linux_banner";
const BANNER_TEXT: &[u8] = b"Linux version ";

/// Why a name is no address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    /// No such name.
    #[error("there is no function `{name}` in the symbols{}", or(similar))]
    Unknown {
        /// As it was asked for.
        name: String,
        /// Those that begin with it and a dot: the compiler has split or specialised the function.
        similar: Vec<String>,
    },
    /// Several functions have this name.
    #[error("there are {count} functions `{name}`: give the guest-physical address of the one that is meant")]
    Ambiguous {
        /// As it was asked for.
        name: String,
        /// How many.
        count: usize,
    },
    /// The kernel has hidden the addresses (`/proc/sys/kernel/kptr_restrict`), or the file is Debian's empty System.map.
    #[error(
        "the symbols have no address for `{0}`: read /proc/kallsyms in the guest as root, with kernel.kptr_restrict=0"
    )]
    Hidden(String),
    /// Not in the kernel's own mapping.
    #[error("`{0}` is not in the kernel's own text but at {1:#x}: the functions of modules cannot be found by name")]
    NotKernelText(String, u64),
    /// The text of `linux_banner` is nowhere.
    #[error("the symbols are not those of the kernel that runs in this domain: `{BANNER}` is not where it should be")]
    OtherKernel,
}

fn or(similar: &[String]) -> String {
    if similar.is_empty() { String::new() } else { format!(", but {}", similar.join(", ")) }
}

/// Symbols of a kernel: those of its functions that were asked for.
#[derive(Debug, Default)]
pub(crate) struct Symbols {
    addresses: HashMap<String, Vec<u64>>,
    /// Names with a suffix of the compiler's.
    suffixed: Vec<String>,
}

impl Symbols {
    /// Reads a System.map, or what `/proc/kallsyms` says. Only what concerns `names` is kept.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(crate) fn read(file: impl BufRead, names: &[&str]) -> io::Result<Self> {
        let mut symbols = Self::default();
        for line in file.split(b'\n') {
            let line = line?;
            let Ok(line) = std::str::from_utf8(&line) else { continue };
            let mut words = line.split_ascii_whitespace();
            let (Some(address), Some(_kind), Some(name)) = (words.next(), words.next(), words.next()) else { continue };
            // A fourth word is the module it belongs to.
            let (Ok(address), None) = (u64::from_str_radix(address, 16), words.next()) else { continue };
            let whole = name.split_once('.').map_or(name, |(name, _suffix)| name);
            if name == BANNER || names.contains(&name) {
                symbols.addresses.entry(name.to_owned()).or_default().push(address);
            } else if names.contains(&whole) {
                symbols.suffixed.push(name.to_owned());
            }
        }
        Ok(symbols)
    }

    /// Linear address of a function.
    fn linear(&self, name: &str) -> Result<u64, Error> {
        match self.addresses.get(name).map(Vec::as_slice) {
            Some([0]) => Err(Error::Hidden(name.to_owned())),
            Some([address]) => Ok(*address),
            Some(several) => Err(Error::Ambiguous { name: name.to_owned(), count: several.len() }),
            None => {
                let suffix = |other: &&String| other.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
                let similar = self.suffixed.iter().filter(suffix).cloned().collect();
                Err(Error::Unknown { name: name.to_owned(), similar })
            }
        }
    }

    /// Where in the kernel's own mapping a function is.
    fn offset(&self, name: &str) -> Result<u64, Error> {
        let linear = self.linear(name)?;
        let offset = linear.checked_sub(KERNEL_MAP).filter(|offset| *offset < KERNEL_MAP_SIZE);
        offset.ok_or_else(|| Error::NotKernelText(name.to_owned(), linear))
    }

    /// The kernel of a domain with these symbols.
    ///
    /// # Errors
    /// If they have no `linux_banner`, or the kernel is another one.
    pub(crate) fn locate(&self, domain: &mut Domain) -> Result<Kernel<'_>, Error> {
        let memory = domain.memory().map_or(0, |(pages, _)| pages * PAGE_SIZE as u64);
        let banner = self.offset(BANNER)?;
        let moved = moved(banner, memory, |gpa| {
            let mut text = [0; BANNER_TEXT.len()];
            // Not all of it is memory.
            usize::from(gpa.offset()) + text.len() <= PAGE_SIZE
                && domain.read(gpa, &mut text).is_ok()
                && text == BANNER_TEXT
        });
        Ok(Kernel { symbols: self, moved: moved.ok_or(Error::OtherKernel)? })
    }
}

/// By how much the physical address of what is at `offset` in the kernel's mapping differs from that, in a guest with so much
/// memory. `is_there` tells whether it is at an address.
fn moved(offset: u64, memory: u64, mut is_there: impl FnMut(Gpa) -> bool) -> Option<u64> {
    // Not moved, as without KASLR; else anywhere. (A hole below 4 GiB moves the end of the memory up.)
    let end = memory + (4 << 30);
    let mut places = std::iter::once(offset).chain((offset % ALIGNMENT..end).step_by(ALIGNMENT as usize));
    places.find(|place| is_there(Gpa(*place))).map(|place| place.wrapping_sub(offset))
}

/// A kernel in a domain's memory.
#[derive(Debug)]
pub(crate) struct Kernel<'a> {
    symbols: &'a Symbols,
    moved: u64,
}

impl Kernel<'_> {
    /// Guest-physical address of a function.
    ///
    /// # Errors
    /// If it is not known, or not the only one of this name.
    pub(crate) fn address(&self, name: &str) -> Result<Gpa, Error> {
        Ok(Gpa(self.symbols.offset(name)?.wrapping_add(self.moved)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _text
ffffffff81234560 T vfs_read
ffffffff81234600 t worker
ffffffff81234700 t worker
ffffffff81234800 t finish_task_switch.isra.0
ffffffff82000100 D linux_banner
not a line
ffffffffc0123000 T vfs_write
ffffffffc0456000 t helper\t[module]
0000000000000000 T hidden
";

    fn symbols() -> Symbols {
        let names = ["vfs_read", "worker", "finish_task_switch", "vfs_write", "helper", "hidden"];
        Symbols::read(MAP.as_bytes(), &names).unwrap()
    }

    #[test]
    fn a_function_is_where_the_mapping_shows_it() {
        let symbols = symbols();
        let kernel = |moved| Kernel { symbols: &symbols, moved };
        assert_eq!(kernel(0).address("vfs_read"), Ok(Gpa(0x123_4560)));
        assert_eq!(kernel(0x20_0000).address("vfs_read"), Ok(Gpa(0x143_4560)));
        assert_eq!(kernel(0x20_0000_u64.wrapping_neg()).address("vfs_read"), Ok(Gpa(0x103_4560)));
    }

    #[test]
    fn what_is_no_address_says_why() {
        let symbols = symbols();
        let error = |name: &str| symbols.offset(name).unwrap_err();
        assert_eq!(error("worker"), Error::Ambiguous { name: "worker".to_owned(), count: 2 });
        assert_eq!(error("vfs_write"), Error::NotKernelText("vfs_write".to_owned(), 0xffff_ffff_c012_3000));
        assert_eq!(error("hidden"), Error::Hidden("hidden".to_owned()));
        assert_eq!(error("helper"), Error::Unknown { name: "helper".to_owned(), similar: vec![] });
        let split = error("finish_task_switch").to_string();
        assert!(split.ends_with("but finish_task_switch.isra.0"), "{split}");
    }

    #[test]
    fn a_kernel_that_was_moved_is_found() {
        let offset = 0x200_0100;
        let at = |place: u64| moved(offset, 64 << 20, |gpa| gpa == Gpa(place));
        assert_eq!(at(offset), Some(0));
        assert_eq!(at(offset + ALIGNMENT), Some(ALIGNMENT));
        assert_eq!(at(offset - 3 * ALIGNMENT), Some((3 * ALIGNMENT).wrapping_neg()));
        assert_eq!(at(offset + 1), None);
    }
}

//! An independent page walker, from the Intel SDM (volume 3, chapter 4) and from nothing of the core: what the tests of the
//! core's own walker, and the fuzz target, compare with.
//!
//! It is a table: for each paging mode its levels, and for each level and form of an entry which bits are reserved.

/// What paging depends on.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    /// CR0, CR3, CR4 and EFER.
    pub cr0: u64,
    /// The root of the tables.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// The model-specific register.
    pub efer: u64,
    /// The access is made with CPL 3.
    pub user: bool,
    /// RFLAGS.AC: an explicit supervisor access to a user page is made in spite of SMAP.
    pub alignment_check: bool,
    /// MAXPHYADDR, 36 to 52.
    pub physical_bits: u32,
    /// CPUID.80000001H:EDX.Page1GB.
    pub gigabyte_pages: bool,
    /// The four page-directory-pointer-table entries in the CPU, if PAE paging is on.
    pub pointers: [u64; 4],
}

/// How an access comes to its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granted {
    /// The guest-physical address.
    pub gpa: u64,
    /// How linear addresses are translated.
    pub mode: Mode,
    /// Bits of the address that are the offset in the page: 12, 21, 22 or 30.
    pub page_bits: u32,
}

/// How linear addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Mode {
    Off,
    Bits32,
    Pae,
    Level4,
    Level5,
}

/// Why the CPU does not make an access at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Denied {
    /// The linear address is none in this mode.
    NoAddress,
    /// It reaches into the next page: that is another translation.
    Crossing,
    /// An entry is not present.
    NotPresent,
    /// An entry has a reserved bit.
    Reserved,
    /// No entry permits it.
    Protection,
    /// The CPU would set an accessed or a dirty flag.
    Unmarked,
    /// A table is where no memory is.
    NoMemory,
    /// Protection keys decide: this walker does not know them.
    Keys,
}

/// A level of the tables.
struct Level {
    /// Bits of the linear address that index its table.
    index: std::ops::Range<u32>,
    /// What its entries can be.
    form: Form,
}

/// What an entry can be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Refers to a table; bit 7 is reserved.
    Table,
    /// Refers to a table, or, with bit 7, maps a page of so many bits.
    TableOr(u32),
    /// Maps a page of 4 KiB.
    Page,
}

const fn level(low: u32, high: u32, form: Form) -> Level {
    Level { index: low..high + 1, form }
}

const BITS32: [Level; 2] = [level(22, 31, Form::TableOr(22)), level(12, 21, Form::Page)];
const PAE: [Level; 2] = [level(21, 29, Form::TableOr(21)), level(12, 20, Form::Page)];
const LEVEL5: [Level; 5] = [
    level(48, 56, Form::Table),
    level(39, 47, Form::Table),
    level(30, 38, Form::TableOr(30)),
    level(21, 29, Form::TableOr(21)),
    level(12, 20, Form::Page),
];

/// Bits `low` to `high`.
const fn bits(low: u32, high: u32) -> u64 {
    if low > high { 0 } else { (u64::MAX >> (63 - high)) & (u64::MAX << low) }
}

const fn has(value: u64, bit: u32) -> bool {
    value >> bit & 1 != 0
}

impl Cpu {
    fn mode(&self) -> Mode {
        match (has(self.cr0, 31), has(self.efer, 10), has(self.cr4, 5), has(self.cr4, 12)) {
            (false, ..) => Mode::Off,
            (_, true, _, true) => Mode::Level5,
            (_, true, _, false) => Mode::Level4,
            (_, false, true, _) => Mode::Pae,
            (_, false, false, _) => Mode::Bits32,
        }
    }

    /// The bits that must be 0 in an entry that is present (tables 4-5 to 4-20).
    fn reserved(&self, mode: Mode, form: Form, entry: u64) -> u64 {
        let physical = self.physical_bits;
        if mode == Mode::Bits32 {
            // PSE-36: bits 20 to 13 are bits 39 to 32 of the address, as many of them as there are.
            let most = physical.min(40);
            let large = matches!(form, Form::TableOr(_)) && self.maps(mode, form, entry);
            return if large { bits(most - 19, 21) } else { 0 };
        }
        let execute_disable = if has(self.efer, 11) { 0 } else { 1 << 63 };
        let address = match mode {
            Mode::Pae => bits(physical, 62),
            _ => bits(physical, 51),
        };
        let form = match form {
            Form::Table => 1 << 7,
            Form::TableOr(30) if !self.gigabyte_pages => 1 << 7,
            Form::TableOr(page) if has(entry, 7) => bits(13, page - 1),
            _ => 0,
        };
        execute_disable | address | form
    }

    /// Whether an entry maps a page.
    fn maps(&self, mode: Mode, form: Form, entry: u64) -> bool {
        match form {
            Form::Page => true,
            Form::Table => false,
            Form::TableOr(_) => has(entry, 7) && (mode != Mode::Bits32 || has(self.cr4, 4)),
        }
    }

    /// Where an access of `length` bytes goes, if the CPU makes it at once: without a fault, and without setting a flag.
    /// `read` has an entry of 8 or 4 bytes of physical memory.
    pub fn walk(
        &self,
        linear: u64,
        length: usize,
        write: bool,
        mut read: impl FnMut(u64, usize) -> Option<u64>,
    ) -> Result<Granted, Denied> {
        let mode = self.mode();
        let (levels, width): (&[Level], u32) = match mode {
            Mode::Off => (&[], 32),
            Mode::Bits32 => (&BITS32, 32),
            Mode::Pae => (&PAE, 32),
            Mode::Level4 => (&LEVEL5[1..], 48),
            Mode::Level5 => (&LEVEL5, 57),
        };
        let extended = (linear << (64 - width)) as i64 >> (64 - width);
        let is_address = match width {
            32 => linear >> 32 == 0,
            _ => extended as u64 == linear,
        };
        if !is_address {
            return Err(Denied::NoAddress);
        }
        if linear % 4096 + length as u64 > 4096 {
            return Err(Denied::Crossing);
        }
        if mode == Mode::Off {
            return Ok(Granted { gpa: linear, mode, page_bits: 12 });
        }
        let size = if mode == Mode::Bits32 { 4 } else { 8 };
        let mut table = match mode {
            Mode::Bits32 => self.cr3 & bits(12, 31),
            Mode::Pae => {
                let pointer = self.pointers[(linear >> 30) as usize];
                if !has(pointer, 0) {
                    return Err(Denied::NotPresent);
                }
                pointer & bits(12, 51)
            }
            _ => self.cr3 & bits(12, 51),
        };
        let (mut user, mut writable, mut accessed, mut dirty) = (true, true, true, false);
        let mut page = None;
        for Level { index, form } in levels {
            let number = linear >> index.start & ((1 << (index.end - index.start)) - 1);
            let entry = read(table + number * size, size as usize).ok_or(Denied::NoMemory)?;
            if !has(entry, 0) {
                return Err(Denied::NotPresent);
            }
            if entry & self.reserved(mode, *form, entry) != 0 {
                return Err(Denied::Reserved);
            }
            writable &= has(entry, 1);
            user &= has(entry, 2);
            accessed &= has(entry, 5);
            if self.maps(mode, *form, entry) {
                dirty = has(entry, 6);
                let page_bits = if let Form::TableOr(page_bits) = form { *page_bits } else { 12 };
                let high = if mode == Mode::Bits32 && page_bits == 22 { (entry >> 13 & 0xff) << 32 } else { 0 };
                let top = if mode == Mode::Bits32 { 31 } else { 51 };
                page = Some((entry & bits(page_bits, top) | high, page_bits));
                break;
            }
            table = entry & bits(12, if mode == Mode::Bits32 { 31 } else { 51 });
        }
        let (frame, page_bits) = page.expect("the last level maps a page");
        // Supervisor accesses to user pages depend on SMAP and AC; user accesses to others are none.
        let permitted = match (self.user, user) {
            (true, false) => false,
            (false, true) if has(self.cr4, 21) && !self.alignment_check => false,
            _ => !write || writable || !(self.user || has(self.cr0, 16)),
        };
        if !permitted {
            return Err(Denied::Protection);
        }
        if mode >= Mode::Level4 && has(self.cr4, if user { 22 } else { 24 }) {
            return Err(Denied::Keys);
        }
        if !accessed || (write && !dirty) {
            return Err(Denied::Unmarked);
        }
        Ok(Granted { gpa: frame | linear & bits(0, page_bits - 1), mode, page_bits })
    }
}

//! A domain's memory and views.

use std::cell::RefCell;
use std::io;
use std::ptr::NonNull;

use hyperbp::{Gfn, PAGE_SIZE, Rights, ViewId};
use hyperbp_guest_page::M2p;
use hyperbp_privcmd::{Buffer, Mapping, Privcmd};

use crate::frames::{FrameError, GuestMemory, PAGE_KIB, Usage};
use crate::store;

/// Hypercalls (`xen/include/public/xen.h`).
const MEMORY_OP: u64 = 12;
const HVM_OP: u64 = 34;
const DM_OP: u64 = 41;

/// Operations of `MEMORY_OP` (`xen/include/public/memory.h`).
const DECREASE_RESERVATION: u64 = 1;
const MAXIMUM_RAM_PAGE: u64 = 2;
const CURRENT_RESERVATION: u64 = 3;
const MACHPHYS_MFN_LIST: u64 = 5;
const POPULATE_PHYSMAP: u64 = 6;
const MAXIMUM_GPFN: u64 = 14;
const ACCESS_OP: u64 = 21;
/// And of `ACCESS_OP`.
const SET_ACCESS: u64 = 0;
const GET_ACCESS: u64 = 1;
/// For the rights of pages to come, in place of a frame number.
const DEFAULT_ACCESS: u64 = u64::MAX;

/// Operations of `HVM_OP` (`xen/include/public/hvm/hvm_op.h`).
const GET_PARAM: u64 = 1;
const GET_MEM_TYPE: u64 = 15;
const ALTP2M: u64 = 25;
/// `HVMOP_ALTP2M_INTERFACE_VERSION`, and operations of `ALTP2M`.
const ALTP2M_VERSION: u64 = 1;
const ALTP2M_CREATE: u64 = 4;
const ALTP2M_GET_ACCESS: u64 = 12;
/// `HVM_PARAM_ALTP2M` (`xen/include/public/hvm/params.h`).
const PARAM_ALTP2M: u64 = 35;
/// `HVMMEM_ram_rw`, and `HVMMEM_mmio_dm`: also what has nothing at all.
const RAM: u64 = 0;
const MMIO: u64 = 2;

/// `XEN_DMOP_modified_memory` (`xen/include/public/hvm/dm_op.h`).
const MODIFIED_MEMORY: u64 = 11;

/// The owner of Xen's own pages (`xen/include/public/xen.h`).
const XEN: u16 = 0x7ff2;

/// Pages of the table in one of its extents: 2 MiB (`XENMEM_machphys_mfn_list`).
const EXTENT_PAGES: usize = 512;
const ENTRIES_PER_PAGE: usize = PAGE_SIZE / size_of::<u64>();

/// Where in the buffer lists are that a call points to, in words.
const LIST: usize = 32;

/// What a domain's configuration says of altp2m (`XEN_ALTP2M_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Altp2m {
    /// There are no views.
    Disabled,
    /// The guest may make and switch views.
    Mixed,
    /// Only another domain may.
    External,
    /// The guest may switch views.
    Limited,
    /// One that is not known yet.
    Unknown(u64),
}

/// `XENMEM_access_*`, in their order.
const ACCESS: [Option<Rights>; 8] = [
    Some(Rights::None),
    Some(Rights::Read),
    None,
    Some(Rights::ReadWrite),
    Some(Rights::Execute),
    Some(Rights::ReadExecute),
    None,
    Some(Rights::All),
];

/// Xen's number of rights.
fn access(rights: Rights) -> u64 {
    ACCESS.iter().position(|known| *known == Some(rights)).map_or(0, |number| number as u64)
}

/// A domain. Nothing that is done with it is undone by this.
#[derive(Debug)]
pub struct Domain {
    privcmd: Privcmd,
    id: u16,
    /// Calls that only ask use it, too.
    buffer: RefCell<Buffer>,
}

impl Domain {
    /// The domain with this number.
    ///
    /// # Errors
    /// If this is no dom0 with Linux 4.18 or newer.
    pub fn open(id: u16) -> io::Result<Self> {
        Ok(Self { privcmd: Privcmd::open()?, id, buffer: RefCell::new(Buffer::new(1)?) })
    }

    /// Makes a call with a structure, which begins the buffer.
    fn call(&self, operation: u64, command: u64, structure: &[u64]) -> io::Result<u32> {
        let mut buffer = self.buffer.borrow_mut();
        buffer.fill(structure);
        self.privcmd.call(operation, &[command, buffer.address_of(0)])
    }

    /// What Xen has written into a word of that structure.
    fn answer(&self, word: usize) -> u64 {
        self.buffer.borrow().get(word)
    }

    /// How altp2m was configured for it (`HVM_PARAM_ALTP2M`).
    ///
    /// # Errors
    /// What Xen says.
    pub fn altp2m(&self) -> io::Result<Altp2m> {
        // `struct xen_hvm_param`.
        self.call(HVM_OP, GET_PARAM, &[u64::from(self.id) | PARAM_ALTP2M << 32, 0])?;
        Ok(match self.answer(1) {
            0 => Altp2m::Disabled,
            1 => Altp2m::Mixed,
            2 => Altp2m::External,
            3 => Altp2m::Limited,
            other => Altp2m::Unknown(other),
        })
    }

    /// Makes a view in which the guest may do everything. Altp2m must be on.
    ///
    /// # Errors
    /// What Xen says: `EINVAL` if there is no view left.
    pub fn create_view(&self) -> io::Result<ViewId> {
        // Never XENMEM_access_default: its number differs between Xen's versions.
        self.altp2m_call(ALTP2M_CREATE, &[access(Rights::All) << 16])?;
        Ok(ViewId(self.answer(2) as u16))
    }

    /// What a view other than the host view permits on a page. None if that is something that no [`Rights`] stand for.
    ///
    /// # Errors
    /// What Xen says.
    pub fn view_rights(&self, view: ViewId, gfn: Gfn) -> io::Result<Option<Rights>> {
        // `struct xen_hvm_altp2m_mem_access`.
        self.altp2m_call(ALTP2M_GET_ACCESS, &[u64::from(view.0), gfn.0])?;
        let number = self.answer(2) >> 16 & 0xffff;
        Ok(ACCESS.get(number as usize).copied().flatten())
    }

    /// `struct xen_hvm_altp2m_op`, with these words in its union.
    fn altp2m_call(&self, command: u64, words: &[u64]) -> io::Result<()> {
        let mut call = [0; 2 + 8];
        (call[0], call[1]) = (ALTP2M_VERSION | command << 32, u64::from(self.id));
        for (to, from) in call[2..].iter_mut().zip(words) {
            *to = *from;
        }
        self.call(HVM_OP, ALTP2M, &call).map(drop)
    }

    /// Sets what the host view permits on pages that come from now on.
    ///
    /// # Errors
    /// What Xen says: `ENODEV` if nobody receives the domain's events.
    pub fn set_default_rights(&self, rights: Rights) -> io::Result<()> {
        let call = self.access_call(SET_ACCESS, access(rights), DEFAULT_ACCESS);
        self.call(MEMORY_OP, ACCESS_OP, &call).map(drop)
    }

    /// `struct xen_mem_access_op`.
    fn access_call(&self, operation: u64, access: u64, gfn: u64) -> [u64; 4] {
        [operation | access << 8 | u64::from(self.id) << 16 | 1 << 32, gfn, 0, 0]
    }

    /// Maps a page for reading and writing: where it is, on a page's boundary, and what keeps it there.
    ///
    /// # Errors
    /// If there is no such page.
    pub fn map_page(&self, gfn: Gfn) -> io::Result<(NonNull<u8>, Mapping)> {
        let mapping = self.privcmd.map(self.id, &[gfn.0], true)?;
        Ok((mapping.address().cast(), mapping))
    }

    /// Whether a page is plain memory. One that is read-only, or that log-dirty mode watches, is not.
    ///
    /// # Errors
    /// What Xen says.
    pub fn is_ram(&self, gfn: Gfn) -> io::Result<bool> {
        Ok(self.mem_type(gfn)? == RAM)
    }

    /// What is at a frame number, of `HVMMEM_*`.
    fn mem_type(&self, gfn: Gfn) -> io::Result<u64> {
        // `struct xen_hvm_get_mem_type`.
        self.call(HVM_OP, GET_MEM_TYPE, &[self.id.into(), gfn.0])?;
        Ok(self.answer(0) >> 16 & 0xffff)
    }

    /// Whether nothing at all is at this number. Only while somebody receives the domain's events.
    ///
    /// # Errors
    /// What Xen says.
    pub fn is_empty(&self, gfn: Gfn) -> io::Result<bool> {
        // RAM of any kind, and grants. Populate on demand, too, which has no page yet.
        if self.mem_type(gfn)? != MMIO {
            return Ok(false);
        }
        let call = self.access_call(GET_ACCESS, 0, gfn.0);
        match self.call(MEMORY_OP, ACCESS_OP, &call) {
            // A device's own memory, or another domain's.
            Ok(_) => Ok(false),
            // Nothing is mapped; or the number is above all that the domain has had (`mem_access_memop`).
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// The highest frame number that it has had, without what is above 32 bits of it.
    fn maximum_gfn(&self) -> io::Result<u64> {
        // `domid_t`.
        self.call(MEMORY_OP, MAXIMUM_GPFN, &[self.id.into()]).map(u64::from)
    }

    /// Adds a page of memory at a number, whatever is there, or takes the one there away.
    fn reserve(&self, operation: u64, gfn: Gfn) -> io::Result<()> {
        // `struct xen_memory_reservation`: where the list is, one extent, of one page, whose.
        let list = self.buffer.borrow().address_of(LIST);
        let call = [list, 1, 0, self.id.into()];
        self.buffer.borrow_mut().set(LIST, gfn.0);
        match self.call(MEMORY_OP, operation, &call)? {
            1 => Ok(()),
            // It does not say why.
            _ => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
        }
    }

    /// Tells Xen that the device model, as which we are, has written to a page: a migration copies it once more. Does nothing
    /// without log-dirty mode.
    ///
    /// # Errors
    /// What Xen says.
    pub fn report_written(&self, gfn: Gfn) -> io::Result<()> {
        let mut buffer = self.buffer.borrow_mut();
        // `struct xen_dm_op`, `struct xen_dm_op_modified_memory_extent`, and the two `struct xen_dm_op_buf` that say so.
        const OPERATION: usize = 4;
        const EXTENT: usize = OPERATION + 8;
        let (operation, extent) = (buffer.address_of(OPERATION), buffer.address_of(EXTENT));
        buffer.fill(&[operation, 8 * 8, extent, 2 * 8, MODIFIED_MEMORY, 1, 0, 0, 0, 0, 0, 0, gfn.0, 1]);
        self.privcmd.call(DM_OP, &[self.id.into(), 2, buffer.address_of(0)]).map(drop)
    }

    /// Maps Xen's machine-to-physical table.
    ///
    /// # Errors
    /// What Xen says: where this is no PV dom0.
    pub fn map_m2p(&self) -> io::Result<M2p<Mapping>> {
        let count = self.privcmd.call(MEMORY_OP, &[MAXIMUM_RAM_PAGE])? as usize;
        let pages = count.div_ceil(ENTRIES_PER_PAGE);
        let room = pages.div_ceil(EXTENT_PAGES);
        let list = Buffer::new((room * size_of::<u64>()).div_ceil(PAGE_SIZE).max(1))?;
        // `struct xen_machphys_mfn_list`.
        let call = [room as u64, list.address_of(0), 0];
        self.call(MEMORY_OP, MACHPHYS_MFN_LIST, &call)?;
        let written = (self.answer(2) as u32) as usize;
        if written < room {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "Xen has not told where all of the table is"));
        }
        let extent = |page: usize| list.get(page / EXTENT_PAGES);
        // A gap of the machine's memory has no table.
        if (0..pages).step_by(EXTENT_PAGES).any(|page| extent(page) == 0) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the machine's memory has gaps of 1 GiB"));
        }
        let frames: Vec<u64> = (0..pages).map(|page| extent(page) + (page % EXTENT_PAGES) as u64).collect();
        let mapping = self.privcmd.map(XEN, &frames, false)?;
        let entries: NonNull<u64> = mapping.address().cast();
        // SAFETY: all of its pages are mapped readable until the mapping is dropped.
        Ok(unsafe { M2p::new(entries, count, mapping) })
    }
}

/// Its memory limit is not changed: LibVMI lifts that when it is initialised, and puts it back.
impl GuestMemory for Domain {
    type Error = Error;

    fn usage(&self) -> Result<Usage, Error> {
        Ok(Usage { pages: 0, limit: 0 })
    }

    fn last_gfn(&self) -> Result<u64, Error> {
        Ok(self.maximum_gfn()?)
    }

    fn most(&self) -> Result<u64, Error> {
        let most = store::most_memory(self.id).unwrap_or_else(|error| {
            log::warn!("xenstore does not tell how much memory domain {} may have: {error}", self.id);
            None
        });
        match most {
            Some(kib) => Ok(kib / PAGE_KIB),
            // What it has is as much as is known.
            None => Ok(self.call(MEMORY_OP, CURRENT_RESERVATION, &[self.id.into()])?.into()),
        }
    }

    fn is_unused(&self, gfn: Gfn) -> Result<bool, Error> {
        Ok(self.is_empty(gfn)?)
    }

    fn raise_limit(&mut self, _: u64, _: u64) -> Result<(), Error> {
        Ok(())
    }

    fn restore_limit(&mut self, _: Option<u64>) -> Result<(), Error> {
        Ok(())
    }

    fn populate(&mut self, gfn: Gfn) -> Result<(), Error> {
        self.reserve(POPULATE_PHYSMAP, gfn).map_err(|error| Error::NoPage(self.id, error))
    }

    fn depopulate(&mut self, gfn: Gfn) -> Result<(), Error> {
        let released = self.reserve(DECREASE_RESERVATION, gfn);
        // Whoever may make hypercalls in the guest can have given it back.
        if released.is_err() && self.is_empty(gfn)? {
            log::warn!("the shadow page at {gfn} was taken away by somebody else");
            return Ok(());
        }
        Ok(released?)
    }

    fn explain(&self, error: Error, _: Usage) -> Error {
        error
    }
}

/// Why there is no page to be had, or to be given back.
#[derive(Debug)]
pub enum Error {
    /// There is no number for it.
    Frame(FrameError),
    /// The domain gets no page.
    NoPage(u16, io::Error),
    /// Xen refuses something else.
    Refused(io::Error),
}

impl From<FrameError> for Error {
    fn from(error: FrameError) -> Self {
        Self::Frame(error)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Refused(error)
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Frame(error) => error.fmt(f),
            Self::NoPage(domain, error) => write!(
                f,
                "domain {domain} gets no page more: the host has no memory left (`xl info`), its page-table memory is full \
                 (shadow_memory= in its configuration), or it has reached its memory limit: {error}"
            ),
            Self::Refused(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_have_the_numbers_of_xen() {
        // `xenmem_access_t`: n, r, w, rw, x, rx, wx, rwx.
        let all = [Rights::None, Rights::Read, Rights::ReadWrite, Rights::Execute, Rights::ReadExecute, Rights::All];
        assert_eq!(all.map(access), [0, 1, 3, 4, 5, 7]);
    }

    #[test]
    fn elsewhere_than_in_a_dom0_it_is_an_error() {
        if !std::path::Path::new("/dev/xen/privcmd").exists() {
            assert_eq!(Domain::open(1).unwrap_err().kind(), io::ErrorKind::NotFound);
        }
    }
}

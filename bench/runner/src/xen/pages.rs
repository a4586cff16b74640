//! What the guest's pages are mapped with, and Xen's machine-to-physical table.

use std::ffi::c_void;
use std::io;
use std::ptr::NonNull;
use std::rc::Rc;
use std::time::Duration;

use hyperbp::{Gfn, Gpa, Hypervisor, PAGE_SIZE};
use hyperbp_guest_page::{M2p, Pages};
use hyperbp_xen_sys as sys;

use super::handle::{ForeignMemory, Interface, MemTypes, map};
use super::{Domain, Error, Mapping, Page, check};

/// Entries of the table in one of its extents: 2 MiB (`XENMEM_machphys_mfn_list`).
const EXTENT_PAGES: usize = 512;
const ENTRIES_PER_PAGE: usize = PAGE_SIZE / size_of::<u64>();

/// The owner of Xen's own pages (xen/include/public/xen.h).
const DOMID_XEN: u32 = 0x7ff2;

/// How long the type of a page is taken for what it was. Xen has no notice when a toolstack or a device model changes it.
const TYPE_AGE: Duration = Duration::from_millis(100);

/// Maps pages of a domain, and asks what they are.
#[derive(Debug)]
pub(super) struct Source {
    memory: Rc<ForeignMemory>,
    id: u32,
    types: MemTypes,
}

impl hyperbp_guest_page::Source for Source {
    type Mapping = Mapping;
    type Table = Mapping;
    type Error = Error;

    fn map(&mut self, gfn: Gfn) -> Result<Page, Error> {
        map(&self.memory, self.id, gfn)
    }

    fn is_ram(&mut self, gfn: Gfn) -> Result<bool, Error> {
        self.types.is_ram(gfn)
    }
}

/// No page is mapped yet.
pub(super) fn new(xc: &Interface, memory: &Rc<ForeignMemory>, id: u32) -> Result<Pages<Source>, Error> {
    let m2p = map_m2p(xc, memory);
    if let Err(error) = &m2p {
        log::warn!("no page of the guest can be kept mapped, each access maps it anew: {error}");
    }
    let mut info = sys::xc_physinfo_t::default();
    // SAFETY: the handle is open and `info` outlives the call.
    check("xc_physinfo", unsafe { sys::xc_physinfo(xc.raw(), &mut info) })?;
    let type_age = u64::from(info.cpu_khz) * TYPE_AGE.as_millis() as u64;
    let source = Source { memory: Rc::clone(memory), id, types: MemTypes::open(id)? };
    Ok(Pages::new(source, m2p.ok(), type_age))
}

impl Domain {
    #[inline(always)]
    pub(super) fn page(&mut self, gpa: Gpa, length: usize) -> Result<&Page, Error> {
        if usize::from(gpa.offset()) + length > PAGE_SIZE {
            return Err(Error::invalid("guest memory access", format!("{length} bytes at {gpa} are in two pages")));
        }
        if self.pages.wants_search() {
            self.search_frames()?;
        }
        self.pages.get(gpa.gfn())
    }

    /// Finds out which machine frames pages may have that were mapped once.
    #[cold]
    fn search_frames(&mut self) -> Result<(), Error> {
        // One virtual CPU waits for an answer to its event. Another could move frames meanwhile.
        let pause = self.vcpus > 1;
        if pause {
            self.pause()?;
        }
        self.pages.search();
        if pause { self.resume() } else { Ok(()) }
    }

    /// Writes what an instruction of the guest would, if its page is plain memory.
    #[inline(always)]
    pub(super) fn write_as_guest(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<bool, Error> {
        let now = self.now();
        if !self.pages.is_ram(gpa.gfn(), now)? {
            return Ok(false);
        }
        self.page(gpa, bytes.len())?.write(gpa.offset().into(), bytes);
        Ok(true)
    }

    /// To be called now and then: looks after what no event tells.
    pub(crate) fn look_around(&mut self) {
        let now = self.now();
        if now.wrapping_sub(self.looked_around) >= self.pages.type_age() {
            self.looked_around = now;
            let (xc, id) = (Rc::clone(&self.xc), self.id);
            self.pages.report_written(now, |_, gfn| {
                // SAFETY: the handle is open. Without log-dirty mode, it does nothing.
                unsafe { sys::xc_hvm_modified_memory(xc.raw(), id, gfn.0, 1) };
            });
        }
    }
}

/// Maps Xen's machine-to-physical table.
fn map_m2p(xc: &Interface, memory: &Rc<ForeignMemory>) -> Result<M2p<Mapping>, Error> {
    let mut count = 0;
    // SAFETY: the handle is open and `count` outlives the call.
    check("xc_maximum_ram_page", unsafe { sys::xc_maximum_ram_page(xc.raw(), &mut count) })?;
    let count = count as usize;
    let pages = count.div_ceil(ENTRIES_PER_PAGE);
    let mut extents = vec![0; pages.div_ceil(EXTENT_PAGES)];
    let call = "xc_machphys_mfn_list";
    // SAFETY: there is room for as many extents as is said.
    check(call, unsafe { sys::xc_machphys_mfn_list(xc.raw(), extents.len() as u64, extents.as_mut_ptr()) })?;
    let frames: Vec<u64> = (0..pages).map(|page| extents[page / EXTENT_PAGES] + (page % EXTENT_PAGES) as u64).collect();
    let mut errors = vec![0; pages];
    let call = "xenforeignmemory_map";
    // SAFETY: both arrays have as many elements as the call is told of; the handle is open.
    let address = unsafe {
        sys::xenforeignmemory_map(
            memory.0.as_ptr(),
            DOMID_XEN,
            libc::PROT_READ,
            pages,
            frames.as_ptr(),
            errors.as_mut_ptr(),
        )
    };
    let address: NonNull<c_void> = NonNull::new(address).ok_or_else(|| Error::last(call))?;
    let mapping = Mapping { address, pages, memory: Rc::clone(memory) };
    if let Some(error) = errors.iter().find(|error| **error != 0) {
        return Err(Error::of(call, io::Error::from_raw_os_error(error.abs())));
    }
    // SAFETY: all of its pages are mapped readable until the mapping is dropped.
    Ok(unsafe { M2p::new(address.cast(), count, mapping) })
}

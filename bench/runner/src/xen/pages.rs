//! Pages of the guest that are kept mapped, and how it is known that they still are the guest's.

use std::collections::HashMap;
use std::ffi::c_void;
use std::io;
use std::ptr::NonNull;
use std::rc::Rc;
use std::time::{Duration, Instant};

use hyperbp::{Gfn, Gpa, Hypervisor, PAGE_SIZE};
use hyperbp_guest_page::{Frames, M2p, PageCache};
use hyperbp_xen_sys as sys;

use super::handle::{ForeignMemory, Interface, MemTypes, map};
use super::{Domain, Error, Mapping, Page, check};

/// Entries of the table in one of its extents: 2 MiB (`XENMEM_machphys_mfn_list`).
const EXTENT_PAGES: usize = 512;
const ENTRIES_PER_PAGE: usize = PAGE_SIZE / size_of::<u64>();

/// The owner of Xen's own pages (xen/include/public/xen.h).
const DOMID_XEN: u32 = 0x7ff2;

/// Most gfns that are searched for at once.
const WANTED: usize = 64;
/// Most gfns whose candidates are remembered.
const KNOWN: usize = 1 << 16;

/// How long the type of a page is taken for what it was. Xen has no notice when a toolstack or a device model changes it.
const TYPE_AGE: Duration = Duration::from_millis(100);

/// What is mapped.
#[derive(Debug)]
pub(super) struct Pages {
    memory: Rc<ForeignMemory>,
    id: u32,
    cache: PageCache<Kept>,
    /// None if this dom0 cannot map it: then nothing is kept mapped.
    m2p: Option<M2p<Mapping>>,
    /// Our own frames. They stay mapped: what views show is the frame, whatever the guest has at its number.
    own: HashMap<Gfn, Page>,
    /// None of them is below.
    first_own: Gfn,
    /// The machine frames that gfns may have.
    known: HashMap<Gfn, Frames>,
    /// What is to be searched for.
    wanted: Vec<Gfn>,
    /// How long a search of the table takes: an estimate before the first.
    search_takes: Duration,
    /// How long mapping pages took since the last search whose candidates were not known.
    mapping_took: Duration,
    types: MemTypes,
    /// [`TYPE_AGE`], in ticks of the time-stamp counter.
    type_age: u64,
    /// Pages that were written to as the guest's instructions do, since their type was last looked at.
    written: Vec<Gfn>,
}

/// A page of the guest.
#[derive(Debug)]
struct Kept {
    page: Page,
    /// None are known: then the mapping is good for one access.
    frames: Frames,
    /// Whether it is plain memory, and when that was known.
    ram: Option<(bool, u64)>,
}

impl Pages {
    pub(super) fn new(xc: &Interface, memory: &Rc<ForeignMemory>, id: u32) -> Result<Self, Error> {
        let m2p = map_m2p(xc, memory);
        if let Err(error) = &m2p {
            log::warn!("no page of the guest can be kept mapped, each access maps it anew: {error}");
        }
        let mut info = sys::xc_physinfo_t::default();
        // SAFETY: the handle is open and `info` outlives the call.
        check("xc_physinfo", unsafe { sys::xc_physinfo(xc.raw(), &mut info) })?;
        let entries = m2p.as_ref().map_or(0, M2p::len);
        Ok(Self {
            memory: Rc::clone(memory),
            id,
            cache: PageCache::default(),
            m2p: m2p.ok(),
            own: HashMap::new(),
            first_own: Gfn(u64::MAX),
            known: HashMap::new(),
            wanted: Vec::new(),
            search_takes: Duration::from_nanos(entries as u64),
            mapping_took: Duration::ZERO,
            types: MemTypes::open(id)?,
            type_age: u64::from(info.cpu_khz) * TYPE_AGE.as_millis() as u64,
            written: Vec::new(),
        })
    }

    #[inline(always)]
    fn get(&mut self, gfn: Gfn) -> Result<&Page, Error> {
        if self.is_own(gfn) {
            return Ok(&self.own[&gfn]);
        }
        self.kept(gfn).map(|kept| &kept.page)
    }

    #[inline(always)]
    fn kept(&mut self, gfn: Gfn) -> Result<&mut Kept, Error> {
        let Self { memory, id, cache, m2p, known, wanted, mapping_took, .. } = self;
        let is_there = |kept: &Kept| m2p.as_ref().is_some_and(|m2p| m2p.is_at(&kept.frames, gfn));
        cache.get_if(gfn, is_there, || {
            // The candidates are of before, and none has moved: so what is mapped is one of them.
            let before = known.get(&gfn).copied();
            let start = Instant::now();
            let page = map(memory, *id, gfn)?;
            let frames = before.filter(|frames| m2p.as_ref().is_some_and(|m2p| m2p.is_at(frames, gfn)));
            if frames.is_none() {
                *mapping_took += start.elapsed();
                if wanted.len() < WANTED && !wanted.contains(&gfn) {
                    wanted.push(gfn);
                }
            }
            Ok(Kept { page, frames: frames.unwrap_or(Frames::NONE), ram: None })
        })
    }

    /// Whether the table is to be searched now: as soon as mapping pages again and again has taken as long as a search. So
    /// both together take at most twice what the better of them would have taken, whatever the guest does.
    #[inline(always)]
    fn wants_search(&self) -> bool {
        self.m2p.is_some() && !self.wanted.is_empty() && self.mapping_took >= self.search_takes
    }

    /// Searches the table. The domain does not run.
    fn search(&mut self) {
        let Some(m2p) = &self.m2p else { return };
        let start = Instant::now();
        if self.known.len() + self.wanted.len() > KNOWN {
            self.known.clear();
        }
        let found = m2p.find(&self.wanted);
        self.known.extend(self.wanted.drain(..).zip(found));
        (self.search_takes, self.mapping_took) = (start.elapsed(), Duration::ZERO);
    }

    /// Keeps a frame of ours mapped.
    pub(super) fn add_own(&mut self, gfn: Gfn) -> Result<(), Error> {
        self.own.insert(gfn, map(&self.memory, self.id, gfn)?);
        self.first_own = self.first_own.min(gfn);
        Ok(())
    }

    /// Whether a frame is one of ours.
    #[inline(always)]
    pub(super) fn is_own(&self, gfn: Gfn) -> bool {
        gfn >= self.first_own && self.own.contains_key(&gfn)
    }

    /// Unmaps a page that is about to go.
    pub(super) fn forget(&mut self, gfn: Gfn) {
        self.own.remove(&gfn);
        self.cache.forget(gfn);
    }

    /// Whether a page is plain memory: readable and writable, and nobody keeps a record of what is written to it.
    fn is_ram(&mut self, gfn: Gfn, now: u64) -> Result<bool, Error> {
        let age = self.type_age;
        let known = self.kept(gfn)?.ram;
        match known {
            Some((ram, at)) if now.wrapping_sub(at) < age => Ok(ram),
            _ => self.look_at_type(gfn, now),
        }
    }

    #[cold]
    fn look_at_type(&mut self, gfn: Gfn, now: u64) -> Result<bool, Error> {
        let ram = self.types.is_ram(gfn)?;
        self.kept(gfn)?.ram = Some((ram, now));
        if ram && !self.written.contains(&gfn) {
            self.written.push(gfn);
        }
        Ok(ram)
    }

    /// Looks whether pages that were written to are plain memory no more. If so, what was written is reported to Xen:
    /// log-dirty mode was switched on for a migration, and counted on nobody to write past it.
    pub(super) fn report_written(&mut self, xc: &Interface, now: u64) {
        for gfn in std::mem::take(&mut self.written) {
            let at = self.cache.peek(gfn).and_then(|kept| kept.ram).map(|(_, at)| at);
            if at.is_some_and(|at| now.wrapping_sub(at) < self.type_age) {
                self.written.push(gfn);
                continue;
            }
            if !matches!(self.types.is_ram(gfn), Ok(true)) {
                // SAFETY: the handle is open. Without log-dirty mode, it does nothing.
                unsafe { sys::xc_hvm_modified_memory(xc.raw(), self.id, gfn.0, 1) };
            }
        }
    }
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
        if now.wrapping_sub(self.looked_around) >= self.pages.type_age {
            self.looked_around = now;
            self.pages.report_written(&self.xc, now);
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

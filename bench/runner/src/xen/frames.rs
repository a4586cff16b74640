//! Looking through all of a domain's memory.

use std::ptr::NonNull;
use std::rc::Rc;

use hyperbp::{Gfn, PAGE_SIZE};
use hyperbp_guest_page::GuestPage;
use hyperbp_xen_sys as sys;

use super::{Domain, Error, Mapping};

/// Frames that are mapped at once.
const FRAMES: u64 = 1024;
/// Where memory begins after a hole: a superpage of 2 MiB. Domain builders lay it out so.
const STRIDE: u64 = 512;
/// A machine has its devices in the last of the first 4 GiB, and what memory would be there comes after them.
const HOLE: u64 = (4 << 30) / PAGE_SIZE as u64;

impl Domain {
    /// Shows the start of each page of memory. A guest can have frames at any number, but is looked for only where a guest of its
    /// size has memory.
    ///
    /// # Errors
    /// If Xen does not tell where that is, or cannot map any memory at all.
    pub(crate) fn look_at_pages<const N: usize>(&self, look: &mut dyn FnMut(Gfn, &[u8; N])) -> Result<(), Error> {
        let (pages, _) = self.memory()?;
        let end = (self.maximum_gfn()? + 1).min(pages.saturating_add(HOLE));
        let (mut first, mut in_hole) = (0, false);
        while first < end {
            // Most of what is not memory is one hole, and mapping nothing takes as long as mapping something.
            if in_hole && self.each_mapped(&[first], &mut |_, _| {})? == 0 {
                first += STRIDE;
                continue;
            }
            let frames: Vec<u64> = (first..end.min(first + FRAMES)).collect();
            let mut start = [0; N];
            let found = self.each_mapped(&frames, &mut |gfn, page| {
                page.read(0, &mut start);
                look(gfn, &start);
            })?;
            in_hole = found == 0;
            first += FRAMES;
        }
        Ok(())
    }

    /// Maps frames together, and shows those that are memory. Returns how many.
    fn each_mapped(&self, frames: &[u64], show: &mut dyn FnMut(Gfn, &GuestPage<&Mapping>)) -> Result<usize, Error> {
        let mut errors = vec![0; frames.len()];
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: both arrays have as many elements as the call is told of; the handle is open.
        let address = unsafe {
            sys::xenforeignmemory_map(
                self.memory.0.as_ptr(),
                self.id,
                protection,
                frames.len(),
                frames.as_ptr(),
                errors.as_mut_ptr(),
            )
        };
        let Some(address) = NonNull::new(address) else {
            let error = Error::last("xenforeignmemory_map");
            // None of them is memory: there are holes of this size.
            return if error.is_no_memory() { Ok(0) } else { Err(error) };
        };
        let mapping = Mapping { address, pages: frames.len(), memory: Rc::clone(&self.memory) };
        for (n, (frame, _)) in frames.iter().zip(&errors).enumerate().filter(|(_, (_, error))| **error == 0) {
            // SAFETY: the mapping has a page for each frame.
            let page = unsafe { mapping.address.byte_add(n * PAGE_SIZE) };
            // SAFETY: without an error, it is mapped readable and writable until the mapping is dropped, which the page
            // refers to; nobody else knows of it.
            let page = unsafe { GuestPage::new(page.cast(), &mapping) };
            show(Gfn(*frame), &page);
        }
        Ok(errors.iter().filter(|error| **error == 0).count())
    }

    /// The highest number of a frame that the domain has had.
    pub(super) fn maximum_gfn(&self) -> Result<u64, Error> {
        let mut last = 0;
        // SAFETY: the handle is open and `last` outlives the call.
        super::check("xc_domain_maximum_gpfn", unsafe {
            sys::xc_domain_maximum_gpfn(self.xc.raw(), self.id, &mut last)
        })?;
        Ok(last)
    }
}

//! A domain's memory: its pages, its limit, and the frames that are added for shadow pages.

use hyperbp::ledger::{Limits, Note};
use hyperbp::{Gfn, PAGE_SIZE};
use hyperbp_xen_sys as sys;

use super::handle::{GETINFO, info};
use super::store::most_memory;
use super::{Domain, Error, check};

/// Guest frames for shadow pages: in the hole below 4 GiB, under the I/O APIC. A PVH guest has nothing there.
pub(crate) const SHADOW_FIRST: u64 = 0xf_0000;
const SHADOW_END: u64 = 0xf_c000;

/// More memory than a domain will have, in KiB: no limit while shadow pages exist.
const NO_LIMIT: u64 = (u32::MAX >> 4) as u64;

/// `XEN_X86_EMU_LAPIC`, xen/include/public/arch-x86/xen.h: the only device of a PVH domain.
const LAPIC: u32 = 1;

impl Domain {
    /// Its pages, and its memory limit in KiB.
    ///
    /// # Errors
    /// If Xen does not answer.
    pub(crate) fn memory(&self) -> Result<(u64, u64), Error> {
        let info = info(&self.xc, self.id)?;
        let info = info.ok_or_else(|| Error::invalid(GETINFO, "the domain is gone".to_owned()))?;
        Ok((info.0.tot_pages, info.memory_limit()))
    }

    /// What it has, as far as that limits what a ledger of it can say.
    ///
    /// # Errors
    /// If Xen does not answer.
    pub(crate) fn limits(&self) -> Result<Limits, Error> {
        let info = info(&self.xc, self.id)?;
        let info = info.ok_or_else(|| Error::invalid(GETINFO, "the domain is gone".to_owned()))?;
        let most = most_memory(self.id)?.map_or(0, |kib| kib / (PAGE_SIZE as u64 / 1024));
        Ok(Limits {
            last: Gfn(self.last_gfn()?),
            // Without the toolstack's note, what it has now, with ours in it, is as much as is known.
            most: if most == 0 { info.0.tot_pages } else { most },
            has_devices: info.0.arch_config.emulation_flags & !LAPIC != 0,
        })
    }

    pub(crate) fn set_memory_limit(&self, kib: u64) -> Result<(), Error> {
        // SAFETY: the handle is open.
        check("xc_domain_setmaxmem", unsafe { sys::xc_domain_setmaxmem(self.xc.raw(), self.id, kib) })
    }

    /// Puts the limit back that made no room for shadow pages.
    pub(super) fn limit_memory(&mut self) -> Result<(), Error> {
        if self.shadow_base.is_some() {
            self.set_memory_limit(self.memory_limit)?;
            self.shadow_base = None;
            if let Some(ledger) = &self.ledger {
                ledger.note_memory_limit(None);
            }
        }
        Ok(())
    }

    /// The lowest frame number for a shadow page.
    fn shadow_base(&mut self) -> Result<u64, Error> {
        if let Some(base) = self.shadow_base {
            return Ok(base);
        }
        let last = self.last_gfn()?;
        if let Some(ledger) = &self.ledger {
            ledger.note_memory_limit(Some(self.memory_limit));
        }
        self.set_memory_limit(NO_LIMIT)?;
        Ok(*self.shadow_base.insert((last + 1).min(SHADOW_FIRST)))
    }

    /// Takes a page that this process, or one before it, has added to the domain away.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn release(&mut self, gfn: Gfn) -> Result<(), Error> {
        // A mapping would keep the page with the domain.
        self.pages.forget(gfn);
        let mut frame = gfn.0;
        // SAFETY: the handle is open, and the one extent outlives the call.
        let result = unsafe { sys::xc_domain_decrease_reservation_exact(self.xc.raw(), self.id, 1, 0, &mut frame) };
        check("xc_domain_decrease_reservation_exact", result)?;
        self.erase(Note::Frame(gfn));
        Ok(())
    }

    pub(super) fn add_frame(&mut self) -> Result<Gfn, Error> {
        let call = "xc_domain_populate_physmap_exact";
        let base = self.shadow_base()?;
        let mut frame = (base..SHADOW_END)
            .find(|frame| !self.shadows.contains(&Gfn(*frame)))
            .ok_or_else(|| Error::invalid(call, "no guest frame is left for a shadow page".to_owned()))?;
        let gfn = Gfn(frame);
        self.note(Note::Frame(gfn))?;
        // SAFETY: the handle is open, and the one extent outlives the call.
        let result = unsafe { sys::xc_domain_populate_physmap_exact(self.xc.raw(), self.id, 1, 0, 0, &mut frame) };
        check(call, result).inspect_err(|_| self.erase(Note::Frame(gfn)))?;
        self.shadows.push(gfn);
        self.pages.add_own(gfn)?;
        Ok(gfn)
    }

    pub(super) fn drop_frame(&mut self, gfn: Gfn) -> Result<(), Error> {
        let Some(at) = self.shadows.iter().position(|shadow| *shadow == gfn) else {
            return Err(Error::invalid("drop_shadow_gfn", format!("{gfn} is no shadow page")));
        };
        self.release(gfn)?;
        self.shadows.swap_remove(at);
        if self.shadows.is_empty() { self.limit_memory() } else { Ok(()) }
    }
}

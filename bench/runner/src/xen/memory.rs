//! A domain's memory: its pages, its limit, and the frames that are added for shadow pages.

use hyperbp::Gfn;
use hyperbp::ledger::{Limits, MemoryLimit, Note};
use hyperbp_xen_domain::{Frames, GuestMemory, PAGE_KIB, Usage};
use hyperbp_xen_sys as sys;

use super::handle::{GETINFO, info};
use super::store::most_memory;
use super::{Domain, Error, check};

const POPULATE: &str = "xc_domain_populate_physmap_exact";

/// `XEN_X86_EMU_LAPIC`, xen/include/public/arch-x86/xen.h: the only device of a PVH domain.
const LAPIC: u32 = 1;

impl Domain {
    /// Its pages, and its memory limit in KiB.
    ///
    /// # Errors
    /// If Xen does not answer.
    pub(crate) fn memory(&self) -> Result<(u64, u64), Error> {
        let Usage { pages, limit } = self.usage()?;
        Ok((pages, limit.saturating_mul(PAGE_KIB)))
    }

    /// What it has, as far as that limits what a ledger of it can say.
    ///
    /// # Errors
    /// If Xen does not answer.
    pub(crate) fn limits(&self) -> Result<Limits, Error> {
        let info = info(&self.xc, self.id)?;
        let info = info.ok_or_else(|| Error::invalid(GETINFO, "the domain is gone".to_owned()))?;
        let most = most_memory(self.id)?.map_or(0, |kib| kib / PAGE_KIB);
        Ok(Limits {
            last: Gfn(self.maximum_gfn()?),
            // Without the toolstack's note, what it has now, with ours in it, is as much as is known.
            most: if most == 0 { info.0.tot_pages } else { most },
            has_devices: info.0.arch_config.emulation_flags & !LAPIC != 0,
        })
    }

    pub(crate) fn set_memory_limit(&self, kib: u64) -> Result<(), Error> {
        // SAFETY: the handle is open.
        check("xc_domain_setmaxmem", unsafe { sys::xc_domain_setmaxmem(self.xc.raw(), self.id, kib) })
    }

    /// Where the first shadow page would be, if one was added now.
    ///
    /// # Errors
    /// If there is no room for one, or Xen does not answer.
    pub(crate) fn first_shadow_gfn(&self) -> Result<Gfn, Error> {
        Frames::first(self)
    }

    /// Gives the domain RAM, as its balloon would.
    ///
    /// # Errors
    /// If there is none left.
    pub(crate) fn add_ram(&mut self, gfn: Gfn) -> Result<(), Error> {
        self.populate(gfn)
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

    pub(super) fn allocate_gfn(&mut self) -> Result<Gfn, Error> {
        let gfn = self.with_frames(Frames::allocate)?;
        self.pages.add_own(gfn)?;
        Ok(gfn)
    }

    /// Adds a page of ours again, if the guest has given it back.
    pub(super) fn restore_gfn(&mut self, gfn: Gfn) -> Result<bool, Error> {
        if !self.is_unused(gfn)? {
            return Ok(false);
        }
        log::debug!("the guest has given back the shadow page at {gfn}: it gets another one");
        // The old one is still mapped, and goes with that.
        self.pages.forget(gfn);
        self.erase(Note::Frame(gfn));
        self.populate(gfn)?;
        self.pages.add_own(gfn)?;
        Ok(true)
    }

    pub(super) fn free_gfn(&mut self, gfn: Gfn) -> Result<(), Error> {
        self.with_frames(|frames, domain| frames.release(domain, gfn))
    }

    fn with_frames<T>(&mut self, work: impl FnOnce(&mut Frames, &mut Self) -> T) -> T {
        let mut frames = std::mem::take(&mut self.frames);
        let done = work(&mut frames, self);
        self.frames = frames;
        done
    }

    /// How much memory the domain's page tables may take, in MiB, for a message.
    fn page_table_memory(&self) -> String {
        let mut bytes = 0;
        // SAFETY: the handle is open, and `bytes` outlives the call.
        match unsafe { sys::xc_get_paging_mempool_size(self.xc.raw(), self.id, &mut bytes) } {
            0 => format!("{} MiB", bytes >> 20),
            _ => "an amount that Xen does not tell".to_owned(),
        }
    }

    /// Says of a failure for want of memory for page tables what it is, and what to do.
    pub(super) fn about_page_tables(&self, error: Error) -> Error {
        if error.is(libc::ENOMEM) { self.page_tables_full(error.call()) } else { error }
    }

    fn page_tables_full(&self, call: &'static str) -> Error {
        let has = self.page_table_memory();
        let problem = format!(
            "the memory for the page tables of domain {} is full: it has {has}; put shadow_memory=MiB with more into its \
             configuration",
            self.id
        );
        Error::invalid(call, problem)
    }
}

impl GuestMemory for Domain {
    type Error = Error;

    fn usage(&self) -> Result<Usage, Error> {
        let info = info(&self.xc, self.id)?;
        let info = info.ok_or_else(|| Error::invalid(GETINFO, "the domain is gone".to_owned()))?;
        Ok(Usage { pages: info.0.tot_pages, limit: info.0.max_pages })
    }

    fn last_gfn(&self) -> Result<u64, Error> {
        self.maximum_gfn()
    }

    fn most(&self) -> Result<u64, Error> {
        Ok(self.limits()?.most)
    }

    fn is_unused(&self, gfn: Gfn) -> Result<bool, Error> {
        // Above all that there has ever been there is nothing, and Xen tells no more about it.
        if gfn.0 > self.maximum_gfn()? {
            return Ok(true);
        }
        // RAM of any kind, and grants. Populate on demand, too, which has no page yet.
        if self.mem_types.get(gfn)? != sys::HVMMEM_mmio_dm {
            return Ok(false);
        }
        let mut access = 0;
        // SAFETY: the handle is open, and `access` outlives the call.
        let result = unsafe { sys::xc_get_mem_access(self.xc.raw(), self.id, gfn.0, &mut access) };
        match check("xc_get_mem_access", result) {
            // A device's own memory, or another domain's.
            Ok(()) => Ok(false),
            // Nothing is mapped.
            Err(error) if error.is(libc::ESRCH) => Ok(true),
            // Without a ring Xen does not tell. Nor does it let any right be changed, so nothing is added.
            Err(error) if error.is(libc::ENODEV) => Ok(true),
            Err(error) => Err(error),
        }
    }

    fn raise_limit(&mut self, found: u64, limit: u64) -> Result<(), Error> {
        let [found, raised] = [found, limit].map(|pages| pages.saturating_mul(PAGE_KIB));
        if let Some(ledger) = &self.ledger {
            ledger.note_memory_limit(Some(MemoryLimit { found, raised }));
        }
        self.set_memory_limit(raised)
    }

    fn restore_limit(&mut self, found: Option<u64>) -> Result<(), Error> {
        match found {
            Some(pages) => self.set_memory_limit(pages.saturating_mul(PAGE_KIB))?,
            None => log::info!("the memory limit of domain {} is another's by now, and stays", self.id),
        }
        if let Some(ledger) = &self.ledger {
            ledger.note_memory_limit(None);
        }
        Ok(())
    }

    fn populate(&mut self, gfn: Gfn) -> Result<(), Error> {
        // Noted only when it is certain that nothing of the guest's is there: whoever recovers frees it.
        self.note(Note::Frame(gfn))?;
        let mut frame = gfn.0;
        // SAFETY: the handle is open, and the one extent outlives the call.
        let result = unsafe { sys::xc_domain_populate_physmap_exact(self.xc.raw(), self.id, 1, 0, 0, &mut frame) };
        check(POPULATE, result).inspect_err(|_| self.erase(Note::Frame(gfn)))
    }

    fn depopulate(&mut self, gfn: Gfn) -> Result<(), Error> {
        let released = self.release(gfn);
        // Whoever may make hypercalls in the guest can have given it back.
        if released.is_err() && self.is_unused(gfn)? {
            log::warn!("the shadow page at {gfn} was taken away by somebody else");
            self.erase(Note::Frame(gfn));
            return Ok(());
        }
        released
    }

    /// libxenctrl says `EBUSY` whatever the reason is.
    fn explain(&self, error: Error, before: Usage) -> Error {
        let Ok(now) = self.usage() else { return error };
        if now.pages > before.pages {
            // It has got the page, but not its mapping.
            return self.page_tables_full(POPULATE);
        }
        let problem = if now.pages >= now.limit {
            format!(
                "domain {} has no room for a page more: it has reached its memory limit, {} KiB, though room was made; \
                 somebody else changes it, too",
                self.id,
                now.limit.saturating_mul(PAGE_KIB)
            )
        } else {
            let Ok(free) = self.host_free_kib() else { return error };
            format!(
                "the host has no memory left for a page more ({free} KiB are free): shut a domain down, or give dom0 less \
                 (`xl mem-set 0`)"
            )
        };
        Error::invalid(POPULATE, problem)
    }
}

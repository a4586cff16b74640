//! What a connection to a hypervisor must be able to do.

use crate::{Gfn, Gpa, VcpuId, ViewId};

/// What a view permits on a page.
///
/// This enum is exhaustive: a connection must set exactly what it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rights {
    /// Everything: the page is not watched.
    All,
    /// Execution alone: reads and writes are events. (EPT knows no read-only-trap, so this is the guard of a page.)
    Execute,
    /// Reads and writes alone.
    ReadWrite,
    /// Everything but writes.
    ReadExecute,
    /// Reads alone.
    Read,
    /// Nothing.
    None,
}

/// A connection to one domain.
///
/// The engine calls it while it handles an event, so that virtual CPU is paused; the others run unless
/// [`pause`](Self::pause) was called. Memory addresses are guest-physical and go to the guest's own pages (the host
/// view), whatever view a virtual CPU is in. Single-step monitoring must be on for the whole life of the connection:
/// without it Xen never ends a fast single-step (`hvm_monitor_debug`, xen/arch/x86/hvm/monitor.c).
pub trait Hypervisor {
    /// Why a call failed.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Virtual CPUs of the domain.
    fn vcpus(&self) -> u16;

    /// Reads guest memory: what a virtual CPU would read at this moment, also if the guest has put another page there
    /// since the last access. The range lies within one page.
    ///
    /// # Errors
    /// If there is no such page.
    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), Self::Error>;

    /// Reads eight bytes of guest memory, at a multiple of eight, the lowest first: an entry of a page table.
    ///
    /// # Errors
    /// Those of [`read`](Self::read).
    fn read_word(&mut self, gpa: Gpa) -> Result<u64, Self::Error> {
        let mut bytes = [0; 8];
        self.read(gpa, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes guest memory, whatever a view permits. The range lies within one page.
    ///
    /// # Errors
    /// If there is no such page, or it cannot be written.
    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Writes what an instruction of the guest would write, if the page is plain memory: readable, writable, and nobody
    /// keeps a record of what is written to it. A write to anything else is the hypervisor's to make: a ROM discards it, and
    /// a migration must know of it (log-dirty mode). False if nothing is written; then the instruction is stepped, or
    /// emulated by the hypervisor. So is every instruction that writes, where this is not implemented.
    ///
    /// # Errors
    /// Those of [`write`](Self::write).
    fn write_ram(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<bool, Self::Error> {
        let _ = (gpa, bytes);
        Ok(false)
    }

    /// Writes 0xCC over a byte of the guest's own page, `original` being what the guest has there. Whoever can should
    /// note it where it outlives this process first, so that the guest can be repaired if this process is killed.
    ///
    /// # Errors
    /// Those of [`write`](Self::write).
    fn displace(&mut self, gpa: Gpa, original: u8) -> Result<(), Self::Error> {
        let _ = original;
        self.write(gpa, &[0xcc])
    }

    /// Undoes a [`displace`](Self::displace).
    ///
    /// # Errors
    /// Those of [`write`](Self::write).
    fn replace(&mut self, gpa: Gpa, original: u8) -> Result<(), Self::Error> {
        self.write(gpa, &[original])
    }

    /// The time, from any start and in any unit, for figures of how long handling takes.
    fn now(&self) -> u64;

    /// Adds a page of memory to the domain, at a frame number the guest does not use.
    ///
    /// # Errors
    /// If there is no memory or no room left.
    fn add_shadow_gfn(&mut self) -> Result<Gfn, Self::Error>;

    /// Adds the page at such a frame number once more, if the guest has given it back. Whether it had: then the new page has no
    /// particular contents. Does nothing where that is not known: then breakpoints in the page that it was for are gone.
    ///
    /// # Errors
    /// If there is no memory or no room left.
    fn restore_shadow_gfn(&mut self, gfn: Gfn) -> Result<bool, Self::Error> {
        let _ = gfn;
        Ok(false)
    }

    /// Takes such a page away again.
    ///
    /// # Errors
    /// If it was not one.
    fn drop_shadow_gfn(&mut self, gfn: Gfn) -> Result<(), Self::Error>;

    /// Makes a view in which everything is as in the host view.
    ///
    /// # Errors
    /// If the domain has no altp2m, or no view is left (Xen has 10, `MAX_ALTP2M`).
    fn create_view(&mut self) -> Result<ViewId, Self::Error>;

    /// Switches all virtual CPUs to a view.
    ///
    /// # Errors
    /// If there is no such view.
    fn switch_view(&mut self, view: ViewId) -> Result<(), Self::Error>;

    /// Drops a view that no virtual CPU is in.
    ///
    /// # Errors
    /// If there is no such view, or a virtual CPU is in it.
    fn drop_view(&mut self, view: ViewId) -> Result<(), Self::Error>;

    /// Lets `gfn` show the page of `to` in a view, or its own again. The rights there are unspecified afterwards.
    ///
    /// # Errors
    /// If the view or a page does not exist.
    fn remap(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> Result<(), Self::Error>;

    /// Sets what a view permits on a page.
    ///
    /// # Errors
    /// If the view or the page does not exist.
    fn set_rights(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> Result<(), Self::Error>;

    /// What a view permits on a page. None if that is not known, as everywhere where this is not implemented.
    ///
    /// # Errors
    /// If the view does not exist.
    fn rights(&mut self, view: ViewId, gfn: Gfn) -> Result<Option<Rights>, Self::Error> {
        let _ = (view, gfn);
        Ok(None)
    }

    /// Sets what the host view permits on every page that the guest gets, or moves, from now on. (What is there already is
    /// as it was.) So the engine is told when a page is executed that has come in place of another. Does nothing where that
    /// is not known: then breakpoints in such a page are gone.
    ///
    /// # Errors
    /// If the hypervisor refuses.
    fn set_default_rights(&mut self, rights: Rights) -> Result<(), Self::Error> {
        let _ = rights;
        Ok(())
    }

    /// The instruction pointer of a virtual CPU. What a reply says counts only when it has gone on: until then it is that
    /// of the event.
    ///
    /// # Errors
    /// If there is no such virtual CPU.
    fn rip(&mut self, vcpu: VcpuId) -> Result<u64, Self::Error>;

    /// DR7 as a virtual CPU that waits has it now, or `None` if the hypervisor cannot tell. What an event says of DR7 may be
    /// older ([`Registers::dr7`](crate::Registers::dr7)).
    ///
    /// Called at a hit, and at an access to a guarded page, when memory is about to be accessed without the CPU. With
    /// `None`, or an error, the instruction is stepped: then the CPU makes the access, and the guest's data breakpoints
    /// work.
    ///
    /// # Errors
    /// If there is no such virtual CPU.
    fn debug_control(&mut self, vcpu: VcpuId) -> Result<Option<u64>, Self::Error> {
        let _ = vcpu;
        Ok(None)
    }

    /// Ends any single-step of a virtual CPU, fast or not, without an event.
    ///
    /// # Errors
    /// If there is no such virtual CPU.
    fn stop_step(&mut self, vcpu: VcpuId) -> Result<(), Self::Error>;

    /// Pauses the domain. Calls nest.
    ///
    /// # Errors
    /// If the domain is gone.
    fn pause(&mut self) -> Result<(), Self::Error>;

    /// Undoes one [`pause`](Self::pause).
    ///
    /// # Errors
    /// If the domain is gone.
    fn resume(&mut self) -> Result<(), Self::Error>;
}

//! A machine that is memory alone: what a hypervisor does costs next to nothing here, and what is left is the core.

use std::cell::Cell;
use std::convert::Infallible;
use std::hint::black_box;

use hyperbp::{Gfn, Gpa, Hypervisor, PAGE_SIZE, Rights, VcpuId, ViewId};

/// Frames of memory. The upper half is for shadow pages.
pub(crate) const FRAMES: u64 = 8192;
/// Four levels of page tables, one page each.
pub(crate) const TABLES: Gfn = Gfn(0x10);
/// Where memory is mapped: the beginning of the upper half, as in a kernel.
pub(crate) const BASE: u64 = 0xffff_8000_0000_0000;

/// An entry of a page table: present, writable, accessed, dirty.
const ENTRY: u64 = 0x63;
/// The same of a 2-MiB page.
const LARGE: u64 = ENTRY | 1 << 7;

/// The machine. None of what the core calls is inlined into it, so that callgrind can tell the two apart.
#[derive(Debug)]
pub(crate) struct Machine {
    memory: Vec<u8>,
    /// Frames that a shadow page has been and is no more.
    vacant: Vec<Gfn>,
    next_frame: u64,
    views: u16,
    clock: Cell<u64>,
}

impl Machine {
    /// Memory full of `nop`, mapped at [`BASE`]: the first 2 MiB by 4-KiB pages, as stacks are, the rest by large ones.
    pub(crate) fn new() -> Self {
        let memory = vec![0x90; FRAMES as usize * PAGE_SIZE];
        let vacant = Vec::with_capacity(FRAMES as usize);
        let mut machine = Self { memory, vacant, next_frame: FRAMES / 2, views: 0, clock: Cell::new(0) };
        let table = |level| Gfn(TABLES.0 + level);
        for level in 0..4 {
            machine.page(table(level)).fill(0);
        }
        machine.entry(table(0), 256, table(1).at(0).0 | ENTRY);
        machine.entry(table(1), 0, table(2).at(0).0 | ENTRY);
        machine.entry(table(2), 0, table(3).at(0).0 | ENTRY);
        for n in 1..512 {
            machine.entry(table(2), n, n << 21 | LARGE);
        }
        for n in 0..512 {
            machine.entry(table(3), n, n << 12 | ENTRY);
        }
        machine
    }

    pub(crate) fn page(&mut self, gfn: Gfn) -> &mut [u8] {
        &mut self.memory[gfn.0 as usize * PAGE_SIZE..][..PAGE_SIZE]
    }

    fn entry(&mut self, table: Gfn, n: u64, entry: u64) {
        self.page(table)[n as usize * 8..][..8].copy_from_slice(&entry.to_le_bytes());
    }
}

impl Hypervisor for Machine {
    type Error = Infallible;

    #[inline(never)]
    fn vcpus(&self) -> u16 {
        1
    }

    #[inline(never)]
    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), Infallible> {
        into.copy_from_slice(&self.memory[gpa.0 as usize..][..into.len()]);
        Ok(())
    }

    #[inline(never)]
    fn read_word(&mut self, gpa: Gpa) -> Result<u64, Infallible> {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.memory[gpa.0 as usize..][..8]);
        Ok(u64::from_le_bytes(bytes))
    }

    #[inline(never)]
    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), Infallible> {
        self.memory[gpa.0 as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn write_ram(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<bool, Infallible> {
        self.write(gpa, bytes).map(|()| true)
    }

    #[inline(never)]
    fn now(&self) -> u64 {
        // As many nanoseconds as handling an event takes, about.
        self.clock.set(self.clock.get() + 200);
        self.clock.get()
    }

    #[inline(never)]
    fn add_shadow_gfn(&mut self) -> Result<Gfn, Infallible> {
        Ok(self.vacant.pop().unwrap_or_else(|| {
            self.next_frame += 1;
            Gfn(self.next_frame)
        }))
    }

    #[inline(never)]
    fn drop_shadow_gfn(&mut self, gfn: Gfn) -> Result<(), Infallible> {
        self.vacant.push(gfn);
        Ok(())
    }

    #[inline(never)]
    fn create_view(&mut self) -> Result<ViewId, Infallible> {
        self.views += 1;
        Ok(ViewId(self.views))
    }

    #[inline(never)]
    fn switch_view(&mut self, view: ViewId) -> Result<(), Infallible> {
        black_box(view);
        Ok(())
    }

    #[inline(never)]
    fn drop_view(&mut self, view: ViewId) -> Result<(), Infallible> {
        black_box(view);
        Ok(())
    }

    #[inline(never)]
    fn remap(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> Result<(), Infallible> {
        black_box((view, gfn, to));
        Ok(())
    }

    #[inline(never)]
    fn set_rights(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> Result<(), Infallible> {
        black_box((view, gfn, rights));
        Ok(())
    }

    #[inline(never)]
    fn rip(&mut self, _: VcpuId) -> Result<u64, Infallible> {
        // It runs nothing: it is elsewhere.
        Ok(0)
    }

    #[inline(never)]
    fn debug_control(&mut self, vcpu: VcpuId) -> Result<Option<u64>, Infallible> {
        // All breakpoints of the guest's own are off.
        black_box(vcpu);
        Ok(Some(0x400))
    }

    #[inline(never)]
    fn stop_step(&mut self, vcpu: VcpuId) -> Result<(), Infallible> {
        black_box(vcpu);
        Ok(())
    }

    #[inline(never)]
    fn pause(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    #[inline(never)]
    fn resume(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

//! The machine, and the hypervisor in it: frames, views, virtual CPUs that run, wait and are answered.
//!
//! Where it matters to a breakpoint it follows Xen 4.17; the functions meant are named.

use std::collections::{BTreeMap, HashSet};
use std::rc::Rc;

use hyperbp::{
    Access, Accesses, Action, CodeMode, Event, Gfn, Gpa, INSTRUCTION_BYTES, Int3, PAGE_SIZE, ReadData, Reason,
    Registers, Reply, Rights, Step, VcpuId, ViewId,
};

use crate::cpu::{self, Bus, PF, Stop, UD, is_canonical};

const INT3: u8 = 0xcc;
/// Debug and breakpoint exceptions.
const DB: u8 = 1;
const BP: u8 = 3;
/// RFLAGS.RF.
const RF: u64 = 1 << 16;
/// Where frames for shadows are looked for, from here on upwards.
pub(crate) const SHADOWS: u64 = 0x100;
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// A page of memory.
pub(crate) type Page = Box<[u8; PAGE_SIZE]>;

/// What a frame number stands for: which page, and what is permitted there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    page: usize,
    rights: Rights,
}

/// A second-level translation, where it differs from the host's.
#[derive(Clone, Debug, Default)]
struct View {
    entries: BTreeMap<Gfn, Entry>,
    /// The frames it has remapped others to lie between these.
    remapped: Option<(Gfn, Gfn)>,
}

/// A virtual CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Vcpu {
    pub(crate) registers: Registers,
    pub(crate) view: ViewId,
    /// A monitored single-step is on.
    pub(crate) stepping: bool,
    /// A fast single-step is on, and ends in this view.
    pub(crate) fast: Option<ViewId>,
    /// It waits for the answer to this.
    pub(crate) waiting: Option<Event>,
    /// A view has let go of a page since it was last answered (`mapcache_invalidate`): the next answer's registers and
    /// emulation will not be carried out when it goes on, but at some later time.
    unmapped: bool,
    /// Where it was when it was answered with what is done only when it goes on: it has not gone on yet.
    held: Option<u64>,
    /// DR7 as events have it: what it was when the virtual CPU last waited (`vmx_save_dr`).
    saved_dr7: u64,
    /// An exception whose delivery was denied something: the CPU delivers it before it does anything else
    /// (`vmx_idtv_reinject`). A software interrupt is not delivered again: its instruction is executed again.
    delivering: Option<u8>,
    /// Exceptions that were delivered to it, and the last one: which, and where.
    pub(crate) exceptions: u64,
    pub(crate) last_exception: Option<(u8, u64)>,
}

/// What has become of a virtual CPU that was let run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ran {
    /// One instruction is through, or has raised an exception that was delivered.
    Through,
    /// It waits for an answer.
    Waits,
}

/// Through which translation memory is accessed, and for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Through {
    /// The virtual CPU's, in this view.
    View(ViewId),
    /// The hypervisor's emulator: the host's, whatever is permitted.
    Emulator,
}

/// What memory is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Intent {
    Read,
    Write,
    ReadWrite,
    Fetch,
}

#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pages: BTreeMap<usize, Page>,
    next_page: usize,
    host: BTreeMap<Gfn, Entry>,
    views: BTreeMap<ViewId, View>,
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) pauses: u32,
    /// INT3s and denied accesses are reported, not delivered.
    pub(crate) monitored: bool,
    /// Where instructions begin. Anything else is no code: RIP may get there, and faults.
    starts: Rc<HashSet<u64>>,
    /// Where exceptions are handled, for each virtual CPU.
    handlers: Vec<u64>,
    tables: Tables,
}

/// What the CPU reads and writes for itself when it delivers an exception, by linear address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tables {
    /// The gates, of 16 bytes each.
    pub(crate) gates: u64,
    /// Where the stack begins of the first virtual CPU, and how far from it those of the others.
    pub(crate) stack: u64,
    pub(crate) next_stack: u64,
}

impl Machine {
    pub(crate) fn new(
        memory: BTreeMap<Gfn, Page>,
        starts: Rc<HashSet<u64>>,
        registers: &[Registers],
        handlers: Vec<u64>,
        tables: Tables,
    ) -> Self {
        let vcpu = |registers: &Registers| Vcpu {
            registers: *registers,
            view: ViewId::HOST,
            stepping: false,
            fast: None,
            waiting: None,
            unmapped: false,
            held: None,
            saved_dr7: 0,
            delivering: None,
            exceptions: 0,
            last_exception: None,
        };
        let mut machine = Self {
            pages: BTreeMap::new(),
            next_page: 0,
            host: BTreeMap::new(),
            views: BTreeMap::new(),
            vcpus: registers.iter().map(vcpu).collect(),
            pauses: 0,
            monitored: false,
            starts,
            handlers,
            tables,
        };
        memory.into_iter().for_each(|(gfn, page)| machine.add(gfn, page));
        machine
    }

    fn add(&mut self, gfn: Gfn, page: Page) {
        self.pages.insert(self.next_page, page);
        self.host.insert(gfn, Entry { page: self.next_page, rights: Rights::All });
        self.next_page += 1;
    }

    /// What a view shows at a frame number; `None` if there is no memory.
    fn entry(&self, view: ViewId, gfn: Gfn) -> Option<Entry> {
        let own = self.views.get(&view).and_then(|view| view.entries.get(&gfn));
        own.or_else(|| self.host.get(&gfn)).copied()
    }

    fn find(&self, through: Through, gfn: Gfn) -> Option<Entry> {
        match through {
            Through::View(view) => self.entry(view, gfn),
            Through::Emulator => self.host.get(&gfn).copied(),
        }
    }

    /// A page, as the host has it.
    pub(crate) fn page(&self, gfn: Gfn) -> Option<&[u8; PAGE_SIZE]> {
        self.host.get(&gfn).map(|entry| &*self.pages[&entry.page])
    }

    pub(crate) fn page_mut(&mut self, gfn: Gfn) -> Option<&mut Page> {
        let entry = self.host.get(&gfn)?;
        self.pages.get_mut(&entry.page)
    }

    /// What somebody in a view sees at a frame number, and may do there.
    pub(crate) fn shown(&self, view: ViewId, gfn: Gfn) -> Option<(&[u8; PAGE_SIZE], Rights)> {
        self.entry(view, gfn).map(|entry| (&*self.pages[&entry.page], entry.rights))
    }

    /// The frame numbers that have memory.
    pub(crate) fn frames(&self) -> impl Iterator<Item = Gfn> {
        self.host.keys().copied()
    }

    /// Whether nothing of a monitor is left, memory aside.
    pub(crate) fn is_untouched(&self) -> bool {
        let free = |vcpu: &Vcpu| vcpu.view == ViewId::HOST && !vcpu.stepping && vcpu.fast.is_none();
        self.views.is_empty()
            && self.pauses == 0
            && self.host.values().all(|entry| entry.rights == Rights::All)
            && self.vcpus.iter().all(free)
    }
}

/// What a hypervisor is asked to do. These panic where a monitor must never ask for it.
impl Machine {
    pub(crate) fn add_shadow(&mut self) -> Gfn {
        let gfn = (SHADOWS..).map(Gfn).find(|gfn| !self.host.contains_key(gfn)).expect("some frame is free");
        self.add(gfn, Box::new([0x5a; PAGE_SIZE]));
        gfn
    }

    /// `p2m_altp2m_propagate_change`: a view is reset if the frame lies between those it has remapped others to.
    pub(crate) fn drop_shadow(&mut self, gfn: Gfn) -> bool {
        if gfn.0 < SHADOWS || self.host.remove(&gfn).is_none() {
            return false;
        }
        self.unmapped();
        for view in self.views.values_mut() {
            match view.remapped {
                Some((low, high)) if (low..=high).contains(&gfn) => *view = View::default(),
                _ => drop(view.entries.remove(&gfn)),
            }
        }
        true
    }

    pub(crate) fn create_view(&mut self) -> ViewId {
        let id = (1..).map(ViewId).find(|view| !self.views.contains_key(view)).expect("some view is free");
        assert!(id.0 < 10, "Xen has no more views");
        self.views.insert(id, View::default());
        id
    }

    pub(crate) fn switch_view(&mut self, view: ViewId) {
        assert!(view == ViewId::HOST || self.views.contains_key(&view), "there is no {view:?}");
        self.vcpus.iter_mut().for_each(|vcpu| vcpu.view = view);
    }

    pub(crate) fn drop_view(&mut self, view: ViewId) {
        assert!(self.vcpus.iter().all(|vcpu| vcpu.view != view), "a virtual CPU is in the view");
        assert!(self.views.remove(&view).is_some(), "there is no {view:?}");
    }

    /// As turning altp2m off does.
    pub(crate) fn drop_views(&mut self) {
        self.switch_view(ViewId::HOST);
        self.views.clear();
    }

    /// `p2m_change_altp2m_gfn`: the entry becomes that of the other frame, as the view itself shows it, rights and all.
    pub(crate) fn remap(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> bool {
        let entry = to.map(|to| self.entry(view, to));
        let view = self.views.get_mut(&view).expect("the view exists");
        match (to, entry) {
            (Some(to), Some(Some(entry))) => {
                view.entries.insert(gfn, entry);
                let (low, high) = view.remapped.unwrap_or((to, to));
                view.remapped = Some((low.min(to), high.max(to)));
                true
            }
            (None, _) => {
                // `p2m_remove_entry`
                if view.entries.remove(&gfn).is_some() {
                    self.unmapped();
                }
                true
            }
            _ => false,
        }
    }

    /// `p2m_set_altp2m_mem_access`; and for the host view `p2m_set_mem_access`, which `p2m_altp2m_propagate_change` carries
    /// into the views that have an entry of their own.
    pub(crate) fn set_rights(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> bool {
        let Some(entry) = self.entry(view, gfn) else { return false };
        let entry = Entry { rights, ..entry };
        if view != ViewId::HOST {
            self.views.get_mut(&view).expect("the view exists").entries.insert(gfn, entry);
            return true;
        }
        self.host.insert(gfn, entry);
        for view in self.views.values_mut() {
            view.entries.entry(gfn).and_modify(|own| *own = entry);
        }
        true
    }

    /// `ioreq_request_mapcache_invalidate`: the next time each virtual CPU goes on, nothing of an answer is done.
    fn unmapped(&mut self) {
        for vcpu in &mut self.vcpus {
            assert_eq!(vcpu.held, None, "Xen would be late with what it was answered");
            vcpu.unmapped = true;
        }
    }

    pub(crate) fn rip(&self, vcpu: VcpuId) -> u64 {
        let vcpu = &self.vcpus[usize::from(vcpu.0)];
        vcpu.held.unwrap_or(vcpu.registers.rip)
    }

    /// All virtual CPUs have had the time to go on.
    pub(crate) fn go_on(&mut self) {
        self.vcpus.iter_mut().for_each(|vcpu| vcpu.held = None);
    }

    pub(crate) fn stop_step(&mut self, vcpu: VcpuId) {
        let vcpu = &mut self.vcpus[usize::from(vcpu.0)];
        (vcpu.stepping, vcpu.fast) = (false, None);
    }
}

/// What virtual CPUs do.
impl Machine {
    /// Lets a virtual CPU that does not wait do one instruction.
    pub(crate) fn run(&mut self, index: usize) -> Ran {
        let vcpu = &mut self.vcpus[index];
        assert!(vcpu.waiting.is_none() && self.pauses == 0);
        vcpu.held = None;
        if let Some(vector) = vcpu.delivering.take() {
            return self.except(index, vector, 0);
        }
        if vcpu.registers.rflags & RF == 0 && watches(vcpu.registers.dr7, vcpu.registers.rip, EXECUTE) {
            // Its handler returns to the same instruction with RF set.
            vcpu.debug_exception(vcpu.registers.rip);
            vcpu.registers.rflags |= RF;
        }
        let (registers, view) = (vcpu.registers, vcpu.view);
        let mut bus = Memory::new(self, Through::View(view), &registers, None);
        let done = if bus.machine.starts.contains(&registers.rip) {
            cpu::execute(&registers, &mut bus, None, false)
        } else {
            Err(Stop::Fault(PF))
        };
        match done {
            Ok(after) => {
                let watched = bus.watched;
                bus.commit();
                if watched {
                    self.vcpus[index].debug_exception(after.rip);
                }
                self.through(index, after)
            }
            Err(Stop::Int3(length)) if self.monitored => {
                let gpa = Memory::new(self, Through::View(view), &registers, None).code();
                let vcpu = &mut self.vcpus[index];
                // The INT3 clears it (Intel SDM volume 3, section 18.3.1.1).
                vcpu.registers.rflags &= !RF;
                self.wait(index, Reason::Int3(Int3::new(gpa, length)))
            }
            Err(Stop::Int3(length)) => self.except(index, BP, length),
            Err(Stop::Denied(access)) => {
                assert!(self.monitored, "nobody watches, and {access:?} is denied");
                // Section 28.3.3.
                self.vcpus[index].registers.rflags |= RF;
                self.wait(index, Reason::Access(access))
            }
            Err(Stop::Fault(vector)) => self.except(index, vector, 0),
            Err(Stop::Call) => unreachable!("the CPU does it"),
        }
    }

    fn wait(&mut self, index: usize, reason: Reason) -> Ran {
        let vcpu = &mut self.vcpus[index];
        let (view, mut registers) = (vcpu.view, vcpu.registers);
        // The event is there before the virtual CPU is switched out.
        registers.dr7 = std::mem::replace(&mut vcpu.saved_dr7, registers.dr7);
        vcpu.waiting = Some(Event::new(VcpuId(index as u16), view, registers, reason));
        Ran::Waits
    }

    /// An exception is delivered. Of an interrupt, `length` are the bytes.
    fn except(&mut self, index: usize, vector: u8, length: u8) -> Ran {
        match self.deliver(index, vector) {
            Ok(()) => {}
            Err(Stop::Denied(access)) if self.monitored => {
                self.vcpus[index].delivering = (vector != BP).then_some(vector);
                return self.wait(index, Reason::Access(access));
            }
            Err(stop) => panic!("the tables are always mapped: {stop:?}"),
        }
        let vcpu = &mut self.vcpus[index];
        vcpu.exceptions += 1;
        vcpu.last_exception = Some((vector, vcpu.registers.rip));
        let mut after = vcpu.registers;
        after.rip = match vector {
            BP => after.rip.wrapping_add(length.into()),
            _ => self.handlers[index],
        };
        self.through(index, after)
    }

    /// What the CPU reads and writes for that, in the view it is in.
    fn deliver(&mut self, index: usize, vector: u8) -> Result<(), Stop> {
        let Vcpu { registers, view, .. } = self.vcpus[index];
        let supervisor = registers.with(|new| new.cpl = 0);
        let Tables { gates, stack, next_stack } = self.tables;
        let mut bus = Memory::new(self, Through::View(view), &supervisor, None);
        for half in [0, 8] {
            bus.read(gates + u64::from(vector) * 16 + half, 8)?;
        }
        let top = stack + next_stack * index as u64;
        // A fault pushes RF, and a trap does not.
        let rflags = if vector == BP { registers.rflags & !RF } else { registers.rflags | RF };
        for (n, word) in (1..).zip([0x10, registers.gpr[4], rflags, 8, registers.rip]) {
            bus.write(top - n * 8, 8, word)?;
        }
        bus.commit();
        Ok(())
    }

    /// The instruction is through: a step ends.
    fn through(&mut self, index: usize, after: Registers) -> Ran {
        let vcpu = &mut self.vcpus[index];
        vcpu.registers = after;
        vcpu.registers.rflags &= !RF;
        if let Some(view) = vcpu.fast.take() {
            assert!(!vcpu.stepping, "fast and monitored at once");
            vcpu.view = view;
        } else if vcpu.stepping {
            self.wait(index, Reason::Step);
        }
        Ran::Through
    }

    /// Carries out the answer to what a virtual CPU waits for. `fails`: Xen's emulator cannot do the instruction. Whether
    /// an instruction is through.
    pub(crate) fn answer(&mut self, index: usize, reply: &Reply, fails: bool) -> bool {
        let event = self.vcpus[index].waiting.take().expect("it waits");
        let denied = match &event.reason {
            // `p2m_mem_access_emulate_check`
            Reason::Access(access) => self.is_denied(self.vcpus[index].view, access),
            // Xen emulates only after an access, or what it is given.
            _ => false,
        };
        let vcpu = &mut self.vcpus[index];
        match reply.step {
            Step::Keep => {}
            Step::On => assert!(!std::mem::replace(&mut vcpu.stepping, true), "stepping was on"),
            Step::Off => assert!(std::mem::replace(&mut vcpu.stepping, false), "stepping was off"),
            Step::Fast(back) => {
                assert!(!vcpu.stepping, "a fast step during a step");
                assert!(vcpu.fast.replace(back).is_none(), "a fast step during another");
                let alone = matches!(reply.action, Action::Resume | Action::SetRegisters(_));
                assert!(alone, "one union holds both: {reply:?}");
            }
        }
        if let Some(view) = reply.view {
            assert!(view == ViewId::HOST || self.views.contains_key(&view), "there is no {view:?}");
            self.vcpus[index].view = view;
        }
        let unmapped = std::mem::take(&mut self.vcpus[index].unmapped);
        if unmapped && matches!(event.reason, Reason::Int3(_)) {
            // Xen would be too late to set it again, so nobody can: that is not promised.
            self.vcpus[index].registers.rflags |= RF;
        }
        let at_once = match &reply.action {
            Action::Resume => true,
            Action::Emulate | Action::EmulateRead(_) => !denied,
            Action::EmulateInstruction(_) | Action::SetRegisters(_) | Action::Reinject => false,
        };
        // `hvm_do_resume`
        assert!(at_once || !unmapped, "Xen would do it too late: {reply:?}");
        let through = match &reply.action {
            Action::Resume => false,
            Action::Emulate => denied && self.emulate(index, None, None, fails),
            Action::EmulateRead(data) => denied && self.emulate(index, None, Some(data), fails),
            Action::EmulateInstruction(bytes) => self.emulate(index, Some(bytes), None, fails),
            Action::SetRegisters(registers) => {
                // Xen takes none but the general ones, RIP and RFLAGS.
                let registers = (*registers).with(|new| new.dr7 = self.vcpus[index].registers.dr7);
                self.vcpus[index].registers = registers;
                // Else they have been changed, and the instruction is still to run.
                let through = registers.rip != event.registers.rip;
                if through {
                    self.through(index, registers);
                }
                through
            }
            Action::Reinject => {
                let Reason::Int3(int3) = event.reason else { panic!("no INT3, and injected: {:?}", event.reason) };
                self.except(index, BP, int3.length) == Ran::Through
            }
        };
        // The model has done it at once; but nobody can tell yet, unless there is an event already.
        let vcpu = &mut self.vcpus[index];
        vcpu.held = (!at_once && vcpu.waiting.is_none()).then_some(event.registers.rip);
        through
    }

    /// Lets a virtual CPU that waits try again.
    pub(crate) fn release(&mut self, index: usize) {
        let vcpu = &mut self.vcpus[index];
        if vcpu.waiting.take().is_some() {
            // A monitor that was killed cannot keep it.
            vcpu.registers.rflags |= RF;
        }
    }

    fn is_denied(&self, view: ViewId, access: &Access) -> bool {
        let rights = self.entry(view, access.gpa.gfn()).map_or(Rights::All, |entry| entry.rights);
        (access.read && !permits(rights, Intent::Read))
            || (access.write && !permits(rights, Intent::Write))
            || (access.execute && !permits(rights, Intent::Fetch))
    }

    fn emulate(
        &mut self,
        index: usize,
        instruction: Option<&[u8; INSTRUCTION_BYTES]>,
        data: Option<&ReadData>,
        fails: bool,
    ) -> bool {
        let registers = self.vcpus[index].registers;
        assert_eq!(self.vcpus[index].delivering, None, "an instruction is emulated that the CPU has interrupted");
        let mut bus = Memory::new(self, Through::Emulator, &registers, data);
        match cpu::execute(&registers, &mut bus, instruction.map(|bytes| &bytes[..]), true) {
            _ if fails => drop(self.wait(index, Reason::EmulationFailed)),
            Ok(after) => {
                bus.commit();
                self.through(index, after);
            }
            Err(Stop::Call) => drop(self.wait(index, Reason::EmulationFailed)),
            Err(Stop::Fault(UD)) => panic!("Xen is given what is no instruction: {instruction:x?}"),
            Err(Stop::Fault(vector)) => drop(self.except(index, vector, 0)),
            Err(Stop::Int3(length)) => drop(self.except(index, BP, length)),
            Err(Stop::Denied(access)) => unreachable!("nothing is denied to the hypervisor, nor {access:?}"),
        }
        self.vcpus[index].waiting.is_none_or(|event| event.reason == Reason::Step)
    }

    /// Whether the instruction that a virtual CPU is about to do reads where there is no memory.
    pub(crate) fn reads_nothing(&mut self, index: usize) -> bool {
        let Vcpu { registers, view, .. } = self.vcpus[index];
        let mut bus = Memory::new(self, Through::View(view), &registers, None);
        let _ = cpu::execute(&registers, &mut bus, None, false);
        bus.read_nothing
    }

    /// Where a virtual CPU's next instruction is, if it is in memory.
    pub(crate) fn next_instruction(&mut self, index: usize) -> Option<Gpa> {
        let Vcpu { registers, view, .. } = self.vcpus[index];
        if !self.starts.contains(&registers.rip) {
            return None;
        }
        Some(Memory::new(self, Through::View(view), &registers, None).code())
    }
}

impl Vcpu {
    /// #DB is delivered. Its handler counts it, and returns to `rip`.
    fn debug_exception(&mut self, rip: u64) {
        self.exceptions += 1;
        self.last_exception = Some((DB, rip));
    }
}

/// R/W0 to R/W3 in DR7.
const EXECUTE: u64 = 0b00;
const WRITE: u64 = 0b01;
const ACCESS: u64 = 0b11;

/// Whether a breakpoint in the debug registers matches. To have many of them match, each is for a quarter of all pages.
fn watches(dr7: u64, linear: u64, kind: u64) -> bool {
    let number = linear >> 12 & 3;
    dr7 >> (2 * number) & 3 != 0 && dr7 >> (16 + 4 * number) & 3 == kind
}

fn permits(rights: Rights, intent: Intent) -> bool {
    match intent {
        Intent::Read => matches!(rights, Rights::All | Rights::ReadWrite | Rights::ReadExecute | Rights::Read),
        Intent::Write | Intent::ReadWrite => matches!(rights, Rights::All | Rights::ReadWrite),
        Intent::Fetch => matches!(rights, Rights::All | Rights::Execute | Rights::ReadExecute),
    }
}

/// Whether somebody may read, or write, where a view permits this.
pub(crate) fn reads(rights: Rights) -> bool {
    permits(rights, Intent::Read)
}

/// The memory of a virtual CPU, through the guest's page tables and a view.
struct Memory<'a> {
    machine: &'a mut Machine,
    through: Through,
    registers: &'a Registers,
    /// What every read gets.
    data: Option<&'a ReadData>,
    /// What becomes true when the instruction is through.
    writes: Vec<(Gpa, u8)>,
    /// It has read where the guest has no memory.
    read_nothing: bool,
    /// It has accessed what the guest has a data breakpoint on.
    watched: bool,
}

impl<'a> Memory<'a> {
    fn new(machine: &'a mut Machine, through: Through, registers: &'a Registers, data: Option<&'a ReadData>) -> Self {
        assert_eq!(registers.mode, CodeMode::Bits64);
        Self { machine, through, registers, data, writes: Vec::new(), read_nothing: false, watched: false }
    }

    fn commit(self) {
        for (gpa, byte) in self.writes {
            if let Some(entry) = self.machine.find(self.through, gpa.gfn())
                && let Some(page) = self.machine.pages.get_mut(&entry.page)
            {
                page[usize::from(gpa.offset())] = byte;
            }
        }
    }

    /// Where the next instruction is.
    fn code(&mut self) -> Gpa {
        self.through = Through::Emulator;
        self.translate(self.registers.rip, Intent::Fetch).expect("code is always mapped")
    }

    /// A byte of guest-physical memory, as far as it may be accessed. Where there is no memory, all bits are set.
    fn byte(&self, gpa: Gpa, intent: Intent, page_walk: bool) -> Result<u8, Stop> {
        let Some(entry) = self.machine.find(self.through, gpa.gfn()) else { return Ok(0xff) };
        if self.through != Through::Emulator && !permits(entry.rights, intent) {
            let access = Access::new(
                gpa,
                Accesses {
                    read: matches!(intent, Intent::Read | Intent::ReadWrite),
                    write: matches!(intent, Intent::Write | Intent::ReadWrite),
                    execute: intent == Intent::Fetch,
                },
            )
            .with_page_walk(page_walk);
            return Err(Stop::Denied(access));
        }
        Ok(self.machine.pages[&entry.page][usize::from(gpa.offset())])
    }

    /// An entry of a page table.
    fn entry(&self, at: u64, intent: Intent) -> Result<u64, Stop> {
        let gpa = Gpa(at);
        self.byte(gpa, intent, true)?;
        let Some(entry) = self.machine.find(self.through, gpa.gfn()) else { return Ok(u64::MAX) };
        let (bytes, _) =
            self.machine.pages[&entry.page][usize::from(gpa.offset())..].split_first_chunk().expect("aligned");
        Ok(u64::from_le_bytes(*bytes))
    }

    /// Walks the guest's page tables: four levels, and pages of 2 MiB.
    fn translate(&mut self, linear: u64, intent: Intent) -> Result<Gpa, Stop> {
        if !is_canonical(linear) {
            return Err(Stop::Fault(cpu::GP));
        }
        let writes = matches!(intent, Intent::Write | Intent::ReadWrite);
        let mut table = self.registers.cr3 & ADDRESS;
        let mut marks = Vec::new();
        for level in (0..4).rev() {
            let shift = 12 + 9 * level;
            let at = table + (linear >> shift & 0x1ff) * 8;
            let entry = self.entry(at, Intent::Read)?;
            let leaf = level == 0 || entry & LARGE != 0;
            let permitted = (!writes || entry & WRITABLE != 0) && (self.registers.cpl < 3 || entry & USER != 0);
            if entry & PRESENT == 0 || !permitted {
                return Err(Stop::Fault(PF));
            }
            let marked = entry | ACCESSED | if leaf && writes { DIRTY } else { 0 };
            if marked != entry {
                // It writes to the table, which the view must permit.
                self.entry(at, Intent::ReadWrite)?;
                marks.push((Gpa(at), marked as u8));
            }
            if leaf {
                self.writes.extend(marks);
                let within = (1 << shift) - 1;
                return Ok(Gpa(entry & ADDRESS & !within | linear & within));
            }
            table = entry & ADDRESS;
        }
        unreachable!("the last level is a leaf")
    }

    fn load(&mut self, linear: u64, size: u8, intent: Intent) -> Result<u64, Stop> {
        let mut bytes = [0; 8];
        let mut gpa = Gpa(0);
        for (offset, byte) in (0..u64::from(size)).zip(&mut bytes) {
            let linear = linear.wrapping_add(offset);
            gpa = match offset > 0 && linear % PAGE_SIZE as u64 != 0 {
                true => Gpa(gpa.0 + 1),
                false => self.translate(linear, intent)?,
            };
            self.read_nothing |= gpa.gfn().0 >= SHADOWS;
            self.watched |= watches(self.registers.dr7, linear, ACCESS);
            self.watched |= intent == Intent::ReadWrite && watches(self.registers.dr7, linear, WRITE);
            *byte = self.byte(gpa, intent, false)?;
        }
        if let Some(data) = self.data {
            // `set_context_data`: every read gets the same, and zeros where it ends.
            bytes.fill(0);
            let length = data.as_slice().len().min(size.into());
            bytes[..length].copy_from_slice(&data.as_slice()[..length]);
        }
        Ok(u64::from_le_bytes(bytes))
    }
}

impl Bus for Memory<'_> {
    fn fetch(&mut self, linear: u64) -> Result<u8, Stop> {
        let gpa = self.translate(linear, Intent::Fetch)?;
        self.byte(gpa, Intent::Fetch, false)
    }

    fn read(&mut self, linear: u64, size: u8) -> Result<u64, Stop> {
        self.load(linear, size, Intent::Read)
    }

    fn read_to_write(&mut self, linear: u64, size: u8) -> Result<u64, Stop> {
        self.load(linear, size, Intent::ReadWrite)
    }

    fn write(&mut self, linear: u64, size: u8, value: u64) -> Result<(), Stop> {
        let mut gpa = Gpa(0);
        for (offset, byte) in (0..u64::from(size)).zip(value.to_le_bytes()) {
            let linear = linear.wrapping_add(offset);
            gpa = match offset > 0 && linear % PAGE_SIZE as u64 != 0 {
                true => Gpa(gpa.0 + 1),
                false => self.translate(linear, Intent::Write)?,
            };
            self.byte(gpa, Intent::Write, false)?;
            self.watched |= [WRITE, ACCESS].into_iter().any(|kind| watches(self.registers.dr7, linear, kind));
            self.writes.push((gpa, byte));
        }
        Ok(())
    }
}

/// Whether an INT3 lies there.
pub(crate) fn is_int3(page: &[u8; PAGE_SIZE], offset: u16) -> bool {
    page[usize::from(offset)] == INT3
}

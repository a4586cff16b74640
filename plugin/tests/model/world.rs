//! The connection the engine is given, and the judge.
//!
//! Whenever an instruction of the guest is through, its twin, a machine that nobody monitors, does one on the same virtual
//! CPU. Both must be in the same state then, and every subscriber at that instruction must have been told, once.
//!
//! While the engine works, other virtual CPUs may run: between any two calls it makes. And at any call its process may be
//! killed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::resume_unwind;

use hyperbp::ledger::Note;
use hyperbp::{
    Access, Accesses, BreakpointId, Event, Gfn, Gpa, Hypervisor, Observed, PAGE_SIZE, Placement, Reason, Rights,
    VcpuId, ViewId,
};

use crate::machine::{self, Machine, Ran, SHADOWS, is_int3};

/// What the monitor is killed with.
pub(crate) struct Killed;

/// What a frame without memory reads as.
const NO_MEMORY: [u8; PAGE_SIZE] = [0xff; PAGE_SIZE];
/// Where shadows may be.
const HIDDEN: Range<u64> = SHADOWS..SHADOWS + 8;

/// A call about a page or a frame that does not exist.
#[derive(Debug, thiserror::Error)]
#[error("there is no such page")]
pub(crate) struct NoPage;

/// Somebody who wants to be told.
#[derive(Clone, Debug)]
struct Subscriber {
    breakpoint: BreakpointId,
    /// Its placement lets it be told of everything on several virtual CPUs.
    strict: bool,
    /// It is in a shadow.
    shadowed: bool,
    /// For each virtual CPU: it came while an instruction was under way, of which it need not be told.
    late: Vec<bool>,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) machine: Machine,
    pub(crate) twin: Machine,
    /// What the monitor has noted, by place.
    notes: BTreeMap<(u8, u64), Note>,
    subscribers: Vec<Subscriber>,
    /// For each virtual CPU, since its last instruction was through: who was told.
    told: Vec<Vec<BreakpointId>>,
    /// For each: that instruction has begun.
    begun: Vec<bool>,
    /// For each: what a subscriber has made of R15 for it.
    pub(crate) changes: Vec<Option<u64>>,
    /// Which virtual CPU runs before the next call, if there is one of this number.
    pub(crate) meanwhile: std::vec::IntoIter<u8>,
    /// A virtual CPU that is being answered does not run.
    pub(crate) answering: Option<usize>,
    /// Calls until the monitor is killed.
    pub(crate) kill_in: Option<u32>,
    /// Calls until one is refused.
    pub(crate) refuse_in: Option<u32>,
    /// What of which pages is to be reported, and whether afterwards, too.
    watches: BTreeMap<Gfn, (Accesses, bool)>,
    /// For each virtual CPU: an access that was reported, and is to be again when it has been made.
    accessing: Vec<Option<Access>>,
    /// What came of it, all in all.
    pub(crate) tally: Tally,
}

/// To see that the script did something.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) instructions: u64,
    pub(crate) accesses: u64,
    pub(crate) hits: u64,
}

fn key(note: Note) -> (u8, u64) {
    match note {
        Note::Displaced { gpa, .. } => (1, gpa.0),
        Note::Guard(gfn) => (2, gfn.0),
        Note::Frame(gfn) => (3, gfn.0),
        Note::View(view) => (4, view.0.into()),
        Note::Altp2m => (5, 0),
    }
}

impl World {
    pub(crate) fn new(machine: Machine, meanwhile: Vec<u8>) -> Self {
        let (vcpus, twin) = (machine.vcpus.len(), machine.clone());
        let mut world = Self {
            machine,
            twin,
            notes: BTreeMap::new(),
            subscribers: Vec::new(),
            told: vec![Vec::new(); vcpus],
            begun: vec![false; vcpus],
            changes: vec![None; vcpus],
            meanwhile: meanwhile.into_iter(),
            answering: None,
            kill_in: None,
            refuse_in: None,
            watches: BTreeMap::new(),
            accessing: vec![None; vcpus],
            tally: Tally::default(),
        };
        world.machine.monitored = true;
        world
    }

    /// Lets a virtual CPU go on, if it can.
    pub(crate) fn run(&mut self, index: usize) {
        let waits = self.machine.vcpus[index].waiting.is_some() || self.answering == Some(index);
        if waits || self.machine.pauses > 0 || (self.sees_spill(index) && self.machine.reads_nothing(index)) {
            return;
        }
        match self.machine.run(index) {
            Ran::Through => self.through(index),
            Ran::Waits => self.begun[index] = true,
        }
    }

    /// The one thing that is not promised: that of two virtual CPUs that are both stepped, one does not see what has just
    /// been written where there is no memory. The model does not let that happen.
    fn sees_spill(&self, index: usize) -> bool {
        let vcpu = &self.machine.vcpus[index];
        let spilled = |gfn| self.machine.shown(vcpu.view, gfn).is_some_and(|(shown, _)| *shown != NO_MEMORY);
        let stepped = self.machine.vcpus.len() > 1 && self.machine.vcpus.iter().any(|vcpu| vcpu.stepping);
        (vcpu.stepping || vcpu.fast.is_some()) && stepped && HIDDEN.map(Gfn).any(spilled)
    }

    /// A virtual CPU's step is over, and the monitor has not heard of it yet.
    fn is_stepped_through(&self, index: usize) -> bool {
        self.machine.vcpus[index].waiting.is_some_and(|event| event.reason == Reason::Step)
    }

    /// An instruction is through: the judge.
    pub(crate) fn through(&mut self, index: usize) {
        self.tally.instructions += 1;
        let at = self.twin.next_instruction(index);
        if let Some(value) = self.changes[index].take() {
            let before = self.twin.clone();
            self.twin.vcpus[index].registers.gpr[15] = value;
            assert_eq!(self.twin.run(index), Ran::Through);
            if self.twin.vcpus[index].registers != self.machine.vcpus[index].registers {
                // Its breakpoint was gone before it could be set.
                self.twin = before;
                assert_eq!(self.twin.run(index), Ran::Through);
            }
        } else {
            assert_eq!(self.twin.run(index), Ran::Through);
        }
        let (real, twin) = (&self.machine.vcpus[index], &self.twin.vcpus[index]);
        assert_eq!(
            (real.registers, real.exceptions, real.last_exception),
            (twin.registers, twin.exceptions, twin.last_exception),
            "after the instruction at {at:x?} virtual CPU {index} is not as it would be without a breakpoint"
        );
        let told = std::mem::take(&mut self.told[index]);
        self.begun[index] = false;
        for (nth, breakpoint) in told.iter().enumerate() {
            assert_eq!(Some(breakpoint.gpa()), at, "a hit of what was not executed");
            assert!(!told[..nth].contains(breakpoint), "a hit at {at:x?} was reported twice to {breakpoint:?}");
        }
        for subscriber in &mut self.subscribers {
            let late = std::mem::take(&mut subscriber.late[index]);
            if Some(subscriber.breakpoint.gpa()) == at && subscriber.strict && !late {
                assert!(told.contains(&subscriber.breakpoint), "a hit at {at:x?} of virtual CPU {index} was lost");
            }
        }
    }

    /// A breakpoint has been set.
    pub(crate) fn subscribed(&mut self, breakpoint: BreakpointId, placement: Placement) {
        let strict = placement == Placement::Shadow || self.machine.vcpus.len() == 1;
        let shadowed = placement == Placement::Shadow;
        self.subscribers.push(Subscriber { breakpoint, strict, shadowed, late: self.begun.clone() });
    }

    /// It is being removed.
    pub(crate) fn unsubscribed(&mut self, breakpoint: BreakpointId) {
        self.subscribers.retain(|subscriber| subscriber.breakpoint != breakpoint);
    }

    /// Whether a breakpoint is there, in a shadow: what is under it is looked at at each hit.
    pub(crate) fn has_shadowed(&self, gpa: Gpa) -> bool {
        self.subscribers.iter().any(|subscriber| subscriber.breakpoint.gpa() == gpa && subscriber.shadowed)
    }

    /// A device writes to the guest's page, and nobody is told.
    pub(crate) fn device_writes(&mut self, gpa: Gpa, byte: u8) {
        for machine in [&mut self.machine, &mut self.twin] {
            machine.page_mut(gpa.gfn()).expect("the guest has the page")[usize::from(gpa.offset())] = byte;
        }
    }

    /// The subscribers there are.
    pub(crate) fn subscribers(&self) -> impl ExactSizeIterator<Item = BreakpointId> {
        self.subscribers.iter().map(|subscriber| subscriber.breakpoint)
    }

    /// A hit was reported.
    pub(crate) fn told(&mut self, vcpu: VcpuId, breakpoint: BreakpointId) {
        assert!(self.subscribers().any(|known| known == breakpoint), "a hit for who has left: {breakpoint:?}");
        self.tally.hits += 1;
        self.told[usize::from(vcpu.0)].push(breakpoint);
    }

    /// A page is watched, or not any more.
    pub(crate) fn watched(&mut self, gfn: Gfn, accesses: Accesses, after: bool) {
        match accesses {
            Accesses::NONE => drop(self.watches.remove(&gfn)),
            _ => drop(self.watches.insert(gfn, (accesses, after))),
        }
    }

    /// What the engine takes an event for: accesses are reported if they are watched, once before and, if that is wanted,
    /// once after they are made.
    pub(crate) fn observed(&mut self, event: &Event, observed: &Observed) {
        let index = usize::from(event.vcpu.0);
        match observed {
            Observed::Access { access, .. } => {
                assert_eq!(event.reason, Reason::Access(*access));
                let (accesses, after) = self.watches.get(&access.gpa.gfn()).expect("the page is watched");
                assert!(accesses.include(access), "a report of {access:?}, which nobody asked for");
                self.accessing[index] = after.then_some(*access);
                self.tally.accesses += 1;
            }
            Observed::Accessed(access) => {
                assert_eq!(self.accessing[index].take(), Some(*access), "a report after what was not reported before");
            }
            Observed::Hit(_) | Observed::Answered => {
                if event.reason == Reason::Step {
                    assert_eq!(self.accessing[index], None, "an access was made, and not reported");
                }
            }
        }
    }

    /// The guest's memory is what it would be without breakpoints, and what virtual CPUs can see of it is that, too.
    pub(crate) fn check(&self) {
        let displaced: Vec<_> = self
            .notes
            .values()
            .filter_map(|note| match note {
                Note::Displaced { gpa, original } => Some((*gpa, *original)),
                _ => None,
            })
            .collect();
        for gfn in self.twin.frames() {
            let (twin, real) = (self.twin.page(gfn).unwrap(), self.machine.page(gfn).unwrap());
            let same = match displaced.iter().any(|(gpa, _)| gpa.gfn() == gfn) {
                false => twin == real,
                true => {
                    let mut real = *real;
                    for (gpa, original) in displaced.iter().filter(|(gpa, _)| gpa.gfn() == gfn) {
                        let byte = &mut real[usize::from(gpa.offset())];
                        *byte = if *byte == 0xcc { *original } else { *byte };
                    }
                    *twin == real
                }
            };
            assert!(same, "{gfn} is not what the guest has written, at {:x?}", differences(twin, real));
        }
        for (index, vcpu) in self.machine.vcpus.iter().enumerate() {
            // After its step the monitor may put things right before it looks.
            if self.is_stepped_through(index) || self.sees_spill(index) {
                continue;
            }
            for gfn in self.twin.frames().chain(HIDDEN.map(Gfn)) {
                let own = self.twin.page(gfn).unwrap_or(&NO_MEMORY);
                if let Some((shown, rights)) = self.machine.shown(vcpu.view, gfn)
                    && machine::reads(rights)
                {
                    let at = differences(own, shown);
                    assert!(
                        at.is_empty(),
                        "virtual CPU {index} in {:?} sees what is not the guest's in {gfn}, at {at:x?}",
                        vcpu.view
                    );
                }
            }
        }
    }

    /// Nothing of the monitor is left.
    pub(crate) fn check_left(&self) {
        assert!(self.machine.is_untouched(), "something is left: {:?}", self.machine.vcpus);
        assert_eq!(self.notes, BTreeMap::new());
        assert!(self.machine.frames().eq(self.twin.frames()), "frames are left");
        for gfn in self.twin.frames() {
            assert!(self.machine.page(gfn) == self.twin.page(gfn), "{gfn} is not the guest's own");
        }
    }

    /// The monitor is dead: `hyperbp-bench recover` restores the domain, in this order, from what was noted.
    pub(crate) fn recover(&mut self) {
        self.kill_in = None;
        self.answering = None;
        self.machine.monitored = false;
        self.machine.go_on();
        let pauses = std::mem::take(&mut self.machine.pauses);
        for index in 0..self.machine.vcpus.len() {
            self.machine.stop_step(VcpuId(index as u16));
        }
        self.machine.drop_views();
        for note in std::mem::take(&mut self.notes).into_values() {
            match note {
                Note::Displaced { gpa, original } => {
                    let page = self.machine.page_mut(gpa.gfn()).expect("it had a breakpoint");
                    if is_int3(page, gpa.offset()) {
                        page[usize::from(gpa.offset())] = original;
                    }
                }
                Note::Guard(gfn) => assert!(self.machine.set_rights(ViewId::HOST, gfn, Rights::All)),
                // It may not have been added.
                Note::Frame(gfn) => drop(self.machine.drop_shadow(gfn)),
                // All of them went above.
                Note::View(_) | Note::Altp2m => {}
            }
        }
        assert!(pauses <= 1, "it was paused {pauses} times");
        self.let_go();
        self.subscribers.clear();
        self.told.iter_mut().for_each(Vec::clear);
    }

    /// Nobody waits any more: who did tries again.
    fn let_go(&mut self) {
        (0..self.machine.vcpus.len()).for_each(|index| self.machine.release(index));
    }

    /// What happens before a call: others run; and it may be the last, or one that is refused.
    fn call(&mut self) -> Result<(), NoPage> {
        if self.machine.pauses == 0
            && let Some(index) = self.meanwhile.next()
            && usize::from(index) < self.machine.vcpus.len()
        {
            self.run(index.into());
        }
        self.die_maybe();
        match &mut self.refuse_in {
            Some(0) => {
                self.refuse_in = None;
                Err(NoPage)
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn die_maybe(&mut self) {
        if let Some(left) = &mut self.kill_in {
            if *left == 0 {
                resume_unwind(Box::new(Killed));
            }
            *left -= 1;
        }
    }

    fn note(&mut self, note: Note) {
        self.notes.insert(key(note), note);
        // Noted, and not done.
        self.die_maybe();
    }

    fn erase(&mut self, note: Note) {
        // Undone, and still noted.
        self.die_maybe();
        self.notes.remove(&key(note));
    }

    fn put(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), NoPage> {
        let at = usize::from(gpa.offset());
        self.machine.page_mut(gpa.gfn()).ok_or(NoPage)?[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

/// Where two pages differ: the first few places.
fn differences(left: &[u8; PAGE_SIZE], right: &[u8; PAGE_SIZE]) -> Vec<usize> {
    if left == right { Vec::new() } else { (0..PAGE_SIZE).filter(|at| left[*at] != right[*at]).take(8).collect() }
}

impl Hypervisor for World {
    type Error = NoPage;

    fn vcpus(&self) -> u16 {
        self.machine.vcpus.len() as u16
    }

    fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), NoPage> {
        self.call()?;
        let at = usize::from(gpa.offset());
        into.copy_from_slice(&self.machine.page(gpa.gfn()).ok_or(NoPage)?[at..at + into.len()]);
        Ok(())
    }

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), NoPage> {
        self.call()?;
        self.put(gpa, bytes)
    }

    fn write_ram(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<bool, NoPage> {
        self.write(gpa, bytes).map(|()| true)
    }

    fn displace(&mut self, gpa: Gpa, original: u8) -> Result<(), NoPage> {
        self.call()?;
        self.note(Note::Displaced { gpa, original });
        self.put(gpa, &[0xcc])
    }

    fn replace(&mut self, gpa: Gpa, original: u8) -> Result<(), NoPage> {
        self.call()?;
        self.put(gpa, &[original])?;
        self.erase(Note::Displaced { gpa, original });
        Ok(())
    }

    fn now(&self) -> u64 {
        self.tally.instructions
    }

    fn add_shadow_gfn(&mut self) -> Result<Gfn, NoPage> {
        self.call()?;
        let gfn = self.machine.add_shadow();
        self.note(Note::Frame(gfn));
        Ok(gfn)
    }

    fn drop_shadow_gfn(&mut self, gfn: Gfn) -> Result<(), NoPage> {
        self.call()?;
        if !self.machine.drop_shadow(gfn) {
            return Err(NoPage);
        }
        self.erase(Note::Frame(gfn));
        Ok(())
    }

    fn create_view(&mut self) -> Result<ViewId, NoPage> {
        self.call()?;
        Ok(self.machine.create_view())
    }

    fn switch_view(&mut self, view: ViewId) -> Result<(), NoPage> {
        self.call()?;
        self.machine.switch_view(view);
        Ok(())
    }

    fn drop_view(&mut self, view: ViewId) -> Result<(), NoPage> {
        self.call()?;
        self.machine.drop_view(view);
        Ok(())
    }

    fn remap(&mut self, view: ViewId, gfn: Gfn, to: Option<Gfn>) -> Result<(), NoPage> {
        self.call()?;
        self.machine.remap(view, gfn, to).then_some(()).ok_or(NoPage)
    }

    fn set_rights(&mut self, view: ViewId, gfn: Gfn, rights: Rights) -> Result<(), NoPage> {
        self.call()?;
        if view == ViewId::HOST && rights != Rights::All {
            self.note(Note::Guard(gfn));
        }
        if !self.machine.set_rights(view, gfn, rights) {
            return Err(NoPage);
        }
        if view == ViewId::HOST && rights == Rights::All {
            self.erase(Note::Guard(gfn));
        }
        Ok(())
    }

    fn rip(&mut self, vcpu: VcpuId) -> Result<u64, NoPage> {
        self.call()?;
        Ok(self.machine.rip(vcpu))
    }

    fn debug_control(&mut self, vcpu: VcpuId) -> Result<Option<u64>, NoPage> {
        self.call()?;
        Ok(Some(self.machine.vcpus[usize::from(vcpu.0)].registers.dr7))
    }

    fn stop_step(&mut self, vcpu: VcpuId) -> Result<(), NoPage> {
        self.call()?;
        self.machine.stop_step(vcpu);
        Ok(())
    }

    fn pause(&mut self) -> Result<(), NoPage> {
        self.call()?;
        self.machine.pauses += 1;
        Ok(())
    }

    /// Refused only if the domain is gone.
    fn resume(&mut self) -> Result<(), NoPage> {
        self.die_maybe();
        self.machine.pauses -= 1;
        Ok(())
    }
}

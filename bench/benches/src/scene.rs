//! A guest with breakpoints, and the engine that serves them.

use std::time::{Duration, Instant};

use hyperbp::{
    Access, Accesses, BreakpointId, Engine, Error, Event, Gfn, Gpa, Int3, Mechanism, Placement, Reason, Registers,
    Reply, Step, VcpuId, ViewId,
};

use crate::What;
use crate::machine::{BASE, FRAMES, Machine, TABLES};

/// The page that `rsp` is in.
const STACK: Gfn = Gfn(0x20);
/// The page with the instructions that read and write: `mov al, [rsi]` and `mov [rsi], al`.
const ACCESSES: Gfn = Gfn(0x80);
const READS_AT: u16 = 0x10;
const WRITES_AT: u16 = 0x20;
/// The first page of code, of [`PER_PAGE`] breakpoints each.
const CODE: Gfn = Gfn(0x100);
const PER_PAGE: u32 = 16;
/// `push rbp`.
const PUSH: u8 = 0x55;
/// Bytes between a breakpoint and what is read or written beside it.
const BESIDE: u64 = 0x40;
/// Breakpoints that are set, and taken out again, together.
const BATCH: u64 = 64;
/// How often a thing has happened when it is measured.
const WARM: u64 = 100;

/// The engine's functions, as what is measured, or only as what has to be done for that.
type Insert = fn(&mut Engine, &mut Machine, Gpa, Mechanism) -> Result<BreakpointId, Error>;
type Remove = fn(&mut Engine, &mut Machine, BreakpointId) -> Result<(), Error>;

/// A guest with breakpoints, and the engine that serves them.
#[derive(Debug)]
pub struct Scene {
    mechanism: Mechanism,
    machine: Machine,
    engine: Engine,
    places: Vec<Gpa>,
    /// The view that the guest runs in.
    view: ViewId,
    random: u64,
    hits: u64,
    /// To what happened last.
    reply: Reply,
}

impl Scene {
    /// Sets so many breakpoints, on functions that begin with `push rbp`.
    ///
    /// # Errors
    /// If the engine refuses one.
    pub fn new(mechanism: Mechanism, breakpoints: u32) -> Result<Self, Error> {
        let mut machine = Machine::new();
        for (at, bytes) in [(READS_AT, [0x8a, 0x06]), (WRITES_AT, [0x88, 0x06])] {
            machine.page(ACCESSES)[usize::from(at)..][..2].copy_from_slice(&bytes);
        }
        let place = |n: u32| Gfn(CODE.0 + u64::from(n / PER_PAGE)).at((n % PER_PAGE * 0x80 + 0x18) as u16);
        let places: Vec<Gpa> = (0..breakpoints).map(place).collect();
        let mut engine = Engine::new(&machine);
        for place in &places {
            machine.page(place.gfn())[usize::from(place.offset())] = PUSH;
            engine.insert(&mut machine, *place, mechanism)?;
        }
        // The engine makes one with the breakpoints first.
        let view = if mechanism.placement() == Placement::Shadow { ViewId(1) } else { ViewId::HOST };
        Ok(Self { mechanism, machine, engine, places, view, random: 1, hits: 0, reply: Reply::default() })
    }

    /// Lets something happen so often, and returns how long the engine took for that.
    ///
    /// # Errors
    /// Those of [`within`](Self::within).
    pub fn time(&mut self, what: What, times: u64) -> Result<Duration, Error> {
        let mut spent = Duration::ZERO;
        self.within(what, times, &mut |work| {
            let begun = Instant::now();
            work();
            spent += begun.elapsed();
        })?;
        Ok(spent)
    }

    /// Lets something happen so often, within calls of `meter`. What has to be done for it is done outside of them.
    ///
    /// # Errors
    /// If the engine refuses to set a breakpoint or to take one out.
    pub fn within(&mut self, what: What, times: u64, meter: &mut dyn FnMut(&mut dyn FnMut())) -> Result<(), Error> {
        if what.is_an_event() {
            meter(&mut || (0..times).for_each(|_| self.happen(what)));
            return Ok(());
        }
        for done in (0..times).step_by(BATCH as usize) {
            let count = BATCH.min(times - done);
            let mut ids = Vec::with_capacity(count as usize);
            if what == What::Insert {
                let mut inserted = Ok(());
                meter(&mut || inserted = self.insert(count, &mut ids, measured::insert));
                inserted?;
                self.remove(&ids, |engine, machine, id| engine.remove(machine, id))?;
            } else {
                let insert: Insert = |engine, machine, gpa, mechanism| engine.insert(machine, gpa, mechanism);
                self.insert(count, &mut ids, insert)?;
                let mut removed = Ok(());
                meter(&mut || removed = self.remove(&ids, measured::remove));
                removed?;
            }
        }
        Ok(())
    }

    /// Lets something happen until what only its first times cost is paid.
    ///
    /// # Errors
    /// Those of [`within`](Self::within).
    pub fn warm_up(&mut self, what: What) -> Result<(), Error> {
        self.time(what, WARM).map(drop)
    }

    /// What the engine is asked because of one thing that the guest does at, or beside, one of the breakpoints: the event
    /// and, if the engine has the instruction stepped, the one after it.
    fn happen(&mut self, what: What) {
        let gpa = self.any();
        let beside = Gpa(gpa.0 + BESIDE);
        let access = |accesses| Reason::Access(Access::new(beside, accesses));
        let (at, length, reason) = match what {
            What::Read => (ACCESSES.at(READS_AT), 2, access(Accesses::READ)),
            What::Write => (ACCESSES.at(WRITES_AT), 2, access(Accesses::WRITE)),
            _ => (gpa, 1, Reason::Int3(Int3::new(gpa, 1))),
        };
        let mut event = Event::new(VcpuId(0), self.view, registers(at, beside), reason);
        self.answer(&event);
        if self.reply.step == Step::On {
            event.reason = Reason::Step;
            event.view = self.reply.view.unwrap_or(event.view);
            event.registers.rip += length;
            self.answer(&event);
        }
    }

    fn answer(&mut self, event: &Event) {
        measured::answer(&mut self.engine, &mut self.machine, event, &mut self.hits, &mut self.reply);
    }

    /// Sets so many more, each on a page that has none yet. There is room for their `ids`.
    fn insert(&mut self, count: u64, ids: &mut Vec<BreakpointId>, insert: Insert) -> Result<(), Error> {
        let first = CODE.0 + self.places.len().div_ceil(PER_PAGE as usize) as u64;
        debug_assert!(first + count < FRAMES / 2, "there is no room");
        for gfn in first..first + count {
            ids.push(insert(&mut self.engine, &mut self.machine, Gfn(gfn).at(0x18), self.mechanism)?);
        }
        Ok(())
    }

    fn remove(&mut self, ids: &[BreakpointId], remove: Remove) -> Result<(), Error> {
        ids.iter().try_for_each(|id| remove(&mut self.engine, &mut self.machine, *id))
    }

    /// One of the breakpoints, at random, but the same ones in every run. (Knuth's MMIX generator.)
    fn any(&mut self) -> Gpa {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.places[(self.random >> 33) as usize % self.places.len()]
    }
}

/// What is measured. callgrind knows these functions by their names: see [`callgrind`](crate::callgrind).
mod measured {
    use std::hint::black_box;

    use hyperbp::{BreakpointId, Engine, Error, Event, Gpa, Hit, Mechanism, Reply, Verdict};

    use crate::machine::Machine;

    #[inline(never)]
    pub(super) fn answer(engine: &mut Engine, machine: &mut Machine, event: &Event, hits: &mut u64, reply: &mut Reply) {
        let mut on_hit = |_: &mut Engine, _: &mut Machine, _: &Hit<'_>| {
            *hits += 1;
            Verdict::Keep
        };
        engine.answer(machine, event, &mut on_hit, reply);
    }

    #[inline(never)]
    pub(super) fn insert(
        engine: &mut Engine,
        machine: &mut Machine,
        place: Gpa,
        mechanism: Mechanism,
    ) -> Result<BreakpointId, Error> {
        black_box(engine.insert(machine, place, mechanism))
    }

    #[inline(never)]
    pub(super) fn remove(engine: &mut Engine, machine: &mut Machine, id: BreakpointId) -> Result<(), Error> {
        black_box(engine.remove(machine, id))
    }
}

/// 64-bit kernel code, at an instruction that reads or writes there.
fn registers(at: Gpa, there: Gpa) -> Registers {
    let mut registers = Registers::default();
    registers.rip = BASE + at.0;
    registers.rflags = 0x202;
    // Paging, write protection and protection.
    registers.cr0 = 1 << 31 | 1 << 16 | 1;
    registers.cr3 = TABLES.at(0).0;
    // Physical-address extension.
    registers.cr4 = 1 << 5;
    // No-execute, long mode, and SYSCALL.
    registers.efer = 0xd01;
    registers.gpr[4] = BASE + STACK.at(0xf00).0;
    registers.gpr[6] = BASE + there.0;
    registers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenes;

    #[test]
    fn the_engine_serves_what_the_guest_does() {
        for (name, mechanism, breakpoints) in scenes() {
            let mut scene = Scene::new(mechanism, breakpoints).unwrap();
            for what in [What::Hit, What::Read, What::Write] {
                scene.time(what, 20).unwrap();
            }
            let counters = scene.engine.counters();
            assert_eq!((scene.hits, counters.reads, counters.writes), (20, 20, 20), "{name}");
        }
    }

    #[test]
    fn breakpoints_come_and_go() {
        for (name, mechanism, breakpoints) in scenes() {
            let mut scene = Scene::new(mechanism, breakpoints).unwrap();
            let mut ids = Vec::new();
            scene.insert(BATCH, &mut ids, measured::insert).unwrap();
            assert_eq!(scene.engine.breakpoints().len() as u64, u64::from(breakpoints) + BATCH, "{name}");
            scene.remove(&ids, measured::remove).unwrap();
            scene.time(What::Remove, BATCH + 1).unwrap();
            assert_eq!(scene.engine.breakpoints().len() as u32, breakpoints, "{name}");
        }
    }
}

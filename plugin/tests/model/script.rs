//! What happens to a guest: its virtual CPUs run and are answered in some order, breakpoints come and go, and the monitor
//! leaves, or is killed.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use hyperbp::{
    Accesses, BreakpointId, Counters, Engine, Error, Figures, Gfn, Gpa, Hit, Mechanism, Placement, Reply, Verdict,
};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::guest::{Recipe, recipe};
use crate::world::{Killed, World};

/// How often every virtual CPU is let go on at the end.
const ROUNDS: usize = 40;
/// A page of code, and a part of it that holds none.
const SCRATCH_PAGE: Gfn = Gfn(0x20);
const SCRATCH: u16 = 0x900;
/// A virtual CPU comes out of its step after so many rounds, or never.
const PATIENCE: usize = 1000;

#[derive(Clone, Debug)]
pub(crate) enum Action {
    /// A virtual CPU goes on.
    Run(u8),
    /// It goes on for so many instructions, or until it waits.
    RunOn(u8, u8),
    /// It is answered, if it waits; perhaps Xen's emulator cannot do what it is asked to.
    Answer(u8, bool),
    Insert(u8, u8),
    Remove(u8),
    /// A page is watched: three bits for what, one for afterwards, too.
    Watch(u8, u8),
    /// A device writes an instruction of one byte over another one: at this site, this one. Pages are compared then, or
    /// that is left to the next hit.
    Device(u8, u8, bool),
    /// A device writes data into a page: at this place, this byte. Pages are compared then.
    DeviceData(u8, u8),
    /// All is set up again.
    Resync,
}

/// What a subscriber does when it is told.
#[derive(Clone, Debug)]
pub(crate) enum Reaction {
    Nothing,
    Leave,
    Remove(u8),
    Insert(u8, u8),
    /// It changes R15.
    Change(u8),
}

#[derive(Clone)]
pub(crate) struct Script {
    recipe: Recipe,
    palette: Vec<Mechanism>,
    /// Where breakpoints are set.
    sites: Vec<Gpa>,
    actions: Vec<Action>,
    reactions: Vec<Reaction>,
    meanwhile: Vec<u8>,
    kill_in: Option<u32>,
}

pub(crate) fn action(vcpus: usize) -> impl Strategy<Value = Action> {
    let vcpu = 0..vcpus as u8;
    prop_oneof![
        12 => vcpu.clone().prop_map(Action::Run),
        8 => (vcpu.clone(), 2..20_u8).prop_map(|(vcpu, most)| Action::RunOn(vcpu, most)),
        16 => (vcpu, prop::bool::weighted(0.2)).prop_map(|(vcpu, fails)| Action::Answer(vcpu, fails)),
        4 => (any::<u8>(), any::<u8>()).prop_map(|(site, mechanism)| Action::Insert(site, mechanism)),
        2 => any::<u8>().prop_map(Action::Remove),
        2 => (any::<u8>(), any::<u8>()).prop_map(|(page, what)| Action::Watch(page, what)),
        2 => (any::<u8>(), any::<u8>(), any::<bool>()).prop_map(|(site, what, late)| Action::Device(site, what, late)),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(at, byte)| Action::DeviceData(at, byte)),
        1 => Just(Action::Resync),
    ]
}

pub(crate) fn reaction() -> impl Strategy<Value = Reaction> {
    prop_oneof![
        8 => Just(Reaction::Nothing),
        1 => Just(Reaction::Leave),
        1 => any::<u8>().prop_map(Reaction::Remove),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(site, mechanism)| Reaction::Insert(site, mechanism)),
        2 => any::<u8>().prop_map(Reaction::Change),
    ]
}

pub(crate) fn script(vcpus: usize, palette: impl Strategy<Value = Vec<Mechanism>>) -> impl Strategy<Value = Script> {
    (
        recipe(vcpus),
        palette,
        prop::collection::vec(any::<Index>(), 4),
        // Most breakpoints are there from the start: else there is hardly a hit.
        prop::collection::vec((any::<u8>(), any::<u8>()), 0..8),
        prop::collection::vec(action(vcpus), 1..200),
        prop::collection::vec(reaction(), 0..40),
        // Of most calls nobody makes use.
        prop::collection::vec(0..12_u8, 0..if vcpus > 1 { 200 } else { 1 }),
        prop_oneof![2 => Just(None), 1 => (0..400_u32).prop_map(Some)],
    )
        .prop_map(|(recipe, palette, pairs, first, actions, reactions, meanwhile, kill_in)| {
            let first = first.into_iter().map(|(site, mechanism)| Action::Insert(site, mechanism));
            let actions = first.chain(actions).collect();
            let all = recipe.build().sites;
            // Neighbours.
            let pair = |index: Index| {
                let first = index.index(all.len());
                [all[first], all[(first + 1) % all.len()]]
            };
            let sites = pairs.into_iter().flat_map(pair).collect();
            Script { recipe, palette, sites, actions, reactions, meanwhile, kill_in }
        })
}

/// On few lines.
impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { recipe, palette, sites, actions, reactions, meanwhile, kill_in } = self;
        let palette: Vec<_> = palette.iter().map(Mechanism::to_string).collect();
        writeln!(f, "{recipe:?}\nof {palette:?} at {sites:x?}")?;
        write!(f, "{actions:?}\nreactions {reactions:?}\nmeanwhile {meanwhile:?}, killed {kill_in:?}")
    }
}

impl Script {
    /// Nobody is killed, and nobody runs meanwhile.
    pub(crate) fn plain(recipe: Recipe, palette: &[Mechanism], sites: Vec<Gpa>, actions: Vec<Action>) -> Self {
        Self {
            recipe,
            palette: palette.to_vec(),
            sites,
            actions,
            reactions: Vec::new(),
            meanwhile: Vec::new(),
            kill_in: None,
        }
    }

    /// Returns what has happened, by name.
    pub(crate) fn run(&self) -> Vec<(&'static str, u64)> {
        let guest = self.recipe.build();
        let mut world = World::new(guest.machine, self.meanwhile.clone());
        world.kill_in = self.kill_in;
        let engine = Engine::new(&world);
        let reactions = self.reactions.clone().into_iter();
        let mut session =
            Session { world, engine, sites: self.sites.clone(), palette: &self.palette, reactions, failing: false };
        let mut served = Vec::new();
        let lived = catch_unwind(AssertUnwindSafe(|| session.live(&self.actions, &mut served)));
        let Counters { reads, writes, held, discarded, resynced, reinjected, emulation_failures, .. } =
            session.engine.counters();
        let killed = u64::from(lived.is_err());
        let mut world = session.world;
        if let Err(payload) = lived {
            match payload.downcast::<Killed>() {
                Ok(_) => world.recover(),
                Err(panic) => resume_unwind(panic),
            }
        }
        world.check_left();
        world.machine.monitored = false;
        for _ in 0..ROUNDS {
            (0..world.machine.vcpus.len()).for_each(|index| world.run(index));
        }
        world.check_left();
        let counted = [
            ("reads", reads),
            ("writes", writes),
            ("held", held),
            ("discarded", discarded),
            ("resynced", resynced),
            ("reinjected", reinjected),
            ("emulation failures", emulation_failures),
            ("killed", killed),
        ];
        served.into_iter().chain(counted).collect()
    }
}

/// A monitor that lives.
struct Session<'a> {
    world: World,
    engine: Engine,
    sites: Vec<Gpa>,
    palette: &'a [Mechanism],
    reactions: std::vec::IntoIter<Reaction>,
    failing: bool,
}

impl Session<'_> {
    fn live(&mut self, actions: &[Action], served: &mut Vec<(&'static str, u64)>) {
        for action in actions {
            match action {
                Action::Run(vcpu) => self.world.run(usize::from(*vcpu)),
                Action::RunOn(vcpu, most) => {
                    let index = usize::from(*vcpu);
                    for _ in 0..*most {
                        if self.world.machine.vcpus[index].waiting.is_none() {
                            self.world.run(index);
                        }
                    }
                }
                Action::Answer(vcpu, fails) => {
                    self.failing = *fails;
                    self.answer(usize::from(*vcpu));
                }
                Action::Insert(site, mechanism) => {
                    insert(&mut self.engine, &mut self.world, &self.sites, self.palette, *site, *mechanism);
                }
                Action::Remove(which) => remove(&mut self.engine, &mut self.world, *which),
                Action::Watch(page, what) => watch(&mut self.engine, &mut self.world, *page, *what),
                Action::Device(site, what, late) => self.device(*site, *what, *late),
                Action::DeviceData(at, byte) => {
                    // In a code page, where no code is.
                    let gpa = SCRATCH_PAGE.at(SCRATCH + u16::from(*at));
                    self.world.device_writes(gpa, *byte);
                    self.verify();
                }
                Action::Resync => drop(self.engine.resync(&mut self.world).unwrap()),
            }
            self.world.check();
        }
        for id in self.world.subscribers() {
            let Figures { served: by, rewritten, .. } = self.engine.figures(id).unwrap();
            served.extend([
                ("repair", by.repair),
                ("view-step", by.view_step),
                ("view-fast-step", by.view_fast_step),
                ("emulate", by.emulate),
                ("interpret", by.interpret),
                ("rewritten", rewritten),
            ]);
        }
        self.leave();
    }

    /// A device writes an instruction that is as long as the one that is there.
    fn device(&mut self, site: u8, what: u8, late: bool) {
        const INSTRUCTIONS: [u8; 3] = [0x90, 0xf8, 0xf9];
        let is_short = |gpa: &&Gpa| {
            let Some(before) = self.world.twin.page(gpa.gfn()) else { return false };
            let at = usize::from(gpa.offset());
            // Not behind a prefix.
            at > 0 && before[at - 1] != 0x66 && INSTRUCTIONS.contains(&before[at])
        };
        let sites = self.sites.iter().cycle().skip(usize::from(site)).take(self.sites.len());
        let Some(gpa) = sites.copied().find(|gpa| is_short(&gpa)) else { return };
        let hit = self.world.has_shadowed(gpa);
        self.world.device_writes(gpa, INSTRUCTIONS[usize::from(what) % INSTRUCTIONS.len()]);
        if !(late && hit) {
            self.verify();
        }
    }

    /// A round, in which no virtual CPU runs: until it is over, one could execute what was there before.
    fn verify(&mut self) {
        let meanwhile = std::mem::replace(&mut self.world.meanwhile, Vec::new().into_iter());
        let pages = self.engine.page_count();
        for _ in 0..pages {
            self.engine.verify(&mut self.world, 1).unwrap();
        }
        assert_eq!(self.engine.verify(&mut self.world, pages).unwrap(), 0, "a round has left something");
        self.world.meanwhile = meanwhile;
    }

    fn answer(&mut self, index: usize) {
        let Some(event) = self.world.machine.vcpus[index].waiting else { return };
        self.world.answering = Some(index);
        let Self { world, engine, sites, palette, reactions, failing } = self;
        let mut reply = Reply::default();
        let observed = engine.begin(world, &event, &mut reply);
        world.observed(&event, &observed);
        let mut changed = None;
        let mut on_hit = |engine: &mut Engine, world: &mut World, hit: &Hit<'_>| {
            world.told(hit.vcpu, hit.breakpoint);
            match reactions.next().unwrap_or(Reaction::Nothing) {
                Reaction::Nothing => {}
                Reaction::Leave => {
                    world.unsubscribed(hit.breakpoint);
                    return Verdict::Remove;
                }
                Reaction::Remove(which) => remove(engine, world, which),
                Reaction::Insert(site, mechanism) => insert(engine, world, sites, palette, site, mechanism),
                Reaction::Change(value) => {
                    let mut registers = *hit.registers;
                    registers.gpr[15] = value.into();
                    changed = Some(registers);
                    world.changes[usize::from(hit.vcpu.0)] = Some(value.into());
                }
            }
            Verdict::Keep
        };
        engine.tell(world, &event, &observed, &mut on_hit);
        engine.end(world, &event, &observed, changed.as_ref(), &mut reply);
        world.answering = None;
        if world.machine.answer(index, &reply, *failing) {
            world.through(index);
        }
    }

    fn leave(&mut self) {
        let leaving: Vec<BreakpointId> = self.world.subscribers().collect();
        leaving.into_iter().for_each(|breakpoint| self.world.unsubscribed(breakpoint));
        self.engine.leave(&mut self.world).unwrap();
        assert!(matches!(self.engine.insert(&mut self.world, self.sites[0], Mechanism::AUTO), Err(Error::Leaving)));
        self.failing = false;
        for _ in 0..PATIENCE {
            let waiting = self.world.machine.vcpus.iter().any(|vcpu| vcpu.waiting.is_some());
            if !waiting && self.engine.is_idle(&mut self.world) {
                self.engine.finish(&mut self.world).unwrap();
                assert_eq!(self.engine.counters().failures, 0);
                return;
            }
            for index in 0..self.world.machine.vcpus.len() {
                self.answer(index);
                if !self.engine.is_idle(&mut self.world) {
                    self.world.run(index);
                }
            }
            self.world.check();
            self.engine.leave(&mut self.world).unwrap();
        }
        panic!("a virtual CPU does not come out of its step");
    }
}

/// One of the calls that setting a breakpoint takes is refused: it is set nevertheless, or not, and in the end nothing is
/// left.
pub(crate) fn refuse(recipe: &Recipe, mechanism: Mechanism, site: &Index, refuse_in: u32, meanwhile: Vec<u8>) {
    let guest = recipe.build();
    let gpa = guest.sites[site.index(guest.sites.len())];
    let mut world = World::new(guest.machine, meanwhile);
    let mut engine = Engine::new(&world);
    world.refuse_in = Some(refuse_in);
    let set = engine.insert(&mut world, gpa, mechanism);
    world.refuse_in = None;
    if let Ok(breakpoint) = set {
        engine.remove(&mut world, breakpoint).unwrap();
    }
    assert_eq!(engine.breakpoints(), []);
    engine.finish(&mut world).unwrap();
    world.check_left();
}

fn insert(engine: &mut Engine, world: &mut World, sites: &[Gpa], palette: &[Mechanism], site: u8, mechanism: u8) {
    let gpa = sites[usize::from(site) % sites.len()];
    let mechanism = palette[usize::from(mechanism) % palette.len()];
    match engine.insert(world, gpa, mechanism) {
        Ok(breakpoint) => world.subscribed(breakpoint, mechanism.placement()),
        Err(Error::PageConflict(at) | Error::StepOverConflict(at) | Error::NotGivenBack(at)) => {
            assert!(at == gpa && palette.len() > 1)
        }
        Err(Error::WatchConflict(gfn)) => assert!(gfn == gpa.gfn() && mechanism.placement() == Placement::InPlace),
        Err(error) => panic!("{error}"),
    }
}

fn watch(engine: &mut Engine, world: &mut World, page: u8, what: u8) {
    let frames: Vec<Gfn> = world.twin.frames().collect();
    let gfn = frames[usize::from(page) % frames.len()];
    let [read, write, execute, after] = [1, 2, 4, 8].map(|bit| what & bit != 0);
    let accesses = Accesses { read, write, execute };
    match engine.watch(world, gfn, accesses, after) {
        Ok(()) => world.watched(gfn, accesses, after),
        Err(Error::WatchConflict(at)) => assert!(at == gfn && execute),
        Err(error) => panic!("{error}"),
    }
}

fn remove(engine: &mut Engine, world: &mut World, which: u8) {
    let subscribers: Vec<BreakpointId> = world.subscribers().collect();
    if !subscribers.is_empty() {
        let breakpoint = subscribers[usize::from(which) % subscribers.len()];
        world.unsubscribed(breakpoint);
        engine.remove(world, breakpoint).unwrap();
    }
}

//! What costs grow with: calls of the hypervisor, and instructions, not time. Of twice as many things, each may cost twice as
//! much, and a little more where something is sorted.
//!
//! Instructions are counted by valgrind, in which this program runs itself once more. Without valgrind, calls alone are.

use std::process::Command;

use hyperbp::{BreakpointId, Engine, Event, Gfn, Gpa, Int3, Mechanism, Reason, Registers, VcpuId, Verdict};

use crate::machine::{CODE, Machine};

const AT: Gpa = Gpa(CODE.0 << 12 | 0x10);
/// Of twice as many.
const MORE: f64 = 2.4;

/// An engine with breakpoints.
struct Scene {
    machine: Machine,
    engine: Engine,
    ids: Vec<BreakpointId>,
}

impl Scene {
    fn new(vcpus: u16, pages: u64, at: impl Iterator<Item = Gpa>) -> Self {
        let mut machine = Machine::new(pages);
        machine.vcpus = vcpus;
        let mut engine = Engine::new(&machine);
        engine.enter(&mut machine).unwrap();
        let ids = at.map(|gpa| engine.insert(&mut machine, gpa, Mechanism::AUTO).unwrap()).collect();
        Self { machine, engine, ids }
    }

    /// A breakpoint in each page.
    fn pages(vcpus: u16, pages: u64) -> Self {
        Self::new(vcpus, pages, (0..pages).map(|page| Gfn(CODE.0 + page).at(0x10)))
    }

    /// So many subscribers of one breakpoint.
    fn subscribers(subscribers: u64) -> Self {
        Self::new(1, 1, (0..subscribers).map(|_| AT))
    }

    fn hit(&mut self, vcpu: u16, verdict: Verdict) -> u64 {
        let registers = Registers::default().with(|new| {
            new.rip = AT.0;
            new.rflags = 2;
        });
        let reason = Reason::Int3(Int3::new(AT, 1));
        // The execute view is made first.
        let event = Event::new(VcpuId(vcpu), hyperbp::ViewId(1), registers, reason);
        let mut told = 0;
        _ = self.engine.handle(&mut self.machine, &event, &mut |_, _, _| {
            told += 1;
            verdict
        });
        told
    }

    fn remove_all(&mut self) {
        for id in &self.ids {
            self.engine.remove(&mut self.machine, *id).unwrap();
        }
    }
}

/// Which work, and how many of what it is done with.
const WORK: &str = "HYPERBP_TEST_WORK";
const NUMBER: &str = "HYPERBP_TEST_NUMBER";

/// Something whose costs may grow with a number, and no more than that.
struct Case {
    what: &'static str,
    n: u64,
    scene: fn(u64) -> Scene,
    work: fn(&mut Scene),
}

/// The virtual CPU does not go on, and so no page is given back.
fn held(pages: u64) -> Scene {
    let mut scene = Scene::pages(2, pages);
    scene.machine.rips.insert(VcpuId(0), AT.0);
    scene.hit(0, Verdict::Keep);
    scene
}

/// Pages are given back with the next event.
fn vacant(pages: u64) -> Scene {
    let mut scene = held(pages);
    scene.remove_all();
    scene.machine.rips.clear();
    scene
}

const CASES: &[Case] = &[
    Case { what: "a hit", n: 300, scene: Scene::subscribers, work: |scene| _ = scene.hit(0, Verdict::Keep) },
    Case {
        what: "a hit that all leave at",
        n: 1000,
        scene: Scene::subscribers,
        work: |scene| {
            assert_eq!(scene.hit(0, Verdict::Remove), scene.ids.len() as u64);
        },
    },
    Case { what: "removing subscribers", n: 300, scene: Scene::subscribers, work: Scene::remove_all },
    Case {
        what: "removing the last subscriber first",
        n: 1000,
        scene: Scene::subscribers,
        work: |scene| {
            scene.ids.reverse();
            scene.remove_all();
        },
    },
    Case { what: "removing pages", n: 60, scene: |pages| Scene::pages(2, pages), work: Scene::remove_all },
    Case { what: "removing pages that are not given back", n: 60, scene: held, work: Scene::remove_all },
    Case { what: "giving pages back", n: 60, scene: vacant, work: |scene| assert_eq!(scene.hit(1, Verdict::Keep), 0) },
    Case {
        what: "leaving",
        n: 500,
        scene: |pages| Scene::pages(2, pages),
        work: |scene| {
            scene.engine.leave(&mut scene.machine).unwrap();
            assert_eq!(scene.engine.page_count(), 0);
        },
    },
    // As many virtual CPUs as pages: none is looked at for each page.
    Case {
        what: "leaving with many virtual CPUs",
        n: 1000,
        scene: |n| Scene::pages(n as u16, n),
        work: |scene| {
            scene.engine.leave(&mut scene.machine).unwrap();
        },
    },
    Case {
        what: "listing",
        n: 1000,
        scene: Scene::subscribers,
        work: |scene| {
            assert_eq!(scene.engine.breakpoints(), scene.ids);
        },
    },
    Case {
        what: "a round of verify",
        n: 100,
        scene: |pages| Scene::pages(2, pages),
        work: |scene| {
            assert_eq!(scene.engine.verify(&mut scene.machine, usize::MAX).unwrap(), 0);
        },
    },
];

/// What is run in valgrind: the case of this number.
#[test]
#[ignore = "run by the test of instructions"]
fn one_case() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let (Some(case), Some(n)) = (number(WORK), number(NUMBER)) {
        let case = &CASES[case as usize];
        (case.work)(&mut (case.scene)(n));
    }
}

/// How many instructions a case takes, if there is valgrind.
fn instructions(case: usize, n: u64) -> Option<u64> {
    let this = std::env::current_exe().unwrap();
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(this)
        .args(["--ignored", "--exact", "costs::one_case"])
        .env(WORK, case.to_string())
        .env(NUMBER, n.to_string())
        .output()
        .ok()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", CASES[case].what);
    said.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok())
}

/// `cargo test -p hyperbp --test engine -- --ignored instructions`
#[test]
#[ignore = "takes a minute in valgrind"]
fn instructions_grow_with_the_number_of_things() {
    for (number, case) in CASES.iter().enumerate() {
        // What the program itself costs is taken off.
        let of = |n| instructions(number, n).map(|count| count as f64);
        let (Some(none), Some(once), Some(twice)) = (of(1), of(case.n), of(2 * case.n)) else {
            println!("skipped: there is no valgrind");
            return;
        };
        let (once, twice) = (once - none, twice - none);
        println!("{}: {once} instructions of {}, {twice} of twice as many", case.what, case.n);
        assert!(twice <= once * MORE, "{}: {once} instructions of {}, {twice} of twice as many", case.what, case.n);
    }
}

#[test]
fn calls_grow_with_the_number_of_things() {
    for case in CASES {
        let of = |n| {
            let mut scene = (case.scene)(n);
            let before = scene.machine.calls;
            (case.work)(&mut scene);
            scene.machine.calls - before
        };
        let (once, twice) = (of(100), of(200));
        assert!(twice <= 2 * once + 10, "{}: {once} calls of 100, {twice} of 200", case.what);
    }
}

/// A hundred thousand pages: as many calls for the last as for the first.
#[test]
fn the_last_of_many_pages_costs_as_many_calls_as_the_first() {
    const PAGES: u64 = 100_000;
    let mut scene = Scene::new(2, 1, std::iter::empty());
    let mut calls = Vec::new();
    scene.machine.endless = Some(0x1000_0000);
    for page in 0..PAGES {
        let before = scene.machine.calls;
        scene.engine.insert(&mut scene.machine, Gfn(CODE.0 + page).at(0x10), Mechanism::AUTO).unwrap();
        calls.push(scene.machine.calls - before);
    }
    assert_eq!(calls[1], calls[PAGES as usize - 1]);
    assert_eq!(scene.engine.breakpoints().len(), PAGES as usize);
    let before = scene.machine.calls;
    scene.engine.leave(&mut scene.machine).unwrap();
    let leaving = scene.machine.calls - before;
    assert!(leaving <= PAGES * calls[1], "{leaving} calls");
    assert_eq!(scene.engine.page_count(), 0);
}

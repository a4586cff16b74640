//! The engine against a model: virtual CPUs that run random programs, in random order, while breakpoints come and go.
//!
//! What is checked is what must hold whatever the mechanism: every execution is reported once; the guest's state is that of
//! a guest without breakpoints; what it reads, too, and what it writes is kept; its own INT3s arrive; and after leaving, or
//! after the monitor was killed and the domain recovered, the guest runs on, unmodified.
//!
//! `PROPTEST_CASES` says how many scripts to try of each kind.

mod cases;
mod counts;
mod cpu;
mod guest;
mod machine;
mod script;
mod world;

use hyperbp::{Mechanism, Placement};
use proptest::prelude::*;
use proptest::sample::Index;

use script::script;

/// Scripts of each kind, unless the environment says otherwise.
const CASES: u32 = 100;

fn config() -> ProptestConfig {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => ProptestConfig::default(),
        None => ProptestConfig::with_cases(CASES),
    }
}

/// Mechanisms that may be used together in a script.
fn palette(of: impl Fn(&Mechanism) -> bool, size: usize) -> impl Strategy<Value = Vec<Mechanism>> {
    prop::collection::vec(prop::sample::select(Mechanism::all().filter(of).collect::<Vec<_>>()), 1..=size)
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn one_virtual_cpu_never_notices(script in script(1, palette(|_| true, 1))) {
        script.run();
    }

    #[test]
    fn mechanisms_do_not_disturb_each_other(script in script(1, palette(|_| true, 4))) {
        script.run();
    }

    #[test]
    fn several_virtual_cpus_lose_no_hit(script in script(3, palette(|mechanism| mechanism.placement() == Placement::Shadow, 3))) {
        script.run();
    }

    #[test]
    fn several_virtual_cpus_never_notice(script in script(2, palette(|_| true, 3))) {
        script.run();
    }

    #[test]
    fn what_cannot_be_set_leaves_nothing(
        recipe in guest::recipe(1),
        mechanism in prop::sample::select(Mechanism::all().collect::<Vec<_>>()),
        site in any::<Index>(),
        refuse_in in 0..40_u32,
        meanwhile in prop::collection::vec(0..2_u8, 0..60),
    ) {
        script::refuse(&recipe, mechanism, &site, refuse_in, meanwhile);
    }
}

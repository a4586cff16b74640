//! The three choices a breakpoint is made of, and the names of the usual combinations.

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// Where the 0xCC lies. One choice for all breakpoints of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Placement {
    /// In the guest's own page, and so in every view.
    InPlace,
    /// In a copy of the page that one view shows in its place, execute-only. Needs altp2m.
    Shadow,
}

/// How the displaced instruction runs after a hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StepOver {
    /// Write the byte back, single-step, write 0xCC again. Other virtual CPUs run through meanwhile, unnoticed.
    Repair,
    /// Switch this virtual CPU to a view with the guest's own pages, single-step, switch back.
    ViewStep,
    /// The same with one event instead of two: the hypervisor switches back by itself (fast single-step).
    ViewFastStep,
    /// Let the hypervisor emulate the instruction. One that it cannot emulate, or not rightly, is stepped.
    Emulate,
    /// Compute what the instruction does, and answer with registers: no step and no emulator. One that is not certain to
    /// be done exactly is stepped.
    Interpret,
    /// The cheapest of the others that is certainly right for the instruction at hand: interpret, else emulate, else
    /// step.
    Auto,
}

impl StepOver {
    /// Whether each hit is stepped over.
    pub(crate) const fn steps(self) -> bool {
        matches!(self, Self::Repair | Self::ViewStep | Self::ViewFastStep)
    }
}

/// What a read of a page with breakpoints gets. One choice for all breakpoints of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Conceal {
    /// The instruction that reads is single-stepped in a view with the guest's own pages.
    ViewStep,
    /// The same with one event instead of two.
    ViewFastStep,
    /// The hypervisor emulates the instruction that reads, on the guest's own pages.
    Emulate,
    /// The hypervisor emulates it, with data of ours. Where that cannot be right (see the `conceal` module), the
    /// instruction is stepped instead.
    Data,
}

/// How a breakpoint works: a [`Placement`], a [`StepOver`] and a [`Conceal`] that fit together.
///
/// ```
/// use hyperbp::{Conceal, Mechanism, Placement, StepOver};
///
/// let usual: Mechanism = "view-fast-step".parse()?;
/// let spelled: Mechanism = "shadow+view-fast-step+view-fast-step".parse()?;
/// assert_eq!(usual, spelled);
/// assert!(Mechanism::new(Placement::InPlace, StepOver::ViewStep, Conceal::Data).is_err());
/// # Ok::<(), hyperbp::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mechanism {
    placement: Placement,
    step_over: StepOver,
    conceal: Conceal,
}

impl Mechanism {
    /// The papers' "instruction repair": in-place, repair, data.
    pub const REPAIR: Self = Self::of(Placement::InPlace, StepOver::Repair, Conceal::Data);
    /// The papers' "EPT switching": shadow, view-step, view-step.
    pub const VIEW_STEP: Self = Self::of(Placement::Shadow, StepOver::ViewStep, Conceal::ViewStep);
    /// The papers' "EPT switching with FSS": shadow, view-fast-step, view-fast-step.
    pub const VIEW_FAST_STEP: Self = Self::of(Placement::Shadow, StepOver::ViewFastStep, Conceal::ViewFastStep);
    /// The papers' "instruction emulation", with the cheapest concealment: shadow, emulate, view-fast-step.
    pub const EMULATE: Self = Self::of(Placement::Shadow, StepOver::Emulate, Conceal::ViewFastStep);

    /// Shadow, interpret, view-fast-step.
    pub const INTERPRET: Self = Self::of(Placement::Shadow, StepOver::Interpret, Conceal::ViewFastStep);
    /// Shadow, auto, view-fast-step: what to use unless there is a reason not to.
    pub const AUTO: Self = Self::of(Placement::Shadow, StepOver::Auto, Conceal::ViewFastStep);

    /// The combinations that have a name of their own, and their names.
    pub const NAMED: [(&'static str, Self); 6] = [
        ("auto", Self::AUTO),
        ("repair", Self::REPAIR),
        ("view-step", Self::VIEW_STEP),
        ("view-fast-step", Self::VIEW_FAST_STEP),
        ("emulate", Self::EMULATE),
        ("interpret", Self::INTERPRET),
    ];

    const fn of(placement: Placement, step_over: StepOver, conceal: Conceal) -> Self {
        Self { placement, step_over, conceal }
    }

    /// Puts three choices together.
    ///
    /// # Errors
    /// [`Error::Combination`] if they cannot work together: an in-place breakpoint is in every view, so switching views
    /// neither steps over it nor hides it, and emulated reads would see it.
    pub fn new(placement: Placement, step_over: StepOver, conceal: Conceal) -> Result<Self, Error> {
        let reason = match (placement, step_over, conceal) {
            (Placement::InPlace, StepOver::ViewStep | StepOver::ViewFastStep, _) => {
                "an in-place breakpoint is in every view, so no view lets the instruction run: use the placement shadow"
            }
            (Placement::InPlace, _, Conceal::ViewStep | Conceal::ViewFastStep | Conceal::Emulate) => {
                "an in-place breakpoint is in every view, so a read sees it there: use the concealment data"
            }
            (Placement::Shadow, StepOver::Repair, _) => {
                "with a shadow page there is no need to repair the guest's own: use another step-over"
            }
            _ => return Ok(Self::of(placement, step_over, conceal)),
        };
        Err(Error::Combination(reason))
    }

    /// Every combination that works.
    pub fn all() -> impl Iterator<Item = Self> {
        let choices = PLACEMENTS.into_iter().flat_map(|placement| {
            STEP_OVERS
                .into_iter()
                .flat_map(move |step| CONCEALS.into_iter().map(move |conceal| (placement, step, conceal)))
        });
        choices
            .filter_map(|((_, placement), (_, step_over), (_, conceal))| Self::new(placement, step_over, conceal).ok())
    }

    /// Whether it counts every hit when several virtual CPUs execute the same code. With [`StepOver::Repair`] the others
    /// run through while the byte is back. That is also how an in-place breakpoint of another kind steps over an
    /// instruction that it can neither interpret nor have emulated: for such an instruction, use [`Placement::Shadow`].
    #[must_use]
    pub const fn counts_on_several_vcpus(self) -> bool {
        !matches!(self.step_over, StepOver::Repair)
    }

    /// Where the 0xCC lies.
    #[must_use]
    pub const fn placement(self) -> Placement {
        self.placement
    }

    /// How the displaced instruction runs.
    #[must_use]
    pub const fn step_over(self) -> StepOver {
        self.step_over
    }

    /// What a read gets.
    #[must_use]
    pub const fn conceal(self) -> Conceal {
        self.conceal
    }
}

/// [`AUTO`](Mechanism::AUTO).
impl Default for Mechanism {
    fn default() -> Self {
        Self::AUTO
    }
}

/// The name of the combination if it has one, else `placement+step-over+concealment`.
impl fmt::Display for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::NAMED.iter().find(|(_, mechanism)| mechanism == self) {
            Some((name, _)) => f.write_str(name),
            None => {
                let placement = name_of(&PLACEMENTS, self.placement);
                let (step_over, conceal) = (name_of(&STEP_OVERS, self.step_over), name_of(&CONCEALS, self.conceal));
                write!(f, "{placement}+{step_over}+{conceal}")
            }
        }
    }
}

impl FromStr for Mechanism {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if let Some((_, mechanism)) = Self::NAMED.iter().find(|(name, _)| *name == text) {
            return Ok(*mechanism);
        }
        let unknown = || Error::UnknownMechanism(text.to_owned());
        let mut parts = text.split('+');
        let mut next = || parts.next().ok_or_else(unknown);
        let (placement, step_over, conceal) = (next()?, next()?, next()?);
        if parts.next().is_some() {
            return Err(unknown());
        }
        Self::new(
            by_name(&PLACEMENTS, placement).ok_or_else(unknown)?,
            by_name(&STEP_OVERS, step_over).ok_or_else(unknown)?,
            by_name(&CONCEALS, conceal).ok_or_else(unknown)?,
        )
    }
}

const PLACEMENTS: [(&str, Placement); 2] = [("in-place", Placement::InPlace), ("shadow", Placement::Shadow)];

const STEP_OVERS: [(&str, StepOver); 6] = [
    ("repair", StepOver::Repair),
    ("view-step", StepOver::ViewStep),
    ("view-fast-step", StepOver::ViewFastStep),
    ("emulate", StepOver::Emulate),
    ("interpret", StepOver::Interpret),
    ("auto", StepOver::Auto),
];

const CONCEALS: [(&str, Conceal); 4] = [
    ("view-step", Conceal::ViewStep),
    ("view-fast-step", Conceal::ViewFastStep),
    ("emulate", Conceal::Emulate),
    ("data", Conceal::Data),
];

fn by_name<T: Copy>(names: &[(&str, T)], name: &str) -> Option<T> {
    names.iter().find(|(known, _)| *known == name).map(|(_, choice)| *choice)
}

fn name_of<T: PartialEq>(names: &[(&'static str, T)], choice: T) -> &'static str {
    names.iter().find(|(_, known)| *known == choice).map_or("?", |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_is_either_refused_with_a_reason_or_reads_back() {
        let mut valid = 0;
        for (_, placement) in PLACEMENTS {
            for (_, step_over) in STEP_OVERS {
                for (_, conceal) in CONCEALS {
                    match Mechanism::new(placement, step_over, conceal) {
                        Ok(mechanism) => {
                            assert_eq!(mechanism.to_string().parse::<Mechanism>().unwrap(), mechanism);
                            valid += 1;
                        }
                        Err(error) => assert!(error.to_string().contains(": use "), "{error}"),
                    }
                }
            }
        }
        assert_eq!(valid, 4 + 20);
        assert_eq!(Mechanism::all().count(), valid);
    }

    #[test]
    fn the_named_ones_are_valid() {
        for (name, mechanism) in Mechanism::NAMED {
            let again = Mechanism::new(mechanism.placement(), mechanism.step_over(), mechanism.conceal()).unwrap();
            assert_eq!(again.to_string(), name);
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        for text in ["", "ept", "shadow", "shadow+emulate", "shadow+emulate+data+data", "shadow+skip+data"] {
            let error = text.parse::<Mechanism>().unwrap_err().to_string();
            assert!(error.contains("view-fast-step") && error.contains("repair"), "{error}");
        }
    }
}

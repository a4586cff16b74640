//! Routes events to breakpoints, and knows what each virtual CPU is in the middle of.

mod access;
mod answer;
mod failure;
mod hit;
mod int3;
mod observed;
mod presence;
mod resync;
mod setting;
mod settled;
mod stepped;
mod watching;

use std::collections::BTreeMap;

use iced_x86::InstructionInfoFactory;

use self::hit::Met;
pub use self::observed::{Hit, Observed, Verdict};
use crate::breakpoint::{BreakpointId, Page, Registry};
use crate::stats::HandlingTime;
use crate::step::Vcpu;
use crate::views::Views;
use crate::{Counters, Error, Figures, Gfn, Hypervisor, VcpuId};

/// How many pages without breakpoints are left as they are while nothing else gives an occasion.
const VACANT: usize = 16;

/// The breakpoints of one domain.
///
/// The engine owns no connection: each call is given it. All calls must be given the same.
///
/// An event is answered in two halves: [`begin`](Self::begin) says what it is, and once the host has told whom it concerns,
/// [`end`](Self::end) says what to do. Between them the host may call what it likes. [`handle`](Self::handle) is both, with a
/// closure between them.
///
/// - A breakpoint is at a guest-physical address, and stays there: if the guest writes a new instruction to it, it is set
///   on that one ([`Figures::rewritten`] counts), and if the guest frees the page and uses it for something else, it is a
///   breakpoint in that. If it puts another page there (ballooning), the breakpoint is set in that one before it is executed.
/// - What a device, or another domain, writes to the page is no event: [`verify`](Self::verify) finds it.
/// - Several may subscribe to the same instruction. Each is told of every hit, in the order they came.
/// - An instruction that faults and is run again by the guest (a page fault, say) is a hit each time.
///
/// To leave a domain: [`leave`](Self::leave), go on handling the events that are still queued, and leave again, until
/// [`is_idle`](Self::is_idle), then [`finish`](Self::finish).
#[derive(Debug)]
pub struct Engine {
    registry: Registry,
    vcpus: Vec<Vcpu>,
    /// Made with the first shadow.
    views: Option<Views>,
    /// Pages whose last breakpoint is gone, but that the hypervisor has refused to make the guest's own again.
    unclosed: BTreeMap<Gfn, Page>,
    /// Pages whose last breakpoint was gone when they could not be [given back](Self::is_settled), and that are to be after
    /// an event.
    vacant: Vec<Gfn>,
    /// All is to be [set up again](Self::resync) after an event.
    resync_pending: bool,
    /// Virtual CPUs that may still have [to go on](Self::is_settled) with what they were answered.
    pending: Vec<VcpuId>,
    /// How often views have let go of pages.
    unmappings_noted: u64,
    /// Zero if nothing is to be done after an event. [`VACANT`] or more if that is to be soon.
    chores: usize,
    /// The number of the page that is to be [compared](Self::verify) next.
    verified: usize,
    /// Between the two halves of an event.
    telling: bool,
    factory: InstructionInfoFactory,
    counters: Counters,
    handling: HandlingTime,
    /// When the last hit began.
    hit_at: u64,
    /// The last breakpoint that was met between the two halves of an event.
    met: Option<Met>,
    leaving: bool,
    /// Pages that the guest gets cannot be executed without an event.
    traps_new_pages: bool,
    trust_event_dr7: bool,
}

impl Engine {
    /// An engine without breakpoints. Nothing is done to the domain.
    pub fn new<H: Hypervisor>(hv: &H) -> Self {
        Self {
            registry: Registry::default(),
            vcpus: vec![Vcpu::at_home(true); usize::from(hv.vcpus())],
            views: None,
            unclosed: BTreeMap::new(),
            vacant: Vec::new(),
            resync_pending: false,
            pending: Vec::with_capacity(usize::from(hv.vcpus())),
            unmappings_noted: 0,
            chores: 0,
            verified: 0,
            telling: false,
            factory: InstructionInfoFactory::new(),
            counters: Counters::default(),
            handling: HandlingTime::new(),
            hit_at: 0,
            met: None,
            leaving: false,
            traps_new_pages: false,
            trust_event_dr7: false,
        }
    }

    /// Whether the DR7 of an event is taken for the current one, instead of asking
    /// [`Hypervisor::debug_control`](crate::Hypervisor::debug_control) before memory is accessed without the CPU. It is not,
    /// unless the host says so here.
    ///
    /// It saves a hypercall, or a step, at each hit of an instruction that accesses memory. The price: a guest that sets a
    /// data breakpoint and meets one of ours before Xen switches its virtual CPU out gets no #DB for what that instruction
    /// accesses. So it can tell that there is a breakpoint.
    pub fn trust_event_dr7(&mut self, trust: bool) {
        self.trust_event_dr7 = trust;
    }

    /// All breakpoints, by address.
    #[must_use]
    pub fn breakpoints(&self) -> Vec<BreakpointId> {
        self.registry.ids()
    }

    /// What a breakpoint has done. Those who share it share its figures.
    ///
    /// # Errors
    /// If there is no such breakpoint.
    pub fn figures(&self, id: BreakpointId) -> Result<Figures, Error> {
        Ok(self.registry.get(id)?.1.figures)
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// How long handling a hit took so far, `on_hit` included, in units of [`Hypervisor::now`].
    #[must_use]
    pub fn handling_time(&self) -> HandlingTime {
        self.handling.clone()
    }
}

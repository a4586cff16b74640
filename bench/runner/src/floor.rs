//! What a mechanism costs at the least: a bare, hard-coded loop with one breakpoint and nothing around it.
//!
//! The engine is measured against this. It does not serve several breakpoints, and keeps no guest writes to the page
//! apart from the original bytes; the workloads need neither.

use hyperbp::{Gfn, Gpa, Hypervisor, PAGE_SIZE, Rights, VcpuId, ViewId};
use hyperbp_xen_sys as sys;

use crate::core::Idle;
use crate::ring::{self, Monitor, PATIENCE, Request, Response};
use crate::xen::{Domain, Error, Page};

/// INT3.
const INT3: u8 = 0xcc;

/// How the loop steps over the displaced instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FloorMechanism {
    /// In place, not concealed; RIP is set past the instruction, which must be a one-byte NOP.
    Skip,
    /// In place; the byte is put back for a single-step. A read gets the original bytes.
    Repair,
    /// On a shadow page; a single-step, and a read, in the host view.
    ViewStep,
    /// The same with fast single-steps.
    ViewFastStep,
    /// On a shadow page; Xen emulates the original instruction. A read is a fast single-step in the host view.
    Emulate,
}

impl FloorMechanism {
    /// All of them.
    pub(crate) const ALL: [Self; 5] = [Self::Skip, Self::Repair, Self::ViewStep, Self::ViewFastStep, Self::Emulate];

    /// The core's name for it, and `skip`.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Skip => "skip",
            Self::Repair => "repair",
            Self::ViewStep => "view-step",
            Self::ViewFastStep => "view-fast-step",
            Self::Emulate => "emulate",
        }
    }

    const fn in_place(self) -> bool {
        matches!(self, Self::Skip | Self::Repair)
    }
}

/// What happened in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// INT3s of the breakpoint.
    pub hits: u64,
    /// INT3s of the guest's own, all delivered to it.
    pub own_int3s: u64,
    /// Single-steps that were reported.
    pub steps: u64,
    /// Accesses that were denied.
    pub accesses: u64,
}

/// Sets a breakpoint at `gpa`, serves it as long as `idle` says, and removes it.
///
/// # Errors
/// If Xen refuses something; the domain is left as far as it lets us.
pub(crate) fn run(
    domain: &mut Domain,
    monitor: &mut Monitor,
    mechanism: FloorMechanism,
    gpa: u64,
    idle: &mut Idle<'_>,
) -> Result<Counts, Error> {
    let mut floor = Floor::set(domain, mechanism, Gpa(gpa))?;
    let served = floor.serve(domain, monitor, idle);
    // Also after a failure: the guest is to be left as it was.
    let removed = floor.remove(domain, monitor);
    served.and(removed).map(|()| floor.counts)
}

/// The breakpoint, as long as it is set.
struct Floor {
    mechanism: FloorMechanism,
    gpa: Gpa,
    /// The guest's own page.
    page: Page,
    /// The instruction's first byte.
    original: u8,
    /// Its bytes, as many as Xen's emulator wants.
    instruction: [u8; hyperbp::INSTRUCTION_BYTES],
    /// The view with the shadow page, or the host view.
    view: ViewId,
    shadow: Option<Gfn>,
    /// Virtual CPUs in a reported single-step.
    stepping: u32,
    counts: Counts,
}

impl Floor {
    fn set(domain: &mut Domain, mechanism: FloorMechanism, gpa: Gpa) -> Result<Self, Error> {
        let page = domain.map_page(gpa.gfn())?;
        let mut bytes = [0; PAGE_SIZE];
        page.read(0, &mut bytes);
        let at = usize::from(gpa.offset());
        let mut instruction = [0; hyperbp::INSTRUCTION_BYTES];
        let length = instruction.len().min(PAGE_SIZE - at);
        instruction[..length].copy_from_slice(&bytes[at..at + length]);
        let mut floor = Self {
            mechanism,
            gpa,
            page,
            original: bytes[at],
            instruction,
            view: ViewId::HOST,
            shadow: None,
            stepping: 0,
            counts: Counts::default(),
        };
        if !mechanism.in_place() {
            let shadow = domain.add_shadow_gfn()?;
            floor.shadow = Some(shadow);
            bytes[at] = INT3;
            domain.write(shadow.at(0), &bytes)?;
            floor.view = domain.create_view()?;
            domain.remap(floor.view, gpa.gfn(), Some(shadow))?;
        }
        if mechanism != FloorMechanism::Skip {
            domain.set_rights(floor.view, gpa.gfn(), Rights::Execute)?;
        }
        if mechanism.in_place() {
            floor.page.write(at, &[INT3]);
        } else {
            domain.switch_view(floor.view)?;
        }
        Ok(floor)
    }

    fn serve(&mut self, domain: &mut Domain, monitor: &mut Monitor, idle: &mut Idle<'_>) -> Result<(), Error> {
        // A step in flight is waited for: after it the virtual CPU is where it belongs.
        while idle().is_some() || self.stepping > 0 {
            monitor.sleep(PATIENCE)?;
            let mut any = false;
            while let Some(request) = monitor.next() {
                let response = self.handle(domain, &request)?;
                monitor.respond(&response);
                any = true;
            }
            if any {
                monitor.notify()?;
            }
        }
        Ok(())
    }

    fn handle(&mut self, domain: &mut Domain, request: &Request) -> Result<Response, Error> {
        let mut response = ring::plain_response(request);
        match request.reason {
            sys::VM_EVENT_REASON_SOFTWARE_BREAKPOINT => {
                let int3 = ring::int3_of(request);
                if int3.gpa == self.gpa {
                    self.counts.hits += 1;
                    self.step_over(request, &mut response);
                } else {
                    self.counts.own_int3s += 1;
                    domain.inject_int3(ring::vcpu_of(request), int3.length);
                }
            }
            sys::VM_EVENT_REASON_SINGLESTEP => {
                self.counts.steps += 1;
                self.stepping = self.stepping.saturating_sub(1);
                if self.mechanism == FloorMechanism::Repair {
                    self.put(INT3);
                } else {
                    in_view(&mut response, self.view);
                }
                response.flags |= sys::VM_EVENT_FLAG_TOGGLE_SINGLESTEP;
            }
            sys::VM_EVENT_REASON_MEM_ACCESS => {
                self.counts.accesses += 1;
                self.conceal(request, &mut response);
            }
            _ => {}
        }
        Ok(response)
    }

    /// Answers a hit.
    fn step_over(&mut self, request: &Request, response: &mut Response) {
        match self.mechanism {
            FloorMechanism::Skip => {
                response.flags |= sys::VM_EVENT_FLAG_SET_REGISTERS;
                let mut registers = *ring::x86_of(request);
                registers.rip += 1;
                response.data.regs.x86 = registers;
            }
            FloorMechanism::Repair => {
                self.put(self.original);
                self.step(response);
            }
            FloorMechanism::ViewStep => self.step_in_host(response),
            FloorMechanism::ViewFastStep => self.fast_step_in_host(response),
            FloorMechanism::Emulate => {
                response.flags |= sys::VM_EVENT_FLAG_EMULATE | sys::VM_EVENT_FLAG_SET_EMUL_INSN_DATA;
                response.data.emul.insn.data = self.instruction;
            }
        }
    }

    /// Answers a read of the page.
    fn conceal(&mut self, request: &Request, response: &mut Response) {
        match self.mechanism {
            FloorMechanism::Skip => {}
            FloorMechanism::Repair => {
                // SAFETY: plain numbers: any bits are valid.
                let offset = (unsafe { request.u.mem_access.offset } & 0xfff) as usize;
                let mut bytes = [0; hyperbp::READ_BYTES];
                let bytes = &mut bytes[..hyperbp::READ_BYTES.min(PAGE_SIZE - offset)];
                self.page.read(offset, bytes);
                if let Some(byte) = usize::from(self.gpa.offset()).checked_sub(offset).and_then(|i| bytes.get_mut(i)) {
                    *byte = self.original;
                }
                ring::emulate_read(response, bytes);
            }
            FloorMechanism::ViewStep => self.step_in_host(response),
            FloorMechanism::ViewFastStep | FloorMechanism::Emulate => self.fast_step_in_host(response),
        }
    }

    fn step(&mut self, response: &mut Response) {
        self.stepping += 1;
        response.flags |= sys::VM_EVENT_FLAG_TOGGLE_SINGLESTEP;
    }

    fn step_in_host(&mut self, response: &mut Response) {
        in_view(response, ViewId::HOST);
        self.step(response);
    }

    fn fast_step_in_host(&self, response: &mut Response) {
        in_view(response, ViewId::HOST);
        response.flags |= sys::VM_EVENT_FLAG_FAST_SINGLESTEP;
        response.u.fast_singlestep.p2midx = self.view.0;
    }

    /// Writes the byte under the breakpoint, in the guest's own page.
    fn put(&self, byte: u8) {
        self.page.write(self.gpa.offset().into(), &[byte]);
    }

    fn remove(&mut self, domain: &mut Domain, monitor: &mut Monitor) -> Result<(), Error> {
        domain.pause()?;
        let removed = self.take_out(domain, monitor);
        domain.resume()?;
        removed
    }

    /// Undoes [`set`](Self::set) while the domain is paused.
    fn take_out(&mut self, domain: &mut Domain, monitor: &mut Monitor) -> Result<(), Error> {
        if self.mechanism.in_place() {
            self.put(self.original);
        }
        if self.mechanism != FloorMechanism::Skip {
            domain.set_rights(self.view, self.gpa.gfn(), Rights::All)?;
        }
        if self.view != ViewId::HOST {
            // A fast step that is not over would end in the view that goes.
            for vcpu in 0..domain.vcpus() {
                domain.stop_step(VcpuId(vcpu))?;
            }
            domain.switch_view(ViewId::HOST)?;
        }
        // What is in the ring happened before: without the breakpoint it goes well when it is tried again.
        let mut any = false;
        while let Some(request) = monitor.next() {
            let mut response = ring::plain_response(&request);
            if request.reason == sys::VM_EVENT_REASON_SOFTWARE_BREAKPOINT {
                let int3 = ring::int3_of(&request);
                if int3.gpa != self.gpa {
                    self.counts.own_int3s += 1;
                    domain.inject_int3(ring::vcpu_of(&request), int3.length);
                }
            } else if request.reason == sys::VM_EVENT_REASON_SINGLESTEP && self.mechanism == FloorMechanism::Repair {
                response.flags |= sys::VM_EVENT_FLAG_TOGGLE_SINGLESTEP;
            }
            monitor.respond(&response);
            any = true;
        }
        if any {
            monitor.notify()?;
        }
        if self.view != ViewId::HOST {
            domain.drop_view(self.view)?;
        }
        if let Some(shadow) = self.shadow {
            domain.drop_shadow_gfn(shadow)?;
        }
        Ok(())
    }
}

/// Lets the virtual CPU go on in this view.
fn in_view(response: &mut Response, view: ViewId) {
    response.flags |= sys::VM_EVENT_FLAG_ALTERNATE_P2M;
    response.altp2m_idx = view.0;
}

//! What C++ sees. All of it is plain data, a session, and two classes that C++ implements.
// What cxx generates has its own ways.
#![allow(missing_docs, unreachable_pub, clippy::multiple_unsafe_ops_per_block)]
#![cfg_attr(not(feature = "libvmi"), allow(dead_code))]

use crate::session::{Session, check_mechanism, open, open_libvmi};
use crate::waiter::{Waiter, open_waiter};

#[cxx::bridge(namespace = "hyperbp::ffi")]
pub(crate) mod ffi {
    /// How the CPU decodes instructions.
    #[derive(Debug)]
    enum CodeMode {
        Bits16,
        Bits32,
        Bits64,
    }

    /// The registers a host may change.
    #[derive(Debug)]
    struct General {
        /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: in the order instructions encode them.
        gpr: [u64; 16],
        rip: u64,
        rflags: u64,
    }

    /// The registers of a virtual CPU at an event.
    #[derive(Debug)]
    struct Registers {
        general: General,
        cr0: u64,
        cr3: u64,
        cr4: u64,
        efer: u64,
        dr7: u64,
        /// Base of CS; 0 in 64-bit code.
        cs_base: u64,
        /// 0 to 3: the DPL of SS.
        cpl: u8,
        /// Outside 64-bit code: CS, SS, DS and ES are the flat 4-GiB segments.
        flat: bool,
        mode: CodeMode,
    }

    /// What happened.
    #[derive(Debug)]
    enum Reason {
        /// An INT3 was executed, and not delivered. `gpa` and `length` count.
        Int3,
        /// A monitored single step is over.
        Step,
        /// An access that the view does not permit. `gpa`, `accesses` and `page_walk` count.
        Access,
        /// The hypervisor was told to emulate an instruction and cannot.
        EmulationFailed,
    }

    /// Kinds of accesses.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Accesses {
        read: bool,
        write: bool,
        execute: bool,
    }

    /// Something that happened in the guest.
    #[derive(Debug)]
    struct Event {
        registers: Registers,
        /// Guest-physical: the INT3's first byte, prefixes included, or the first byte of the access in the page.
        gpa: u64,
        vcpu: u16,
        /// The view that virtual CPU runs in.
        view: u16,
        reason: Reason,
        /// Bytes of the INT3.
        length: u8,
        accesses: Accesses,
        /// The access is made by the walk of the guest's page tables.
        page_walk: bool,
    }

    /// What becomes of single-stepping.
    #[derive(Debug)]
    enum Step {
        Keep,
        /// It is off.
        On,
        /// It is on.
        Off,
        /// One instruction, then the hypervisor itself switches to `fast_view`, without an event.
        Fast,
    }

    /// How the interrupted instruction goes on.
    #[derive(Debug)]
    enum Action {
        /// It runs again.
        Resume,
        /// The hypervisor emulates it.
        Emulate,
        /// It emulates it, and what it reads are the first `length` of `bytes`.
        EmulateRead,
        /// It emulates the first 16 of `bytes` in its place.
        EmulateInstruction,
        /// It goes on with `registers`.
        SetRegisters,
        /// It was the guest's own INT3: deliver it.
        Reinject,
    }

    /// What the hypervisor is to do with the virtual CPU that waits: `action`, then `step`, then the view.
    #[derive(Debug)]
    struct Reply {
        /// Only if `action` is `SetRegisters`.
        registers: General,
        /// Only if `action` emulates something.
        bytes: [u8; 64],
        /// The view it is switched to, if `switch_view`.
        view: u16,
        fast_view: u16,
        switch_view: bool,
        step: Step,
        action: Action,
        length: u8,
    }

    /// What an event is.
    #[derive(Debug)]
    enum Kind {
        /// Nobody needs to be told: the reply is there.
        Answered,
        /// The breakpoint at `pa` was hit. Tell whom it concerns, then finish.
        Hit,
        /// A watched page is about to be accessed, at `pa`. Tell whom it concerns, then finish.
        Access,
        /// It has been accessed. Tell whom it concerns, then finish.
        Accessed,
        /// The session has failed; the reply lets the virtual CPU go on.
        Failed,
    }

    /// What an event is, and where.
    #[derive(Debug)]
    struct Observed {
        kind: Kind,
        /// The access is made to fetch the instruction at the breakpoint at `breakpoint_pa`: tell its subscribers, too.
        breakpoint: bool,
        accesses: Accesses,
        pa: u64,
        breakpoint_pa: u64,
    }

    /// What a view permits on a page.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Rights {
        All,
        Execute,
        ReadWrite,
        ReadExecute,
        Read,
        None,
    }

    /// How often what happened since the session was opened, and how long handling a hit took, in nanoseconds.
    #[derive(Debug)]
    struct Counters {
        hits: u64,
        reads: u64,
        writes: u64,
        held: u64,
        discarded: u64,
        resynced: u64,
        rearmed: u64,
        reinjected: u64,
        emulation_failures: u64,
        unexplained: u64,
        failures: u64,
        p50_ns: u64,
        p90_ns: u64,
        p99_ns: u64,
        max_ns: u64,
    }

    /// What a breakpoint has done since it was set.
    #[derive(Debug)]
    struct Figures {
        pa: u64,
        hits: u64,
        repair: u64,
        view_step: u64,
        view_fast_step: u64,
        emulate: u64,
        interpret: u64,
        fallbacks: u64,
        rewritten: u64,
    }

    /// How often it was waited, and whether that has paid: `hyperbp::Waits`.
    #[derive(Debug)]
    struct Waits {
        watched: u64,
        watched_in_vain: u64,
        halted: u64,
        halted_in_vain: u64,
        slept: u64,
    }

    /// How a wait has ended.
    #[derive(Debug)]
    enum Waited {
        Woken,
        TimedOut,
        Interrupted,
    }

    extern "Rust" {
        type Session;

        /// Throws unless there is a mechanism with this name; the message has those there are.
        fn check_mechanism(name: &str) -> Result<()>;

        /// Begins to work on a domain, through a hypervisor of the caller's.
        fn open(hypervisor: UniquePtr<Hypervisor>, mechanism: &str) -> Result<Box<Session>>;

        /// Begins to work on a domain, through LibVMI. Throws if the library was built without it.
        ///
        /// # Safety
        /// `vmi` is an instance of LibVMI, initialised with events, that outlives the session.
        unsafe fn open_libvmi(
            vmi: *mut vmi_instance,
            memory: UniquePtr<Memory>,
            mechanism: &str,
        ) -> Result<Box<Session>>;

        fn leave(self: &Session) -> Result<()>;
        fn close(self: &Session) -> Result<()>;
        fn insert(self: &Session, pa: u64) -> Result<()>;
        fn remove(self: &Session, pa: u64) -> Result<()>;
        fn watch(self: &Session, gfn: u64, accesses: Accesses, after: bool) -> Result<()>;
        /// To be called every 50 ms or so: compares the next 16 pages that have breakpoints with what is known of them, and
        /// sets breakpoints again that are not there any more. Returns how many were not the same.
        fn verify(self: &Session) -> Result<usize>;
        fn begin(self: &Session, event: &Event, reply: &mut Reply) -> Observed;
        fn hits_need_registers(self: &Session) -> bool;
        fn begin_int3(self: &Session, vcpu: u16, view: u16, gpa: u64, rip: u64, reply: &mut Reply) -> Observed;
        fn step(self: &Session, vcpu: u16, reply: &mut Reply) -> bool;
        fn finish(self: &Session, reply: &mut Reply);
        fn finish_with(self: &Session, registers: &General, reply: &mut Reply);
        fn failed(self: &Session) -> bool;
        fn monitor(self: &Session, vcpu: u16, monitored: bool) -> Result<u16>;
        fn monitor_all(self: &Session, monitored: bool) -> Result<()>;
        fn view(self: &Session) -> u16;
        fn mechanism(self: &Session) -> String;
        fn counters(self: &Session) -> Result<Counters>;
        fn breakpoints(self: &Session, into: &mut [Figures]) -> Result<usize>;

        type Waiter;

        /// Begins to wait for the events of a domain: `watch` is in microseconds. Throws if that is too long, or if the library
        /// was built without LibVMI.
        ///
        /// # Safety
        /// `vmi` is an instance of LibVMI, initialised with events, `device` the file of its event channel: both outlive the
        /// waiter.
        unsafe fn open_waiter(vmi: *mut vmi_instance, device: i32, watch: u32, halt: bool) -> Result<Box<Waiter>>;

        fn wait(self: &mut Waiter, timeout: i32) -> Result<Waited>;
        fn stop(self: &mut Waiter) -> Result<()>;
        fn waits(self: &Waiter) -> Waits;
    }

    #[namespace = "hyperbp"]
    unsafe extern "C++" {
        include!("hyperbp/hypervisor.hpp");

        type Hypervisor;
        fn vcpus(self: &Hypervisor) -> Result<u16>;
        fn now(self: &Hypervisor) -> u64;
        fn read(self: Pin<&mut Hypervisor>, gpa: u64, into: &mut [u8]) -> Result<()>;
        fn write(self: Pin<&mut Hypervisor>, gpa: u64, bytes: &[u8]) -> Result<()>;
        fn add_page(self: Pin<&mut Hypervisor>) -> Result<u64>;
        fn drop_page(self: Pin<&mut Hypervisor>, gfn: u64) -> Result<()>;
        fn create_view(self: Pin<&mut Hypervisor>) -> Result<u16>;
        fn switch_view(self: Pin<&mut Hypervisor>, view: u16) -> Result<()>;
        fn drop_view(self: Pin<&mut Hypervisor>, view: u16) -> Result<()>;
        fn remap(self: Pin<&mut Hypervisor>, view: u16, gfn: u64, to: u64) -> Result<()>;
        fn unmap(self: Pin<&mut Hypervisor>, view: u16, gfn: u64) -> Result<()>;
        fn set_rights(self: Pin<&mut Hypervisor>, view: u16, gfn: u64, rights: Rights) -> Result<()>;
        fn write_ram(self: Pin<&mut Hypervisor>, gpa: u64, bytes: &[u8]) -> Result<bool>;
        fn rights(self: Pin<&mut Hypervisor>, view: u16, gfn: u64, into: &mut Rights) -> Result<bool>;
        fn set_default_rights(self: Pin<&mut Hypervisor>, rights: Rights) -> Result<()>;
        fn debug_control(self: Pin<&mut Hypervisor>, vcpu: u16, dr7: &mut u64) -> Result<bool>;
        fn rip(self: Pin<&mut Hypervisor>, vcpu: u16) -> Result<u64>;
        fn stop_step(self: Pin<&mut Hypervisor>, vcpu: u16) -> Result<()>;
        fn pause(self: Pin<&mut Hypervisor>) -> Result<()>;
        fn resume(self: Pin<&mut Hypervisor>) -> Result<()>;

        type Memory;
        fn adds_pages(self: &Memory) -> bool;
        fn add_page(self: Pin<&mut Memory>) -> Result<u64>;
        fn drop_page(self: Pin<&mut Memory>, gfn: u64) -> Result<()>;
        fn maps_pages(self: &Memory) -> bool;
        fn map_page(self: Pin<&mut Memory>, gfn: u64) -> Result<*mut u8>;
        fn creates_views(self: &Memory) -> bool;
        fn create_view(self: Pin<&mut Memory>) -> Result<u16>;
    }

    #[namespace = ""]
    unsafe extern "C++" {
        /// LibVMI's.
        type vmi_instance;
    }
}

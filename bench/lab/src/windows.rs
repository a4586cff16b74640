//! What the [counting emulator](crate::bochs::Emulator::Counting) says of each of the guest's samples:
//! `bench/lab/instrument/instrument.cc` describes the lines.

use std::collections::BTreeMap;

/// The file, in the directory of the machine's run.
pub(crate) const FILE: &str = "windows.log";

/// How far [`Window::ticks`] may be off what the instructions add up to: the emulator's clock goes on after each trace, and
/// those have up to 32 instructions.
pub const TRACE: u64 = 32;

/// Numbers of times, by a number.
pub type Counts = BTreeMap<u64, u64>;

/// What ran between two time stamps of the guest's, or several times so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// The difference of the time stamps.
    pub ticks: u64,
    /// Ticks of the guest.
    pub guest: u64,
    /// Ticks of Xen.
    pub xen: u64,
    /// Ticks of dom0's kernel.
    pub kernel: u64,
    /// Ticks at which the CPU was halted.
    pub idle: u64,
    /// Ticks of programs in dom0, by address space.
    pub programs: Counts,
    /// VM exits, by [reason](exit_name).
    pub exits: Counts,
    /// Hypercalls of dom0's, by [number](hypercall_name).
    pub hypercalls: Counts,
    /// System calls in dom0, by [number](syscall_name).
    pub syscalls: Counts,
}

impl Window {
    /// Understands a line. `None` if it is none of the emulator's, or does not add up.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let mut number = || words.next()?.parse::<u64>().ok();
        let (ticks, guest, xen, kernel, user, idle) =
            (number()?, number()?, number()?, number()?, number()?, number()?);
        let mut window = Self { ticks, guest, xen, kernel, idle, ..Self::default() };
        for word in words {
            let (name, count) = word.split_once('=')?;
            let (kind, name) = name.split_at_checked(1)?;
            let (counts, radix) = match kind {
                "x" => (&mut window.exits, 10),
                "h" => (&mut window.hypercalls, 10),
                "s" => (&mut window.syscalls, 10),
                "u" => (&mut window.programs, 16),
                _ => return None,
            };
            counts.insert(u64::from_str_radix(name, radix).ok()?, count.parse().ok()?);
        }
        (window.programs.values().sum::<u64>() == user).then_some(window)
    }

    /// What everybody's ticks, and nobody's, add up to.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.guest + self.xen + self.kernel + self.idle + self.programs.values().sum::<u64>()
    }

    /// Adds another.
    pub fn add(&mut self, other: &Self) {
        self.ticks += other.ticks;
        self.guest += other.guest;
        self.xen += other.xen;
        self.kernel += other.kernel;
        self.idle += other.idle;
        let counts = [
            (&mut self.programs, &other.programs),
            (&mut self.exits, &other.exits),
            (&mut self.hypercalls, &other.hypercalls),
            (&mut self.syscalls, &other.syscalls),
        ];
        for (to, from) in counts {
            for (name, count) in from {
                *to.entry(*name).or_default() += count;
            }
        }
    }
}

/// The name of a VM exit's reason (its low 16 bits): Intel SDM volume 3, appendix C, as far as a guest of Xen's can cause one.
#[must_use]
pub fn exit_name(reason: u64) -> String {
    let name = match reason & 0xffff {
        0 => "EXCEPTION_NMI",
        1 => "EXTERNAL_INTERRUPT",
        2 => "TRIPLE_FAULT",
        7 => "INTERRUPT_WINDOW",
        8 => "NMI_WINDOW",
        9 => "TASK_SWITCH",
        10 => "CPUID",
        12 => "HLT",
        13 => "INVD",
        14 => "INVLPG",
        15 => "RDPMC",
        16 => "RDTSC",
        18 => "VMCALL",
        28 => "CONTROL_REGISTER_ACCESS",
        29 => "MOV_DR",
        30 => "IO_INSTRUCTION",
        31 => "RDMSR",
        32 => "WRMSR",
        36 => "MWAIT",
        37 => "MONITOR_TRAP_FLAG",
        39 => "MONITOR",
        40 => "PAUSE",
        43 => "TPR_BELOW_THRESHOLD",
        44 => "APIC_ACCESS",
        45 => "VIRTUALIZED_EOI",
        46 => "GDTR_IDTR_ACCESS",
        47 => "LDTR_TR_ACCESS",
        48 => "EPT_VIOLATION",
        49 => "EPT_MISCONFIGURATION",
        51 => "RDTSCP",
        52 => "PREEMPTION_TIMER_EXPIRED",
        54 => "WBINVD",
        55 => "XSETBV",
        56 => "APIC_WRITE",
        58 => "INVPCID",
        59 => "VMFUNC",
        other => return format!("reason {other}"),
    };
    name.to_owned()
}

/// The name of a hypercall: Xen's `public/xen.h`, without its prefix.
#[must_use]
pub fn hypercall_name(number: u64) -> String {
    let name = match number {
        0 => "set_trap_table",
        1 => "mmu_update",
        2 => "set_gdt",
        3 => "stack_switch",
        4 => "set_callbacks",
        5 => "fpu_taskswitch",
        7 => "platform_op",
        8 => "set_debugreg",
        9 => "get_debugreg",
        10 => "update_descriptor",
        12 => "memory_op",
        13 => "multicall",
        14 => "update_va_mapping",
        15 => "set_timer_op",
        17 => "xen_version",
        18 => "console_io",
        20 => "grant_table_op",
        21 => "vm_assist",
        23 => "iret",
        24 => "vcpu_op",
        25 => "set_segment_base",
        26 => "mmuext_op",
        27 => "xsm_op",
        29 => "sched_op",
        32 => "event_channel_op",
        33 => "physdev_op",
        34 => "hvm_op",
        35 => "sysctl",
        36 => "domctl",
        41 => "dm_op",
        other => return format!("hypercall {other}"),
    };
    name.to_owned()
}

/// The name of a system call that a monitor is likely to make (Linux, x86-64).
#[must_use]
pub fn syscall_name(number: u64) -> String {
    let name = match number {
        0 => "read",
        1 => "write",
        3 => "close",
        7 => "poll",
        9 => "mmap",
        10 => "mprotect",
        11 => "munmap",
        12 => "brk",
        16 => "ioctl",
        17 => "pread64",
        18 => "pwrite64",
        24 => "sched_yield",
        28 => "madvise",
        35 => "nanosleep",
        202 => "futex",
        228 => "clock_gettime",
        230 => "clock_nanosleep",
        232 => "epoll_wait",
        257 => "openat",
        270 => "pselect6",
        271 => "ppoll",
        281 => "epoll_pwait",
        other => return format!("system call {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "24627 12 15000 9000 620 0 x0=1 x37=1 h23=4 h32=2 s0=1 s16=2 u7f3a000=600 u1000=20\n";

    #[test]
    fn a_line_is_understood() {
        let window = Window::parse(LINE).unwrap();
        let numbers = (window.ticks, window.guest, window.xen, window.kernel, window.idle);
        assert_eq!(numbers, (24_627, 12, 15_000, 9000, 0));
        assert_eq!(window.programs, Counts::from([(0x7f3_a000, 600), (0x1000, 20)]));
        assert_eq!(window.exits, Counts::from([(0, 1), (37, 1)]));
        assert_eq!(window.hypercalls, Counts::from([(23, 4), (32, 2)]));
        assert_eq!(window.syscalls, Counts::from([(0, 1), (16, 2)]));
        assert_eq!(window.sum(), 24_632);
        assert_eq!(Window::parse("3 4 0 0 0 0"), Some(Window { ticks: 3, guest: 4, ..Window::default() }));
    }

    #[test]
    fn damage_is_noticed() {
        for line in ["", "1 2 3", "3 4 0 0 0", "3 4 0 0 0 0 z1=2", "3 4 0 0 0 0 x1", "3 4 0 0 0 0 xq=1", "3 4 0 0 9 0"]
        {
            assert_eq!(Window::parse(line), None, "{line:?}");
        }
        for (end, _) in LINE.trim_end().char_indices() {
            // Cut off between two counts it may make sense, but never with a program's missing.
            assert!(Window::parse(&LINE[..end]).is_none(), "{}", &LINE[..end]);
        }
    }

    #[test]
    fn windows_add_up() {
        let window = Window::parse(LINE).unwrap();
        let mut sum = window.clone();
        sum.add(&window);
        sum.add(&Window::parse("3 4 0 0 0 0 x48=1").unwrap());
        assert_eq!((sum.ticks, sum.sum()), (2 * 24_627 + 3, 2 * 24_632 + 4));
        assert_eq!(sum.exits, Counts::from([(0, 2), (37, 2), (48, 1)]));
        assert_eq!(sum.programs[&0x1000], 40);
    }

    #[test]
    fn what_has_no_name_keeps_its_number() {
        assert_eq!(exit_name(0x8000_0021), "reason 33");
        assert_eq!((exit_name(48), exit_name(37)), ("EPT_VIOLATION".to_owned(), "MONITOR_TRAP_FLAG".to_owned()));
        assert_eq!((hypercall_name(32), hypercall_name(99)), ("event_channel_op".into(), "hypercall 99".into()));
        assert_eq!((syscall_name(16), syscall_name(999)), ("ioctl".into(), "system call 999".into()));
    }
}

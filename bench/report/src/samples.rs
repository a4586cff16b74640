//! Made-up results for the tests.

use crate::{BreakdownRow, Collection, Instructions, Kind, Machine, Measurement, TicksAre, Workload};

pub(crate) fn bochs() -> Machine {
    Machine {
        kind: Kind::Bochs,
        cpu: "Haswell".to_owned(),
        xen: "4.17.5".to_owned(),
        cpus: 1,
        ticks_are: TicksAre::Instructions,
        tsc_khz: None,
    }
}

pub(crate) fn measurement(backend: &str, mechanism: &str, workload: Workload) -> Measurement {
    Measurement {
        host: "runner".to_owned(),
        backend: backend.to_owned(),
        mechanism: mechanism.to_owned(),
        workload,
        vcpus: 1,
        guest_hits: 3,
        monitor_hits: 3,
        guest_saw_breakpoint: false,
    }
}

/// Every workload under no breakpoint, under two mechanisms of hyperbp and under one of the floor.
pub(crate) fn collection() -> Collection {
    let mut collection = Collection::new(bochs());
    let mechanisms = [
        ("none", "none", 10),
        ("hyperbp", "view-step", 60_000),
        ("hyperbp", "emulate", 30_000),
        ("floor", "view-step", 55_000),
    ];
    for (backend, mechanism, ticks) in mechanisms {
        for workload in Workload::ALL {
            let ticks = if workload == Workload::Timer { 3 } else { ticks };
            collection.push(measurement(backend, mechanism, workload), vec![ticks, ticks + 2, ticks + 1]).unwrap();
        }
    }
    collection
}

/// Where the ticks of a hit of hyperbp's go.
pub(crate) fn breakdown_row(mechanism: &str, workload: Workload) -> BreakdownRow {
    let counts = |counts: &[(&str, f64)]| counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
    let instructions =
        Instructions { guest: 10.0, xen: 15_000.25, dom0_kernel: 7000.0, monitor: 600.0, others: 0.0, idle: 0.0 };
    BreakdownRow {
        host: "runner".to_owned(),
        backend: "hyperbp".to_owned(),
        mechanism: mechanism.to_owned(),
        workload,
        hits: 1000,
        ticks: instructions.sum(),
        instructions,
        exits: counts(&[("EXCEPTION_NMI", 1.0), ("EXTERNAL_INTERRUPT", 0.012)]),
        hypercalls: counts(&[("iret", 2.5), ("event_channel_op", 3.0)]),
        syscalls: counts(&[]),
    }
}

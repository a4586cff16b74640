//! Restores a domain whose monitor was killed, and looks whether anything of one is left.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use hyperbp::ledger::{self, Ledger, Note, Plan};
use hyperbp::{Gpa, Hypervisor, Rights, VcpuId, ViewId};

use crate::ring::{self, Monitor};
use crate::xen::{Domain, Error, VIEWS};

/// INT3.
const INT3: u8 = 0xcc;
/// Undoes what a dead monitor has left in a domain. Tells what it did, a line each; none if there was nothing to do.
///
/// It can be killed itself, and run again. With `force`, also from a monitor that lives and has no ledger.
///
/// # Errors
/// If a monitor is alive, or Xen refuses something: then it may be run again.
pub(crate) fn recover(domain: &mut Domain, force: bool) -> Result<Vec<String>> {
    let mut done = Vec::new();
    let ledger = Ledger::leftover(Path::new(ledger::DIRECTORY), domain.id(), domain.uuid())?;
    // It may be another program's, which has none.
    ensure!(
        force || !domain.is_monitored().context("cannot tell whether a monitor lives")?,
        "a monitor of this domain lives (its ring's event channel is held): stop it first; --force takes the ring from it"
    );
    let stopped = ring::stop_all(domain).context("cannot stop what is reported of the domain")?;
    done.extend(stopped.iter().map(|what| format!("{what} were still reported")));
    if ledger.is_none() && stopped.is_empty() {
        return Ok(done);
    }
    // Nothing may run until everything is as it was.
    if let Some(ledger) = &ledger {
        ledger.note_pause();
    }
    domain.pause().context("cannot pause the domain")?;
    let restored = restore(domain, ledger, &mut done);
    // A pause that was noted may not have happened: then it was ours that was undone in its place.
    if domain.is_paused()? {
        domain.resume().context("cannot resume the domain")?;
    }
    restored?;
    Ok(done)
}

fn restore(domain: &mut Domain, ledger: Option<Ledger>, done: &mut Vec<String>) -> Result<()> {
    for vcpu in 0..domain.vcpus() {
        domain.stop_step(VcpuId(vcpu)).context("cannot end the single-steps")?;
    }
    if domain.has_altp2m() && domain.is_altp2m_on()? {
        // Virtual CPUs may be in views of ours.
        domain.switch_to_host_view().context("cannot switch to the host view")?;
        // If altp2m was on before the monitor came, the other views are another tool's. Without a ledger nobody knows.
        if ledger.as_ref().is_none_or(|ledger| ledger.notes().contains(&Note::Altp2m)) {
            domain.set_altp2m(false).context("cannot drop the views")?;
            done.push("its views were still there".to_owned());
        }
    }
    ring::disable(domain).context("cannot take the old ring away")?;
    // A ring of our own: rights cannot be set without one, and virtual CPUs may wait for an answer.
    let mut monitor = Monitor::attach(domain).context("cannot monitor the domain")?;
    domain.set_default_access(Rights::All).context("cannot set the rights of new pages")?;
    if let Some(mut ledger) = ledger {
        // One of the pauses is `recover`'s own, and what was noted may not have happened.
        let plan = ledger.plan(&domain.limits().context("cannot tell what the domain has")?);
        done.extend(plan.refused.iter().map(|what| format!("the ledger is not believed: {what}")));
        undo(domain, &mut ledger, &plan, done)?;
        for _ in 1..plan.pauses {
            if let Err(error) = domain.resume() {
                log::info!("it was not paused after all: {error}");
                break;
            }
            ledger.erase_pause();
            done.push("it was paused".to_owned());
        }
        monitor.release(domain.vcpus()).context("cannot let waiting virtual CPUs go on")?;
        drop(monitor);
        ledger.remove().context("cannot remove the ledger")?;
    } else {
        monitor.release(domain.vcpus()).context("cannot let waiting virtual CPUs go on")?;
        done.push("there was no ledger: bytes, guards and frames of the monitor are not known".to_owned());
    }
    Ok(())
}

/// Undoes what is noted and can be true.
fn undo(domain: &mut Domain, ledger: &mut Ledger, plan: &Plan, done: &mut Vec<String>) -> Result<()> {
    for note in plan.undo.iter().copied() {
        let undone = match note {
            Note::Displaced { gpa, original } => put_back(domain, gpa, original)?,
            Note::Guard(gfn) => {
                domain.set_rights(ViewId::HOST, gfn, Rights::All).context("cannot lift a guard")?;
                Some(format!("{gfn} was guarded"))
            }
            // With altp2m off, all views are gone.
            Note::View(view) => domain.destroy(view).ok().map(|()| format!("view {} was still there", view.0)),
            Note::Altp2m => None,
            // It may not have been added any more, or be gone already.
            Note::Frame(gfn) => domain.release(gfn).ok().map(|()| format!("{gfn} held a shadow")),
        };
        done.extend(undone);
        ledger.erase(note);
    }
    if let Some(limit) = plan.memory_limit {
        // Another one is what somebody has set since.
        if limit.is_ours(domain.memory()?.1) {
            domain.set_memory_limit(limit.found).context("cannot put the memory limit back")?;
            done.push("its memory limit was raised".to_owned());
        }
        ledger.note_memory_limit(None);
    }
    Ok(())
}

fn put_back(domain: &mut Domain, gpa: Gpa, original: u8) -> Result<Option<String>, Error> {
    let mut byte = [0];
    match domain.read(gpa, &mut byte) {
        // The guest has given the page back since, and the breakpoint with it.
        Err(error) if error.is_no_memory() => return Ok(None),
        read => read?,
    }
    // Anything else is the guest's.
    if byte[0] != INT3 {
        return Ok(None);
    }
    domain.write(gpa, &[original])?;
    Ok(Some(format!("there was a breakpoint at {gpa}")))
}

/// What can be seen of a domain from outside, and must not differ before a monitor and after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Traces {
    /// Pages it has.
    pub(crate) pages: u64,
    /// Its memory limit, in KiB.
    pub(crate) limit: u64,
}

impl Traces {
    /// Looks at a domain that no monitor is attached to.
    ///
    /// # Errors
    /// If something of a monitor is left that must not be there at any time.
    pub(crate) fn of(domain: &mut Domain) -> Result<Self> {
        let reported = ring::stop_all(domain)?;
        ensure!(reported.is_empty(), "{} are still reported", reported.join(" and "));
        ensure!(!domain.is_altp2m_on()?, "views are still on");
        let views = domain.free_views()?;
        ensure!(views == VIEWS - 1, "{views} views are free, not {}", VIEWS - 1);
        let (pages, limit) = domain.memory()?;
        Ok(Self { pages, limit })
    }
}

//! The benchmark guest, through its control page. This one is the kernel (`bench/guest`); [`program`](crate::program) finds the
//! other.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hyperbp::{Gfn, Gpa, PAGE_SIZE};
use hyperbp_bench_abi::{
    BALLOON_SITES, BREAKPOINT_OFFSET, CONTROL_GPA, Control, MAGIC, REWRITTEN_OFFSET, SAMPLE_PAGES, SAMPLES_MAX, SITES,
    SNIPPET_PAGES, Storm, StormCounts, TARGET, VCPUS_MAX, VERSION, Workload,
};

use crate::xen::{Domain, Page};

/// What the guest counts, since it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counts {
    /// See [`Control::executions`].
    pub(crate) executions: u64,
    /// See [`Control::own_int3s`].
    pub(crate) own_int3s: u64,
    /// See [`Control::mismatches`].
    pub(crate) mismatches: u64,
}

/// The benchmark guest in a domain.
#[derive(Debug)]
pub(crate) struct Guest {
    control: Page,
    samples: Vec<Page>,
    target: Gfn,
    vcpus: u32,
    /// What only the kernel has.
    kernel: Option<Kernel>,
}

#[derive(Debug)]
struct Kernel {
    storm: Page,
    snippets: Gfn,
    balloon: Gfn,
}

const WHAT: &str = "start the benchmark guest in it (bench/guest, with bench/lab/dom0/guest.cfg)";

impl Guest {
    /// Finds the guest in a domain.
    ///
    /// # Errors
    /// If the domain runs something else.
    pub(crate) fn find(domain: &Domain) -> Result<Self> {
        let guest = Self::find_busy(domain)?;
        guest.check_all_but_rewritten(domain)?;
        Ok(guest)
    }

    /// Finds the guest in a domain, whatever is in its page under test.
    ///
    /// # Errors
    /// If the domain runs something else.
    pub(crate) fn find_busy(domain: &Domain) -> Result<Self> {
        let guest = Self::kernel(domain)?;
        guest.with_context(|| format!("the domain does not run the benchmark guest: {WHAT}"))
    }

    /// The kernel, if the domain runs it; whatever is in its page under test.
    ///
    /// # Errors
    /// If it is of another version, or its pages are not in its memory.
    pub(crate) fn kernel(domain: &Domain) -> Result<Option<Self>> {
        let control = domain.map_page(Gpa(CONTROL_GPA).gfn()).with_context(|| format!("no benchmark guest: {WHAT}"))?;
        let mut guest = Self::at(control);
        // The domain may have been created only just now.
        for _ in 0..100 {
            if guest.magic() == MAGIC {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        if guest.magic() != MAGIC {
            return Ok(None);
        }
        guest.check_version()?;
        guest.target = Gpa(guest.number(offset_of!(Control, target_gpa))).gfn();
        let snippets = Gpa(guest.number(offset_of!(Control, snippets_gpa))).gfn();
        let first = Gpa(guest.number(offset_of!(Control, samples_gpa))).gfn();
        guest.samples = (0..SAMPLE_PAGES as u64)
            .map(|n| domain.map_page(Gfn(first.0.wrapping_add(n))))
            .collect::<Result<_, _>>()
            .context("the guest's sample pages are not in its memory")?;
        let storm = Gpa(guest.number(offset_of!(Control, storm_gpa))).gfn();
        let storm = domain.map_page(storm).context("the guest's page of counts is not in its memory")?;
        let balloon = Gpa(guest.number(offset_of!(Control, balloon_gpa))).gfn();
        guest.kernel = Some(Kernel { storm, snippets, balloon });
        Ok(Some(guest))
    }

    /// What may be a guest, by its control page.
    pub(crate) fn at(control: Page) -> Self {
        Self { control, samples: Vec::new(), target: Gfn(0), vcpus: 0, kernel: None }
    }

    /// The program whose control page this is, when its other pages are known, too.
    pub(crate) fn with_pages(self, target: Gfn, samples: Vec<Page>) -> Self {
        Self { target, samples, ..self }
    }

    /// See [`Control::magic`].
    pub(crate) fn magic(&self) -> u64 {
        self.number(offset_of!(Control, magic))
    }

    /// See [`Control::alive`].
    pub(crate) fn alive(&self) -> u64 {
        self.number(offset_of!(Control, alive))
    }

    /// See [`Control::process`].
    pub(crate) fn process(&self) -> u64 {
        self.number(offset_of!(Control, process))
    }

    /// Whether this is a program in a guest's operating system.
    pub(crate) fn is_program(&self) -> bool {
        self.kernel.is_none()
    }

    /// Looks whether it has the control page we know, and how many virtual CPUs.
    ///
    /// # Errors
    /// If it has another one.
    pub(crate) fn check_version(&mut self) -> Result<()> {
        let version = self.word(offset_of!(Control, version)).load(Ordering::Relaxed);
        ensure!(version == VERSION, "the benchmark guest has version {version} of the control page, not {VERSION}");
        self.vcpus = self.word(offset_of!(Control, vcpus)).load(Ordering::Relaxed);
        Ok(())
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset.is_multiple_of(4) && offset < size_of::<Control>());
        // SAFETY: the offset is that of a field of the control page, which is in the mapped page.
        let field = unsafe { self.control.as_ptr().add(offset) };
        // SAFETY: aligned, mapped while `self` lives, and only ever accessed atomically from here.
        unsafe { AtomicU32::from_ptr(field.cast()) }
    }

    fn number(&self, offset: usize) -> u64 {
        debug_assert!(offset.is_multiple_of(8) && offset < size_of::<Control>());
        // SAFETY: the offset is that of a field of the control page, which is in the mapped page.
        let field = unsafe { self.control.as_ptr().add(offset) };
        // SAFETY: aligned, mapped while `self` lives, and only ever accessed atomically from here.
        unsafe { AtomicU64::from_ptr(field.cast()) }.load(Ordering::Acquire)
    }

    fn set(&self, offset: usize, number: u64) {
        self.word(offset).store(number as u32, Ordering::Relaxed);
        self.word(offset + 4).store((number >> 32) as u32, Ordering::Relaxed);
    }

    /// Has [`Workload::Label`] write this tag.
    pub(crate) fn set_tag(&self, tag: u64) {
        self.set(offset_of!(Control, tag), tag);
    }

    /// Where the breakpoint goes.
    #[must_use]
    pub(crate) fn breakpoint(&self) -> Gpa {
        self.target.at(BREAKPOINT_OFFSET as u16)
    }

    /// Where the storm's breakpoints go.
    #[must_use]
    pub(crate) fn sites(&self) -> [Gpa; SITES.len()] {
        SITES.map(|offset| self.target.at(offset as u16))
    }

    /// Where a byte of the snippet pages is.
    #[must_use]
    pub(crate) fn snippet_byte(&self, offset: usize) -> Gpa {
        let first = self.kernel.as_ref().map_or(0, |kernel| kernel.snippets.0);
        Gfn(first.wrapping_add((offset / PAGE_SIZE) as u64)).at((offset % PAGE_SIZE) as u16)
    }

    /// Where the breakpoints of [`Workload::Balloon`] go.
    #[must_use]
    pub(crate) fn balloon_sites(&self) -> [Gpa; BALLOON_SITES.len()] {
        let page = self.kernel.as_ref().map_or(Gfn(0), |kernel| kernel.balloon);
        BALLOON_SITES.map(|offset| page.at(offset as u16))
    }

    /// The page of [`Workload::SystemPage`].
    #[must_use]
    pub(crate) fn system_page(&self) -> Gfn {
        Gpa(self.number(offset_of!(Control, system_gpa))).gfn()
    }

    /// The snippet pages, as they are in guest memory.
    ///
    /// # Errors
    /// If they are not in it.
    pub(crate) fn snippet_pages(&self, domain: &Domain) -> Result<Vec<u8>> {
        let mut bytes = vec![0; SNIPPET_PAGES * PAGE_SIZE];
        for (page, bytes) in bytes.chunks_mut(PAGE_SIZE).enumerate() {
            domain.map_page(self.snippet_byte(page * PAGE_SIZE).gfn())?.read(0, bytes);
        }
        Ok(bytes)
    }

    /// Has [`Workload::Scan`] look from this frame on.
    pub(crate) fn set_scan(&self, from: Gfn) {
        self.set(offset_of!(Control, scan_gpa), from.at(0).0);
    }

    /// What the storm has counted so far, over all virtual CPUs.
    #[must_use]
    pub(crate) fn storm(&self) -> StormCounts {
        let mut sum = StormCounts::default();
        let Some(kernel) = &self.kernel else { return sum };
        let number = |offset: usize| {
            let mut bytes = [0; size_of::<u64>()];
            kernel.storm.read(offset, &mut bytes);
            u64::from_le_bytes(bytes)
        };
        for vcpu in 0..VCPUS_MAX {
            let base = offset_of!(Storm, vcpus) + vcpu * size_of::<StormCounts>();
            for (site, executions) in sum.executions.iter_mut().enumerate() {
                *executions += number(base + offset_of!(StormCounts, executions) + site * size_of::<u64>());
            }
            sum.hashes += number(base + offset_of!(StormCounts, hashes));
            sum.hash_mismatches += number(base + offset_of!(StormCounts, hash_mismatches));
            sum.rewrites += number(base + offset_of!(StormCounts, rewrites));
            sum.rewrite_mismatches += number(base + offset_of!(StormCounts, rewrite_mismatches));
        }
        sum
    }

    /// Virtual CPUs the guest has started.
    #[must_use]
    pub(crate) fn vcpus(&self) -> u32 {
        self.vcpus
    }

    /// What the guest has counted so far.
    #[must_use]
    pub(crate) fn counts(&self) -> Counts {
        Counts {
            executions: self.number(offset_of!(Control, executions)),
            own_int3s: self.number(offset_of!(Control, own_int3s)),
            mismatches: self.number(offset_of!(Control, mismatches)),
        }
    }

    /// Asks for a workload.
    pub(crate) fn request(&self, workload: Workload, count: u32) {
        self.word(offset_of!(Control, workload)).store(workload as u32, Ordering::Relaxed);
        self.word(offset_of!(Control, count)).store(count, Ordering::Relaxed);
        let request = self.word(offset_of!(Control, request));
        request.store(request.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
    }

    /// Whether the last request is done.
    #[must_use]
    pub(crate) fn is_done(&self) -> bool {
        let request = self.word(offset_of!(Control, request)).load(Ordering::Relaxed);
        self.word(offset_of!(Control, completed)).load(Ordering::Acquire) == request
    }

    /// How to get another one.
    pub(crate) fn again(&self) -> &'static str {
        if self.is_program() { "end the program, and start it again" } else { "destroy the domain and create it again" }
    }

    /// Waits for a request that somebody else has left behind.
    ///
    /// # Errors
    /// If it is not done in this time.
    pub(crate) fn wait_until_done(&self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        while !self.is_done() {
            ensure!(start.elapsed() < limit, "the guest does not finish an earlier request: {}", self.again());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// The samples of the last request, which had this count.
    pub(crate) fn samples(&self, count: u32, into: &mut Vec<u64>) {
        for sample in 0..count.min(SAMPLES_MAX) as usize {
            let at = sample * size_of::<u64>();
            let mut bytes = [0; size_of::<u64>()];
            self.samples[at / PAGE_SIZE].read(at % PAGE_SIZE, &mut bytes);
            into.push(u64::from_le_bytes(bytes));
        }
    }

    /// How many requests there were since the guest started.
    #[must_use]
    pub(crate) fn requests(&self) -> u32 {
        self.word(offset_of!(Control, request)).load(Ordering::Relaxed)
    }

    /// Looks whether the page under test is, in guest memory, what the guest put there.
    ///
    /// # Errors
    /// If it is not: a monitor has left something behind.
    pub(crate) fn check(&self, domain: &Domain) -> Result<()> {
        self.compare(domain, PAGE_SIZE)
    }

    /// The same, without the byte that a storm, which may be going on, rewrites.
    ///
    /// # Errors
    /// As for [`check`](Self::check).
    pub(crate) fn check_all_but_rewritten(&self, domain: &Domain) -> Result<()> {
        self.compare(domain, REWRITTEN_OFFSET)
    }

    /// Compares the first `length` bytes.
    fn compare(&self, domain: &Domain, length: usize) -> Result<()> {
        let mut bytes = [0; PAGE_SIZE];
        domain.map_page(self.target)?.read(0, &mut bytes);
        if let Some(offset) = (0..length).find(|&at| bytes[at] != TARGET[at]) {
            let (is, was) = (bytes[offset], TARGET[offset]);
            anyhow::bail!(
                "byte {offset:#x} of the page under test is {is:#04x}, not {was:#04x}: a monitor left it there; \
                 {}",
                self.again()
            );
        }
        Ok(())
    }
}

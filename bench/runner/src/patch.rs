//! Code that dom0 writes into the guest's page under test, as a device would: there is no event, and no view is asked.

use anyhow::Result;
use hyperbp::Gpa;
use hyperbp_bench_abi::{BREAKPOINT_OFFSET, CONTROL_GPA, TARGET};

use crate::guest::Guest;
use crate::xen::{Domain, Page};

/// Where in the page the code goes, and the most there is of it.
pub(crate) const CODE: usize = 0x800;
const CODE_BYTES: usize = 0x100;
/// Where in the control page a number is that code and dom0 share.
const MARK: usize = 0xff0;

/// The page under test, while it has other code than its own. When it is dropped, the page is as it was.
#[derive(Debug)]
pub(crate) struct Patch {
    page: Page,
    control: Page,
}

impl Patch {
    /// Changes nothing yet, but for the number, which is 0.
    ///
    /// # Errors
    /// If the guest does not have its pages.
    pub(crate) fn new(domain: &Domain, guest: &Guest) -> Result<Self> {
        let page = domain.map_page(guest.breakpoint().gfn())?;
        let patch = Self { page, control: domain.map_page(Gpa(CONTROL_GPA).gfn())? };
        patch.set_mark(0);
        Ok(patch)
    }

    /// Writes to the page.
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        self.page.write(at, bytes);
    }

    /// Writes code to [`CODE`], and has the breakpoint's place jump there.
    pub(crate) fn write_code(&self, code: &[u8]) {
        assert!(code.len() <= CODE_BYTES, "there is no room for the code");
        self.write(CODE, code);
        self.write(BREAKPOINT_OFFSET, &jump());
    }

    /// The number.
    pub(crate) fn mark(&self) -> u32 {
        let mut mark = [0; 4];
        self.control.read(MARK, &mut mark);
        u32::from_le_bytes(mark)
    }

    /// Sets the number.
    pub(crate) fn set_mark(&self, mark: u32) {
        self.control.write(MARK, &mark.to_le_bytes());
    }
}

impl Drop for Patch {
    fn drop(&mut self) {
        self.write(BREAKPOINT_OFFSET, &TARGET[BREAKPOINT_OFFSET..]);
        self.write(CODE, &TARGET[CODE..CODE + CODE_BYTES]);
    }
}

/// Where the number is, as an operand has it.
pub(crate) fn mark() -> [u8; 4] {
    (CONTROL_GPA as u32 + MARK as u32).to_le_bytes()
}

/// A jump from the breakpoint's place to [`CODE`].
pub(crate) fn jump() -> Vec<u8> {
    const BYTES: usize = 5;
    let distance = CODE as i32 - (BREAKPOINT_OFFSET + BYTES) as i32;
    [&[0xe9][..], &distance.to_le_bytes()].concat()
}

/// `mov dword [address], number; ret`.
pub(crate) fn store(address: [u8; 4], number: u32) -> Vec<u8> {
    [&[0xc7, 0x04, 0x25][..], &address, &number.to_le_bytes(), &[0xc3]].concat()
}

//! What xenstore has of domains.

use std::ffi::{CStr, CString, c_void};
use std::ptr::NonNull;

use hyperbp_xen_sys as sys;

use super::Error;

/// The number of the domain with this name, from xenstore.
pub(super) fn id_of(name: &str) -> Result<Option<u32>, Error> {
    let store = Store::open()?;
    for id in store.directory(c"/local/domain")? {
        let Ok(path) = CString::new(format!("/local/domain/{id}/name")) else { continue };
        // A domain may go while we look.
        if store.read(&path).as_deref() == Some(name.as_bytes()) {
            return Ok(id.parse().ok());
        }
    }
    Ok(None)
}

/// How much memory the toolstack lets a domain have at most, in KiB, if it has noted that.
pub(super) fn most_memory(id: u32) -> Result<Option<u64>, Error> {
    let Ok(path) = CString::new(format!("/local/domain/{id}/memory/static-max")) else { return Ok(None) };
    let value = Store::open()?.read(&path).and_then(|value| String::from_utf8(value).ok());
    Ok(value.and_then(|value| value.trim().parse().ok()))
}

/// The event channels that a guest says its devices have.
pub(super) fn device_channels(id: u32) -> Result<Vec<u32>, Error> {
    /// A device's queue: `device/vif/0/queue-1`.
    const DEEPEST: u32 = 4;
    let store = Store::open()?;
    let mut found = Vec::new();
    let mut paths = vec![(format!("/local/domain/{id}/device"), 0)];
    while let Some((path, depth)) = paths.pop() {
        let Ok(node) = CString::new(path.as_str()) else { continue };
        if path.rsplit('/').next().is_some_and(|name| name.starts_with("event-channel")) {
            let value = store.read(&node).and_then(|value| String::from_utf8(value).ok());
            found.extend(value.and_then(|value| value.trim().parse::<u32>().ok()));
        } else if depth < DEEPEST {
            // It may have none, or be gone already.
            let names = store.directory(&node).unwrap_or_default();
            paths.extend(names.into_iter().map(|name| (format!("{path}/{name}"), depth + 1)));
        }
    }
    Ok(found)
}

/// What is asked of a domain: to suspend itself, so that it can be saved or moved.
pub(crate) struct Requests {
    store: Store,
    node: CString,
}

impl Requests {
    /// Those to this domain.
    ///
    /// # Errors
    /// If there is no xenstore.
    pub(crate) fn of(id: u32) -> Result<Self, Error> {
        let node = CString::new(format!("/local/domain/{id}/control/shutdown")).unwrap_or_default();
        Ok(Self { store: Store::open()?, node })
    }

    /// Whether it is asked to suspend itself. It does so milliseconds later at the earliest, and answers by emptying the node.
    pub(crate) fn is_to_suspend(&self) -> bool {
        self.store.read(&self.node).is_some_and(|value| value == b"suspend")
    }
}

/// A connection to xenstore.
struct Store(NonNull<sys::xs_handle>);

impl Store {
    fn open() -> Result<Self, Error> {
        // SAFETY: takes nothing but flags.
        NonNull::new(unsafe { sys::xs_open(0) }).map(Self).ok_or_else(|| Error::last("xs_open"))
    }

    /// The names of a node's children.
    fn directory(&self, path: &CStr) -> Result<Vec<String>, Error> {
        let mut count = 0;
        // SAFETY: the handle is open, the path ends in NUL, and `count` outlives the call.
        let list = unsafe { sys::xs_directory(self.0.as_ptr(), 0, path.as_ptr(), &mut count) };
        let list = Allocated::new(list).ok_or_else(|| Error::last("xs_directory"))?;
        // SAFETY: the call returns an array of `count` pointers, in one allocation with what they point to.
        let names = unsafe { std::slice::from_raw_parts(list.0.as_ptr(), count as usize) };
        // SAFETY: each is a string that ends in NUL and lives as long as `list`.
        Ok(names.iter().map(|name| unsafe { CStr::from_ptr(*name) }.to_string_lossy().into_owned()).collect())
    }

    /// The value of a node, if there is one.
    fn read(&self, path: &CStr) -> Option<Vec<u8>> {
        let mut length = 0;
        // SAFETY: the handle is open, the path ends in NUL, and `length` outlives the call.
        let value = unsafe { sys::xs_read(self.0.as_ptr(), 0, path.as_ptr(), &mut length) };
        let value = Allocated::new(value)?;
        // SAFETY: the call returns `length` bytes (and a NUL).
        Some(unsafe { std::slice::from_raw_parts(value.0.as_ptr().cast::<u8>(), length as usize) }.to_vec())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: opened in `open`, and closed nowhere else.
        unsafe { sys::xs_close(self.0.as_ptr()) };
    }
}

/// Memory of the C library, to be freed.
struct Allocated<T>(NonNull<T>);

impl<T> Allocated<T> {
    fn new(pointer: *mut T) -> Option<Self> {
        NonNull::new(pointer).map(Self)
    }
}

impl<T> Drop for Allocated<T> {
    fn drop(&mut self) {
        // SAFETY: only made of what libxenstore allocated with malloc and leaves to us.
        unsafe { libc::free(self.0.as_ptr().cast::<c_void>()) };
    }
}

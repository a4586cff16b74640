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
    /// All that xenstore has of the domain.
    domain: CString,
}

impl Requests {
    /// Those to this domain, from now on.
    ///
    /// # Errors
    /// If there is no xenstore.
    pub(crate) fn of(id: u32) -> Result<Self, Error> {
        let node = CString::new(format!("/local/domain/{id}/control/shutdown")).unwrap_or_default();
        let domain = CString::new(format!("/local/domain/{id}")).unwrap_or_default();
        let store = Store::open()?;
        store.watch(&node)?;
        Ok(Self { store, node, domain })
    }

    /// Whether it was asked to suspend itself since the last call. It does so milliseconds later at the earliest. Costs a
    /// system call while nothing changes.
    pub(crate) fn was_asked(&self) -> bool {
        // The guest's driver answers at once, by emptying the node or by removing it. What it was asked is not known then: to
        // shut down, perhaps, and that is no reason to stay either. When the domain is destroyed, all of its nodes go.
        self.store.has_changed()
            && match self.store.read(&self.node) {
                Some(value) => value.is_empty() || value == b"suspend",
                None => self.store.read(&self.domain).is_some(),
            }
    }

    /// Whether it is asked to suspend itself, and has not answered yet.
    pub(crate) fn is_to_suspend(&self) -> bool {
        self.store.read(&self.node).is_some_and(|value| value == b"suspend")
    }

    /// Answers in place of the guest's driver: it has heard.
    ///
    /// # Errors
    /// If xenstore refuses.
    pub(crate) fn acknowledge(&self) -> Result<(), Error> {
        self.store.write(&self.node, b"")
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

    fn write(&self, path: &CStr, value: &[u8]) -> Result<(), Error> {
        let (data, length) = (value.as_ptr().cast(), value.len() as u32);
        // SAFETY: the handle is open, the path ends in NUL, and `data` has `length` bytes.
        let written = unsafe { sys::xs_write(self.0.as_ptr(), 0, path.as_ptr(), data, length) };
        if written { Ok(()) } else { Err(Error::last("xs_write")) }
    }

    /// Has [`has_changed`](Self::has_changed) tell of changes of a node.
    fn watch(&self, path: &CStr) -> Result<(), Error> {
        // SAFETY: the handle is open, and both strings end in NUL.
        let watched = unsafe { sys::xs_watch(self.0.as_ptr(), path.as_ptr(), c"".as_ptr()) };
        if !watched {
            return Err(Error::last("xs_watch"));
        }
        let mut count = 0;
        // It fires once at the start.
        // SAFETY: the handle is open, and `count` outlives the call. What it returns is one allocation.
        let fired = Allocated::new(unsafe { sys::xs_read_watch(self.0.as_ptr(), &mut count) });
        fired.map(drop).ok_or_else(|| Error::last("xs_read_watch"))
    }

    /// Whether what is watched has changed since the last call. Does not wait.
    fn has_changed(&self) -> bool {
        let mut changed = false;
        // SAFETY: the handle is open. What it returns is one allocation.
        while let Some(_event) = Allocated::new(unsafe { sys::xs_check_watch(self.0.as_ptr()) }) {
            changed = true;
        }
        changed
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

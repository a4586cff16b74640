//! What a monitor has changed in a domain, noted where it outlives the monitor.
//!
//! A monitor that is killed leaves everything behind: breakpoints in the guest's own pages, guards, shadow frames, pauses.
//! So whoever changes a domain notes it in a ledger, a small file of a known name that is mapped into memory: a note is a
//! store, and the kernel has it whatever becomes of the process. A note is made *before* the change, and erased *after* it
//! is undone; so what is noted may not have happened, and undoing it must be harmless then.
//!
//! A ledger is locked as long as its monitor lives. One that is there and not locked is a dead monitor's. What it says is
//! believed as far as it can be true: see [`Ledger::plan`].

mod file;
mod plan;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use file::{Absent, Words};
pub use plan::{Limits, Plan};

use crate::{Gfn, Gpa, ViewId};

/// Where ledgers are, unless the user says otherwise. It is empty when the machine starts, as Xen is.
pub const DIRECTORY: &str = "/run/hyperbp";

/// The first word of a ledger: `HBPLEDG1`. It is written last.
const MAGIC: u64 = u64::from_le_bytes(*b"HBPLEDG1");
/// Words before the notes: the magic, the domain's UUID in two, its memory limit in KiB plus one, our pauses, how many
/// words are in use, whether we are attached, and what the limit was raised to.
const HEADER: usize = 8;
const UUID: usize = 1;
const LIMIT: usize = 3;
const PAUSES: usize = 4;
const END: usize = 5;
const ATTACHED: usize = 6;
const RAISED: usize = 7;

const KIND: u32 = 60;
const ORIGINAL: u32 = 52;
const ADDRESS: u64 = (1 << ORIGINAL) - 1;

/// A change to a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Note {
    /// 0xCC is in the guest's own page, over this byte.
    Displaced {
        /// Where.
        gpa: Gpa,
        /// What the guest has there.
        original: u8,
    },
    /// The frame is not the guest's, but has a page for a shadow.
    Frame(Gfn),
    /// The host view does not permit everything on this page.
    Guard(Gfn),
    /// A view that was not there before.
    View(ViewId),
    /// Altp2m is on, and was off before.
    Altp2m,
}

/// A domain's memory limit that has been raised, in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// What it was before.
    pub found: u64,
    /// What it is.
    pub raised: u64,
}

impl MemoryLimit {
    /// Whether `now`, the limit that there is, is one that we have set on the way to this one, in KiB. If not, somebody
    /// else has set it since, and it must stay.
    #[must_use]
    pub const fn is_ours(self, now: u64) -> bool {
        self.found <= now && now <= self.raised
    }
}

impl Note {
    /// As one word; never 0.
    #[must_use]
    pub fn encode(self) -> u64 {
        let (kind, original, address) = match self {
            Self::Displaced { gpa, original } => (1, original, gpa.0),
            Self::Frame(gfn) => (2, 0, gfn.0),
            Self::Guard(gfn) => (3, 0, gfn.0),
            Self::View(view) => (4, 0, view.0.into()),
            Self::Altp2m => (5, 0, 0),
        };
        kind << KIND | u64::from(original) << ORIGINAL | address & ADDRESS
    }

    /// What such a word says; `None` if it is no note.
    #[must_use]
    pub fn decode(word: u64) -> Option<Self> {
        let (original, address) = ((word >> ORIGINAL) as u8, word & ADDRESS);
        match word >> KIND {
            1 => Some(Self::Displaced { gpa: Gpa(address), original }),
            2 => Some(Self::Frame(Gfn(address))),
            3 => Some(Self::Guard(Gfn(address))),
            4 => u16::try_from(address).ok().map(|view| Self::View(ViewId(view))),
            5 => Some(Self::Altp2m),
            _ => None,
        }
    }

    /// What is the same for two notes of which one replaces the other.
    const fn key(self) -> (u8, u64) {
        match self {
            Self::Displaced { gpa, .. } => (1, gpa.0),
            Self::Frame(gfn) => (2, gfn.0),
            Self::Guard(gfn) => (3, gfn.0),
            Self::View(view) => (4, view.0 as u64),
            Self::Altp2m => (5, 0),
        }
    }
}

/// Why there is no ledger to write to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A monitor that lives has it.
    #[error("a monitor is attached to this domain: stop it first ({0} is locked)")]
    Busy(PathBuf),
    /// A monitor has died with it.
    #[error("a monitor of this domain has died and left things behind ({0})")]
    Leftover(PathBuf),
    /// It, or its directory, is nothing that we would have made: whoever has made it may want us to write somewhere else.
    #[error("{path} is not to be trusted: {problem}; remove it, unless you know what it is")]
    Foreign {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The file cannot be used.
    #[error("cannot use {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The ledger of one domain. It is locked while this lives.
#[derive(Debug)]
pub struct Ledger {
    words: Words,
    slots: HashMap<(u8, u64), usize>,
    free: Vec<usize>,
    /// All words from this one on are free.
    end: usize,
}

impl Ledger {
    /// The ledger of a domain, empty, in `directory`, which is made if there is none.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::Leftover`] if it is there and not empty, [`Error::Foreign`], [`Error::Io`].
    pub fn create(directory: &Path, domain: u32, uuid: [u8; 16]) -> Result<Self, Error> {
        let path = path(directory, domain);
        let io = |source| Error::Io { path: path.clone(), source };
        let words = Words::open(directory, &name(domain), Absent::Make)?;
        let ledger = Self::of(words.ok_or_else(|| io(io::ErrorKind::NotFound.into()))?);
        // A new domain has nothing of a former one's with the same number.
        if ledger.is_of(uuid) && !ledger.is_empty() {
            return Err(Error::Leftover(path));
        }
        let words = ledger.words.empty().map_err(io)?;
        let ledger = Self { words, slots: HashMap::new(), free: Vec::new(), end: HEADER };
        ledger.begin(uuid);
        Ok(ledger)
    }

    /// The ledger a dead monitor of this domain has left, if it has.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::Foreign`], [`Error::Io`].
    pub fn leftover(directory: &Path, domain: u32, uuid: [u8; 16]) -> Result<Option<Self>, Error> {
        let words = Words::open(directory, &name(domain), Absent::Leave)?;
        Ok(words.map(Self::of).filter(|ledger| ledger.is_of(uuid)))
    }

    fn of(words: Words) -> Self {
        let mut ledger = Self { words, slots: HashMap::new(), free: Vec::new(), end: HEADER };
        ledger.index();
        ledger
    }

    /// Finds the notes that are there. They are written from the start on, with holes.
    fn index(&mut self) {
        let end = usize::try_from(self.word(END).load(Ordering::Acquire)).unwrap_or(usize::MAX);
        self.end = end.clamp(HEADER, self.words.count());
        for slot in HEADER..self.end {
            match Note::decode(self.word(slot).load(Ordering::Relaxed)) {
                Some(note) => drop(self.slots.insert(note.key(), slot)),
                None => self.free.push(slot),
            }
        }
    }

    fn begin(&self, uuid: [u8; 16]) {
        let (low, high) = halves(uuid);
        self.word(UUID).store(low, Ordering::Relaxed);
        self.word(UUID + 1).store(high, Ordering::Relaxed);
        self.word(0).store(MAGIC, Ordering::Release);
    }

    fn is_of(&self, uuid: [u8; 16]) -> bool {
        let word = |at| self.word(at).load(Ordering::Acquire);
        word(0) == MAGIC && (word(UUID), word(UUID + 1)) == halves(uuid)
    }

    /// Whether nothing is noted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty() && self.pauses() == 0 && self.memory_limit().is_none() && !self.is_attached()
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        self.words.word(at)
    }

    /// Notes a change that is about to be made. It replaces what is noted of the same place.
    ///
    /// # Errors
    /// If there is no room left, in it or in its file system. Nothing is noted then: the change is not to be made.
    pub fn note(&mut self, note: Note) -> io::Result<()> {
        let slot = match self.slots.get(&note.key()) {
            Some(slot) => *slot,
            None => self.free_slot()?,
        };
        self.word(slot).store(note.encode(), Ordering::Release);
        self.slots.insert(note.key(), slot);
        Ok(())
    }

    fn free_slot(&mut self) -> io::Result<usize> {
        if let Some(slot) = self.free.pop() {
            return Ok(slot);
        }
        if self.end == self.words.count() {
            self.words.grow()?;
        }
        self.end += 1;
        self.word(END).store(self.end as u64, Ordering::Release);
        Ok(self.end - 1)
    }

    /// Erases what is noted of a place: it is undone. The original byte of the note is of no importance.
    pub fn erase(&mut self, note: Note) {
        if let Some(slot) = self.slots.remove(&note.key()) {
            self.word(slot).store(0, Ordering::Release);
            self.free.push(slot);
        }
    }

    /// All that is noted, in no order.
    #[must_use]
    pub fn notes(&self) -> Vec<Note> {
        self.slots.values().filter_map(|slot| Note::decode(self.word(*slot).load(Ordering::Acquire))).collect()
    }

    /// How many pauses of the domain are ours.
    #[must_use]
    pub fn pauses(&self) -> u64 {
        self.word(PAUSES).load(Ordering::Acquire)
    }

    /// Notes that the domain is about to be paused once more.
    pub fn note_pause(&self) {
        self.word(PAUSES).store(self.pauses().saturating_add(1), Ordering::Release);
    }

    /// Erases a pause.
    pub fn erase_pause(&self) {
        let pauses = self.pauses();
        self.word(PAUSES).store(pauses.saturating_sub(1), Ordering::Release);
    }

    /// The domain's memory limit, if it has been raised.
    #[must_use]
    pub fn memory_limit(&self) -> Option<MemoryLimit> {
        let found = self.word(LIMIT).load(Ordering::Acquire).checked_sub(1)?;
        Some(MemoryLimit { found, raised: self.word(RAISED).load(Ordering::Acquire) })
    }

    /// Notes the domain's memory limit, which is about to be raised; `None` when it is as it was.
    pub fn note_memory_limit(&self, limit: Option<MemoryLimit>) {
        // What it is raised to first: the other word says whether it is noted.
        if let Some(limit) = limit {
            self.word(RAISED).store(limit.raised, Ordering::Release);
        }
        let found = limit.map_or(0, |limit| limit.found.saturating_add(1));
        self.word(LIMIT).store(found, Ordering::Release);
    }

    /// Whether somebody has attached to the domain. Its events may still be reported.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.word(ATTACHED).load(Ordering::Acquire) != 0
    }

    /// Notes that the domain's events are about to be reported. This is not erased: the ledger is removed after that.
    pub fn note_attached(&self) {
        self.word(ATTACHED).store(1, Ordering::Release);
    }

    /// Removes the file: nothing of the monitor is left in the domain.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove(self) -> io::Result<()> {
        self.words.remove()
    }
}

/// The name of a domain's ledger in its directory.
fn name(domain: u32) -> String {
    format!("{domain}.ledger")
}

fn path(directory: &Path, domain: u32) -> PathBuf {
    directory.join(name(domain))
}

fn halves(uuid: [u8; 16]) -> (u64, u64) {
    let number = u128::from_le_bytes(uuid);
    (number as u64, (number >> 64) as u64)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::process::Command;

    use super::*;
    use proptest::prelude::*;

    pub(super) const ID: [u8; 16] = [7; 16];

    fn any_note() -> impl Strategy<Value = Note> {
        let address = 0..=ADDRESS;
        prop_oneof![
            (address.clone(), any::<u8>()).prop_map(|(at, original)| Note::Displaced { gpa: Gpa(at), original }),
            address.clone().prop_map(|at| Note::Frame(Gfn(at))),
            address.prop_map(|at| Note::Guard(Gfn(at))),
            any::<u16>().prop_map(|view| Note::View(ViewId(view))),
            Just(Note::Altp2m),
        ]
    }

    proptest! {
        #[test]
        fn a_note_is_one_word(note in any_note()) {
            prop_assert_ne!(note.encode(), 0);
            prop_assert_eq!(Note::decode(note.encode()), Some(note));
        }

        #[test]
        fn any_word_is_a_note_or_none(word in any::<u64>()) {
            let _ = Note::decode(word);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        /// Whatever was noted and not erased when the monitor dies is what a later process finds.
        #[test]
        fn what_is_noted_outlives_the_monitor(steps in prop::collection::vec((0..20_u64, any::<u8>(), any::<bool>()), 0..60)) {
            let _alone = crate::FORKING.lock();
            let dir = tempfile::tempdir().unwrap();
            let mut expected = HashMap::new();
            let mut ledger = Ledger::create(dir.path(), 3, ID).unwrap();
            for (at, original, erase) in steps {
                let note = Note::Displaced { gpa: Gpa(at), original };
                if erase {
                    ledger.erase(note);
                    expected.remove(&at);
                } else {
                    ledger.note(note).unwrap();
                    expected.insert(at, note);
                }
            }
            drop(ledger);
            let found = Ledger::leftover(dir.path(), 3, ID).unwrap().unwrap();
            let notes: HashMap<_, _> = found.notes().into_iter().map(|note| (note.key().1, note)).collect();
            prop_assert_eq!(notes, expected);
        }
    }

    #[test]
    fn a_ledger_with_notes_is_not_written_over() {
        let _alone = crate::FORKING.lock();
        let dir = tempfile::tempdir().unwrap();
        let create = || Ledger::create(dir.path(), 3, ID);
        let mut ledger = create().unwrap();
        assert!(matches!(create(), Err(Error::Busy(_))));
        ledger.note(Note::Frame(Gfn(5))).unwrap();
        ledger.note_pause();
        drop(ledger);
        assert!(matches!(create(), Err(Error::Leftover(_))));
        // Another domain that has got the same number.
        assert!(Ledger::leftover(dir.path(), 3, [8; 16]).unwrap().is_none());
        let mut left = Ledger::leftover(dir.path(), 3, ID).unwrap().unwrap();
        assert_eq!((left.notes(), left.pauses(), left.memory_limit()), (vec![Note::Frame(Gfn(5))], 1, None));
        left.erase(Note::Frame(Gfn(5)));
        left.erase_pause();
        assert!(left.is_empty());
        drop(left);
        create().unwrap().remove().unwrap();
        assert!(Ledger::leftover(dir.path(), 3, ID).unwrap().is_none());
        assert!(Ledger::create(dir.path(), 3, [8; 16]).unwrap().is_empty());
    }

    #[test]
    fn a_memory_limit_is_ours_only_as_we_have_set_it() {
        let _alone = crate::FORKING.lock();
        let dir = tempfile::tempdir().unwrap();
        let limit = MemoryLimit { found: 65_536, raised: 65_600 };
        let ledger = Ledger::create(dir.path(), 3, ID).unwrap();
        ledger.note_memory_limit(Some(limit));
        drop(ledger);
        let left = Ledger::leftover(dir.path(), 3, ID).unwrap().unwrap();
        assert_eq!(left.memory_limit(), Some(limit));
        // The monitor may have died before it was raised the last time.
        assert!([65_536, 65_596, 65_600].into_iter().all(|now| limit.is_ours(now)));
        assert!(![65_532, 65_604, 32_768].into_iter().any(|now| limit.is_ours(now)));
        left.note_memory_limit(None);
        assert!(left.is_empty());
    }

    #[test]
    fn a_monitor_that_was_attached_has_left_something() {
        let _alone = crate::FORKING.lock();
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::create(dir.path(), 3, ID).unwrap();
        assert!(!ledger.is_attached());
        ledger.note_attached();
        drop(ledger);
        assert!(matches!(Ledger::create(dir.path(), 3, ID), Err(Error::Leftover(_))));
    }

    #[test]
    fn torn_and_foreign_files_are_no_ledgers() {
        let _alone = crate::FORKING.lock();
        let dir = tempfile::tempdir().unwrap();
        drop(Ledger::create(dir.path(), 3, ID).unwrap());
        let file = path(dir.path(), 3);
        for content in [&b""[..], b"HBPLEDG1", &[0xff; 200]] {
            fs::write(&file, content).unwrap();
            assert!(Ledger::leftover(dir.path(), 3, ID).unwrap().is_none());
            assert!(Ledger::create(dir.path(), 3, ID).unwrap().is_empty());
        }
    }

    /// Nothing that somebody else may have put there is written to, or made longer.
    #[test]
    fn only_a_file_of_ours_is_used() {
        let _alone = crate::FORKING.lock();
        let dir = tempfile::tempdir().unwrap();
        let (file, victim) = (path(dir.path(), 3), dir.path().join("victim"));
        let refuses = |what: &str| {
            for error in [
                Ledger::create(dir.path(), 3, ID).expect_err(what),
                Ledger::leftover(dir.path(), 3, ID).expect_err(what),
            ] {
                assert!(matches!(error, Error::Foreign { .. }), "{what}: {error}");
            }
            fs::remove_file(&file).unwrap();
        };
        fs::write(&victim, "precious").unwrap();
        fs::set_permissions(&victim, Permissions::from_mode(0o600)).unwrap();
        symlink(&victim, &file).unwrap();
        refuses("a symbolic link");
        symlink(dir.path().join("nothing"), &file).unwrap();
        refuses("a symbolic link to nothing");
        assert!(!dir.path().join("nothing").exists());
        fs::hard_link(&victim, &file).unwrap();
        refuses("another file's second name");
        nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
        refuses("a pipe");
        fs::write(&file, "precious").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o620)).unwrap();
        refuses("a file that others may write to");
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");

        if nix::unistd::geteuid().is_root() {
            fs::write(&file, "").unwrap();
            fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
            std::os::unix::fs::chown(&file, Some(65_534), None).unwrap();
            refuses("a file of somebody else's");
        }
    }

    #[test]
    fn only_a_directory_of_ours_is_used() {
        let _alone = crate::FORKING.lock();
        let dir = tempfile::tempdir().unwrap();
        let (ours, link) = (dir.path().join("ours"), dir.path().join("link"));
        fs::create_dir(&ours).unwrap();
        symlink(&ours, &link).unwrap();
        let refuses = |directory: &Path| matches!(Ledger::create(directory, 3, ID), Err(Error::Foreign { .. }));
        assert!(refuses(&link));
        for (mode, refused) in [(0o777, true), (0o1777, true), (0o770, true), (0o755, false), (0o700, false)] {
            fs::set_permissions(&ours, Permissions::from_mode(mode)).unwrap();
            assert_eq!(refuses(&ours), refused, "{mode:o}");
        }
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&ours, Some(65_534), None).unwrap();
            assert!(refuses(&ours));
        }
        // What is only looked for is not made.
        assert!(Ledger::leftover(&dir.path().join("none"), 3, ID).unwrap().is_none());
        assert!(!dir.path().join("none").exists());
    }

    /// A monitor that opens the file, and waits until the one before it has removed it, must not write where nobody looks.
    #[test]
    fn a_ledger_that_was_removed_before_it_was_locked_is_made_anew() {
        let _alone = crate::FORKING.lock();
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        match Ledger::create(dir.path(), 3, ID) {
                            Ok(mut ledger) => {
                                ledger.note(Note::Frame(Gfn(5))).unwrap();
                                let there = fs::read(path(dir.path(), 3)).expect("the file has its name");
                                let word = Note::Frame(Gfn(5)).encode().to_le_bytes();
                                assert!(there.chunks(8).any(|chunk| chunk == word), "it is the file that is locked");
                                ledger.remove().unwrap();
                            }
                            Err(Error::Busy(_)) => {}
                            Err(error) => panic!("{error}"),
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn a_ledger_grows() {
        let _alone = crate::FORKING.lock();
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::create(dir.path(), 3, ID).unwrap();
        for gfn in 0..3000 {
            ledger.note(Note::Guard(Gfn(gfn))).unwrap();
        }
        drop(ledger);
        let found = Ledger::leftover(dir.path(), 3, ID).unwrap().unwrap();
        assert_eq!(found.notes().len(), 3000);
        assert!(matches!(Ledger::create(dir.path(), 3, ID), Err(Error::Busy(_))));
    }

    /// Run by the tests below in a process of its own, where there is little room.
    #[test]
    #[ignore = "only where there is little room"]
    fn notes_until_there_is_no_room() {
        let dir = std::env::var_os("HYPERBP_LEDGER_DIRECTORY").map(PathBuf::from).expect("a directory");
        let mut ledger = Ledger::create(&dir, 3, ID).unwrap();
        let mut noted = 0;
        let error = loop {
            match ledger.note(Note::Guard(Gfn(noted))) {
                Ok(()) => noted += 1,
                Err(error) => break error,
            }
        };
        assert!(noted >= 500, "{noted}");
        println!("no room: {error}");
        // What is there can still be changed, and a place that is free is used again.
        ledger.erase(Note::Guard(Gfn(0)));
        ledger.note(Note::Guard(Gfn(1 << 40))).unwrap();
        ledger.note_pause();
        drop(ledger);
        let found = Ledger::leftover(&dir, 3, ID).unwrap().unwrap();
        assert_eq!((found.notes().len() as u64, found.pauses()), (noted, 1));
    }

    /// Runs that with what is done before it, in a shell that has `$0` and `$dir`.
    fn in_little_room(before: &str) -> Option<std::process::Output> {
        let dir = tempfile::tempdir().unwrap();
        let program = std::env::current_exe().unwrap();
        let test = "--exact ledger::tests::notes_until_there_is_no_room --ignored --nocapture --test-threads 1";
        let script = format!("set -e; dir=$HYPERBP_LEDGER_DIRECTORY; {before}; exec \"$0\" {test}");
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).arg(program).env("HYPERBP_LEDGER_DIRECTORY", dir.path());
        let done = command.output().unwrap();
        // What the script says when it cannot do that.
        (done.status.code() != Some(77)).then_some(done)
    }

    fn is_told(done: &std::process::Output) {
        let said = String::from_utf8_lossy(&done.stdout);
        assert!(done.status.success() && said.contains("no room: "), "{}: {said}", done.status);
    }

    #[test]
    fn a_limit_of_file_sizes_is_an_error_and_no_signal() {
        let _alone = crate::FORKING.lock();
        is_told(&in_little_room("ulimit -f 16").unwrap());
    }

    #[test]
    fn a_full_file_system_is_an_error_and_no_signal() {
        let _alone = crate::FORKING.lock();
        let mount = "unshare -m true 2>/dev/null || exit 77; \
                     exec unshare -m sh -c 'mount -t tmpfs -o size=32k,mode=700 none \"$HYPERBP_LEDGER_DIRECTORY\" || exit 77; \
                     exec \"$0\" \"$@\"' \"$0\" --exact ledger::tests::notes_until_there_is_no_room --ignored --nocapture \
                     --test-threads 1";
        match in_little_room(mount) {
            Some(done) => is_told(&done),
            None => eprintln!("skipped: nothing can be mounted here"),
        }
    }
}

//! What xenstore has of a domain.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};

/// `XS_READ`, and how an answer says that it was refused, `XS_ERROR` (`xen/include/public/io/xs_wire.h`).
const READ: u32 = 2;
const ERROR: u32 = 16;
/// `XENSTORE_PAYLOAD_MAX`.
const LONGEST: usize = 4096;

/// How much memory the toolstack lets a domain have at most, in KiB, if it has noted that.
///
/// # Errors
/// If xenstore cannot be asked.
pub(crate) fn most_memory(domain: u16) -> io::Result<Option<u64>> {
    let mut store = OpenOptions::new().read(true).write(true).open("/dev/xen/xenbus")?;
    read(&mut store, &format!("/local/domain/{domain}/memory/static-max"))
}

/// The number that a node has.
fn read(store: &mut (impl Read + Write), node: &str) -> io::Result<Option<u64>> {
    let length = node.len() as u32 + 1;
    // `struct xsd_sockmsg`: the kind, a number of ours, no transaction, and how long the rest is.
    let mut message: Vec<u8> = [READ, 0, 0, length].into_iter().flat_map(u32::to_ne_bytes).collect();
    message.extend(node.bytes());
    message.push(0);
    // All at once: the kernel takes it from there.
    store.write_all(&message)?;
    let mut head = [0; 16];
    store.read_exact(&mut head)?;
    let word = |n: usize| u32::from_ne_bytes([head[n], head[n + 1], head[n + 2], head[n + 3]]);
    let length = word(12) as usize;
    if length > LONGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "xenstore's answer is too long"));
    }
    let mut value = vec![0; length];
    store.read_exact(&mut value)?;
    if word(0) == ERROR {
        return Ok(None);
    }
    Ok(std::str::from_utf8(&value).ok().and_then(|value| value.trim().parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was asked, and what is answered.
    struct Store {
        asked: Vec<u8>,
        answer: io::Cursor<Vec<u8>>,
    }

    impl Read for Store {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.answer.read(into)
        }
    }

    impl Write for Store {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.asked.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn ask(kind: u32, length: u32, value: &[u8]) -> (Vec<u8>, io::Result<Option<u64>>) {
        let mut answer: Vec<u8> = [kind, 0, 0, length].into_iter().flat_map(u32::to_ne_bytes).collect();
        answer.extend(value);
        let mut store = Store { asked: Vec::new(), answer: io::Cursor::new(answer) };
        let read = read(&mut store, "/a");
        (store.asked, read)
    }

    #[test]
    fn a_number_is_read() {
        let (asked, read) = ask(READ, 6, b"524288");
        assert_eq!(
            asked,
            [[2, 0, 0, 0], [0; 4], [0; 4], [3, 0, 0, 0]].concat().into_iter().chain(*b"/a\0").collect::<Vec<_>>()
        );
        assert_eq!(read.unwrap(), Some(524_288));
    }

    #[test]
    fn what_is_none_is_none() {
        assert_eq!(ask(ERROR, 7, b"ENOENT\0").1.unwrap(), None);
        assert_eq!(ask(READ, 3, b"-12").1.unwrap(), None);
        assert_eq!(ask(READ, 2, b"\xff\xff").1.unwrap(), None);
    }

    #[test]
    fn an_answer_that_is_none_is_an_error() {
        ask(READ, 100_000, b"").1.unwrap_err();
        ask(READ, 9, b"123").1.unwrap_err();
    }
}

//! What DRAKVUF reports: one event a line, as JSON.

use std::collections::BTreeMap;

/// The key of the one thing that is never the same in two runs: when it was.
const TIME: &[u8] = b"\"TimeStamp\":\"";
const PLUGIN: &[u8] = b"\"Plugin\":\"";

/// Events in their order, as DRAKVUF printed them, without the time. Not as text, for DRAKVUF prints the guest's strings as they
/// are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Events(Vec<Vec<u8>>);

impl Events {
    pub(crate) fn parse(printed: &[u8]) -> Self {
        let lines = printed.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        Self(lines.map(without_time).collect())
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// How many each plugin has reported.
    pub(crate) fn by_plugin(&self) -> BTreeMap<String, usize> {
        let mut plugins = BTreeMap::new();
        for event in &self.0 {
            let plugin = value(event, PLUGIN).map(|at| String::from_utf8_lossy(&event[at]).into_owned());
            *plugins.entry(plugin.unwrap_or_else(|| "?".to_owned())).or_default() += 1;
        }
        plugins
    }

    /// The first event that is another one in `other`, or is missing here or there: its number, and both.
    pub(crate) fn difference(&self, other: &Self) -> Option<String> {
        let at = (0..self.len().max(other.len())).find(|n| self.0.get(*n) != other.0.get(*n))?;
        let show = |events: &Self| {
            let event = events.0.get(at).map(|event| String::from_utf8_lossy(event));
            event.map_or_else(|| "nothing".to_owned(), |event| event.into_owned())
        };
        Some(format!("event {} of {} and {}:\n- {}\n- {}", at + 1, self.len(), other.len(), show(self), show(other)))
    }
}

/// Where the value that follows `key` is.
fn value(event: &[u8], key: &[u8]) -> Option<std::ops::Range<usize>> {
    let begin = event.windows(key.len()).position(|window| window == key)? + key.len();
    let length = event[begin..].iter().position(|byte| *byte == b'"')?;
    Some(begin..begin + length)
}

fn without_time(event: &[u8]) -> Vec<u8> {
    let Some(time) = value(event, TIME) else { return event.to_vec() };
    [&event[..time.start], &event[time.end..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRINTED: &[u8] =
        b"{\"Plugin\":\"syscall\",\"TimeStamp\":\"1700000048.903328\",\"PID\":1,\"buf\":\"\xa0'^\"}\n\
        {\"Plugin\":\"sysret\",\"TimeStamp\":\"1700000048.903329\",\"PID\":1}\n";

    #[test]
    fn only_the_time_does_not_count() {
        let events = Events::parse(PRINTED);
        assert_eq!(events.by_plugin(), BTreeMap::from([("syscall".to_owned(), 1), ("sysret".to_owned(), 1)]));
        let later = String::from_utf8_lossy(PRINTED).replace("1700000048", "1700000099");
        assert_eq!(Events::parse(later.as_bytes()).0[1], events.0[1]);
        assert_eq!(events.difference(&events), None);

        let mut other = PRINTED.to_vec();
        let byte = other.iter_mut().find(|byte| **byte == 0xa0).unwrap();
        *byte = 0xa1;
        assert!(events.difference(&Events::parse(&other)).unwrap().starts_with("event 1 of 2 and 2:\n- {\"Plugin\""));
    }

    #[test]
    fn what_is_missing_is_a_difference() {
        let events = Events::parse(PRINTED);
        let first = Events::parse(PRINTED.split_inclusive(|byte| *byte == b'\n').next().unwrap());
        assert!(events.difference(&first).unwrap().starts_with("event 2 of 2 and 1:\n"));
        assert!(first.difference(&events).unwrap().contains("\n- nothing\n- {\"Plugin\":\"sysret\""));
        assert_eq!(Events::default().difference(&Events::parse(b"")), None);
        assert_eq!(Events::parse(b"no event\n").by_plugin(), BTreeMap::from([("?".to_owned(), 1)]));
    }
}

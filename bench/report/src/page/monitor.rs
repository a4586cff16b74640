//! Who answered the events: names and colours for people.

use crate::format::Row;

/// A host and a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Monitor<'a> {
    pub(super) host: &'a str,
    pub(super) backend: &'a str,
}

impl<'a> Monitor<'a> {
    pub(super) fn of(row: &Row<'a>) -> Self {
        Self { host: row.host, backend: row.backend }
    }

    /// Its name.
    pub(super) fn title(self) -> String {
        match (self.host, self.backend) {
            ("floor", _) => "floor (bare loop)".to_owned(),
            ("runner", backend) => backend.to_owned(),
            (host, "original") => format!("{} itself", host_title(host)),
            (host, backend) => format!("{backend} in {}", host_title(host)),
        }
    }

    /// The class of its colour. Blues and green are hyperbp, warm colours are what it is compared with; nothing is told by
    /// colour alone.
    pub(super) fn colour(self) -> &'static str {
        match (self.host, self.backend) {
            ("runner", _) => "c0",
            ("floor", _) => "c1",
            ("drakvuf", "hyperbp") => "c2",
            ("drakvuf", _) => "c3",
            ("smartvmi", "hyperbp") => "c4",
            ("smartvmi", _) => "c5",
            ("vmi-rs", _) => "c6",
            _ => "c7",
        }
    }

    /// Those of rows, in their order, each once.
    pub(super) fn all(rows: &[Row<'a>]) -> Vec<Self> {
        let mut all = Vec::new();
        for monitor in rows.iter().filter(|row| !row.is_bare()).map(Self::of) {
            if !all.contains(&monitor) {
                all.push(monitor);
            }
        }
        // Those of a host together, in the hosts' order.
        let hosts: Vec<_> = all.iter().map(|monitor| monitor.host).collect();
        all.sort_by_key(|monitor| hosts.iter().position(|host| *host == monitor.host));
        all
    }

    /// Why it has no row of this mechanism, where that is not for the run to say.
    pub(super) fn lacks(self, mechanism: &str) -> Option<String> {
        let has: &[&str] = match (self.host, self.backend) {
            ("floor", _) => &["skip", "repair", "view-step", "view-fast-step", "emulate"],
            ("drakvuf", "original") => &["view-step", "view-fast-step"],
            ("smartvmi", "original") => &["repair"],
            ("vmi-rs", "original") => &["view-fast-step"],
            (_, "hyperbp") if mechanism == "skip" => return Some("hyperbp runs what it displaces".to_owned()),
            _ => return None,
        };
        (!has.contains(&mechanism)).then(|| format!("{} has none", host_title(self.host)))
    }
}

/// How a host is called.
pub(super) fn host_title(host: &str) -> &str {
    match host {
        "drakvuf" => "DRAKVUF",
        "smartvmi" => "SmartVMI",
        "floor" => "the floor",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_has_a_name_and_says_what_it_lacks() {
        let monitor = |host, backend| Monitor { host, backend };
        assert_eq!(monitor("runner", "hyperbp").title(), "hyperbp");
        assert_eq!(monitor("drakvuf", "original").title(), "DRAKVUF itself");
        assert_eq!(monitor("smartvmi", "hyperbp").title(), "hyperbp in SmartVMI");
        assert_eq!(monitor("smartvmi", "original").lacks("repair"), None);
        assert_eq!(monitor("smartvmi", "original").lacks("emulate").as_deref(), Some("SmartVMI has none"));
        assert_eq!(monitor("runner", "hyperbp").lacks("auto"), None);
    }
}

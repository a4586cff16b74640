//! The releases of Xen that the lab boots.

use std::fmt;
use std::str::FromStr;

/// A release of Xen, as Debian has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Xen {
    /// That of Debian 12.
    #[default]
    V4_17,
    /// That of Debian 13.
    V4_20,
}

/// Packages of one Debian release. `/depends` at the end of a name stands for what that metapackage depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The release's codename.
    pub release: &'static str,
    /// The packages' names, in order.
    pub names: Vec<String>,
}

/// Where all comes from that is the same with every Xen: figures are to differ by Xen alone.
pub const RELEASE: &str = "bookworm";

/// That is: firmware, dom0's kernel (not `-cloud`, which lacks dom0 support), and its shell.
const COMMON: [&str; 4] = ["bochsbios", "busybox-static", "linux-image-amd64/depends", "vgabios"];

/// Xen's headers, libraries and programs, but for those with the version in their name; and what they need.
const XEN: [&str; 10] = [
    "libxen-dev",
    "libxencall1",
    "libxendevicemodel1",
    "libxenevtchn1",
    "libxenforeignmemory1",
    "libxengnttab1",
    "libxenhypfs1",
    "libxenstore4",
    "libxentoolcore1",
    "libxentoollog1",
];

/// Libraries that those of a newer Debian need newer than an older one has them. Programs that are linked on the older one run
/// with them just as well.
const NEWER: [&str; 5] = ["libc6", "liblzma5", "libuuid1", "libzstd1", "zlib1g"];

impl Xen {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::V4_17, Self::V4_20];

    /// Its version, as it is in names of packages and files.
    #[must_use]
    pub const fn version(self) -> &'static str {
        match self {
            Self::V4_17 => "4.17",
            Self::V4_20 => "4.20",
        }
    }

    /// The Debian release that has it.
    #[must_use]
    pub const fn release(self) -> &'static str {
        match self {
            Self::V4_17 => RELEASE,
            Self::V4_20 => "trixie",
        }
    }

    /// Where its programs are, in the sysroot and in dom0: that is compiled into them.
    #[must_use]
    pub fn programs(self) -> String {
        format!("usr/lib/xen-{self}/bin")
    }

    /// Where Xen itself is in the sysroot.
    #[must_use]
    pub fn hypervisor(self) -> String {
        format!("boot/xen-{self}-amd64.gz")
    }

    /// The packages that are unpacked.
    #[must_use]
    pub fn packages(self) -> Vec<Group> {
        let versioned = ["libxenmisc", "xen-utils-"].map(|name| format!("{name}{self}"));
        let common = COMMON.map(str::to_owned);
        let mut own: Vec<String> = XEN.map(str::to_owned).into_iter().chain(versioned).collect();
        own.extend([format!("xen-hypervisor-{self}-amd64"), "libyajl2".to_owned()]);
        let mut groups = if self.release() == RELEASE {
            own.extend(common);
            vec![Group { release: RELEASE, names: own }]
        } else {
            own.extend(NEWER.map(str::to_owned));
            vec![Group { release: RELEASE, names: common.to_vec() }, Group { release: self.release(), names: own }]
        };
        groups.iter_mut().for_each(|group| group.names.sort());
        groups
    }
}

impl fmt::Display for Xen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.version())
    }
}

impl FromStr for Xen {
    type Err = String;

    fn from_str(version: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|xen| xen.version() == version).ok_or_else(|| {
            let known = Self::ALL.map(Self::version).join(" and ");
            format!("the lab has no Xen {version}, only {known}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(xen: Xen) -> Vec<(&'static str, String)> {
        let of = |group: Group| group.names.into_iter().map(move |name| (group.release, name));
        xen.packages().into_iter().flat_map(of).collect()
    }

    #[test]
    fn each_release_has_its_own_xen() {
        for xen in Xen::ALL {
            assert_eq!(xen.to_string().parse(), Ok(xen));
            for name in [format!("libxenmisc{xen}"), format!("xen-hypervisor-{xen}-amd64"), format!("xen-utils-{xen}")]
            {
                assert!(all(xen).contains(&(xen.release(), name)), "{:?}", all(xen));
            }
        }
        assert_eq!(Xen::default().packages().len(), 1);
        let error = "4.9".parse::<Xen>().unwrap_err();
        assert_eq!(error, "the lab has no Xen 4.9, only 4.17 and 4.20");
    }

    #[test]
    fn the_kernel_is_the_same_with_every_xen() {
        for xen in Xen::ALL {
            for name in COMMON {
                assert!(all(xen).contains(&(RELEASE, name.to_owned())), "{xen}: {name}");
            }
        }
    }

    #[test]
    fn only_a_newer_debian_brings_its_c_library() {
        let has_libc = |xen| all(xen).iter().any(|(_, name)| name == "libc6");
        assert!(!has_libc(Xen::V4_17));
        assert!(has_libc(Xen::V4_20));
    }

    #[test]
    fn nothing_is_unpacked_twice() {
        for xen in Xen::ALL {
            let mut names: Vec<String> = all(xen).into_iter().map(|(_, name)| name).collect();
            let count = names.len();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), count);
        }
    }
}

//! The profile of a guest's kernel, which a monitor needs to know where things are in it: the output of `dwarf2json linux`.

use std::fs;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;

use crate::kernel::Kernel;
use crate::{Error, Result};

/// What a kernel's own description of itself begins with.
const BANNER: &[u8] = b"Linux version ";

#[derive(Debug, Deserialize)]
struct Profile {
    symbols: Symbols,
}

#[derive(Debug, Deserialize)]
struct Symbols {
    linux_banner: Option<Symbol>,
}

#[derive(Debug, Deserialize)]
struct Symbol {
    constant_data: Option<String>,
}

/// Checks that `profile` is one of this very `kernel`, for a monitor with another one sees nothing and says nothing. Returns its
/// size in bytes.
///
/// # Errors
/// [`Error::Unexpected`] when it is of another kernel, or no profile; [`Error::Io`].
pub fn check(profile: &Path, kernel: &Kernel) -> Result<u64> {
    let json = fs::read(profile).map_err(Error::io("read", profile))?;
    let read: std::result::Result<Profile, _> = serde_json::from_slice(&json);
    let package =
        format!("make one with `dwarf2json linux --elf` of the vmlinux in Debian's linux-image-{}-dbg", kernel.release);
    let unexpected = |problem: String| {
        let problem = format!("{problem}; {package}");
        Error::Unexpected { path: profile.to_owned(), problem }
    };
    let read = read.map_err(|e| unexpected(format!("not a kernel's profile ({e})")))?;
    let constant = read.symbols.linux_banner.and_then(|symbol| symbol.constant_data);
    let banner = constant.and_then(|data| BASE64.decode(data).ok());
    let banner = banner.ok_or_else(|| unexpected("it does not say which kernel it is of (linux_banner)".to_owned()))?;
    let text = line(&banner);
    let bytes = fs::read(&kernel.vmlinux).map_err(Error::io("read", &kernel.vmlinux))?;
    if !(text.starts_with(BANNER) && bytes.windows(text.len()).any(|window| window == text)) {
        return Err(unexpected(format!("it is of another kernel ({})", String::from_utf8_lossy(text))));
    }
    Ok(json.len() as u64)
}

/// Without what ends it.
fn line(banner: &[u8]) -> &[u8] {
    banner.split(|byte| matches!(byte, b'\n' | 0)).next().unwrap_or_default()
}

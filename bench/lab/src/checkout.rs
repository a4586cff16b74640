//! The checkout this was built from.

use std::path::PathBuf;

/// The repository.
#[must_use]
pub fn repo() -> PathBuf {
    let lab = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    lab.ancestors().nth(2).map(PathBuf::from).unwrap_or(lab)
}

/// Where cargo, and we, put what is built.
#[must_use]
pub fn target() -> PathBuf {
    let named = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    // Absolute, for what is built is also used from other directories.
    named.and_then(|dir| std::path::absolute(dir).ok()).unwrap_or_else(|| repo().join("target"))
}

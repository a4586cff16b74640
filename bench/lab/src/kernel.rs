//! dom0's kernel as Xen likes it best here: the plain ELF out of Debian's compressed bzImage, so that nothing has to be
//! decompressed in the emulator.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::{Error, Host, Inputs, Progress, Result, Stages, kaslr};

/// The kernel and the modules dom0's tools need.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its version, as in the name of its package.
    pub release: String,
    /// The ELF.
    pub vmlinux: PathBuf,
    /// The modules, in the order to load them.
    pub modules: Vec<PathBuf>,
}

const MODULES: &[&str] = &["xen-evtchn", "xen-gntdev", "xen-gntalloc", "xen-privcmd", "xenfs/xenfs"];

/// Offsets in a bzImage: Linux's `Documentation/arch/x86/boot.rst`.
const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// Extracts the kernel from the `sysroot` the packages were unpacked in.
///
/// # Errors
/// [`Error::Unexpected`] when there is not one kernel, or it is not an xz-compressed bzImage.
pub fn extract(host: &Host, sysroot: &Path, stages: &Stages, progress: &Progress) -> Result<Kernel> {
    let image = find_image(&sysroot.join("boot"))?;
    let release = image.file_name().unwrap_or_default().to_string_lossy()["vmlinuz-".len()..].to_owned();
    let dir = stages.build("kernel", &Inputs::new().with_file("image", &image)?, progress, |dir, log, _| {
        let bytes = fs::read(&image).map_err(Error::io("read", &image))?;
        let unexpected = |problem: &str| Error::Unexpected { path: image.clone(), problem: problem.to_owned() };
        let compressed = dir.join("vmlinux.xz");
        let payload = payload(&bytes).ok_or_else(|| unexpected("not a Linux bzImage with an xz payload"))?;
        fs::write(&compressed, payload).map_err(Error::io("write", &compressed))?;
        let vmlinux = dir.join("vmlinux");
        let out = File::create(&vmlinux).map_err(Error::io("create", &vmlinux))?;
        let mut xz = host.command("xz");
        xz.args(["-dc", "--single-stream"]).arg(&compressed).stdout(out).stderr(Stdio::null()).stdin(Stdio::null());
        log.line(&format!("$ {xz:?}"))?;
        if !xz.status().map_err(|e| crate::command::spawn_error(&xz, e))?.success() {
            return Err(unexpected("its payload does not decompress"));
        }
        fs::remove_file(&compressed).map_err(Error::io("remove", &compressed))
    })?;
    let drivers = sysroot.join("lib/modules").join(&release).join("kernel/drivers/xen");
    let modules = MODULES.iter().map(|name| drivers.join(format!("{name}.ko"))).collect();
    Ok(Kernel { release, vmlinux: dir.join("vmlinux"), modules })
}

impl Kernel {
    /// The ELF, moved up by `distance` bytes: see [`kaslr::moved`].
    ///
    /// # Errors
    /// [`Error::Unexpected`] when it cannot be moved.
    pub fn moved(&self, distance: u32) -> Result<Vec<u8>> {
        let kernel = fs::read(&self.vmlinux).map_err(Error::io("read", &self.vmlinux))?;
        if distance == 0 {
            return Ok(kernel);
        }
        kaslr::moved(&kernel, distance).ok_or_else(|| Error::Unexpected {
            path: self.vmlinux.clone(),
            problem: "a kernel that cannot be moved: it has no table of relocations".to_owned(),
        })
    }
}

fn find_image(boot: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(boot).map_err(Error::io("list", boot))?;
    let mut images = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("vmlinuz-"));
    match (images.next(), images.next()) {
        (Some(image), None) => Ok(image.path()),
        _ => Err(Error::Unexpected { path: boot.to_owned(), problem: "not exactly one kernel in it".to_owned() }),
    }
}

/// The xz stream in a bzImage, without the uncompressed size the kernel's build appends to it.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    if image.get(MAGIC..MAGIC + 4)? != b"HdrS" {
        return None;
    }
    // By the boot protocol, 0 sectors means 4, for the oldest kernels.
    let sectors = match image[SETUP_SECTORS] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + word(PAYLOAD_OFFSET)?;
    let payload = image.get(start..start.checked_add(word(PAYLOAD_LENGTH)?)?)?;
    payload.starts_with(b"\xfd7zXZ\0").then(|| payload.split_last_chunk::<4>().map(|(xz, _)| xz))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[SETUP_SECTORS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16_u32.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend([0; 16]);
        image.extend(payload);
        image
    }

    #[test]
    fn the_payload_is_found() {
        assert_eq!(payload(&image(b"\xfd7zXZ\0stream\x01\x02\x03\x04")), Some(&b"\xfd7zXZ\0stream"[..]));
    }

    #[test]
    fn anything_else_is_refused() {
        let good = image(b"\xfd7zXZ\0stream\x01\x02\x03\x04");
        assert_eq!(payload(&good[..good.len() - 1]), None);
        assert_eq!(payload(&image(b"\x28\xb5\x2f\xfdzstd")), None);
        assert_eq!(payload(b"short"), None);
        assert_eq!(payload(&[0; 2048]), None);
    }
}

//! Runner (provisional).
#![allow(dead_code)]
mod floor;
mod ring;
mod xen;

fn main() -> anyhow::Result<()> {
    let domain = xen::Domain::open(&std::env::args().nth(1).unwrap_or_default())?;
    println!("{}", domain.is_running()?);
    Ok(())
}

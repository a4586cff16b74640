//! Does under callgrind what is to be counted: [`hyperbp_benches::callgrind`] runs it.

use std::process::ExitCode;

use hyperbp_benches::callgrind::{begin, count};
use hyperbp_benches::{Scene, What, scenes};

fn main() -> ExitCode {
    match all() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn all() -> Result<(), hyperbp::Error> {
    for (_, mechanism, breakpoints) in scenes() {
        let mut scene = Scene::new(mechanism, breakpoints)?;
        for what in What::ALL {
            scene.warm_up(what)?;
            begin();
            count(&mut scene, what)?;
        }
    }
    Ok(())
}

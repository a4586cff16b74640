//! The engine on a machine that is memory alone: what nobody tells it of, what things cost, and odd events.

mod costs;
mod machine;
mod odd;
mod stale;

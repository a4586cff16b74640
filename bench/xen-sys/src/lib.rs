//! Bindings of the few functions of Xen's libraries that the benchmark's runner calls, and of the `vm_event` ring's types.
//!
//! Made from the headers by bindgen; nothing here is by hand. The ring's macros (`xen/io/ring.h`) are no functions, so
//! the runner has them in its own words.
#![allow(missing_docs, non_camel_case_types, non_snake_case, non_upper_case_globals, unreachable_pub)]
#![allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    unsafe_op_in_unsafe_fn
)]
#![allow(rustdoc::all)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));

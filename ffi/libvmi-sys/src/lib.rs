//! Bindings of the few functions of LibVMI that hyperbp calls, and of its events' types.
//!
//! Made from the installed headers by bindgen; nothing here is by hand. Building it needs LibVMI, found with pkg-config.
#![allow(missing_docs, non_camel_case_types, non_snake_case, non_upper_case_globals, unreachable_pub)]
#![allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    unsafe_op_in_unsafe_fn
)]
#![allow(rustdoc::all)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));

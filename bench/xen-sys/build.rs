//! Generates the bindings from Xen's headers, and names the libraries to link.

use std::env;
use std::path::{Path, PathBuf};

/// Where Xen's development files are, laid out as under `/`. Unset: the system's own.
const SYSROOT: &str = "HYPERBP_XEN_SYSROOT";

const LIBRARIES: [&str; 5] = ["xencall", "xenctrl", "xenevtchn", "xenforeignmemory", "xenstore"];

const FUNCTIONS: &[&str] = &[
    "xc_interface_(open|close)",
    "xc_domain_(getinfolist|pause|unpause|shutdown|maximum_gpfn|setmaxmem|debug_control|get_tsc_info)",
    "xc_domain_hvm_getcontext_partial",
    "xc_domain_(populate_physmap|decrease_reservation)_exact",
    "xc_hvm_(param_get|inject_trap)",
    "xc_physinfo",
    "xc_(maximum_ram_page|machphys_mfn_list)",
    "xc_hvm_(modified_memory|set_mem_type)",
    "xc_logdirty_control",
    "xc__hypercall_buffer_(alloc|free)_pages",
    "xc_get_(mem_access|paging_mempool_size)",
    "xc_altp2m_([gs]et_domain_state|get_vcpu_p2m_idx|set_visibility|create_view|destroy_view|switch_to_view|change_gfn)",
    "xc_altp2m_[gs]et_mem_access",
    "xc_set_mem_access",
    "xc_monitor_(enable|disable|software_breakpoint|singlestep|emul_unimplemented)",
    "xencall_(open|close|alloc_buffer|free_buffer)",
    "xencall2",
    "xenevtchn_(open|close|fd|bind_interdomain|unbind|notify|pending|unmask)",
    "xenforeignmemory_(open|close|map|unmap)",
    "xc_evtchn_status",
    "xs_(open|close|read|write|directory|watch|(read|check)_watch)",
];

const TYPES: &[&str] = &[
    "vm_event_(request_t|response_t|sring|sring_entry)",
    "xenmem_access_t",
    "hvm_hw_cpu",
    "xen_hvm_get_mem_type(_t)?",
    "hvmmem_type_t",
];

const CONSTANTS: &[&str] = &[
    "VM_EVENT_(INTERFACE_VERSION|FLAG_.*|REASON_.*)",
    "MEM_ACCESS_.*",
    "HVM_PARAM_(ALTP2M|STORE_EVTCHN|CONSOLE_EVTCHN)",
    "XEN_ALTP2M_.*",
    "__HYPERVISOR_hvm_op",
    "HVMOP_get_mem_type",
    "HVMMEM_ram_r[wo]",
    "XEN_DOMCTL_SHADOW_OP_(OFF|CLEAN|PEEK|ENABLE_LOGDIRTY)",
    "XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_OFF",
    "XEN_DOMINF_(dying|hvm_guest|paused|shutdown.*)",
    "SHUTDOWN_(crash|suspend)",
    "EVTCHNSTAT_interdomain",
];

fn main() {
    println!("cargo::rerun-if-changed=wrapper.h");
    println!("cargo::rerun-if-env-changed={SYSROOT}");
    let root = env::var_os(SYSROOT).map(PathBuf::from);
    let usr = root.as_deref().unwrap_or(Path::new("/")).join("usr");
    let include = usr.join("include");
    if !include.join("xenctrl.h").is_file() {
        println!(
            "cargo::error=no xenctrl.h in {}: run `cargo xtask bench`, which brings Xen's headers, or install libxen-dev",
            include.display()
        );
        return;
    }

    if root.is_some() {
        let lib = usr.join("lib/x86_64-linux-gnu");
        println!("cargo::rustc-link-search=native={}", lib.display());
        // For packages that link this one: the libraries need others of Xen's, which lie beside them.
        println!("cargo::metadata=lib={}", lib.display());
    }
    for library in LIBRARIES {
        println!("cargo::rustc-link-lib=dylib={library}");
    }

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("Cargo sets OUT_DIR for build scripts"));
    let mut builder = bindgen::Builder::default()
        .header("wrapper.h")
        .use_core()
        .layout_tests(false)
        .derive_default(true)
        .generate_comments(false)
        .prepend_enum_name(false)
        .merge_extern_blocks(true);
    if root.is_some() {
        builder = builder.clang_arg(format!("-I{}", include.display()));
    }
    for pattern in FUNCTIONS {
        builder = builder.allowlist_function(pattern);
    }
    for pattern in TYPES {
        builder = builder.allowlist_type(pattern);
    }
    for pattern in CONSTANTS {
        builder = builder.allowlist_var(pattern);
    }
    let written = match builder.generate() {
        Ok(bindings) => bindings.write_to_file(out.join("bindings.rs")),
        Err(error) => {
            // clang's message has many lines, and Cargo's errors have one.
            eprintln!("{error}");
            println!("cargo::error=bindgen cannot read Xen's headers: install libclang-common-14-dev and libclang1-14");
            return;
        }
    };
    if let Err(error) = written {
        println!("cargo::error=writing bindings.rs: {error}");
    }
}

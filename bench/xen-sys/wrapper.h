/* vm_event.h shows its contents to tools only. */
#define __XEN_TOOLS__ 1
/* xc_hvm_inject_trap, without one more library. */
#define XC_WANT_COMPAT_DEVICEMODEL_API 1

#include <xencall.h>
#include <xenctrl.h>
#include <xenevtchn.h>
#include <xenforeignmemory.h>
#include <xenstore.h>

#include <xen/hvm/hvm_op.h>
#include <xen/hvm/params.h>
#include <xen/hvm/save.h>
#include <xen/memory.h>
#include <xen/vm_event.h>

// Counts where ticks go, between the two time stamps that the benchmark guest takes of each of its samples.
//
// A tick is an instruction, and every tick is somebody's: the guest's (VMX non-root operation), Xen's (ring 0), or, as Xen runs
// a PV dom0 in ring 3, that of dom0's kernel or of a program there, by the half of the address space. The guest executes RDTSC
// for its time stamps and for nothing else, so nothing has to be added to it, and what is counted is what it measures.
//
// Each sample becomes a line of the file `windows.log`, in Bochs's working directory:
//
//   TICKS GUEST XEN KERNEL USER IDLE [xREASON=N | hNUMBER=N | sNUMBER=N | uCR3=N]...
//
// TICKS is what the guest sees. It is up to 31 off the sum of the others: Bochs's clock stands still while a trace of at most 32
// instructions runs, the counts do not. IDLE is ticks at which the CPU was halted. Then VM exits by reason, hypercalls of dom0
// and system calls by number, and USER by address space.
//
// For machines with one CPU: with more, ticks are shared.
//
// Part of hyperbp. As it is compiled into Bochs, under the licence of Bochs: GNU LGPL, version 2 or later.

#include "bochs.h"
#include "cpu/cpu.h"
#include "cpu/decoder/ia_opcodes.h"
#include "pc_system.h"

#include <map>

#define LOG_THIS genlog->

#if BX_INSTRUMENTATION

namespace {

enum Whose { GUEST, XEN, KERNEL, USER, IDLE, COUNT };

typedef std::map<Bit64u, Bit64u> Counts;

struct Window {
  Bit64u begun;  // as the guest saw it
  Bit64u ticks[COUNT];
  Counts exits, hypercalls, syscalls, users;
};

FILE *file;
Window window;
bool open_window;
Whose running;
Bit64u user;    // its address space, if it is a program
Bit64u passed;  // up to when everything is counted

Whose whose(const BX_CPU_C *cpu)
{
  if (cpu->in_vmx_guest) return GUEST;
  if (cpu->sregs[BX_SEG_REG_CS].selector.rpl == 0) return XEN;
  return Bit64s(cpu->gen_reg[BX_64BIT_REG_RIP].rrx) < 0 ? KERNEL : USER;
}

// Ticks until now. Bochs adds instructions to its clock after each trace of them, but what a fast string instruction takes at
// once. That is never an instruction in Bochs's own count of them.
Bit64u clock(const BX_CPU_C *cpu)
{
  return bx_pc_system.time_ticks() + cpu->icount - cpu->icount_last_sync;
}

// What has passed since the last call was the time of whoever ran.
void pass(const BX_CPU_C *cpu)
{
  const Bit64u now = clock(cpu);
  window.ticks[running] += now - passed;
  if (running == USER) window.users[user] += now - passed;
  passed = now;
}

void write(char kind, const Counts &counts, const char *format)
{
  for (Counts::const_iterator count = counts.begin(); count != counts.end(); ++count) {
    fprintf(file, format, kind, count->first);
    fprintf(file, "=" FMT_LL "u", count->second);
  }
}

// The guest takes a time stamp.
void time_stamp(BX_CPU_C *cpu)
{
  const Bit64u seen = bx_pc_system.time_ticks();
  if (!open_window) {
    window = Window();
    window.begun = seen;
    passed = clock(cpu);
    running = GUEST;
    open_window = true;
    return;
  }
  open_window = false;
  fprintf(file, FMT_LL "u", seen - window.begun);
  for (int who = 0; who < COUNT; ++who) fprintf(file, " " FMT_LL "u", window.ticks[who]);
  write('x', window.exits, " %c" FMT_LL "u");
  write('h', window.hypercalls, " %c" FMT_LL "u");
  write('s', window.syscalls, " %c" FMT_LL "u");
  write('u', window.users, " %c" FMT_LL "x");
  fputc('\n', file);
}

}

void bx_instr_init_env()
{
  file = fopen("windows.log", "w");
  if (!file) BX_PANIC(("cannot write windows.log"));
  // By lines: whoever runs Bochs may end it when he has heard what he wanted.
  setvbuf(file, NULL, _IOLBF, BUFSIZ);
}

void bx_instr_exit_env()
{
  if (file) fclose(file);
  file = NULL;
}

void bx_instr_before_execution(unsigned id, bxInstruction_c *instruction)
{
  BX_CPU_C *cpu = BX_CPU(id);
  const Bit16u opcode = instruction->getIaOpcode();
  if (opcode == BX_IA_RDTSC && cpu->in_vmx_guest) {
    if (open_window) pass(cpu);
    time_stamp(cpu);
  }
  if (!open_window) return;
  pass(cpu);
  running = whose(cpu);
  if (running == USER) user = cpu->cr3;
  if (opcode == BX_IA_SYSCALL && (running == KERNEL || running == USER)) {
    Counts &calls = running == KERNEL ? window.hypercalls : window.syscalls;
    calls[cpu->gen_reg[BX_64BIT_REG_RAX].rrx]++;
  }
}

void bx_instr_halted(unsigned id)
{
  if (!open_window) return;
  pass(BX_CPU(id));
  running = IDLE;
}

void bx_instr_vmexit(unsigned, Bit32u reason)
{
  if (open_window) window.exits[reason]++;
}

#endif

// Which of Bochs's hooks instrument.cc wants. Included by Bochs's own sources, with BX_INSTRUMENTATION as 0 or 1.
//
// Part of hyperbp. As it is compiled into Bochs, under the licence of Bochs: GNU LGPL, version 2 or later.

class bxInstruction_c;

void bx_instr_init_env();
void bx_instr_exit_env();
void bx_instr_before_execution(unsigned cpu, bxInstruction_c *instruction);
void bx_instr_halted(unsigned cpu);
void bx_instr_vmexit(unsigned cpu, Bit32u reason);

#if BX_INSTRUMENTATION
#define BX_INSTR_INIT_ENV() bx_instr_init_env()
#define BX_INSTR_EXIT_ENV() bx_instr_exit_env()
#define BX_INSTR_BEFORE_EXECUTION(cpu, instruction) bx_instr_before_execution(cpu, instruction)
#define BX_INSTR_HLT(cpu) bx_instr_halted(cpu)
#define BX_INSTR_MWAIT(cpu, address, length, flags) bx_instr_halted(cpu)
#define BX_INSTR_VMEXIT(cpu, reason, qualification) bx_instr_vmexit(cpu, reason)
#else
#define BX_INSTR_INIT_ENV()
#define BX_INSTR_EXIT_ENV()
#define BX_INSTR_BEFORE_EXECUTION(cpu, instruction)
#define BX_INSTR_HLT(cpu)
#define BX_INSTR_MWAIT(cpu, address, length, flags)
#define BX_INSTR_VMEXIT(cpu, reason, qualification)
#endif

#define BX_INSTR_INITIALIZE(cpu)
#define BX_INSTR_EXIT(cpu)
#define BX_INSTR_RESET(cpu, type)
#define BX_INSTR_DEBUG_PROMPT()
#define BX_INSTR_DEBUG_CMD(command)
#define BX_INSTR_CNEAR_BRANCH_TAKEN(cpu, from, to)
#define BX_INSTR_CNEAR_BRANCH_NOT_TAKEN(cpu, from)
#define BX_INSTR_UCNEAR_BRANCH(cpu, what, from, to)
#define BX_INSTR_FAR_BRANCH(cpu, what, from_cs, from, to_cs, to)
#define BX_INSTR_OPCODE(cpu, instruction, opcode, length, is32, is64)
#define BX_INSTR_EXCEPTION(cpu, vector, error_code)
#define BX_INSTR_INTERRUPT(cpu, vector)
#define BX_INSTR_HWINTERRUPT(cpu, vector, cs, rip)
#define BX_INSTR_CLFLUSH(cpu, linear, physical)
#define BX_INSTR_CACHE_CNTRL(cpu, what)
#define BX_INSTR_TLB_CNTRL(cpu, what, cr3)
#define BX_INSTR_PREFETCH_HINT(cpu, what, segment, offset)
#define BX_INSTR_AFTER_EXECUTION(cpu, instruction)
#define BX_INSTR_REPEAT_ITERATION(cpu, instruction)
#define BX_INSTR_LIN_ACCESS(cpu, linear, physical, length, type, access)
#define BX_INSTR_PHY_ACCESS(cpu, physical, length, type, access)
#define BX_INSTR_INP(port, length)
#define BX_INSTR_INP2(port, length, value)
#define BX_INSTR_OUTP(port, length, value)
#define BX_INSTR_WRMSR(cpu, msr, value)

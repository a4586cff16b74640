# Code that a hostile guest executes: `block` begins a piece, `site` is an instruction with a breakpoint that a piece executes once,
# and `done` ends it. See hostile.rs.
#
# RDI is a page of data, RSI another one. Where an instruction faults for good, R15 says where to go on.

        .macro block name
        .pushsection .rodata.hostile_blocks, "a"
        .quad \name
        .popsection
        .globl \name
\name:
        .endm

        .macro site
.Lsite\@:
        .pushsection .rodata.hostile_sites, "a"
        .quad .Lsite\@
        .popsection
        .endm

        .macro done
        int 0x40
        .endm

        # The instruction at hand faults for good: execution goes on at the next `9:`.
        .macro faulting
        lea r15, [rip + 9f]
        .endm


        .pushsection .rodata.hostile_sites, "a"
        .balign 8
        .globl hostile_sites
hostile_sites:
        .popsection
        .pushsection .rodata.hostile_blocks, "a"
        .balign 8
        .globl hostile_blocks
hostile_blocks:
        .popsection

        .pushsection .hostile, "awx", @progbits
        .balign 4096

# Instructions of every kind of step-over, and branches.
        block plain
        site
        nop
        site
        push rbp
        site
        mov rbp, rsp
        site
        mov rax, [rdi]
        site
        mov [rdi + 8], rax
        site
        add rax, 5
        site
        imul rax, rax, 7
        site
        lea rcx, [rip + plain]
        site
        jmp 2f
        ud2
2:      site
        call 3f
        site
        cmp rax, rcx
        site
        jne 4f
        ud2
3:      site
        ret
4:      site
        xchg [rdi + 16], rax
        site
        lock xadd [rdi + 24], rdx
        site
        movups xmm0, [rdi]
        site
        movups [rdi + 32], xmm0
        site
        push [rdi + 8]
        site
        pop [rdi + 48]
        site
        pop rbp
        done

# POPF sets and clears TF, with breakpoints on it and on what is stepped.
        block popf_tf
        pushfq
        or qword ptr [rsp], 0x100
        site
        popfq
        site
        nop
        site
        push rax
        site
        mov rax, [rdi]
        site
        pop rax
        site
        pushfq
        and qword ptr [rsp], -0x101
        site
        popfq
        site
        nop
        done

# A load of SS holds #DB back, for the instruction behind it.
        block mov_ss
        mov eax, ss
        site
        mov ss, eax
        site
        nop
        mov ss, eax
        site
        mov rax, [rdi]
        mov eax, ss
        mov ss, eax
        site
        push rax
        site
        pop rax
        mov eax, ss
        mov ss, eax
        int3
        mov ss, eax
        site
        int3
        done

# STI holds interrupts back, for the instruction behind it.
        block sti_shadow
        site
        sti
        site
        nop
        site
        cli
        sti
        site
        push rax
        site
        pop rax
        site
        cli
        done

# INT3 and its kin: plain, under a breakpoint, with prefixes.
        block int3s
        int3
        site
        int3
        .byte 0xcd, 3
        site
        .byte 0xcd, 3
        .byte 0xf3, 0xcc
        site
        .byte 0xf3, 0xcc
        site
        .byte 0x48, 0xcc
        .byte 0xf1
        site
        .byte 0xf1
        faulting
        site
        .byte 0xce                      # INTO, which 64-bit code does not have
9:      int 0x41
        site
        int 0x41
        done

# Instructions that fault for good. R12 is no canonical address.
        block faults
        faulting
        site
        ud2
9:      faulting
        site
        mov rax, [r12]
9:      faulting
        mov rbp, r12
        site
        mov rax, [rbp]
9:      faulting
        site
        mov [r12], rax
9:      faulting
        site
        push [r12]
9:      faulting
        site
        jmp r12
9:      faulting
        site
        call r12
9:      faulting
        push r12
        site
        ret
9:      add rsp, 8
        faulting
        xor ecx, ecx
        site
        div rcx
9:      faulting
        site
        movaps xmm0, [rdi + 1]
9:      faulting
        site
        .byte 0xf0, 0x90                # LOCK before what takes none
9:      faulting
        site
        .byte 0xf0, 0x01, 0xc8
9:      faulting
        site
        .byte 0xf0, 0x8b, 0x07
9:      faulting
        site
        .byte 0xf0, 0xff, 0xc0
9:      faulting
        site
        .fill 15, 1, 0x66               # 16 bytes: too long
        .byte 0x90
9:      faulting
        site
        .byte 0x0f, 0xff
9:      faulting
        site
        .byte 0x06
9:      faulting
        site
        int 0x60                        # has no gate
9:      faulting
        mov ecx, 0x1000
        site
        mov ds, ecx                     # beyond the GDT
9:      faulting
        xor eax, eax
        xor ecx, ecx
        .byte 0x0f, 0x01, 0xd4          # VMFUNC: into the first view
9:      faulting
        .irp view, 1, 2, 3, 4, 5, 6, 7, 8, 9
        mov ecx, \view
        .byte 0x0f, 0x01, 0xd4          # and into each of the others there can be
9:      faulting
        .endr
        site
        .byte 0x0f, 0x01, 0xd4
9:      done

# What only CPL 0 may do.
        block privileged
        faulting
        site
        hlt
9:      faulting
        site
        cli
9:      faulting
        site
        sti
9:      faulting
        site
        mov rax, cr0
9:      faulting
        site
        mov rax, cr3
9:      faulting
        site
        mov rax, dr6
9:      faulting
        site
        mov dr7, rax
9:      faulting
        site
        rdmsr
9:      faulting
        site
        wrmsr
9:      faulting
        site
        invlpg [rdi]
9:      faulting
        site
        lgdt [rdi]
9:      faulting
        site
        ltr ax
9:      faulting
        site
        in al, dx
9:      faulting
        site
        clts
9:      faulting
        site
        wbinvd
9:      faulting
        site
        swapgs
9:      faulting
        site
        sysretq
9:      faulting
        site
        int 0x50
9:      faulting
        site
        lmsw ax
9:      faulting
        site
        vmcall
9:      done

# Memory that faults once: R12 is the first of twelve pages. The handler makes what is lacking, and has the instruction run again.
        block page_faults
        site
        mov rax, [r12]
        site
        mov [r12 + 0x1000], rax
        site
        push [r12 + 0x2000]
        site
        pop [r12 + 0x3000]
        lea rax, [rip + 2f]
        mov [rdi], rax
        site
        call [rdi]
        jmp 3f
2:      site
        ret
3:      site
        add [r12 + 0x4000], rax
        site
        movups xmm0, [r12 + 0x5000]
        lea rsi, [r12 + 0x6000]
        mov ecx, 3
        site
        rep lodsb
        mov rdx, rdi
        lea rdi, [r12 + 0x7000]
        mov ecx, 3
        site
        rep stosb
        mov rdi, rdx
        site
        mov rax, [r12 + 0x8ffc]
        mov rbp, rsp
        lea rsp, [r12 + 0xa800]
        site
        push rbp
        site
        pop rbp
        mov rsp, rbp
        site
        lock xadd [r12 + 0xb000], rdx
        done

# Jumps into the middle of instructions with breakpoints.
        block middle
        site
2:      .byte 0x48, 0xb8, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xc3
        lea rcx, [rip + 2b + 2]
        site
        call rcx
        site
        call 5f
        lea rcx, [rip + 5f + 1]
        site
        call rcx
        site
        jmp 6f
5:      site
        lock inc qword ptr [rdi]
        ret
6:      done

# Prefixes, and string instructions.
        block prefixes
        mov rbp, rdi
        site
        .byte 0xf3, 0x90
        site
        .byte 0x66, 0x66, 0x66, 0x90
        site
        .byte 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0
        site
        .byte 0x48, 0x66, 0x90
        site
        .fill 14, 1, 0x66
        .byte 0x90
        mov ecx, 5
        site
        rep movsb
        xor ecx, ecx
        site
        rep stosb
        mov ecx, 3
        site
        rep lodsq
        mov ecx, 4
        site
        repne scasb
        mov ecx, 1
        add rdi, 64
        std
        site
        rep movsq
        cld
        lea rsi, [rip + prefixes]
        mov ecx, 8
        site
        rep lodsb                       # of this page, which has breakpoints
        mov rdi, rbp
        site
        lock cmpxchg [rdi + 0x100], rcx
        site
        lock cmpxchg16b [rdi + 0x100]
        site
        .byte 0xf2, 0xeb, 0
        site
        .byte 0x3e, 0x74, 0
        site
        mov rax, gs:[0]
        site
        .byte 0x67, 0x8b, 0x07
        mov eax, 1
        xor ecx, ecx
        site
        cpuid
        xor eax, eax
        site
        sgdt [rdi]
        site
        sidt [rdi + 16]
        site
        str eax
        site
        smsw ecx
        site
        lsl edx, eax
        site
        lar ecx, eax
        site
        verr ax
        done

# Code that writes what comes next, with breakpoints on both.
        block self_modifying
        site
        mov byte ptr [rip + 2f + 1], 0x5a
        site
2:      mov al, 0x11
        site
        mov byte ptr [rip + 2f], 0xf9   # STC for CLC
        site
2:      clc
        site
        mov byte ptr [rip + 2f], 0xcc   # an INT3 of the guest's own
        site
2:      nop
        site
        mov word ptr [rip + 2f], 0xc3ff # INC EBX
        site
2:      .byte 0x90, 0x90
        mov rbp, rdi
        lea rdi, [rip + 2f]
        mov al, 0xfd                    # STD four times
        mov ecx, 4
        site
        rep stosb
2:      site
        nop
        site
        nop
        site
        nop
        site
        nop
        cld
        mov rdi, rbp
        mov al, 0xf9
        site
        xchg [rip + 2f], al
        site
2:      clc
        mov al, 0xf9
        mov cl, 0xf8
        site
        lock cmpxchg [rip + 2f], cl
        site
2:      stc
        movups xmm0, [rip + 3f]
        site
        movups [rip + 2f], xmm0
2:      site
        .fill 8, 1, 0x90
        site
        .fill 8, 1, 0x90
        jmp 4f
3:      .byte 0x48, 0xff, 0xc3, 0x90, 0x90, 0x90, 0x90, 0x90
        .byte 0x48, 0xff, 0xcb, 0x48, 0xff, 0xcb, 0x90, 0x90
4:      mov rbp, rsp
        lea rsp, [rip + 2f + 8]
        mov rax, 0xf9f9f9f9f9f9f9f9
        site
        push rax
        mov rsp, rbp
2:      site
        .fill 4, 1, 0xf8
        site
        .fill 4, 1, 0xf8
        site
        not byte ptr [rip + 2f]         # 0x6f becomes 0x90
        site
2:      .byte 0x6f
        done

# System calls: RCX and R11 are lost.
        block system_call
        site
        syscall
        site
        nop
        syscall
        site
        push rcx
        site
        pop rcx
        done

# A page with code whose translation lacks something, once.
        .balign 4096
        block fetch_fault
        site
        nop
        site
        push rax
        site
        mov rax, [rip + fetch_fault]
        site
        pop rax
        site
        mov [rip + 2f], eax
        done
        .balign 4
2:      .long 0

# An instruction across the end of a page.
        .balign 4096
        .fill 4092, 1, 0x90
        block straddling
        site
        .byte 0x48, 0xb8, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88
        site
        mov [rdi], rax
        done
        .balign 4096
        .fill 4095, 1, 0x90
        block straddling_push
        site
        .byte 0x41, 0x57                # push r15
        site
        .byte 0x41, 0x5e                # pop r14
        done
        .balign 4096
        .fill 4093, 1, 0x90
        block straddling_call
        site
        call 2f
        done
2:      site
        ret

# Pages with code in them and something that the CPU reads by itself: the stack, descriptor tables, a TSS, page tables.
        .balign 4096
        .globl shared_page
shared_page:
        .fill 2048, 1, 0
        block in_shared_page
        site
        nop
        site
        push rax
        site
        mov rax, [rsp]
        site
        pop rcx
        site
        int3
        int3
        site
        int 0x41
        site
        call 2f
        jmp 3f
2:      site
        ret
3:      mov eax, ds
        site
        mov ds, eax
        mov eax, 0x1b
        site
        mov ds, eax
        site
        mov es, eax
        site
        lsl ecx, eax
        site
        lar edx, eax
        site
        verr ax
        site
        verw ax
        push rax
        site
        .byte 0x0f, 0xa1                # pop fs
        mov ecx, cs
        push rcx
        lea rcx, [rip + 2f]
        push rcx
        site
        retfq
2:      mov ecx, ss
        mov rax, rsp
        push rcx
        push rax
        pushfq
        mov ecx, cs
        push rcx
        lea rcx, [rip + 2f]
        push rcx
        site
        iretq
2:      faulting
        site
        ud2
9:      faulting
        mov ecx, 0x1000
        site
        mov ds, ecx
9:      site
        mov rax, [rdi]
        site
        mov [rdi], rax
        site
        push [rdi]
        site
        pop rax
        pushfq
        site
        popfq
        site
        enter 16, 0
        site
        leave
        done

# Without breakpoints: what reads the pages that have some.
        .balign 4096
        .macro mix
        xor r15, rax
        imul r15, r14
        rol r15, 11
        .endm

        block read_widths               # from R12 to R13
2:      movzx eax, byte ptr [r12]
        mix
        movzx eax, word ptr [r12]
        mix
        mov eax, [r12]
        mix
        mov rax, [r12]
        mix
        movups xmm0, [r12]
        movq rax, xmm0
        mix
        psrldq xmm0, 8
        movq rax, xmm0
        mix
        cmp byte ptr [r12], 0xcc
        sete al
        mix
        bt qword ptr [r12], 5
        setc al
        mix
        xor eax, eax
        add rax, [r12]
        mix
        crc32 rax, qword ptr [r12]
        mix
        push [r12]
        pop rax
        mix
        xor eax, eax
        lock cmpxchg [r12], rax         # writes what it has read, unless that is 0
        mix
        inc r12
        cmp r12, r13
        jb 2b
        done

        .set WINDOW, 160
        block read_strings              # WINDOW bytes from R12 on, by way of those at RDI
        mov r10, rdi
        mov rsi, r12
        mov ecx, WINDOW / 8
        rep movsq
        mov rsi, r12
        mov ecx, WINDOW
3:      lodsb
        mix
        loop 3b
        mov rsi, r12
        mov rdi, r10
        mov ecx, WINDOW
        repe cmpsb
        mov rax, rcx
        mix
        mov rdi, r12
        mov ecx, WINDOW
        mov al, 0xcc
        repne scasb
        mov rax, rcx
        mix
        std
        lea rsi, [r12 + WINDOW - 1]
        lea rdi, [r10 + WINDOW - 1]
        mov ecx, WINDOW
        rep movsb
        cld
        mov rsi, r10
        mov ecx, WINDOW / 8
3:      lodsq
        mix
        loop 3b
        done

        block digest                    # RCX words from RSI on
2:      mov rax, [rsi]
        mix
        add rsi, 8
        dec rcx
        jnz 2b
        done

# Single steps from branch to branch, if the CPU has them.
        block branch_step
        faulting
        mov ecx, 0x1d9                  # IA32_DEBUGCTL
        mov eax, 2                      # BTF
        xor edx, edx
        wrmsr
9:      pushfq
        or qword ptr [rsp], 0x100
        popfq
        site
        nop
        site
        jmp 2f
        ud2
2:      site
        push rax
        site
        pop rax
        site
        call 3f
        jmp 4f
3:      site
        ret
4:      pushfq
        and qword ptr [rsp], -0x101
        popfq
        faulting
        mov ecx, 0x1d9
        xor eax, eax
        xor edx, edx
        wrmsr
9:      done

# Whether the CPU has them: then nothing of this is stepped.
        block branch_step_there
        faulting
        mov ecx, 0x1d9
        mov eax, 2
        xor edx, edx
        wrmsr
9:      pushfq
        or qword ptr [rsp], 0x100
        popfq
        nop
        pushfq
        and qword ptr [rsp], -0x101
        popfq
        faulting
        mov ecx, 0x1d9
        xor eax, eax
        xor edx, edx
        wrmsr
9:      done

# Operands that are not aligned, for a #AC.
        block unaligned
        faulting
        site
        mov rax, [rdi + 1]
9:      faulting
        site
        mov [rdi + 1], rax
9:      faulting
        site
        push [rdi + 3]
9:      faulting
        site
        imul rax, [rdi + 5], 3
9:      site
        mov rax, [rdi]
        lea rsp, [rsp - 1]
        faulting
        site
        push rax
9:      done

# Code that another vCPU writes: the immediate.
        block modified
        site
        mov al, 0x11
        site
        nop
        done

# Time stamps on both sides of a hit.
        block time_stamps
        rdtsc
        shl rdx, 32
        lea r8, [rax + rdx]
        site
        nop
        rdtsc
        shl rdx, 32
        lea r9, [rax + rdx]
        site
        push rdi
        site
        pop rdi
        rdtsc
        shl rdx, 32
        lea r10, [rax + rdx]
        cmp r8, r9
        setbe al
        cmp r9, r10
        setbe cl
        movzx eax, al
        movzx ecx, cl
        xor edx, edx
        xor r8d, r8d
        xor r9d, r9d
        xor r10d, r10d
        done

# A data breakpoint of the guest's own, set right before the hit.
        block dr7_at_once
        mov dr7, rax
        site
        mov rcx, [rdi]
        mov dr7, rdx
        mov dr7, rax
        site
        mov [rdi], rcx
        mov dr7, rdx
        mov dr7, rax
        site
        push [rdi]
        site
        pop [rdi]
        mov dr7, rdx
        mov dr7, rax
        site
        movups xmm0, [rdi]
        site
        xchg [rdi], rcx
        mov dr7, rdx
        mov dr7, rax
        site
        imul rcx, [rdi], 3
        mov dr7, rdx
        done

        .balign 4096
        .popsection

        .pushsection .rodata.hostile_sites, "a"
        .globl hostile_sites_end
hostile_sites_end:
        .popsection
        .pushsection .rodata.hostile_blocks, "a"
        .globl hostile_blocks_end
hostile_blocks_end:
        .popsection

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

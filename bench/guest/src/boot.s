# From Xen's PVH entry to Rust in long mode.
#
# Xen enters in 32-bit protected mode with flat segments, paging and interrupts off, and the address of its start
# information in EBX, of which nothing is needed here (Xen, docs/misc/pvh.pandoc).

        .pushsection .note.xen, "a", @note
        .balign 4
        .long 4                         # bytes of the name
        .long 4                         # bytes of the descriptor
        .long 18                        # XEN_ELFNOTE_PHYS32_ENTRY
        .asciz "Xen"
        .long pvh_start
        .popsection

        .pushsection .text.boot, "ax"
        .code32
        .globl pvh_start
pvh_start:
        cld
        mov esp, offset boot_stack_top
        mov eax, cr4
        or eax, 0x620                   # PAE, OSFXSR, OSXMMEXCPT: Rust's code for this target uses SSE
        mov cr4, eax
        mov eax, offset page_map_level_4
        mov cr3, eax
        mov ecx, 0xc0000080             # IA32_EFER
        rdmsr
        or eax, 0x100                   # LME
        wrmsr
        mov eax, cr0
        and eax, ~0xc                   # no TS and EM: SSE must not fault
        or eax, 0x80010003              # PG, WP, MP, PE
        mov cr0, eax
        lgdt [gdt_register]
        mov eax, offset long_mode
        push {code}
        push eax
        retf                            # into 64-bit code

        .code64
long_mode:
        mov eax, {data}
        mov ds, eax
        mov es, eax
        mov ss, eax
        xor eax, eax
        mov fs, eax
        mov gs, eax
        mov rsp, offset boot_stack_top
        xor ebp, ebp
        call {main}
        ud2
        .popsection

# Where Xen starts the other virtual CPUs: in long mode, with the stack, CR3 and RDI (the number) they were initialised
# with, but with no descriptor table.
        .pushsection .text.boot, "ax"
        .globl vcpu_start
vcpu_start:
        lgdt [gdt_register]
        mov eax, {data}
        mov ds, eax
        mov es, eax
        mov ss, eax
        xor eax, eax
        mov fs, eax
        mov gs, eax
        push {code}
        lea rax, [rip + 2f]
        push rax
        retfq
2:      xor ebp, ebp
        call {other}
        ud2
        .popsection

        .pushsection .rodata.gdt, "a"
        .balign 8
gdt:    .quad 0
        .quad 0x00af9b000000ffff        # code: 64 bits, ring 0, accessed
        .quad 0x00cf93000000ffff        # data: writable, ring 0, accessed
gdt_register:
        .word gdt_register - gdt - 1
        .quad gdt                       # 64-bit code loads all of it, 32-bit code the lower half
        .popsection

# Guest-virtual is guest-physical. The first 4 MiB, which hold the image and the control page, have 4 KiB pages, so that
# a monitor meets the page under test the way it does in any guest; 2 MiB pages follow, up to 1 GiB. From there on the same
# is mapped once more, all of it by 2 MiB pages. The last GiB of guest-physical addresses below 4 GiB, where no memory is,
# is mapped too, and so is the GiB that begins at 5 GiB, where a monitor's shadow pages are; from 2 to 3 GiB belongs to the
# module `balloon`. Every entry is present, writable, executable, accessed and dirty, and for ring 3, too (0x67): no first
# access is dearer than the ones after it.
        .pushsection .page_tables, "aw"
        .balign 4096
page_map_level_4:
        .quad page_directory_pointers + 0x67
        .fill 511, 8, 0
        .globl page_directory_pointers
page_directory_pointers:
        .quad page_directory + 0x67
        .quad page_directory_again + 0x67
        .quad 0
        .quad page_directory_high + 0x67
        .quad 0
        .quad page_directory_shadows + 0x67
        .fill 506, 8, 0
        .globl page_directory
page_directory:
        .quad page_tables + 0x67
        .quad page_tables + 4096 + 0x67
        .set address, 0x400000
        .rept 510
        .quad address + 0xe7            # and PS: a 2 MiB page
        .set address, address + 0x200000
        .endr
page_directory_again:
        .set address, 0
        .rept 512
        .quad address + 0xe7
        .set address, address + 0x200000
        .endr
page_directory_high:
        .set address, 0xc0000000
        .rept 512
        .quad address + 0xe7
        .set address, address + 0x200000
        .endr
page_directory_shadows:
        .set address, 0x140000000
        .rept 512
        .quad address + 0xe7
        .set address, address + 0x200000
        .endr
        .globl page_tables
page_tables:
        .set address, 0
        .rept 1024
        .quad address + 0x67
        .set address, address + 0x1000
        .endr
        .popsection

        .pushsection .bss.boot_stack, "aw", @nobits
        .balign 4096
        .fill {stack_size}
        .globl boot_stack_top
boot_stack_top:
        .popsection

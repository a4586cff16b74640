//! The instructions of [`Workload::Snippets`](crate::Workload::Snippets).
//!
//! Each has a slot in the guest's snippet pages: a jump away, the instruction, and two more jumps away. The guest loads
//! all registers, jumps to the instruction, and digests what it finds behind whichever of the jumps it came out of.

use crate::PAGE_SIZE;

/// How often one run of the workload executes each snippet. Every second time, code and data are used through a mapping
/// by 2 MiB pages, else through one by 4 KiB pages.
pub const SNIPPET_RUNS: usize = 4;

/// Bytes of a slot.
const SLOT: usize = 256;
/// Slots in a page. The last one's instruction begins in the page and ends, if it is long enough, in the next.
const SLOTS: usize = PAGE_SIZE / SLOT;
/// Bytes of a near jump, which each slot begins with.
pub const JUMP: usize = 5;
/// Most bytes of a snippet: one long instruction, or a few short ones.
const BYTES: usize = 16;

/// An instruction under test, and what goes with it.
#[derive(Clone, Copy, Debug)]
pub struct Snippet {
    bytes: [u8; BYTES],
    length: u8,
    /// Bit n: there is a breakpoint on byte n.
    breakpoints: u16,
    /// Bit n: the CPU gets to an instruction that begins there.
    executed: u16,
    /// What it needs besides plain memory and any numbers.
    pub needs: Needs,
    /// The byte that is written before each run, and with which value in even and odd ones.
    pub rewrite: Option<(usize, [u8; 2])>,
}

/// What a snippet needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// RSP, RBP, RSI, RDI, R12 and R13 point into the data, R9 and R14 are small, everything else is any number.
    Nothing,
    /// RAX is the address of the last jump of the slot.
    Target,
    /// What RSP points to is the address of the last jump of the slot.
    Return,
    /// Its last four bytes are how far from its end a word of the data is, and that is the address of the last jump of the
    /// slot: as in the import thunks of Windows.
    Import,
    /// RDI is where extended state of the FPU can be, without any in it; RDX:RAX selects that of the x87.
    ExtendedState,
    /// RAX and RDI are a hypercall that changes nothing: `XENVER_version` of `__HYPERVISOR_xen_version`.
    Hypercall,
}

impl Snippet {
    const fn new(code: &[u8]) -> Self {
        let mut bytes = [0; BYTES];
        let mut n = 0;
        while n < code.len() {
            bytes[n] = code[n];
            n += 1;
        }
        let length = code.len() as u8;
        Self { bytes, length, breakpoints: 1, executed: 1, needs: Needs::Nothing, rewrite: None }
    }

    const fn needing(self, needs: Needs) -> Self {
        Self { needs, ..self }
    }

    const fn breakpoints(self, breakpoints: u16, executed: u16) -> Self {
        Self { breakpoints, executed, ..self }
    }

    const fn rewriting(self, byte: usize, values: [u8; 2]) -> Self {
        Self { rewrite: Some((byte, values)), ..self }
    }

    /// The instruction, or instructions.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    /// Which bytes have a breakpoint, and whether each is hit.
    pub fn breakpoints_and_hits(&self) -> impl Iterator<Item = (usize, bool)> + use<> {
        let Self { breakpoints, executed, .. } = *self;
        (0..BYTES).filter(move |n| breakpoints >> n & 1 != 0).map(move |n| (n, executed >> n & 1 != 0))
    }
}

/// Where the first byte of a snippet is, from the start of the first snippet page.
#[must_use]
pub const fn snippet_offset(index: usize) -> usize {
    let (page, slot) = (index / SLOTS, index % SLOTS);
    match slot == SLOTS - 1 {
        // One byte of it, or two.
        true => (page + 1) * PAGE_SIZE - 1 - page % 2,
        false => index * SLOT + SLOT / 2,
    }
}

/// Pages that the slots take.
pub const SNIPPET_PAGES: usize = SNIPPETS.len().div_ceil(SLOTS) + 1;

/// Those of arithmetic, by operation and width.
const ARITHMETIC: usize = 8 * (4 * 3 + 2);

/// All of them.
pub const SNIPPETS: [Snippet; ARITHMETIC + OTHERS.len()] = {
    let mut all = [Snippet::new(&[]); ARITHMETIC + OTHERS.len()];
    let (mut n, mut operation) = (0, 0);
    while operation < 8 {
        let mut width = 0;
        while width < 4 {
            let forms = arithmetic(operation, width);
            let mut form = 0;
            while form < forms.len() {
                // The last two, each operation in one width.
                let wanted = match form {
                    3 => operation % 4 == width,
                    4 => (operation + 1) % 4 == width,
                    _ => true,
                };
                if wanted {
                    all[n] = forms[form];
                    n += 1;
                }
                form += 1;
            }
            width += 1;
        }
        operation += 1;
    }
    assert!(n == ARITHMETIC);
    let mut other = 0;
    while other < OTHERS.len() {
        all[n + other] = OTHERS[other];
        other += 1;
    }
    all
};

/// ADD, OR, ADC, SBB, AND, SUB, XOR or CMP of 1, 2, 4 or 8 bytes: two registers, an immediate, from memory, to memory,
/// and the accumulator with an immediate.
const fn arithmetic(operation: u8, width: u8) -> [Snippet; 5] {
    let opcode = operation << 3;
    let wide = (width > 0) as u8;
    // Two bytes (AH and BL), or RDX and RBX.
    let registers = if width == 0 { 0xe3 } else { 0xd3 };
    let immediate = match (width, operation % 2) {
        (0, _) => with_width(width, &[0x80, 0xc3 | opcode, 0x9c]),
        (_, 0) => with_width(width, &[0x83, 0xc3 | opcode, 0xe5]),
        (1, _) => with_width(width, &[0x81, 0xc3 | opcode, 0xef, 0xcd]),
        _ => with_width(width, &[0x81, 0xc3 | opcode, 0xef, 0xcd, 0xab, 0x89]),
    };
    let accumulator = match width {
        0 => with_width(width, &[opcode | 4, 0x81]),
        1 => with_width(width, &[opcode | 5, 0x01, 0x80]),
        _ => with_width(width, &[opcode | 5, 0x78, 0x56, 0x34, 0x92]),
    };
    [
        with_width(width, &[opcode | wide, registers]),
        immediate,
        with_width(width, &[opcode | 2 | wide, 0x46, 0x10]),
        with_width(width, &[opcode | wide, 0x56, 0x08]),
        accumulator,
    ]
}

/// An instruction with the prefix that makes it one of 1, 2, 4 or 8 bytes.
const fn with_width(width: u8, code: &[u8]) -> Snippet {
    let plain = Snippet::new(code);
    let prefix = match width {
        1 => 0x66,
        3 => 0x48,
        _ => return plain,
    };
    let mut bytes = [prefix; BYTES];
    let mut n = 0;
    while n + 1 < BYTES {
        bytes[n + 1] = plain.bytes[n];
        n += 1;
    }
    Snippet { bytes, length: plain.length + 1, ..plain }
}

/// Everything else.
const OTHERS: &[Snippet] = &[
    // What does nothing.
    Snippet::new(&[0x90]),                                                       // nop
    Snippet::new(&[0x66, 0x90]),                                                 // two bytes
    Snippet::new(&[0x0f, 0x1f, 0x44, 0x00, 0x00]),                               // five bytes
    Snippet::new(&[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00]), // ten bytes
    Snippet::new(&[0xf3, 0x0f, 0x1e, 0xfa]),                                     // endbr64
    Snippet::new(&[0xf3, 0x0f, 0x1e, 0xfb]),                                     // endbr32
    Snippet::new(&[0xf3, 0x90]),                                                 // pause
    // The stack.
    Snippet::new(&[0x55]),                         // push rbp
    Snippet::new(&[0x50]),                         // push rax
    Snippet::new(&[0x54]),                         // push rsp
    Snippet::new(&[0x41, 0x57]),                   // push r15
    Snippet::new(&[0x40, 0x53]),                   // push rbx, with an empty REX
    Snippet::new(&[0x6a, 0xf0]),                   // push -16
    Snippet::new(&[0x68, 0x78, 0x56, 0x34, 0x92]), // push an immediate of 32 bits
    Snippet::new(&[0x66, 0x50]),                   // push ax
    Snippet::new(&[0xff, 0x36]),                   // push [rsi]
    Snippet::new(&[0xff, 0x34, 0x24]),             // push [rsp]
    Snippet::new(&[0xff, 0x74, 0x24, 0xf8]),       // push [rsp - 8]: where it is pushed to
    Snippet::new(&[0x42, 0xff, 0x74, 0x4e, 0xf1]), // push [rsi + r9 * 2 - 15]
    Snippet::new(&[0x41, 0xff, 0x75, 0x00]),       // push [r13]
    Snippet::new(&[0x66, 0xff, 0x36]),             // push word [rsi]
    Snippet::new(&[0x9c]),                         // pushfq
    Snippet::new(&[0x5d]),                         // pop rbp
    Snippet::new(&[0x58]),                         // pop rax
    Snippet::new(&[0x5c]),                         // pop rsp
    Snippet::new(&[0x41, 0x5f]),                   // pop r15
    Snippet::new(&[0x66, 0x58]),                   // pop ax
    Snippet::new(&[0x8f, 0x06]),                   // pop [rsi]
    Snippet::new(&[0xc9]),                         // leave
    Snippet::new(&[0xc8, 0x10, 0x00, 0x00]),       // enter 16, 0
    // Moves.
    Snippet::new(&[0x48, 0x89, 0xe5]),                         // mov rbp, rsp
    Snippet::new(&[0x48, 0x89, 0xc4]),                         // mov rsp, rax
    Snippet::new(&[0x89, 0xc3]),                               // mov ebx, eax
    Snippet::new(&[0x66, 0x89, 0xc3]),                         // mov bx, ax
    Snippet::new(&[0x88, 0xe3]),                               // mov bl, ah
    Snippet::new(&[0x44, 0x88, 0xc6]),                         // mov sil, r8b
    Snippet::new(&[0x8b, 0x46, 0xf8]),                         // mov eax, [rsi - 8]
    Snippet::new(&[0x48, 0x8b, 0x06]),                         // mov rax, [rsi]
    Snippet::new(&[0x66, 0x8b, 0x46, 0x03]),                   // mov ax, [rsi + 3]
    Snippet::new(&[0x8a, 0x26]),                               // mov ah, [rsi]
    Snippet::new(&[0x4a, 0x8b, 0x04, 0x4e]),                   // mov rax, [rsi + r9 * 2]
    Snippet::new(&[0x48, 0x8b, 0x44, 0x24, 0x08]),             // mov rax, [rsp + 8]
    Snippet::new(&[0x49, 0x8b, 0x45, 0x00]),                   // mov rax, [r13]
    Snippet::new(&[0x43, 0x8b, 0x44, 0xb4, 0xf0]),             // mov eax, [r12 + r14 * 4 - 16]
    Snippet::new(&[0x48, 0x89, 0x5c, 0x24, 0x08]),             // mov [rsp + 8], rbx
    Snippet::new(&[0x48, 0x89, 0x45, 0xf8]),                   // mov [rbp - 8], rax
    Snippet::new(&[0x88, 0x46, 0x01]),                         // mov [rsi + 1], al
    Snippet::new(&[0x66, 0x89, 0x06]),                         // mov [rsi], ax
    Snippet::new(&[0x89, 0x4d, 0x05]),                         // mov [rbp + 5], ecx
    Snippet::new(&[0xc6, 0x44, 0x24, 0x07, 0x5a]),             // mov byte [rsp + 7], 0x5a
    Snippet::new(&[0x66, 0xc7, 0x06, 0x34, 0x12]),             // mov word [rsi], 0x1234
    Snippet::new(&[0xc7, 0x45, 0xfc, 0xff, 0xff, 0xff, 0xff]), // mov dword [rbp - 4], -1
    Snippet::new(&[0x48, 0xc7, 0x44, 0x24, 0x20, 0x80, 0xff, 0xff, 0xff]), // mov qword [rsp + 32], -128
    Snippet::new(&[0xb0, 0x81]),                               // mov al, 0x81
    Snippet::new(&[0xb7, 0x7f]),                               // mov bh, 0x7f
    Snippet::new(&[0x66, 0xb8, 0x34, 0x92]),                   // mov ax, 0x9234
    Snippet::new(&[0xb8, 0x78, 0x56, 0x34, 0x92]),             // mov eax, an immediate
    Snippet::new(&[0x48, 0xc7, 0xc0, 0x80, 0xff, 0xff, 0xff]), // mov rax, -128
    Snippet::new(&[0x49, 0xbf, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x91]), // mov r15, an immediate of 64 bits
    Snippet::new(&[0x0f, 0xb6, 0xc4]),                         // movzx eax, ah
    Snippet::new(&[0x48, 0x0f, 0xb7, 0x06]),                   // movzx rax, word [rsi]
    Snippet::new(&[0x0f, 0xbe, 0xd8]),                         // movsx ebx, al
    Snippet::new(&[0x48, 0x63, 0xd8]),                         // movsxd rbx, eax
    Snippet::new(&[0x4c, 0x63, 0x06]),                         // movsxd r8, [rsi]
    Snippet::new(&[0x48, 0x87, 0xd8]),                         // xchg rax, rbx
    Snippet::new(&[0x48, 0x93]),                               // xchg rax, rbx
    Snippet::new(&[0x87, 0x06]),                               // xchg [rsi], eax
    Snippet::new(&[0x48, 0x8d, 0x44, 0x4e, 0x08]),             // lea rax, [rsi + rcx * 2 + 8]
    Snippet::new(&[0x67, 0x8d, 0x44, 0x4e, 0x08]),             // lea eax, [esi + ecx * 2 + 8]
    Snippet::new(&[0x66, 0x8d, 0x06]),                         // lea ax, [rsi]
    Snippet::new(&[0x48, 0x8d, 0x05, 0x10, 0x00, 0x00, 0x00]), // lea rax, [rip + 16]
    Snippet::new(&[0x48, 0x8d, 0x64, 0x24, 0xf0]),             // lea rsp, [rsp - 16]
    // Arithmetic that is not in `arithmetic`.
    Snippet::new(&[0x84, 0xc4]),                               // test ah, al
    Snippet::new(&[0x66, 0x85, 0xd8]),                         // test ax, bx
    Snippet::new(&[0x48, 0x85, 0xc0]),                         // test rax, rax
    Snippet::new(&[0xa8, 0x80]),                               // test al, 0x80
    Snippet::new(&[0xa9, 0x00, 0x00, 0x00, 0x80]),             // test eax, an immediate
    Snippet::new(&[0xf6, 0x06, 0x81]),                         // test byte [rsi], 0x81
    Snippet::new(&[0x48, 0xf7, 0xc3, 0x01, 0x00, 0x00, 0x80]), // test rbx, an immediate
    Snippet::new(&[0x48, 0x85, 0x06]),                         // test [rsi], rax
    Snippet::new(&[0xfe, 0xc4]),                               // inc ah
    Snippet::new(&[0x66, 0xff, 0xc0]),                         // inc ax
    Snippet::new(&[0xff, 0xc0]),                               // inc eax
    Snippet::new(&[0x48, 0xff, 0xc0]),                         // inc rax
    Snippet::new(&[0xfe, 0x06]),                               // inc byte [rsi]
    Snippet::new(&[0xfe, 0xc9]),                               // dec cl
    Snippet::new(&[0xff, 0xc9]),                               // dec ecx
    Snippet::new(&[0x49, 0xff, 0xcf]),                         // dec r15
    Snippet::new(&[0x48, 0xff, 0x0e]),                         // dec qword [rsi]
    Snippet::new(&[0xf6, 0xd8]),                               // neg al
    Snippet::new(&[0x48, 0xf7, 0xd8]),                         // neg rax
    Snippet::new(&[0xf7, 0xd0]),                               // not eax
    Snippet::new(&[0x66, 0xf7, 0xd3]),                         // not bx
    Snippet::new(&[0x0f, 0x94, 0xc0]),                         // sete al
    Snippet::new(&[0x0f, 0x9f, 0xc4]),                         // setg ah
    Snippet::new(&[0x0f, 0x92, 0x06]),                         // setb [rsi]
    Snippet::new(&[0x48, 0x0f, 0x44, 0xc3]),                   // cmove rax, rbx
    Snippet::new(&[0x0f, 0x4c, 0xc3]),                         // cmovl eax, ebx
    Snippet::new(&[0x0f, 0x47, 0x06]),                         // cmova eax, [rsi]
    // What Xen's emulator does under `auto`.
    Snippet::new(&[0x48, 0x0f, 0xaf, 0xc3]),                   // imul rax, rbx
    Snippet::new(&[0x6b, 0xc3, 0x9c]),                         // imul eax, ebx, -100
    Snippet::new(&[0x48, 0xf7, 0xe3]),                         // mul rbx
    Snippet::new(&[0x48, 0xc1, 0xe0, 0x05]),                   // shl rax, 5
    Snippet::new(&[0x48, 0xc1, 0xf8, 0x3f]),                   // sar rax, 63
    Snippet::new(&[0xd1, 0xe8]),                               // shr eax, 1
    Snippet::new(&[0x48, 0xc1, 0xc0, 0x0d]),                   // rol rax, 13
    Snippet::new(&[0xd1, 0xc8]),                               // ror eax, 1
    Snippet::new(&[0x48, 0x0f, 0xba, 0xe0, 0x07]),             // bt rax, 7
    Snippet::new(&[0x48, 0x0f, 0xc8]),                         // bswap rax
    Snippet::new(&[0x48, 0x98]),                               // cdqe
    Snippet::new(&[0x48, 0x99]),                               // cqo
    Snippet::new(&[0x48, 0x8b, 0x05, 0xf9, 0xff, 0xff, 0xff]), // mov rax, [rip - 7]: itself, which has a breakpoint
    // What neither of us does.
    Snippet::new(&[0x0f, 0x28, 0xc1]),             // movaps xmm0, xmm1
    Snippet::new(&[0xa4]),                         // movsb
    Snippet::new(&[0xac]),                         // lodsb
    Snippet::new(&[0x48, 0xab]),                   // stosq
    Snippet::new(&[0xf0, 0x48, 0x0f, 0xc1, 0x06]), // lock xadd [rsi], rax
    Snippet::new(&[0xfc]),                         // cld
    Snippet::new(&[0xf5]),                         // cmc
    Snippet::new(&[0x9e]),                         // sahf
    Snippet::new(&[0x0f, 0xa2]),                   // cpuid
    // What Xen's emulator cannot do (`unimplemented_insn`, and `fail_if`, in xen/arch/x86/x86_emulate/x86_emulate.c).
    Snippet::new(&[0x0f, 0x01, 0xc1]).needing(Needs::Hypercall), // vmcall
    Snippet::new(&[0x0f, 0xae, 0x27]).needing(Needs::ExtendedState), // xsave [rdi]
    Snippet::new(&[0x0f, 0xae, 0x37]).needing(Needs::ExtendedState), // xsaveopt [rdi]
    Snippet::new(&[0x0f, 0xae, 0x2f]).needing(Needs::ExtendedState), // xrstor [rdi]
    // Branches: to the last jump of the slot, or the first.
    Snippet::new(&[0x70, 0x05]),                                    // jo, to the last jump
    Snippet::new(&[0x71, 0x05]),                                    // jno, to the last jump
    Snippet::new(&[0x72, 0x05]),                                    // jb, to the last jump
    Snippet::new(&[0x73, 0x05]),                                    // jae, to the last jump
    Snippet::new(&[0x74, 0x05]),                                    // je, to the last jump
    Snippet::new(&[0x75, 0x05]),                                    // jne, to the last jump
    Snippet::new(&[0x76, 0x05]),                                    // jbe, to the last jump
    Snippet::new(&[0x77, 0x05]),                                    // ja, to the last jump
    Snippet::new(&[0x78, 0x05]),                                    // js, to the last jump
    Snippet::new(&[0x79, 0x05]),                                    // jns, to the last jump
    Snippet::new(&[0x7a, 0x05]),                                    // jp, to the last jump
    Snippet::new(&[0x7b, 0x05]),                                    // jnp, to the last jump
    Snippet::new(&[0x7c, 0x05]),                                    // jl, to the last jump
    Snippet::new(&[0x7d, 0x05]),                                    // jge, to the last jump
    Snippet::new(&[0x7e, 0x05]),                                    // jle, to the last jump
    Snippet::new(&[0x7f, 0x05]),                                    // jg, to the last jump
    Snippet::new(&[0x0f, 0x84, 0x05, 0x00, 0x00, 0x00]),            // je, far off
    Snippet::new(&[0x75, 0xf9]),                                    // jne, backwards
    Snippet::new(&[0xeb, 0x05]),                                    // jmp
    Snippet::new(&[0xe9, 0x05, 0x00, 0x00, 0x00]),                  // jmp, far off
    Snippet::new(&[0xeb, 0xf9]),                                    // jmp, backwards
    Snippet::new(&[0xe8, 0x05, 0x00, 0x00, 0x00]),                  // call
    Snippet::new(&[0xe8, 0xf6, 0xff, 0xff, 0xff]),                  // call, backwards
    Snippet::new(&[0xff, 0xe0]).needing(Needs::Target),             // jmp rax
    Snippet::new(&[0xff, 0xd0]).needing(Needs::Target),             // call rax
    Snippet::new(&[0xff, 0x14, 0x24]).needing(Needs::Return),       // call [rsp]
    Snippet::new(&[0xff, 0x24, 0x24]).needing(Needs::Return),       // jmp [rsp]
    Snippet::new(&[0x48, 0xff, 0x24, 0x24]).needing(Needs::Return), // jmp [rsp], with REX.W
    Snippet::new(&[0xff, 0x25, 0, 0, 0, 0]).needing(Needs::Import), // jmp [rip + an import]
    Snippet::new(&[0x48, 0xff, 0x25, 0, 0, 0, 0]).needing(Needs::Import), // jmp [rip + an import], with REX.W
    Snippet::new(&[0xff, 0x15, 0, 0, 0, 0]).needing(Needs::Import), // call [rip + an import]
    Snippet::new(&[0xff, 0x35, 0, 0, 0, 0]).needing(Needs::Import), // push [rip + an import]
    Snippet::new(&[0x48, 0x8b, 0x05, 0, 0, 0, 0]).needing(Needs::Import), // mov rax, [rip + an import]
    Snippet::new(&[0xc3]).needing(Needs::Return),                   // ret
    Snippet::new(&[0xc2, 0x10, 0x00]).needing(Needs::Return),       // ret 16
    Snippet::new(&[0xf3, 0xc3]).needing(Needs::Return),             // rep ret
    Snippet::new(&[0xf2, 0xc3]).needing(Needs::Return),             // bnd ret
    Snippet::new(&[0xe3, 0x05]),                                    // jrcxz
    Snippet::new(&[0xe2, 0x05]),                                    // loop
    // The guest's own INT3, and prefixes: a breakpoint on the second byte of an instruction is no hit.
    Snippet::new(&[0xcc]),                               // int3
    Snippet::new(&[0xf3, 0xcc]),                         // int3 with a prefix
    Snippet::new(&[0xf3, 0x90]).breakpoints(0b10, 0),    // pause
    Snippet::new(&[0x48, 0x90]).breakpoints(0b11, 0b01), // nop with a prefix
    // Neighbours.
    Snippet::new(&[0x55, 0x48, 0x89, 0xe5]).breakpoints(0b11, 0b11), // push rbp; mov rbp, rsp
    Snippet::new(&[0x90, 0x90, 0x90]).breakpoints(0b111, 0b111),     // nops
    // Code that is written before it runs: inc eax or dec eax, clc or stc, nop or an int3 of the guest's own.
    Snippet::new(&[0xff, 0xc0]).rewriting(1, [0xc0, 0xc8]),
    Snippet::new(&[0xf8]).rewriting(0, [0xf8, 0xf9]),
    Snippet::new(&[0x90]).rewriting(0, [0x90, 0xcc]),
    // Code that writes what comes next: mov byte [rip + 1], 0x5a and mov al, 0xa5; the same, both with a breakpoint;
    // inc byte [rip + 1] and mov al, 0xa5; mov byte [rip], 0xf9 and clc, both with a breakpoint.
    Snippet::new(&[0xc6, 0x05, 1, 0, 0, 0, 0x5a, 0xb0, 0xa5]).rewriting(8, [0xa5, 0xa6]),
    Snippet::new(&[0xc6, 0x05, 1, 0, 0, 0, 0x5a, 0xb0, 0xa5]).breakpoints(0x81, 0x81).rewriting(8, [0xa5, 0xa6]),
    Snippet::new(&[0xfe, 0x05, 1, 0, 0, 0, 0xb0, 0xa5]).rewriting(7, [0xa5, 0xa6]),
    Snippet::new(&[0xc6, 0x05, 0, 0, 0, 0, 0xf9, 0xf8]).breakpoints(0x81, 0x81).rewriting(7, [0xf8, 0xf8]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_do_not_overlap_and_some_cross_a_page_end() {
        let mut end = 0;
        let mut crossing = 0;
        for (index, snippet) in SNIPPETS.iter().enumerate() {
            let start = snippet_offset(index);
            assert!(start - JUMP >= end, "{index}");
            end = start + snippet.bytes().len() + 2 * JUMP;
            crossing += usize::from(start / PAGE_SIZE != (start + snippet.bytes().len() - 1) / PAGE_SIZE);
        }
        assert!(end <= SNIPPET_PAGES * PAGE_SIZE);
        assert!(crossing > 7, "{crossing}");
    }

    #[test]
    fn breakpoints_are_on_bytes_of_the_snippet() {
        for snippet in SNIPPETS {
            assert!(!snippet.bytes().is_empty());
            assert!(snippet.breakpoints_and_hits().all(|(at, _)| at < snippet.bytes().len()), "{snippet:02x?}");
            assert!(snippet.rewrite.is_none_or(|(at, _)| at < snippet.bytes().len()), "{snippet:02x?}");
        }
    }

    #[test]
    fn arithmetic_has_every_width() {
        for bytes in [
            &[0x00, 0xe3][..],
            &[0x66, 0x83, 0xc3, 0xe5],
            &[0x0d, 0x78, 0x56, 0x34, 0x92],
            &[0x48, 0x39, 0xd3],
            &[0x66, 0x81, 0xfb, 0xef, 0xcd],
            &[0x48, 0x2b, 0x46, 0x10],
        ] {
            assert!(SNIPPETS.iter().any(|snippet| snippet.bytes() == bytes), "{bytes:02x?}");
        }
    }
}

//! The code of the guests, assembled into this program, each piece with its length in front.

use core::arch::naked_asm;

/// A guest's code, with its length in front.
macro_rules! guest_code {
    ($name:ident, $mode:literal, $($line:literal,)*) => {
        #[unsafe(naked)]
        pub(super) unsafe extern "C" fn $name() {
            naked_asm!(
                ".long 9f - 8f",
                "8:",
                $mode,
                $($line,)*
                "9:",
                ".code64",
            )
        }
    };
}

guest_code!(
    real_code,
    ".code16",
    "mov eax, 0x12345678",
    "cpuid",
    "mov al, 0x5a",
    "out 0x80, al",
    "in ax, 0x81",
    "mov dx, 0x3f8",
    "out dx, eax",
    "hlt",
);

guest_code!(
    protected_code,
    ".code32",
    "mov ecx, 0x1b",
    "rdmsr",
    "mov ebx, eax",
    "mov eax, 0x80000001",
    "mov edx, 0x02030405",
    "mov ecx, 0x1b",
    "wrmsr",
    "hlt",
);

guest_code!(
    to_long_code,
    ".code32",
    "mov eax, cr4",
    "or eax, 0x20",
    "mov cr4, eax",
    "mov eax, 0x4000",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    // JMP 0x18:0x1080
    ".byte 0xea",
    ".long 0x1080",
    ".word 0x18",
    ".skip 0x80 - (. - 8b), 0x90",
    ".code64",
    "mov rbx, 0x123456789abcdef0",
    "mov rcx, cr4",
    "mov rdx, cr0",
    "hlt",
);

guest_code!(
    pae_code,
    ".code32",
    "mov eax, cr4",
    "or eax, 0x20",
    "mov cr4, eax",
    "mov eax, 0x9000",
    "mov cr3, eax",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "mov esi, 0x80008000",
    "mov ebx, [esi]",
    "hlt",
);

guest_code!(
    faults_code,
    ".code64",
    "mov esi, 0x400120",
    "mov rbx, [rsi]",
    "inc rbx",
    "mov [rsi + 8], rbx",
    "hlt",
);

guest_code!(
    exception_code,
    ".code64",
    "nop",
    "hlt",
    ".skip 0x80 - (. - 8b), 0x90",
    "pop rdx",
    "pop rsi",
    "hlt",
);

guest_code!(
    interrupt_code,
    ".code64",
    "nop",
    "sti",
    "nop",
    "nop",
    "hlt",
    ".skip 0x80 - (. - 8b), 0x90",
    "inc rbx",
    "out 0x41, al",
    "iretq",
);

guest_code!(
    software_code,
    ".code64",
    "int 0x41",
    "hlt",
    ".skip 0x80 - (. - 8b), 0x90",
    "inc rbx",
    "out 0x41, al",
    "iretq",
);

guest_code!(endless_code, ".code64", "7:", "jmp 7b",);

guest_code!(
    registers_code,
    ".code64",
    "not rax",
    "not rcx",
    "not rdx",
    "not rbx",
    "not rsp",
    "not rbp",
    "not rsi",
    "not rdi",
    "not r8",
    "not r9",
    "not r10",
    "not r11",
    "not r12",
    "not r13",
    "not r14",
    "not r15",
    "hlt",
);

guest_code!(
    keep_code,
    ".code64",
    "movq xmm0, rax",
    "movq xmm15, rbx",
    "mov dr0, rcx",
    "mov dr3, rdx",
    "hlt",
    "movq rsi, xmm0",
    "movq rdi, xmm15",
    "mov r8, dr0",
    "mov r9, dr3",
    "hlt",
);

guest_code!(
    msr_code,
    ".code64",
    // LSTAR, written by the guest
    "mov ecx, 0xc0000082",
    "mov eax, 0x1000",
    "mov edx, 0xffff8000",
    "wrmsr",
    // KERNEL_GS_BASE, read by the guest
    "mov ecx, 0xc0000102",
    "rdmsr",
    "hlt",
);

guest_code!(undefined_code, ".code64", "ud2",);

guest_code!(
    step_code,
    ".code64",
    "nop",
    "hlt",
    ".skip 0x80 - (. - 8b), 0x90",
    "mov rax, dr6",
    "pop rsi",
    "hlt",
);

guest_code!(
    tsc_code,
    ".code64",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "hlt",
);

guest_code!(
    tsc_twice_code,
    ".code64",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "hlt",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "hlt",
);

guest_code!(
    flush_code,
    ".code64",
    "mov esi, 0x200000",
    "mov rax, [rsi]",
    "hlt",
    "mov rbx, [rsi]",
    "hlt",
    "mov rcx, [rsi]",
    "hlt",
);

guest_code!(
    ports_code,
    ".code64",
    "out 0x10, al",
    "mov dx, 0x1234",
    "out dx, ax",
    "out dx, eax",
    "in al, dx",
    "in eax, 0x60",
    "rep outsb",
);

guest_code!(
    amd_instructions_code,
    ".code64",
    "vmmcall",
    "wbinvd",
    "invd",
    "xor ecx, ecx",
    "rdpmc",
    "mov eax, 3",
    "xor edx, edx",
    "xsetbv",
    "xor eax, eax",
    "vmrun rax",
);

guest_code!(
    intel_instructions_code,
    ".code64",
    "vmcall",
    "wbinvd",
    "invd",
    "xor ecx, ecx",
    "rdpmc",
    "mov eax, 3",
    "xor edx, edx",
    "xsetbv",
    "xor eax, eax",
    "vmxoff",
);

guest_code!(
    priority_code,
    ".code64",
    "mov cr8, rbx",
    "mov rdx, cr8",
    "hlt",
);

guest_code!(jump_code, ".code64", "jmp rsi",);

guest_code!(
    breakpoint_code,
    ".code64",
    "lea rax, [rip + 6f]",
    "mov dr0, rax",
    "mov eax, 0x402",
    "mov dr7, rax",
    "6:",
    "nop",
    "hlt",
    ".skip 0x80 - (. - 8b), 0x90",
    "mov rax, dr6",
    "pop rsi",
    "hlt",
);

guest_code!(
    arm_code,
    ".code64",
    "mov dr0, rbx",
    "mov eax, 0x402",
    "mov dr7, rax",
    "hlt",
);

guest_code!(cpuid_loop_code, ".code64", "7:", "cpuid", "jmp 7b",);

/// The bytes of a guest's code.
pub(super) fn bytes_of(code: unsafe extern "C" fn()) -> &'static [u8] {
    let start = code as *const () as *const u8;
    // SAFETY: `guest_code!` puts the length in front of the bytes; the program's own text is
    // readable and never changes.
    unsafe {
        let length = start.cast::<u32>().read_unaligned();
        core::slice::from_raw_parts(start.add(4), length as usize)
    }
}

# The way of another processor from its start-up IPI to Rust.
#
# The first part is copied to a page below 1 MiB and runs there in real mode. It goes to long mode in one
# step, with the control registers of the first processor, which are at the end of the page.

.section .rodata.smp_start, "a"
.code16
.global smp_start
smp_start:
    cli
    cld
    mov ax, cs
    mov ds, ax
    mov eax, ds:[0xF00]                   # CR4
    mov cr4, eax
    mov eax, ds:[0xF04]                   # CR3
    mov cr3, eax
    mov ecx, 0xC0000080                   # EFER
    mov eax, ds:[0xF08]
    xor edx, edx
    wrmsr
    .byte 0x66                            # a 32-bit base
    lgdt ds:[0xF10]
    mov eax, ds:[0xF0C]                   # CR0
    mov cr0, eax
    .byte 0x66, 0xEA                      # far jump, 32-bit offset
    .long smp_long_mode
    .word 8
.global smp_start_end
smp_start_end:

.code64
.section .text.smp, "ax"
smp_long_mode:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov eax, 1                            # the initial APIC id says which stack
    cpuid
    shr ebx, 24
    cmp ebx, {max}
    jae 2f
    lea eax, [rbx + 1]
    imul eax, eax, {stack_bytes}
    lea rsp, [rip + {stacks}]
    add rsp, rax
    mov edi, ebx
    xor ebp, ebp
    call {main}
2:  cli
    hlt
    jmp 2b
.text

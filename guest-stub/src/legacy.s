# Out of long mode and back: 32-bit protected mode without paging, for what long mode lacks.
#
# `legacy_run` calls 32-bit code; the tests that it can call stand below. All is below 4 GiB.
# Selectors are those of `legacy_gdt`, which Rust completes before.

.set CODE64, 0x08
.set CODE32, 0x10
.set DATA32, 0x18
.set TASK_A, 0x20
.set TASK_B, 0x28
.set TASK_C, 0x30
.set TASK_ABSENT, 0x38
.set TASK_8086, 0x40
.set DEVICE, 0xFF000000
.set LOW_CODE, 0x9000

.section .text.legacy, "ax"
.code64
# EDI: 32-bit code to call. Returns its EAX. Interrupts are off; GDT, IDT and TR are the caller's to restore.
.global legacy_run
legacy_run:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [legacy_saved_rsp], rsp
    mov rax, cr3
    mov [legacy_saved_cr3], rax
    mov [legacy_target], edi
    lgdt [legacy_gdt_pointer]
    push CODE32
    lea rax, [rip + 2f]
    push rax
    retfq
.code32
2:  mov eax, DATA32
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov fs, eax
    mov gs, eax
    mov eax, cr0
    and eax, 0x7FFFFFFF                   # paging off, and with it long mode
    mov cr0, eax
    mov ecx, 0xC0000080
    rdmsr
    and eax, ~0x100                       # EFER.LME
    wrmsr
    lidt [legacy_idt_pointer]
    mov esp, offset legacy_stack_top
    mov eax, [legacy_target]
    call eax
    mov [legacy_result], eax
    clts
    mov eax, cr4
    or eax, 1 << 5                        # PAE
    mov cr4, eax
    mov eax, [legacy_saved_cr3]
    mov cr3, eax
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    .byte 0xEA                            # far jump
    .long 3f
    .word CODE64
.code64
3:  mov rsp, [legacy_saved_rsp]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    mov eax, [legacy_result]
    ret

.code32
# Counts an exception, keeps its error code, and goes on behind an instruction of `legacy_skip` bytes.
.global legacy_handler
legacy_handler:
    pop dword ptr [legacy_error]
    inc dword ptr [legacy_faults]
    push eax
    mov eax, [legacy_skip]
    add [esp + 4], eax
    pop eax
    iretd

# Task switches in all ways. Returns the bits of what went wrong.
.global legacy_tasks
legacy_tasks:
    xor ebx, ebx
    mov eax, TASK_A
    ltr ax
    mov esi, 0x11223344
    .byte 0xEA                            # JMP
    .long 0
    .word TASK_B
    cmp esi, 0x11223344                   # registers are the task's own
    je 2f
    or ebx, 1
2:  cmp dword ptr [legacy_b_count], 1
    je 2f
    or ebx, 2
2:  test dword ptr [legacy_b_flags], 1 << 14
    jz 2f                                 # NT is clear after JMP
    or ebx, 4
2:  .byte 0x9A                            # CALL
    .long 0
    .word TASK_B
    cmp dword ptr [legacy_b_count], 2
    je 2f
    or ebx, 8
2:  test dword ptr [legacy_b_flags], 1 << 14
    jnz 2f                                # NT is set after CALL
    or ebx, 16
2:  xor edx, edx
    xor eax, eax
    div eax                               # a task gate; its task steps over
    cmp dword ptr [legacy_c_count], 1
    je 2f
    or ebx, 32
2:  str ax
    cmp ax, TASK_A
    je 2f
    or ebx, 64
2:  mov eax, cr0
    test eax, 8
    jnz 2f                                # TS is set
    or ebx, 128
2:  mov dword ptr [legacy_skip], 7
    .byte 0xEA                            # a TSS that is not present: #NP
    .long 0
    .word TASK_ABSENT
    cmp dword ptr [legacy_error], TASK_ABSENT
    je 2f
    or ebx, 256
2:  .byte 0xEA                            # to the task in force: busy, #GP
    .long 0
    .word TASK_A
    cmp dword ptr [legacy_error], TASK_A
    je 2f
    or ebx, 512
2:  cmp dword ptr [legacy_faults], 2
    je 2f
    or ebx, 1024
2:  int 0x20                              # a task gate by an instruction: goes on behind it
    cmp dword ptr [legacy_c_count], 2
    je 2f
    or ebx, 2048
2:  mov eax, ebx
    ret

.global legacy_task_b
legacy_task_b:
    inc dword ptr [legacy_b_count]
    pushfd
    pop dword ptr [legacy_b_flags]
    .byte 0xEA
    .long 0
    .word TASK_A
    inc dword ptr [legacy_b_count]
    pushfd
    pop dword ptr [legacy_b_flags]
    iretd
    jmp legacy_task_b

# Switches between two tasks, on and on.
.global legacy_task_loop
legacy_task_loop:
    mov eax, TASK_A
    ltr ax
    mov esi, 5000
2:  .byte 0xEA
    .long 0
    .word TASK_B
    dec esi
    jnz 2b
    xor eax, eax
    ret

.global legacy_task_back
legacy_task_back:
    .byte 0xEA
    .long 0
    .word TASK_A
    jmp legacy_task_back

# Steps over the DIV of task A when it is there for an exception.
.global legacy_task_c
legacy_task_c:
    inc dword ptr [legacy_c_count]
    mov eax, [legacy_task_a + 32]
    cmp byte ptr [eax], 0xF7
    jne 2f
    add dword ptr [legacy_task_a + 32], 2
2:  iretd
    jmp legacy_task_c

# Turns PAE paging on with a bad page-directory-pointer table. Returns how many faults came.
.global legacy_bad_pdptes
legacy_bad_pdptes:
    mov dword ptr [legacy_skip], 3
    mov eax, offset legacy_bad_table
    mov cr3, eax
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax                          # #GP
    mov eax, [legacy_faults]
    ret

# Turns five-level paging on, while there is no paging, and off again. Returns how many faults came.
.global legacy_five_levels
legacy_five_levels:
    mov dword ptr [legacy_skip], 3
    mov edx, cr4
    mov eax, edx
    or eax, 1 << 12                       # LA57
    mov cr4, eax                          # #GP where there is none
    mov cr4, edx
    mov eax, [legacy_faults]
    ret

# To task B and back, by far pointers in device memory. Returns the bits of what went wrong.
.global legacy_device_tasks
legacy_device_tasks:
    xor ebx, ebx
    mov eax, TASK_A
    ltr ax
    mov edi, DEVICE
    mov dword ptr [edi], 0
    mov dword ptr [edi + 4], TASK_B
    mov esi, 0x11223344
    .byte 0xFF, 0x2F                      # JMP m16:32 [edi]
    cmp esi, 0x11223344
    je 2f
    or ebx, 1
2:  cmp dword ptr [legacy_b_count], 1
    je 2f
    or ebx, 2
2:  test dword ptr [legacy_b_flags], 1 << 14
    jz 2f
    or ebx, 4
2:  .byte 0xFF, 0x1F                      # CALL m16:32 [edi]
    cmp dword ptr [legacy_b_count], 2
    je 2f
    or ebx, 8
2:  test dword ptr [legacy_b_flags], 1 << 14
    jnz 2f
    or ebx, 16
2:  str ax
    cmp ax, TASK_A
    je 2f
    or ebx, 32
2:  mov eax, ebx
    ret

# Runs a few instructions in virtual-8086 mode with IOPL 0. Returns a bit for each that faulted, by its place.
.global legacy_8086
legacy_8086:
    mov [legacy_saved_esp], esp
    mov [legacy_tss_8086 + 4], esp
    mov dword ptr [legacy_tss_8086 + 8], DATA32
    mov eax, TASK_8086
    ltr ax
    mov esi, offset legacy_8086_code
    mov edi, LOW_CODE
    mov ecx, 32
    rep movsb
    mov edx, 0x61
    xor esi, esi
    xor edi, edi
    push 0
    push 0
    push 0
    push 0
    push 0
    push LOW_CODE - 16
    push 0x20002
    push LOW_CODE >> 4
    push 0
    iretd

.global legacy_8086_fault
legacy_8086_fault:
    mov eax, DATA32
    mov ds, eax
    mov es, eax
    mov ecx, [esp + 4]                    # EIP, behind the error code
    movzx ebx, byte ptr [ecx + LOW_CODE]
    cmp bl, 0xF4
    je 4f
    bts dword ptr [legacy_error], ecx
    inc ecx
    cmp bl, 0xE4                          # of two bytes
    je 2f
    cmp bl, 0x66
    je 2f
    cmp bl, 0xCD
    jne 3f
2:  inc ecx
3:  mov [esp + 4], ecx
    add esp, 4
    iretd
4:  mov esp, [legacy_saved_esp]
    mov eax, DATA32
    mov fs, eax
    mov gs, eax
    mov eax, [legacy_error]
    ret

.code16
legacy_8086_code:
    in al, 0x61                           # 0: denied
    out 0x80, al                          # 2: allowed by the map
    insb                                  # 4: denied
    mov dl, 0x80                          # 5
    outsb                                 # 7: allowed
    in al, dx                             # 8: allowed
    in eax, dx                            # 9: the last of its four ports is denied
    cli                                   # 11: IOPL, like all from here on
    sti                                   # 12
    pushf                                 # 13
    popf                                  # 14
    iret                                  # 15
    int 0x20                              # 16
    hlt                                   # 18: the end, within the 32 bytes that are copied
.code32

.section .data.legacy, "aw"
.balign 32
legacy_bad_table:
    .quad 0x7, 0x1E7, 0, 0
.balign 16
.global legacy_gdt
legacy_gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF
    .quad 0x00CF9B000000FFFF
    .quad 0x00CF93000000FFFF
    .quad 0, 0, 0, 0, 0                   # tasks
legacy_gdt_end:
legacy_gdt_pointer:
    .word legacy_gdt_end - legacy_gdt - 1
    .quad legacy_gdt
legacy_idt_pointer:
    .word 0x21 * 8 - 1
    .long legacy_idt
.balign 16
.global legacy_idt
legacy_idt:
    .fill 0x21, 8, 0
.balign 16
.global legacy_task_a
legacy_task_a:
    .fill 104, 1, 0
.global legacy_tss_b
legacy_tss_b:
    .fill 104, 1, 0
.global legacy_tss_c
legacy_tss_c:
    .fill 104, 1, 0
.global legacy_tss_8086
legacy_tss_8086:
    .fill 104 + 18, 1, 0
.balign 8
legacy_saved_esp: .long 0
.balign 8
legacy_saved_rsp: .quad 0
legacy_saved_cr3: .quad 0
legacy_target: .long 0
legacy_result: .long 0
.global legacy_counters
legacy_counters:
legacy_faults: .long 0
legacy_error: .long 0
legacy_skip: .long 0
legacy_b_count: .long 0
legacy_b_flags: .long 0
legacy_c_count: .long 0
.balign 16
    .fill 1024, 1, 0
.global legacy_stack_b_top
legacy_stack_b_top:
    .fill 1024, 1, 0
.global legacy_stack_c_top
legacy_stack_c_top:
    .fill 4096, 1, 0
legacy_stack_top:
.text

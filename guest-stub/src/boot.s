# From a 32-bit loader to 64-bit Rust: multiboot 1 and PVH, the same entry point.
#
# Both enter in 32-bit protected mode, flat segments, no paging, interrupts off.
# multiboot: EAX = 0x2BADB002, EBX = information.  PVH: EBX = start information.

.set MULTIBOOT_MAGIC, 0x1BADB002
.set MULTIBOOT_FLAGS, 0x00010003          # page-aligned modules, memory map, addresses given

.section .multiboot, "a"
.balign 4
multiboot_header:
    .long MULTIBOOT_MAGIC
    .long MULTIBOOT_FLAGS
    .long -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)
    .long multiboot_header
    .long __image_start
    .long __data_end
    .long __bss_end
    .long entry32

.section .note.Xen, "a", @note
.balign 4
    .long 4, 8, 18                        # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad entry32

.section .boot32, "ax"
.code32
.global entry32
entry32:
    cli
    cld
    mov esp, offset boot_stack_top
    mov [{entry}], eax
    mov [{entry} + 4], ebx
    pushfd
    pop dword ptr [{entry} + 8]
    mov eax, cr0
    mov [{entry} + 12], eax
    mov eax, cr4
    mov [{entry} + 16], eax

    mov edi, offset __bss_clear_start
    mov ecx, offset __bss_end
    sub ecx, edi
    shr ecx, 2
    xor eax, eax
    rep stosd

    # Identity map of the first 4 GiB in 2 MiB pages.
    mov eax, offset boot_pdpt + 3         # present, writable
    mov [boot_pml4], eax
    mov eax, offset boot_page_directories + 3
    mov edi, offset boot_pdpt
    mov ecx, 4
2:  mov [edi], eax
    add eax, 4096
    add edi, 8
    loop 2b
    mov eax, 0x83                         # present, writable, 2 MiB
    mov edi, offset boot_page_directories
    mov ecx, 2048
3:  mov [edi], eax
    add eax, 0x200000
    add edi, 8
    loop 3b

    mov eax, cr4
    or eax, 1 << 5                        # PAE
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xC0000080                   # EFER
    rdmsr
    mov [{entry} + 20], eax
    or eax, 1 << 8                        # LME
    wrmsr
    mov eax, cr0
    and eax, 0x9FFFFFFF                   # caches on: CD and NW clear
    or eax, 0x80010001                    # PG, WP, PE
    mov cr0, eax
    lgdt [boot_gdt_pointer]
    push 8
    mov eax, offset entry64
    push eax
    retf

.balign 8
boot_gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF              # 64-bit code
    .quad 0x00CF93000000FFFF              # data
boot_gdt_pointer:
    .word boot_gdt_pointer - boot_gdt - 1
    .long boot_gdt

.code64
entry64:
    mov eax, 0x10
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

.section .bss.boot_stack, "aw", @nobits
.balign 4096
.skip 65536
boot_stack_top:

.section .bss.page_tables, "aw", @nobits
.balign 4096
.global boot_pml4
boot_pml4: .skip 4096
boot_pdpt: .skip 4096
.global boot_page_directories
boot_page_directories: .skip 4 * 4096
.text

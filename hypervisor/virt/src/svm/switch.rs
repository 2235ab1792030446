//! The world switch: host to guest and back, in one naked function of two kinds.
//!
//! Around VMRUN the global interrupt flag is clear, so that nothing is taken between the two
//! worlds (APM vol. 2, section 15.17). RFLAGS.IF of the host is set during VMRUN: with
//! V_INTR_MASKING a physical interrupt then exits the guest (section 15.21.1). It is clear again
//! before STGI, so the interrupt stays pending until the kernel opens its window; an NMI or SMI
//! that came in the meantime is taken at STGI by the host's own handlers.
//!
//! VMRUN and #VMEXIT switch RAX, RSP, RIP, RFLAGS, CS, SS, DS, ES, GDTR, IDTR, the control
//! registers, EFER, DR6 and DR7; VMLOAD and VMSAVE switch FS, GS, TR, LDTR and the SYSCALL and
//! SYSENTER registers; the code below switches the other general-purpose registers.
//!
//! Unsafe: runs VMRUN.

use core::mem::offset_of;

/// What the switch works on: the guest's registers, and where the two VMCBs are.
#[derive(Clone, Debug, Default)]
#[repr(C)]
pub struct Frame {
    /// General-purpose registers by encoding. RAX and RSP are in the VMCB; their places here are unused.
    pub gprs: [u64; 16],
    /// Host-physical address of the guest's VMCB.
    pub guest_vmcb: u64,
    /// Host-physical address of this pCPU's VMCB for the host's half of VMSAVE and VMLOAD.
    pub host_vmcb: u64,
}

const _: () = assert!(offset_of!(Frame, guest_vmcb) == 0x80);
const _: () = assert!(offset_of!(Frame, host_vmcb) == 0x88);

/// The switch, as a function that does something more before it returns.
macro_rules! world_switch {
    ($(#[$doc:meta])* $name:ident, $($before_return:literal,)*) => {
        $(#[$doc])*
        #[unsafe(naked)]
        pub unsafe extern "sysv64" fn $name(frame: *mut Frame) {
            core::arch::naked_asm!(
                "push rbp",
                "push rbx",
                "push r12",
                "push r13",
                "push r14",
                "push r15",
                "push rdi",
                "mov rax, [rdi + {guest_vmcb}]",
                "mov rcx, [rdi + 8 * 1]",
                "mov rdx, [rdi + 8 * 2]",
                "mov rbx, [rdi + 8 * 3]",
                "mov rbp, [rdi + 8 * 5]",
                "mov rsi, [rdi + 8 * 6]",
                "mov r8,  [rdi + 8 * 8]",
                "mov r9,  [rdi + 8 * 9]",
                "mov r10, [rdi + 8 * 10]",
                "mov r11, [rdi + 8 * 11]",
                "mov r12, [rdi + 8 * 12]",
                "mov r13, [rdi + 8 * 13]",
                "mov r14, [rdi + 8 * 14]",
                "mov r15, [rdi + 8 * 15]",
                "mov rdi, [rdi + 8 * 7]",
                "clgi",
                "sti",
                "vmload rax",
                "vmrun rax",
                // RAX and RSP are the host's again, all else is still the guest's.
                "vmsave rax",
                "mov rax, [rsp]",
                "mov [rax + 8 * 1], rcx",
                "mov [rax + 8 * 2], rdx",
                "mov [rax + 8 * 3], rbx",
                "mov [rax + 8 * 5], rbp",
                "mov [rax + 8 * 6], rsi",
                "mov [rax + 8 * 7], rdi",
                "mov [rax + 8 * 8], r8",
                "mov [rax + 8 * 9], r9",
                "mov [rax + 8 * 10], r10",
                "mov [rax + 8 * 11], r11",
                "mov [rax + 8 * 12], r12",
                "mov [rax + 8 * 13], r13",
                "mov [rax + 8 * 14], r14",
                "mov [rax + 8 * 15], r15",
                "mov rax, [rax + {host_vmcb}]",
                "vmload rax",
                "cli",
                "stgi",
                // No guest value is left for the host to speculate with.
                "xor ecx, ecx",
                "xor edx, edx",
                "xor esi, esi",
                "xor r8d, r8d",
                "xor r9d, r9d",
                "xor r10d, r10d",
                "xor r11d, r11d",
                $($before_return,)*
                "pop rdi",
                "pop r15",
                "pop r14",
                "pop r13",
                "pop r12",
                "pop rbx",
                "pop rbp",
                "ret",
                guest_vmcb = const offset_of!(Frame, guest_vmcb),
                host_vmcb = const offset_of!(Frame, host_vmcb),
            )
        }
    };
}

world_switch! {
    /// Runs the guest until #VMEXIT.
    ///
    /// # Safety
    /// - EFER.SVME is set and VM_HSAVE_PA names a page of this pCPU.
    /// - `guest_vmcb` is the address of a VMCB that nobody else uses now, whose nested tables give
    ///   the guest nothing but its own memory, and whose intercepts keep the host's state its own.
    /// - `host_vmcb` was filled by VMSAVE on this pCPU, and FS, GS, TR, LDTR and the SYSCALL and
    ///   SYSENTER registers have not changed since.
    /// - Interrupts are disabled. No FPU state of the host is live (the kernel uses none).
    enter_guest,
}

world_switch! {
    /// As [`enter_guest`], and fills the predictions of return addresses with harmless ones before it returns.
    ///
    /// # Safety
    /// As [`enter_guest`].
    enter_guest_filling,
    ".rept 32",
    "call 2f",
    // Reached by speculation only.
    "3: pause",
    "lfence",
    "jmp 3b",
    "2: add rsp, 8",
    ".endr",
    "lfence",
}

/// Stores the host's FS, GS, TR, LDTR, SYSCALL and SYSENTER registers.
///
/// # Safety
/// EFER.SVME is set, and `host_vmcb` is the address of a page that belongs to this pCPU alone.
pub unsafe fn save_host(host_vmcb: u64) {
    // SAFETY: by the caller's promise VMSAVE is enabled and writes a page of this pCPU.
    unsafe {
        core::arch::asm!("vmsave rax", in("rax") host_vmcb, options(nostack, preserves_flags));
    }
}

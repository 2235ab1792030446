//! The way into a guest and back: general-purpose registers, CR2, VMLAUNCH and VMRESUME.
//!
//! [`enter`] saves what the compiler keeps in registers and calls [`enter_guest`], which goes
//! in; the processor comes back at [`exit_landing`], on the stack that `enter_guest` left.
//! Everything else is switched by the VMCS, or in `load` and `unload`.
//!
//! Unsafe: assembly that replaces every register but RSP.

use core::arch::{asm, naked_asm};
use core::mem::offset_of;

use super::vmcs::Field;

/// What the entry stub moves between memory and registers.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct GuestRegisters {
    /// General-purpose registers by encoding. RSP's place stays unused: it is in the VMCS.
    pub gprs: [u64; 16],
    /// CR2.
    pub cr2: u64,
    /// HOST_RSP as last written to the VMCS, to write it only when it changes.
    pub host_rsp: u64,
}

const GPRS: usize = offset_of!(GuestRegisters, gprs);
const CR2: usize = offset_of!(GuestRegisters, cr2);
const HOST_RSP: usize = offset_of!(GuestRegisters, host_rsp);
const _: () = assert!(GPRS == 0 && CR2 == 128 && HOST_RSP == 136);

/// How an attempt to enter ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest ran, or the entry failed late: the exit reason tells.
    Exit,
    /// VMfailInvalid: there is no current VMCS.
    FailInvalid,
    /// VMfailValid: the VM-instruction error field tells why.
    FailValid,
}

/// What the assembly returns in RAX.
const EXIT: u64 = 0; // XOR EAX, EAX in `exit_landing`
const FAIL_INVALID: u64 = 1;
const FAIL_VALID: u64 = 2;

/// Enters the guest of the current VMCS: VMRESUME when `resume`, else VMLAUNCH.
///
/// # Safety
/// In VMX operation with interrupts off; the current VMCS has a valid host state with
/// [`exit_landing`] as its RIP; `registers` is valid, and `host_rsp` is what this VMCS holds, or 0.
#[inline(always)]
pub unsafe fn enter(registers: *mut GuestRegisters, resume: bool) -> Outcome {
    let result: u64;
    // SAFETY: as the caller promises. Every register that the guest changes is an output or,
    // where the compiler can't spare it (RBX, RBP), saved on the stack around the call. RFLAGS
    // comes back as after an exit: all clear, so also DF. No red zone: the kernel has none.
    unsafe {
        asm!(
            "push rbx",
            "push rbp",
            "call {stub}",
            "pop rbp",
            "pop rbx",
            stub = sym enter_guest,
            inout("rdi") registers => _,
            inout("rsi") u64::from(resume) => _,
            out("rax") result,
            out("rcx") _,
            out("rdx") _,
            out("r8") _,
            out("r9") _,
            out("r10") _,
            out("r11") _,
            out("r12") _,
            out("r13") _,
            out("r14") _,
            out("r15") _,
        );
    }
    match result {
        EXIT => Outcome::Exit,
        FAIL_INVALID => Outcome::FailInvalid,
        _ => Outcome::FailValid,
    }
}

/// The way in: the registers' address in RDI, 0 for VMLAUNCH in RSI. Returns how it went in
/// RAX; every other register but RSP is lost.
///
/// # Safety
/// Called by [`enter`] only: it does not keep the registers that a function must.
#[unsafe(naked)]
unsafe extern "sysv64" fn enter_guest() {
    naked_asm!(
        "push rdi",
        "cmp rsp, [rdi + {host_rsp}]",
        "je 2f",
        "mov eax, {field_host_rsp}",
        "vmwrite rax, rsp",
        "jbe 4f",
        "mov [rdi + {host_rsp}], rsp",
        "2:",
        "mov rax, [rdi + {cr2}]",
        "mov rcx, cr2",
        "cmp rax, rcx",
        "je 3f",
        "mov cr2, rax",
        "3:",
        // MOV leaves this flag alone until the branch below.
        "test rsi, rsi",
        "mov rax, [rdi + 0 * 8]",
        "mov rcx, [rdi + 1 * 8]",
        "mov rdx, [rdi + 2 * 8]",
        "mov rbx, [rdi + 3 * 8]",
        "mov rbp, [rdi + 5 * 8]",
        "mov rsi, [rdi + 6 * 8]",
        "mov r8, [rdi + 8 * 8]",
        "mov r9, [rdi + 9 * 8]",
        "mov r10, [rdi + 10 * 8]",
        "mov r11, [rdi + 11 * 8]",
        "mov r12, [rdi + 12 * 8]",
        "mov r13, [rdi + 13 * 8]",
        "mov r14, [rdi + 14 * 8]",
        "mov r15, [rdi + 15 * 8]",
        "mov rdi, [rdi + 7 * 8]",
        "jz 5f",
        "vmresume",
        "jmp 4f",
        "5:",
        "vmlaunch",
        // Reached only when the instruction failed: CF is VMfailInvalid, ZF VMfailValid.
        "4:",
        "mov eax, {fail_valid}",
        "mov ecx, {fail_invalid}",
        "cmovc eax, ecx",
        "add rsp, 8",
        "ret",
        host_rsp = const HOST_RSP,
        cr2 = const CR2,
        field_host_rsp = const Field::HostRsp as u32,
        fail_valid = const FAIL_VALID,
        fail_invalid = const FAIL_INVALID,
    )
}

/// Where the processor continues after an exit: saves the guest's registers and returns to
/// the caller of [`enter_guest`]. Never called; its address goes into HOST_RIP.
///
/// # Safety
/// Reached only by an exit of a guest that `enter_guest` entered.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn exit_landing() {
    naked_asm!(
        "push rdi",
        "mov rdi, [rsp + 8]",
        "mov [rdi + 0 * 8], rax",
        "mov [rdi + 1 * 8], rcx",
        "mov [rdi + 2 * 8], rdx",
        "mov [rdi + 3 * 8], rbx",
        "mov [rdi + 5 * 8], rbp",
        "mov [rdi + 6 * 8], rsi",
        "mov [rdi + 8 * 8], r8",
        "mov [rdi + 9 * 8], r9",
        "mov [rdi + 10 * 8], r10",
        "mov [rdi + 11 * 8], r11",
        "mov [rdi + 12 * 8], r12",
        "mov [rdi + 13 * 8], r13",
        "mov [rdi + 14 * 8], r14",
        "mov [rdi + 15 * 8], r15",
        "pop [rdi + 7 * 8]",
        "mov rax, cr2",
        "mov [rdi + {cr2}], rax",
        // No guest value is left for the host to speculate with; RBX, RBP and RDI are reloaded.
        "xor eax, eax",
        "xor ecx, ecx",
        "xor edx, edx",
        "xor esi, esi",
        "xor r8d, r8d",
        "xor r9d, r9d",
        "xor r10d, r10d",
        "xor r11d, r11d",
        "xor r12d, r12d",
        "xor r13d, r13d",
        "xor r14d, r14d",
        "xor r15d, r15d",
        "add rsp, 8",
        "ret",
        cr2 = const CR2,
    )
}

/// As [`exit_landing`], after it has filled the predictions of return addresses with harmless ones.
///
/// # Safety
/// As [`exit_landing`].
#[unsafe(naked)]
pub unsafe extern "sysv64" fn exit_landing_filling() {
    naked_asm!(
        ".rept 32",
        "call 2f",
        // Reached by speculation only.
        "3: pause",
        "lfence",
        "jmp 3b",
        "2: add rsp, 8",
        ".endr",
        // No RET is predicted before this is done.
        "lfence",
        "jmp {landing}",
        landing = sym exit_landing,
    )
}

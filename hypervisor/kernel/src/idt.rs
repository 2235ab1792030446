//! The interrupt descriptor table, one for all processors, and the way from a vector to Rust.
//!
//! Every vector has a stub of 16 bytes that pushes what the processor did not (an error code of 0
//! where there is none, then the vector) and goes on in one common path, which saves the general
//! registers and calls [`interrupts::dispatch`].

use core::arch::naked_asm;

use x86_64::{VirtAddr, instructions::tables::lidt, structures::DescriptorTablePointer};

use crate::{
    gdt::{self, FaultStack},
    interrupts,
    sync::Lock,
};

/// Vectors.
const VECTORS: usize = 256;
/// Bytes of a stub.
const STUB_BYTES: usize = 16;
/// Present, interrupt gate, ring 0 (SDM vol. 3A, figure 7-8).
const INTERRUPT_GATE: u8 = 0x8e;

/// A gate (SDM vol. 3A, figure 7-8).
#[derive(Clone, Copy)]
#[repr(C)]
struct Gate {
    offset_low: u16,
    selector: u16,
    stack: u8,
    attributes: u8,
    offset_middle: u16,
    offset_high: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<Gate>() == 16);

impl Gate {
    const MISSING: Gate = Gate {
        offset_low: 0,
        selector: 0,
        stack: 0,
        attributes: 0,
        offset_middle: 0,
        offset_high: 0,
        reserved: 0,
    };

    fn new(handler: u64, stack: Option<FaultStack>) -> Self {
        Gate {
            offset_low: handler as u16,
            selector: gdt::CODE.0,
            stack: stack.map_or(0, FaultStack::gate_field),
            attributes: INTERRUPT_GATE,
            offset_middle: (handler >> 16) as u16,
            offset_high: (handler >> 32) as u32,
            reserved: 0,
        }
    }
}

/// The general registers as the common path saves them, then what the stub and the processor pushed.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TrapFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    pub vector: u64,
    pub error_code: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

// The processor aligns the stack to 16 before it pushes, and the frame keeps that for the call.
const _: () =
    assert!(size_of::<TrapFrame>() == 22 * 8 && size_of::<TrapFrame>().is_multiple_of(16));

#[repr(C, align(16))]
struct Table([Gate; VECTORS]);

const _: () = assert!(size_of::<Table>() == 4096);

static TABLE: Lock<Table> = Lock::new(Table([Gate::MISSING; VECTORS]));

/// Fills the table. Once, before any [`load`].
pub fn init() {
    let mut table = TABLE.lock();
    for (vector, gate) in table.0.iter_mut().enumerate() {
        let stack = match vector {
            2 => Some(FaultStack::Nmi),
            8 => Some(FaultStack::DoubleFault),
            14 => Some(FaultStack::PageFault),
            18 => Some(FaultStack::MachineCheck),
            _ => None,
        };
        *gate = Gate::new(
            stubs as *const () as u64 + (vector * STUB_BYTES) as u64,
            stack,
        );
    }
}

/// Puts the table in force on the calling processor.
pub fn load() {
    let base = VirtAddr::from_ptr(&raw const TABLE.lock().0);
    // SAFETY: the table is static and filled, and nobody changes it after `init`.
    unsafe {
        lidt(&DescriptorTablePointer {
            limit: (size_of::<Table>() - 1) as u16,
            base,
        });
    }
}

/// The stubs, one after the other. Vectors 8, 10 to 14, 17, 21, 29 and 30 come with an error code.
///
/// # Safety
/// Only the processor may go here, by a gate.
#[unsafe(naked)]
unsafe extern "C" fn stubs() {
    naked_asm!(
        ".set vector, 0",
        ".rept 256",
        ".balign 16",
        ".if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)",
        ".else",
        "pushq $0",
        ".endif",
        "pushq $vector",
        "jmp {common}",
        ".set vector, vector + 1",
        ".endr",
        common = sym common,
        options(att_syntax),
    )
}

/// Saves the registers around the call into Rust.
///
/// # Safety
/// Only the stubs may go here.
#[unsafe(naked)]
unsafe extern "C" fn common() {
    naked_asm!(
        "push rax",
        "push rbx",
        "push rcx",
        "push rdx",
        "push rsi",
        "push rdi",
        "push rbp",
        "push r8",
        "push r9",
        "push r10",
        "push r11",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "cld",
        "mov rdi, rsp",
        "call {dispatch}",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop r11",
        "pop r10",
        "pop r9",
        "pop r8",
        "pop rbp",
        "pop rdi",
        "pop rsi",
        "pop rdx",
        "pop rcx",
        "pop rbx",
        "pop rax",
        "add rsp, 16",
        "iretq",
        dispatch = sym interrupts::dispatch,
    )
}

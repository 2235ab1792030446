//! Ring 3: runs a few bytes of code there until it traps.

use crate::interrupts::{self, Trap};
use crate::memory::{self, PAGE};
use crate::paging::{self, Entry};
use crate::probe;

/// Page of the window that holds the code.
const CODE_PAGE: usize = 16;
/// Page of the window that holds the stack.
const STACK_PAGE: usize = 17;

/// Which code segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Long,
    Compatibility,
}

/// Address at which the code runs.
pub fn code_address() -> u64 {
    paging::window_page(CODE_PAGE)
}

/// Address of the stack page; the stack starts at its end.
pub fn stack_address() -> u64 {
    paging::window_page(STACK_PAGE)
}

/// Runs position-independent code in ring 3, with `argument` in RDI and the given extra flags.
/// It may use RAX, RCX, RDX, RSI, RDI, R8 to R11, and must end in an exception.
///
/// `scratch` is the physical address of two free pages.
pub fn run(scratch: u64, mode: Mode, code: &[u8], argument: u64, flags: u64) -> Option<Trap> {
    memory::write_bytes(scratch, code);
    // UD2 behind the code, so that running off its end is a trap too.
    memory::write_bytes(scratch + code.len() as u64, &[0x0F, 0x0B]);
    paging::map(CODE_PAGE, scratch, Entry::PRESENT | Entry::USER);
    let user_data = Entry::PRESENT | Entry::USER | Entry::WRITABLE;
    paging::map(STACK_PAGE, scratch + PAGE, user_data);
    let segment = match mode {
        Mode::Long => interrupts::USER_CODE_64,
        Mode::Compatibility => interrupts::USER_CODE_32,
    };
    // SAFETY: ring 3 reaches only the two pages mapped above; the exception that ends it brings
    // back RSP and the segments, and all registers it may use are declared.
    let trap = unsafe {
        probe!(
            "push {data}",
            "push r8",
            "push r9",
            "push rcx",
            "push rdx",
            "mov ds, {data:e}",
            "mov es, {data:e}",
            "iretq";
            data = in(reg) u64::from(interrupts::USER_DATA),
            inout("r8") stack_address() + PAGE - 64 => _,
            inout("r9") flags | 2 => _,
            inout("rcx") u64::from(segment) => _,
            inout("rdx") code_address() => _,
            inout("rdi") argument => _,
            out("rax") _, out("rsi") _, out("r10") _, out("r11") _
        )
    };
    // SAFETY: back to the segments that this program runs with.
    unsafe {
        core::arch::asm!("mov ds, {0:e}", "mov es, {0:e}", in(reg) u32::from(interrupts::KERNEL_DATA),
            options(nostack, preserves_flags));
    }
    paging::unmap(CODE_PAGE);
    paging::unmap(STACK_PAGE);
    trap
}

//! With the feature `selftest`: what the ramdisk's file `selftest` says, and then powers off.
//!
//! The file holds one word. `page-fault`, `stack-overflow`, `write-code`, `execute-data`, `invalid-opcode`
//! and `panic` fail on purpose, and the report must name what was done. `backend`, or no file, runs the
//! checks of the virtualization backend.

mod backend;

use core::{arch::asm, hint::black_box};

use crate::{boot::Machine, error, fault, info, power};

/// Does what the file says.
pub fn run(machine: &Machine) -> ! {
    fault::set_on_fault(fault::OnFault::PowerOff);
    let word = machine.bundle.file("selftest").unwrap_or_default();
    match word.trim_ascii() {
        b"" | b"backend" => {
            backend::run();
            power::off()
        }
        b"page-fault" => read_unmapped(),
        b"stack-overflow" => {
            info!("recursed to {}", recurse(u64::MAX));
        }
        b"write-code" => write_code(),
        b"execute-data" => execute_data(),
        b"invalid-opcode" => invalid_opcode(),
        b"panic" => panic!("on purpose"),
        _ => {}
    }
    error!("nothing failed");
    power::off()
}

#[inline(never)]
fn read_unmapped() {
    let address = black_box(0xffff_ffff_8000_0000_u64) as *const u64;
    // SAFETY: none; the address is not mapped, and the fault report is what is tested.
    black_box(unsafe { address.read_volatile() });
}

#[inline(never)]
fn recurse(depth: u64) -> u64 {
    let filler = black_box([depth; 64]);
    match depth {
        0 => filler[0],
        depth => recurse(depth - 1) + filler[1],
    }
}

#[inline(never)]
fn write_code() {
    let code = write_code as *const () as *mut u8;
    // SAFETY: none; code is read-only, and the fault report is what is tested.
    unsafe { code.write_volatile(0xc3) };
}

#[inline(never)]
fn execute_data() {
    let code = black_box([0xc3_u8; 16]);
    // SAFETY: none; the stack is not executable, and the fault report is what is tested.
    let code: extern "C" fn() = unsafe { core::mem::transmute(code.as_ptr()) };
    code();
}

#[inline(never)]
fn invalid_opcode() {
    // SAFETY: none; UD2 faults, and the fault report is what is tested.
    unsafe { asm!("ud2") };
}

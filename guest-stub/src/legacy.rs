//! Excursions to 32-bit protected mode without paging, for what long mode does not have.

use core::arch::global_asm;

use crate::interrupts;

global_asm!(include_str!("legacy.s"));

/// A word or table of `legacy.s`: only its address means something here.
type Label = u8;

unsafe extern "C" {
    fn legacy_run(code: u32) -> u32;
    static legacy_handler: Label;
    static legacy_tasks: Label;
    static legacy_bad_pdptes: Label;
    static legacy_five_levels: Label;
    static legacy_device_tasks: Label;
    static legacy_8086: Label;
    static legacy_8086_fault: Label;
    static legacy_task_b: Label;
    static legacy_task_c: Label;
    static legacy_task_loop: Label;
    static legacy_task_back: Label;
    static legacy_stack_b_top: Label;
    static legacy_stack_c_top: Label;
    static mut legacy_gdt: [u64; 9];
    static mut legacy_idt: [u64; 0x21];
    static mut legacy_task_a: [u32; 26];
    static mut legacy_tss_b: [u32; 26];
    static mut legacy_tss_c: [u32; 26];
    static mut legacy_tss_8086: [u8; TSS_BYTES + MAP_BYTES];
    static mut legacy_counters: [u32; 6];
}

const TSS_BYTES: usize = 104;
/// The I/O map of virtual-8086 mode: 136 ports, and the byte behind them that must be ones.
const MAP_BYTES: usize = 18;

const CODE: u32 = 0x10;
const DATA: u32 = 0x18;

/// Code to run there.
#[derive(Clone, Copy)]
pub enum Code {
    /// Switches tasks; the result has a bit for each thing that went wrong.
    Tasks,
    /// Turns PAE paging on with reserved bits in the page-directory-pointer table; the result counts faults.
    BadPdptes,
    /// Sets CR4.LA57 and clears it; the result counts faults.
    FiveLevels,
    /// Switches between two tasks ten thousand times.
    TaskLoop,
    /// Switches tasks by far pointers in the test device's memory; the result as of `Tasks`.
    DeviceTasks,
    /// Instructions in virtual-8086 mode; the result has a bit for each that faulted, by its place.
    Virtual8086,
}

/// Descriptor of an available 32-bit TSS.
fn task(base: u64, present: bool) -> u64 {
    let access = if present { 0x89 } else { 0x09 };
    103 | (base & 0xFF_FFFF) << 16 | access << 40 | (base >> 24 & 0xFF) << 56
}

/// Gate of the 32-bit IDT: to a task, or to the handler.
fn task_gate(selector: u64) -> u64 {
    selector << 16 | 0x85 << 40
}

fn interrupt_gate(handler: u64) -> u64 {
    handler & 0xFFFF | u64::from(CODE) << 16 | 0x8E << 40 | (handler >> 16 & 0xFFFF) << 48
}

/// A 32-bit TSS.
fn tss(entry: u64, stack: u64) -> [u32; 26] {
    let mut words = [0; 26];
    words[8] = entry as u32;
    words[9] = 2;
    words[14] = stack as u32;
    for (index, selector) in [DATA, CODE, DATA, DATA, DATA, DATA].into_iter().enumerate() {
        words[18 + index] = selector;
    }
    // No I/O map.
    words[25] = 104 << 16;
    words
}

/// A TSS that lets virtual-8086 mode reach ports 80H to 82H only.
fn tss_8086() -> [u8; TSS_BYTES + MAP_BYTES] {
    let mut bytes = [0; TSS_BYTES + MAP_BYTES];
    bytes[102] = TSS_BYTES as u8;
    bytes[TSS_BYTES..].fill(0xFF);
    bytes[TSS_BYTES + 0x80 / 8] = !0b111;
    bytes
}

/// Runs the code, and comes back to long mode as it was.
pub fn run(code: Code) -> u32 {
    // SAFETY: one processor, interrupts off; the tables are this module's own and nobody else holds
    // references to them. The code keeps to its own stack and data and restores paging; descriptor
    // tables and TR are loaded again after it.
    unsafe {
        (&raw mut legacy_task_a).write([0; 26]);
        let task_b = match code {
            Code::TaskLoop => &raw const legacy_task_back,
            _ => &raw const legacy_task_b,
        };
        (&raw mut legacy_tss_b).write(tss(task_b as u64, &raw const legacy_stack_b_top as u64));
        (&raw mut legacy_tss_c).write(tss(
            &raw const legacy_task_c as u64,
            &raw const legacy_stack_c_top as u64,
        ));
        (&raw mut legacy_counters).write([0; 6]);
        let gdt = (&raw mut legacy_gdt).cast::<u64>();
        gdt.add(4)
            .write(task(&raw const legacy_task_a as u64, true));
        gdt.add(5).write(task(&raw const legacy_tss_b as u64, true));
        gdt.add(6).write(task(&raw const legacy_tss_c as u64, true));
        gdt.add(7)
            .write(task(&raw const legacy_tss_b as u64, false));
        let idt = (&raw mut legacy_idt).cast::<u64>();
        for vector in 10..=13 {
            let handler = &raw const legacy_handler as u64;
            idt.add(vector).write(interrupt_gate(handler));
        }
        idt.write(task_gate(0x30));
        idt.add(0x20).write(task_gate(0x30));
        let entry = match code {
            Code::Tasks => &raw const legacy_tasks,
            Code::BadPdptes => &raw const legacy_bad_pdptes,
            Code::FiveLevels => &raw const legacy_five_levels,
            Code::TaskLoop => &raw const legacy_task_loop,
            Code::DeviceTasks => &raw const legacy_device_tasks,
            Code::Virtual8086 => {
                idt.add(13)
                    .write(interrupt_gate(&raw const legacy_8086_fault as u64));
                (&raw mut legacy_tss_8086).write(tss_8086());
                let limit = (TSS_BYTES + MAP_BYTES - 1) as u64;
                let tss = task(&raw const legacy_tss_8086 as u64, true);
                gdt.add(8).write(tss & !0xFFFF | limit);
                &raw const legacy_8086
            }
        };
        let result = legacy_run(entry as u32);
        interrupts::reload();
        result
    }
}

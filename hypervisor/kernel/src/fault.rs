//! What happens when the host itself fails: a report on serial line and screen, then an end.
//!
//! The first processor that fails stops the others by NMI, reports, and ends as configured. A failure
//! within the report ends it with one more line. Locks are broken first, so that the report cannot hang.

use core::{
    fmt,
    panic::PanicInfo,
    sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering},
};

use x86_64::registers::{
    control::{Cr0, Cr2, Cr3, Cr4},
    debug::Dr7,
};

use crate::{
    console, cpu, frame, idt::TrapFrame, interrupts, log, memory, percpu, power, screen, symbols,
    sync, time,
};

/// Vector of the non-maskable interrupt.
pub const NMI: u8 = 2;
/// Vector of the debug exception.
pub const DEBUG: u8 = 1;
/// Vector of the page fault.
const PAGE_FAULT: u64 = 14;

/// What follows a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum OnFault {
    /// The machine stands still, with the report on its screen.
    Halt = 0,
    /// The machine restarts, after time to read the report.
    Restart = 1,
    /// The machine powers off: for tests.
    #[cfg(feature = "selftest")]
    PowerOff = 2,
}

/// Time to read a report before a restart.
const READING_SECONDS: u64 = 10;
/// Lines of log in a report.
const LOG_LINES: usize = 24;
/// Return addresses in a report.
const TRACE_LENGTH: usize = 16;
/// Bytes of stack that are searched for return addresses.
const TRACE_BYTES: u64 = 8 * 1024;

static ON_FAULT: AtomicU8 = AtomicU8::new(OnFault::Halt as u8);
/// Processor that reports, plus 1; 0 while all is well.
static REPORTER: AtomicU32 = AtomicU32::new(0);
/// The others were told to stop.
static STOPPING: AtomicBool = AtomicBool::new(false);

/// What to do after a fault.
pub fn set_on_fault(action: OnFault) {
    ON_FAULT.store(action as u8, Ordering::Relaxed);
}

/// Writes a line of a report: shown whatever the log shows, and not remembered.
macro_rules! report {
    ($($part:tt)*) => { log::report(format_args!($($part)*)) };
}

/// Makes this processor the reporter. Returns only then; others, and a fault within a report, end here.
fn begin() {
    let me = percpu::try_number().map_or(u32::MAX, |number| number as u32 + 1);
    match REPORTER.compare_exchange(0, me, Ordering::SeqCst, Ordering::SeqCst) {
        Ok(_) => {}
        Err(reporter) if reporter == me => {
            report!("another fault within the report: giving up");
            end();
        }
        Err(_) => cpu::halt_forever(),
    }
    sync::break_locks();
    STOPPING.store(true, Ordering::SeqCst);
    if percpu::count() > 1 {
        interrupts::apic().send_nmi_to_others();
    }
    frame::end(frame::Outcome::HostFault);
}

fn end() -> ! {
    let action = ON_FAULT.load(Ordering::Relaxed);
    #[cfg(feature = "selftest")]
    if action == OnFault::PowerOff as u8 {
        report!("Plinth stopped: powering off");
        power::off();
    }
    if action == OnFault::Restart as u8 {
        report!("Plinth stopped: restarting in {READING_SECONDS} seconds");
        console::flush();
        let start = time::now_tsc();
        while time::now_tsc().wrapping_sub(start) < time::hz() * READING_SECONDS {
            core::hint::spin_loop();
        }
        power::reset();
    }
    report!("Plinth stopped: the machine is halted");
    console::flush();
    cpu::halt_forever()
}

/// A non-maskable interrupt: another processor's failure, or the machine's own alarm. Also for NMIs that
/// ended a guest's run.
pub fn on_nmi() {
    if STOPPING.load(Ordering::SeqCst) {
        cpu::halt_forever();
    }
    // SAFETY: the system control port tells the reason; reading it changes nothing.
    let reason = unsafe { x86_64::instructions::port::Port::<u8>::new(0x61).read() };
    // Printed without a lock that the interrupted code may hold: the ring only is not worth a deadlock.
    if reason & 0xc0 != 0 {
        begin();
        report!(
            "HOST FAULT: hardware error reported by NMI (system control port B is {reason:#04x})"
        );
        last_lines();
        end();
    }
}

fn name(vector: u64) -> &'static str {
    const NAMES: [&str; 32] = [
        "divide error",
        "debug exception",
        "non-maskable interrupt",
        "breakpoint",
        "overflow",
        "bound range exceeded",
        "invalid opcode",
        "device not available",
        "double fault",
        "coprocessor segment overrun",
        "invalid task state",
        "segment not present",
        "stack-segment fault",
        "general protection",
        "page fault",
        "reserved exception",
        "x87 floating-point error",
        "alignment check",
        "machine check",
        "SIMD floating-point error",
        "virtualization exception",
        "control protection",
        "reserved exception",
        "reserved exception",
        "reserved exception",
        "reserved exception",
        "reserved exception",
        "reserved exception",
        "hypervisor injection",
        "VMM communication",
        "security exception",
        "reserved exception",
    ];
    NAMES.get(vector as usize).unwrap_or(&"unknown exception")
}

/// A page fault's error code in words (SDM vol. 3A, section 5.7).
struct PageFault {
    error_code: u64,
    address: u64,
}

impl fmt::Display for PageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bit = |n: u32| self.error_code >> n & 1 != 0;
        let access = match (bit(4), bit(1)) {
            (true, _) => "executed",
            (_, true) => "wrote to",
            _ => "read",
        };
        let why = match (bit(3), bit(0)) {
            (true, _) => "a reserved bit is set in its mapping",
            (_, true) => "its mapping does not allow that",
            _ if memory::is_stack_guard(self.address) => {
                "the guard page of a stack: stack overflow"
            }
            _ if self.address < mem::PAGE_SIZE => "a null pointer",
            _ => "not mapped",
        };
        write!(f, "{access} {:#x}: {why}", self.address)
    }
}

/// An address of code, with the name of its function.
struct Code(u64);

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)?;
        match symbols::lookup(self.0) {
            Some(symbol) => write!(f, " {symbol}"),
            None if symbols::is_code(self.0) => {
                write!(f, " image+{:#x}", self.0 - symbols::image_start())
            }
            None => Ok(()),
        }
    }
}

struct Processor;

impl fmt::Display for Processor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match percpu::try_number() {
            Some(number) => write!(f, "processor {number}"),
            None => write!(f, "a processor that is not set up"),
        }
    }
}

/// Whether this #DB is none that the host asked for, as DR7 and RFLAGS.TF tell; the interrupted
/// code then goes on. A guest's can reach the host on AMD family 10h (erratum 246), and in
/// QEMU 7.2 TCG, where a guest's breakpoints stay armed when it exits.
pub fn resume_from_stray_breakpoint(frame: &mut TrapFrame) -> bool {
    const DR7_ENABLES: u64 = 0xff;
    const TRAP_FLAG: u64 = 1 << 8;
    const RESUME_FLAG: u64 = 1 << 16;
    let stray = Dr7::read_raw() & DR7_ENABLES == 0 && frame.rflags & TRAP_FLAG == 0;
    if stray {
        frame.rflags |= RESUME_FLAG;
    }
    stray
}

/// A processor exception in the host.
pub fn on_exception(frame: &TrapFrame) -> ! {
    begin();
    let (vector, error_code) = (frame.vector, frame.error_code);
    report!(
        "HOST FAULT: {} (vector {vector}, error code {error_code:#x}) on {Processor}",
        name(vector)
    );
    let cr2 = Cr2::read_raw();
    if vector == PAGE_FAULT {
        let page_fault = PageFault {
            error_code,
            address: cr2,
        };
        report!("  {page_fault}");
    }
    report!("  at {}", Code(frame.rip));
    registers(frame, cr2);
    trace(frame.rsp);
    last_lines();
    end()
}

fn registers(frame: &TrapFrame, cr2: u64) {
    let TrapFrame {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rbp,
        rsp,
        ..
    } = frame;
    let TrapFrame {
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        ..
    } = frame;
    report!("  RAX {rax:016x}  RBX {rbx:016x}  RCX {rcx:016x}  RDX {rdx:016x}");
    report!("  RSI {rsi:016x}  RDI {rdi:016x}  RBP {rbp:016x}  RSP {rsp:016x}");
    report!("  R8  {r8:016x}  R9  {r9:016x}  R10 {r10:016x}  R11 {r11:016x}");
    report!("  R12 {r12:016x}  R13 {r13:016x}  R14 {r14:016x}  R15 {r15:016x}");
    report!(
        "  RFLAGS {:x}  CS {:x}  SS {:x}  CR0 {:x}  CR2 {cr2:x}  CR3 {:x}  CR4 {:x}",
        frame.rflags,
        frame.cs,
        frame.ss,
        Cr0::read_raw(),
        Cr3::read().0.start_address(),
        Cr4::read_raw()
    );
}

/// Shows what look like return addresses on the stack from `rsp` up, nearest first: words that point into
/// the kernel's code, right behind a call. Works without frame pointers; may show a stale one.
fn trace(rsp: u64) {
    // After an overflow RSP is in the guard page, and the stack begins above it.
    let start = match memory::is_mapped(rsp) {
        true => rsp.next_multiple_of(8),
        false => rsp.next_multiple_of(mem::PAGE_SIZE),
    };
    let words = (start..start.saturating_add(TRACE_BYTES))
        .step_by(8)
        .map_while(|at| {
            let readable = at % mem::PAGE_SIZE != 0 && at != start || memory::is_mapped(at);
            // SAFETY: the page is mapped, and the address aligned.
            readable.then(|| unsafe { (at as *const u64).read_volatile() })
        });
    for address in words.filter(|&word| follows_call(word)).take(TRACE_LENGTH) {
        report!("  from {}", Code(address));
    }
}

/// Whether a call instruction ends right before `address`: E8 with 4 bytes, or FF /2 in 2 to 7 bytes.
fn follows_call(address: u64) -> bool {
    const LONGEST: u64 = 8;
    if !symbols::is_code(address) || !symbols::is_code(address.wrapping_sub(LONGEST)) {
        return false;
    }
    // SAFETY: both ends lie in the kernel's code, which is mapped and readable.
    let before: [u8; LONGEST as usize] =
        unsafe { ((address - LONGEST) as *const [u8; LONGEST as usize]).read_unaligned() };
    let indirect = |length: usize| matches!(before[before.len() - length..], [0xff, modrm, ..] if modrm >> 3 & 7 == 2);
    before[3] == 0xe8 || (2..=7).any(indirect)
}

fn last_lines() {
    report!("last lines of the log:");
    log::last_lines(LOG_LINES, |piece, last| {
        console::report(piece);
        if last {
            console::report(b"\r\n");
        }
    });
    console::flush();
}

/// Shows where a panic happened. The message goes out in one piece before anything else is tried.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    x86_64::instructions::interrupts::disable();
    begin();
    report!("HOST FAULT: panic on {Processor}");
    match info.location() {
        Some(location) => report!("  at {}:{}", location.file(), location.line()),
        None => report!("  at an unknown place"),
    }
    report!("  {}", info.message());
    let rsp: u64;
    // SAFETY: reads the stack pointer.
    unsafe { core::arch::asm!("mov {}, rsp", out(reg) rsp, options(nomem, nostack)) };
    trace(rsp);
    last_lines();
    end()
}

/// Shows a line on the screen too; the log's own output for reports.
pub(crate) fn show(line: &[u8]) {
    console::report(line);
    console::report(b"\r\n");
    screen::write_line(line);
}

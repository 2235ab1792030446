//! Descriptor tables, the trap entry, and the two ways to survive a trap on purpose.
//!
//! - [`probe!`] runs a few instructions and hands back the exception that ended them, if any.
//! - [`guarded`] runs a whole function; an exception that nobody probes for ends it early.
//!
//! Everything shared with the handler is atomic, so that no handler ever aliases a reference.
//! The first processor runs all of it; the others have `smp` for their traps.

use core::arch::{global_asm, naked_asm};
use core::cell::UnsafeCell;
use core::fmt;
use core::mem::{offset_of, size_of};
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};

use bitfield_struct::bitfield;

use crate::cpu::{self, PageFaultCode, Rflags};
use crate::{apic, println, smp};

/// Kernel code segment.
pub const KERNEL_CODE: u16 = 0x08;
/// Kernel data segment; SYSCALL loads SS with the selector after that of the code.
pub const KERNEL_DATA: u16 = 0x10;
/// 32-bit code of ring 3, also the base that SYSRET counts from.
pub const USER_CODE_32: u16 = 0x18 | 3;
/// Data of ring 3.
pub const USER_DATA: u16 = 0x20 | 3;
/// 64-bit code of ring 3.
pub const USER_CODE_64: u16 = 0x28 | 3;
/// A data segment that is not present, for #NP and #SS.
pub const ABSENT_DATA: u16 = 0x40;
const TASK_STATE: u16 = 0x30;

/// Exceptions by number (SDM vol. 3, table 7-1).
pub mod vector {
    pub const DIVIDE_ERROR: u8 = 0;
    pub const DEBUG: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BREAKPOINT: u8 = 3;
    pub const OVERFLOW: u8 = 4;
    pub const INVALID_OPCODE: u8 = 6;
    pub const DEVICE_NOT_AVAILABLE: u8 = 7;
    pub const DOUBLE_FAULT: u8 = 8;
    pub const NOT_PRESENT: u8 = 11;
    pub const STACK: u8 = 12;
    pub const GENERAL_PROTECTION: u8 = 13;
    pub const PAGE_FAULT: u8 = 14;
    pub const X87: u8 = 16;
    pub const ALIGNMENT: u8 = 17;
    pub const SIMD: u8 = 19;
    /// First vector that is no exception.
    pub const FIRST_INTERRUPT: u8 = 32;
}

global_asm!(include_str!("traps.s"), on_trap = sym on_trap);

unsafe extern "C" {
    /// 256 stubs of [`STUB_BYTES`] each.
    static trap_stubs: [u8; 256 * STUB_BYTES as usize];
}

const STUB_BYTES: u64 = 16;

/// What the trap entry leaves on the stack.
#[repr(C)]
pub struct Frame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rax: u64,
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

const _: () = assert!(size_of::<Frame>() == 22 * 8 && offset_of!(Frame, vector) == 15 * 8);

/// A gate of the interrupt descriptor table in long mode.
#[bitfield(u128)]
struct Gate {
    #[bits(16)]
    offset_low: u64,
    #[bits(16)]
    selector: u16,
    #[bits(3)]
    stack: u8,
    #[bits(5)]
    _reserved: u8,
    #[bits(4)]
    kind: u8,
    _zero: bool,
    #[bits(2)]
    privilege: u8,
    present: bool,
    #[bits(48)]
    offset_high: u64,
    _reserved2: u32,
}

/// Gate kind of a 64-bit interrupt gate.
const INTERRUPT_GATE: u8 = 0xE;
/// Interrupt stack of #DF, and that of NMI.
const DOUBLE_FAULT_STACK: u8 = 1;
const NMI_STACK: u8 = 2;

/// 64-bit task state: only stacks matter.
#[repr(C, packed(4))]
struct TaskState {
    _reserved: u32,
    ring0_stack: u64,
    _other_rings: [u64; 2],
    _reserved2: u64,
    interrupt_stacks: [u64; 7],
    _reserved3: u64,
    _reserved4: u16,
    io_map: u16,
}

const _: () = assert!(size_of::<TaskState>() == 104);

/// A table that the processor reads, and that is written before or between its uses.
#[repr(align(16))]
struct Table<T>(UnsafeCell<T>);

// SAFETY: the first processor alone writes these, and the handlers never touch them.
unsafe impl<T> Sync for Table<T> {}

const STACK_BYTES: usize = 16 * 1024;
static TRAP_STACK: Table<[u8; STACK_BYTES]> = Table(UnsafeCell::new([0; STACK_BYTES]));
static DOUBLE_FAULT_STACK_MEMORY: Table<[u8; STACK_BYTES]> =
    Table(UnsafeCell::new([0; STACK_BYTES]));
static NMI_STACK_MEMORY: Table<[u8; STACK_BYTES]> = Table(UnsafeCell::new([0; STACK_BYTES]));

static IDT: Table<[Gate; 256]> = Table(UnsafeCell::new([Gate::new(); 256]));
static TSS: Table<TaskState> = Table(UnsafeCell::new(TaskState {
    _reserved: 0,
    ring0_stack: 0,
    _other_rings: [0; 2],
    _reserved2: 0,
    interrupt_stacks: [0; 7],
    _reserved3: 0,
    _reserved4: 0,
    // Beyond the limit: no port is open to ring 3.
    io_map: size_of::<TaskState>() as u16,
}));
static GDT: Table<[u64; 9]> = Table(UnsafeCell::new([
    0,
    0x00AF_9B00_0000_FFFF, // ring 0, 64-bit code
    0x00CF_9300_0000_FFFF, // ring 0, data
    0x00CF_FB00_0000_FFFF, // ring 3, 32-bit code
    0x00CF_F300_0000_FFFF, // ring 3, data
    0x00AF_FB00_0000_FFFF, // ring 3, 64-bit code
    0,                     // task state, low half: filled in
    0,                     // task state, high half
    0x00CF_1300_0000_FFFF, // data, not present
]));

/// What LGDT and LIDT read.
#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

const fn top_of(stack: &'static Table<[u8; STACK_BYTES]>) -> *mut u8 {
    stack.0.get().cast::<u8>().wrapping_add(STACK_BYTES)
}

fn gate_for(index: usize) -> Gate {
    let handler = (&raw const trap_stubs) as u64 + index as u64 * STUB_BYTES;
    let stack = match index as u8 {
        vector::DOUBLE_FAULT => DOUBLE_FAULT_STACK,
        vector::NMI => NMI_STACK,
        _ => 0,
    };
    // INT3, INTO and INT 0x80 may come from ring 3.
    let privilege = match index as u8 {
        vector::BREAKPOINT | vector::OVERFLOW | 0x80 => 3,
        _ => 0,
    };
    Gate::new()
        .with_offset_low(handler & 0xFFFF)
        .with_offset_high(handler >> 16)
        .with_selector(KERNEL_CODE)
        .with_stack(stack)
        .with_kind(INTERRUPT_GATE)
        .with_privilege(privilege)
        .with_present(true)
}

/// Loads GDT, TSS and IDT. Interrupts stay off.
pub fn init() {
    let tss = TSS.0.get();
    let gdt = GDT.0.get();
    let idt = IDT.0.get();
    // SAFETY: one processor, interrupts off, the tables are not loaded yet; the pointers are to
    // statics, so they stay good for the processor.
    unsafe {
        (*tss).ring0_stack = top_of(&TRAP_STACK) as u64;
        (*tss).interrupt_stacks[usize::from(DOUBLE_FAULT_STACK) - 1] =
            top_of(&DOUBLE_FAULT_STACK_MEMORY) as u64;
        (*tss).interrupt_stacks[usize::from(NMI_STACK) - 1] = top_of(&NMI_STACK_MEMORY) as u64;
        let base = tss as u64;
        let limit = size_of::<TaskState>() as u64 - 1;
        // Available 64-bit TSS, present (SDM vol. 3, figure 8-4).
        (*gdt)[usize::from(TASK_STATE) / 8] =
            limit | (base & 0xFF_FFFF) << 16 | 0x89 << 40 | (base >> 24 & 0xFF) << 56;
        (*gdt)[usize::from(TASK_STATE) / 8 + 1] = base >> 32;
        for (index, gate) in (*idt).iter_mut().enumerate() {
            *gate = gate_for(index);
        }
    }
    load();
}

/// Loads the tables once more, after others were in force.
pub fn reload() {
    // Busy since it was loaded first, which LTR does not take.
    const BUSY: u64 = 1 << 41;
    let gdt = GDT.0.get();
    // SAFETY: one processor, and no reference to the table is kept; TR is loaded next.
    unsafe { (*gdt)[usize::from(TASK_STATE) / 8] &= !BUSY };
    load();
}

/// Loads the tables into the processor.
fn load() {
    let gdt = TablePointer {
        limit: size_of::<[u64; 9]>() as u16 - 1,
        base: GDT.0.get() as u64,
    };
    let idt = TablePointer {
        limit: size_of::<[Gate; 256]>() as u16 - 1,
        base: IDT.0.get() as u64,
    };
    // SAFETY: both tables are filled and static; the selectors are those of the GDT, whose first
    // three entries equal the boot table's.
    unsafe {
        core::arch::asm!(
            "lgdt [{gdt}]",
            "lidt [{idt}]",
            "push {code}",
            "lea {scratch}, [rip + 2f]",
            "push {scratch}",
            "retfq",
            "2:",
            "mov ds, {data:e}",
            "mov es, {data:e}",
            "mov ss, {data:e}",
            "ltr {task:x}",
            gdt = in(reg) &gdt,
            idt = in(reg) &idt,
            code = const KERNEL_CODE,
            data = in(reg) u32::from(KERNEL_DATA),
            task = in(reg) TASK_STATE,
            scratch = out(reg) _,
        );
    }
}

/// The IDT of the other processors: that of the first without stacks of the TSS, which they lack.
static OTHERS_IDT: Table<[Gate; 256]> = Table(UnsafeCell::new([Gate::new(); 256]));

/// The descriptors of the GDT.
pub fn descriptors() -> [u64; 9] {
    // SAFETY: one processor; the table is static, and no reference to it is kept.
    unsafe { GDT.0.get().read_volatile() }
}

/// Address and limit of the GDT.
pub fn gdt() -> (u64, u16) {
    (GDT.0.get() as u64, size_of::<[u64; 9]>() as u16 - 1)
}

/// Loads the IDT of the other processors into one of them. They have the GDT already.
pub fn load_for_others() {
    let table = OTHERS_IDT.0.get().cast::<Gate>();
    for index in 0..256 {
        // SAFETY: in bounds. Each processor writes the same, 16 bytes that a processor that uses the table
        // already finds unchanged.
        unsafe {
            table
                .add(index)
                .write_volatile(gate_for(index).with_stack(0))
        };
    }
    let idt = TablePointer {
        limit: size_of::<[Gate; 256]>() as u16 - 1,
        base: table as u64,
    };
    // SAFETY: the table is filled and static.
    unsafe { core::arch::asm!("lidt [{}]", in(reg) &idt, options(nostack)) };
}

/// Marks a gate present or not, for tests of nested exceptions.
pub fn set_gate_present(index: u8, present: bool) {
    set_gate(index, |gate| gate.with_present(present));
}

/// Lets a vector go straight to a handler that saves what it uses and ends with IRETQ.
pub fn set_raw_handler(index: u8, handler: extern "C" fn()) {
    let address = handler as usize as u64;
    set_gate(index, |gate| {
        gate.with_offset_low(address & 0xFFFF)
            .with_offset_high(address >> 16)
    });
}

/// Brings a vector back to the common handler.
pub fn restore_handler(index: u8) {
    set_gate(index, |_| gate_for(index.into()));
}

fn set_gate(index: u8, change: impl FnOnce(Gate) -> Gate) {
    let idt = IDT.0.get();
    // SAFETY: one processor, and interrupts of this vector are not due while it changes; the
    // handlers do not read this table, the processor does.
    unsafe {
        let gate = &mut (*idt)[usize::from(index)];
        *gate = change(*gate);
    }
}

/// Loads an empty IDT: the next exception or interrupt is a triple fault.
pub fn forget_idt() {
    let idt = TablePointer { limit: 0, base: 0 };
    // SAFETY: this is the purpose: the caller wants the machine to shut down.
    unsafe { core::arch::asm!("lidt [{}]", in(reg) &idt, options(nostack)) };
}

// ---------------------------------------------------------------------------------------------
// Probes

/// Where a probe stands; written by `probe!`, read by the handler. The order is known to asm.
#[repr(C)]
pub struct Probe {
    start: AtomicU64,
    end: AtomicU64,
    rsp: AtomicU64,
    armed: AtomicU64,
}

/// The one probe.
pub static PROBE: Probe = Probe {
    start: AtomicU64::new(0),
    end: AtomicU64::new(0),
    rsp: AtomicU64::new(0),
    armed: AtomicU64::new(0),
};

/// An exception as it arrived.
#[derive(Clone, Copy)]
pub struct Trap {
    pub vector: u8,
    pub error: u64,
    pub rip: u64,
    pub cs: u16,
    pub rflags: u64,
    /// CR2 when it is a page fault.
    pub address: u64,
    /// RIP relative to the first probed instruction.
    pub offset: i64,
    /// RIP is that of the end of the probed instructions.
    pub at_end: bool,
}

impl Trap {
    /// The error code as a page fault's.
    pub fn page_fault_code(&self) -> PageFaultCode {
        PageFaultCode::from_bits_retain(self.error)
    }
}

impl fmt::Display for Trap {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(
            formatter,
            "vector {} error {:#x} rip {:#x} (start{:+}) cs {:#x} address {:#x}",
            self.vector, self.error, self.rip, self.offset, self.cs, self.address
        )
    }
}

/// The last trap, field by field.
struct LastTrap {
    vector: AtomicU64,
    error: AtomicU64,
    rip: AtomicU64,
    cs: AtomicU64,
    rflags: AtomicU64,
    address: AtomicU64,
    valid: AtomicU64,
}

static LAST: LastTrap = LastTrap {
    vector: AtomicU64::new(0),
    error: AtomicU64::new(0),
    rip: AtomicU64::new(0),
    cs: AtomicU64::new(0),
    rflags: AtomicU64::new(0),
    address: AtomicU64::new(0),
    valid: AtomicU64::new(0),
};

impl LastTrap {
    fn store(&self, frame: &Frame) {
        self.vector.store(frame.vector, Relaxed);
        self.error.store(frame.error, Relaxed);
        self.rip.store(frame.rip, Relaxed);
        self.cs.store(frame.cs, Relaxed);
        self.rflags.store(frame.rflags, Relaxed);
        self.address.store(cpu::cr2(), Relaxed);
        self.valid.store(1, Relaxed);
    }
}

/// Takes the trap that the last probe or guarded call ended with.
pub fn take_trap() -> Option<Trap> {
    if LAST.valid.swap(0, Relaxed) == 0 {
        return None;
    }
    let rip = LAST.rip.load(Relaxed);
    let vector = LAST.vector.load(Relaxed) as u8;
    Some(Trap {
        vector,
        error: LAST.error.load(Relaxed),
        rip,
        cs: LAST.cs.load(Relaxed) as u16,
        rflags: LAST.rflags.load(Relaxed),
        address: if vector == vector::PAGE_FAULT {
            LAST.address.load(Relaxed)
        } else {
            0
        },
        offset: rip.wrapping_sub(PROBE.start.load(Relaxed)).cast_signed(),
        at_end: rip == PROBE.end.load(Relaxed),
    })
}

/// Runs instructions; evaluates to the exception that ended them, as `Option<Trap>`.
///
/// Operands follow as in `asm!`. The instructions must leave RSP as it was unless they trap.
/// An unsafe operation: the caller says why the instructions are harmless to Rust.
#[macro_export]
macro_rules! probe {
    ($($text:literal),+ $(,)? $(; $($operands:tt)+)?) => {{
        core::arch::asm!(
            "lea {probe_scratch}, [rip + 3f]",
            "mov [rip + {probe} + 8], {probe_scratch}",
            "mov [rip + {probe} + 16], rsp",
            "lea {probe_scratch}, [rip + 2f]",
            "mov [rip + {probe}], {probe_scratch}",
            "mov qword ptr [rip + {probe} + 24], 1",
            "2:",
            $($text,)+
            "3:",
            "mov qword ptr [rip + {probe} + 24], 0",
            $($($operands)+,)?
            probe = sym $crate::interrupts::PROBE,
            probe_scratch = out(reg) _,
        );
        $crate::interrupts::take_trap()
    }};
}

const _: () = assert!(
    offset_of!(Probe, start) == 0
        && offset_of!(Probe, end) == 8
        && offset_of!(Probe, rsp) == 16
        && offset_of!(Probe, armed) == 24
);

// ---------------------------------------------------------------------------------------------
// Guarded calls

/// Where a guarded call continues after an unexpected exception; 0 when there is none.
static RECOVERY_RIP: AtomicU64 = AtomicU64::new(0);
static RECOVERY_RSP: AtomicU64 = AtomicU64::new(0);

/// Calls `function(argument)`; 0 if it returned, 1 if an exception ended it.
#[unsafe(naked)]
extern "C" fn guarded_call(function: extern "C" fn(*mut u8), argument: *mut u8) -> u64 {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "sub rsp, 8",
        "mov [rip + {rsp}], rsp",
        "lea rax, [rip + 3f]",
        "mov [rip + {rip}], rax",
        "mov rax, rdi",
        "mov rdi, rsi",
        "call rax",
        "xor eax, eax",
        "jmp 4f",
        "3: mov eax, 1",
        "4: mov qword ptr [rip + {rip}], 0",
        "add rsp, 8",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        rsp = sym RECOVERY_RSP,
        rip = sym RECOVERY_RIP,
    )
}

/// Runs `work`; an exception that no probe expects ends it and is returned. What `work` owned
/// is then forgotten, not dropped.
pub fn guarded<F: FnMut()>(mut work: F) -> Result<(), Trap> {
    extern "C" fn call<F: FnMut()>(argument: *mut u8) {
        // SAFETY: `guarded` below passes its own live closure, and nobody else has it.
        let work = unsafe { &mut *argument.cast::<F>() };
        work();
    }
    if guarded_call(call::<F>, (&raw mut work).cast()) == 0 {
        return Ok(());
    }
    PROBE.armed.store(0, Relaxed);
    PROBE.start.store(0, Relaxed);
    Err(take_trap().expect("the handler stored the trap that it recovered from"))
}

// ---------------------------------------------------------------------------------------------
// Hooks and counters

/// Runs inside the handler of one vector, in place of what is done by default.
pub type Hook = fn(&mut Frame);

static HOOKS: [AtomicUsize; 256] = [const { AtomicUsize::new(0) }; 256];
static COUNTS: [AtomicU32; 256] = [const { AtomicU32::new(0) }; 256];
/// The first vectors since the last [`reset_counts`], in order of arrival.
static ORDER: [AtomicU8; ORDER_LENGTH] = [const { AtomicU8::new(0) }; ORDER_LENGTH];
static ARRIVED: AtomicUsize = AtomicUsize::new(0);
static LAST_INTERRUPT_RIP: AtomicU64 = AtomicU64::new(0);
/// A vector that came without a hook, plus one.
static UNEXPECTED: AtomicU32 = AtomicU32::new(0);
const ORDER_LENGTH: usize = 16;

/// Sets what runs on a vector.
pub fn hook(index: u8, hook: Hook) {
    HOOKS[usize::from(index)].store(hook as usize, Relaxed);
}

/// Removes all hooks and forgets what was counted.
pub fn clear_hooks() {
    for hook in &HOOKS {
        hook.store(0, Relaxed);
    }
    reset_counts();
    UNEXPECTED.store(0, Relaxed);
}

/// Forgets what was counted.
pub fn reset_counts() {
    for count in &COUNTS {
        count.store(0, Relaxed);
    }
    ARRIVED.store(0, Relaxed);
}

/// Times that a vector came since [`reset_counts`].
pub fn count(index: u8) -> u32 {
    COUNTS[usize::from(index)].load(Relaxed)
}

/// The vector that arrived as the `position`-th since [`reset_counts`]; only the first few are kept.
pub fn arrived(position: usize) -> Option<u8> {
    if position >= ARRIVED.load(Relaxed) {
        return None;
    }
    ORDER.get(position).map(|vector| vector.load(Relaxed))
}

/// RIP that the last interrupt or hooked exception returned to.
pub fn last_interrupt_rip() -> u64 {
    LAST_INTERRUPT_RIP.load(Relaxed)
}

/// Takes the vector of an interrupt that nobody hooked.
pub fn take_unexpected() -> Option<u8> {
    UNEXPECTED
        .swap(0, Relaxed)
        .checked_sub(1)
        .map(|vector| vector as u8)
}

/// A hook that ends the interrupt at the local APIC.
pub fn end_at_apic(_frame: &mut Frame) {
    apic::local().end_of_interrupt();
}

/// A hook that does nothing: the count is enough.
pub fn only_count(_frame: &mut Frame) {}

extern "C" fn on_trap(frame: &mut Frame) {
    if let Some(number) = smp::number_by_stack(&raw const *frame as u64) {
        smp::on_trap(number, frame);
        return;
    }
    let index = frame.vector as u8;
    let hook = HOOKS[usize::from(index)].load(Relaxed);
    COUNTS[usize::from(index)].fetch_add(1, Relaxed);
    if let Some(slot) = ORDER.get(ARRIVED.fetch_add(1, Relaxed)) {
        slot.store(index, Relaxed);
    }
    if hook != 0 {
        LAST_INTERRUPT_RIP.store(frame.rip, Relaxed);
        // SAFETY: only `hook` stores here, and only values of this type.
        let hook: Hook = unsafe { core::mem::transmute::<usize, Hook>(hook) };
        hook(frame);
        return;
    }
    if index >= vector::FIRST_INTERRUPT && PROBE.armed.load(Relaxed) == 0 {
        UNEXPECTED.store(u32::from(index) + 1, Relaxed);
        apic::local().end_of_interrupt();
        return;
    }
    let (rip, rsp) = if PROBE.armed.swap(0, Relaxed) != 0 {
        (PROBE.end.load(Relaxed), PROBE.rsp.load(Relaxed))
    } else if RECOVERY_RIP.load(Relaxed) != 0 {
        (RECOVERY_RIP.load(Relaxed), RECOVERY_RSP.load(Relaxed))
    } else {
        die(frame);
    };
    LAST.store(frame);
    frame.rip = rip;
    frame.rsp = rsp;
    frame.cs = KERNEL_CODE.into();
    frame.ss = KERNEL_DATA.into();
    let keep = Rflags::from_bits_retain(frame.rflags)
        .difference(Rflags::TF | Rflags::IF | Rflags::DF | Rflags::AC | Rflags::RF);
    frame.rflags = keep.bits();
}

/// An exception outside of every probe and guarded call: the program itself is wrong.
fn die(frame: &Frame) -> ! {
    println!(
        "\nstub: exception {} error {:#x} at {:#x}:{:#x} rflags {:#x} rsp {:#x} cr2 {:#x}",
        frame.vector,
        frame.error,
        frame.cs,
        frame.rip,
        frame.rflags,
        frame.rsp,
        cpu::cr2()
    );
    println!("stub: stopped");
    cpu::halt_forever()
}

// ---------------------------------------------------------------------------------------------
// MSRs that may not be there

/// Reads an MSR; an exception comes back as the trap.
pub fn probe_rdmsr(index: u32) -> Result<u64, Trap> {
    let (low, high): (u32, u32);
    // SAFETY: reading an MSR changes nothing that Rust relies on, and a fault is caught.
    let trap =
        unsafe { probe!("rdmsr"; in("ecx") index, inout("eax") 0 => low, inout("edx") 0 => high) };
    trap.map_or(Ok(u64::from(high) << 32 | u64::from(low)), Err)
}

/// Writes an MSR; an exception comes back as the trap.
///
/// # Safety
///
/// If the write succeeds, the value must leave paging, descriptor tables and mode intact.
pub unsafe fn probe_wrmsr(index: u32, value: u64) -> Result<(), Trap> {
    // SAFETY: the caller vouches for the value, and a fault is caught.
    let trap = unsafe {
        probe!("wrmsr";
            in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32)
    };
    trap.map_or(Ok(()), Err)
}

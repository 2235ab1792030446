//! Instructions executed twice: by the processor on RAM, and by whoever emulates them on device memory.
//!
//! Both must leave the same registers, flags and memory behind, or fault alike. Flags that the manual calls undefined
//! are not compared. The memory of the test device is needed.

use core::arch::global_asm;
use core::mem::offset_of;

use crate::cpu;
use crate::interrupts::guarded;
use crate::machine::Machine;
use crate::memory::{self, PAGE};
use crate::{checks, fail, println, skip_if};

use super::emulator::{DEVICE, NO_DEVICE, no_device};
use super::{Verdict, scratch};

checks![instructions];

const CF: u64 = 1 << 0;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const DF: u64 = 1 << 10;
const OF: u64 = 1 << 11;
const ALL: u64 = CF | PF | AF | ZF | SF | OF;

/// Bytes of memory that an instruction may reach.
const AREA: usize = 64;
/// Where in it the operand is: RDI points to its begin, RSI to its upper half.
const OPERAND: u8 = 0x10;

/// What an instruction finds and leaves. RSP's place is not used.
#[repr(C)]
#[derive(Clone, Copy)]
struct State {
    gprs: [u64; 16],
    flags: u64,
    memory: [u8; AREA],
}

const RCX: usize = 1;
const RSP: usize = 4;
const RSI: usize = 6;
const RDI: usize = 7;

const _: () = assert!(offset_of!(State, gprs) == 0 && offset_of!(State, flags) == 128);

global_asm!(
    ".section .text.twins, \"ax\"",
    // run_twin(state: *mut State, code): calls the code with these registers, and stores what it leaves.
    "run_twin:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rip + twin_state], rdi",
    "mov [rip + twin_code], rsi",
    "push qword ptr [rdi + 128]",
    "popfq",
    "mov rax, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov rdx, [rdi + 16]",
    "mov rbx, [rdi + 24]",
    "mov rbp, [rdi + 40]",
    "mov rsi, [rdi + 48]",
    "mov r8, [rdi + 64]",
    "mov r9, [rdi + 72]",
    "mov r10, [rdi + 80]",
    "mov r11, [rdi + 88]",
    "mov r12, [rdi + 96]",
    "mov r13, [rdi + 104]",
    "mov r14, [rdi + 112]",
    "mov r15, [rdi + 120]",
    "mov rdi, [rdi + 56]",
    "call [rip + twin_code]",
    "push rdi",
    "mov rdi, [rip + twin_state]",
    "mov [rdi], rax",
    "mov [rdi + 8], rcx",
    "mov [rdi + 16], rdx",
    "mov [rdi + 24], rbx",
    "mov [rdi + 40], rbp",
    "mov [rdi + 48], rsi",
    "mov [rdi + 64], r8",
    "mov [rdi + 72], r9",
    "mov [rdi + 80], r10",
    "mov [rdi + 88], r11",
    "mov [rdi + 96], r12",
    "mov [rdi + 104], r13",
    "mov [rdi + 112], r14",
    "mov [rdi + 120], r15",
    "pop qword ptr [rdi + 56]",
    "pushfq",
    "pop qword ptr [rdi + 128]",
    "cld",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".bss",
    ".balign 8",
    "twin_state: .quad 0",
    "twin_code: .quad 0",
    ".text",
);

unsafe extern "C" {
    fn run_twin(state: *mut State, code: u64);
}

/// How the bytes behind the opcode look.
#[derive(Clone, Copy)]
enum Tail {
    /// A memory operand and registers by turns.
    Registers,
    /// A memory operand and an extension of the opcode.
    Group(u8),
    /// No operand bytes: a string instruction.
    String,
}

/// Which values a form is given beyond the random ones.
#[derive(Clone, Copy, PartialEq)]
enum Limit {
    None,
    /// RCX is a shift count below each width, never 0.
    Count,
    /// RCX is the number of iterations.
    Iterations,
    /// All registers are small: bit offsets.
    Small,
}

/// Instructions that differ by prefixes and registers only.
struct Form {
    opcode: &'static [u8],
    tail: Tail,
    /// Bytes of an immediate operand; with `WIDE` two with 66H, four without.
    immediate: u8,
    defined: u64,
    limit: Limit,
    prefixes: &'static [&'static [u8]],
}

const WIDE: u8 = 0xff;
/// Byte operands.
const BYTE: &[&[u8]] = &[&[], &[0x40]];
/// 32, 16 and 64 bits, and the upper registers.
const SIZES: &[&[u8]] = &[&[], &[0x66], &[0x48], &[0x44]];
const REPEATED: &[&[u8]] = &[
    &[],
    &[0xf3],
    &[0xf2],
    &[0x66, 0xf3],
    &[0xf3, 0x48],
    &[0xf2, 0x48],
    &[0x66],
];
const LOCKED: &[&[u8]] = &[&[], &[0x66], &[0x48], &[0xf0], &[0xf0, 0x48]];

const fn form(opcode: &'static [u8], prefixes: &'static [&'static [u8]], defined: u64) -> Form {
    Form {
        opcode,
        tail: Tail::Registers,
        immediate: 0,
        defined,
        limit: Limit::None,
        prefixes,
    }
}

const fn group(
    opcode: &'static [u8],
    extension: u8,
    immediate: u8,
    prefixes: &'static [&'static [u8]],
    defined: u64,
) -> Form {
    Form {
        tail: Tail::Group(extension),
        immediate,
        ..form(opcode, prefixes, defined)
    }
}

const fn limited(limit: Limit, form: Form) -> Form {
    Form { limit, ..form }
}

const fn string(opcode: &'static [u8], defined: u64) -> Form {
    Form {
        tail: Tail::String,
        limit: Limit::Iterations,
        ..form(opcode, REPEATED, defined)
    }
}

const LOGIC: u64 = ALL & !AF;
const SHIFTED: u64 = CF | PF | ZF | SF;
const PRODUCT: u64 = CF | OF;

/// The arithmetic group: its members are 8 apart.
macro_rules! arithmetic {
    ($base:literal, $extension:literal, $flags:expr) => {
        [
            form(&[$base], BYTE, $flags),
            form(&[$base + 1], LOCKED, $flags),
            form(&[$base + 2], BYTE, $flags),
            form(&[$base + 3], SIZES, $flags),
            group(&[0x80], $extension, 1, BYTE, $flags),
            group(&[0x81], $extension, WIDE, SIZES, $flags),
            group(&[0x83], $extension, 1, LOCKED, $flags),
        ]
    };
}

const ARITHMETIC: [[Form; 7]; 8] = [
    arithmetic!(0x00, 0, ALL),
    arithmetic!(0x08, 1, LOGIC),
    arithmetic!(0x10, 2, ALL),
    arithmetic!(0x18, 3, ALL),
    arithmetic!(0x20, 4, LOGIC),
    arithmetic!(0x28, 5, ALL),
    arithmetic!(0x30, 6, LOGIC),
    arithmetic!(0x38, 7, ALL),
];

macro_rules! shifts {
    ($($extension:literal: $one:expr, $many:expr;)+) => {
        [$(
            group(&[0xd0], $extension, 0, BYTE, $one),
            group(&[0xd1], $extension, 0, SIZES, $one),
            limited(Limit::Count, group(&[0xd2], $extension, 0, BYTE, $many)),
            limited(Limit::Count, group(&[0xd3], $extension, 0, SIZES, $many)),
            group(&[0xc0], $extension, 1, BYTE, $many),
            group(&[0xc1], $extension, 1, SIZES, $many),
        )+]
    };
}

/// Rotations leave the other flags alone.
const SHIFTS: [Form; 42] = shifts! {
    0: ALL, ALL & !OF;
    1: ALL, ALL & !OF;
    2: ALL, ALL & !OF;
    3: ALL, ALL & !OF;
    4: SHIFTED | OF, SHIFTED;
    5: SHIFTED | OF, SHIFTED;
    7: SHIFTED | OF, SHIFTED;
};

const REST: &[Form] = &[
    form(&[0x63], SIZES, ALL),
    Form {
        immediate: WIDE,
        ..form(&[0x69], SIZES, PRODUCT)
    },
    Form {
        immediate: 1,
        ..form(&[0x6b], SIZES, PRODUCT)
    },
    form(&[0x84], BYTE, LOGIC),
    form(&[0x85], SIZES, LOGIC),
    form(&[0x86], BYTE, ALL),
    form(&[0x87], LOCKED, ALL),
    form(&[0x88], BYTE, ALL),
    form(&[0x89], SIZES, ALL),
    form(&[0x8a], BYTE, ALL),
    form(&[0x8b], SIZES, ALL),
    group(&[0xc6], 0, 1, BYTE, ALL),
    group(&[0xc7], 0, WIDE, SIZES, ALL),
    group(&[0xf6], 0, 1, BYTE, LOGIC),
    group(&[0xf7], 0, WIDE, SIZES, LOGIC),
    group(&[0xf6], 2, 0, BYTE, ALL),
    group(&[0xf7], 2, 0, LOCKED, ALL),
    group(&[0xf6], 3, 0, BYTE, ALL),
    group(&[0xf7], 3, 0, LOCKED, ALL),
    group(&[0xf6], 4, 0, BYTE, PRODUCT),
    group(&[0xf7], 4, 0, SIZES, PRODUCT),
    group(&[0xf6], 5, 0, BYTE, PRODUCT),
    group(&[0xf7], 5, 0, SIZES, PRODUCT),
    group(&[0xf6], 6, 0, BYTE, 0),
    group(&[0xf7], 6, 0, SIZES, 0),
    group(&[0xf6], 7, 0, BYTE, 0),
    group(&[0xf7], 7, 0, SIZES, 0),
    group(&[0xfe], 0, 0, BYTE, ALL),
    group(&[0xfe], 1, 0, BYTE, ALL),
    group(&[0xff], 0, 0, LOCKED, ALL),
    group(&[0xff], 1, 0, LOCKED, ALL),
    string(&[0xa4], ALL),
    string(&[0xa5], ALL),
    string(&[0xa6], ALL),
    string(&[0xa7], ALL),
    string(&[0xaa], ALL),
    string(&[0xab], ALL),
    string(&[0xac], ALL),
    string(&[0xad], ALL),
    string(&[0xae], ALL),
    string(&[0xaf], ALL),
    form(&[0x0f, 0x1f], SIZES, ALL),
    form(&[0x0f, 0x40], SIZES, ALL),
    form(&[0x0f, 0x43], SIZES, ALL),
    form(&[0x0f, 0x4d], SIZES, ALL),
    form(&[0x0f, 0x4e], SIZES, ALL),
    group(&[0x0f, 0x92], 0, 0, BYTE, ALL),
    group(&[0x0f, 0x95], 0, 0, BYTE, ALL),
    group(&[0x0f, 0x97], 0, 0, BYTE, ALL),
    group(&[0x0f, 0x9a], 0, 0, BYTE, ALL),
    group(&[0x0f, 0x9c], 0, 0, BYTE, ALL),
    limited(Limit::Small, form(&[0x0f, 0xa3], SIZES, CF | ZF)),
    limited(Limit::Small, form(&[0x0f, 0xab], LOCKED, CF | ZF)),
    limited(Limit::Small, form(&[0x0f, 0xb3], LOCKED, CF | ZF)),
    limited(Limit::Small, form(&[0x0f, 0xbb], LOCKED, CF | ZF)),
    group(&[0x0f, 0xba], 4, 1, SIZES, CF | ZF),
    group(&[0x0f, 0xba], 5, 1, LOCKED, CF | ZF),
    group(&[0x0f, 0xba], 6, 1, LOCKED, CF | ZF),
    group(&[0x0f, 0xba], 7, 1, LOCKED, CF | ZF),
    Form {
        immediate: 1,
        ..form(&[0x0f, 0xa4], SIZES, SHIFTED)
    },
    limited(Limit::Count, form(&[0x0f, 0xa5], SIZES, SHIFTED)),
    Form {
        immediate: 1,
        ..form(&[0x0f, 0xac], SIZES, SHIFTED)
    },
    limited(Limit::Count, form(&[0x0f, 0xad], SIZES, SHIFTED)),
    form(&[0x0f, 0xaf], SIZES, PRODUCT),
    form(&[0x0f, 0xb0], BYTE, ALL),
    form(&[0x0f, 0xb1], LOCKED, ALL),
    form(&[0x0f, 0xb6], SIZES, ALL),
    form(&[0x0f, 0xb7], SIZES, ALL),
    form(&[0x0f, 0xbc], SIZES, ZF),
    form(&[0x0f, 0xbd], SIZES, ZF),
    form(&[0x0f, 0xbe], SIZES, ALL),
    form(&[0x0f, 0xbf], SIZES, ALL),
    form(&[0x0f, 0xc0], BYTE, ALL),
    form(&[0x0f, 0xc1], LOCKED, ALL),
    form(&[0x0f, 0xc3], &[&[], &[0x48]], ALL),
    group(&[0x0f, 0xc7], 1, 0, LOCKED, ALL),
];

const COUNTED: u64 = CF | ZF;
const BMI: u64 = CF | ZF | SF | OF;
/// A form with a VEX prefix, 32 and 64 bits wide; the second source is EDX.
macro_rules! vex {
    ($map:literal, $word:literal, $opcode:literal, $tail:expr, $immediate:literal, $flags:expr) => {
        [
            Form {
                tail: $tail,
                immediate: $immediate,
                ..form(&[0xc4, $map, $word, $opcode], &[&[]], $flags)
            },
            Form {
                tail: $tail,
                immediate: $immediate,
                ..form(&[0xc4, $map, $word | 0x80, $opcode], &[&[]], $flags)
            },
        ]
    };
}

/// Instructions that not every processor has: the leaf of CPUID, its register (EBX, ECX) and bit, and the forms.
struct Optional {
    leaf: u32,
    bit: u32,
    ecx: bool,
    /// QEMU 7.2 (TCG) itself is wrong in their flags: skipped on its processor, AMD's.
    wrong_in_qemu: bool,
    forms: &'static [[Form; 2]],
}

const OPTIONAL: &[Optional] = &[
    Optional {
        leaf: 1,
        bit: 23,
        ecx: true,
        wrong_in_qemu: false,
        forms: &[[
            form(&[0x0f, 0xb8], &[&[0xf3], &[0xf3, 0x48]], ALL),
            form(&[0x0f, 0xb8], &[&[0x66, 0xf3], &[0xf3, 0x44]], ALL),
        ]],
    },
    Optional {
        leaf: 1,
        bit: 22,
        ecx: true,
        wrong_in_qemu: false,
        forms: &[[
            form(&[0x0f, 0x38, 0xf0], SIZES, ALL),
            form(&[0x0f, 0x38, 0xf1], SIZES, ALL),
        ]],
    },
    Optional {
        leaf: 1,
        bit: 20,
        ecx: true,
        wrong_in_qemu: false,
        forms: &[[
            form(&[0x0f, 0x38, 0xf0], &[&[0xf2], &[0xf2, 0x48]], ALL),
            form(
                &[0x0f, 0x38, 0xf1],
                &[&[0xf2], &[0x66, 0xf2], &[0xf2, 0x48]],
                ALL,
            ),
        ]],
    },
    Optional {
        leaf: 0x8000_0001,
        bit: 5,
        ecx: true,
        wrong_in_qemu: false,
        forms: &[[
            form(&[0x0f, 0xbd], &[&[0xf3], &[0xf3, 0x48]], COUNTED),
            form(&[0x0f, 0xbd], &[&[0x66, 0xf3]], COUNTED),
        ]],
    },
    Optional {
        leaf: 7,
        bit: 3,
        ecx: false,
        wrong_in_qemu: false,
        forms: &[
            [
                form(&[0x0f, 0xbc], &[&[0xf3], &[0xf3, 0x48]], COUNTED),
                form(&[0x0f, 0xbc], &[&[0x66, 0xf3]], COUNTED),
            ],
            vex!(0xe2, 0x68, 0xf2, Tail::Registers, 0, ZF | SF | OF | CF),
            vex!(0xe2, 0x68, 0xf3, Tail::Group(1), 0, BMI),
            vex!(0xe2, 0x68, 0xf3, Tail::Group(2), 0, BMI),
            vex!(0xe2, 0x68, 0xf7, Tail::Registers, 0, CF | ZF | OF),
        ],
    },
    Optional {
        leaf: 7,
        bit: 8,
        ecx: false,
        wrong_in_qemu: false,
        forms: &[
            vex!(0xe2, 0x68, 0xf5, Tail::Registers, 0, BMI),
            vex!(0xe2, 0x6a, 0xf5, Tail::Registers, 0, ALL),
            vex!(0xe2, 0x6b, 0xf5, Tail::Registers, 0, ALL),
            vex!(0xe2, 0x6b, 0xf6, Tail::Registers, 0, ALL),
            vex!(0xe2, 0x69, 0xf7, Tail::Registers, 0, ALL),
            vex!(0xe2, 0x6a, 0xf7, Tail::Registers, 0, ALL),
            vex!(0xe2, 0x6b, 0xf7, Tail::Registers, 0, ALL),
            vex!(0xe3, 0x7b, 0xf0, Tail::Registers, 1, ALL),
        ],
    },
    // BLSI, whose carry flag means the opposite.
    Optional {
        leaf: 7,
        bit: 3,
        ecx: false,
        wrong_in_qemu: true,
        forms: &[vex!(0xe2, 0x68, 0xf3, Tail::Group(3), 0, BMI)],
    },
    Optional {
        leaf: 7,
        bit: 19,
        ecx: false,
        wrong_in_qemu: true,
        forms: &[[
            form(&[0x0f, 0x38, 0xf6], &[&[0x66], &[0x66, 0x48]], ALL),
            form(&[0x0f, 0x38, 0xf6], &[&[0xf3], &[0xf3, 0x48]], ALL),
        ]],
    },
];

impl Optional {
    fn is_there(&self) -> bool {
        let result = cpu::cpuid(self.leaf, 0);
        let word = if self.ecx { result.ecx } else { result.ebx };
        let runs = !self.wrong_in_qemu || cpu::vendor() == *b"GenuineIntel";
        runs && word & 1 << self.bit != 0
    }
}

/// A simple generator of values that repeat from run to run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        // Ends and small numbers are the interesting ones.
        match self.0 >> 58 {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << 63,
            3 => 0x7fff_ffff,
            4..=9 => self.0 & 0xff,
            10..=15 => self.0 | 0xffff_ffff_ffff_ff00,
            _ => self.0,
        }
    }
}

/// The code of one instruction and the return behind it.
#[derive(Clone, Copy)]
struct Code {
    bytes: [u8; 16],
    length: usize,
}

impl Code {
    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if let Some(slot) = self.bytes.get_mut(self.length) {
                *slot = byte;
                self.length += 1;
            }
        }
    }

    fn of(form: &Form, prefix: &[u8], register: u8, random: &mut Random) -> Self {
        const DISPLACED_RDI: u8 = 0x47;
        const RET: u8 = 0xc3;
        let mut code = Code {
            bytes: [0; 16],
            length: 0,
        };
        code.push(prefix);
        code.push(form.opcode);
        match form.tail {
            Tail::Registers => code.push(&[DISPLACED_RDI | register << 3, OPERAND]),
            Tail::Group(extension) => code.push(&[DISPLACED_RDI | extension << 3, OPERAND]),
            Tail::String => {}
        }
        let bytes = match form.immediate {
            WIDE if prefix.contains(&0x66) => 2,
            WIDE => 4,
            bytes => usize::from(bytes),
        };
        let mut immediate = random.next();
        if matches!(form.opcode, [0xc0 | 0xc1] | [0x0f, 0xa4 | 0xac]) {
            immediate = immediate % 7 + 1;
        }
        code.push(&immediate.to_le_bytes()[..bytes]);
        code.push(&[RET]);
        code
    }
}

/// Runs the code on memory at `base`; how it ended: 0, or 1 and the vector of an exception.
fn run(state: &mut State, code: u64, base: u64) -> u64 {
    memory::write_bytes(base, &state.memory);
    state.gprs[RDI] = base;
    state.gprs[RSI] = base + AREA as u64 / 2;
    let ended = guarded(|| {
        // SAFETY: the code is one instruction, which reaches the memory at `base` only, and a return.
        unsafe { run_twin(state, code) };
    });
    memory::read_bytes(base, &mut state.memory);
    match ended {
        Ok(()) => 0,
        Err(trap) => 0x100 | u64::from(trap.vector),
    }
}

fn instructions(machine: &Machine) -> Verdict {
    skip_if!(no_device(machine), NO_DEVICE);
    let mut random = Random(0x0123_4567_89ab_cdef);
    let mut wrong = 0;
    let all = ARITHMETIC.as_flattened().iter().chain(&SHIFTS).chain(REST);
    let optional = OPTIONAL.iter().filter(|group| group.is_there());
    for form in all.chain(optional.flat_map(|group| group.forms.as_flattened())) {
        for prefix in form.prefixes {
            for _ in 0..3 {
                wrong += u32::from(!agree(machine, form, prefix, &mut random)?);
            }
        }
    }
    if wrong != 0 {
        fail!("{wrong} instructions differ");
    }
    Ok(())
}

/// Executes an instruction of this form on both kinds of memory.
fn agree(
    machine: &Machine,
    form: &Form,
    prefix: &[u8],
    random: &mut Random,
) -> Result<bool, super::Why> {
    /// RSP, RSI and RDI are not operands.
    const REGISTERS: [u8; 5] = [0, 1, 2, 3, 5];
    let page = scratch(machine)?;
    let register = REGISTERS[(random.next() % 5) as usize];
    let code = Code::of(form, prefix, register, random);
    memory::write_bytes(page, &code.bytes);
    let mut before = State {
        gprs: [0; 16],
        flags: 2 | random.next() & (ALL | DF),
        memory: [0; AREA],
    };
    for gpr in &mut before.gprs {
        *gpr = random.next();
        if form.limit == Limit::Small {
            *gpr &= 0x7f;
        }
    }
    match form.limit {
        Limit::Count => before.gprs[RCX] = random.next() % 7 + 1,
        Limit::Iterations => before.gprs[RCX] = random.next() % 3 + 1,
        Limit::None | Limit::Small => {}
    }
    if form.limit == Limit::Iterations {
        before.flags &= !DF;
    }
    for word in before.memory.chunks_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
    let (ram, device) = (page + PAGE, DEVICE + 3 * PAGE);
    let (mut native, mut emulated) = (before, before);
    let ends = [
        run(&mut native, page, ram),
        run(&mut emulated, page, device),
    ];
    native.gprs[RSP] = 0;
    emulated.gprs[RSP] = 0;
    for (state, base) in [(&mut native, ram), (&mut emulated, device)] {
        state.gprs[RSI] = state.gprs[RSI].wrapping_sub(base);
        state.gprs[RDI] = state.gprs[RDI].wrapping_sub(base);
    }
    let register = native
        .gprs
        .iter()
        .zip(&emulated.gprs)
        .position(|(a, b)| a != b);
    let flags = (native.flags ^ emulated.flags) & form.defined;
    let byte = native
        .memory
        .iter()
        .zip(&emulated.memory)
        .position(|(a, b)| a != b);
    if ends[0] == ends[1] && register.is_none() && flags == 0 && byte.is_none() {
        return Ok(true);
    }
    println!(
        "{:02x?}: ends {ends:x?}, register {register:?}, flags {flags:#x}, byte {byte:?}",
        &code.bytes[..code.length]
    );
    Ok(false)
}

//! Misbehaviour on request: whatever a guest does, its host and the other guests live on.
//!
//! Each prints `abuse NAME: begins`, and `abuse NAME: survived` if this guest is still there
//! afterwards. Several of them are meant to end it.

use core::arch::asm;

use crate::apic::{self, Register};
use crate::cpu::{self, port};
use crate::interrupts::{
    self, Frame, count, end_at_apic, guarded, hook, only_count, probe_rdmsr, probe_wrmsr, vector,
};
use crate::legacy;
use crate::machine::Machine;
use crate::memory::{self, PAGE, physical_bits};
use crate::options::Value;
use crate::paging::{self, Entry};
use crate::virtio::{self, Disk, NO_VECTOR, status};
use crate::{console, power, println, probe, smp, time};

/// One way to misbehave.
struct Abuse {
    name: &'static str,
    what: &'static str,
    run: fn(&Machine),
}

const ABUSES: [Abuse; 21] = [
    Abuse {
        name: "triple-fault",
        what: "shutdown by an empty IDT",
        run: |_| power::triple_fault(),
    },
    Abuse {
        name: "jump-nowhere",
        what: "execute where no memory is",
        run: jump_nowhere,
    },
    Abuse {
        name: "stack-nowhere",
        what: "take an exception on a stack without memory",
        run: stack_nowhere,
    },
    Abuse {
        name: "tables-nowhere",
        what: "page tables where no memory is",
        run: tables_nowhere,
    },
    Abuse {
        name: "idt-nowhere",
        what: "an IDT where no memory is",
        run: idt_nowhere,
    },
    Abuse {
        name: "odd-mmio",
        what: "unusual instructions on addresses without memory",
        run: odd_mmio,
    },
    Abuse {
        name: "endless-string",
        what: "a string instruction that never ends",
        run: endless_string,
    },
    Abuse {
        name: "port-storm",
        what: "all ports, all widths",
        run: port_storm,
    },
    Abuse {
        name: "msr-storm",
        what: "reads and writes of thousands of MSRs",
        run: msr_storm,
    },
    Abuse {
        name: "mmio-storm",
        what: "APIC registers at random",
        run: mmio_storm,
    },
    Abuse {
        name: "pci-storm",
        what: "writes all over PCI configuration space",
        run: pci_storm,
    },
    Abuse {
        name: "disk-storm",
        what: "a disk driver gone mad: registers, rings and notifications at random",
        run: disk_storm,
    },
    Abuse {
        name: "hypercall-storm",
        what: "hypercalls with any arguments",
        run: hypercall_storm,
    },
    Abuse {
        name: "control-storm",
        what: "control registers with any bits",
        run: control_storm,
    },
    Abuse {
        name: "timer-flood",
        what: "a timer that is always due",
        run: timer_flood,
    },
    Abuse {
        name: "bad-ipi",
        what: "interrupt commands that make no sense",
        run: bad_ipi,
    },
    Abuse {
        name: "console-flood",
        what: "hundreds of numbered lines, faster than any line",
        run: |_| {
            for number in 0..500 {
                println!("flood {number:04} {:-<48}", "");
            }
        },
    },
    Abuse {
        name: "task-loop",
        what: "hardware task switches without end",
        run: |_| {
            legacy::run(legacy::Code::TaskLoop);
        },
    },
    Abuse {
        name: "ipi-storm",
        what: "every processor interrupts every processor, without end",
        run: ipi_storm,
    },
    Abuse {
        name: "level-storm",
        what: "a level-triggered line that is never served",
        run: level_storm,
    },
    Abuse {
        name: "apic-base",
        what: "the local APIC here, there, off, and in any mode",
        run: apic_base,
    },
];

/// Runs what the command line asks for: names separated by commas, or `list`.
pub fn run(machine: &Machine, names: &Value) {
    for name in names.as_str().split(',').filter(|name| !name.is_empty()) {
        if name == "list" {
            for abuse in &ABUSES {
                println!("abuse {}: {}", abuse.name, abuse.what);
            }
            continue;
        }
        let Some(abuse) = ABUSES.iter().find(|abuse| abuse.name == name) else {
            println!("abuse {name}: no such name");
            continue;
        };
        println!("abuse {name}: begins");
        console::drain();
        let outcome = guarded(|| (abuse.run)(machine));
        machine.settle();
        match outcome {
            Ok(()) => println!("abuse {name}: survived"),
            Err(trap) => println!("abuse {name}: survived with {trap}"),
        }
    }
}

/// A sequence of numbers without pattern, the same in every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        // Xorshift64.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Maps two pages without memory behind them.
fn hole(machine: &Machine) -> u64 {
    let flags = Entry::PRESENT | Entry::WRITABLE;
    let highest = 1_u64 << physical_bits().clamp(33, 52);
    let above = (machine.handoff.map.top().max(1 << 32) + (4 << 30)).min(highest - 2 * PAGE);
    let address = paging::map(32, above & !(PAGE - 1), flags);
    paging::map(33, (above & !(PAGE - 1)) + PAGE, flags);
    address
}

fn jump_nowhere(machine: &Machine) {
    let address = hole(machine);
    // SAFETY: nothing is there to run; what comes is caught or ends this guest.
    let trap = unsafe { probe!("call {}"; in(reg) address) };
    if let Some(trap) = trap {
        println!("abuse jump-nowhere: {trap}");
    }
}

fn stack_nowhere(machine: &Machine) {
    let address = hole(machine) + PAGE;
    // SAFETY: RSP is put back by whoever comes back: the handler, or nobody.
    let _ = unsafe { probe!("mov rsp, {}", "ud2"; in(reg) address) };
}

fn tables_nowhere(machine: &Machine) {
    let highest = 1_u64 << physical_bits().clamp(33, 52);
    let above = (machine.handoff.map.top().max(1 << 32) + (4 << 30)).min(highest - 2 * PAGE);
    // SAFETY: ends this guest, as asked.
    unsafe { cpu::set_cr3(above & !(PAGE - 1)) };
}

fn idt_nowhere(machine: &Machine) {
    #[repr(C, packed)]
    struct Pointer(u16, u64);
    let pointer = Pointer(0xFFF, hole(machine));
    // SAFETY: ends this guest, as asked.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &pointer) };
}

fn odd_mmio(machine: &Machine) {
    let address = hole(machine) + 0x40;
    // SAFETY: no memory is there; SSE and x87 registers are not used otherwise; RSP is balanced
    // or put back by the handler; what comes is caught or ends this guest.
    unsafe {
        let outcomes = [
            (
                "PUSH m",
                probe!("push qword ptr [{}]", "add rsp, 8"; in(reg) address),
            ),
            (
                "POP m",
                probe!("push 1", "pop qword ptr [{}]"; in(reg) address),
            ),
            ("CALL m", probe!("call qword ptr [{}]"; in(reg) address)),
            ("MOVUPS load", probe!("movups xmm0, [{}]"; in(reg) address)),
            ("MOVUPS store", probe!("movups [{}], xmm0"; in(reg) address)),
            ("FXSAVE", probe!("fxsave [{}]"; in(reg) address)),
            (
                "FLD",
                probe!("fld tbyte ptr [{}]", "fninit"; in(reg) address),
            ),
            (
                "CMPXCHG16B",
                probe!("xor eax, eax", "xor edx, edx", "lock cmpxchg16b [{}]";
                in(reg) address, out("rax") _, out("rdx") _),
            ),
            (
                "CMPXCHG8B",
                probe!("lock cmpxchg8b [{}]"; in(reg) address,
                inout("rax") 0_u64 => _, inout("rdx") 0_u64 => _),
            ),
            ("LGDT", probe!("sgdt [{}]"; in(reg) address)),
            ("LLDT", probe!("lldt word ptr [{}]"; in(reg) address)),
            ("INVLPG", probe!("invlpg [{}]"; in(reg) address)),
            ("CLFLUSH", probe!("clflush [{}]"; in(reg) address)),
            (
                "MOV across pages",
                probe!("mov rax, [{}]"; in(reg) address - 0x40 + PAGE - 3, out("rax") _),
            ),
            (
                "MOVBE",
                probe!("movbe eax, [{}]"; in(reg) address, out("rax") _),
            ),
            (
                "IMUL",
                probe!("imul eax, [{}], 3"; in(reg) address, out("rax") _),
            ),
            ("SHLD", probe!("shld [{}], eax, 4"; in(reg) address)),
            (
                "OUTSB",
                probe!("outsb"; inout("rsi") address => _, in("dx") 0x80_u16),
            ),
            (
                "INSB",
                probe!("insb"; inout("rdi") address => _, in("dx") 0x80_u16),
            ),
            (
                "CMPSB",
                probe!("repe cmpsb"; inout("rsi") address => _, inout("rdi") address => _,
                inout("rcx") 9_u64 => _),
            ),
            (
                "SCASB",
                probe!("repne scasb"; inout("rdi") address => _, inout("rcx") 9_u64 => _,
                in("al") 1_u8),
            ),
            (
                "MOVSB",
                probe!("rep movsb"; inout("rsi") address => _, inout("rdi") address + 0x100 => _,
                inout("rcx") 9_u64 => _),
            ),
        ];
        for (name, trap) in outcomes {
            match trap {
                Some(trap) => println!("abuse odd-mmio: {name}: {trap}"),
                None => println!("abuse odd-mmio: {name}: done"),
            }
        }
    }
}

const STOP_VECTOR: u8 = 0x53;

/// REP MOVSB with nearly endless counts, from nowhere to nowhere, until a timer stops it. It
/// begins in the shadow of STI, which must not last as long as the instruction.
fn endless_string(machine: &Machine) {
    fn stop(frame: &mut Frame) {
        frame.rcx = 0;
        end_at_apic(frame);
    }
    let address = hole(machine);
    hook(STOP_VECTOR, stop);
    apic::local().write(Register::Timer, STOP_VECTOR.into());
    apic::local().write(Register::InitialCount, 50_000_000);
    while count(STOP_VECTOR) == 0 {
        // SAFETY: no memory is there; a fault at the end of the hole is caught.
        let _ = unsafe {
            probe!("sti", "rep movsb", "cli"; inout("rsi") address => _,
                inout("rdi") address => _, inout("rcx") u64::MAX >> 1 => _)
        };
        cpu::cli();
    }
}

/// Ports that end the run, or the output.
fn port_is_spared(machine: &Machine, number: u16) -> bool {
    let control = machine
        .acpi
        .and_then(|acpi| acpi.fadt)
        .map(|fadt| (fadt.pm1a_control, fadt.smi_command));
    let near = |port: u16| number.wrapping_add(3).wrapping_sub(port) < 5;
    control.is_some_and(|(control, smi)| near(control) || near(smi))
        || (COM1_FIRST..=COM1_LAST).contains(&number)
        // Reset control, keyboard controller, fast reset.
        || near(0xCF9) || near(0x64) || near(0x92)
}

const COM1_FIRST: u16 = console::COM1 - 3;
const COM1_LAST: u16 = console::COM1 + 7;

fn port_storm(machine: &Machine) {
    let mut noise = Noise(0x1234_5678_9ABC_DEF1);
    for number in (0..=u16::MAX).filter(|&number| !port_is_spared(machine, number)) {
        port::read8(number);
        port::read16(number);
        port::read32(number);
        port::write8(number, noise.next() as u8);
        port::write16(number, noise.next() as u16);
        port::write32(number, noise.next() as u32);
    }
}

fn msr_storm(_: &Machine) {
    let mut noise = Noise(0x0FED_CBA9_8765_4321);
    let (mut read, mut written) = (0_u32, 0_u32);
    let ranges = [
        0..0x2000,
        0x4000_0000..0x4000_0200,
        0xC000_0000..0xC000_2000,
        0xC001_0000..0xC001_2000,
    ];
    for index in ranges.into_iter().flatten() {
        let before = probe_rdmsr(index);
        read += u32::from(before.is_ok());
        // What this program stands on: EFER, segment bases, APIC base.
        let spared = matches!(index, cpu::msr::EFER | cpu::msr::APIC_BASE);
        for value in [
            noise.next(),
            noise.next() & 0xFF,
            u64::MAX,
            before.unwrap_or(0),
        ] {
            if !spared {
                // SAFETY: paging, mode and descriptor tables are not in MSRs but for EFER.
                written += u32::from(unsafe { probe_wrmsr(index, value) }.is_ok());
            }
        }
    }
    println!("abuse msr-storm: {read} can be read, {written} writes passed");
}

fn mmio_storm(machine: &Machine) {
    let mut noise = Noise(0x5555_1234_9999_4321);
    for _ in 0..20_000 {
        let (offset, value) = ((noise.next() & 0xFFC) as u16, noise.next() as u32);
        let pages = [
            Some(apic::local().address(Register::Id).wrapping_byte_sub(0x20)),
            machine.ioapic.map(|ioapic| ioapic.select()),
        ];
        for page in pages.into_iter().flatten() {
            let register = page.wrapping_byte_add(offset.into());
            // The command register could start or reset processors.
            if !matches!(offset, 0x300..=0x31F) {
                // SAFETY: a device register; a fault is caught.
                let _ = unsafe {
                    probe!("mov [{0}], {1:e}", "mov {1:e}, [{0}]", "mov {1:l}, [{0} + 1]";
                    in(reg) register, inout(reg) value => _)
                };
            }
        }
    }
}

fn pci_storm(_: &Machine) {
    let mut noise = Noise(0x7777_2222_1111_3333);
    for _ in 0..50_000 {
        let address = 1 << 31 | (noise.next() as u32 & 0xFFFC);
        port::write32(0xCF8, address);
        let number = 0xCFC + (noise.next() & 3) as u16;
        match noise.next() % 3 {
            0 => port::write8(number, noise.next() as u8),
            1 => port::write16(number & !1, noise.next() as u16),
            _ => port::write32(0xCFC, noise.next() as u32),
        }
        port::read32(0xCFC);
    }
}

fn disk_storm(machine: &Machine) {
    let Some(scratch) = machine.scratch else {
        return;
    };
    let mut noise = Noise(0x0F1E_2D3C_4B5A_6978);
    let mut resets = 0;
    for turn in 0..4000 {
        let Some(mut disk) = Disk::find(scratch) else {
            return;
        };
        if turn % 16 == 0 || disk.status() & status::NEEDS_RESET != 0 {
            disk.start(NO_VECTOR);
            resets += 1;
        }
        // Mostly within the queue and RAM, or every request would fail at its first number.
        for index in 0..virtio::QUEUE_SIZE {
            let word = noise.next();
            let address =
                disk.data() + (word & 0xF_FFFF) + if word >> 60 == 0 { 1 << 40 } else { 0 };
            let bytes = (word >> 20 & 0x1_FFFF) as u32;
            let flags = (word >> 40) as u16 & if word >> 56 == 1 { 7 } else { 3 };
            disk.describe(index, address, bytes, flags, (word >> 44) as u16 % 17);
        }
        let word = noise.next();
        disk.prepare((word & 15) as u32, word >> 52);
        disk.offer(word as u16 >> 8 & 15);
        disk.notify();
        let common = disk.address(disk.structures.common, noise.next() & 0x3C);
        if turn % 8 == 7 {
            memory::write32(common, noise.next() as u32);
        }
    }
    println!("abuse disk-storm: {resets} resets");
}

fn hypercall_storm(_: &Machine) {
    let mut noise = Noise(0x1357_9BDF_0246_8ACE);
    for turn in 0..2000_u64 {
        let number = if turn < 256 { turn } else { noise.next() };
        let (one, two, three) = (noise.next(), noise.next(), noise.next());
        // SAFETY: whatever the host makes of it, it must not write to this program's memory
        // unasked; exceptions are caught.
        unsafe {
            let _ = probe!("vmcall"; inout("rax") number => _, inout("rcx") one => _,
                inout("rdx") two => _, inout("rsi") three => _);
            let _ = probe!("vmmcall"; inout("rax") number => _, inout("rcx") one => _,
                inout("rdx") two => _, inout("rsi") three => _);
        }
    }
}

fn control_storm(_: &Machine) {
    const CR4_KEEP: u64 = 1 << 5; // PAE
    let mut noise = Noise(0xABCD_EF01_2345_6789);
    let cr4 = cpu::cr4();
    for bit in 0..64 {
        // SAFETY: one bit at a time that long mode does not stand on, and at once put back;
        // refusals are caught. (LA57 cannot change while paging is on.)
        unsafe {
            if CR4_KEEP & 1 << bit == 0 {
                let _ = probe!("mov cr4, {0}", "mov cr4, {1}"; in(reg) cr4 ^ 1 << bit, in(reg) cr4);
            }
            let _ = probe!("mov cr0, {0}", "mov cr0, {1}";
                in(reg) cpu::cr0() ^ (1 << bit & !0x8000_0001), in(reg) cpu::cr0());
            let _ = probe!("mov cr8, {0}"; in(reg) 1_u64 << bit);
            cpu::set_cr8(0);
            let _ = probe!("xsetbv"; in("ecx") noise.next() as u32 & 1, in("eax") 1 << (bit & 31),
                in("edx") noise.next() as u32);
            let _ = probe!("mov dr7, {0}"; in(reg) 1_u64 << bit & !0xFF);
            let _ = probe!("mov dr6, {0}"; in(reg) 1_u64 << bit);
            cpu::set_dr7(0x400);
        }
    }
}

/// The APIC timer with a period of one tick, interrupts on: this guest may get no further than
/// its handler, which ends that after a while.
fn timer_flood(machine: &Machine) {
    const ENOUGH: u32 = 5_000;
    fn stop_when_enough(frame: &mut Frame) {
        if count(STOP_VECTOR) == ENOUGH {
            apic::local().write(Register::InitialCount, 0);
        }
        end_at_apic(frame);
    }
    hook(STOP_VECTOR, stop_when_enough);
    let local = apic::local();
    local.write(Register::Timer, apic::PERIODIC | u32::from(STOP_VECTOR));
    local.write(Register::InitialCount, 1);
    cpu::sti();
    time::wait_ms(machine.tsc_hz, 10_000, || count(STOP_VECTOR) >= ENOUGH);
    cpu::cli();
    println!("abuse timer-flood: {} interrupts", count(STOP_VECTOR));
}

/// Reserved vectors, reserved delivery modes, processors that are not there.
fn bad_ipi(_: &Machine) {
    let local = apic::local();
    hook(vector::NMI, only_count);
    for low in 0..16 {
        local.command(apic::SELF_SHORTHAND | apic::ASSERT | low, 0);
    }
    for mode in [1, 2, 3, 4, 7] {
        local.command(apic::ASSERT | mode << 8 | 0x40, 0x55);
    }
    for (shorthand, mode) in [(2_u32, 3_u32), (3, 5), (3, 6)] {
        // To all but oneself: INIT, SIPI, and a reserved mode.
        local.command(3 << 18 | apic::ASSERT | mode << 8 | shorthand, 0);
    }
    local.write(Register::ErrorStatus, 0);
    println!(
        "abuse bad-ipi: error status {:#x}",
        local.read(Register::ErrorStatus)
    );
    interrupts::clear_hooks();
}

/// All processors send fixed interrupts and NMIs to all, by every kind of destination.
fn ipi_storm(machine: &Machine) {
    const TURNS: u64 = 2000;
    fn send(number: usize) {
        let mut noise = Noise(0x2468_ACE0_1357_9BDF ^ number as u64);
        for _ in 0..TURNS {
            let random = noise.next();
            let vector = 0x40 | random as u32 & 0x3F;
            let mode = if random & 0x100 == 0 {
                0
            } else {
                apic::DELIVER_NMI
            };
            let shorthand = (random >> 10 & 3) as u32;
            // Processors that are not there, and all at once, too.
            let destination = (random >> 16) as u32 & 0xFF;
            let logical = (random >> 24) as u32 & 1;
            let low = shorthand << 18 | logical << 11 | mode | vector | apic::ASSERT;
            // A shorthand NMI to oneself is not defined.
            if shorthand != 1 || mode == 0 {
                apic::local().command(low, destination);
            }
        }
    }
    for vector in 0x40..0x80 {
        hook(vector, end_at_apic);
    }
    hook(vector::NMI, only_count);
    let others = smp::others(machine).ok();
    if let Some(others) = &others {
        others.begin(send);
    }
    cpu::sti();
    send(0);
    cpu::cli();
    if others.is_some_and(|others| others.join().is_err()) {
        println!("abuse ipi-storm: not all came to an end");
    }
    cpu::take_interrupts();
}

/// The UART's line stays up while the handler does nothing but end the interrupt. On a PC, too, no
/// other instruction runs meanwhile, so the handler itself has to have enough some time.
fn level_storm(machine: &Machine) {
    const TIMES: u32 = 20_000;
    const TRANSMITTER_EMPTY: u8 = 1 << 1;
    fn set_uart_interrupts(enable: u8) {
        port::write8(console::COM1 + console::register::INTERRUPT_ENABLE, enable);
    }
    fn end(_: &mut Frame) {
        if count(STOP_VECTOR) >= TIMES {
            set_uart_interrupts(0);
        }
        apic::local().end_of_interrupt();
    }
    let Some(ioapic) = machine.ioapic else {
        return;
    };
    let madt = machine.acpi.and_then(|acpi| acpi.madt).unwrap_or_default();
    let (pin, _, _) = madt.isa_pin(4);
    hook(STOP_VECTOR, end);
    let flags = apic::LEVEL | u32::from(STOP_VECTOR);
    ioapic.route(pin, flags, apic::local().id());
    set_uart_interrupts(TRANSMITTER_EMPTY);
    cpu::take_interrupts();
    set_uart_interrupts(0);
    println!("abuse level-storm: {} interrupts", count(STOP_VECTOR));
}

/// APIC_BASE with any bits: over RAM, over the IOAPIC, beyond all memory, in every mode.
fn apic_base(machine: &Machine) {
    let mut noise = Noise(0x0101_7F7F_3C3C_A5A5);
    let before = cpu::rdmsr(cpu::msr::APIC_BASE);
    let places = [
        apic::LOCAL_APIC_ADDRESS,
        0,
        0xFEC0_0000,
        machine.scratch.unwrap_or(0),
        1 << (physical_bits().min(52) - 1),
        0xB_8000,
    ];
    for _ in 0..5000 {
        let random = noise.next();
        let place = places[(random >> 32) as usize % places.len()];
        // SAFETY: whatever the APIC is and wherever, nobody uses it; refusals are caught.
        let _ = unsafe { probe_wrmsr(cpu::msr::APIC_BASE, place | random & 0xFFF) };
        let mode = random & 0xC00;
        // SAFETY: as above.
        let _ = unsafe { probe_wrmsr(cpu::msr::APIC_BASE, place | 0x100 | mode) };
        let _ = probe_rdmsr(cpu::msr::X2APIC + (random >> 48) as u32 % 0x40);
        // SAFETY: device space; whoever answers, only reads happen.
        let _ = unsafe {
            probe!("mov {1:e}, [{0}]"; in(reg) apic::LOCAL_APIC_ADDRESS + 0x30, out(reg) _)
        };
    }
    for mode in [0, 0x800] {
        // SAFETY: back to where and how it was, by way of off.
        let _ = unsafe { probe_wrmsr(cpu::msr::APIC_BASE, before & !0xC00 | mode) };
    }
    if cpu::rdmsr(cpu::msr::APIC_BASE) != before {
        println!("abuse apic-base: the base does not come back");
    }
}

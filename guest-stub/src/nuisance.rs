//! Ways to take more than one's share, for ever: what a host's other guests must not notice.
//!
//! Each prints `nuisance NAME: begins` and does not end. What happens here is no misuse that ends a guest
//! ([`abuse`](crate::abuse) has those): each is something that an ordinary system does, too, now and then.

use core::arch::asm;
use core::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

use crate::apic::{self, Register};
use crate::cpu::{self, Leaf1Ecx, msr, port};
use crate::interrupts::{Frame, end_at_apic, hook};
use crate::machine::{Machine, PIC_VECTORS};
use crate::options::Value;
use crate::{console, load, memory, println, smp, time};

/// One way.
struct Nuisance {
    name: &'static str,
    run: fn(&Machine) -> !,
}

const NUISANCES: [Nuisance; 15] = [
    Nuisance {
        name: "spin",
        run: |_| {
            cpu::sti();
            spin()
        },
    },
    Nuisance {
        name: "spin-all",
        run: spin_all,
    },
    // Nor does it ever open a window for an interrupt.
    Nuisance {
        name: "deaf",
        run: |_| {
            cpu::cli();
            spin()
        },
    },
    Nuisance {
        name: "console",
        run: console_flood,
    },
    Nuisance {
        name: "exits",
        run: exits,
    },
    Nuisance {
        name: "strings",
        run: strings,
    },
    Nuisance {
        name: "timers",
        run: timers,
    },
    Nuisance {
        name: "deadlines",
        run: deadlines,
    },
    Nuisance {
        name: "naps",
        run: naps,
    },
    Nuisance {
        name: "late-naps",
        run: late_naps,
    },
    Nuisance {
        name: "short-jobs",
        run: short_jobs,
    },
    Nuisance {
        name: "ipis",
        run: ipis,
    },
    Nuisance {
        name: "wake-ups",
        run: wake_ups,
    },
    Nuisance {
        name: "pauses",
        run: pauses,
    },
    Nuisance {
        name: "locks",
        run: locks,
    },
];

const VECTOR: u8 = 0x73;

/// Is a nuisance in the way of this name, if there is one.
pub fn run(machine: &Machine, name: &Value) {
    let Some(found) = NUISANCES.iter().find(|known| known.name == name.as_str()) else {
        println!("stub: nuisance not known: {name}");
        return;
    };
    // Where there are several processors, all take part.
    let others = smp::others(machine).map_or(0, |others| others.count());
    println!("nuisance {name}: begins, on {} processors", others + 1);
    console::drain();
    (found.run)(machine)
}

fn spin() -> ! {
    loop {
        core::hint::black_box(());
    }
}

/// The same on all processors.
fn spin_all(machine: &Machine) -> ! {
    if let Ok(others) = smp::others(machine) {
        others.begin(|_| spin());
    }
    cpu::sti();
    spin()
}

fn console_flood(_: &Machine) -> ! {
    let mut number: u64 = 0;
    loop {
        println!("nuisance {number:08} {:-<60}", "");
        number += 1;
    }
}

/// Whatever exits: CPUID, ports of several devices, device memory, and addresses that nobody has.
fn exits(machine: &Machine) -> ! {
    let local = apic::local();
    loop {
        for _ in 0..16 {
            cpu::cpuid(0, 0);
            port::read8(console::COM1 + console::register::SCRATCH);
            port::write8(0x80, 0);
            time::pit_count();
            local.read(Register::CurrentCount);
            if let Some(ioapic) = machine.ioapic {
                ioapic.read(apic::IOAPIC_VERSION);
            }
            memory::read32(NOBODYS);
        }
    }
}

/// Writes to a port as fast as that goes.
fn strings(_: &Machine) -> ! {
    static BYTES: [u8; 4096] = [0; 4096];
    loop {
        // SAFETY: only reads those bytes. Port 80H is where a PC's firmware tells how far it is.
        unsafe {
            asm!("rep outsb", inout("rsi") BYTES.as_ptr() => _, inout("rcx") BYTES.len() => _,
                in("dx") 0x80_u16, options(readonly, nostack, preserves_flags));
        }
    }
}

/// No RAM and no device is there.
const NOBODYS: u64 = 0xFED8_0000;

/// Lets the PIT interrupt this processor as often as it can.
fn flood_by_pit(machine: &Machine) {
    let madt = machine.acpi.and_then(|acpi| acpi.madt).unwrap_or_default();
    if let Some(ioapic) = machine.ioapic {
        let (pin, _, _) = madt.isa_pin(0);
        hook(PIC_VECTORS, end_at_apic);
        ioapic.route(pin, PIC_VECTORS.into(), apic::local().id());
    }
    time::pit_periodic(2);
}

/// Timers that are always due, and a processor that never sleeps.
fn timers(machine: &Machine) -> ! {
    let local = apic::local();
    hook(VECTOR, end_at_apic);
    flood_by_pit(machine);
    local.write(Register::Timer, apic::PERIODIC | u32::from(VECTOR));
    local.write(Register::InitialCount, 1);
    cpu::sti();
    spin()
}

/// A deadline that has passed already, again and again.
fn deadlines(_: &Machine) -> ! {
    fn set(frame: &mut Frame) {
        end_at_apic(frame);
        again();
    }
    fn again() {
        // SAFETY: the mode is there, and all that happens is an interrupt with a hook.
        unsafe { cpu::wrmsr(msr::TSC_DEADLINE, cpu::tsc() - 1) };
    }
    hook(VECTOR, set);
    if cpu::leaf1_ecx().contains(Leaf1Ecx::TSC_DEADLINE) {
        apic::local().write(Register::Timer, apic::DEADLINE | u32::from(VECTOR));
        again();
    }
    cpu::sti();
    spin()
}

/// Sleeps all the time, and is woken at once.
fn naps(machine: &Machine) -> ! {
    let local = apic::local();
    hook(VECTOR, end_at_apic);
    flood_by_pit(machine);
    local.write(Register::Timer, VECTOR.into());
    loop {
        local.write(Register::InitialCount, 1);
        cpu::wait_for_interrupt();
    }
}

/// Runs for a time that is a little shorter than a slice, and sleeps for a moment: to come back as one that was idle.
fn late_naps(machine: &Machine) -> ! {
    const RUN_US: u64 = 1_900;
    let local = apic::local();
    hook(VECTOR, end_at_apic);
    local.write(Register::Timer, VECTOR.into());
    loop {
        load::run_us(machine.tsc_hz, RUN_US);
        local.write(Register::InitialCount, 1);
        cpu::wait_for_interrupt();
    }
}

/// Works for a moment, and sleeps for a shorter one.
fn short_jobs(machine: &Machine) -> ! {
    const RUN_US: u64 = 300;
    const SLEEP_US: u64 = 60;
    let alarm = load::Alarm::new(machine);
    loop {
        load::run_us(machine.tsc_hz, RUN_US);
        alarm.sleep_until(cpu::tsc() + machine.tsc_hz / 1_000_000 * SLEEP_US);
    }
}

/// Sends interrupts to all other processors, for ever.
fn send_to_others() -> ! {
    /// Shorthand: all but oneself.
    const OTHERS: u32 = 3 << 18;
    loop {
        apic::local().command(OTHERS | apic::ASSERT | u32::from(smp::HOOKED), 0);
    }
}

/// All processors send interrupts to all others.
fn ipis(machine: &Machine) -> ! {
    hook(smp::HOOKED, end_at_apic);
    if let Ok(others) = smp::others(machine) {
        others.begin(|_| send_to_others());
    }
    cpu::sti();
    send_to_others()
}

/// One processor wakes all others, which sleep again at once.
fn wake_ups(_: &Machine) -> ! {
    send_to_others()
}

/// All processors wait for a lock that nobody gives back.
fn pauses(machine: &Machine) -> ! {
    fn wait() -> ! {
        static LOCK: AtomicU64 = AtomicU64::new(1);
        while LOCK.load(Relaxed) != 0 {
            core::hint::spin_loop();
        }
        cpu::halt_forever()
    }
    if let Ok(others) = smp::others(machine) {
        others.begin(|_| wait());
    }
    wait()
}

/// All processors take a lock in turns, for most of their time, and tell how often they had it.
fn locks(machine: &Machine) -> ! {
    const TELL_MS: u64 = 200;
    static LOCK: AtomicBool = AtomicBool::new(false);
    static SECTIONS: AtomicU64 = AtomicU64::new(0);
    fn section() {
        while LOCK
            .compare_exchange_weak(false, true, Acquire, Relaxed)
            .is_err()
        {
            while LOCK.load(Relaxed) {
                core::hint::spin_loop();
            }
        }
        for turn in 0..500 {
            core::hint::black_box(turn);
        }
        SECTIONS.fetch_add(1, Relaxed);
        LOCK.store(false, Release);
        // Or nobody else would ever find it free.
        for turn in 0..100 {
            core::hint::black_box(turn);
        }
    }
    // The shortest of several, which nothing has interrupted.
    let tries = (0..100).map(|_| {
        let before = cpu::tsc();
        section();
        cpu::tsc() - before
    });
    let shortest = tries.min().unwrap_or_default();
    let ns = shortest * 1_000_000 / (machine.tsc_hz / 1000).max(1);
    if let Ok(others) = smp::others(machine) {
        others.begin(|_| {
            loop {
                section();
            }
        });
    }
    let interval = machine.tsc_hz / 1000 * TELL_MS;
    let mut tell_at = cpu::tsc() + interval;
    loop {
        section();
        if cpu::tsc() >= tell_at {
            tell_at += interval;
            println!(
                "nuisance locks: {} sections of {ns} ns",
                SECTIONS.load(Relaxed)
            );
        }
    }
}

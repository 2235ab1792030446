//! Measurements: TSC ticks of one operation each, as the guest sees it.
//!
//! One line per operation: `bench NAME iterations=N min=T median=T max=T`, or
//! `bench NAME skipped: why`. Ticks are those between two RDTSCs around the operation; `floor`
//! is the same with nothing in between and is not subtracted. On an emulator whose TSC counts
//! instructions these are instructions.

use core::arch::{asm, naked_asm};
use core::cell::UnsafeCell;
use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::apic::{self, Register};
use crate::cpu::{self, Leaf1Ecx, msr};
use crate::interrupts::{self, guarded};
use crate::machine::{Machine, SCRATCH_BYTES};
use crate::memory::{PAGE, read32, write64};
use crate::options::Options;
use crate::virtio::{self, Disk};
use crate::{print, println, probe, smp, time};

/// Most samples of one operation.
const CAPACITY: usize = 4096;
/// Samples when the command line does not say.
const DEFAULT_ITERATIONS: u64 = 1000;
/// Runs before the first sample, to warm caches and translations.
const WARM_UP: u64 = 16;

/// The samples of the operation that is being measured.
struct Samples(UnsafeCell<[u64; CAPACITY]>);

// SAFETY: the first processor alone; handlers do not touch it.
unsafe impl Sync for Samples {}

static SAMPLES: Samples = Samples(UnsafeCell::new([0; CAPACITY]));

/// RDTSC without a fence: what is measured leaves the guest anyway, and every instruction counts.
#[inline(always)]
fn now() -> u64 {
    let (low, high): (u64, u64);
    // SAFETY: only reads. Not `nomem`, so that memory accesses stay where they are.
    unsafe { asm!("rdtsc", out("rax") low, out("rdx") high, options(nostack, preserves_flags)) };
    high << 32 | low
}

/// What an operation is measured with.
struct Bench<'machine> {
    machine: &'machine Machine,
    iterations: u64,
    mmio: Option<u64>,
    /// The only operations wanted, separated by commas; empty is all.
    only: &'machine str,
}

impl Bench<'_> {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.split(',').any(|only| only == name)
    }

    /// Measures an operation by the time between before and after.
    #[inline(always)]
    fn measure(&self, name: &str, mut operation: impl FnMut()) {
        self.sample(name, self.iterations, || {
            let before = now();
            operation();
            now().wrapping_sub(before)
        });
    }

    /// Takes samples that the operation measures itself, and prints the line.
    #[inline(always)]
    fn sample(&self, name: &str, iterations: u64, mut operation: impl FnMut() -> u64) {
        if !self.wants(name) {
            return;
        }
        print!("bench {name} ");
        crate::console::drain();
        let count = iterations.min(CAPACITY as u64) as usize;
        let outcome = guarded(|| {
            for _ in 0..WARM_UP {
                operation();
            }
            // SAFETY: nothing else uses the samples meanwhile (one processor).
            let samples = unsafe { &mut *SAMPLES.0.get() };
            let samples = &mut samples[..count];
            for sample in samples.iter_mut() {
                *sample = operation();
            }
            samples.sort_unstable();
            if let (Some(min), Some(median), Some(max)) =
                (samples.first(), samples.get(count / 2), samples.last())
            {
                println!("iterations={count} min={min} median={median} max={max}");
            }
        });
        cpu::cli();
        if let Err(trap) = outcome {
            println!("skipped: {trap}");
        }
    }
}

/// Measures all operations, or the one that is wanted. `tsc_at_entry` was read when the program began.
pub fn run(machine: &Machine, options: &Options, tsc_at_entry: u64) {
    let bench = Bench {
        machine,
        iterations: options.iterations.unwrap_or(DEFAULT_ITERATIONS),
        mmio: options.mmio.or_else(|| configuration_space(machine)),
        only: options.only.as_str(),
    };
    println!("bench tsc-at-entry {tsc_at_entry}");
    if options.wait_for_key {
        println!("bench: press a key");
        while crate::console::try_receive().is_none() {
            core::hint::spin_loop();
        }
    }
    println!("bench tsc-khz {}", machine.tsc_hz / 1000);
    bench.measure("floor", || {});
    processor(&bench);
    ports(&bench);
    memory_mapped(&bench);
    self_ipi(&bench);
    halt_to_timer(&bench);
    fresh_pages(&bench);
    disk_request(&bench);
    two_processors(&bench);
    println!("bench: done");
}

/// The host bridge's identity in memory-mapped PCI configuration space: read-only, emulated.
fn configuration_space(machine: &Machine) -> Option<u64> {
    let table = machine.acpi?.table(b"MCFG")?;
    Some(read32(table.address + 44).into())
}

fn processor(bench: &Bench) {
    bench.measure("cpuid", || {
        // SAFETY: RBX is put back.
        unsafe {
            asm!("mov rsi, rbx", "cpuid", "mov rbx, rsi", inout("eax") 0 => _, inout("ecx") 0 => _,
                out("edx") _, out("rsi") _, options(nostack));
        }
    });
    hypercall(bench);
    bench.measure("rdmsr", || {
        // SAFETY: reading changes nothing.
        unsafe {
            asm!("rdmsr", in("ecx") msr::APIC_BASE, out("eax") _, out("edx") _, options(nostack))
        };
    });
    let base = cpu::rdmsr(msr::APIC_BASE);
    let (low, high) = (base as u32, (base >> 32) as u32);
    bench.measure("wrmsr", || {
        // SAFETY: its own value.
        unsafe {
            asm!("wrmsr", in("ecx") msr::APIC_BASE, in("eax") low, in("edx") high, options(nostack))
        };
    });
    // SAFETY: caches are written back, nothing else.
    bench.measure("wbinvd", || unsafe { asm!("wbinvd", options(nostack)) });
    bench.measure("cr8-write", || {
        // SAFETY: its own value.
        unsafe { cpu::set_cr8(0) };
    });
    bench.measure("cr3-write", || {
        // SAFETY: its own value.
        unsafe { cpu::set_cr3(cpu::cr3()) };
    });
}

/// The hypercall instruction of the vendor, with a KVM call that does nothing
/// (`KVM_HC_VAPIC_POLL_IRQ`).
fn hypercall(bench: &Bench) {
    const POLL: u64 = 1;
    let amd = matches!(&cpu::vendor(), b"AuthenticAMD" | b"HygonGenuine");
    // SAFETY: a call without effect; on a bare machine #UD, which is caught.
    let trap = unsafe {
        if amd {
            probe!("vmmcall"; inout("rax") POLL => _)
        } else {
            probe!("vmcall"; inout("rax") POLL => _)
        }
    };
    if let Some(trap) = trap {
        println!("bench hypercall skipped: exception {}", trap.vector);
    } else if amd {
        // SAFETY: as above.
        bench.measure("hypercall", || unsafe {
            asm!("vmmcall", inout("rax") POLL => _)
        });
    } else {
        // SAFETY: as above.
        bench.measure("hypercall", || unsafe {
            asm!("vmcall", inout("rax") POLL => _)
        });
    }
}

macro_rules! port_read {
    ($bench:expr, $name:literal, $port:expr) => {
        $bench.measure($name, || {
            // SAFETY: see `cpu::port`; reading these has no effect that matters here.
            unsafe { asm!("in al, dx", in("dx") $port, out("al") _, options(nostack)) };
        });
    };
}

macro_rules! port_write {
    ($bench:expr, $name:literal, $port:expr, $value:expr) => {
        $bench.measure($name, || {
            // SAFETY: see `cpu::port`; the values leave the devices at rest.
            unsafe { asm!("out dx, al", in("dx") $port, in("al") $value, options(nostack)) };
        });
    };
}

fn ports(bench: &Bench) {
    const ALL_MASKED: u8 = 0xFF;
    const LATCH_CHANNEL_0: u8 = 0;
    port_read!(bench, "pic-in", 0x21_u16);
    port_write!(bench, "pic-out", 0x21_u16, ALL_MASKED);
    port_read!(bench, "pit-in", 0x40_u16);
    port_write!(bench, "pit-out", 0x43_u16, LATCH_CHANNEL_0);
    port_read!(bench, "unclaimed-in", 0x100_u16);
    port_write!(bench, "unclaimed-out", 0x100_u16, 0_u8);
    port_read!(bench, "uart-in", 0x3FF_u16);
    if let Some(timer) = bench
        .machine
        .acpi
        .and_then(|acpi| acpi.fadt)
        .and_then(|fadt| fadt.timer())
    {
        bench.measure("pm-timer-in", || {
            // SAFETY: reading the timer has no effect.
            unsafe { asm!("in eax, dx", in("dx") timer.port, out("eax") _, options(nostack)) };
        });
    }
}

fn read_register(bench: &Bench, name: &str, register: *const u32) {
    bench.measure(name, || {
        // SAFETY: a device register that reading does not change.
        unsafe { asm!("mov {:e}, [{}]", out(reg) _, in(reg) register, options(nostack)) };
    });
}

fn memory_mapped(bench: &Bench) {
    let local = apic::local();
    read_register(bench, "lapic-read", local.address(Register::Version));
    let priority = local.address(Register::InitialCount);
    bench.measure("lapic-write", || {
        // SAFETY: stops a timer that is stopped.
        unsafe { asm!("mov dword ptr [{}], 0", in(reg) priority, options(nostack)) };
    });
    if let Some(ioapic) = bench.machine.ioapic {
        read_register(bench, "ioapic-read", ioapic.window());
    }
    match bench.mmio {
        Some(address) => {
            let register = ptr::with_exposed_provenance_mut::<u32>(address as usize);
            read_register(bench, "mmio-read", register);
            bench.measure("mmio-write", || {
                // SAFETY: the command line, or the MCFG, names a device register that may be
                // written.
                unsafe { asm!("mov dword ptr [{}], 0", in(reg) register, options(nostack)) };
            });
        }
        None => {
            for name in ["mmio-read", "mmio-write"] {
                println!("bench {name} skipped: no mmio= and no MCFG");
            }
        }
    }
}

const BENCH_VECTOR: u8 = 0x71;
/// The TSC when the handler began.
static HANDLED: AtomicU64 = AtomicU64::new(0);
/// Address to which the handler writes its end of interrupt, 0 for the MSR.
static END_REGISTER: AtomicU64 = AtomicU64::new(0);

/// Notes the TSC with as few instructions as can be, and ends the interrupt.
#[unsafe(naked)]
extern "C" fn note_time() {
    naked_asm!(
        "push rax",
        "push rdx",
        "rdtsc",
        "shl rdx, 32",
        "or rax, rdx",
        "mov [rip + {handled}], rax",
        "mov rdx, [rip + {end}]",
        "test rdx, rdx",
        "jz 2f",
        "mov dword ptr [rdx], 0",
        "jmp 3f",
        "2:",
        "push rcx",
        "mov ecx, {end_msr}",
        "xor eax, eax",
        "wrmsr",
        "pop rcx",
        "3:",
        "pop rdx",
        "pop rax",
        "iretq",
        handled = sym HANDLED,
        end = sym END_REGISTER,
        end_msr = const msr::X2APIC + 0x0B,
    )
}

/// Ticks from just before the interrupt is sent to the handler's first instructions.
fn self_ipi(bench: &Bench) {
    interrupts::set_raw_handler(BENCH_VECTOR, note_time);
    let command = apic::local().address(Register::Command);
    let end = apic::local().address(Register::EndOfInterrupt);
    END_REGISTER.store(end as u64, Relaxed);
    bench.sample("self-ipi-xapic", bench.iterations, || {
        HANDLED.store(0, Relaxed);
        cpu::sti();
        let before = now();
        // SAFETY: the vector has a handler.
        unsafe {
            asm!("mov dword ptr [{}], {}", in(reg) command,
                const apic::SELF_SHORTHAND | apic::ASSERT | BENCH_VECTOR as u32);
        }
        wait_until_handled();
        HANDLED.load(Relaxed).wrapping_sub(before)
    });
    if bench.machine.x2apic() {
        apic::local().enter_x2apic();
        apic::local().quiet();
        END_REGISTER.store(0, Relaxed);
        bench.sample("self-ipi", bench.iterations, || {
            HANDLED.store(0, Relaxed);
            cpu::sti();
            let before = now();
            // SAFETY: the vector has a handler.
            unsafe {
                asm!("wrmsr", in("ecx") msr::X2APIC + 0x3F, in("eax") u32::from(BENCH_VECTOR),
                    in("edx") 0);
            }
            wait_until_handled();
            HANDLED.load(Relaxed).wrapping_sub(before)
        });
        apic::local().enter_xapic();
        apic::local().quiet();
    } else {
        println!("bench self-ipi skipped: no x2APIC");
    }
    interrupts::restore_handler(BENCH_VECTOR);
}

fn wait_until_handled() {
    while HANDLED.load(Relaxed) == 0 {
        core::hint::spin_loop();
    }
    cpu::cli();
}

/// Ticks from the expiry of the APIC timer, during HLT, to the handler's first instructions.
fn halt_to_timer(bench: &Bench) {
    const ITERATIONS: u64 = 100;
    /// Ticks of the APIC timer until it expires.
    const COUNT: u32 = 200_000;
    interrupts::set_raw_handler(BENCH_VECTOR, note_time);
    let local = apic::local();
    END_REGISTER.store(local.address(Register::EndOfInterrupt) as u64, Relaxed);
    let iterations = bench.iterations.min(ITERATIONS);
    let wait = || {
        while HANDLED.load(Relaxed) == 0 {
            cpu::wait_for_interrupt();
        }
        HANDLED.load(Relaxed)
    };
    if cpu::leaf1_ecx().contains(Leaf1Ecx::TSC_DEADLINE) {
        local.write(Register::Timer, apic::DEADLINE | u32::from(BENCH_VECTOR));
        bench.sample("hlt-timer", iterations, || {
            HANDLED.store(0, Relaxed);
            let deadline = now() + u64::from(COUNT);
            // SAFETY: the vector has a handler.
            unsafe { cpu::wrmsr(msr::TSC_DEADLINE, deadline) };
            wait().wrapping_sub(deadline)
        });
    } else {
        local.write(Register::Timer, apic::MASKED);
        local.write(Register::InitialCount, u32::MAX);
        let (start, start_tsc) = (local.read(Register::CurrentCount), now());
        time::spin_us(bench.machine.tsc_hz, 20_000);
        let (end, end_tsc) = (local.read(Register::CurrentCount), now());
        let count_ticks = u64::from(start.saturating_sub(end)).max(1);
        let length = (end_tsc - start_tsc) * u64::from(COUNT) / count_ticks;
        local.write(Register::InitialCount, 0);
        local.write(Register::Timer, BENCH_VECTOR.into());
        bench.sample("hlt-timer", iterations, || {
            HANDLED.store(0, Relaxed);
            let before = now();
            local.write(Register::InitialCount, COUNT);
            wait().saturating_sub(before + length)
        });
    }
    local.quiet();
    interrupts::restore_handler(BENCH_VECTOR);
}

/// Ticks from the notification that a sector is wanted of a virtio disk to its interrupt's handler.
fn disk_request(bench: &Bench) {
    const NAME: &str = "virtio-kick";
    const QUEUE_VECTOR: u16 = 1;
    const SECTOR_BYTES: u32 = 512;
    if !bench.wants(NAME) {
        return;
    }
    let Some(mut disk) = bench.machine.scratch.and_then(Disk::find) else {
        println!("bench {NAME} skipped: no virtio disk");
        return;
    };
    disk.set_msix(true, false);
    if !disk.start(QUEUE_VECTOR) {
        println!("bench {NAME} skipped: the disk does not start");
        return;
    }
    // Now its BARs decode.
    disk.set_vector(QUEUE_VECTOR, BENCH_VECTOR, apic::local().id());
    interrupts::set_raw_handler(BENCH_VECTOR, note_time);
    let end = apic::local().address(Register::EndOfInterrupt);
    END_REGISTER.store(end as u64, Relaxed);
    let bell = ptr::with_exposed_provenance_mut::<u16>(disk.notify_address() as usize);
    bench.sample(NAME, bench.iterations, || {
        HANDLED.store(0, Relaxed);
        disk.queue(virtio::READ, 0, SECTOR_BYTES);
        cpu::sti();
        let before = now();
        // SAFETY: the device's notification register; it writes to the queue's memory only.
        unsafe { bell.write_volatile(0) };
        wait_until_handled();
        HANDLED.load(Relaxed).wrapping_sub(before)
    });
    interrupts::restore_handler(BENCH_VECTOR);
}

/// The TSC when another processor's handler had been woken.
static WOKEN: AtomicU64 = AtomicU64::new(0);
/// APIC id of this processor, which the other answers.
static SENDER: AtomicU64 = AtomicU64::new(0);

/// Another processor's answer to [`smp::HOOKED`].
fn answer(_: usize) {
    WOKEN.store(now(), Relaxed);
    let command = apic::ASSERT | u32::from(BENCH_VECTOR);
    apic::local().command(command, SENDER.load(Relaxed) as u32);
}

/// An IPI to a processor in HLT, of which this one then waits for an answer in HLT: ticks to the
/// other's handler from before the IPI, and from before this processor's HLT, which on a single physical
/// processor is what it takes to put one virtual processor in the place of another.
fn two_processors(bench: &Bench) {
    const ITERATIONS: u64 = 200;
    const NAMES: [&str; 2] = ["vcpu-wake", "vcpu-switch"];
    if !NAMES.iter().any(|name| bench.wants(name)) {
        return;
    }
    let skip = |why: &str| {
        for name in NAMES {
            println!("bench {name} skipped: {why}");
        }
    };
    if !bench.machine.x2apic() {
        return skip("no x2APIC");
    }
    let others = match smp::others(bench.machine) {
        Ok(others) => others,
        Err(why) => return skip(why.text().as_str()),
    };
    let Some(other) = others.numbers().next() else {
        return skip("one processor");
    };
    if let Err(why) = others.switch_apics(true) {
        return skip(why.text().as_str());
    }
    SENDER.store(others.first as u64, Relaxed);
    END_REGISTER.store(0, Relaxed);
    interrupts::set_raw_handler(BENCH_VECTOR, note_time);
    smp::set_hook(answer);
    let send = || {
        WOKEN.store(0, Relaxed);
        let command = apic::ASSERT | u32::from(smp::HOOKED);
        let before = now();
        apic::local().command(command, other as u32);
        before
    };
    let wait = || {
        while WOKEN.load(Relaxed) == 0 {
            cpu::wait_for_interrupt();
        }
        WOKEN.load(Relaxed)
    };
    let iterations = bench.iterations.min(ITERATIONS);
    bench.sample(NAMES[0], iterations, || {
        let before = send();
        wait().saturating_sub(before)
    });
    bench.sample(NAMES[1], iterations, || {
        send();
        let before = now();
        wait().saturating_sub(before)
    });
    interrupts::restore_handler(BENCH_VECTOR);
    if let Err(why) = others.switch_apics(false) {
        println!("bench: {}", why.text().as_str());
    }
}

/// First writes to pages of RAM that nobody has touched.
fn fresh_pages(bench: &Bench) {
    /// Loaders and firmware use what is below.
    const FROM: u64 = 32 << 20;
    let scratch = bench.machine.scratch.unwrap_or(0);
    let limit = bench.machine.mapped_end;
    let Some((start, end)) = bench
        .machine
        .handoff
        .map
        .free_ranges()
        .map(|(start, end)| (start.max(FROM), end.min(limit).min(scratch.max(FROM))))
        .filter(|(start, end)| start < end)
        .max_by_key(|(start, end)| end - start)
    else {
        println!("bench fault-4k skipped: less than 32 MiB of RAM");
        return;
    };
    let end = end.saturating_sub(SCRATCH_BYTES);
    let iterations = bench
        .iterations
        .min((end.saturating_sub(start) / PAGE).saturating_sub(WARM_UP));
    let mut pages = (start..end).step_by(PAGE as usize);
    bench.sample("fault-4k", iterations, || {
        let page = pages.next().unwrap_or(start);
        let before = now();
        write64(page, 1);
        now().wrapping_sub(before)
    });
}

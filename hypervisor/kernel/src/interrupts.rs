//! Host interrupts: controllers, vectors, the timer, kicks between processors.
//!
//! The host runs with interrupts off. They come in only in [`window`], between guest entries, in
//! [`idle`], and during the long work of [`open`]. Handlers set a flag and return; the processor's loop does the work.

use alloc::vec::Vec;
use core::{
    arch::asm,
    sync::atomic::{AtomicU64, Ordering},
};

use drivers::{
    apic::{self, LocalApic},
    firmware::Firmware,
    ioapic::{IoApic, silence_pics},
};
use manage::trace::Kind;
use mem::Hpa;
use spin::Once;

use crate::{
    console, control, cpu, fault,
    idt::TrapFrame,
    info, memory, operator,
    percpu::{self, PerCpu},
    sync::Lock,
    time, trace, warn,
};

/// Vectors of the host's interrupts.
pub mod vector {
    /// First vector after the exceptions.
    pub const FIRST: u8 = 32;
    /// The serial port.
    pub const SERIAL: u8 = 0x40;
    /// The second serial port, where programs are.
    pub const CONTROL: u8 = 0x41;
    /// The keyboard.
    pub const KEYBOARD: u8 = 0x42;
    /// The local APIC's timer.
    pub const TIMER: u8 = 0xe0;
    /// A kick from another processor.
    pub const KICK: u8 = 0xe1;
    /// Spurious interrupts of the local APIC.
    pub const SPURIOUS: u8 = 0xff;
}

static APIC: Once<LocalApic> = Once::new();
static IO_APICS: Lock<Vec<IoApic>> = Lock::new(Vec::new());
/// APIC-timer ticks per TSC tick, in units of 2^-32; 0 with TSC-deadline mode.
static TIMER_RATIO: AtomicU64 = AtomicU64::new(0);

/// The local APIC of the calling processor.
pub fn apic() -> LocalApic {
    *APIC.get().expect("interrupts::init comes first")
}

/// Whether processors have x2APIC mode.
fn has_x2apic() -> bool {
    cpu::cpuid()
        .get_feature_info()
        .is_some_and(|f| f.has_x2apic())
}

fn has_deadline_timer() -> bool {
    cpu::cpuid()
        .get_feature_info()
        .is_some_and(|f| f.has_tsc_deadline())
}

/// Sets the controllers up: PICs silent, local APIC of this processor on, all I/O APIC lines masked.
pub fn init(firmware: &Firmware) {
    // SAFETY: the kernel owns the PICs; where there are none their ports are unused.
    unsafe { silence_pics() };
    let apic = if has_x2apic() {
        // SAFETY: this processor has it, and all processors of a machine are alike in this; the kernel owns the APICs.
        unsafe { LocalApic::x2apic() }
    } else {
        let registers = memory::map_device(Hpa(apic::base_address()), mem::PAGE_SIZE);
        // SAFETY: just mapped, uncached, for ever; the kernel owns the APICs.
        unsafe { LocalApic::xapic(registers.cast()) }
    };
    APIC.call_once(|| apic);
    apic.enable(vector::SPURIOUS);
    let mut io_apics = IO_APICS.lock();
    for info in &firmware.io_apics {
        let registers = memory::map_device(Hpa(u64::from(info.address)), mem::PAGE_SIZE);
        // SAFETY: the firmware names an I/O APIC there; just mapped, uncached, for ever; the kernel owns it.
        io_apics.push(unsafe { IoApic::new(registers.cast(), info.first_gsi) });
    }
    info!(
        "local APIC in {} mode, {} I/O APIC(s) with {} lines",
        if apic.is_x2apic() { "x2APIC" } else { "xAPIC" },
        io_apics.len(),
        io_apics.iter().map(IoApic::lines).sum::<u32>()
    );
}

/// Lets ISA interrupt `irq` raise `vector` on the calling processor. `false`: no I/O APIC has that line.
pub fn route_isa(firmware: &Firmware, irq: u8, vector: u8) -> bool {
    let wiring = firmware.isa_interrupt(irq);
    // Without interrupt remapping an I/O APIC reaches APIC IDs below 255 only.
    let Ok(apic_id) = u8::try_from(apic().id()) else {
        return false;
    };
    IO_APICS
        .lock()
        .iter_mut()
        .any(|io_apic| io_apic.route(wiring.gsi, vector, apic_id, wiring.polarity, wiring.trigger))
}

/// Tells how fast the APIC timer runs, in ticks per second; after `time::set_hz`. Once.
pub fn set_timer_hz(apic_timer_hz: u64) {
    if has_deadline_timer() || time::hz() == 0 {
        return;
    }
    TIMER_RATIO.store(
        ((u128::from(apic_timer_hz) << 32) / u128::from(time::hz())) as u64,
        Ordering::Relaxed,
    );
}

/// Prepares the calling processor's timer.
pub fn init_timer() {
    if has_deadline_timer() {
        // SAFETY: the processor has the mode.
        unsafe { apic().use_deadline_timer(vector::TIMER) };
    } else {
        apic().use_one_shot_timer(vector::TIMER);
    }
}

/// Arms the calling processor's timer for `tsc`: soon after, `timer_due` is set. It may come early: when the moment is
/// further away than the timer can count, and when it was armed for an earlier one. That is left as it is, since
/// to write to the timer costs much, and most who put others in their place do so before their time is over.
#[inline]
pub fn arm_timer(tsc: u64) {
    let armed = &percpu::current().timer_armed;
    let tsc = tsc.max(1);
    // Nobody else writes to it, but for this processor's interrupt, and interrupts are off.
    let before = armed.load(Ordering::Relaxed);
    if before == 0 || before > tsc {
        armed.store(tsc, Ordering::Relaxed);
        write_timer(tsc);
    }
}

/// Has the calling processor's timer interrupt at this TSC.
fn write_timer(tsc: u64) {
    /// In TSC ticks, minutes: no timer counts further, and a product of it stays small.
    const FURTHEST: u64 = 1 << 40;
    match TIMER_RATIO.load(Ordering::Relaxed) {
        // SAFETY: a ratio of 0 means that the processors have deadline mode, and `init_timer` chose it.
        0 => unsafe { apic().set_deadline(tsc) },
        ratio => {
            let delta = tsc.saturating_sub(time::now_tsc()).min(FURTHEST);
            let ticks = ((u128::from(delta) * u128::from(ratio)) >> 32) as u64;
            apic().start_timer(ticks.clamp(1, u64::from(u32::MAX)) as u32);
        }
    }
}

/// Stops the calling processor's timer.
pub fn disarm_timer() {
    let cpu = percpu::current();
    if cpu.timer_armed.swap(0, Ordering::Relaxed) == 0 {
        return;
    }
    match TIMER_RATIO.load(Ordering::Relaxed) {
        // SAFETY: as in `arm_timer`.
        0 => unsafe { apic().set_deadline(0) },
        _ => apic().start_timer(0),
    }
}

/// Makes processor `cpu` look up: it leaves its guest or its halt, with `kicked` set.
pub fn kick(cpu: &PerCpu) {
    apic().send_interrupt(cpu.apic_id, vector::KICK);
}

/// Lets pending interrupts in, and returns with interrupts off.
pub fn window() {
    // SAFETY: the handlers only set flags. STI takes effect after the next instruction, hence the NOP.
    unsafe { asm!("sti", "nop", "cli", options(nostack)) };
}

/// Does long work with interrupts on, so that what arrives meanwhile is not lost. The work may be done on
/// one processor at any time, and takes no lock that an interrupt handler takes other than a
/// [`Lock`](crate::sync::Lock).
pub fn open<R>(work: impl FnOnce() -> R) -> R {
    x86_64::instructions::interrupts::enable();
    let result = work();
    x86_64::instructions::interrupts::disable();
    result
}

/// Halts until an interrupt has come, and returns with interrupts off. An interrupt that is already
/// pending ends it at once; the caller checks its flags with interrupts off before.
pub fn idle() {
    // SAFETY: as in `window`; nothing can come between STI and HLT.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// Where every vector arrives.
pub extern "C" fn dispatch(frame: &mut TrapFrame) {
    match frame.vector as u8 {
        fault::NMI => fault::on_nmi(),
        fault::DEBUG if fault::resume_from_stray_breakpoint(frame) => {}
        exception if exception < vector::FIRST => fault::on_exception(frame),
        vector::TIMER => {
            let cpu = percpu::current();
            cpu.timer_armed.store(0, Ordering::Relaxed);
            cpu.timer_due.store(true, Ordering::Relaxed);
            if trace::is_on() {
                trace::record(Kind::Timer, (0, 0), 0, 0);
            }
            apic().eoi();
        }
        vector::KICK => {
            percpu::current().kicked.store(true, Ordering::Relaxed);
            apic().eoi();
        }
        vector::SERIAL => {
            console::on_interrupt();
            apic().eoi();
        }
        vector::KEYBOARD => {
            operator::on_key();
            apic().eoi();
        }
        vector::CONTROL => {
            control::on_interrupt();
            apic().eoi();
        }
        // Spurious interrupts are not in service.
        vector::SPURIOUS => {}
        other => {
            let unexpected = &percpu::current().unexpected;
            if unexpected.fetch_add(1, Ordering::Relaxed) == 0 {
                warn!("unexpected interrupt on vector {other:#x}");
            }
            apic().eoi();
        }
    }
}

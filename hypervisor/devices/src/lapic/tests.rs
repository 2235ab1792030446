//! Tests of the local APIC: what Linux does to it, and what it must never do.

use alloc::sync::Arc;
use alloc::vec::Vec;

use mem::Width;
use proptest::prelude::*;
use spin::Mutex;

use super::*;
use crate::VcpuId;
use crate::bus::IoError;
use crate::line::{InterruptSink, Line};
use crate::testing::{FakeClock, RecordingSink};

const HZ: u64 = 2_000_000_000;

#[derive(Default)]
struct Kicks(Mutex<Vec<u32>>);

impl Kicks {
    fn take(&self) -> Vec<u32> {
        core::mem::take(&mut self.0.lock())
    }
}

impl VcpuKick for Kicks {
    fn kick(&self, vcpu: VcpuId) {
        self.0.lock().push(vcpu.0);
    }
}

struct Machine {
    clock: Arc<FakeClock>,
    kicks: Arc<Kicks>,
    bus: Arc<ApicBus>,
    cpus: Vec<LocalApic>,
}

fn machine(ids: &[u32]) -> Machine {
    let clock = FakeClock::new(HZ);
    let kicks = Arc::new(Kicks::default());
    let bus = ApicBus::new(ids, kicks.clone());
    let cpus = (0u32..)
        .zip(ids)
        .map(|(index, &id)| {
            LocalApic::new(
                VcpuId(index),
                LocalApicConfig::new(id),
                bus.clone(),
                clock.clone(),
            )
            .unwrap()
        })
        .collect();
    Machine {
        clock,
        kicks,
        bus,
        cpus,
    }
}

impl Machine {
    fn write(&mut self, cpu: usize, offset: u64, value: u32) {
        let effect = self.cpus[cpu].write_mmio(offset, Width::Dword, value);
        assert_eq!(effect, Ok(ApicEffect::None));
    }

    fn read(&mut self, cpu: usize, offset: u64) -> u32 {
        self.cpus[cpu].read_mmio(offset, Width::Dword).unwrap()
    }

    /// Software-enables every APIC and gives flat logical IDs 1, 2, 4, ..
    fn enable_all(&mut self) {
        for cpu in 0..self.cpus.len() {
            self.write(cpu, 0xf0, 0x1ff);
            self.write(cpu, 0xd0, 1 << (24 + cpu % 8));
        }
    }

    fn enable_x2apic(&mut self) {
        for cpu in &mut self.cpus {
            let base = cpu.base().with_x2apic(true);
            assert_eq!(
                cpu.write_msr(MSR_APIC_BASE, base.into_bits()),
                Ok(ApicEffect::BaseChanged)
            );
            assert_eq!(cpu.write_msr(0x80f, 0x1ff), Ok(ApicEffect::None));
        }
    }

    /// Which vCPUs have `vector` to inject, consuming it.
    fn who_got(&mut self, vector: u8) -> Vec<usize> {
        let mut who = Vec::new();
        for (index, cpu) in self.cpus.iter_mut().enumerate() {
            if cpu.interrupt() == Some(vector) {
                cpu.accept(vector);
                let _ = cpu.eoi();
                who.push(index);
            }
        }
        who
    }
}

#[test]
fn registers_after_reset() {
    let mut m = machine(&[0, 1]);
    assert_eq!(m.cpus[0].base().into_bits(), 0xfee0_0900);
    assert_eq!(m.cpus[1].base().into_bits(), 0xfee0_0800);
    assert_eq!(m.read(1, 0x20), 1 << 24);
    assert_eq!(m.read(0, 0x30), 0x0105_0014);
    assert_eq!(m.read(0, 0xf0), 0xff);
    assert_eq!(m.read(0, 0xe0), 0xffff_ffff);
    for lvt in [0x320, 0x330, 0x340, 0x350, 0x360, 0x370] {
        assert_eq!(m.read(0, lvt), 0x1_0000);
    }
    assert_eq!(m.read(0, 0x390), 0);
    assert_eq!(m.cpus[0].deadline(), None);
}

#[test]
fn priorities_nest_and_eoi_ends_the_highest() {
    let mut m = machine(&[0]);
    m.enable_all();
    let cpu = |m: &mut Machine| m.cpus[0].interrupt();
    for vector in [0x31u32, 0x51, 0x55] {
        m.write(0, 0x300, 1 << 18 | vector);
    }
    assert_eq!(cpu(&mut m), Some(0x55));
    m.cpus[0].accept(0x55);
    // 0x51 is in the same class and waits.
    assert_eq!(cpu(&mut m), None);
    assert_eq!(m.read(0, 0xa0), 0x50);
    m.write(0, 0xb0, 0);
    assert_eq!(cpu(&mut m), Some(0x51));
    // A task priority of the same class holds it back, a lower one does not.
    m.write(0, 0x80, 0x50);
    assert_eq!(cpu(&mut m), None);
    assert_eq!(m.cpus[0].cr8(), 5);
    m.cpus[0].set_cr8(4).unwrap();
    assert_eq!(cpu(&mut m), Some(0x51));
    assert_eq!(m.cpus[0].set_cr8(16), Err(MsrFault));
    assert_eq!(m.read(0, 0x220), 1 << 17, "0x31 is still requested");
    assert_eq!(m.kicks.take(), [0u32; 0], "no kick for a self-IPI");
}

#[test]
fn level_interrupts_broadcast_their_eoi_unless_suppressed() {
    let mut m = machine(&[0]);
    m.enable_all();
    let message = Message {
        destination: Destination::Physical(0),
        mode: DeliveryMode::Fixed,
        vector: 0x41,
        trigger: Trigger::Level,
        assert: true,
    };
    for (svr, effect) in [
        (0x1ff, ApicEffect::EoiBroadcast(0x41)),
        (0x11ff, ApicEffect::None),
    ] {
        m.write(0, 0xf0, svr);
        m.bus.deliver(&message);
        assert_eq!(m.kicks.take(), [0]);
        assert_eq!(m.cpus[0].interrupt(), Some(0x41));
        m.cpus[0].accept(0x41);
        assert_eq!(m.read(0, 0x1a0), 1 << 1);
        assert_eq!(m.cpus[0].write_mmio(0xb0, Width::Dword, 0), Ok(effect));
    }
    // The next edge-triggered use of the vector ends quietly.
    m.write(0, 0xf0, 0x1ff);
    m.write(0, 0x300, 1 << 18 | 0x41);
    assert_eq!(m.cpus[0].interrupt(), Some(0x41));
    m.cpus[0].accept(0x41);
    assert_eq!(m.cpus[0].eoi(), ApicEffect::None);
    assert_eq!(m.cpus[0].eoi(), ApicEffect::None, "EOI without service");
}

#[test]
fn xapic_destinations() {
    let mut m = machine(&[0, 1, 2, 3]);
    m.enable_all();
    let mut send = |high: u32, low: u32| {
        m.write(0, 0x310, high);
        m.write(0, 0x300, low);
        let kicks = m.kicks.take();
        let who = m.who_got(0x60);
        let kicked: Vec<usize> = who.iter().copied().filter(|&c| c != 0).collect();
        assert_eq!(
            kicks.iter().map(|&k| k as usize).collect::<Vec<_>>(),
            kicked
        );
        who
    };
    assert_eq!(send(2 << 24, 0x60), [2]);
    assert_eq!(send(9 << 24, 0x60), [0usize; 0]);
    assert_eq!(send(0xff << 24, 0x60), [0, 1, 2, 3]);
    assert_eq!(send(0b1010 << 24, 0x860), [1, 3]);
    assert_eq!(send(0, 0x4_0060), [0]);
    assert_eq!(send(0, 0x8_0060), [0, 1, 2, 3]);
    assert_eq!(send(0, 0xc_0060), [1, 2, 3]);
    // Lowest priority picks exactly one of the destinations.
    let one = send(0b0110 << 24, 0x960);
    assert!(one == [1] || one == [2]);
}

#[test]
fn lowest_priority_respects_task_priority() {
    let mut m = machine(&[0, 1, 2]);
    m.enable_all();
    m.write(1, 0x80, 0x20);
    m.write(2, 0x80, 0x30);
    m.write(0, 0x310, 0b110 << 24);
    m.write(0, 0x300, 0x960);
    assert_eq!(m.kicks.take(), [1]);
}

#[test]
fn cluster_destinations() {
    let mut m = machine(&[0, 1, 2]);
    m.enable_all();
    for (cpu, ldr) in [(0, 0x01u32), (1, 0x11), (2, 0x12)] {
        m.write(cpu, 0xe0, 0);
        m.write(cpu, 0xd0, ldr << 24);
    }
    assert_eq!(m.read(0, 0xe0), 0x0fff_ffff);
    m.write(0, 0x310, 0x13 << 24);
    m.write(0, 0x300, 0x860);
    assert_eq!(m.who_got(0x60), [1, 2]);
    m.write(0, 0x310, 0xf1 << 24);
    m.write(0, 0x300, 0x860);
    assert_eq!(m.who_got(0x60), [0, 1]);
}

#[test]
fn x2apic_destinations() {
    let ids: Vec<u32> = vec![0, 1, 17, 300];
    let mut m = machine(&ids);
    m.enable_x2apic();
    assert_eq!(m.cpus[3].read_msr(0x802), Ok(300));
    assert_eq!(m.cpus[3].read_msr(0x80d), Ok(18 << 16 | 1 << 12));
    let mut send = |icr: u64| {
        assert_eq!(m.cpus[0].write_msr(0x830, icr), Ok(ApicEffect::None));
        assert_eq!(m.cpus[0].read_msr(0x830), Ok(icr));
        m.who_got(0x60)
    };
    assert_eq!(send(300 << 32 | 0x60), [3]);
    assert_eq!(send(0xff << 32 | 0x60), [0usize; 0], "not a broadcast here");
    assert_eq!(send(0xffff_ffff << 32 | 0x60), [0, 1, 2, 3]);
    assert_eq!(send(0x0001_0002 << 32 | 0x860), [2]);
    assert_eq!(send(0x0000_0003 << 32 | 0x860), [0, 1]);
    assert_eq!(m.cpus[0].write_msr(0x83f, 0x60), Ok(ApicEffect::None));
    assert_eq!(m.who_got(0x60), [0]);
    // An IOAPIC's or MSI's 8-bit broadcast reaches x2APIC processors as well.
    m.bus.deliver_msi(0xfeef_f000, 0x60);
    assert_eq!(m.who_got(0x60), [0, 1, 2, 3]);
    m.bus.deliver_msi(0xfee0_3004, 0x60);
    assert_eq!(m.who_got(0x60), [0, 1], "logical, without redirection hint");
    m.bus.deliver_msi(0xfed0_0000, 0x60);
    assert_eq!(m.who_got(0x60), [0usize; 0]);
}

#[test]
fn x2apic_register_faults() {
    let mut m = machine(&[0]);
    assert_eq!(m.cpus[0].read_msr(0x802), Err(MsrFault), "xAPIC mode");
    m.enable_x2apic();
    let cpu = &mut m.cpus[0];
    for read in [
        0x800, 0x80b, 0x80e, 0x831, 0x83f, 0x82f, 0x840, 0x8ff, 0x80c, 0x809,
    ] {
        assert_eq!(cpu.read_msr(read), Err(MsrFault), "{read:#x}");
    }
    for (number, value) in [
        (0x802, 0),
        (0x803, 0),
        (0x80a, 0),
        (0x80d, 0),
        (0x810, 0),
        (0x839, 0),
        (0x80b, 1),
        (0x828, 1),
        (0x808, 0x100),
        (0x80f, 1 << 10),
        (0x832, 1 << 19),
        (0x835, 1 << 17),
        (0x837, 1 << 8),
        (0x830, 1 << 12),
        (0x838, 1 << 32),
        (0x83e, 4),
        (0x83f, 0x100),
    ] {
        assert_eq!(cpu.write_msr(number, value), Err(MsrFault), "{number:#x}");
    }
    assert_eq!(cpu.xapic_page(), None);
    assert!(LocalApic::owns_msr(0x8ff) && !LocalApic::owns_msr(0x900));
}

#[test]
fn base_msr_transitions() {
    const OFF: u64 = 0xfee0_0100;
    const XAPIC: u64 = 0xfee0_0900;
    const X2APIC: u64 = 0xfee0_0d00;
    const BAD: u64 = 0xfee0_0500;
    for (from, to, ok) in [
        (OFF, XAPIC, true),
        (OFF, X2APIC, false),
        (XAPIC, OFF, true),
        (XAPIC, X2APIC, true),
        (X2APIC, XAPIC, false),
        (X2APIC, OFF, true),
        (XAPIC, BAD, false),
        (X2APIC, BAD, false),
        (XAPIC, XAPIC | 1, false),
        (XAPIC, XAPIC | 1 << 40, false),
        (XAPIC, XAPIC | 1 << 39, true),
    ] {
        let mut m = machine(&[0]);
        let cpu = &mut m.cpus[0];
        if from != XAPIC {
            assert!(cpu.write_msr(MSR_APIC_BASE, from).is_ok());
        }
        assert_eq!(
            cpu.write_msr(MSR_APIC_BASE, to).is_ok(),
            ok,
            "{from:x} {to:x}"
        );
        let now = cpu.read_msr(MSR_APIC_BASE);
        assert_eq!(now, Ok(if ok { to } else { from }));
    }
    let mut m = machine(&[0]);
    m.cpus[0] = LocalApic::new(
        VcpuId(0),
        LocalApicConfig {
            x2apic: false,
            ..LocalApicConfig::new(0)
        },
        m.bus.clone(),
        m.clock.clone(),
    )
    .unwrap();
    assert_eq!(m.cpus[0].write_msr(MSR_APIC_BASE, X2APIC), Err(MsrFault));
}

#[test]
fn turning_off_loses_state_and_stops_delivery() {
    let mut m = machine(&[0, 1]);
    m.enable_all();
    m.write(1, 0x350, 0x700);
    let off = m.cpus[1].base().with_enabled(false).into_bits();
    assert!(m.cpus[1].write_msr(MSR_APIC_BASE, off).is_ok());
    m.write(0, 0x300, 0xc_0060);
    assert_eq!(m.kicks.take(), [0u32; 0]);
    assert!(
        m.cpus[1].wants_extint(|| true),
        "INTR is wired straight through"
    );
    let on = m.cpus[1].base().with_enabled(true).into_bits();
    assert!(m.cpus[1].write_msr(MSR_APIC_BASE, on).is_ok());
    assert_eq!(m.read(1, 0xf0), 0xff);
    assert!(!m.cpus[1].wants_extint(|| true));
}

#[test]
fn init_and_startup_sequence() {
    let mut m = machine(&[0, 1]);
    m.enable_all();
    m.write(0, 0x310, 1 << 24);
    m.write(0, 0x300, 0xc500); // INIT, level, assert
    m.write(0, 0x300, 0x8500); // INIT, level, de-assert: no effect
    m.write(0, 0x300, 0x69a); // start-up at 0x9a000
    m.write(0, 0x300, 0x69b);
    assert_eq!(m.kicks.take(), [1], "one kick for all");
    let signals = m.cpus[1].take_signals();
    assert_eq!(
        signals,
        Signals {
            nmis: 0,
            init: true,
            startup: Some(0x9a)
        }
    );
    m.cpus[1].init();
    assert!(m.cpus[1].take_signals().is_empty());
    // INIT voids an earlier start-up, in the inbox and across two drains.
    m.write(0, 0x300, 0x69a);
    let _ = m.cpus[1].interrupt();
    m.write(0, 0x300, 0x500);
    assert_eq!(m.cpus[1].take_signals().startup, None);
    m.write(0, 0x300, 0x400);
    assert_eq!(m.cpus[1].take_signals().nmis, 1);
}

#[test]
fn of_many_nmis_two_are_kept() {
    let mut m = machine(&[0, 1]);
    for (sent, kept) in [(1, 1), (2, 2), (9, 2)] {
        for _ in 0..sent {
            m.bus.deliver_msi(0xfee0_1000, 0x400);
        }
        assert_eq!(m.cpus[1].take_signals().nmis, kept);
    }
    // In two drains, and from the processor itself.
    m.bus.deliver_msi(0xfee0_1000, 0x400);
    assert_eq!(m.cpus[1].interrupt(), None);
    m.write(1, 0x300, 1 << 18 | 0x4400);
    m.bus.deliver_msi(0xfee0_1000, 0x400);
    assert_eq!(m.cpus[1].take_signals().nmis, 2);
}

#[test]
fn software_disabled_takes_signals_but_no_interrupts() {
    let mut m = machine(&[0, 1]);
    m.write(0, 0xf0, 0x1ff);
    m.write(1, 0x350, 0x700);
    assert_eq!(m.read(1, 0x350), 0x1_0700, "the mask cannot be cleared");
    m.write(0, 0x310, 1 << 24);
    m.write(0, 0x300, 0x60);
    assert_eq!(m.kicks.take(), [0u32; 0]);
    m.write(0, 0x300, 0x400);
    assert_eq!(m.kicks.take(), [1]);
    m.cpus[1].set_virtual_wire();
    assert!(m.cpus[1].wants_extint(|| true));
    assert_eq!(m.read(1, 0x360), 0x400);
}

#[test]
fn errors_latch_on_write() {
    let mut m = machine(&[0, 1]);
    m.enable_all();
    m.write(0, 0x370, 0xfe);
    m.write(0, 0x310, 1 << 24);
    m.write(0, 0x300, 0x0f); // illegal vector sent
    assert_eq!(m.read(0, 0x280), 0, "not visible before a write");
    assert_eq!(m.cpus[0].interrupt(), Some(0xfe));
    m.write(0, 0x280, 0);
    assert_eq!(m.read(0, 0x280), 1 << 5);
    m.write(0, 0x280, 0);
    assert_eq!(m.read(0, 0x280), 0);
    // A reserved register.
    assert_eq!(m.read(0, 0x40), 0);
    m.write(0, 0x280, 0);
    assert_eq!(m.read(0, 0x280), 1 << 7);
    // An illegal vector received.
    m.bus.deliver_msi(0xfee0_1000, 0x05);
    m.write(1, 0x280, 0);
    assert_eq!(m.read(1, 0x280), 1 << 6);
    // Further errors interrupt after the next write to ESR only.
    m.write(0, 0x300, 0x0f);
    assert_eq!(m.who_got(0xfe), [0]);
    m.write(0, 0x300, 0x0f);
    assert_eq!(m.who_got(0xfe), [0usize; 0]);
    m.write(0, 0x280, 0);
    m.write(0, 0x300, 0x0f);
    assert_eq!(m.who_got(0xfe), [0]);
    m.write(0, 0x280, 0);
    // An error entry with an illegal vector does not recurse.
    m.write(0, 0x370, 0x00);
    m.write(0, 0x300, 0x0f);
    m.write(0, 0x280, 0);
    assert_eq!(m.read(0, 0x280), 1 << 5 | 1 << 6);
}

#[test]
fn mmio_shape() {
    let mut m = machine(&[0]);
    let cpu = &mut m.cpus[0];
    assert_eq!(
        cpu.read_mmio(0x20, Width::Qword),
        Err(IoError::InvalidWidth)
    );
    assert_eq!(cpu.read_mmio(0x23, Width::Word), Err(IoError::Unaligned));
    assert_eq!(cpu.read_mmio(0x30, Width::Byte), Ok(0x14));
    assert_eq!(cpu.read_mmio(0x32, Width::Word), Ok(0x0105));
    assert_eq!(cpu.read_mmio(0x24, Width::Dword), Err(IoError::Unaligned));
    assert_eq!(
        cpu.write_mmio(0x1000, Width::Dword, 0),
        Err(IoError::InvalidRegister)
    );
    assert_eq!(
        cpu.write_mmio(0x20, Width::Byte, 7),
        Err(IoError::InvalidWidth)
    );
}

#[test]
fn one_shot_timer() {
    let mut m = machine(&[0]);
    m.enable_all();
    m.clock.set(1_000_001);
    m.write(0, 0x3e0, 0b0011); // divide by 16
    m.write(0, 0x320, 0x40);
    m.write(0, 0x380, 1000);
    assert_eq!(m.read(0, 0x390), 1000);
    // 16000 counts at 1 GHz are 32000 ticks at 2 GHz.
    let due = m.cpus[0].deadline().unwrap();
    assert_eq!(due, 1_000_000 + 32_000);
    m.clock.set(1_000_000 + 16_000);
    assert_eq!(m.read(0, 0x390), 500);
    m.cpus[0].poll(due - 1);
    assert_eq!(m.cpus[0].interrupt(), None);
    m.clock.set(due);
    m.cpus[0].poll(due);
    assert_eq!(m.cpus[0].interrupt(), Some(0x40));
    assert_eq!(m.read(0, 0x390), 0);
    assert_eq!(m.cpus[0].deadline(), None);
    // Initial count 0 stops it.
    m.write(0, 0x380, 1000);
    m.write(0, 0x380, 0);
    assert_eq!(m.cpus[0].deadline(), None);
}

#[test]
fn divide_configurations() {
    for (bits, divisor) in [
        (0b0000, 2),
        (0b0001, 4),
        (0b0010, 8),
        (0b0011, 16),
        (0b1000, 32),
        (0b1001, 64),
        (0b1010, 128),
        (0b1011, 1),
    ] {
        let mut m = machine(&[0]);
        m.enable_all();
        m.write(0, 0x3e0, bits);
        m.write(0, 0x320, 0x40);
        m.write(0, 0x380, 1_000_000);
        assert_eq!(m.cpus[0].deadline(), Some(1_000_000 * divisor * 2));
        assert_eq!(m.read(0, 0x3e0), bits);
    }
}

#[test]
fn changing_the_divider_keeps_the_count() {
    let mut m = machine(&[0]);
    m.enable_all();
    m.write(0, 0x320, 0x40);
    m.write(0, 0x380, 1000); // divide by 2: 4000 ticks
    m.clock.set(2000);
    m.write(0, 0x3e0, 0b0011);
    assert_eq!(m.read(0, 0x390), 500);
    assert_eq!(m.cpus[0].deadline(), Some(2000 + 500 * 16 * 2));
}

#[test]
fn periodic_timer_keeps_its_phase_and_coalesces() {
    let mut m = machine(&[0]);
    m.enable_all();
    m.write(0, 0x3e0, 0b1011);
    m.write(0, 0x320, 0x2_0040);
    m.write(0, 0x380, 1_000_000); // 1 ms: 2 M ticks
    let mut ticks = 0;
    for late in [0, 300, 5_000, 0] {
        let due = m.cpus[0].deadline().unwrap();
        assert_eq!(due % 2_000_000, 0);
        m.clock.set(due + late);
        m.cpus[0].poll(due + late);
        ticks += m.who_got(0x40).len();
    }
    assert_eq!(ticks, 4);
    // Asleep for an hour: one interrupt, then back in phase.
    let late = m.cpus[0].deadline().unwrap() + 3600 * HZ + 77;
    m.clock.set(late);
    m.cpus[0].poll(late);
    assert_eq!(m.who_got(0x40), [0]);
    let next = m.cpus[0].deadline().unwrap();
    assert!(next > late && next <= late + 2_000_000 && next.is_multiple_of(2_000_000));
}

#[test]
fn a_tiny_period_does_not_flood() {
    let mut m = machine(&[0]);
    m.enable_all();
    m.write(0, 0x3e0, 0b1011);
    m.write(0, 0x320, 0x2_0040);
    m.write(0, 0x380, 1);
    let mut now = 0;
    let mut polls = 0;
    while now < HZ / 1000 {
        now = now.max(m.cpus[0].deadline().unwrap());
        m.clock.set(now);
        m.cpus[0].poll(now);
        polls += 1;
    }
    assert!((15..25).contains(&polls), "{polls} in 1 ms");
}

#[test]
fn tsc_deadline() {
    let mut m = machine(&[0]);
    m.enable_all();
    let cpu = &mut m.cpus[0];
    assert_eq!(cpu.write_msr(MSR_TSC_DEADLINE, 500), Ok(ApicEffect::None));
    assert_eq!(cpu.read_msr(MSR_TSC_DEADLINE), Ok(0), "wrong mode: ignored");
    assert!(cpu.write_mmio(0x320, Width::Dword, 0x4_0040).is_ok());
    assert!(cpu.write_mmio(0x380, Width::Dword, 1000).is_ok());
    assert_eq!(
        cpu.deadline(),
        None,
        "initial count is ignored in this mode"
    );
    assert!(cpu.write_msr(MSR_TSC_DEADLINE, 500).is_ok());
    assert_eq!(cpu.deadline(), Some(500));
    assert_eq!(cpu.read_msr(MSR_TSC_DEADLINE), Ok(500));
    // The vCPU's TSC runs 200 ahead of the clock.
    cpu.set_tsc_adjust(200);
    assert_eq!(cpu.deadline(), Some(300));
    m.clock.set(250);
    cpu.set_tsc_adjust(200u64.wrapping_neg());
    assert_eq!(cpu.deadline(), Some(700));
    cpu.set_tsc_adjust(0);
    m.clock.set(500);
    cpu.poll(500);
    assert_eq!(cpu.interrupt(), Some(0x40));
    assert_eq!(cpu.read_msr(MSR_TSC_DEADLINE), Ok(0));
    // A guest may set its TSC to anything: what counts is which of the two numbers is larger.
    let tsc = 0xf000_0000_0000_0000_u64;
    cpu.set_tsc_adjust(tsc.wrapping_sub(500));
    assert!(cpu.write_msr(MSR_TSC_DEADLINE, tsc - 1).is_ok());
    assert_eq!(cpu.read_msr(MSR_TSC_DEADLINE), Ok(0), "in the past");
    cpu.poll(500);
    assert_eq!(cpu.deadline(), None, "and has come");
    assert!(cpu.write_msr(MSR_TSC_DEADLINE, tsc + 7).is_ok());
    assert_eq!(cpu.deadline(), Some(507));
    cpu.set_tsc_adjust(0);
    // Leaving the mode disarms.
    assert!(cpu.write_msr(MSR_TSC_DEADLINE, 900).is_ok());
    assert!(cpu.write_mmio(0x320, Width::Dword, 0x40).is_ok());
    assert_eq!(cpu.deadline(), None);
}

/// Reading must not make work that only a later check would find.
#[test]
fn reads_change_nothing() {
    let mut m = machine(&[0]);
    m.enable_x2apic();
    m.bus.deliver_msi(0xfee0_0000, 0xc041);
    assert_eq!(
        m.cpus[0].read_msr(0x822),
        Ok(1 << 1),
        "IRR shows what is posted"
    );
    assert_eq!(
        m.cpus[0].read_msr(0x81a),
        Ok(1 << 1),
        "and TMR its trigger mode"
    );
    assert!(m.cpus[0].inbox().has_pending());
    assert_eq!(m.who_got(0x41), [0]);
    for (number, value) in [(0x832, 0x2_0040), (0x83e, 0xb), (0x838, 1_000_000)] {
        assert!(m.cpus[0].write_msr(number, value).is_ok());
    }
    let due = m.cpus[0].deadline().unwrap();
    m.clock.set(due + 500_000);
    assert_eq!(m.cpus[0].read_msr(0x839), Ok(750_000), "wrapped around");
    assert_eq!(m.cpus[0].deadline(), Some(due));
    assert!(m.cpus[0].write_msr(0x832, 0x4_0040).is_ok());
    assert_eq!(m.who_got(0x40), [0], "a write delivers what was due before");
    assert!(m.cpus[0].write_msr(MSR_TSC_DEADLINE, due).is_ok());
    assert_eq!(m.cpus[0].read_msr(MSR_TSC_DEADLINE), Ok(0), "in the past");
    assert_eq!(m.cpus[0].deadline(), Some(due));
}

#[test]
fn a_masked_timer_is_silent() {
    let mut m = machine(&[0]);
    m.enable_all();
    m.write(0, 0x320, 0x3_0040);
    m.write(0, 0x380, 1000);
    assert_eq!(m.cpus[0].deadline(), None);
    m.clock.set(1_000_000);
    m.write(0, 0x320, 0x2_0040);
    assert_eq!(m.cpus[0].interrupt(), None, "the past is not made up for");
    assert!(m.cpus[0].deadline().unwrap() > 1_000_000);
}

#[test]
fn the_8259s_output_reaches_the_bootstrap_processor() {
    let mut m = machine(&[0, 1]);
    m.enable_all();
    let ioapic = Arc::new(RecordingSink::default());
    let pin = IntrPin::new(m.bus.clone(), Line::new(ioapic.clone(), 0));
    pin.set_level(0, true);
    assert_eq!(m.kicks.take(), [0]);
    assert!(m.bus.inbox(VcpuId(0)).unwrap().has_pending());
    assert!(!m.cpus[0].wants_extint(|| true), "LINT0 is masked");
    pin.set_level(0, false);
    assert_eq!(m.kicks.take(), [0u32; 0]);
    assert_eq!(ioapic.take(), [(0, true), (0, false)]);
    // LINT0 as ExtINT: a level.
    m.write(0, 0x350, 0x700);
    assert!(m.cpus[0].wants_extint(|| true) && !m.cpus[0].wants_extint(|| false));
    assert!(!m.cpus[1].wants_extint(|| true));
    // LINT0 as an interrupt of its own: an edge.
    m.write(0, 0x350, 0x0045);
    pin.set_level(0, true);
    assert_eq!(m.who_got(0x45), [0]);
    assert_eq!(m.cpus[0].interrupt(), None);
    m.write(0, 0x350, 0x0400);
    pin.set_level(0, true);
    assert_eq!(m.cpus[0].take_signals().nmis, 1);
    m.write(0, 0x350, 0x1_0045);
    pin.set_level(0, true);
    assert_eq!(m.cpus[0].interrupt(), None, "masked");
}

#[test]
fn an_extint_message_is_taken_once() {
    let mut m = machine(&[0, 1]);
    m.enable_all();
    m.bus.deliver_msi(0xfee0_1000, 0x700);
    assert_eq!(m.kicks.take(), [1]);
    assert_eq!(m.cpus[1].interrupt(), None);
    assert!(m.cpus[1].wants_extint(|| false) && !m.cpus[0].wants_extint(|| false));
    m.cpus[1].accept_extint();
    assert!(!m.cpus[1].wants_extint(|| false));
    m.bus.deliver_msi(0xfee0_1000, 0x700);
    let _ = m.cpus[1].take_signals();
    m.cpus[1].init();
    assert!(!m.cpus[1].wants_extint(|| false), "INIT voids it");
}

#[test]
fn the_xapic_id_can_be_changed_and_comes_back() {
    let mut m = machine(&[0, 1, 2]);
    m.enable_all();
    m.write(1, 0x20, 0x07ff_ffff);
    assert_eq!(m.read(1, 0x20), 7 << 24);
    let send = |m: &Machine, id: u64| m.bus.deliver_msi(0xfee0_0000 | id << 12, 0x41);
    send(&m, 7);
    assert_eq!(m.who_got(0x41), [1]);
    send(&m, 1);
    assert_eq!(m.who_got(0x41), [0usize; 0]);
    // The same ID twice: both take it.
    m.write(2, 0x20, 7 << 24);
    send(&m, 7);
    assert_eq!(m.who_got(0x41), [1, 2]);
    m.cpus[1].init();
    assert_eq!(m.read(1, 0x20), 7 << 24, "INIT keeps it");
    m.enable_x2apic();
    assert_eq!(m.cpus[1].read_msr(0x802), Ok(1));
    send(&m, 1);
    assert_eq!(m.who_got(0x41), [1]);
    assert_eq!(
        m.cpus[1].write_msr(MSR_APIC_BASE, 0xfee0_0000),
        Ok(ApicEffect::BaseChanged)
    );
    assert_eq!(
        m.cpus[1].write_msr(MSR_APIC_BASE, 0xfee0_0800),
        Ok(ApicEffect::BaseChanged)
    );
    assert_eq!(m.read(1, 0x20), 1 << 24, "as after power-up");
}

#[test]
fn only_vectors_are_sent_by_the_shorthand_for_oneself() {
    let mut m = machine(&[0, 1]);
    m.enable_all();
    // SMI, NMI, INIT and start-up are not defined for self.
    for mode in [0x200, 0x400, 0x500, 0x600] {
        m.write(0, 0x300, 1 << 18 | 0x4000 | mode);
        assert!(m.cpus[0].take_signals().is_empty());
    }
    m.write(0, 0x300, 1 << 18 | 0x4100 | 0x51);
    assert_eq!(m.who_got(0x51), [0]);
    assert_eq!(m.kicks.take(), [0u32; 0]);
}

#[test]
fn the_same_base_again_changes_nothing() {
    let mut m = machine(&[0]);
    let base = m.cpus[0].base().into_bits();
    assert_eq!(
        m.cpus[0].write_msr(MSR_APIC_BASE, base),
        Ok(ApicEffect::None)
    );
    let moved = m.cpus[0].write_msr(MSR_APIC_BASE, base + 0x1000);
    assert_eq!(moved, Ok(ApicEffect::BaseChanged));
}

#[test]
fn posting_from_other_threads_loses_nothing() {
    let mut m = machine(&[0]);
    m.enable_all();
    let bus = m.bus.clone();
    let sender = std::thread::spawn(move || {
        for round in 0..200u32 {
            for vector in 0x20..=0xffu32 {
                bus.deliver_msi(0xfee0_0000, vector);
                if vector % 64 == round % 64 {
                    std::thread::yield_now();
                }
            }
        }
    });
    let mut seen = [0u32; 256];
    let mut done = false;
    loop {
        while let Some(vector) = m.cpus[0].interrupt() {
            m.cpus[0].accept(vector);
            let _ = m.cpus[0].eoi();
            seen[usize::from(vector)] += 1;
        }
        if done {
            break;
        }
        done = sender.is_finished();
    }
    sender.join().unwrap();
    assert!(seen[0x20..].iter().all(|&n| (1..=200).contains(&n)));
    assert!(!m.bus.inbox(VcpuId(0)).unwrap().has_pending());
}

#[derive(Clone, Debug)]
enum Step {
    Mmio(u64, u32),
    MmioRead(u64),
    Msr(u32, u64),
    MsrRead(u32),
    Msi(u64, u32),
    Advance(u64),
    Accept,
}

fn step() -> impl Strategy<Value = Step> {
    let value = prop_oneof![any::<u32>(), 0u32..0x400, Just(0x1ff), Just(u32::MAX)];
    let wide = prop_oneof![
        any::<u64>(),
        0u64..0x400,
        Just(0xfee0_0d00),
        Just(0xfee0_0900)
    ];
    let number = prop_oneof![0x800u32..0x840, Just(MSR_APIC_BASE), Just(MSR_TSC_DEADLINE)];
    prop_oneof![
        ((0u64..0x41).prop_map(|r| r * 16), value).prop_map(|(o, v)| Step::Mmio(o, v)),
        (0u64..0x1010).prop_map(Step::MmioRead),
        (number.clone(), wide).prop_map(|(n, v)| Step::Msr(n, v)),
        number.prop_map(Step::MsrRead),
        (0xfee0_0000u64..0xfef0_0000, any::<u32>()).prop_map(|(a, d)| Step::Msi(a, d)),
        prop_oneof![0u64..100_000, any::<u64>().prop_map(|t| t >> 2)].prop_map(Step::Advance),
        Just(Step::Accept),
    ]
}

proptest! {
    #[test]
    fn random_accesses_never_panic(steps in proptest::collection::vec(step(), 0..200)) {
        let mut m = machine(&[0, 1]);
        let mut now = 0u64;
        for step in steps {
            let cpu = &mut m.cpus[0];
            match step {
                Step::Mmio(offset, value) => { let _ = cpu.write_mmio(offset, Width::Dword, value); }
                Step::MmioRead(offset) => { let _ = cpu.read_mmio(offset, Width::Dword); }
                Step::Msr(number, value) => { let _ = cpu.write_msr(number, value); }
                Step::MsrRead(number) => { let _ = cpu.read_msr(number); }
                Step::Msi(address, data) => m.bus.deliver_msi(address, data),
                Step::Advance(ticks) => {
                    now = now.saturating_add(ticks);
                    m.clock.set(now);
                    cpu.poll(now);
                    let progress = cpu.deadline().is_none_or(|d| d > now || now == u64::MAX);
                    prop_assert!(progress, "still due after poll");
                }
                Step::Accept => {
                    if let Some(vector) = cpu.interrupt() {
                        prop_assert!(vector >= 16);
                        prop_assert!(vector >> 4 > cpu.ppr() >> 4);
                        cpu.accept(vector);
                    }
                    let _ = cpu.take_signals();
                }
            }
        }
    }
}

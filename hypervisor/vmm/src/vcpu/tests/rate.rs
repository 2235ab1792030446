//! A guest whose TSC runs at a rate of its own: all that it reads and asks for agrees.

use super::*;

/// Half of the host's rate.
const GUEST_HZ: u64 = HZ / 2;

const TSC: u64 = number::TSC as u64;
const TSC_ADJUST: u64 = number::TSC_ADJUST as u64;

fn bench() -> Bench {
    Bench::make_at_rate((1, 0), None, DisplaySpec::default(), Some(GUEST_HZ)).expect("a VM")
}

fn read(b: &mut Bench, msr: u64) -> u64 {
    b.set(Gpr::Rcx, msr);
    b.run([Exit::MsrRead]);
    b.get(Gpr::Rdx) << 32 | b.get(Gpr::Rax)
}

fn write(b: &mut Bench, msr: u64, value: u64) {
    b.set(Gpr::Rcx, msr);
    b.set(Gpr::Rax, value & 0xffff_ffff);
    b.set(Gpr::Rdx, value >> 32);
    b.run([Exit::MsrWrite]);
}

/// What RDTSC gives the guest while the host's TSC shows `host`.
fn shown(b: &Bench, host: u64) -> u64 {
    let hw = &b.vcpu.hw;
    hw.tsc_scale.to_guest(host).wrapping_add(hw.tsc_offset)
}

#[test]
fn rdtsc_rdmsr_and_tsc_adjust_agree() {
    let mut b = bench();
    assert_eq!(b.vcpu.hw.tsc_scale.multiplier(), Some(1 << 47));
    let (before, value, after) = (now(), read(&mut b, TSC), now());
    assert!((shown(&b, before)..=shown(&b, after)).contains(&value));
    write(&mut b, TSC_ADJUST, 1 << 40);
    let (before, value, after) = (now(), read(&mut b, TSC), now());
    assert!((shown(&b, before)..=shown(&b, after)).contains(&value));
    assert!(value >= 1 << 40);
    write(&mut b, TSC, 5);
    let value = read(&mut b, TSC);
    assert!((5..5 + GUEST_HZ).contains(&value), "{value}");
}

#[test]
fn a_tsc_deadline_is_one_of_the_host_at_the_guests_rate() {
    const TSC_DEADLINE_MODE: u64 = 2 << 17;
    let mut b = bench();
    write(&mut b, 0x1b, 0xfee0_0d00);
    write(&mut b, 0x80f, 0x1ff);
    write(&mut b, 0x832, TSC_DEADLINE_MODE | 0x40);
    let due = shown(&b, now()) + GUEST_HZ * 1000;
    write(&mut b, 0x6e0, due);
    let pause = b.run([Exit::Halt]);
    let Pause::Idle { until: Some(until) } = pause else {
        panic!("{pause:?}");
    };
    assert!(shown(&b, until) >= due && shown(&b, until - 1) < due);
}

#[test]
fn what_the_guest_is_told_of_its_clock_is_its_own() {
    let mut b = bench();
    b.set(Gpr::Rax, 0x4000_0010);
    b.run([Exit::Cpuid]);
    assert_eq!(b.get(Gpr::Rax), GUEST_HZ / 1000);
    assert_eq!(b.get(Gpr::Rbx), GUEST_HZ.min(1_000_000_000) / 1000);
    let ratio = read(&mut b, number::PLATFORM_INFO.into());
    assert_eq!(ratio, crate::msr::platform_info(GUEST_HZ));
    write(&mut b, number::KVM_SYSTEM_TIME.into(), 0x5001);
    let mut page = [0; 32];
    let memory = &b.vcpu.vm().memory;
    memory.read(mem::Gpa(0x5000), &mut page).expect("RAM");
    let scale = crate::clock::TickScale::new(GUEST_HZ);
    assert_eq!(page[24..28], scale.multiplier.to_le_bytes());
    assert_eq!(page[28] as i8, scale.shift);
}

#[test]
fn a_rate_that_the_processor_cannot_give_is_refused_in_words() {
    let wanted = Some(HZ * 70_000);
    let refused = Bench::make_at_rate((1, 0), None, DisplaySpec::default(), wanted);
    let words = refused.err().expect("too fast");
    assert!(words.contains("cannot scale it so far"), "{words}");
}

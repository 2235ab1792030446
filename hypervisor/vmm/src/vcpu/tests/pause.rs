//! Pausing, and giving way.

use super::*;

const TSC: Exit = Exit::MsrRead;

fn read_tsc(b: &mut Bench) -> u64 {
    b.set(Gpr::Rcx, u64::from(number::TSC));
    b.run([TSC]);
    b.get(Gpr::Rdx) << 32 | b.get(Gpr::Rax)
}

#[test]
fn a_paused_vcpu_does_not_enter_the_guest() {
    let mut b = Bench::new();
    let vm = b.vcpu.vm().clone();
    assert!(!vm.resume(), "it is not paused");
    assert!(vm.pause());
    assert!(!vm.pause(), "it is paused already");
    assert_eq!(b.kicks.0[0].load(Ordering::Relaxed), 1);
    assert_eq!(b.run([Exit::Cpuid]), Pause::Idle { until: None });
    assert_eq!(b.vcpu.counters()[Exit::Cpuid.index()], 0);
    assert!(vm.resume());
    assert_eq!(b.kicks.0[0].load(Ordering::Relaxed), 2);
    b.run([Exit::Cpuid]);
    assert_eq!(b.vcpu.counters()[Exit::Cpuid.index()], 1);
}

#[test]
fn a_pause_ends_where_the_vm_ends() {
    let mut b = Bench::new();
    let vm = b.vcpu.vm().clone();
    vm.pause();
    b.run([]);
    vm.end(crate::vm::EndReason::Forced);
    assert_eq!(b.run([]), Pause::Ended);
    assert!(!vm.pause(), "it has ended");
}

#[test]
fn the_clock_stands_still_while_the_vm_is_paused() {
    const HOUR: u64 = 3_600 * HZ;
    let mut b = Bench::new();
    let vm = b.vcpu.vm().clone();
    let before = read_tsc(&mut b);
    let offset = b.vcpu.hw.tsc_offset;
    vm.pause();
    b.run([]);
    NOW.set(NOW.get() + HOUR);
    vm.resume();
    let after = read_tsc(&mut b);
    assert!(after > before && after - before < HZ, "{before} {after}");
    let skipped = offset.wrapping_sub(b.vcpu.hw.tsc_offset);
    assert!(
        (HOUR..HOUR + HZ).contains(&skipped),
        "RDTSC skips {skipped}"
    );
    // The time of day has not stood still.
    assert_eq!(vm.epoch_now(), 1_700_000_000 + 3_600);
}

#[test]
fn a_vcpu_that_never_rested_keeps_the_clock_running() {
    let mut b = Bench::new();
    let vm = b.vcpu.vm().clone();
    let offset = b.vcpu.hw.tsc_offset;
    vm.pause();
    NOW.set(NOW.get() + HZ);
    vm.resume();
    b.run([Exit::Cpuid]);
    assert_eq!(b.vcpu.hw.tsc_offset, offset);
}

#[test]
fn a_pcpu_that_is_needed_elsewhere_gets_free_before_the_slice_is_over() {
    let mut b = Bench::new();
    b.vcpu.hw.exits = [Exit::ExternalInterrupt, Exit::ExternalInterrupt].into();
    b.host.busy = true;
    let pause = b.vcpu.run(&mut b.host);
    assert_eq!(pause, Pause::SliceOver);
    assert_eq!(b.host.interrupts, 1);
}

#[test]
fn an_nmi_from_outside_is_taken() {
    let mut b = Bench::new();
    let vm = b.vcpu.vm().clone();
    assert!(!vm.inject_nmi(VcpuId(1)), "there is no such vCPU");
    assert!(vm.inject_nmi(VcpuId(0)));
    b.run([Exit::Cpuid]);
    assert_eq!(b.vcpu.hw.injected, [Event::Nmi]);
}

/// The watchdog's lock register: on.
fn turn_watchdog_on(b: &mut Bench) {
    let vm = b.vcpu.vm().clone();
    vm.ports
        .write(0xcf8, Width::Dword, 1 << 31 | 3 << 11 | 0x68);
    vm.ports.write(0xcfc, Width::Byte, 2);
    b.run([Exit::Cpuid]);
}

/// Two stages of 2^20 PCI clocks over 2^15: more than 2,000 seconds.
#[test]
fn a_watchdog_that_is_not_fed_does_what_it_is_configured_to_do() {
    let mut b = Bench::new();
    let vm = b.vcpu.vm().clone();
    turn_watchdog_on(&mut b);
    NOW.set(NOW.get() + 1_100 * HZ);
    b.run([Exit::Cpuid]);
    assert!(!vm.is_paused(), "the first stage");
    NOW.set(NOW.get() + 1_000 * HZ);
    assert_eq!(b.run([]), Pause::Idle { until: None });
    assert!(vm.is_paused());
    assert_eq!(b.alarms.0.load(Ordering::Relaxed), 1);
    assert!(vm.resume());
    b.run([Exit::Cpuid]);
    assert!(!vm.is_paused(), "once");
}

/// Also a processor that halts with interrupts off wakes for it.
#[test]
fn a_halted_guest_does_not_outlive_its_watchdog() {
    let mut b = Bench::new();
    turn_watchdog_on(&mut b);
    let Pause::Idle { until: Some(until) } = b.run([Exit::Halt]) else {
        panic!("it halts until the watchdog's stage is over");
    };
    NOW.set(until);
    let Pause::Idle { until: Some(until) } = b.run([]) else {
        panic!("the second stage");
    };
    NOW.set(until);
    b.run([]);
    assert!(b.vcpu.vm().is_paused());
}

#[test]
fn one_that_comes_first_waits_for_no_slice_to_end() {
    let mut b = Bench::new();
    // Exits after which nothing is looked at but this.
    b.vcpu.hw.exits = (0..10).map(|_| Exit::Cpuid).collect();
    b.host.cut_at = 4;
    assert_eq!(b.vcpu.run(&mut b.host), Pause::SliceOver);
    // Before the first entry everything is looked at.
    assert_eq!(b.vcpu.hw.exits.len(), 10 - 4);
}

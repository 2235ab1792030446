//! Starting again with memory as it was: S3, and INIT of the boot processor.

use super::*;
use devices::lapic::{DeliveryMode, Destination, Message, Trigger};

const OUT: fn(u16, Width) -> Exit = |port, width| {
    Exit::PortIo(PortIo {
        port,
        width,
        direction: Direction::Write,
        string: false,
    })
};

fn out(b: &mut Bench, port: u16, width: Width, value: u64) -> Pause {
    b.set(Gpr::Rax, value);
    b.run([OUT(port, width)])
}

fn cmos(b: &mut Bench, at: u64, value: u64) {
    out(b, 0x70, Width::Byte, at);
    out(b, 0x71, Width::Byte, value);
}

/// Where the kernel finds the FACS.
fn facs(b: &Bench) -> Gpa {
    let memory = &b.vcpu.vm().memory;
    (0xe_0000..0x10_0000)
        .step_by(16)
        .map(Gpa)
        .find(|&at| memory.read_u32(at) == Ok(u32::from_le_bytes(*b"FACS")))
        .expect("a FACS")
}

#[test]
fn the_clocks_alarm_wakes_a_vm_from_s3() {
    let mut b = Bench::with_vcpus(2, 0);
    let vm = b.vcpu.vm().clone();
    let waking_vector = facs(&b) + 12;
    vm.memory.write_u32(waking_vector, 0x1_2345).expect("RAM");
    // RTC_EN, then SLP_EN with the type of S3.
    out(&mut b, 0x602, Width::Word, 0x400);
    let asleep = out(&mut b, 0x604, Width::Word, 0x2400);
    assert_eq!(asleep, Pause::Idle { until: None });
    assert_eq!(b.kicks.0[1].load(Ordering::Relaxed), 1, "the other one");
    assert_eq!(b.run([Exit::Cpuid]), Pause::Idle { until: None });
    assert_eq!(b.vcpu.counters()[Exit::Cpuid.index()], 0, "it sleeps");
    // An alarm each second, with its interrupt.
    let mut b = Bench::with_vcpus(2, 0);
    let vm = b.vcpu.vm().clone();
    vm.memory.write_u32(waking_vector, 0x1_2345).expect("RAM");
    for at in [1, 3, 5] {
        cmos(&mut b, at, 0xc0);
    }
    cmos(&mut b, 0xb, 0x22);
    out(&mut b, 0x602, Width::Word, 0x400);
    let Pause::Idle { until: Some(until) } = out(&mut b, 0x604, Width::Word, 0x2400) else {
        panic!("not asleep until the alarm");
    };
    NOW.set(until);
    b.run([Exit::Cpuid]);
    let state = &b.vcpu.hw.state;
    assert_eq!(state.cr0 & 1, 0, "real mode");
    let cs = state.segments[SegmentName::Cs as usize];
    assert_eq!((cs.selector, cs.base), (0x1234, 0x1_2340));
    assert_eq!(state.rip, 5 + 2, "behind the CPUID at the vector");
    let other = vm.apic_bus.inbox(VcpuId(1)).expect("a second one");
    assert!(other.has_pending(), "INIT of the other one");
    // WAK_STS and RTC_STS.
    let status = PortIo {
        port: 0x600,
        width: Width::Word,
        direction: Direction::Read,
        string: false,
    };
    b.run([Exit::PortIo(status)]);
    assert_eq!(b.get(Gpr::Rax) & 0x8400, 0x8400);
}

#[test]
fn a_sleep_without_a_vector_ends_in_a_reset() {
    let mut b = Bench::new();
    out(&mut b, 0x602, Width::Word, 0x100);
    out(&mut b, 0x604, Width::Word, 0x2400);
    let vm = b.vcpu.vm().clone();
    vm.press_power_button();
    assert_eq!(b.run([]), Pause::Ended);
    let reason = vm.take_end_reason().expect("a reason");
    assert_eq!(alloc::format!("{reason}"), "reset");
}

#[test]
fn an_init_of_the_boot_processor_follows_the_shutdown_code() {
    // INIT to oneself, by number: the xAPIC's ICR is memory, so the message is sent for it.
    let init = |b: &mut Bench| {
        let message = Message {
            destination: Destination::Physical(0),
            mode: DeliveryMode::Init,
            vector: 0,
            trigger: Trigger::Edge,
            assert: true,
        };
        b.vcpu.vm().apic_bus.send(&message, None);
        b.run([Exit::Cpuid])
    };
    let mut b = Bench::new();
    cmos(&mut b, 0x0f, 0x0a);
    let vm = b.vcpu.vm().clone();
    vm.memory.write_u32(Gpa(0x467), 0x0100_0010).expect("RAM");
    init(&mut b);
    let state = &b.vcpu.hw.state;
    let cs = state.segments[SegmentName::Cs as usize];
    assert_eq!((cs.selector, cs.base, state.rip), (0x100, 0x1000, 0x12));
    // Any other code is for firmware's start from the beginning.
    let mut b = Bench::new();
    assert_eq!(init(&mut b), Pause::Ended);
    let reason = b.vcpu.vm().take_end_reason().expect("a reason");
    assert_eq!(alloc::format!("{reason}"), "reset");
}

#[test]
fn xsetbv_is_there_only_with_osxsave() {
    let mut b = Bench::new();
    b.set(Gpr::Rcx, 0);
    b.set(Gpr::Rax, 1);
    b.set(Gpr::Rdx, 0);
    b.vcpu.hw.state.cr4 = 0;
    b.run([Exit::Xsetbv]);
    let undefined = Event::Exception {
        vector: 6,
        error_code: None,
    };
    assert_eq!(b.vcpu.hw.injected, [undefined]);
    b.vcpu.hw.state.cr4 = 1 << 18;
    b.run([Exit::Xsetbv]);
    assert_eq!(b.vcpu.hw.injected, [undefined]);
}

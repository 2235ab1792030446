//! Steal time, as the guest finds it in its memory.

use super::*;

const AT: u64 = 0x8040;

fn enable(b: &mut Bench, value: u64) -> usize {
    b.set(Gpr::Rcx, u64::from(number::KVM_STEAL_TIME));
    b.set(Gpr::Rax, value & 0xffff_ffff);
    b.set(Gpr::Rdx, value >> 32);
    let before = b.vcpu.hw.injected.len();
    b.run([Exit::MsrWrite]);
    b.vcpu.hw.injected.len() - before
}

/// Time, version, flags, and whether it was preempted.
fn record(b: &Bench) -> (u64, u32, u32, u8) {
    let mut bytes = [0; 20];
    b.vcpu.vm().memory.read(Gpa(AT), &mut bytes).unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let time = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    (time, word(8), word(12), bytes[16])
}

#[test]
fn the_guest_is_told_what_was_stolen() {
    let mut b = Bench::new();
    assert_eq!(enable(&mut b, AT | 1), 0);
    let (_, first, flags, _) = record(&b);
    assert_eq!((first % 2, flags), (0, 0));
    b.host.stolen_ns = 123_456_789_012;
    // The slice is over at the end: it could have gone on.
    assert_eq!(b.run([Exit::Cpuid]), Pause::SliceOver);
    let (time, second, _, preempted) = record(&b);
    assert_eq!((time, preempted), (123_456_789_012, 1));
    assert!(second > first && second.is_multiple_of(2));
    b.run([Exit::Cpuid]);
    assert!(
        record(&b).1 > second,
        "it runs again, and the guest is told so"
    );
    assert_eq!(enable(&mut b, 0), 0);
    let last = record(&b);
    b.host.stolen_ns += 1;
    b.run([Exit::Cpuid]);
    assert_eq!(record(&b), last, "it is off");
    // Who halts was not taken from its processor.
    assert_eq!(enable(&mut b, AT | 1), 0);
    assert!(matches!(b.run([Exit::Halt]), Pause::Idle { .. }));
    assert_eq!((record(&b).0, record(&b).3), (123_456_789_013, 0));
}

#[test]
fn reserved_bits_and_addresses_without_ram_are_refused() {
    for value in [AT | 3, AT | 0x20, 1 << 52 | 1, u64::MAX - 0x3e] {
        let mut b = Bench::new();
        assert_eq!(enable(&mut b, value), 1, "{value:#x}");
        b.set(Gpr::Rcx, u64::from(number::KVM_STEAL_TIME));
        b.run([Exit::MsrRead]);
        assert_eq!(b.get(Gpr::Rax), 0);
    }
}

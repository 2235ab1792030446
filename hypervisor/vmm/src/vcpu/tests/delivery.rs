//! Events whose delivery reaches outside RAM.

use super::*;
use mem::Gva;

const HOLE: u64 = 0xfd00_0000;

fn page_fault(code: u32) -> Event {
    Event::Exception {
        vector: 14,
        error_code: Some(code),
    }
}

fn invalid_opcode() -> Event {
    Event::Exception {
        vector: 6,
        error_code: None,
    }
}

/// Runs exits each of which has interrupted the delivery of an event; what the VM ended with.
fn interrupted(b: &mut Bench, exits: &[(Exit, Event)]) -> String {
    b.vcpu.hw.interrupted = exits.iter().map(|&(_, event)| event).collect();
    b.vcpu.hw.exits = exits.iter().map(|&(exit, _)| exit).collect();
    b.vcpu.hw.exits.push_back(out(0x501));
    b.host.until = now() + SLICE;
    b.vcpu.run(&mut b.host);
    let reason = b.vcpu.vm().take_end_reason();
    reason.map_or(String::new(), |reason| alloc::format!("{reason}"))
}

fn access(gpa: u64, page_walk: bool) -> Exit {
    Exit::NestedPageFault(NestedPageFault {
        gpa: Gpa(gpa),
        gva: Some(Gva(gpa)),
        write: false,
        fetch: false,
        page_walk,
    })
}

#[test]
fn gates_that_are_ones_shut_the_machine_down() {
    let mut b = Bench::new();
    b.vcpu.hw.state.idtr.base = HOLE;
    let text = interrupted(&mut b, &[(access(HOLE + 0x30, false), invalid_opcode())]);
    assert!(text.contains("triple fault"), "{text}");
    // A stack takes what is pushed nowhere: a PC would go on.
    let mut b = Bench::new();
    b.vcpu.hw.state.idtr.base = 0x1000;
    let text = interrupted(&mut b, &[(access(HOLE, false), invalid_opcode())]);
    assert!(text.contains("outside RAM"), "{text}");
}

#[test]
fn page_tables_that_are_ones_fault_in_the_delivery_and_beyond() {
    // PAE paging, of which the upper gibibyte's directory is in the hole; the IDT is mapped there.
    let paged = || {
        let mut b = Bench::new();
        let memory = &b.vcpu.vm().memory;
        for (n, entry) in [0, 0, 0, HOLE | 1_u64].into_iter().enumerate() {
            memory
                .write_u64(Gpa(0x1000 + 8 * n as u64), entry)
                .expect("RAM");
        }
        let state = &mut b.vcpu.hw.state;
        (state.cr3, state.cr4) = (0x1000, 1 << 5);
        state.cr0 |= 1 << 31;
        state.idtr.base = HOLE;
        b
    };
    let walk = access(HOLE + 0xfa0, true);
    let reserved = 0b1001;
    for (first, second) in [
        (Event::Interrupt(0x51), page_fault(reserved)),
        (Event::Nmi, page_fault(reserved)),
        (invalid_opcode(), page_fault(reserved)),
        (
            page_fault(0),
            Event::Exception {
                vector: 8,
                error_code: Some(0),
            },
        ),
    ] {
        let mut b = paged();
        interrupted(&mut b, &[(walk, first)]);
        assert_eq!(b.vcpu.hw.injected.last(), Some(&second), "{first:?}");
    }
    let double_fault = Event::Exception {
        vector: 8,
        error_code: Some(0),
    };
    let mut b = paged();
    let text = interrupted(&mut b, &[(walk, double_fault)]);
    assert!(text.contains("triple fault"), "{text}");
}

/// What the instruction itself reaches through such tables faults at it.
#[test]
fn a_walk_through_ones_is_the_instructions_page_fault() {
    let mut b = Bench::new();
    let rip = b.rip();
    let memory = &b.vcpu.vm().memory;
    // The lowest gibibyte one to one, in large pages; the next is in the hole.
    for n in 0..512 {
        memory
            .write_u64(Gpa(0x2000 + 8 * n), n << 21 | 0x83)
            .expect("RAM");
    }
    for (n, entry) in [0x2001, HOLE | 1, 0, 0].into_iter().enumerate() {
        memory
            .write_u64(Gpa(0x1000 + 8 * n as u64), entry)
            .expect("RAM");
    }
    // mov [0x40000000], eax
    memory.write(Gpa(rip), &[0xa3, 0, 0, 0, 0x40]).expect("RAM");
    let state = &mut b.vcpu.hw.state;
    (state.cr3, state.cr4) = (0x1000, 1 << 5);
    state.cr0 |= 1 << 31;
    b.run([access(HOLE, true)]);
    assert_eq!(b.vcpu.hw.injected, [page_fault(0b1011)]);
    assert_eq!(b.vcpu.hw.state.cr2, 0x4000_0000);
    assert_eq!(b.rip(), rip);
}

//! Tests of far calls and jumps through gates.

use virt::{CpuMode, Gpr, Registers, Segment, SegmentName, TaskSource, TaskSwitch};

use super::rare_tests::{
    CODE_32, CODE_64, DATA, GDT, USER_CODE, USER_DATA, bench, bench_32, fault,
};
use super::tests::{Bench, DEVICE};
use super::*;

/// Where gates are, behind the other descriptors; room for a wide one each.
const GATE: u16 = 0x50;
const TSS: u64 = 0x50_0000;
const STACK: u64 = 0x51_0000;

fn put(b: &mut Bench, low: u64, high: u64) {
    let at = GDT + u64::from(GATE);
    b.memory.write_u64(Gpa(at), low).expect("RAM");
    b.memory.write_u64(Gpa(at + 8), high).expect("RAM");
    let mut gdt = b.cpu.gdtr();
    gdt.limit = GATE + 15;
    b.cpu.set_gdtr(gdt);
}

fn call_gate(kind: u64, dpl: u64, selector: u16, offset: u64, parameters: u64) -> u64 {
    let rights = 1 << 15 | dpl << 13 | kind << 8;
    offset & 0xffff
        | u64::from(selector) << 16
        | parameters << 32
        | rights << 32
        | (offset >> 16 & 0xffff) << 48
}

fn set_cpl(b: &mut Bench, cpl: u8, code: u16) {
    let segments = &mut b.cpu.state.segments;
    let ss = &mut segments[SegmentName::Ss as usize];
    ss.rights = ss.rights.with_dpl(cpl);
    ss.selector = USER_DATA | u16::from(cpl);
    segments[SegmentName::Cs as usize].selector = code | u16::from(cpl);
    segments[SegmentName::Tr as usize] = Segment {
        selector: 0x70,
        base: TSS,
        limit: 103,
        rights: virt::AccessRights::new().with_kind(11).with_present(true),
    };
}

/// call far [rbx] with its operand in the device.
fn call(b: &mut Bench) -> Outcome {
    b.set_device(0, 0);
    b.set_device(8, GATE.into());
    b.run(&[0x48, 0xff, 0x1b])
}

#[test]
fn a_wide_call_gate_leads_to_the_stack_of_the_tss() {
    let mut b = bench();
    set_cpl(&mut b, 3, USER_CODE);
    b.memory.write_u64(Gpa(TSS + 4), STACK).expect("RAM");
    put(&mut b, call_gate(12, 3, CODE_64, 0x1234_5678, 0), 0x7f);
    let back = b.cpu.rip() + 3;
    assert_eq!(call(&mut b), Outcome::Jump(0x7f_1234_5678));
    assert_eq!(b.cpu.segment(SegmentName::Cs).selector, CODE_64);
    assert!(b.cpu.segment(SegmentName::Ss).rights.unusable());
    assert_eq!(b.cpu.cpl(), 0);
    let pushed = [1, 2, 3, 4].map(|n| b.memory.read_u64(Gpa(STACK - 8 * n)).expect("RAM"));
    let (user_ss, user_cs) = (USER_DATA | 3, USER_CODE | 3);
    assert_eq!(
        pushed,
        [user_ss.into(), DEVICE + 0x800, user_cs.into(), back]
    );
    assert_eq!(b.cpu.gpr(Gpr::Rsp), STACK - 32);
    // The same level keeps its stack.
    let mut b = bench();
    put(&mut b, call_gate(12, 0, CODE_64, 0x9000, 0), 0);
    assert_eq!(call(&mut b), Outcome::Jump(0x9000));
    assert_eq!(b.cpu.gpr(Gpr::Rsp), DEVICE + 0x7f0);
    // A jump goes there, too, but not inwards.
    let jump = [0x48, 0xff, 0x2b];
    assert_eq!(b.run(&jump), Outcome::Jump(0x9000));
    set_cpl(&mut b, 3, USER_CODE);
    put(&mut b, call_gate(12, 3, CODE_64, 0x9000, 0), 0);
    assert_eq!(b.run(&jump), fault(13, CODE_64.into()));
}

#[test]
fn call_gates_are_checked() {
    for (low, high, cpl, outcome) in [
        (
            call_gate(12, 0, CODE_64, 0, 0),
            0,
            3,
            fault(13, GATE.into()),
        ),
        (
            call_gate(12, 3, CODE_32, 0, 0),
            0,
            3,
            fault(13, CODE_32.into()),
        ),
        (call_gate(12, 3, DATA, 0, 0), 0, 3, fault(13, DATA.into())),
        (call_gate(12, 3, 0, 0, 0), 0, 3, fault(13, 0)),
        (
            call_gate(12, 3, CODE_64, 0, 0) & !(1 << 47),
            0,
            3,
            fault(11, GATE.into()),
        ),
        (
            call_gate(12, 3, CODE_64, 0, 0),
            1 << 40,
            3,
            fault(13, GATE.into()),
        ),
        (call_gate(12, 3, CODE_64, 0, 0), 0x8000, 3, fault(13, 0)),
        // Neither gates of 16 bits nor tasks in IA-32e mode.
        (call_gate(4, 3, CODE_64, 0, 0), 0, 3, fault(13, GATE.into())),
        (call_gate(5, 3, CODE_64, 0, 0), 0, 0, fault(13, GATE.into())),
        (call_gate(9, 3, CODE_64, 0, 0), 0, 0, fault(13, GATE.into())),
    ] {
        let mut b = bench();
        set_cpl(&mut b, cpl, if cpl == 3 { USER_CODE } else { CODE_64 });
        put(&mut b, low, high);
        let before = b.cpu.gpr(Gpr::Rsp);
        assert_eq!(call(&mut b), outcome, "{low:#x} {high:#x}");
        assert_eq!((b.cpu.gpr(Gpr::Rsp), b.cpu.cpl()), (before, cpl));
    }
    // The inner stack cannot take it: all is as before.
    let mut b = bench();
    set_cpl(&mut b, 3, USER_CODE);
    b.memory.write_u64(Gpa(TSS + 4), 5 << 30).expect("RAM");
    put(&mut b, call_gate(12, 3, CODE_64, 0, 0), 0);
    let outcome = call(&mut b);
    assert!(
        matches!(outcome, Outcome::Fault(e) if e.vector == 14),
        "{outcome:?}"
    );
    assert_eq!((b.cpu.gpr(Gpr::Rsp), b.cpu.cpl()), (DEVICE + 0x800, 3));
    // The TSS has no room for it.
    b.cpu.state.segments[SegmentName::Tr as usize].limit = 10;
    assert_eq!(call(&mut b), fault(10, 0x70));
}

#[test]
fn a_32_bit_gate_copies_parameters_and_checks_the_stack() {
    // call far [ebx]
    const CALL: [u8; 2] = [0xff, 0x1b];
    let make = |ss: u16| {
        let mut b = bench_32();
        set_cpl(&mut b, 3, 0);
        b.memory.write_u32(Gpa(TSS + 4), STACK as u32).expect("RAM");
        b.memory.write_u16(Gpa(TSS + 8), ss).expect("RAM");
        put(&mut b, call_gate(12, 3, CODE_32, 0x1234_5678, 2), 0);
        b.set_device(0, 0);
        b.set_device(4, GATE.into());
        b.set_device(0x800, 0x2222_2222_1111_1111);
        b
    };
    let mut b = make(DATA);
    let back = b.cpu.rip() + 2;
    assert_eq!(b.run(&CALL), Outcome::Jump(0x1234_5678));
    let pushed = [1, 2, 3, 4, 5, 6].map(|n| b.memory.read_u32(Gpa(STACK - 4 * n)).expect("RAM"));
    let (ss, esp) = (u32::from(USER_DATA | 3), (DEVICE + 0x800) as u32);
    assert_eq!(pushed, [ss, esp, 0x2222_2222, 0x1111_1111, 3, back as u32]);
    assert_eq!(b.cpu.segment(SegmentName::Ss).selector, DATA);
    assert_eq!((b.cpu.gpr(Gpr::Rsp), b.cpu.cpl()), (STACK - 24, 0));
    for (ss, wrong) in [
        (USER_DATA, USER_DATA),
        (DATA | 3, DATA),
        (CODE_32, CODE_32),
        (0, 0),
    ] {
        assert_eq!(make(ss).run(&CALL), fault(10, wrong.into()), "{ss:#x}");
    }
}

#[test]
fn tasks_are_left_to_the_caller() {
    let task = |selector, source, length| {
        Outcome::Task(TaskSwitch {
            selector,
            source,
            length,
            event: None,
        })
    };
    let mut b = bench_32();
    assert_eq!(b.cpu.mode(), CpuMode::Protected32);
    b.set_device(0, 0);
    b.set_device(4, GATE.into());
    let tss = |dpl| call_gate(9, dpl, 0, 0, 0);
    put(&mut b, tss(0), 0);
    assert_eq!(b.run(&[0xff, 0x1b]), task(GATE, TaskSource::Call, 2));
    assert_eq!(b.run(&[0xff, 0x2b]), task(GATE, TaskSource::Jump, 2));
    put(&mut b, call_gate(5, 0, 0x98, 0, 0), 0);
    assert_eq!(b.run(&[0xff, 0x2b]), task(0x98, TaskSource::Jump, 2));
    put(&mut b, call_gate(5, 0, 0x98, 0, 0) & !(1 << 47), 0);
    assert_eq!(b.run(&[0xff, 0x2b]), fault(11, GATE.into()));
    set_cpl(&mut b, 3, 0);
    put(&mut b, tss(0), 0);
    assert_eq!(b.run(&[0xff, 0x2b]), fault(13, GATE.into()));
    // IRET with NT: to where the link of the TSS says.
    b.memory.write_u16(Gpa(TSS), 0x88).expect("RAM");
    b.cpu.state.rflags = 2 | 1 << 14;
    assert_eq!(b.run(&[0xcf]), task(0x88, TaskSource::Iret, 1));
}

//! Tests of segment registers and far transfers whose operands or stack are device memory.

use virt::{CpuMode, Gpr, SegmentName, VirtualCpu};

use super::tests::{Bench, DEVICE, DONE};
use super::*;

/// Where the descriptor table is, in RAM.
const GDT: u64 = 0x40_0000;
/// Selectors in it.
const CODE_64: u16 = 0x08;
const DATA: u16 = 0x10;
const CODE_32: u16 = 0x18;
const USER_DATA: u16 = 0x20;
const USER_CODE: u16 = 0x28;
const ABSENT: u16 = 0x30;
const CONFORMING: u16 = 0x38;
const READ_ONLY: u16 = 0x40;
const BEYOND: u16 = 0x48;

fn bench() -> Bench {
    let mut b = Bench::new();
    for (n, entry) in [
        0,
        0x00af_9a00_0000_ffff_u64,
        0x00cf_9200_0000_ffff,
        0x00cf_9a00_0000_ffff,
        0x00cf_f200_0000_ffff,
        0x00af_fa00_0000_ffff,
        0x00cf_1200_0000_ffff,
        0x00af_9e00_0000_ffff,
        0x00cf_9000_0000_ffff,
    ]
    .into_iter()
    .enumerate()
    {
        let at = Gpa(GDT + 8 * n as u64);
        b.memory.write_u64(at, entry).expect("RAM");
    }
    b.cpu.set_gdtr(virt::DescriptorTable {
        base: GDT,
        limit: BEYOND - 1,
    });
    b.cpu.state.segments[SegmentName::Cs as usize].selector = CODE_64;
    b.cpu.set_gpr(Gpr::Rbx, DEVICE);
    b.cpu.set_gpr(Gpr::Rsp, DEVICE + 0x800);
    b
}

/// 32-bit code without paging.
fn bench_32() -> Bench {
    let mut b = bench();
    (b.cpu.state.cr0, b.cpu.state.efer) = (0x11, 0);
    let segments = &mut b.cpu.state.segments;
    for segment in segments.iter_mut() {
        segment.rights = segment.rights.with_long(false).with_default_big(true);
    }
    segments[SegmentName::Cs as usize].selector = CODE_32;
    b
}

fn fault(vector: u8, code: u32) -> Outcome {
    Outcome::Fault(Exception {
        vector,
        error_code: Some(code),
        cr2: None,
    })
}

fn selector(b: &Bench, name: SegmentName) -> u16 {
    b.cpu.segment(name).selector
}

#[test]
fn segment_registers_are_loaded_with_the_processors_checks() {
    const MOV_DS: [u8; 2] = [0x8e, 0x1b];
    const MOV_SS: [u8; 2] = [0x8e, 0x13];
    let mut b = bench();
    b.set_device(0, DATA.into());
    assert_eq!(b.run(&MOV_DS), DONE(&MOV_DS));
    let ds = b.cpu.segment(SegmentName::Ds);
    assert_eq!((ds.selector, ds.limit), (DATA, u32::MAX));
    let entry = b.memory.read_u64(Gpa(GDT + u64::from(DATA))).expect("RAM");
    assert_ne!(entry & 1 << 40, 0, "marked as accessed");
    for (bad, outcome) in [
        (BEYOND, fault(13, BEYOND.into())),
        (ABSENT, fault(11, ABSENT.into())),
        (4 | DATA, fault(13, u32::from(4 | DATA))),
    ] {
        b.set_device(0, bad.into());
        assert_eq!(b.run(&MOV_DS), outcome, "{bad:#x}");
        assert_eq!(selector(&b, SegmentName::Ds), DATA);
    }
    b.set_device(0, 3);
    assert_eq!(b.run(&MOV_DS), DONE(&MOV_DS));
    assert!(b.cpu.segment(SegmentName::Ds).rights.unusable());
    // SS takes data of its own level only; null in 64-bit code, but not at another level.
    for (value, outcome) in [
        (u64::from(DATA), DONE(&MOV_SS)),
        (u64::from(DATA | 3), fault(13, DATA.into())),
        (USER_DATA.into(), fault(13, USER_DATA.into())),
        (READ_ONLY.into(), fault(13, READ_ONLY.into())),
        (CODE_64.into(), fault(13, CODE_64.into())),
        (ABSENT.into(), fault(12, ABSENT.into())),
        (3, fault(13, 0)),
        (0, DONE(&MOV_SS)),
    ] {
        b.set_device(0, value);
        assert_eq!(b.run(&MOV_SS), outcome, "{value:#x}");
    }
    assert!(b.cpu.segment(SegmentName::Ss).rights.unusable());
    // CS cannot be loaded this way.
    let outcome = b.run(&[0x8e, 0x0b]);
    assert_eq!(outcome, Outcome::Fault(Exception::UNDEFINED_OPCODE));
    // POP FS: the stack pointer stays when the selector is bad.
    let pop_fs = [0x0f, 0xa1];
    b.set_device(0x800, BEYOND.into());
    assert_eq!(b.run(&pop_fs), fault(13, BEYOND.into()));
    assert_eq!(b.cpu.gpr(Gpr::Rsp), DEVICE + 0x800);
    b.set_device(0x800, USER_DATA.into());
    assert_eq!(b.run(&pop_fs), DONE(&pop_fs));
    assert_eq!(selector(&b, SegmentName::Fs), USER_DATA);
    assert_eq!(b.cpu.gpr(Gpr::Rsp), DEVICE + 0x808);
    // LGS RAX: a pointer of eight bytes and a selector.
    let lgs = [0x48, 0x0f, 0xb5, 0x03];
    b.set_device(0, 0x1234_5678_9abc);
    b.set_device(8, DATA.into());
    assert_eq!(b.run(&lgs), DONE(&lgs));
    assert_eq!(b.cpu.gpr(Gpr::Rax), 0x1234_5678_9abc);
    assert_eq!(selector(&b, SegmentName::Gs), DATA);
}

#[test]
fn real_mode_segments_keep_their_limit() {
    let mut b = bench_32();
    b.cpu.state.cr0 = 0x10;
    for segment in b.cpu.state.segments.iter_mut() {
        segment.rights = segment.rights.with_default_big(false);
    }
    b.set_device(0, 0xb800);
    // mov es, [ebx] with 32-bit addresses
    let code = [0x67, 0x8e, 0x03];
    assert_eq!(b.run(&code), DONE(&code));
    let es = b.cpu.segment(SegmentName::Es);
    assert_eq!(
        (es.selector, es.base, es.limit),
        (0xb800, 0xb_8000, u32::MAX)
    );
}

#[test]
fn far_jumps_and_calls() {
    let mut b = bench();
    // jmp far [rbx] with 32- and 64-bit offsets
    b.set_device(0, 0x18_1234_5678);
    b.set_device(4, CODE_32.into());
    assert_eq!(b.run(&[0xff, 0x2b]), Outcome::Jump(0x1234_5678));
    assert_eq!(b.cpu.mode(), CpuMode::Compatibility32);
    let mut b = bench();
    b.set_device(0, 0x7fff_1234_5678);
    b.set_device(8, CODE_64.into());
    assert_eq!(b.run(&[0x48, 0xff, 0x2b]), Outcome::Jump(0x7fff_1234_5678));
    b.set_device(0, 1 << 47);
    assert_eq!(b.run(&[0x48, 0xff, 0x2b]), fault(13, 0), "not canonical");
    b.set_device(8, USER_CODE.into());
    assert_eq!(b.run(&[0x48, 0xff, 0x2b]), fault(13, USER_CODE.into()));
    // call far [rbx] to conforming code: CS and the return address are on the stack.
    b.set_device(0, 0x9000);
    b.set_device(8, CONFORMING.into());
    let back = b.cpu.rip() + 3;
    assert_eq!(b.run(&[0x48, 0xff, 0x1b]), Outcome::Jump(0x9000));
    assert_eq!(selector(&b, SegmentName::Cs), CONFORMING);
    assert_eq!(b.cpu.gpr(Gpr::Rsp), DEVICE + 0x7f0);
    assert_eq!(
        (b.device_u64(0x7f0), b.device_u64(0x7f8)),
        (back, CODE_64.into())
    );
    // And back by RETF 16, which releases what the caller has pushed.
    assert_eq!(b.run(&[0x48, 0xca, 16, 0]), Outcome::Jump(back));
    assert_eq!(selector(&b, SegmentName::Cs), CODE_64);
    assert_eq!(b.cpu.gpr(Gpr::Rsp), DEVICE + 0x810);
    // The stack cannot take it: nothing has happened.
    b.cpu.set_gpr(Gpr::Rsp, 5 << 30);
    let outcome = b.run(&[0x48, 0xff, 0x1b]);
    assert!(
        matches!(outcome, Outcome::Fault(e) if e.vector == 14),
        "{outcome:?}"
    );
    assert_eq!(selector(&b, SegmentName::Cs), CODE_64);
    assert_eq!(b.cpu.gpr(Gpr::Rsp), 5 << 30);
}

#[test]
fn returns_to_an_outer_level() {
    const RETF: [u8; 2] = [0x48, 0xcb];
    const IRET: [u8; 2] = [0x48, 0xcf];
    let stack = |b: &mut Bench, items: &[u64]| {
        b.cpu.set_gpr(Gpr::Rsp, DEVICE + 0x800);
        for (n, item) in items.iter().enumerate() {
            b.set_device(0x800 + 8 * n, *item);
        }
    };
    let user_cs = u64::from(USER_CODE | 3);
    let user_ss = u64::from(USER_DATA | 3);
    let mut b = bench();
    let ds = &mut b.cpu.state.segments[SegmentName::Ds as usize];
    ds.rights = ds.rights.with_code_or_data(true).with_present(true);
    ds.selector = DATA;
    stack(&mut b, &[0x5000, user_cs, 0x6000, user_ss]);
    assert_eq!(b.run(&RETF), Outcome::Jump(0x5000));
    assert_eq!(b.cpu.cpl(), 3);
    assert_eq!(b.cpu.gpr(Gpr::Rsp), 0x6000);
    assert_eq!(
        selector(&b, SegmentName::Ds),
        0,
        "DS was the inner level's own"
    );
    // IRET, with flags: at level 3 the old IOPL stays, and IF because of it.
    let mut b = bench();
    b.cpu.state.rflags = 2;
    stack(&mut b, &[0x5000, user_cs, 0x3202, 0x6000, user_ss]);
    assert_eq!(b.run(&IRET), Outcome::Jump(0x5000));
    assert_eq!(b.cpu.rflags(), 0x3202);
    b.cpu.state.rflags = 2;
    // The page tables of the bench are a supervisor's and a user's.
    stack(&mut b, &[0x7000, user_cs, 0x3203, 0x6000, user_ss]);
    assert_eq!(b.run(&IRET), Outcome::Jump(0x7000));
    assert_eq!(b.cpu.rflags(), 3, "neither IOPL nor IF");
    // Not inwards, and not to a stack of another level.
    stack(&mut b, &[0x5000, CODE_64.into(), 2, 0x6000, DATA.into()]);
    assert_eq!(b.run(&IRET), fault(13, CODE_64.into()));
    stack(&mut b, &[0x5000, user_cs, 2, 0x6000, DATA.into()]);
    assert_eq!(b.run(&IRET), fault(13, DATA.into()));
    assert_eq!(b.cpu.gpr(Gpr::Rsp), DEVICE + 0x800);
    // In the same level 64-bit code gets RSP and SS, too. NT is an error there.
    let mut b = bench();
    stack(&mut b, &[0x5000, CODE_64.into(), 2, 0x1234, 0]);
    assert_eq!(b.run(&IRET), Outcome::Jump(0x5000));
    assert_eq!(b.cpu.gpr(Gpr::Rsp), 0x1234);
    b.cpu.state.rflags = 2 | 1 << 14;
    assert_eq!(b.run(&IRET), fault(13, 0));
}

#[test]
fn returns_of_32_bit_code_and_to_virtual_8086_mode() {
    let push = |b: &mut Bench, items: &[u32]| {
        b.cpu.set_gpr(Gpr::Rsp, DEVICE + 0x800);
        for (n, item) in items.iter().enumerate() {
            b.set_device(0x800 + 4 * n, u64::from(*item));
        }
    };
    let mut b = bench_32();
    push(&mut b, &[0x5000, CODE_32.into(), 0x246]);
    assert_eq!(b.run(&[0xcf]), Outcome::Jump(0x5000));
    assert_eq!(b.cpu.rflags(), 0x246);
    assert_eq!(b.cpu.gpr(Gpr::Rsp), DEVICE + 0x80c, "three items");
    push(
        &mut b,
        &[0x234, 0x1000, 0x2_0202, 0x8000, 0x2000, 3, 4, 5, 6],
    );
    assert_eq!(b.run(&[0xcf]), Outcome::Jump(0x234));
    assert_eq!(b.cpu.mode(), CpuMode::Virtual8086);
    assert_eq!(b.cpu.gpr(Gpr::Rsp), 0x8000);
    let cs = b.cpu.segment(SegmentName::Cs);
    assert_eq!((cs.selector, cs.base, cs.limit), (0x1000, 0x1_0000, 0xffff));
    assert_eq!(selector(&b, SegmentName::Ss), 0x2000);
    assert_eq!(selector(&b, SegmentName::Gs), 6);
    // There IRET needs IOPL 3.
    b.cpu.state.rip = 0x234;
    b.memory.write(Gpa(0x1_0234), &[0xcf]).expect("RAM");
    let outcome = emulate(&mut b.cpu, &b.memory, &mut b.device, &mut b.cache, None);
    assert_eq!(outcome, fault(13, 0));
    // Task returns are not known here.
    let mut b = bench_32();
    b.cpu.state.rflags = 2 | 1 << 14;
    assert!(matches!(b.run(&[0xcf]), Outcome::Unsupported(_)));
}

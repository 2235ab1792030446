//! Tests of what software hardly ever does to device memory: segment registers, far transfers, ports and flags in
//! code that lies there, the FPU.

use virt::{CpuMode, Gpr, Registers, SegmentName, Shadow};

use super::tests::{Bench, DEVICE, DONE};
use super::*;

/// Where the descriptor table is, in RAM.
pub(super) const GDT: u64 = 0x40_0000;
/// Selectors in it.
pub(super) const CODE_64: u16 = 0x08;
pub(super) const DATA: u16 = 0x10;
pub(super) const CODE_32: u16 = 0x18;
pub(super) const USER_DATA: u16 = 0x20;
pub(super) const USER_CODE: u16 = 0x28;
const ABSENT: u16 = 0x30;
const CONFORMING: u16 = 0x38;
const READ_ONLY: u16 = 0x40;
const BEYOND: u16 = 0x48;

pub(super) fn bench() -> Bench {
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
pub(super) fn bench_32() -> Bench {
    let mut b = bench();
    (b.cpu.state.cr0, b.cpu.state.efer) = (0x11, 0);
    let segments = &mut b.cpu.state.segments;
    for segment in segments.iter_mut() {
        segment.rights = segment.rights.with_long(false).with_default_big(true);
    }
    segments[SegmentName::Cs as usize].selector = CODE_32;
    b
}

pub(super) fn fault(vector: u8, code: u32) -> Outcome {
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
    assert_eq!(b.device.aftermath.shadow, Some(Shadow::MovSs));
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
    assert!(b.device.aftermath.interrupt_return);
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
}

/// VIF stands for IF where IOPL keeps a program from it.
#[test]
fn virtual_interrupt_flags() {
    const IF: u64 = 1 << 9;
    const IOPL: u64 = 3 << 12;
    const VM: u64 = 1 << 17;
    const VIF: u64 = 1 << 19;
    const VIP: u64 = 1 << 20;
    let no = fault(13, 0);
    let in_8086 = |cr4: u64, flags: u64| {
        let mut b = bench_32();
        b.cpu.state.rip = 0x234;
        (b.cpu.state.cr4, b.cpu.state.rflags) = (cr4, 2 | VM | flags);
        for (name, selector) in [(SegmentName::Cs, 0x1000), (SegmentName::Ss, 0x2000)] {
            let segment = super::segment::segment_8086(selector);
            b.cpu.set_segment(name, segment);
        }
        b.cpu.set_gpr(Gpr::Rsp, 0x100);
        b
    };
    let run = |b: &mut Bench, code: &[u8]| {
        b.memory.write(Gpa(0x1_0234), code).expect("RAM");
        emulate(&mut b.cpu, &b.memory, &mut b.device, &mut b.cache, None)
    };
    for (code, cr4, flags, outcome, after) in [
        (&[0xfb][..], 1, 0, Outcome::Done(1), VIF), // sti
        (&[0xfb], 1, VIP, no, VIP),
        (&[0xfb], 0, 0, no, 0),
        (&[0xfb], 0, IOPL, Outcome::Done(1), IOPL | IF),
        (&[0xfa], 1, VIF | VIP | IF, Outcome::Done(1), VIP | IF), // cli
        (&[0x9c], 1, 0, Outcome::Done(1), 0),                     // pushf
        (&[0x66, 0x9c], 1, 0, no, 0),
        (&[0x9c], 0, 0, no, 0),
    ] {
        let mut b = in_8086(cr4, flags);
        assert_eq!(run(&mut b, code), outcome, "{code:02x?} {cr4} {flags:#x}");
        assert_eq!(
            b.cpu.rflags(),
            2 | VM | after,
            "{code:02x?} {cr4} {flags:#x}"
        );
    }
    let mut b = in_8086(1, VIF);
    assert_eq!(run(&mut b, &[0x9c]), Outcome::Done(1));
    let pushed = b.memory.read_u64(Gpa(0x2_00fe)).expect("RAM") & 0xffff;
    assert_eq!(pushed, 2 | IF | IOPL, "IF is VIF, IOPL is 3");
    // popf, iret: what IF would become, VIF becomes; TF cannot be set, and an interrupt that waits comes first.
    for (flags, waits, outcome) in [
        (IF | 1, 0, true),
        (1, VIP, true),
        (IF | 1, VIP, false),
        (1 << 8, 0, false),
    ] {
        for (code, done) in [(0x9d, Outcome::Done(1)), (0xcf, Outcome::Jump(0x55))] {
            let mut b = in_8086(1, waits);
            let items = if code == 0xcf {
                0x55 | 0x1234 << 16 | flags << 32
            } else {
                flags
            };
            b.memory.write_u64(Gpa(0x2_0100), items).expect("RAM");
            let outcome = if outcome { done } else { no };
            assert_eq!(run(&mut b, &[code]), outcome, "{code:x} {flags:#x}");
            let set = if flags & IF != 0 { VIF } else { 0 };
            let after = if outcome == no { 0 } else { set | flags & 1 };
            assert_eq!(
                b.cpu.rflags(),
                2 | VM | waits | after,
                "{code:x} {flags:#x}"
            );
        }
    }
    // CR4.PVI: the same for CLI and STI in ring 3.
    let mut b = bench();
    b.cpu.state.segments[SegmentName::Ss as usize]
        .rights
        .set_dpl(3);
    assert_eq!(b.run(&[0xfb]), no);
    b.cpu.state.cr4 |= 2;
    assert_eq!(b.run(&[0xfb]), Outcome::Done(1));
    assert_eq!(b.cpu.rflags() & (VIF | IF), VIF);
}

#[test]
fn flags_loops_and_extensions() {
    let mut b = bench();
    for (code, before, after) in [
        (&[0xfd][..], 2, 1 << 10 | 2), // std
        (&[0xfc], 1 << 10 | 2, 2),     // cld
        (&[0xf9], 2, 3),               // stc
        (&[0xf8], 3, 2),               // clc
        (&[0xf5], 2, 3),               // cmc
        (&[0xf5], 3, 2),
        (&[0xfb], 2, 0x202), // sti
        (&[0xfa], 0x202, 2), // cli
    ] {
        b.cpu.state.rflags = before;
        assert_eq!(b.run(code), DONE(code));
        assert_eq!(b.cpu.rflags(), after, "{code:x?}");
        let shadow = (code == [0xfb]).then_some(Shadow::Sti);
        assert_eq!(core::mem::take(&mut b.device.aftermath).shadow, shadow);
    }
    b.cpu.state.rflags = 0x202;
    assert_eq!(b.run(&[0xfb]), Outcome::Done(1));
    assert_eq!(b.device.aftermath.shadow, None, "STI that changes nothing");
    // pushfq; popfq
    b.cpu.state.rflags = 2 | 1 << 16 | 1;
    assert_eq!(b.run(&[0x9c]), Outcome::Done(1));
    assert_eq!(b.device_u64(0x7f8), 3, "RF is not pushed");
    b.set_device(0x7f8, 0x3_3ed7);
    assert_eq!(b.run(&[0x9d]), Outcome::Done(1));
    assert_eq!(b.cpu.rflags(), 0x3ed7, "neither RF nor VM");
    // At level 3 neither IOPL nor IF change, and CLI is not for it.
    let user = &mut b.cpu.state.segments[SegmentName::Ss as usize];
    user.rights = user.rights.with_dpl(3);
    b.cpu.set_gpr(Gpr::Rsp, DEVICE + 0x7f8);
    b.cpu.state.rflags = 2;
    b.set_device(0x7f8, 0x3ed7);
    assert_eq!(b.run(&[0x9d]), Outcome::Done(1));
    assert_eq!(b.cpu.rflags(), 0x0cd7);
    assert_eq!(b.run(&[0xfa]), fault(13, 0));
    // lahf; sahf
    let mut b = bench();
    b.cpu.state.rflags = 0xd7;
    assert_eq!(b.run(&[0x9f]), Outcome::Done(1));
    assert_eq!(b.cpu.gpr(Gpr::Rax), 0xd700);
    b.cpu.state.rflags = 2;
    assert_eq!(b.run(&[0x9e]), Outcome::Done(1));
    assert_eq!(b.cpu.rflags(), 0xd7);
    // cwde; cqo
    b.cpu.set_gpr(Gpr::Rax, 0x1_8000);
    assert_eq!(b.run(&[0x98]), Outcome::Done(1));
    assert_eq!(b.cpu.gpr(Gpr::Rax), 0xffff_8000);
    assert_eq!(b.run(&[0x48, 0x99]), Outcome::Done(2));
    assert_eq!(b.cpu.gpr(Gpr::Rdx), 0);
    // loop, loopne, jecxz: back by two from behind themselves
    let here = b.cpu.rip();
    for (code, rcx, zero, taken, left) in [
        (&[0xe2, 0xfe][..], 2, false, true, 1),
        (&[0xe2, 0xfe], 1, false, false, 0),
        (&[0xe0, 0xfe], 5, true, false, 4),
        (&[0xe0, 0xfe], 5, false, true, 4),
        (&[0x67, 0xe3, 0xfd], 1 << 32, false, true, 1 << 32),
        (&[0xe3, 0xfe], 1 << 32, false, false, 1 << 32),
    ] {
        b.cpu.set_gpr(Gpr::Rcx, rcx);
        b.cpu.state.rflags = if zero { 0x42 } else { 2 };
        let expected = if taken {
            Outcome::Jump(here)
        } else {
            DONE(code)
        };
        assert_eq!(b.run(code), expected, "{code:x?}");
        assert_eq!(b.cpu.gpr(Gpr::Rcx), left, "{code:x?}");
    }
}

#[test]
fn ports_of_code_that_is_not_privileged() {
    const TSS: u64 = 0x50_0000;
    let mut b = bench();
    b.cpu.set_gpr(Gpr::Rax, !0);
    // in al, 0x60; in eax, dx
    assert_eq!(b.run(&[0xe4, 0x60]), Outcome::Done(2));
    assert_eq!(b.cpu.gpr(Gpr::Rax), !0xff | 1);
    assert_eq!(b.run(&[0xed]), Outcome::Done(1));
    assert_eq!(b.cpu.gpr(Gpr::Rax), 2);
    let segments = &mut b.cpu.state.segments;
    let user = &mut segments[SegmentName::Ss as usize];
    user.rights = user.rights.with_dpl(3);
    segments[SegmentName::Tr as usize] = virt::Segment {
        selector: 0,
        base: TSS,
        limit: 103 + 17,
        rights: virt::AccessRights::new().with_kind(11).with_present(true),
    };
    // The map is behind the TSS: of 128 ports 0x61 and 0x63 are allowed.
    b.memory.write_u16(Gpa(TSS + 102), 104).expect("RAM");
    b.memory.write(Gpa(TSS + 104), &[0xff; 17]).expect("RAM");
    b.memory
        .write_u8(Gpa(TSS + 104 + 12), !0b1010)
        .expect("RAM");
    b.cpu.set_gpr(Gpr::Rdx, 0x63);
    for (code, allowed) in [
        (&[0xe4, 0x61][..], true),
        (&[0xe4, 0x60], false),
        (&[0xec], true),
        (&[0xed], false),
        (&[0xe6, 0x61], true),
        (&[0xe4, 0x80], false),
    ] {
        let expected = if allowed { DONE(code) } else { fault(13, 0) };
        assert_eq!(b.run(code), expected, "{code:x?}");
    }
    b.cpu.state.rflags |= 3 << 12;
    assert_eq!(b.run(&[0xe4, 0x80]), Outcome::Done(2), "IOPL 3");
}

#[test]
fn the_fpus_state_goes_to_a_device_and_back() {
    let mut b = bench();
    for (n, byte) in b.cpu.fpu.iter_mut().enumerate() {
        *byte = n as u8;
    }
    let mask = 0xffff_u32.to_le_bytes();
    b.cpu.fpu[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    b.cpu.fpu[28..32].copy_from_slice(&mask);
    let stored = b.cpu.fpu;
    // fnstcw, fnstsw, stmxcsr
    for (code, value) in [
        (&[0xd9, 0x3b][..], 0x0100),
        (&[0xdd, 0x3b], 0x0302),
        (&[0x0f, 0xae, 0x1b], 0x1f80),
    ] {
        b.set_device(0, 0);
        assert_eq!(b.run(code), DONE(code));
        assert_eq!(b.device_u64(0), value, "{code:x?}");
    }
    // fxsave64; fxrstor64
    let save = [0x48, 0x0f, 0xae, 0x03];
    let restore = [0x48, 0x0f, 0xae, 0x0b];
    assert_eq!(b.run(&save), DONE(&save));
    assert_eq!(b.device.bytes[..416], stored[..416]);
    b.cpu.fpu[..416].fill(0);
    b.cpu.fpu[28..32].copy_from_slice(&mask);
    assert_eq!(b.run(&restore), DONE(&restore));
    assert_eq!(b.cpu.fpu[..24], stored[..24]);
    assert_eq!(b.cpu.fpu[32..416], stored[32..416]);
    // ldmxcsr
    b.set_device(0, 0x9fc0);
    assert_eq!(b.run(&[0x0f, 0xae, 0x13]), Outcome::Done(3));
    assert_eq!(b.cpu.fpu[24..28], 0x9fc0_u32.to_le_bytes());
    b.set_device(0, 0x1_0000);
    assert_eq!(b.run(&[0x0f, 0xae, 0x13]), fault(13, 0), "a bit too many");
    b.cpu.set_gpr(Gpr::Rbx, DEVICE + 8);
    assert_eq!(b.run(&save), fault(13, 0), "not aligned");
    b.cpu.state.cr0 |= 1 << 3;
    assert_eq!(b.run(&save), Outcome::Fault(Exception::NO_FPU));
}

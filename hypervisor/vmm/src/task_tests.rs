//! Tests of task switches: between two tasks in fake memory, and what each bad descriptor gives.

use alloc::boxed::Box;

use mem::{Gpa, fake::FakeMemory, guest::pc_layout};
use proptest::prelude::*;
use virt::{CpuState, Registers};

use super::*;
use crate::{
    cpuid::{CpuModel, CpuidPolicy, CpuidResult},
    fake::FakeCpu,
};

const GDT: u64 = 0x1000;
const OLD_TSS: u64 = 0x2000;
const NEW_TSS: u64 = 0x3000;
const SMALL_TSS: u64 = 0x4000;
const CODE: u16 = 0x08;
const DATA: u16 = 0x10;
const OLD: u16 = 0x18;
const NEW: u16 = 0x20;
const SMALL: u16 = 0x28;
const ABSENT: u16 = 0x30;
const LDT_SELECTOR: u16 = 0x38;

fn host(leaf: u32, _: u32) -> CpuidResult {
    match leaf {
        0 => CpuidResult {
            eax: 7,
            ..Default::default()
        },
        0x8000_0000 => CpuidResult {
            eax: 0x8000_0008,
            ..Default::default()
        },
        _ => CpuidResult {
            eax: 0x3028,
            ..Default::default()
        },
    }
}

struct Bench {
    cpu: FakeCpu,
    memory: GuestMemory,
    policy: CpuidPolicy,
}

fn descriptor(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24) << 56
}

impl Bench {
    fn new() -> Self {
        let fake: &'static FakeMemory = Box::leak(Box::new(FakeMemory::new(8 << 20)));
        let memory = GuestMemory::allocate(fake, 1, &pc_layout(1 << 20)).expect("RAM");
        let policy = CpuidPolicy::new(&host, 1, &CpuModel::default(), true).expect("a model");
        let mut state = CpuState::reset();
        state.cr0 = 0x11;
        state.rip = 0x500;
        state.gdtr = DescriptorTable {
            base: GDT,
            limit: 0x3f,
        };
        let mut cpu = FakeCpu::new(state);
        let entries = [
            0,
            descriptor(0, 0xf_ffff, 0x9b, 0xc),
            descriptor(0, 0xf_ffff, 0x93, 0xc),
            descriptor(OLD_TSS, 0x67, 0x8b, 0),
            descriptor(NEW_TSS, 0x67, 0x89, 0),
            descriptor(SMALL_TSS, 0x2b, 0x81, 0),
            descriptor(NEW_TSS, 0x67, 0x09, 0),
            descriptor(0x5000, 0xf, 0x82, 0),
        ];
        for (index, entry) in entries.into_iter().enumerate() {
            memory
                .write_u64(Gpa(GDT + 8 * index as u64), entry)
                .expect("RAM");
        }
        for (name, raw, selector) in [
            (SegmentName::Cs, entries[1], CODE),
            (SegmentName::Ss, entries[2], DATA),
            (SegmentName::Ds, entries[2], DATA),
            (SegmentName::Es, entries[2], DATA),
            (SegmentName::Fs, entries[2], DATA),
            (SegmentName::Gs, entries[2], DATA),
            (SegmentName::Tr, entries[3], OLD),
        ] {
            let descriptor = Descriptor { raw, at: Gva(0) };
            cpu.set_segment(name, descriptor.segment(selector));
        }
        let mut bench = Bench {
            cpu,
            memory,
            policy,
        };
        bench.fill(NEW_TSS, Format::Large);
        bench.fill(SMALL_TSS, Format::Small);
        bench
    }

    /// A good task at 0x7000 with its stack at 0x9000.
    fn fill(&mut self, at: u64, format: Format) {
        let mut tss = Tss::new(format);
        tss.set_register(IP, 0x7000);
        tss.set_register(FLAGS, 0x202);
        for index in 0..8 {
            tss.set_register(FIRST_GPR + index, 0x1110 + index as u32);
        }
        tss.set_register(FIRST_GPR + 4, 0x9000);
        for index in 0..format.segments() {
            let selector = if index == 1 { CODE } else { DATA };
            tss.set_register(FIRST_SEGMENT + index, selector.into());
        }
        self.memory
            .write(Gpa(at), &tss.bytes[..format.bytes()])
            .expect("RAM");
    }

    fn switch(&mut self, selector: u16, source: TaskSource, event: Option<Event>) -> Outcome {
        let context = control::Context {
            policy: &self.policy,
            memory: &self.memory,
        };
        let length = if event.is_some() { 0 } else { 7 };
        let request = TaskSwitch {
            selector,
            source,
            length,
            event,
        };
        switch(&mut self.cpu, context, &request)
    }

    fn u32(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.memory.read(Gpa(at), &mut bytes).expect("RAM");
        u32::from_le_bytes(bytes)
    }

    fn set_u32(&self, at: u64, value: u32) {
        self.memory.write_u32(Gpa(at), value).expect("RAM");
    }

    fn busy(&self, selector: u16) -> bool {
        self.u32(GDT + u64::from(selector) + 4) & 1 << 9 != 0
    }
}

fn fault(vector: u8, code: u32) -> Outcome {
    Outcome::Fault(Exception {
        vector,
        error_code: Some(code),
        cr2: None,
    })
}

#[test]
fn a_jump_stores_the_old_task_and_loads_the_new() {
    let mut b = Bench::new();
    b.cpu.set_gpr(Gpr::Rbx, 0xb0b0);
    b.cpu.set_dr7(0x455);
    assert_eq!(b.switch(NEW, TaskSource::Jump, None), Outcome::Done);
    assert_eq!((b.cpu.rip(), b.cpu.rflags()), (0x7000, 0x202));
    assert_eq!((b.cpu.gpr(Gpr::Rax), b.cpu.gpr(Gpr::Rsp)), (0x1110, 0x9000));
    assert_eq!(b.cpu.segment(SegmentName::Cs).limit, u32::MAX);
    assert_eq!(b.cpu.segment(SegmentName::Tr).rights.kind(), 0xb);
    assert_eq!(b.cpu.cr0() & CR0_TS, CR0_TS);
    assert_eq!(b.cpu.dr7(), 0x400, "local breakpoints end");
    assert!(b.busy(NEW) && !b.busy(OLD));
    assert_eq!(b.u32(OLD_TSS + 32), 0x507, "behind the instruction");
    assert_eq!(b.u32(OLD_TSS + 52), 0xb0b0);
    assert_eq!(b.u32(OLD_TSS + 76), u32::from(CODE));
}

#[test]
fn a_call_nests_and_an_iret_comes_back() {
    let mut b = Bench::new();
    assert_eq!(b.switch(NEW, TaskSource::Call, None), Outcome::Done);
    assert_eq!(b.cpu.rflags(), 0x202 | RFLAGS_NT);
    assert_eq!(b.u32(NEW_TSS) & 0xffff, u32::from(OLD), "the link");
    assert!(b.busy(NEW) && b.busy(OLD));
    assert_eq!(b.switch(OLD, TaskSource::Iret, None), Outcome::Done);
    assert_eq!(b.cpu.rip(), 0x507);
    assert!(!b.busy(NEW) && b.busy(OLD));
    assert_eq!(
        b.u32(NEW_TSS + 36),
        0x202,
        "NT is clear in what IRET stores"
    );
}

#[test]
fn a_16_bit_task_and_back() {
    let mut b = Bench::new();
    b.cpu.set_gpr(Gpr::Rax, 0x1234_5678);
    assert_eq!(b.switch(SMALL, TaskSource::Call, None), Outcome::Done);
    assert_eq!((b.cpu.rip(), b.cpu.gpr(Gpr::Rcx)), (0x7000, 0x1111));
    assert!(b.cpu.segment(SegmentName::Fs).rights.unusable());
    assert_eq!(b.cpu.segment(SegmentName::Tr).rights.kind(), 3);
    assert_eq!(b.switch(OLD, TaskSource::Iret, None), Outcome::Done);
    assert_eq!(b.cpu.gpr(Gpr::Rax), 0x1234_5678);
    assert_eq!(b.u32(SMALL_TSS + 14) & 0xffff, 0x7007);
}

#[test]
fn an_exception_through_a_gate_pushes_its_error_code() {
    let mut b = Bench::new();
    let event = Event::Exception {
        vector: 13,
        error_code: Some(0xabc),
    };
    assert_eq!(b.switch(NEW, TaskSource::Gate, Some(event)), Outcome::Done);
    assert_eq!(b.cpu.gpr(Gpr::Rsp), 0x8ffc);
    assert_eq!(b.u32(0x8ffc), 0xabc);
    assert_eq!(b.u32(OLD_TSS + 32), 0x500, "at the instruction");
    assert_eq!(b.cpu.rflags() & RFLAGS_NT, RFLAGS_NT);
}

#[test]
fn the_debug_flag_of_a_tss_traps() {
    let mut b = Bench::new();
    b.set_u32(NEW_TSS + 100, 1);
    assert_eq!(b.switch(NEW, TaskSource::Jump, None), Outcome::Trap);
}

#[test]
fn virtual_8086_tasks_have_segments_by_their_selectors() {
    let mut b = Bench::new();
    b.set_u32(NEW_TSS + 36, 0x2_0202);
    b.set_u32(NEW_TSS + 76, 0x1234);
    assert_eq!(b.switch(NEW, TaskSource::Call, None), Outcome::Done);
    let cs = b.cpu.segment(SegmentName::Cs);
    assert_eq!((cs.base, cs.limit, cs.rights.dpl()), (0x1_2340, 0xffff, 3));
    assert_eq!(b.switch(OLD, TaskSource::Iret, None), Outcome::Done);
    assert_eq!(b.cpu.segment(SegmentName::Cs).selector, CODE);
}

#[test]
fn bad_tss_descriptors_fault_in_the_old_task() {
    use TaskSource::{Iret, Jump};
    for (selector, source, vector) in [
        (ABSENT, Jump, NP),
        (OLD, Jump, GP),
        (NEW, Iret, TS),
        (CODE, Jump, GP),
        (0x58, Jump, GP),
        (0x58, Iret, TS),
        (LDT_SELECTOR, Jump, GP),
        (4 | NEW, Jump, GP),
    ] {
        let mut b = Bench::new();
        let code = u32::from(selector & !3);
        assert_eq!(
            b.switch(selector, source, None),
            fault(vector, code),
            "{selector:#x}"
        );
        assert_eq!((b.cpu.rip(), b.busy(OLD)), (0x500, true));
        assert_eq!(b.cpu.segment(SegmentName::Tr).selector, OLD);
    }
    let mut b = Bench::new();
    b.set_u32(GDT + u64::from(NEW), (NEW_TSS << 16) as u32 | 0x66);
    assert_eq!(b.switch(NEW, TaskSource::Jump, None), fault(TS, NEW.into()));
}

#[test]
fn bad_segments_fault_in_the_new_task() {
    // (offset in the TSS, selector, vector)
    for (at, selector, vector) in [
        (76, 0, TS),
        (76, DATA, TS),
        (76, 0x58, TS),
        (80, 0, TS),
        (80, CODE, TS),
        (80, DATA | 3, TS),
        (84, OLD, TS),
        (96, CODE, TS),
        (84, 0x0c, TS),
    ] {
        let mut b = Bench::new();
        b.set_u32(NEW_TSS + at, selector.into());
        let code = u32::from(selector & !3);
        let got = b.switch(NEW, TaskSource::Jump, None);
        assert_eq!(got, fault(vector, code), "{at} {selector:#x}");
        assert_eq!(b.cpu.segment(SegmentName::Tr).selector, NEW);
        assert_eq!(b.cpu.rip(), 0x7000);
    }
    for (at, vector) in [(76, NP), (80, SS), (88, NP)] {
        let mut b = Bench::new();
        let access: u64 = if at == 76 { 0x1b } else { 0x13 };
        let raw = descriptor(0, 0xf_ffff, access, 0xc);
        b.memory
            .write_u64(Gpa(GDT + u64::from(ABSENT)), raw)
            .expect("RAM");
        b.set_u32(NEW_TSS + at, ABSENT.into());
        let got = b.switch(NEW, TaskSource::Jump, None);
        assert_eq!(got, fault(vector, ABSENT.into()), "{at}");
    }
}

#[test]
fn faults_in_the_delivery_of_an_exception_are_double() {
    let gp = Event::Exception {
        vector: 13,
        error_code: Some(0),
    };
    let mut b = Bench::new();
    assert_eq!(b.switch(ABSENT, TaskSource::Gate, Some(gp)), fault(8, 0));
    let df = Event::Exception {
        vector: 8,
        error_code: Some(0),
    };
    let mut b = Bench::new();
    assert_eq!(
        b.switch(ABSENT, TaskSource::Gate, Some(df)),
        Outcome::TripleFault
    );
    let mut b = Bench::new();
    let irq = Some(Event::Interrupt(0x30));
    let code = u32::from(ABSENT) | EXTERNAL;
    assert_eq!(b.switch(ABSENT, TaskSource::Gate, irq), fault(NP, code));
}

proptest! {
    /// Whatever stands in the tables: no panic.
    #[test]
    fn any_tables_are_harmless(
        words in proptest::collection::vec(any::<u64>(), 16),
        tss in proptest::collection::vec(any::<u8>(), 104),
        selector in 0u16..0x48,
        gate in any::<bool>(),
        at in 0u64..0x1_0000_0000,
    ) {
        let mut b = Bench::new();
        for (index, word) in words.into_iter().enumerate() {
            b.memory.write_u64(Gpa(GDT + 8 * index as u64), word).expect("RAM");
        }
        b.memory.write(Gpa(NEW_TSS), &tss).expect("RAM");
        let at = descriptor(at, 0x67, 0x89, 0);
        b.memory.write_u64(Gpa(GDT + 0x40), at).expect("RAM");
        let event = gate.then_some(Event::Exception { vector: 14, error_code: Some(2) });
        let source = if gate { TaskSource::Gate } else { TaskSource::Call };
        b.switch(selector, source, event);
    }
}

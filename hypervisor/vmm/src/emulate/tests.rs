//! Tests of the instruction emulator: each instruction on device memory, and its faults.

use alloc::{boxed::Box, vec, vec::Vec};

use mem::{
    Gpa, Width,
    fake::FakeMemory,
    guest::{GuestMemory, pc_layout},
};
use proptest::prelude::*;
use virt::{CpuState, Gpr, Registers, SegmentName};

use super::{
    alu::{Alu, RFLAGS_CF, RFLAGS_OF, compute},
    *,
};
use crate::fake::FakeCpu;

const CODE: u64 = 0x10_0000;
const TABLES: u64 = 0x20_0000;
const DATA: u64 = 0x30_0000;
/// Linear and physical address of a device register file.
pub(super) const DEVICE: u64 = 0xfec0_0000;

/// A device of 4 KiB of plain registers, and ports that count up.
pub(super) struct Device {
    pub(super) bytes: Vec<u8>,
    log: Vec<(bool, u64, Width, u64)>,
    next_port_value: u32,
    pub(super) aftermath: Aftermath,
}

impl Platform<FakeCpu> for Device {
    fn mmio_read(&mut self, _: &mut FakeCpu, gpa: Gpa, width: Width) -> u64 {
        let at = (gpa.0 & 0xff8) as usize + (gpa.0 & 7) as usize;
        let mut value = [0; 8];
        let end = (at + width.bytes()).min(self.bytes.len());
        value[..end - at].copy_from_slice(&self.bytes[at..end]);
        self.log.push((false, gpa.0, width, 0));
        u64::from_le_bytes(value)
    }
    fn mmio_write(&mut self, _: &mut FakeCpu, gpa: Gpa, width: Width, value: u64) {
        let at = (gpa.0 & 0xfff) as usize;
        let end = (at + width.bytes()).min(self.bytes.len());
        self.bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
        self.log.push((true, gpa.0, width, value));
    }
    fn port_read(&mut self, _port: u16, _width: Width) -> u32 {
        self.next_port_value += 1;
        self.next_port_value
    }
    fn port_write(&mut self, port: u16, width: Width, value: u32) {
        self.log
            .push((true, u64::from(port), width, u64::from(value)));
    }
    fn control_read(&mut self, cpu: &mut FakeCpu, cr: u8) -> u64 {
        if cr == 0 { cpu.cr0() } else { 0x55 }
    }
    fn physical_bits(&self) -> u8 {
        40
    }
    fn aftermath(&mut self, aftermath: Aftermath) {
        self.aftermath = aftermath;
    }
    fn control_write(&mut self, cpu: &mut FakeCpu, cr: u8, value: u64) -> Result<(), Exception> {
        match cr {
            0 => cpu.set_cr0(value),
            4 => return Err(Exception::GENERAL_PROTECTION),
            _ => {}
        }
        Ok(())
    }
}

pub(super) struct Bench {
    pub cpu: FakeCpu,
    pub memory: GuestMemory,
    pub device: Device,
    pub cache: DecodeCache,
}

impl Bench {
    /// 64-bit mode, the first 4 GiB mapped one to one by 1 GiB pages, RAM of 16 MiB.
    pub(super) fn new() -> Self {
        let host: &'static FakeMemory = Box::leak(Box::new(FakeMemory::new(64 << 20)));
        let memory = GuestMemory::allocate(host, 1, &pc_layout(16 << 20)).unwrap();
        memory
            .write_u64(Gpa(TABLES), (TABLES + 0x1000) | 7)
            .unwrap();
        for n in 0..4u64 {
            memory
                .write_u64(Gpa(TABLES + 0x1000 + n * 8), (n << 30) | 0x87)
                .unwrap();
        }
        let device = Device {
            bytes: vec![0; 4096],
            log: Vec::new(),
            next_port_value: 0,
            aftermath: Aftermath::default(),
        };
        Bench {
            cpu: FakeCpu::long_mode(CODE, TABLES),
            memory,
            device,
            cache: DecodeCache::default(),
        }
    }

    pub(super) fn run(&mut self, code: &[u8]) -> Outcome {
        self.memory.write(Gpa(self.cpu.rip()), code).unwrap();
        emulate(
            &mut self.cpu,
            &self.memory,
            &mut self.device,
            &mut self.cache,
            None,
        )
    }

    pub(super) fn device_u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.device.bytes[at..at + 8].try_into().unwrap())
    }

    pub(super) fn set_device(&mut self, at: usize, value: u64) {
        self.device.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
}

pub(super) const DONE: fn(&[u8]) -> Outcome = |code| Outcome::Done(code.len() as u8);

#[test]
fn mov_in_all_widths() {
    let mut b = Bench::new();
    b.cpu.set_gpr(Gpr::Rbx, DEVICE);
    b.cpu.set_gpr(Gpr::Rax, 0x1122_3344_5566_7788);
    for (code, expected) in [
        (&[0x88, 0x03][..], 0x88),                         // mov [rbx], al
        (&[0x66, 0x89, 0x03], 0x7788),                     // mov [rbx], ax
        (&[0x89, 0x03], 0x5566_7788),                      // mov [rbx], eax
        (&[0x48, 0x89, 0x03], 0x1122_3344_5566_7788),      // mov [rbx], rax
        (&[0x88, 0x23], 0x77),                             // mov [rbx], ah
        (&[0xc7, 0x03, 1, 2, 3, 4], 0x0403_0201),          // mov dword [rbx], imm
        (&[0x48, 0xc7, 0x03, 0xff, 0xff, 0xff, 0xff], !0), // mov qword [rbx], -1
    ] {
        b.set_device(0, 0);
        assert_eq!(b.run(code), DONE(code));
        assert_eq!(b.device_u64(0), expected, "{code:x?}");
    }
    b.set_device(0, 0xffee_ddcc_bbaa_9988);
    for (code, expected) in [
        (&[0x8a, 0x03][..], 0x1122_3344_5566_7788), // mov al, [rbx]
        (&[0x8b, 0x03], 0xbbaa_9988),               // mov eax, [rbx]
        (&[0x0f, 0xb6, 0x03], 0x88),                // movzx eax, byte [rbx]
        (&[0x48, 0x0f, 0xbe, 0x03], 0xffff_ffff_ffff_ff88), // movsx rax, byte [rbx]
        (&[0x48, 0x63, 0x03], 0xffff_ffff_bbaa_9988), // movsxd rax, dword [rbx]
    ] {
        assert_eq!(b.run(code), DONE(code));
        assert_eq!(b.cpu.gpr(Gpr::Rax), expected, "{code:x?}");
    }
}

#[test]
fn read_modify_write_sets_flags() {
    let mut b = Bench::new();
    b.cpu.set_gpr(Gpr::Rbx, DEVICE);
    b.set_device(0, 0xff);
    assert_eq!(b.run(&[0x80, 0x03, 0x01]), Outcome::Done(3)); // add byte [rbx], 1
    assert_eq!(b.device_u64(0), 0);
    assert_eq!(b.cpu.rflags() & 0x8d5, 0x55, "ZF, PF, AF, CF");
    b.set_device(0, 0x80);
    b.run(&[0x80, 0x2b, 0x01]); // sub byte [rbx], 1
    assert_eq!(b.cpu.rflags() & 0x8d5, 0x810, "OF, AF");
    b.run(&[0xf6, 0x03, 0x80]); // test byte [rbx], 0x80
    assert_eq!(b.cpu.rflags() & 0x8d5, 0x44, "0x7f & 0x80: ZF, PF");
    b.cpu.set_gpr(Gpr::Rcx, 3);
    b.set_device(8, 0);
    b.run(&[0x48, 0x0f, 0xab, 0x4b, 0x08]); // bts qword [rbx+8], rcx
    assert_eq!(b.device_u64(8), 8);
    b.cpu.set_gpr(Gpr::Rax, 8);
    b.cpu.set_gpr(Gpr::Rdx, 0x77);
    b.run(&[0x48, 0x0f, 0xb1, 0x53, 0x08]); // cmpxchg [rbx+8], rdx
    assert_eq!(b.device_u64(8), 0x77);
    b.run(&[0x87, 0x53, 0x08]); // xchg edx, [rbx+8]
    assert_eq!(b.cpu.gpr(Gpr::Rdx), 0x77);
}

#[test]
fn rep_string_to_and_from_device() {
    let mut b = Bench::new();
    b.memory.write(Gpa(DATA), b"plinth!!").unwrap();
    b.cpu.set_gpr(Gpr::Rsi, DATA);
    b.cpu.set_gpr(Gpr::Rdi, DEVICE);
    b.cpu.set_gpr(Gpr::Rcx, 2);
    assert_eq!(b.run(&[0xf3, 0xa5]), Outcome::Done(2)); // rep movsd
    assert_eq!(&b.device.bytes[..8], b"plinth!!");
    assert_eq!((b.cpu.gpr(Gpr::Rcx), b.cpu.gpr(Gpr::Rdi)), (0, DEVICE + 8));
    b.cpu.set_gpr(Gpr::Rcx, u64::from(MAX_ITERATIONS) + 1);
    b.cpu.set_gpr(Gpr::Rdi, DATA);
    assert_eq!(b.run(&[0xf3, 0x6c]), Outcome::Again); // rep insb
    assert_eq!(b.cpu.gpr(Gpr::Rcx), 1);
    assert_eq!(b.run(&[0xf3, 0x6c]), Outcome::Done(2));
    assert_eq!(
        b.memory
            .read_u8(Gpa(DATA + u64::from(MAX_ITERATIONS)))
            .unwrap(),
        (MAX_ITERATIONS + 1) as u8,
        "the last value"
    );
    b.cpu.set_gpr(Gpr::Rcx, 0);
    assert_eq!(b.run(&[0xf3, 0xa4]), Outcome::Done(2), "nothing to do");
}

#[test]
fn faults_leave_registers_alone() {
    let mut b = Bench::new();
    b.cpu.set_gpr(Gpr::Rbx, 5 << 30); // not mapped
    b.cpu.set_gpr(Gpr::Rax, 7);
    let fault = Exception {
        vector: 14,
        error_code: Some(0),
        cr2: Some(5 << 30),
    };
    assert_eq!(b.run(&[0x8b, 0x03]), Outcome::Fault(fault));
    let fault = Exception {
        error_code: Some(2),
        ..fault
    };
    // xchg [rbx], eax: what is read and written faults as a write, before the read.
    assert_eq!(b.run(&[0x87, 0x03]), Outcome::Fault(fault));
    assert_eq!(b.run(&[0x89, 0x03]), Outcome::Fault(fault));
    assert_eq!(b.cpu.gpr(Gpr::Rax), 7);
    b.cpu.set_gpr(Gpr::Rbx, 1 << 60); // not canonical
    assert_eq!(
        b.run(&[0x8b, 0x03]),
        Outcome::Fault(Exception::GENERAL_PROTECTION)
    );
    assert_eq!(
        b.run(&[0x0f, 0xff]),
        Outcome::Fault(Exception::UNDEFINED_OPCODE)
    );
    // xchg eax, [rbx] on an address that faults only for the write keeps eax.
    assert!(matches!(
        b.run(&[0x0f, 0x28, 0x03]),
        Outcome::Fault(_) | Outcome::Unsupported(_)
    ));
}

#[test]
fn accesses_across_pages_check_both() {
    let mut b = Bench::new();
    // The last four bytes of mapped space, and four beyond.
    b.cpu.set_gpr(Gpr::Rbx, (4 << 30) - 4);
    let fault = Exception {
        vector: 14,
        error_code: Some(2),
        cr2: Some(4 << 30),
    };
    assert_eq!(b.run(&[0x48, 0x89, 0x03]), Outcome::Fault(fault));
    assert!(b.device.log.is_empty(), "nothing was written");
}

#[test]
fn control_registers() {
    let mut b = Bench::new();
    b.cpu.set_gpr(Gpr::Rax, 0x8000_0013);
    assert_eq!(b.run(&[0x0f, 0x22, 0xc0]), Outcome::Done(3)); // mov cr0, rax
    assert_eq!(b.cpu.cr0(), 0x8000_0013);
    assert_eq!(
        b.run(&[0x0f, 0x22, 0xe0]),
        Outcome::Fault(Exception::GENERAL_PROTECTION)
    );
    assert_eq!(b.run(&[0x44, 0x0f, 0x20, 0xc1]), Outcome::Done(4)); // mov rcx, cr8
    assert_eq!(b.cpu.gpr(Gpr::Rcx), 0x55);
    assert_eq!(load_msw(0x8000_0011, 0xfffe), 0x8000_001f, "PE stays");
}

#[test]
fn real_mode_segments_and_limits() {
    let mut b = Bench::new();
    let mut state = CpuState::reset();
    state.rip = 0x100;
    state.segments[SegmentName::Cs as usize].base = CODE;
    state.segments[SegmentName::Es as usize].base = 0xb_8000;
    b.cpu = FakeCpu::new(state);
    b.cpu.set_gpr(Gpr::Rdi, 0xffff_0004);
    b.cpu.set_gpr(Gpr::Rax, 0xaabb_ccdd_eeff_0741);
    b.memory.write(Gpa(CODE + 0x100), &[0xab]).unwrap(); // stosw
    assert_eq!(
        emulate(&mut b.cpu, &b.memory, &mut b.device, &mut b.cache, None),
        Outcome::Done(1)
    );
    assert_eq!(b.memory.read_u16(Gpa(0xb_8004)).unwrap(), 0x0741);
    assert_eq!(b.cpu.gpr(Gpr::Rdi), 0xffff_0006, "only DI moves");
    b.cpu.set_gpr(Gpr::Rbx, 0xffff);
    b.memory.write(Gpa(CODE + 0x100), &[0x8b, 0x07]).unwrap(); // mov ax, [bx]
    assert_eq!(
        emulate(&mut b.cpu, &b.memory, &mut b.device, &mut b.cache, None),
        Outcome::Fault(Exception::GENERAL_PROTECTION),
        "a word at the limit"
    );
}

#[test]
fn changed_code_is_decoded_anew() {
    let mut b = Bench::new();
    b.cpu.set_gpr(Gpr::Rbx, DEVICE);
    b.cpu.set_gpr(Gpr::Rax, 0x55);
    assert_eq!(b.run(&[0x88, 0x03]), Outcome::Done(2)); // mov [rbx], al
    assert_eq!(b.run(&[0x88, 0x03]), Outcome::Done(2));
    b.set_device(0, 0x77);
    assert_eq!(b.run(&[0x8a, 0x03]), Outcome::Done(2)); // mov al, [rbx]
    assert_eq!(b.cpu.gpr(Gpr::Rax), 0x77);
}

#[test]
fn the_address_of_the_exit_is_used_where_it_fits() {
    let mut b = Bench::new();
    b.memory.write(Gpa(CODE), &[0x8b, 0x03]).unwrap(); // mov eax, [rbx]
    // Linear and physical address differ: no page table says so, but the exit does.
    b.cpu.set_gpr(Gpr::Rbx, (5 << 30) | 0x20);
    let target = Some(Target {
        gpa: Gpa(DEVICE + 0x20),
        write: false,
    });
    let done = emulate(&mut b.cpu, &b.memory, &mut b.device, &mut b.cache, target);
    assert_eq!(done, Outcome::Done(2));
    assert_eq!(b.device.log, [(false, DEVICE + 0x20, Width::Dword, 0)]);
    // Another offset in the page: not the access that exited, so the page tables decide.
    b.cpu.set_gpr(Gpr::Rbx, (5 << 30) | 0x28);
    let fault = emulate(&mut b.cpu, &b.memory, &mut b.device, &mut b.cache, target);
    assert!(
        matches!(fault, Outcome::Fault(Exception { vector: 14, .. })),
        "{fault:?}"
    );
}

/// The short way to the access that the last one in the log is, from the state before it.
fn short_way(b: &mut Bench, before: &CpuState) -> Option<u8> {
    let (write, gpa, ..) = *b.device.log.last()?;
    let gpa = Gpa(gpa);
    b.cpu.state = before.clone();
    let found = SimpleMove::find(&b.cpu, &b.memory, &b.cache, Target { gpa, write })?;
    Some(found.execute(&mut b.cpu, &mut b.device, gpa))
}

#[test]
fn the_short_way_knows_what_drivers_do() {
    for code in [
        &[0x8b, 0x03][..],                                       // mov eax, [rbx]
        &[0x89, 0x43, 0x10],                                     // mov [rbx+0x10], eax
        &[0xc7, 0x03, 0x01, 0x00, 0x00, 0x80],                   // mov dword [rbx], 0x80000001
        &[0x48, 0x8b, 0x04, 0x0b],                               // mov rax, [rbx+rcx]
        &[0x44, 0x8a, 0x4c, 0x4b, 0x08],                         // mov r9b, [rbx+rcx*2+8]
        &[0x66, 0x89, 0x03],                                     // mov [rbx], ax
        &[0x0f, 0xb7, 0x03],                                     // movzx eax, word [rbx]
        &[0x48, 0x0f, 0xbe, 0x03],                               // movsx rax, byte [rbx]
        &[0x48, 0x63, 0x03],                                     // movsxd rax, dword [rbx]
        &[0xa1, 0x00, 0x00, 0xc0, 0xfe, 0x00, 0x00, 0x00, 0x00], // mov eax, [0xfec00000]
        &[0x0f, 0xc3, 0x03],                                     // movnti [rbx], eax
    ] {
        let mut b = Bench::new();
        b.cpu.set_gpr(Gpr::Rbx, DEVICE);
        b.cpu.set_gpr(Gpr::Rcx, 0x20);
        b.cpu.set_gpr(Gpr::Rax, 0x1234_5678_9abc_def0);
        let before = b.cpu.state.clone();
        assert_eq!(b.run(code), DONE(code), "{code:02x?}");
        assert_eq!(
            short_way(&mut b, &before),
            Some(code.len() as u8),
            "{code:02x?}"
        );
    }
}

#[test]
fn the_short_way_is_taken_only_where_the_access_fits() {
    let mut b = Bench::new();
    let store = [0x89, 0x03]; // mov [rbx], eax
    b.cpu.set_gpr(Gpr::Rbx, DEVICE + 0x20);
    assert_eq!(b.run(&store), Outcome::Done(2));
    let find = |b: &Bench, gpa: u64, write: bool| {
        let target = Target {
            gpa: Gpa(gpa),
            write,
        };
        SimpleMove::find(&b.cpu, &b.memory, &b.cache, target).is_some()
    };
    assert!(find(&b, DEVICE + 0x20, true));
    // The page tables allowed a read only, or it was another access.
    assert!(!find(&b, DEVICE + 0x20, false));
    assert!(!find(&b, DEVICE + 0x24, true));
    // The second of two pages.
    b.cpu.set_gpr(Gpr::Rbx, DEVICE + 0xffe);
    assert!(!find(&b, DEVICE + 0x1000, true));
    assert!(!find(&b, DEVICE + 0xffe, true));
    b.cpu.set_gpr(Gpr::Rbx, DEVICE + 0x20);
    // Other code at the same place, code that may not be fetched any more, other code segments.
    b.memory.write(Gpa(CODE), &[0x8b, 0x03]).unwrap();
    assert!(!find(&b, DEVICE + 0x20, true));
    b.memory.write(Gpa(CODE), &store).unwrap();
    assert!(find(&b, DEVICE + 0x20, true));
    b.memory.write_u64(Gpa(TABLES + 0x1000), 0x86).unwrap();
    assert!(!find(&b, DEVICE + 0x20, true));
    b.memory.write_u64(Gpa(TABLES + 0x1000), 0x87).unwrap();
    b.cpu.state.cr4 |= 1 << 20; // SMEP: the page is the user's
    assert!(!find(&b, DEVICE + 0x20, true));
    b.cpu.state.cr4 &= !(1 << 20);
    b.cpu.state.segments[SegmentName::Cs as usize]
        .rights
        .set_long(false);
    assert!(!find(&b, DEVICE + 0x20, true));
}

#[test]
fn stack_and_branches_with_a_device() {
    let mut b = Bench::new();
    b.cpu.set_gpr(Gpr::Rbx, DEVICE);
    b.cpu.set_gpr(Gpr::Rsp, DATA + 0x100);
    b.set_device(0, 0x1122_3344_5566_7788);
    assert_eq!(b.run(&[0xff, 0x33]), Outcome::Done(2)); // push qword [rbx]
    assert_eq!(b.cpu.gpr(Gpr::Rsp), DATA + 0xf8);
    assert_eq!(
        b.memory.read_entry(Gpa(DATA + 0xf8)),
        Ok(0x1122_3344_5566_7788)
    );
    assert_eq!(b.run(&[0x8f, 0x43, 0x08]), Outcome::Done(3)); // pop qword [rbx + 8]
    assert_eq!(b.device_u64(8), 0x1122_3344_5566_7788);
    assert_eq!(b.cpu.gpr(Gpr::Rsp), DATA + 0x100);
    b.set_device(0, CODE + 0x80);
    assert_eq!(b.run(&[0xff, 0x13]), Outcome::Jump(CODE + 0x80)); // call [rbx]
    assert_eq!(b.memory.read_entry(Gpa(DATA + 0xf8)), Ok(CODE + 2));
    assert_eq!(b.run(&[0xc3]), Outcome::Jump(CODE + 2)); // ret
    assert_eq!(b.run(&[0xff, 0x23]), Outcome::Jump(CODE + 0x80)); // jmp [rbx]
    b.set_device(0, 1 << 60);
    let gp = Outcome::Fault(Exception::GENERAL_PROTECTION);
    assert_eq!(b.run(&[0xff, 0x23]), gp, "not canonical");
    // pop qword [rsp + 8] is addressed behind the pop; push word.
    assert_eq!(b.run(&[0x66, 0xff, 0x73, 0x08]), Outcome::Done(4));
    assert_eq!(b.cpu.gpr(Gpr::Rsp), DATA + 0xfe);
    b.cpu.set_gpr(Gpr::Rsp, 5 << 30);
    assert!(matches!(b.run(&[0xff, 0x33]), Outcome::Fault(e) if e.vector == 14));
    assert_eq!(b.cpu.gpr(Gpr::Rsp), 5 << 30);
    b.cpu.set_rflags(2 | RFLAGS_CF);
    assert_eq!(b.run(&[0x72, 0x10]), Outcome::Jump(CODE + 0x12)); // jc
    assert_eq!(b.run(&[0x73, 0x10]), Outcome::Done(2)); // jnc
}

#[test]
fn a_stack_in_a_device() {
    let mut b = Bench::new();
    b.cpu.set_gpr(Gpr::Rsp, DEVICE + 0x100);
    b.cpu.set_gpr(Gpr::Rbp, 0x5555);
    assert_eq!(b.run(&[0x6a, 0xf9]), Outcome::Done(2)); // push -7
    assert_eq!(b.device_u64(0xf8), 7_u64.wrapping_neg());
    assert_eq!(b.run(&[0xc8, 0x20, 0x00, 0x00]), Outcome::Done(4)); // enter 32, 0
    assert_eq!(b.device_u64(0xf0), 0x5555);
    assert_eq!(b.cpu.gpr(Gpr::Rbp), DEVICE + 0xf0);
    assert_eq!(b.cpu.gpr(Gpr::Rsp), DEVICE + 0xd0);
    assert_eq!(b.run(&[0xc9]), Outcome::Done(1)); // leave
    assert_eq!(b.cpu.gpr(Gpr::Rbp), 0x5555);
    assert_eq!(b.run(&[0x58]), Outcome::Done(1)); // pop rax
    assert_eq!(b.cpu.gpr(Gpr::Rax), 7_u64.wrapping_neg());
    assert_eq!(b.cpu.gpr(Gpr::Rsp), DEVICE + 0x100);
}

#[test]
fn wide_registers_to_and_from_a_device() {
    let mut b = Bench::new();
    b.cpu.set_gpr(Gpr::Rbx, DEVICE);
    b.cpu.vectors[1] = core::array::from_fn(|n| n as u8 + 1);
    assert_eq!(b.run(&[0x0f, 0x29, 0x0b]), Outcome::Done(3)); // movaps [rbx], xmm1
    assert_eq!(b.device.bytes[..16], b.cpu.vectors[1][..16]);
    b.cpu.vectors[2] = [0xee; 32];
    assert_eq!(b.run(&[0xf3, 0x0f, 0x6f, 0x13]), Outcome::Done(4)); // movdqu xmm2, [rbx]
    assert_eq!(b.cpu.vectors[2][..16], b.cpu.vectors[1][..16]);
    assert_eq!(b.cpu.vectors[2][16..], [0xee; 16], "the upper half stays");
    assert_eq!(b.run(&[0xc5, 0xfa, 0x6f, 0x13]), Outcome::Done(4)); // vmovdqu xmm2, [rbx]
    assert_eq!(b.cpu.vectors[2][16..], [0; 16]);
    assert_eq!(b.run(&[0xf3, 0x0f, 0x10, 0x13]), Outcome::Done(4)); // movss xmm2, [rbx]
    assert_eq!(b.cpu.vectors[2][..8], [1, 2, 3, 4, 0, 0, 0, 0]);
    assert_eq!(b.run(&[0x0f, 0x17, 0x4b, 0x20]), Outcome::Done(4)); // movhps [rbx + 32], xmm1
    assert_eq!(b.device.bytes[32..40], [9, 10, 11, 12, 13, 14, 15, 16]);
    assert_eq!(b.run(&[0xc5, 0xfe, 0x7f, 0x4b, 0x40]), Outcome::Done(5)); // vmovdqu [rbx + 64], ymm1
    assert_eq!(b.device.bytes[64..96], b.cpu.vectors[1]);
    let gp = Outcome::Fault(Exception::GENERAL_PROTECTION);
    assert_eq!(b.run(&[0x0f, 0x29, 0x4b, 0x01]), gp, "not aligned");
    b.cpu.mmx[1] = 0x1234;
    assert_eq!(b.run(&[0x0f, 0x7f, 0x0b]), Outcome::Done(3)); // movq [rbx], mm1
    assert_eq!(b.device_u64(0), 0x1234);
}

#[test]
fn shifts_products_and_quotients_of_a_device() {
    let mut b = Bench::new();
    b.cpu.set_gpr(Gpr::Rbx, DEVICE);
    b.set_device(0, 0x8000_0001);
    assert_eq!(b.run(&[0xc1, 0x23, 0x04]), Outcome::Done(3)); // shl dword [rbx], 4
    assert_eq!(b.device_u64(0), 0x10);
    assert_eq!(b.run(&[0xd1, 0x0b]), Outcome::Done(2)); // ror dword [rbx], 1
    assert_eq!(b.device_u64(0), 8);
    b.cpu.set_gpr(Gpr::Rdx, u64::MAX);
    b.cpu.set_gpr(Gpr::Rcx, 4);
    assert_eq!(b.run(&[0x0f, 0xa5, 0x13]), Outcome::Done(3)); // shld [rbx], edx, cl
    assert_eq!(b.device_u64(0), 0x8f);
    b.cpu.set_gpr(Gpr::Rax, u64::MAX);
    assert_eq!(b.run(&[0x48, 0xf7, 0x23]), Outcome::Done(3)); // mul qword [rbx]
    assert_eq!(b.cpu.gpr(Gpr::Rdx), 0x8e);
    assert_eq!(b.cpu.gpr(Gpr::Rax), 0x8f_u64.wrapping_neg());
    assert_ne!(b.cpu.rflags() & RFLAGS_CF, 0);
    assert_eq!(b.run(&[0x48, 0xf7, 0x33]), Outcome::Done(3)); // div qword [rbx]
    assert_eq!((b.cpu.gpr(Gpr::Rax), b.cpu.gpr(Gpr::Rdx)), (u64::MAX, 0));
    b.cpu.set_gpr(Gpr::Rdx, 0x8f);
    let de = Outcome::Fault(Exception::DIVIDE_ERROR);
    assert_eq!(b.run(&[0x48, 0xf7, 0x33]), de, "too large");
    b.set_device(0, 0);
    assert_eq!(b.run(&[0xf6, 0x3b]), de, "idiv by zero");
    b.set_device(0, 0xfe);
    b.cpu.set_gpr(Gpr::Rax, 0xff06); // AX = -250
    assert_eq!(b.run(&[0xf6, 0x3b]), Outcome::Done(2)); // idiv byte [rbx], -2
    assert_eq!(b.cpu.gpr(Gpr::Rax), 0x007d);
    b.set_device(0, 3);
    assert_eq!(b.run(&[0x6b, 0x03, 0xfe]), Outcome::Done(3)); // imul eax, [rbx], -2
    assert_eq!(b.cpu.gpr(Gpr::Rax), 0xffff_fffa);
    assert_eq!(b.run(&[0x0f, 0xbd, 0x0b]), Outcome::Done(3)); // bsr ecx, [rbx]
    assert_eq!(b.cpu.gpr(Gpr::Rcx), 1);
    assert_eq!(b.run(&[0x0f, 0x94, 0x03]), Outcome::Done(3)); // sete [rbx]
    assert_eq!(b.device_u64(0), 0);
}

#[test]
fn compare_and_exchange_of_two_words() {
    let mut b = Bench::new();
    for (gpr, value) in [
        (Gpr::Rdi, DEVICE),
        (Gpr::Rbx, 0x33),
        (Gpr::Rcx, 0x44),
        (Gpr::Rax, 0x11),
        (Gpr::Rdx, 0x22),
    ] {
        b.cpu.set_gpr(gpr, value);
    }
    b.set_device(0, 0x11);
    b.set_device(8, 0x22);
    assert_eq!(b.run(&[0xf0, 0x48, 0x0f, 0xc7, 0x0f]), Outcome::Done(5)); // cmpxchg16b
    assert_eq!((b.device_u64(0), b.device_u64(8)), (0x33, 0x44));
    assert_eq!(b.run(&[0x0f, 0xc7, 0x0f]), Outcome::Done(3)); // cmpxchg8b
    assert_eq!((b.cpu.gpr(Gpr::Rax), b.cpu.gpr(Gpr::Rdx)), (0x33, 0));
}

#[test]
fn breakpoints_and_single_steps_are_seen() {
    let mut b = Bench::new();
    b.cpu.set_gpr(Gpr::Rbx, DEVICE);
    b.cpu.state.dr[1] = DEVICE + 4;
    b.cpu.state.dr7 = 0x400 | 1 << 2 | 0b1111 << 20;
    assert_eq!(b.run(&[0x8b, 0x03]), Outcome::Done(2));
    assert_eq!(b.device.aftermath.breakpoints, 0);
    assert_eq!(b.run(&[0x48, 0x8b, 0x03]), Outcome::Done(3));
    assert_eq!(b.device.aftermath.breakpoints, 2);
    // One iteration of a REP at a time under TF, and at a breakpoint.
    b.cpu.set_gpr(Gpr::Rdi, DEVICE);
    b.cpu.set_gpr(Gpr::Rcx, 4);
    assert_eq!(b.run(&[0xf3, 0xab]), Outcome::Again); // rep stosd
    assert_eq!((b.cpu.gpr(Gpr::Rcx), b.cpu.gpr(Gpr::Rdi)), (2, DEVICE + 8));
    b.cpu.state.dr7 = 0x400;
    b.cpu.set_rflags(2 | 1 << 8);
    assert_eq!(b.run(&[0xf3, 0xab]), Outcome::Again);
    assert_eq!(b.cpu.gpr(Gpr::Rcx), 1);
    assert_eq!(b.run(&[0xf3, 0xab]), Outcome::Done(2), "the last one");
}

#[test]
fn code_outside_ram_is_executed_by_the_instruction() {
    let mut b = Bench::new();
    b.device.bytes[..6].copy_from_slice(&[0xb8, 0x2a, 0, 0, 0, 0xc3]); // mov eax, 42; ret
    let run = |b: &mut Bench, rip| {
        b.cpu.set_rip(rip);
        emulate(&mut b.cpu, &b.memory, &mut b.device, &mut b.cache, None)
    };
    assert_eq!(run(&mut b, DEVICE), Outcome::Done(5));
    assert_eq!(b.cpu.gpr(Gpr::Rax), 42);
    b.memory.write_u64(Gpa(DATA), CODE).unwrap();
    b.cpu.set_gpr(Gpr::Rsp, DATA);
    assert_eq!(run(&mut b, DEVICE + 5), Outcome::Jump(CODE));
    b.device.bytes.fill(0xff);
    let ud = Outcome::Fault(Exception::UNDEFINED_OPCODE);
    assert_eq!(run(&mut b, DEVICE), ud, "where nothing answers");
}

#[test]
fn descriptor_tables_and_far_jumps_in_a_device() {
    let mut b = Bench::new();
    b.cpu.set_gpr(Gpr::Rbx, DEVICE);
    b.cpu.state.gdtr.base = DATA;
    b.cpu.state.gdtr.limit = 0x2f;
    for (index, entry) in [
        0,
        0x00af_9a00_0000_ffff,
        0x0000_8200_5000_0fff,
        0,
        0x0000_8900_6000_0067,
        0,
    ]
    .into_iter()
    .enumerate()
    {
        b.memory
            .write_u64(Gpa(DATA + 8 * index as u64), entry)
            .unwrap();
    }
    b.set_device(0, 0x10);
    assert_eq!(b.run(&[0x0f, 0x00, 0x13]), Outcome::Done(3)); // lldt [rbx]
    assert_eq!(b.cpu.segment(SegmentName::Ldtr).base, 0x5000);
    b.set_device(0, 0x20);
    assert_eq!(b.run(&[0x0f, 0x00, 0x1b]), Outcome::Done(3)); // ltr [rbx]
    assert_eq!(b.cpu.segment(SegmentName::Tr).rights.kind(), 11);
    let gp = |selector| {
        Outcome::Fault(Exception {
            error_code: Some(selector),
            ..Exception::GENERAL_PROTECTION
        })
    };
    assert_eq!(b.run(&[0x0f, 0x00, 0x1b]), gp(0x20), "busy now");
    b.set_device(0, 0x30);
    assert_eq!(b.run(&[0x0f, 0x00, 0x13]), gp(0x30), "beyond the limit");
    b.set_device(0, CODE + 0x40);
    b.set_device(8, 0x08);
    assert_eq!(b.run(&[0x48, 0xff, 0x2b]), Outcome::Jump(CODE + 0x40)); // jmp far [rbx]
    assert_eq!(b.cpu.segment(SegmentName::Cs).selector, 8);
    b.set_device(0, 0x1234_0fff);
    b.set_device(8, 0);
    assert_eq!(b.run(&[0x0f, 0x01, 0x13]), Outcome::Done(3)); // lgdt [rbx]
    assert_eq!(
        (b.cpu.state.gdtr.limit, b.cpu.state.gdtr.base & 0xffff),
        (0xfff, 0x1234)
    );
}

proptest! {
    /// MOV in all its forms: where the short way is taken, it does what the long way does.
    #[test]
    fn both_ways_agree(
        prefix in proptest::sample::select(vec![&[][..], &[0x66], &[0x48], &[0x41], &[0x4c], &[0x67], &[0x64], &[0x66, 0x44]]),
        opcode in proptest::sample::select(vec![
            &[0x88][..], &[0x89], &[0x8a], &[0x8b], &[0xc6], &[0xc7], &[0x63], &[0x0f, 0xb6],
            &[0x0f, 0xb7], &[0x0f, 0xbe], &[0x0f, 0xbf], &[0x0f, 0xc3], &[0x8c], &[0x03], &[0x87],
        ]),
        operands in proptest::array::uniform10(any::<u8>()),
        gprs in proptest::array::uniform16(prop_oneof![
            3 => (0u64..0xf00).prop_map(|at| DEVICE + at),
            1 => 0u64..0x40,
        ]),
        content in any::<u64>(),
    ) {
        let mut b = Bench::new();
        for at in (0..4096).step_by(8) {
            b.set_device(at, content.rotate_left(at as u32));
        }
        let image = b.device.bytes.clone();
        b.cpu.state.gprs = gprs;
        let before = b.cpu.state.clone();
        let code = [prefix, opcode, &operands].concat();
        let outcome = b.run(&code);
        if let (Outcome::Done(length), 1) = (outcome, b.device.log.len()) {
            let (after, log) = (b.cpu.state.clone(), b.device.log.clone());
            let changed = core::mem::replace(&mut b.device.bytes, image);
            if let Some(short) = short_way(&mut b, &before) {
                prop_assert_eq!(short, length);
                prop_assert_eq!(&b.cpu.state, &after);
                prop_assert_eq!(&b.device.log[1..], &log[..]);
                prop_assert_eq!(&b.device.bytes, &changed);
            }
        }
    }

    /// Whatever bytes stand at RIP and whatever is in the registers: no panic, and RIP is not touched.
    #[test]
    fn any_bytes_are_harmless(
        code in proptest::collection::vec(any::<u8>(), 15),
        gprs in proptest::array::uniform16(prop_oneof![any::<u64>(), Just(DEVICE), Just(DATA)]),
        long in any::<bool>(),
    ) {
        let mut b = Bench::new();
        if !long {
            b.cpu.state.segments[SegmentName::Cs as usize].rights.set_long(false);
        }
        b.cpu.state.gprs = gprs;
        b.run(&code);
        prop_assert_eq!(b.cpu.rip(), CODE);
    }

    /// ADD, SUB, ADC, SBB, AND against the processor's definition in 128-bit arithmetic.
    #[test]
    fn alu_matches_wide_arithmetic(a in any::<u32>(), c in any::<u32>(), carry in any::<bool>()) {
        let (w, mask) = (Width::Dword, 0xffff_ffffu64);
        let (a64, c64) = (u64::from(a), u64::from(c));
        let (sum, flags) = compute(Alu::Adc, a64, c64, carry, w);
        prop_assert_eq!(sum, (a64 + c64 + u64::from(carry)) & mask);
        prop_assert_eq!(flags & RFLAGS_CF != 0, a64 + c64 + u64::from(carry) > mask);
        let signed = i64::from(a as i32) + i64::from(c as i32) + i64::from(carry);
        prop_assert_eq!(flags & RFLAGS_OF != 0, i32::try_from(signed).is_err());
        let (difference, flags) = compute(Alu::Sbb, a64, c64, carry, w);
        prop_assert_eq!(difference, a64.wrapping_sub(c64).wrapping_sub(u64::from(carry)) & mask);
        prop_assert_eq!(flags & RFLAGS_CF != 0, a64 < c64 + u64::from(carry));
        let signed = i64::from(a as i32) - i64::from(c as i32) - i64::from(carry);
        prop_assert_eq!(flags & RFLAGS_OF != 0, i32::try_from(signed).is_err());
    }
}

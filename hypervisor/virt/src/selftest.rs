//! Tiny guests that exercise a backend on the processor it runs on.
//!
//! Each check makes a VM with 2 MiB of RAM and one vCPU, runs a few instructions in real,
//! 32-bit or 64-bit mode, and compares exits and registers with what the manuals promise.
//! The same checks run on both vendors. Built only with the feature `selftest`: the kernel
//! then runs them at boot and powers off.
//!
//! Unsafe: reads the guests' code, which is assembled into this program, as bytes.

use alloc::{format, string::String, vec::Vec};
use core::arch::naked_asm;

use mem::nested::{MemoryType, NestedTable, Rights};
use mem::{Direction, Gpa, HostMemory, Hpa, OutOfFrames, Owner, PAGE_SIZE, PAGE_SIZE_2M, Width};
use x86_64::instructions::interrupts;

use crate::cpu::{msr, rdmsr, rdtsc};
use crate::state::{CpuState, DescriptorTable, Event, Gpr, Segment, SegmentName};
use crate::{Backend, CpuMode, CrAccess, Exit, PortIo, VcpuSetup, VirtualCpu};

/// VM number of the test guests: no other VM runs beside them.
const VM: u16 = 0;
/// Address-space tags of the first and second vCPU.
const TAGS: [u32; 2] = [1, 2];

/// Guest-physical layout; RAM is 0 to 2 MiB.
const CODE: u64 = 0x1000;
const GDT: u64 = 0x2000;
const IDT: u64 = 0x3000;
const PML4: u64 = 0x4000;
const PDPT: u64 = 0x5000;
const PD: u64 = 0x6000;
const STACK: u64 = 0x8000;
const DATA: u64 = 0x8000;
const PAE_PDPT: u64 = 0x9000;
const PAE_PD: u64 = 0xa000;
/// The guests' own tables map it, the nested tables do not.
const UNMAPPED: u64 = 0x40_0000;
/// Where a guest with a handler has it.
const HANDLER: u64 = CODE + 0x80;

const CODE32: u16 = 0x08;
const DATA32: u16 = 0x10;
const CODE64: u16 = 0x18;

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_IF: u64 = 1 << 9;
const DR6_BS: u64 = 1 << 14;
const PAGE_PRESENT_WRITE: u64 = 3;
const PAGE_LARGE: u64 = 1 << 7;

/// A guest's code, with its length in front.
macro_rules! guest_code {
    ($name:ident, $mode:literal, $($line:literal,)*) => {
        #[unsafe(naked)]
        unsafe extern "C" fn $name() {
            naked_asm!(
                ".long 9f - 8f",
                "8:",
                $mode,
                $($line,)*
                "9:",
                ".code64",
            )
        }
    };
}

guest_code!(
    real_code,
    ".code16",
    "mov eax, 0x12345678",
    "cpuid",
    "mov al, 0x5a",
    "out 0x80, al",
    "in ax, 0x81",
    "mov dx, 0x3f8",
    "out dx, eax",
    "hlt",
);

guest_code!(
    protected_code,
    ".code32",
    "mov ecx, 0x1b",
    "rdmsr",
    "mov ebx, eax",
    "mov eax, 0x80000001",
    "mov edx, 0x02030405",
    "mov ecx, 0x1b",
    "wrmsr",
    "hlt",
);

guest_code!(
    to_long_code,
    ".code32",
    "mov eax, cr4",
    "or eax, 0x20",
    "mov cr4, eax",
    "mov eax, 0x4000",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    // JMP 0x18:0x1080
    ".byte 0xea",
    ".long 0x1080",
    ".word 0x18",
    ".skip 0x80 - (. - 8b), 0x90",
    ".code64",
    "mov rbx, 0x123456789abcdef0",
    "mov rcx, cr4",
    "mov rdx, cr0",
    "hlt",
);

guest_code!(
    pae_code,
    ".code32",
    "mov eax, cr4",
    "or eax, 0x20",
    "mov cr4, eax",
    "mov eax, 0x9000",
    "mov cr3, eax",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "mov esi, 0x80008000",
    "mov ebx, [esi]",
    "hlt",
);

guest_code!(
    faults_code,
    ".code64",
    "mov esi, 0x400120",
    "mov rbx, [rsi]",
    "inc rbx",
    "mov [rsi + 8], rbx",
    "hlt",
);

guest_code!(
    exception_code,
    ".code64",
    "nop",
    "hlt",
    ".skip 0x80 - (. - 8b), 0x90",
    "pop rdx",
    "pop rsi",
    "hlt",
);

guest_code!(
    interrupt_code,
    ".code64",
    "nop",
    "sti",
    "nop",
    "nop",
    "hlt",
    ".skip 0x80 - (. - 8b), 0x90",
    "inc rbx",
    "out 0x41, al",
    "iretq",
);

guest_code!(
    software_code,
    ".code64",
    "int 0x41",
    "hlt",
    ".skip 0x80 - (. - 8b), 0x90",
    "inc rbx",
    "out 0x41, al",
    "iretq",
);

guest_code!(endless_code, ".code64", "7:", "jmp 7b",);

guest_code!(
    registers_code,
    ".code64",
    "not rax",
    "not rcx",
    "not rdx",
    "not rbx",
    "not rsp",
    "not rbp",
    "not rsi",
    "not rdi",
    "not r8",
    "not r9",
    "not r10",
    "not r11",
    "not r12",
    "not r13",
    "not r14",
    "not r15",
    "hlt",
);

guest_code!(
    keep_code,
    ".code64",
    "movq xmm0, rax",
    "movq xmm15, rbx",
    "mov dr0, rcx",
    "mov dr3, rdx",
    "hlt",
    "movq rsi, xmm0",
    "movq rdi, xmm15",
    "mov r8, dr0",
    "mov r9, dr3",
    "hlt",
);

guest_code!(
    msr_code,
    ".code64",
    // LSTAR, written by the guest
    "mov ecx, 0xc0000082",
    "mov eax, 0x1000",
    "mov edx, 0xffff8000",
    "wrmsr",
    // KERNEL_GS_BASE, read by the guest
    "mov ecx, 0xc0000102",
    "rdmsr",
    "hlt",
);

guest_code!(undefined_code, ".code64", "ud2",);

guest_code!(
    step_code,
    ".code64",
    "nop",
    "hlt",
    ".skip 0x80 - (. - 8b), 0x90",
    "mov rax, dr6",
    "pop rsi",
    "hlt",
);

guest_code!(
    tsc_code,
    ".code64",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "hlt",
);

guest_code!(
    tsc_twice_code,
    ".code64",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "hlt",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "hlt",
);

guest_code!(
    flush_code,
    ".code64",
    "mov esi, 0x200000",
    "mov rax, [rsi]",
    "hlt",
    "mov rbx, [rsi]",
    "hlt",
    "mov rcx, [rsi]",
    "hlt",
);

guest_code!(
    ports_code,
    ".code64",
    "out 0x10, al",
    "mov dx, 0x1234",
    "out dx, ax",
    "out dx, eax",
    "in al, dx",
    "in eax, 0x60",
    "rep outsb",
);

guest_code!(
    amd_instructions_code,
    ".code64",
    "vmmcall",
    "wbinvd",
    "invd",
    "xor ecx, ecx",
    "rdpmc",
    "mov eax, 3",
    "xor edx, edx",
    "xsetbv",
    "xor eax, eax",
    "vmrun rax",
);

guest_code!(
    intel_instructions_code,
    ".code64",
    "vmcall",
    "wbinvd",
    "invd",
    "xor ecx, ecx",
    "rdpmc",
    "mov eax, 3",
    "xor edx, edx",
    "xsetbv",
    "xor eax, eax",
    "vmxoff",
);

guest_code!(
    priority_code,
    ".code64",
    "mov cr8, rbx",
    "mov rdx, cr8",
    "hlt",
);

guest_code!(jump_code, ".code64", "jmp rsi",);

guest_code!(
    breakpoint_code,
    ".code64",
    "lea rax, [rip + 6f]",
    "mov dr0, rax",
    "mov eax, 0x402",
    "mov dr7, rax",
    "6:",
    "nop",
    "hlt",
    ".skip 0x80 - (. - 8b), 0x90",
    "mov rax, dr6",
    "pop rsi",
    "hlt",
);

guest_code!(
    arm_code,
    ".code64",
    "mov dr0, rbx",
    "mov eax, 0x402",
    "mov dr7, rax",
    "hlt",
);

guest_code!(cpuid_loop_code, ".code64", "7:", "cpuid", "jmp 7b",);

/// Registers that the host relies on. Those of SYSCALL and SYSENTER it does not use, and VT-x
/// leaves a guest's values in them.
#[derive(Debug, PartialEq)]
struct HostRegisters {
    msrs: [u64; 4],
    dr7: u64,
    task_register: u16,
    cr0: u64,
    cr4: u64,
}

impl HostRegisters {
    const MSRS: [u32; 4] = [msr::FS_BASE, msr::GS_BASE, msr::EFER, msr::PAT];

    fn read() -> Self {
        HostRegisters {
            // SAFETY: every x86-64 processor has these registers; reading has no side effect.
            msrs: Self::MSRS.map(|number| unsafe { rdmsr(number) }),
            dr7: x86_64::registers::debug::Dr7::read_raw(),
            // SAFETY: STR at privilege level 0 has no side effect.
            task_register: unsafe { x86::task::tr() }.bits(),
            cr0: x86_64::registers::control::Cr0::read_raw(),
            cr4: x86_64::registers::control::Cr4::read_raw(),
        }
    }
}

/// The bytes of a guest's code.
fn bytes_of(code: unsafe extern "C" fn()) -> &'static [u8] {
    let start = code as *const () as *const u8;
    // SAFETY: `guest_code!` puts the length in front of the bytes; the program's own text is
    // readable and never changes.
    unsafe {
        let length = start.cast::<u32>().read_unaligned();
        core::slice::from_raw_parts(start.add(4), length as usize)
    }
}

/// What the checks need of the host.
#[derive(Clone, Copy)]
pub struct Host {
    /// Where guests' memory comes from.
    pub memory: &'static dyn HostMemory,
    /// Makes an interrupt arrive on this pCPU when its TSC has come to this value, or soon after.
    pub arm_timer: fn(u64),
}

/// A VM with 2 MiB of RAM and one vCPU, loaded on this pCPU.
struct Guest<B: Backend> {
    host: Host,
    memory: &'static dyn HostMemory,
    ram: Hpa,
    /// One more frame, for `UNMAPPED`.
    spare: Hpa,
    tables: NestedTable<B::Format>,
    vcpu: B::Vcpu,
}

type Check = Result<(), String>;

/// Fails a check when two values differ.
fn equal<T: PartialEq + core::fmt::Debug>(what: &str, found: T, wanted: T) -> Check {
    if found == wanted {
        Ok(())
    } else {
        Err(format!("{what} is {found:x?}, not {wanted:x?}"))
    }
}

fn out(port: u16, width: Width) -> Exit {
    Exit::PortIo(PortIo {
        port,
        width,
        direction: Direction::Write,
        string: false,
    })
}

impl<B: Backend> Guest<B> {
    fn new(backend: &B, host: Host, tag: u32) -> Result<Self, String> {
        let memory = host.memory;
        let frames = |e: OutOfFrames| format!("no {} frames", e.frames);
        let mut tables =
            NestedTable::new(backend.format(), memory, Owner::VmTables(VM)).map_err(frames)?;
        let ram = memory
            .allocate(PAGE_SIZE_2M / PAGE_SIZE, PAGE_SIZE_2M, Owner::VmRam(VM))
            .map_err(frames)?;
        let spare = memory
            .allocate(1, PAGE_SIZE, Owner::VmRam(VM))
            .map_err(frames)?;
        tables
            .map(
                Gpa(0),
                ram,
                PAGE_SIZE_2M,
                Rights::ALL,
                MemoryType::WriteBack,
            )
            .map_err(|e| format!("{e:?}"))?;
        let setup = VcpuSetup {
            vm: VM,
            vcpu: 0,
            tag,
            nested_root: tables.root(),
        };
        let mut vcpu = backend.create_vcpu(setup).map_err(|e| format!("{e}"))?;
        vcpu.load(0);
        let guest = Guest {
            host,
            memory,
            ram,
            spare,
            tables,
            vcpu,
        };
        guest.write_tables();
        Ok(guest)
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write(self.ram + gpa, bytes);
    }

    fn write_u64(&self, gpa: u64, value: u64) {
        self.memory.write_u64(self.ram + gpa, value);
    }

    /// GDT, IDT with every vector at `HANDLER`, and page tables that map the first GiB onto
    /// itself, for 64-bit and PAE paging.
    fn write_tables(&self) {
        for (i, descriptor) in [
            0,
            0x00cf_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00af_9b00_0000_ffff_u64,
        ]
        .into_iter()
        .enumerate()
        {
            self.write_u64(GDT + 8 * i as u64, descriptor);
        }
        const INTERRUPT_GATE: u64 = 0x8e00 << 32;
        for vector in 0..256 {
            let gate = HANDLER & 0xffff | u64::from(CODE64) << 16 | INTERRUPT_GATE;
            self.write_u64(IDT + 16 * vector, gate);
        }
        self.write_u64(PML4, PDPT | PAGE_PRESENT_WRITE);
        self.write_u64(PDPT, PD | PAGE_PRESENT_WRITE);
        for i in 0..512 {
            let page = (i * PAGE_SIZE_2M) | PAGE_PRESENT_WRITE | PAGE_LARGE;
            self.write_u64(PD + 8 * i, page);
            self.write_u64(PAE_PD + 8 * i, page);
        }
        self.write_u64(PAE_PDPT, PAE_PD | 1);
        self.write_u64(PAE_PDPT + 16, PAE_PD | 1);
    }

    /// Puts `code` at `gpa`.
    fn code(&self, gpa: u64, code: unsafe extern "C" fn()) {
        self.write(gpa, bytes_of(code));
    }

    fn start(&mut self, state: &CpuState, code: unsafe extern "C" fn()) {
        self.code(CODE, code);
        self.vcpu.set_state(state);
    }

    /// Maps the spare frame at `UNMAPPED`.
    fn map_spare(&mut self, rights: Rights) -> Check {
        self.tables
            .map(
                Gpa(UNMAPPED),
                self.spare,
                PAGE_SIZE,
                rights,
                MemoryType::WriteBack,
            )
            .map_err(|e| format!("mapping the spare frame: {e:?}"))
    }

    /// Runs to the next exit that a check is about: lets host interrupts in, gives intercepted
    /// exceptions back, and emulates moves to control registers and EFER.
    fn next(&mut self) -> Result<Exit, String> {
        const PATIENCE: u32 = 1_000_000;
        for _ in 0..PATIENCE {
            match self.vcpu.enter() {
                Exit::ExternalInterrupt => {
                    interrupts::enable();
                    x86_64::instructions::nop();
                    interrupts::disable();
                }
                Exit::Nmi => {}
                Exit::Exception { vector, error_code } => {
                    self.vcpu.inject(Event::Exception { vector, error_code });
                }
                Exit::CrAccess(access) => self.control_register(access)?,
                Exit::MsrRead if self.vcpu.gpr(Gpr::Rcx) as u32 == msr::EFER => {
                    let efer = self.vcpu.efer();
                    self.vcpu.set_gpr(Gpr::Rax, efer & 0xffff_ffff);
                    self.vcpu.set_gpr(Gpr::Rdx, efer >> 32);
                    self.vcpu.skip_instruction(None);
                }
                Exit::MsrWrite if self.vcpu.gpr(Gpr::Rcx) as u32 == msr::EFER => {
                    let efer = self.vcpu.gpr(Gpr::Rax) & 0xffff_ffff;
                    self.vcpu.set_efer(efer);
                    self.vcpu.skip_instruction(None);
                }
                exit @ Exit::EntryFailure { .. } => {
                    return Err(format!("{exit:x?}: {}", self.vcpu.explain_entry_failure()));
                }
                exit => return Ok(exit),
            }
        }
        Err(String::from("no end of host interrupts"))
    }

    /// MOV to or from CR0 or CR4, decoded here where the hardware does not: always 3 bytes.
    fn control_register(&mut self, access: Option<CrAccess>) -> Check {
        let access = match access {
            Some(access) => access,
            None => {
                let mut bytes = [0; 3];
                self.memory.read(self.ram + self.vcpu.rip(), &mut bytes);
                let [0x0f, direction, modrm] = bytes else {
                    return Err(format!("not a move: {bytes:x?}"));
                };
                let (cr, gpr) = (modrm >> 3 & 7, Gpr::ALL[usize::from(modrm & 7)]);
                match direction {
                    0x20 => CrAccess::MovFrom { cr, gpr },
                    0x22 => CrAccess::MovTo { cr, gpr },
                    _ => return Err(format!("not a move: {bytes:x?}")),
                }
            }
        };
        match access {
            CrAccess::MovTo { cr: 0, gpr } => {
                let value = self.vcpu.gpr(gpr);
                self.vcpu.set_cr0(value & 0xffff_ffff);
            }
            CrAccess::MovTo { cr: 4, gpr } => {
                let value = self.vcpu.gpr(gpr);
                self.vcpu.set_cr4(value & 0xffff_ffff);
            }
            CrAccess::MovFrom { cr: 4, gpr } => {
                let value = self.vcpu.cr4();
                self.vcpu.set_gpr(gpr, value);
            }
            other => return Err(format!("unexpected {other:?}")),
        }
        self.vcpu.skip_instruction(Some(3));
        Ok(())
    }

    fn expect(&mut self, wanted: Exit) -> Check {
        let found = self.next()?;
        if found == wanted {
            return Ok(());
        }
        Err(format!(
            "exit {found:x?} at {:#x}, not {wanted:x?}",
            self.vcpu.rip()
        ))
    }

    /// Expects an exit and steps over its instruction.
    fn expect_and_skip(&mut self, wanted: Exit) -> Check {
        self.expect(wanted)?;
        self.vcpu.skip_instruction(None);
        Ok(())
    }

    fn expect_fault(&mut self, gpa: u64, write: bool) -> Check {
        match self.next()? {
            Exit::NestedPageFault(f) if f.gpa == Gpa(gpa) && f.write == write && !f.fetch => Ok(()),
            other => Err(format!(
                "{other:x?}, not a nested {} at {gpa:#x}",
                if write { "write fault" } else { "read fault" }
            )),
        }
    }

    fn gpr(&self, what: &str, gpr: Gpr, wanted: u64) -> Check {
        equal(what, self.vcpu.gpr(gpr), wanted)
    }

    /// Ends the VM and gives its memory back.
    fn end(self) {
        let Guest {
            host: _,
            memory,
            ram,
            spare,
            tables,
            mut vcpu,
        } = self;
        vcpu.unload();
        drop(vcpu);
        drop(tables);
        memory.free(ram, PAGE_SIZE_2M / PAGE_SIZE, Owner::VmRam(VM));
        memory.free(spare, 1, Owner::VmRam(VM));
    }
}

fn real_state() -> CpuState {
    let mut state = CpuState::reset();
    let cs = &mut state.segments[SegmentName::Cs as usize];
    cs.selector = (CODE >> 4) as u16;
    cs.base = CODE;
    state.rip = 0;
    state.gprs[Gpr::Rsp as usize] = STACK;
    state
}

fn protected_state() -> CpuState {
    let mut state = CpuState::reset();
    state.cr0 = 0x10 | CR0_PE;
    for name in [
        SegmentName::Es,
        SegmentName::Ss,
        SegmentName::Ds,
        SegmentName::Fs,
        SegmentName::Gs,
    ] {
        state.segments[name as usize] = Segment::flat(DATA32, 3, false);
    }
    state.segments[SegmentName::Cs as usize] = Segment::flat(CODE32, 11, false);
    state.gdtr = DescriptorTable {
        base: GDT,
        limit: 31,
    };
    state.rip = CODE;
    state.gprs[Gpr::Rsp as usize] = STACK;
    state
}

fn long_state() -> CpuState {
    let mut state = protected_state();
    state.cr0 |= CR0_PG;
    state.cr3 = PML4;
    state.cr4 = CR4_PAE | CR4_OSFXSR;
    state.efer = EFER_LME | EFER_LMA;
    state.segments[SegmentName::Cs as usize] = Segment::flat(CODE64, 11, true);
    state.idtr = DescriptorTable {
        base: IDT,
        limit: 0xfff,
    };
    state
}

fn real_mode<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&real_state(), real_code);
    equal("mode", g.vcpu.mode(), CpuMode::Real)?;
    g.expect_and_skip(Exit::Cpuid)?;
    g.gpr("EAX at CPUID", Gpr::Rax, 0x1234_5678)?;
    g.expect_and_skip(out(0x80, Width::Byte))?;
    g.gpr("AL at OUT", Gpr::Rax, 0x1234_565a)?;
    g.expect(Exit::PortIo(PortIo {
        port: 0x81,
        width: Width::Word,
        direction: Direction::Read,
        string: false,
    }))?;
    g.vcpu.set_gpr(Gpr::Rax, 0xbeef);
    g.vcpu.skip_instruction(None);
    g.expect_and_skip(out(0x3f8, Width::Dword))?;
    g.gpr("EAX at the second OUT", Gpr::Rax, 0xbeef)?;
    g.expect(Exit::Halt)
}

/// Real-mode selectors are paragraph numbers: their low bits are no privilege level.
fn real_mode_odd_selector<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let mut state = real_state();
    let cs = &mut state.segments[SegmentName::Cs as usize];
    cs.selector += 3;
    cs.base += 0x30;
    g.vcpu.set_state(&state);
    g.code(CODE + 0x30, real_code);
    g.expect_and_skip(Exit::Cpuid)?;
    g.expect_and_skip(out(0x80, Width::Byte))?;
    let cs = g.vcpu.segment(SegmentName::Cs);
    equal(
        "CS",
        cs.selector,
        state.segments[SegmentName::Cs as usize].selector,
    )
}

fn protected_mode<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&protected_state(), protected_code);
    equal("mode", g.vcpu.mode(), CpuMode::Protected32)?;
    g.expect(Exit::MsrRead)?;
    g.gpr("ECX at RDMSR", Gpr::Rcx, 0x1b)?;
    g.vcpu.set_gpr(Gpr::Rax, 0xfee0_0900);
    g.vcpu.set_gpr(Gpr::Rdx, 0);
    g.vcpu.skip_instruction(None);
    g.expect_and_skip(Exit::MsrWrite)?;
    g.gpr("EBX, from RDMSR", Gpr::Rbx, 0xfee0_0900)?;
    g.gpr("EAX at WRMSR", Gpr::Rax, 0x8000_0001)?;
    g.gpr("EDX at WRMSR", Gpr::Rdx, 0x0203_0405)?;
    g.expect(Exit::Halt)
}

fn way_to_long_mode<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&protected_state(), to_long_code);
    g.expect(Exit::Halt)?;
    equal("mode", g.vcpu.mode(), CpuMode::Long64)?;
    g.gpr("RBX", Gpr::Rbx, 0x1234_5678_9abc_def0)?;
    g.gpr("CR4 as the guest reads it", Gpr::Rcx, CR4_PAE)?;
    g.gpr("CR0 as the guest reads it", Gpr::Rdx, CR0_PG | 0x11)?;
    equal("CR4", g.vcpu.cr4(), CR4_PAE)?;
    equal("EFER", g.vcpu.efer(), EFER_LME | EFER_LMA)
}

fn pae_paging<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&protected_state(), pae_code);
    g.write_u64(DATA, 0x600d_da7a);
    g.expect(Exit::Halt)?;
    g.gpr("EBX", Gpr::Rbx, 0x600d_da7a)
}

fn nested_faults<B: Backend>(g: &mut Guest<B>, backend: &B) -> Check {
    g.start(&long_state(), faults_code);
    g.expect_fault(UNMAPPED + 0x120, false)?;
    g.memory.write_u64(g.spare + 0x120, 41);
    g.map_spare(Rights::READ)?;
    g.expect_fault(UNMAPPED + 0x128, true)?;
    g.gpr("RBX", Gpr::Rbx, 42)?;
    g.tables
        .protect(Gpa(UNMAPPED), PAGE_SIZE, Rights::READ_WRITE)
        .map_err(|e| format!("{e:?}"))?;
    backend.flush_nested(g.tables.root());
    g.expect(Exit::Halt)?;
    equal("memory", g.memory.read_u64(g.spare + 0x128), 42)
}

fn exception_injection<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&long_state(), exception_code);
    let event = Event::Exception {
        vector: 13,
        error_code: Some(0x18),
    };
    g.vcpu.inject(event);
    equal("queued event", g.vcpu.queued(), Some(event))?;
    g.expect(Exit::Halt)?;
    g.gpr("error code", Gpr::Rdx, 0x18)?;
    g.gpr("return address", Gpr::Rsi, CODE)?;
    equal("queued event", g.vcpu.queued(), None)
}

fn interrupt_window<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&long_state(), interrupt_code);
    equal("interrupt_ready", g.vcpu.interrupt_ready(), false)?;
    g.vcpu.request_interrupt_window(true);
    g.expect(Exit::InterruptWindow)?;
    equal("interrupt_ready", g.vcpu.interrupt_ready(), true)?;
    g.vcpu.inject(Event::Interrupt(0x41));
    equal("interrupt_ready", g.vcpu.interrupt_ready(), false)?;
    g.expect_and_skip(out(0x41, Width::Byte))?;
    g.expect(Exit::Halt)?;
    g.gpr("interrupts taken", Gpr::Rbx, 1)
}

/// The stack is not there when the interrupt comes; when it is, the interrupt comes again.
fn interrupted_interrupt<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let mut state = long_state();
    state.rflags |= RFLAGS_IF;
    state.gprs[Gpr::Rsp as usize] = UNMAPPED + 0x800;
    g.start(&state, interrupt_code);
    g.vcpu.inject(Event::Interrupt(0x41));
    g.expect_stack_fault()?;
    equal(
        "queued event",
        g.vcpu.queued(),
        Some(Event::Interrupt(0x41)),
    )?;
    g.map_spare(Rights::READ_WRITE)?;
    g.expect_and_skip(out(0x41, Width::Byte))?;
    equal("queued event", g.vcpu.queued(), None)?;
    g.expect(Exit::Halt)?;
    g.gpr("interrupts taken", Gpr::Rbx, 1)
}

/// The same with INT n: taken once, and the guest returns behind it.
fn interrupted_int_instruction<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let mut state = long_state();
    state.gprs[Gpr::Rsp as usize] = UNMAPPED + 0x800;
    g.start(&state, software_code);
    g.expect_stack_fault()?;
    g.map_spare(Rights::READ_WRITE)?;
    g.expect_and_skip(out(0x41, Width::Byte))?;
    g.expect(Exit::Halt)?;
    equal("RIP", g.vcpu.rip(), CODE + 2)?;
    g.gpr("interrupts taken", Gpr::Rbx, 1)
}

impl<B: Backend> Guest<B> {
    /// A push onto the unmapped stack: which of its words comes first is the processor's choice.
    fn expect_stack_fault(&mut self) -> Check {
        match self.next()? {
            Exit::NestedPageFault(f) if f.gpa.align_down(PAGE_SIZE) == Gpa(UNMAPPED) && f.write => {
                Ok(())
            }
            other => Err(format!("{other:x?}, not a push onto the unmapped stack")),
        }
    }
}

fn nmi<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&long_state(), interrupt_code);
    equal("nmi_ready", g.vcpu.nmi_ready(), true)?;
    g.vcpu.inject(Event::Nmi);
    g.expect(out(0x41, Width::Byte))?;
    equal("nmi_ready in the handler", g.vcpu.nmi_ready(), false)?;
    g.vcpu.request_nmi_window(true);
    g.vcpu.skip_instruction(None);
    g.expect(Exit::NmiWindow)?;
    equal("nmi_ready after IRET", g.vcpu.nmi_ready(), true)?;
    g.expect(Exit::Halt)?;
    g.gpr("NMIs taken", Gpr::Rbx, 1)
}

/// Only where the backend has a timer of its own; elsewhere the kernel's does this.
fn deadline<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&long_state(), endless_code);
    let at = rdtsc() + 1_000_000;
    if !g.vcpu.set_deadline(at) {
        return Ok(());
    }
    g.expect(Exit::Deadline)?;
    let now = rdtsc();
    if now < at {
        return Err(format!("{} ticks early", at - now));
    }
    Ok(())
}

fn general_registers<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let mut state = long_state();
    for (i, gpr) in state.gprs.iter_mut().enumerate() {
        *gpr = 0x0123_4567_89ab_cdef_u64.rotate_left(4 * i as u32);
    }
    g.start(&state, registers_code);
    g.expect(Exit::Halt)?;
    let after = g.vcpu.state();
    for gpr in Gpr::ALL {
        let (found, before) = (after.gprs[gpr as usize], state.gprs[gpr as usize]);
        equal(&format!("{gpr:?}"), found, !before)?;
    }
    Ok(())
}

/// FPU and debug registers survive another vCPU on the same pCPU, and don't reach it.
fn switched_registers<B: Backend>(g: &mut Guest<B>, backend: &B) -> Check {
    let values = [
        (Gpr::Rax, 0x1111_2222_3333_4444),
        (Gpr::Rbx, 0x5555_6666_7777_8888),
        (Gpr::Rcx, 0xffff_8000_0000_1000),
        (Gpr::Rdx, 0x0000_7fff_ffff_0000),
    ];
    g.start(&long_state(), keep_code);
    for (gpr, value) in values {
        g.vcpu.set_gpr(gpr, value);
    }
    g.expect(Exit::Halt)?;
    g.vcpu.unload();
    let setup = VcpuSetup {
        vm: VM,
        vcpu: 1,
        tag: TAGS[1],
        nested_root: g.tables.root(),
    };
    let mut other = backend.create_vcpu(setup).map_err(|e| format!("{e}"))?;
    other.load(0);
    let mut state = long_state();
    // The second half reads what is there.
    let halt = bytes_of(keep_code).iter().position(|&b| b == 0xf4);
    let second_half = CODE + halt.map_or(0, |at| at as u64 + 1);
    state.rip = second_half;
    other.set_state(&state);
    core::mem::swap(&mut g.vcpu, &mut other);
    let seen = g.expect(Exit::Halt).and_then(|()| {
        [Gpr::Rsi, Gpr::Rdi, Gpr::R8, Gpr::R9]
            .into_iter()
            .try_for_each(|gpr| g.gpr("what the other vCPU sees", gpr, 0))
    });
    // Now the first half, to overwrite.
    g.vcpu.set_rip(CODE);
    let overwritten = g.expect(Exit::Halt);
    core::mem::swap(&mut g.vcpu, &mut other);
    other.unload();
    drop(other);
    g.vcpu.load(0);
    seen?;
    overwritten?;
    g.vcpu.set_rip(second_half);
    g.expect(Exit::Halt)?;
    for (gpr, (_, value)) in [Gpr::Rsi, Gpr::Rdi, Gpr::R8, Gpr::R9]
        .into_iter()
        .zip(values)
    {
        g.gpr("what came back", gpr, value)?;
    }
    let state = g.vcpu.state();
    equal("DR0", state.dr[0], values[2].1)?;
    equal("DR3", state.dr[3], values[3].1)
}

fn msrs<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&long_state(), msr_code);
    equal(
        "set_msr",
        g.vcpu.set_msr(msr::KERNEL_GS_BASE, 0x1234_5678_9abc),
        true,
    )?;
    equal(
        "set_msr, not canonical",
        g.vcpu.set_msr(msr::LSTAR, 1 << 63),
        false,
    )?;
    equal("msr, unknown", g.vcpu.msr(0x1b), None)?;
    g.expect(Exit::Halt)?;
    g.gpr("KERNEL_GS_BASE, low", Gpr::Rax, 0x5678_9abc)?;
    g.gpr("KERNEL_GS_BASE, high", Gpr::Rdx, 0x1234)?;
    let wanted = Some(0xffff_8000_0000_1000);
    equal("LSTAR", g.vcpu.msr(msr::LSTAR), wanted)?;
    g.vcpu.unload();
    g.vcpu.load(0);
    equal("LSTAR, loaded again", g.vcpu.msr(msr::LSTAR), wanted)
}

fn triple_fault<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let mut state = long_state();
    state.idtr.limit = 0;
    g.start(&state, undefined_code);
    g.expect(Exit::TripleFault)
}

fn single_step<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let mut state = long_state();
    state.rflags |= RFLAGS_TF;
    g.start(&state, step_code);
    g.expect(Exit::Halt)?;
    g.gpr("return address", Gpr::Rsi, CODE + 1)?;
    let dr6 = g.vcpu.gpr(Gpr::Rax);
    equal("DR6.BS", dr6 & DR6_BS, DR6_BS)
}

fn tsc_offset<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    const OFFSET: u64 = 1 << 50;
    g.start(&long_state(), tsc_code);
    g.vcpu.set_tsc_offset(OFFSET);
    let before = rdtsc();
    g.expect(Exit::Halt)?;
    let after = rdtsc();
    let host = g.vcpu.gpr(Gpr::Rax).wrapping_sub(OFFSET);
    if (before..=after).contains(&host) {
        Ok(())
    } else {
        Err(format!("{host} is not in {before}..={after}"))
    }
}

/// A guest's TSC at a third of the host's rate, across a load on the way. Nothing to see where nothing is scaled.
fn tsc_scale<B: Backend>(g: &mut Guest<B>, backend: &B) -> Check {
    const OFFSET: u64 = 1 << 50;
    let Some(scaling) = backend.tsc_scaling() else {
        return Ok(());
    };
    let scale = scaling.scale(3, 1).ok_or("no factor of a third")?;
    g.start(&long_state(), tsc_twice_code);
    g.vcpu.set_tsc_scale(scale);
    g.vcpu.set_tsc_offset(OFFSET);
    for what in ["RDTSC", "RDTSC after another load"] {
        let before = scale.to_guest(rdtsc());
        g.expect_and_skip(Exit::Halt)?;
        let after = scale.to_guest(rdtsc());
        let shown = g.vcpu.gpr(Gpr::Rax).wrapping_sub(OFFSET);
        if !(before..=after).contains(&shown) {
            return Err(format!("{what}: {shown} is not in {before}..={after}"));
        }
        g.vcpu.unload();
        g.vcpu.load(0);
    }
    Ok(())
}

fn flushes<B: Backend>(g: &mut Guest<B>, backend: &B) -> Check {
    g.start(&long_state(), flush_code);
    g.write_u64(0, 0x11);
    g.memory.write_u64(g.spare, 0x22);
    g.map_spare(Rights::READ)?;
    let flags = PAGE_PRESENT_WRITE | PAGE_LARGE;
    g.write_u64(PD + 8, flags);
    g.expect_and_skip(Exit::Halt)?;
    g.gpr("first read", Gpr::Rax, 0x11)?;
    g.write_u64(PD + 8, UNMAPPED | flags);
    g.vcpu.flush_guest_tlb();
    g.expect_and_skip(Exit::Halt)?;
    g.gpr("after the guest's flush", Gpr::Rbx, 0x22)?;
    g.tables
        .unmap(Gpa(UNMAPPED), PAGE_SIZE)
        .map_err(|e| format!("{e:?}"))?;
    backend.flush_nested(g.tables.root());
    g.expect_fault(UNMAPPED, false)
}

fn refused_entry<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let mut state = long_state();
    state.cr4 &= !CR4_PAE;
    g.start(&state, cpuid_loop_code);
    let exit = g.vcpu.enter();
    if !matches!(exit, Exit::EntryFailure { .. }) {
        return Err(format!("{exit:x?}, not a refusal"));
    }
    let why = g.vcpu.explain_entry_failure();
    if why.contains("PAE") {
        Ok(())
    } else {
        Err(format!("the explanation does not name CR4.PAE: {why}"))
    }
}

fn ports<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    let input = |port, width| {
        Exit::PortIo(PortIo {
            port,
            width,
            direction: Direction::Read,
            string: false,
        })
    };
    g.start(&long_state(), ports_code);
    g.expect_and_skip(out(0x10, Width::Byte))?;
    g.expect_and_skip(out(0x1234, Width::Word))?;
    g.expect_and_skip(out(0x1234, Width::Dword))?;
    g.expect_and_skip(input(0x1234, Width::Byte))?;
    g.expect_and_skip(input(0x60, Width::Dword))?;
    g.expect(Exit::PortIo(PortIo {
        port: 0x1234,
        width: Width::Byte,
        direction: Direction::Write,
        string: true,
    }))
}

fn other_instructions<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    const X87_AND_SSE: u64 = 3;
    let mut state = long_state();
    state.cr4 |= CR4_OSXSAVE;
    let code = if B::NAME == "AMD-V" {
        amd_instructions_code
    } else {
        intel_instructions_code
    };
    g.start(&state, code);
    g.expect_and_skip(Exit::Hypercall)?;
    g.expect_and_skip(Exit::Wbinvd)?;
    let exit = g.next()?;
    // QEMU 7.2 TCG reports INVD as WBINVD.
    if !matches!(exit, Exit::Invd | Exit::Wbinvd) {
        return Err(format!("{exit:x?}, not INVD"));
    }
    g.vcpu.skip_instruction(None);
    g.expect_and_skip(Exit::Rdpmc)?;
    let exit = g.next()?;
    if exit == Exit::Xsetbv {
        g.vcpu.set_xcr0(X87_AND_SSE);
        g.vcpu.skip_instruction(None);
        g.expect(Exit::VirtualizationInstruction)?;
    } else {
        // QEMU 7.2 TCG executes XSETBV without the exit.
        equal("exit", exit, Exit::VirtualizationInstruction)?;
    }
    equal("XCR0", g.vcpu.xcr0(), X87_AND_SSE)?;
    g.vcpu.unload();
    g.vcpu.load(0);
    equal("XCR0, loaded again", g.vcpu.xcr0(), X87_AND_SSE)
}

fn task_priority<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    const MOV_CR8_BYTES: u8 = 4;
    g.start(&long_state(), priority_code);
    if g.vcpu.task_priority().is_some() {
        return virtual_task_priority(g);
    }
    let wanted = CrAccess::MovTo {
        cr: 8,
        gpr: Gpr::Rbx,
    };
    match g.vcpu.enter() {
        Exit::CrAccess(access) => equal("access", access.unwrap_or(wanted), wanted)?,
        other => return Err(format!("{other:x?}, not an access to CR8")),
    }
    g.vcpu.skip_instruction(Some(MOV_CR8_BYTES));
    g.expect(Exit::Halt)
}

/// CR8 without exits; one when an interrupt of class 5 waits for the class to be lower.
fn virtual_task_priority<B: Backend>(g: &mut Guest<B>) -> Check {
    const MOV_CR8_BYTES: u8 = 4;
    g.vcpu.set_task_priority(0x35, 0);
    equal("task priority", g.vcpu.task_priority(), Some(0x35))?;
    g.vcpu.set_task_priority(0x30, 0);
    g.vcpu.set_gpr(Gpr::Rbx, 9);
    g.expect(Exit::Halt)?;
    equal("CR8 as read", g.vcpu.gpr(Gpr::Rdx), 9)?;
    equal("task priority", g.vcpu.task_priority(), Some(0x90))?;
    g.start(&long_state(), priority_code);
    g.vcpu.set_task_priority(0x90, 5);
    g.vcpu.set_gpr(Gpr::Rbx, 4);
    match g.vcpu.enter() {
        // Behind the write.
        Exit::InterruptWindow => equal("task priority", g.vcpu.task_priority(), Some(0x40))?,
        // Before it.
        Exit::CrAccess(_) => {
            g.vcpu.skip_instruction(Some(MOV_CR8_BYTES));
            g.vcpu.set_task_priority(0x40, 0);
        }
        other => return Err(format!("{other:x?}, not a lower task priority")),
    }
    g.expect(Exit::Halt)?;
    equal("CR8 as read", g.vcpu.gpr(Gpr::Rdx), 4)?;
    g.vcpu.set_task_priority(0, 0);
    Ok(())
}

/// Fetching from a page without execute rights, and a walk of page tables that are not there.
fn other_nested_faults<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&long_state(), jump_code);
    g.vcpu.set_gpr(Gpr::Rsi, UNMAPPED + 0x10);
    g.map_spare(Rights::READ_WRITE)?;
    match g.next()? {
        Exit::NestedPageFault(f) if f.gpa == Gpa(UNMAPPED + 0x10) => {
            equal(
                "(write, fetch, walk)",
                (f.write, f.fetch, f.page_walk),
                (false, true, false),
            )?;
        }
        other => return Err(format!("{other:x?}, not a nested fetch fault")),
    }
    let beyond = UNMAPPED + PAGE_SIZE;
    g.vcpu.set_cr3(beyond);
    match g.next()? {
        Exit::NestedPageFault(f) if f.gpa.align_down(PAGE_SIZE) == Gpa(beyond) => {
            equal("page walk", f.page_walk, true)
        }
        other => Err(format!("{other:x?}, not a fault in a page walk")),
    }
}

/// As with interrupts: an exception's error code comes again, and an NMI masks only once.
fn interrupted_others<B: Backend>(g: &mut Guest<B>, backend: &B) -> Check {
    let mut state = long_state();
    state.gprs[Gpr::Rsp as usize] = UNMAPPED + 0x800;
    g.start(&state, exception_code);
    let event = Event::Exception {
        vector: 13,
        error_code: Some(0x18),
    };
    g.vcpu.inject(event);
    g.expect_stack_fault()?;
    equal("queued event", g.vcpu.queued(), Some(event))?;
    g.map_spare(Rights::READ_WRITE)?;
    g.expect(Exit::Halt)?;
    g.gpr("error code", Gpr::Rdx, 0x18)?;

    g.tables
        .unmap(Gpa(UNMAPPED), PAGE_SIZE)
        .map_err(|e| format!("{e:?}"))?;
    backend.flush_nested(g.tables.root());
    g.start(&state, interrupt_code);
    g.vcpu.inject(Event::Nmi);
    g.expect_stack_fault()?;
    equal("queued event", g.vcpu.queued(), Some(Event::Nmi))?;
    g.map_spare(Rights::READ_WRITE)?;
    g.expect_and_skip(out(0x41, Width::Byte))?;
    g.expect(Exit::Halt)?;
    equal("nmi_ready after IRET", g.vcpu.nmi_ready(), true)?;
    g.gpr("NMIs taken", Gpr::Rbx, 1)
}

/// An interrupt of the host's ends a guest that does nothing, with its interrupts on or off.
fn host_interrupt<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    const SOON: u64 = 1_000_000;
    const LATER: u64 = 50_000_000;
    for rflags in [2, 2 | RFLAGS_IF] {
        let mut state = long_state();
        state.rflags = rflags;
        g.start(&state, endless_code);
        let now = rdtsc();
        (g.host.arm_timer)(now + SOON);
        g.vcpu.set_deadline(now + LATER);
        let exit = g.vcpu.enter();
        interrupts::enable();
        x86_64::instructions::nop();
        interrupts::disable();
        // Bochs 2.7 keeps the interrupt from a guest that was entered with interrupts off.
        if !matches!(exit, Exit::ExternalInterrupt | Exit::Deadline) {
            return Err(format!("{exit:x?}, not a host interrupt"));
        }
        equal("RIP", g.vcpu.rip(), CODE)?;
    }
    Ok(())
}

fn breakpoint<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    g.start(&long_state(), breakpoint_code);
    g.expect(Exit::Halt)?;
    let at = g.vcpu.state().dr[0];
    g.gpr("return address", Gpr::Rsi, at)?;
    let dr6 = g.vcpu.gpr(Gpr::Rax);
    equal("DR6.B0", dr6 & 1, 1)
}

/// A guest whose breakpoint is at an address of the host's does not stop the host there.
fn breakpoint_in_host<B: Backend>(g: &mut Guest<B>, _: &B) -> Check {
    #[inline(never)]
    fn of_the_host(value: u64) -> u64 {
        core::hint::black_box(value) + 1
    }
    g.start(&long_state(), arm_code);
    let address = core::hint::black_box(of_the_host as fn(u64) -> u64);
    g.vcpu.set_gpr(Gpr::Rbx, address as usize as u64);
    g.expect(Exit::Halt)?;
    equal("result", address(1), 2)?;
    // Off again in the guest, which TCG would otherwise keep.
    g.vcpu.set_rip(CODE);
    g.vcpu.set_gpr(Gpr::Rbx, 0);
    g.expect(Exit::Halt)
}

/// Two VMs read their own memory at the same address, also when both have tags beyond what
/// the processor has.
fn two_vms<B: Backend>(g: &mut Guest<B>, backend: &B) -> Check {
    const MANY: u32 = 1 << 20;
    let host = g.host;
    g.vcpu.unload();
    let result = [[1, 2], [MANY, MANY + 1]].into_iter().try_for_each(|tags| {
        let mut vms = alloc::vec![];
        for tag in tags {
            let mut vm = Guest::new(backend, host, tag)?;
            vm.start(&long_state(), faults_code);
            vm.map_spare(Rights::READ_WRITE)?;
            vm.memory.write_u64(vm.spare + 0x120, 100 * u64::from(tag));
            vm.vcpu.unload();
            vms.push((tag, vm));
        }
        let result = (0..3).try_for_each(|_| {
            vms.iter_mut().try_for_each(|(tag, vm)| {
                vm.vcpu.load(0);
                vm.vcpu.set_rip(CODE);
                let seen = vm.expect(Exit::Halt);
                vm.vcpu.unload();
                seen?;
                vm.vcpu.load(0);
                let seen = vm.gpr("RBX", Gpr::Rbx, 100 * u64::from(*tag) + 1);
                vm.vcpu.unload();
                seen
            })
        });
        for (_, mut vm) in vms {
            vm.vcpu.load(0);
            vm.end();
        }
        result
    });
    g.vcpu.load(0);
    result
}

/// One check: a name, and what it does with a fresh guest.
type Entry<B> = (&'static str, fn(&mut Guest<B>, &B) -> Check);

fn checks<B: Backend>() -> Vec<Entry<B>> {
    alloc::vec![
        ("real mode: CPUID, IN, OUT, HLT", real_mode),
        ("real mode: any CS selector", real_mode_odd_selector),
        ("32-bit mode: RDMSR, WRMSR", protected_mode),
        ("a guest's own way to 64-bit mode", way_to_long_mode),
        ("a guest's own way to PAE paging", pae_paging),
        ("nested page faults", nested_faults),
        ("exception with error code", exception_injection),
        ("interrupt window and interrupt", interrupt_window),
        ("interrupt, delivery interrupted", interrupted_interrupt),
        ("INT n, delivery interrupted", interrupted_int_instruction),
        ("NMI and NMI window", nmi),
        ("deadline", deadline),
        ("general-purpose registers", general_registers),
        ("XMM and debug registers across vCPUs", switched_registers),
        ("MSRs", msrs),
        ("triple fault", triple_fault),
        ("single step", single_step),
        ("TSC offset", tsc_offset),
        ("TSC scale, where the processor scales", tsc_scale),
        ("TLB flushes", flushes),
        ("port I/O forms", ports),
        ("other instructions that exit", other_instructions),
        ("task priority", task_priority),
        (
            "nested faults of fetches and page walks",
            other_nested_faults
        ),
        (
            "exception and NMI, delivery interrupted",
            interrupted_others
        ),
        ("host interrupts", host_interrupt),
        ("a guest's breakpoint", breakpoint),
        ("a guest's breakpoint on the host", breakpoint_in_host),
        ("two VMs at the same addresses", two_vms),
        ("refused entry is explained", refused_entry),
    ]
}

/// Runs all checks on the calling pCPU, which must have virtualization enabled as pCPU 0 and
/// an interrupt table that handles whatever is pending. Calls `report` with each check's
/// name and result, and at the end with the cost of an exit.
pub fn run<B: Backend>(backend: &B, host: Host, report: &mut dyn FnMut(&str, Result<(), String>)) {
    let before = HostRegisters::read();
    for (name, check) in checks::<B>() {
        let result = interrupts::without_interrupts(|| {
            let mut guest = Guest::new(backend, host, TAGS[0])?;
            let result = check(&mut guest, backend);
            guest.end();
            result
        });
        report(name, result);
    }
    let unchanged = equal("what guests left", HostRegisters::read(), before);
    report("the host's registers are its own", unchanged);
    let cost = interrupts::without_interrupts(|| cpuid_cost(backend, host));
    match cost {
        Ok(ticks) => report(
            &format!("CPUID: {ticks} ticks per exit, entry and skip"),
            Ok(()),
        ),
        Err(e) => report("CPUID: ticks per exit", Err(e)),
    }
}

/// Host TSC ticks of a loop of CPUID exits that are only stepped over.
fn cpuid_cost<B: Backend>(backend: &B, host: Host) -> Result<u64, String> {
    const ROUNDS: u64 = 1000;
    let mut guest = Guest::new(backend, host, TAGS[0])?;
    guest.start(&long_state(), cpuid_loop_code);
    let mut run = || {
        guest.expect_and_skip(Exit::Cpuid)?;
        let mut done = 0;
        let start = rdtsc();
        while done < ROUNDS {
            if guest.vcpu.enter() == Exit::Cpuid {
                guest.vcpu.skip_instruction(None);
                done += 1;
            } else {
                guest.expect(Exit::Cpuid)?;
            }
        }
        Ok((rdtsc() - start) / ROUNDS)
    };
    let result = run();
    guest.end();
    result
}

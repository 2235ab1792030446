//! A guest of a few instructions: its memory, its page tables, its state, and what is expected of it.

use alloc::format;
use alloc::string::String;

use mem::nested::{MemoryType, NestedTable, Rights};
use mem::{Direction, Gpa, HostMemory, Hpa, OutOfFrames, Owner, PAGE_SIZE, PAGE_SIZE_2M, Width};
use x86_64::instructions::interrupts;

use super::Host;
use super::code::bytes_of;
use crate::cpu::msr;
use crate::state::{CpuState, DescriptorTable, Event, Gpr, Segment, SegmentName};
use crate::{Backend, CrAccess, Exit, PortIo, Registers, VcpuSetup, VirtualCpu};

/// VM number of the test guests: no other VM runs beside them.
pub(super) const VM: u16 = 0;
/// Address-space tags of the first and second vCPU.
pub(super) const TAGS: [u32; 2] = [1, 2];

/// Guest-physical layout; RAM is 0 to 2 MiB.
pub(super) const CODE: u64 = 0x1000;
pub(super) const GDT: u64 = 0x2000;
pub(super) const IDT: u64 = 0x3000;
pub(super) const PML4: u64 = 0x4000;
pub(super) const PDPT: u64 = 0x5000;
pub(super) const PD: u64 = 0x6000;
pub(super) const STACK: u64 = 0x8000;
pub(super) const DATA: u64 = 0x8000;
pub(super) const PAE_PDPT: u64 = 0x9000;
pub(super) const PAE_PD: u64 = 0xa000;
/// The guests' own tables map it, the nested tables do not.
pub(super) const UNMAPPED: u64 = 0x40_0000;
/// Where a guest with a handler has it.
pub(super) const HANDLER: u64 = CODE + 0x80;

pub(super) const CODE32: u16 = 0x08;
pub(super) const DATA32: u16 = 0x10;
pub(super) const CODE64: u16 = 0x18;

pub(super) const CR0_PE: u64 = 1;
pub(super) const CR0_PG: u64 = 1 << 31;
pub(super) const CR4_PAE: u64 = 1 << 5;
pub(super) const CR4_OSFXSR: u64 = 1 << 9;
pub(super) const CR4_OSXSAVE: u64 = 1 << 18;
pub(super) const EFER_LME: u64 = 1 << 8;
pub(super) const EFER_LMA: u64 = 1 << 10;
pub(super) const RFLAGS_TF: u64 = 1 << 8;
pub(super) const RFLAGS_IF: u64 = 1 << 9;
pub(super) const DR6_BS: u64 = 1 << 14;
pub(super) const PAGE_PRESENT_WRITE: u64 = 3;
pub(super) const PAGE_LARGE: u64 = 1 << 7;

/// A VM with 2 MiB of RAM and one vCPU, loaded on this pCPU.
pub(super) struct Guest<B: Backend> {
    pub(super) host: Host,
    pub(super) memory: &'static dyn HostMemory,
    pub(super) ram: Hpa,
    /// One more frame, for `UNMAPPED`.
    pub(super) spare: Hpa,
    pub(super) tables: NestedTable<B::Format>,
    pub(super) vcpu: B::Vcpu,
}

pub(super) type Check = Result<(), String>;

/// Fails a check when two values differ.
pub(super) fn equal<T: PartialEq + core::fmt::Debug>(what: &str, found: T, wanted: T) -> Check {
    if found == wanted {
        Ok(())
    } else {
        Err(format!("{what} is {found:x?}, not {wanted:x?}"))
    }
}

pub(super) fn out(port: u16, width: Width) -> Exit {
    Exit::PortIo(PortIo {
        port,
        width,
        direction: Direction::Write,
        string: false,
    })
}

impl<B: Backend> Guest<B> {
    pub(super) fn new(backend: &B, host: Host, tag: u32) -> Result<Self, String> {
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

    pub(super) fn write(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write(self.ram + gpa, bytes);
    }

    pub(super) fn write_u64(&self, gpa: u64, value: u64) {
        self.memory.write_u64(self.ram + gpa, value);
    }

    /// GDT, IDT with every vector at `HANDLER`, and page tables that map the first GiB onto
    /// itself, for 64-bit and PAE paging.
    pub(super) fn write_tables(&self) {
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
    pub(super) fn code(&self, gpa: u64, code: unsafe extern "C" fn()) {
        self.write(gpa, bytes_of(code));
    }

    pub(super) fn start(&mut self, state: &CpuState, code: unsafe extern "C" fn()) {
        self.code(CODE, code);
        self.vcpu.set_state(state);
    }

    /// Maps the spare frame at `UNMAPPED`.
    pub(super) fn map_spare(&mut self, rights: Rights) -> Check {
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
    pub(super) fn next(&mut self) -> Result<Exit, String> {
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
    pub(super) fn control_register(&mut self, access: Option<CrAccess>) -> Check {
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

    pub(super) fn expect(&mut self, wanted: Exit) -> Check {
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
    pub(super) fn expect_and_skip(&mut self, wanted: Exit) -> Check {
        self.expect(wanted)?;
        self.vcpu.skip_instruction(None);
        Ok(())
    }

    pub(super) fn expect_fault(&mut self, gpa: u64, write: bool) -> Check {
        match self.next()? {
            Exit::NestedPageFault(f) if f.gpa == Gpa(gpa) && f.write == write && !f.fetch => Ok(()),
            other => Err(format!(
                "{other:x?}, not a nested {} at {gpa:#x}",
                if write { "write fault" } else { "read fault" }
            )),
        }
    }

    pub(super) fn gpr(&self, what: &str, gpr: Gpr, wanted: u64) -> Check {
        equal(what, self.vcpu.gpr(gpr), wanted)
    }

    /// Ends the VM and gives its memory back.
    pub(super) fn end(self) {
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

pub(super) fn real_state() -> CpuState {
    let mut state = CpuState::reset();
    let cs = &mut state.segments[SegmentName::Cs as usize];
    cs.selector = (CODE >> 4) as u16;
    cs.base = CODE;
    state.rip = 0;
    state.gprs[Gpr::Rsp as usize] = STACK;
    state
}

pub(super) fn protected_state() -> CpuState {
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

pub(super) fn long_state() -> CpuState {
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

//! Operands: registers, immediates, and memory with its segment checks, RAM or device.

use iced_x86::{OpKind, Register};
use mem::{Gpa, Gva, Width};
use virt::{CpuMode, Gpr, SegmentName, VirtualCpu};

use super::{
    Exception, Platform,
    execute::{Run, Stop},
};
use crate::walk::Access;

impl<V: VirtualCpu, P: Platform<V>> Run<'_, V, P> {
    pub(super) fn is_memory(&self, operand: u32) -> bool {
        !matches!(
            self.instruction.op_kind(operand),
            OpKind::Register
                | OpKind::Immediate8
                | OpKind::Immediate8_2nd
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate64
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64
        )
    }

    /// Width of an operand.
    pub(super) fn width(&self, operand: u32) -> Result<Width, Stop> {
        let bytes = match self.instruction.op_kind(operand) {
            OpKind::Register => self.instruction.op_register(operand).size(),
            _ if self.is_memory(operand) => self.instruction.memory_size().size(),
            _ => return self.width(0),
        };
        Width::from_bytes(bytes).ok_or(Stop::Unsupported)
    }

    pub(super) fn get(&mut self, operand: u32) -> Result<u64, Stop> {
        match self.instruction.op_kind(operand) {
            OpKind::Register => self.read_register(self.instruction.op_register(operand)),
            _ if self.is_memory(operand) => {
                let width = self.width(operand)?;
                self.load(self.operand_address(operand)?, width)
            }
            _ => Ok(self.instruction.immediate(operand)),
        }
    }

    /// The operand of an instruction that reads, then writes it: if it cannot be written, that is the
    /// fault, and it comes before the read.
    pub(super) fn get_to_change(&mut self, operand: u32) -> Result<u64, Stop> {
        if !self.is_memory(operand) {
            return self.get(operand);
        }
        let width = self.width(operand)?;
        let at = self.operand_address_for(operand, Access::Write)?;
        if self.known_device(at, width, true).is_none() {
            self.probe(at, width, Access::Write)?;
        }
        self.load(at, width)
    }

    pub(super) fn set(&mut self, operand: u32, value: u64) -> Result<(), Stop> {
        if self.instruction.op_kind(operand) == OpKind::Register {
            return self.write_register(self.instruction.op_register(operand), value);
        }
        let width = self.width(operand)?;
        self.store(
            self.operand_address_for(operand, Access::Write)?,
            width,
            value,
        )
    }

    pub(super) fn read_register(&self, register: Register) -> Result<u64, Stop> {
        if let Some(name) = segment_name(register) {
            return Ok(u64::from(self.cpu.segment(name).selector));
        }
        let (gpr, shift) = general(register).ok_or(Stop::Unsupported)?;
        let width = Width::from_bytes(register.size()).ok_or(Stop::Unsupported)?;
        Ok((self.cpu.gpr(gpr) >> shift) & width.mask())
    }

    pub(super) fn write_register(&mut self, register: Register, value: u64) -> Result<(), Stop> {
        if register.is_segment_register() {
            return self.write_segment_register(register, value as u16);
        }
        let (gpr, shift) = general(register).ok_or(Stop::Unsupported)?;
        if shift == 8 {
            let old = self.cpu.gpr(gpr);
            self.cpu
                .set_gpr(gpr, (old & !0xff00) | ((value & 0xff) << 8));
            return Ok(());
        }
        let width = Width::from_bytes(register.size()).ok_or(Stop::Unsupported)?;
        self.write_gpr(gpr, width, value);
        Ok(())
    }

    /// Writes the low part of a register: 32 bits clear the rest, 8 and 16 bits keep it.
    pub(super) fn write_gpr(&mut self, gpr: Gpr, width: Width, value: u64) {
        let value = match width {
            Width::Qword => value,
            Width::Dword => value & 0xffff_ffff,
            _ => (self.cpu.gpr(gpr) & !width.mask()) | (value & width.mask()),
        };
        self.cpu.set_gpr(gpr, value);
    }

    pub(super) fn set_flags(&mut self, mask: u64, flags: u64) {
        let old = self.cpu.rflags();
        self.cpu.set_rflags((old & !mask) | (flags & mask));
    }

    /// Offset of the most common operand, base register and displacement in 64-bit mode.
    fn plain_offset(&self, operand: u32) -> Option<u64> {
        let instruction = self.instruction;
        let base = instruction.memory_base();
        let plain = self.mode == CpuMode::Long64
            && instruction.op_kind(operand) == OpKind::Memory
            && instruction.memory_index() == Register::None
            && (Register::RAX..=Register::R15).contains(&base);
        plain.then(|| {
            let gpr = Gpr::ALL[base as usize - Register::RAX as usize];
            self.cpu
                .gpr(gpr)
                .wrapping_add(instruction.memory_displacement64())
        })
    }

    /// Offset of any memory operand.
    pub(super) fn any_offset(&self, operand: u32) -> Result<u64, Stop> {
        let mut unreadable = false;
        self.instruction
            .virtual_address(operand, 0, |register, _, _| {
                if register.is_segment_register() {
                    return Some(0);
                }
                let value = if register == Register::RIP || register == Register::EIP {
                    Some(self.instruction.next_ip())
                } else {
                    self.read_register(register).ok()
                };
                unreadable |= value.is_none();
                value
            })
            .filter(|_| !unreadable)
            .ok_or(Stop::Unsupported)
    }

    /// Linear address of a memory operand to be read, checked against its segment.
    pub(super) fn operand_address(&self, operand: u32) -> Result<Gva, Stop> {
        self.operand_address_for(operand, Access::Read)
    }

    /// Linear address of a memory operand, checked against its segment.
    pub(super) fn operand_address_for(&self, operand: u32, access: Access) -> Result<Gva, Stop> {
        let segment = match self.instruction.op_kind(operand) {
            OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => Register::ES,
            _ => self.instruction.memory_segment(),
        };
        let name = segment_name(segment).ok_or(Stop::Unsupported)?;
        let offset = match self.plain_offset(operand) {
            Some(offset) => offset,
            None => self.any_offset(operand)?,
        };
        let size = self.instruction.memory_size().size().max(1) as u64;
        self.address(name, offset, size, access)
    }

    /// Whether a 64-bit address is canonical.
    pub(super) fn is_canonical(&self, address: u64) -> bool {
        const CR4_LA57: u64 = 1 << 12;
        let top = if self.paging.cr4 & CR4_LA57 != 0 {
            57
        } else {
            48
        };
        ((address << (64 - top)) as i64 >> (64 - top)) as u64 == address
    }

    /// Linear address of `size` bytes at an offset in a segment, with the checks of SDM vol. 3A, section 6.
    pub(super) fn address(
        &self,
        name: SegmentName,
        offset: u64,
        size: u64,
        access: Access,
    ) -> Result<Gva, Stop> {
        let fault = if name == SegmentName::Ss {
            Exception::STACK_FAULT
        } else {
            Exception::GENERAL_PROTECTION
        };
        if self.mode == CpuMode::Long64 {
            let base = match name {
                SegmentName::Fs | SegmentName::Gs => self.cpu.segment(name).base,
                _ => 0,
            };
            let address = base.wrapping_add(offset);
            let last = address.wrapping_add(size - 1);
            return if self.is_canonical(address) && self.is_canonical(last) {
                Ok(Gva(address))
            } else {
                Err(Stop::Fault(fault))
            };
        }
        let hidden = self.cpu.segment(name);
        let kind = hidden.rights.kind();
        let last = offset.wrapping_add(size - 1);
        let limit = u64::from(hidden.limit);
        // Expand-down data segments hold the offsets above the limit (SDM vol. 3A, 6.3).
        let expand_down = kind & 0b1100 == 0b0100;
        let upper = if hidden.rights.default_big() {
            0xffff_ffff
        } else {
            0xffff
        };
        let inside = if expand_down {
            offset > limit && last <= upper
        } else {
            last <= limit && last >= offset
        };
        let has_types = !matches!(self.mode, CpuMode::Real | CpuMode::Virtual8086);
        let is_code = kind & 0b1000 != 0;
        let allowed = match access {
            Access::Write => !is_code && kind & 0b10 != 0,
            Access::Read => !is_code || kind & 0b10 != 0,
            Access::Fetch => is_code,
        };
        if hidden.rights.unusable() || !inside || has_types && !allowed {
            return Err(Stop::Fault(fault));
        }
        Ok(Gva(hidden.base.wrapping_add(offset) & 0xffff_ffff))
    }

    /// #AC for an access at privilege level 3 that is not aligned, if the guest asks for it (SDM vol. 3A, section 7.15).
    fn check_alignment(&self, at: Gva, width: Width) -> Result<(), Stop> {
        const CR0_AM: u64 = 1 << 18;
        const RFLAGS_AC: u64 = 1 << 18;
        let misaligned = !at.0.is_multiple_of(width.bytes() as u64);
        if misaligned
            && self.paging.cpl == 3
            && self.paging.cr0 & CR0_AM != 0
            && self.paging.rflags & RFLAGS_AC != 0
        {
            return Err(Stop::Fault(Exception::ALIGNMENT_CHECK));
        }
        Ok(())
    }

    /// Notes which breakpoints an access hits.
    #[inline]
    fn watch(&mut self, at: Gva, width: Width, write: bool) {
        if let Some(breakpoints) = &self.breakpoints {
            self.aftermath.breakpoints |= breakpoints.data(at.0, width, write);
        }
    }

    /// Checks that an access will not fault.
    pub(super) fn probe(&self, at: Gva, width: Width, access: Access) -> Result<(), Stop> {
        self.paging.translate(self.memory, at, access)?;
        if let Some(first) = Self::split(at, width) {
            let next = Gva(at.0.wrapping_add(first as u64));
            self.paging.translate(self.memory, next, access)?;
        }
        Ok(())
    }

    /// How many bytes of an access lie on the first of two pages.
    fn split(at: Gva, width: Width) -> Option<usize> {
        let first = (mem::PAGE_SIZE - at.page_offset()) as usize;
        (first < width.bytes()).then_some(first)
    }

    /// The device address behind `at`, if the exit told it: it has then passed the guest's own page
    /// tables in the processor, for an access of this kind, and is known not to be RAM.
    pub(super) fn known_device(&self, at: Gva, width: Width, write: bool) -> Option<Gpa> {
        let target = self.target?;
        let known = target.gpa.page_offset() == at.page_offset()
            && Self::split(at, width).is_none()
            && (target.write || !write);
        known.then_some(target.gpa)
    }

    pub(super) fn load(&mut self, at: Gva, width: Width) -> Result<u64, Stop> {
        self.watch(at, width, false);
        if let Some(gpa) = self.known_device(at, width, false) {
            return Ok(self.platform.mmio_read(self.cpu, gpa, width) & width.mask());
        }
        self.check_alignment(at, width)?;
        if Self::split(at, width).is_some() {
            self.probe(at, width, Access::Read)?;
            let mut value = 0;
            for n in 0..width.bytes() {
                let byte = self.load(Gva(at.0.wrapping_add(n as u64)), Width::Byte)?;
                value |= byte << (8 * n);
            }
            return Ok(value);
        }
        let gpa = self.paging.translate(self.memory, at, Access::Read)?;
        let mut buffer = [0; 8];
        let bytes = &mut buffer[..width.bytes()];
        if self.memory.read(gpa, bytes).is_ok() {
            return Ok(u64::from_le_bytes(buffer));
        }
        Ok(self.platform.mmio_read(self.cpu, gpa, width) & width.mask())
    }

    pub(super) fn store(&mut self, at: Gva, width: Width, value: u64) -> Result<(), Stop> {
        self.watch(at, width, true);
        if let Some(gpa) = self.known_device(at, width, true) {
            self.platform
                .mmio_write(self.cpu, gpa, width, value & width.mask());
            return Ok(());
        }
        self.check_alignment(at, width)?;
        if Self::split(at, width).is_some() {
            self.probe(at, width, Access::Write)?;
            for (n, byte) in value
                .to_le_bytes()
                .into_iter()
                .take(width.bytes())
                .enumerate()
            {
                self.store(
                    Gva(at.0.wrapping_add(n as u64)),
                    Width::Byte,
                    u64::from(byte),
                )?;
            }
            return Ok(());
        }
        let gpa = self.paging.translate(self.memory, at, Access::Write)?;
        let bytes = value.to_le_bytes();
        if self.memory.write(gpa, &bytes[..width.bytes()]).is_err() {
            self.platform
                .mmio_write(self.cpu, gpa, width, value & width.mask());
        }
        Ok(())
    }
}

fn segment_name(register: Register) -> Option<SegmentName> {
    Some(match register {
        Register::ES => SegmentName::Es,
        Register::CS => SegmentName::Cs,
        Register::SS => SegmentName::Ss,
        Register::DS => SegmentName::Ds,
        Register::FS => SegmentName::Fs,
        Register::GS => SegmentName::Gs,
        _ => return None,
    })
}

/// The full register that holds `register`, and the bit that it starts at.
pub(super) fn general(register: Register) -> Option<(Gpr, u32)> {
    if !register.is_gpr() {
        return None;
    }
    let shift = match register {
        Register::AH | Register::CH | Register::DH | Register::BH => 8,
        _ => 0,
    };
    Some((Gpr::ALL[register.full_register().number()], shift))
}

//! Loading of segment registers: MOV, POP, and the far pointers LDS, LES, LFS, LGS, LSS.
//!
//! The selector came from device memory, or the code itself is in it. Checks are those of SDM vol. 2B, MOV,
//! and vol. 3A, section 6.8; nothing is changed before the last of them has passed.

use iced_x86::{Mnemonic, Register};
use mem::{Gva, Width};
use virt::{AccessRights, CpuMode, Segment, SegmentName, Shadow, VirtualCpu};

use super::{
    Exception, Platform,
    execute::{Run, Stop},
    system::{GENERAL, NOT_PRESENT, fault},
};
use crate::walk::Access;

/// Vector of #SS.
const STACK: u8 = 12;
/// The accessed bit in the type of a code or data segment.
pub(super) const ACCESSED: u8 = 1;

/// A code segment, by its type.
pub(super) const fn is_code(rights: AccessRights) -> bool {
    rights.code_or_data() && rights.kind() & 8 != 0
}

/// A conforming code segment: it runs at its caller's privilege.
pub(super) const fn is_conforming(rights: AccessRights) -> bool {
    is_code(rights) && rights.kind() & 4 != 0
}

/// Data that may be written.
pub(super) const fn is_writable(rights: AccessRights) -> bool {
    rights.code_or_data() && rights.kind() & 0b1010 == 0b0010
}

/// Data, or code that may be read.
pub(super) const fn is_readable(rights: AccessRights) -> bool {
    rights.code_or_data() && (rights.kind() & 8 == 0 || rights.kind() & 2 != 0)
}

/// A segment register with a null selector; `dpl` matters in SS, where it is the privilege level.
pub(super) fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: 0,
        rights: AccessRights::new().with_unusable(true).with_dpl(dpl),
    }
}

/// A segment register of virtual-8086 mode.
pub(super) fn segment_8086(selector: u16) -> Segment {
    Segment {
        selector,
        base: u64::from(selector) << 4,
        limit: 0xffff,
        rights: AccessRights::new()
            .with_kind(3)
            .with_code_or_data(true)
            .with_dpl(3)
            .with_present(true),
    }
}

impl<V: VirtualCpu, P: Platform<V>> Run<'_, V, P> {
    /// LDS, LES, LFS, LGS, LSS; `false`: another instruction.
    pub(super) fn load_far_pointer(&mut self) -> Result<bool, Stop> {
        let name = match self.instruction.mnemonic() {
            Mnemonic::Lds => SegmentName::Ds,
            Mnemonic::Les => SegmentName::Es,
            Mnemonic::Lfs => SegmentName::Fs,
            Mnemonic::Lgs => SegmentName::Gs,
            Mnemonic::Lss => SegmentName::Ss,
            _ => return Ok(false),
        };
        let register = self.instruction.op0_register();
        let width = Width::from_bytes(register.size()).ok_or(Stop::Unsupported)?;
        let (offset, selector) = self.far_pointer(1, width)?;
        self.load_segment(name, selector)?;
        self.write_register(register, offset)?;
        Ok(true)
    }

    /// A far pointer in memory: the offset, and the selector behind it.
    pub(super) fn far_pointer(&mut self, operand: u32, width: Width) -> Result<(u64, u16), Stop> {
        let at = self.operand_address_for(operand, Access::Read)?;
        // The exit told the address of one part only.
        self.target = None;
        let offset = self.load(at, width)?;
        let selector_at = Gva(at.0.wrapping_add(width.bytes() as u64));
        let selector = self.load(selector_at, Width::Word)? as u16;
        Ok((offset, selector))
    }

    /// Loads a segment register by its number in an instruction. CS cannot be.
    pub(super) fn write_segment_register(
        &mut self,
        register: Register,
        selector: u16,
    ) -> Result<(), Stop> {
        let name = match register {
            Register::ES => SegmentName::Es,
            Register::SS => SegmentName::Ss,
            Register::DS => SegmentName::Ds,
            Register::FS => SegmentName::Fs,
            Register::GS => SegmentName::Gs,
            _ => return Err(Stop::Fault(Exception::UNDEFINED_OPCODE)),
        };
        self.load_segment(name, selector)?;
        if name == SegmentName::Ss {
            self.aftermath.shadow = Some(Shadow::MovSs);
        }
        Ok(())
    }

    /// Loads ES, SS, DS, FS or GS with the processor's checks.
    fn load_segment(&mut self, name: SegmentName, selector: u16) -> Result<(), Stop> {
        match self.mode {
            CpuMode::Real => {
                // Limit and rights stay: that is how "unreal mode" works.
                let mut segment = self.cpu.segment(name);
                (segment.selector, segment.base) = (selector, u64::from(selector) << 4);
                self.cpu.set_segment(name, segment);
                return Ok(());
            }
            CpuMode::Virtual8086 => {
                self.cpu.set_segment(name, segment_8086(selector));
                return Ok(());
            }
            _ => {}
        }
        let segment = if name == SegmentName::Ss {
            self.stack_segment(selector, self.paging.cpl, self.mode == CpuMode::Long64)?
        } else if selector & !3 == 0 {
            null_segment(selector, 0)
        } else {
            self.data_segment(selector)?
        };
        self.cpu.set_segment(name, segment);
        Ok(())
    }

    /// What SS becomes at privilege level `cpl`; `to_64_bit`: the code that goes on is 64-bit code.
    pub(super) fn stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        to_64_bit: bool,
    ) -> Result<Segment, Stop> {
        let rpl = selector as u8 & 3;
        if selector & !3 == 0 {
            return if to_64_bit && cpl < 3 && rpl == cpl {
                Ok(null_segment(selector, cpl))
            } else {
                Err(Stop::Fault(Exception::GENERAL_PROTECTION))
            };
        }
        let entry = self.entry(selector, false)?;
        let rights = entry.rights();
        if rpl != cpl || !is_writable(rights) || rights.dpl() != cpl {
            return Err(fault(GENERAL, selector));
        }
        if !rights.present() {
            return Err(fault(STACK, selector));
        }
        self.accessed(&entry, selector)
    }

    fn data_segment(&mut self, selector: u16) -> Result<Segment, Stop> {
        let entry = self.entry(selector, false)?;
        let rights = entry.rights();
        let privilege = self.paging.cpl.max(selector as u8 & 3);
        let permitted = is_conforming(rights) || privilege <= rights.dpl();
        if !is_readable(rights) || !permitted {
            return Err(fault(GENERAL, selector));
        }
        if !rights.present() {
            return Err(fault(NOT_PRESENT, selector));
        }
        self.accessed(&entry, selector)
    }

    /// Marks a descriptor as accessed in its table, and gives what the register holds then.
    pub(super) fn accessed(
        &mut self,
        entry: &super::system::Entry,
        selector: u16,
    ) -> Result<Segment, Stop> {
        self.mark(entry, ACCESSED.into())?;
        let mut segment = entry.segment(selector);
        segment.rights.set_kind(segment.rights.kind() | ACCESSED);
        Ok(segment)
    }

    /// After a return to less privileged code: data segments that it may not use become null
    /// (SDM vol. 3A, section 6.8.6).
    pub(super) fn drop_privileged_segments(&mut self, cpl: u8) {
        for name in [
            SegmentName::Es,
            SegmentName::Ds,
            SegmentName::Fs,
            SegmentName::Gs,
        ] {
            let rights = self.cpu.segment(name).rights;
            if !rights.unusable() && !is_conforming(rights) && rights.dpl() < cpl {
                self.cpu.set_segment(name, null_segment(0, 0));
            }
        }
    }
}

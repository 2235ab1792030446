//! Descriptor-table registers, LDTR, TR and the far jump, with their operand in device memory.

use iced_x86::{Mnemonic, OpKind};
use mem::{Gva, Width};
use virt::{AccessRights, CpuMode, DescriptorTable, Segment, SegmentName, VirtualCpu};

use super::{
    Exception, Platform,
    execute::{Run, Step, Stop},
};
use crate::walk::Access;

const TSS_BUSY: u8 = 2;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_AC: u64 = 1 << 18;

fn fault(vector: u8, selector: u16) -> Stop {
    Stop::Fault(Exception {
        vector,
        error_code: Some(u32::from(selector & !3)),
        cr2: None,
    })
}

const NOT_PRESENT: u8 = 11;
const GENERAL: u8 = 13;

/// A descriptor, and where it stands.
struct Entry {
    low: u64,
    high: u64,
    at: Gva,
}

impl Entry {
    fn rights(&self) -> AccessRights {
        AccessRights::from_bits((self.low >> 40) as u32 & 0xf0ff)
    }

    fn segment(&self, selector: u16) -> Segment {
        let limit = (self.low & 0xffff) as u32 | (self.low >> 32) as u32 & 0xf_0000;
        let rights = self.rights();
        Segment {
            selector,
            base: self.low >> 16 & 0xff_ffff | self.low >> 56 << 24 | self.high << 32,
            limit: if rights.granularity() {
                limit << 12 | 0xfff
            } else {
                limit
            },
            rights,
        }
    }
}

impl<V: VirtualCpu, P: Platform<V>> Run<'_, V, P> {
    /// Executes one of these instructions; `None`: another one.
    pub(super) fn system(&mut self) -> Result<Option<Step>, Stop> {
        match self.instruction.mnemonic() {
            Mnemonic::Lldt => {
                let selector = self.get(0)? as u16;
                self.load_ldt(selector)?;
            }
            Mnemonic::Ltr => {
                let selector = self.get(0)? as u16;
                self.load_task_register(selector)?;
            }
            Mnemonic::Sldt => self.store_selector(SegmentName::Ldtr)?,
            Mnemonic::Str => self.store_selector(SegmentName::Tr)?,
            Mnemonic::Lgdt => {
                let table = self.load_table()?;
                self.cpu.set_gdtr(table);
            }
            Mnemonic::Lidt => {
                let table = self.load_table()?;
                self.cpu.set_idtr(table);
            }
            Mnemonic::Sgdt => self.store_table(self.cpu.gdtr())?,
            Mnemonic::Sidt => self.store_table(self.cpu.idtr())?,
            Mnemonic::Jmp if self.instruction.is_jmp_far_indirect() => {
                return Ok(Some(Step::Jump(self.far_jump()?)));
            }
            // Caches hold nothing of a device.
            Mnemonic::Clflush
            | Mnemonic::Clflushopt
            | Mnemonic::Clwb
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchw
            | Mnemonic::Nop => {}
            _ => return Ok(None),
        }
        Ok(Some(Step::Done))
    }

    fn in_long_mode(&self) -> bool {
        self.paging.efer & EFER_LMA != 0
    }

    fn store_selector(&mut self, name: SegmentName) -> Result<(), Stop> {
        let selector = self.cpu.segment(name).selector;
        self.set(0, selector.into())
    }

    /// Bytes of a table's base in memory.
    fn base_width(&self) -> Width {
        if self.mode == CpuMode::Long64 {
            Width::Qword
        } else {
            Width::Dword
        }
    }

    fn load_table(&mut self) -> Result<DescriptorTable, Stop> {
        let at = self.operand_address_for(0, Access::Read)?;
        self.target = None;
        let limit = self.load(at, Width::Word)? as u16;
        let width = self.base_width();
        let mut base = self.load(Gva(at.0.wrapping_add(2)), width)?;
        if width == Width::Qword {
            if !self.is_canonical(base) {
                return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
            }
        } else if self.has_small_operand() {
            base &= 0xff_ffff;
        }
        Ok(DescriptorTable { base, limit })
    }

    fn store_table(&mut self, table: DescriptorTable) -> Result<(), Stop> {
        let at = self.operand_address_for(0, Access::Write)?;
        self.target = None;
        let width = self.base_width();
        let base_at = Gva(at.0.wrapping_add(2));
        self.probe(at, Width::Word, Access::Write)?;
        self.probe(base_at, width, Access::Write)?;
        self.store(at, Width::Word, table.limit.into())?;
        self.store(base_at, width, table.base)
    }

    /// Whether LGDT or LIDT has a 16-bit operand: 24 bits of the base count.
    fn has_small_operand(&self) -> bool {
        use iced_x86::Code;
        matches!(
            self.instruction.code(),
            Code::Lgdt_m1632_16 | Code::Lidt_m1632_16
        )
    }

    /// A descriptor of GDT or LDT; `wide`: of 16 bytes.
    ///
    /// # Errors
    /// #GP with the selector: beyond the table's limit. Page faults.
    fn entry(&mut self, selector: u16, wide: bool) -> Result<Entry, Stop> {
        let (base, limit) = if selector & 4 == 0 {
            let gdt = self.cpu.gdtr();
            (gdt.base, u32::from(gdt.limit))
        } else {
            let ldt = self.cpu.segment(SegmentName::Ldtr);
            if ldt.rights.unusable() {
                return Err(fault(GENERAL, selector));
            }
            (ldt.base, ldt.limit)
        };
        let offset = u32::from(selector & !7);
        let bytes = if wide { 16 } else { 8 };
        if offset + bytes - 1 > limit {
            return Err(fault(GENERAL, selector));
        }
        let at = Gva(base.wrapping_add(offset.into()));
        self.as_system(|run| {
            let low = run.load(at, Width::Qword)?;
            let high = if wide {
                run.load(Gva(at.0.wrapping_add(8)), Width::Qword)? & 0xffff_ffff
            } else {
                0
            };
            Ok(Entry { low, high, at })
        })
    }

    /// Sets bits of a descriptor's second byte of rights in its table.
    fn mark(&mut self, entry: &Entry, bits: u64) -> Result<(), Stop> {
        let value = entry.low | bits << 40;
        if value == entry.low {
            return Ok(());
        }
        self.as_system(|run| run.store(entry.at, Width::Qword, value))
    }

    /// Accesses as the processor's own: privilege level 0, and EFLAGS.AC has no say.
    fn as_system<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T, Stop>) -> Result<T, Stop> {
        let paging = self.paging;
        let target = self.target.take();
        self.paging.cpl = 0;
        self.paging.rflags &= !RFLAGS_AC;
        let result = work(self);
        self.paging = paging;
        self.target = target;
        result
    }

    fn load_ldt(&mut self, selector: u16) -> Result<(), Stop> {
        const LDT: u8 = 2;
        if selector & !3 == 0 {
            let mut nothing = self.cpu.segment(SegmentName::Ldtr);
            nothing.selector = selector;
            nothing.rights.set_unusable(true);
            self.cpu.set_segment(SegmentName::Ldtr, nothing);
            return Ok(());
        }
        if selector & 4 != 0 {
            return Err(fault(GENERAL, selector));
        }
        let entry = self.entry(selector, self.in_long_mode())?;
        let rights = entry.rights();
        if rights.code_or_data() || rights.kind() != LDT {
            return Err(fault(GENERAL, selector));
        }
        if !rights.present() {
            return Err(fault(NOT_PRESENT, selector));
        }
        self.cpu
            .set_segment(SegmentName::Ldtr, entry.segment(selector));
        Ok(())
    }

    fn load_task_register(&mut self, selector: u16) -> Result<(), Stop> {
        const SMALL: u8 = 1;
        const LARGE: u8 = 9;
        if selector & !3 == 0 || selector & 4 != 0 {
            return Err(fault(GENERAL, selector));
        }
        let long = self.in_long_mode();
        let entry = self.entry(selector, long)?;
        let rights = entry.rights();
        let available = rights.kind() == LARGE || rights.kind() == SMALL && !long;
        if rights.code_or_data() || !available {
            return Err(fault(GENERAL, selector));
        }
        if !rights.present() {
            return Err(fault(NOT_PRESENT, selector));
        }
        self.mark(&entry, TSS_BUSY.into())?;
        let mut segment = entry.segment(selector);
        segment.rights.set_kind(rights.kind() | TSS_BUSY);
        self.cpu.set_segment(SegmentName::Tr, segment);
        Ok(())
    }

    /// JMP m16:16, m16:32 or m16:64 to a code segment. Gates and task switches this way are not known.
    fn far_jump(&mut self) -> Result<u64, Stop> {
        const ACCESSED: u64 = 1;
        if self.instruction.op0_kind() != OpKind::Memory {
            return Err(Stop::Unsupported);
        }
        let width = Width::from_bytes(self.instruction.memory_size().size().saturating_sub(2))
            .ok_or(Stop::Unsupported)?;
        let at = self.operand_address_for(0, Access::Read)?;
        self.target = None;
        let offset = self.load(at, width)?;
        let selector_at = Gva(at.0.wrapping_add(width.bytes() as u64));
        let selector = self.load(selector_at, Width::Word)? as u16;
        let old = self.cpu.segment(SegmentName::Cs);
        if matches!(self.mode, CpuMode::Real | CpuMode::Virtual8086) {
            if offset > u64::from(old.limit) {
                return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
            }
            let base = u64::from(selector) << 4;
            let cs = Segment {
                selector,
                base,
                ..old
            };
            self.cpu.set_segment(SegmentName::Cs, cs);
            return Ok(offset);
        }
        if selector & !3 == 0 {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        let entry = self.entry(selector, false)?;
        let rights = entry.rights();
        if !rights.code_or_data() {
            return Err(Stop::Unsupported);
        }
        let (cpl, rpl) = (self.paging.cpl, selector as u8 & 3);
        let (is_code, conforming) = (rights.kind() & 8 != 0, rights.kind() & 4 != 0);
        let privilege = if conforming {
            rights.dpl() <= cpl
        } else {
            rpl <= cpl && rights.dpl() == cpl
        };
        let contradicts = self.in_long_mode() && rights.long() && rights.default_big();
        if !is_code || !privilege || contradicts {
            return Err(fault(GENERAL, selector));
        }
        if !rights.present() {
            return Err(fault(NOT_PRESENT, selector));
        }
        let mut cs = entry.segment(selector & !3 | u16::from(cpl));
        let to_64_bit = self.in_long_mode() && rights.long();
        cs.rights.set_long(to_64_bit);
        let good = if to_64_bit {
            self.is_canonical(offset)
        } else {
            offset <= u64::from(cs.limit)
        };
        if !good {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        self.mark(&entry, ACCESSED)?;
        cs.rights.set_kind(rights.kind() | ACCESSED as u8);
        self.cpu.set_segment(SegmentName::Cs, cs);
        Ok(offset)
    }
}

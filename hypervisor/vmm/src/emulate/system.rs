//! Descriptor-table registers, LDTR and TR with their operand in device memory, and descriptors.

use iced_x86::Mnemonic;
use mem::{Gva, Width};
use virt::{AccessRights, CpuMode, DescriptorTable, Segment, SegmentName, VirtualCpu};

use super::{
    Exception, Platform,
    execute::{Run, Stop},
};
use crate::walk::Access;

const TSS_BUSY: u8 = 2;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_AC: u64 = 1 << 18;

pub(super) fn fault(vector: u8, selector: u16) -> Stop {
    Stop::Fault(Exception {
        vector,
        error_code: Some(u32::from(selector & !3)),
        cr2: None,
    })
}

pub(super) const NOT_PRESENT: u8 = 11;
pub(super) const GENERAL: u8 = 13;

/// A descriptor, and where it stands.
pub(super) struct Entry {
    pub(super) low: u64,
    /// The upper half of a wide one; else 0.
    pub(super) high: u64,
    at: Gva,
}

impl Entry {
    pub(super) fn rights(&self) -> AccessRights {
        AccessRights::from_bits((self.low >> 40) as u32 & 0xf0ff)
    }

    pub(super) fn segment(&self, selector: u16) -> Segment {
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
    /// Executes one of these instructions; `false`: another one.
    pub(super) fn system(&mut self) -> Result<bool, Stop> {
        match self.instruction.mnemonic() {
            Mnemonic::Lldt => {
                self.check_privileged()?;
                let selector = self.get(0)? as u16;
                self.load_ldt(selector)?;
            }
            Mnemonic::Ltr => {
                self.check_privileged()?;
                let selector = self.get(0)? as u16;
                self.load_task_register(selector)?;
            }
            Mnemonic::Sldt => self.store_selector(SegmentName::Ldtr)?,
            Mnemonic::Str => self.store_selector(SegmentName::Tr)?,
            Mnemonic::Lgdt => {
                self.check_privileged()?;
                let table = self.load_table()?;
                self.cpu.set_gdtr(table);
            }
            Mnemonic::Lidt => {
                self.check_privileged()?;
                let table = self.load_table()?;
                self.cpu.set_idtr(table);
            }
            Mnemonic::Sgdt => self.store_table(self.cpu.gdtr())?,
            Mnemonic::Sidt => self.store_table(self.cpu.idtr())?,
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
            _ => return Ok(false),
        }
        Ok(true)
    }

    pub(super) fn in_long_mode(&self) -> bool {
        self.paging.efer & EFER_LMA != 0
    }

    fn store_selector(&mut self, name: SegmentName) -> Result<(), Stop> {
        self.check_user_mode_prevention()?;
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
        self.check_user_mode_prevention()?;
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
    pub(super) fn entry(&mut self, selector: u16, wide: bool) -> Result<Entry, Stop> {
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
                run.load(Gva(at.0.wrapping_add(8)), Width::Qword)?
            } else {
                0
            };
            Ok(Entry { low, high, at })
        })
    }

    /// Sets bits of a descriptor's second byte of rights in its table.
    pub(super) fn mark(&mut self, entry: &Entry, bits: u64) -> Result<(), Stop> {
        let value = entry.low | bits << 40;
        if value == entry.low {
            return Ok(());
        }
        self.as_system(|run| run.store(entry.at, Width::Qword, value))
    }

    /// Accesses as the processor's own: privilege level 0, and EFLAGS.AC has no say.
    pub(super) fn as_system<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
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
}

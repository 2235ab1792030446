//! Hardware task switches: far JMP and CALL, IRET, and task gates, with 16- and 32-bit TSSs.
//!
//! VT-x leaves every task switch to the VMM, after the processor has checked the gate and the
//! privilege to use it (SDM vol. 3C, section 26.4.2). What follows is the rest of SDM vol. 3A, section 8.3:
//! the old task's state is stored, the new one's loaded and checked. AMD-V switches tasks in the guest by itself.
//!
//! Invariants: a fault that comes before the new task's registers are loaded leaves the vCPU as it was; a later one is
//! the new task's, with all registers of the vCPU such that a VM entry takes them. One call touches
//! two TSSs and at most ten descriptors.

use mem::{Direction, Gva, PAGE_SIZE, guest::GuestMemory};
use virt::{
    AccessRights, DescriptorTable, Event, Gpr, Segment, SegmentName, TaskSource, TaskSwitch,
    VirtualCpu,
};

use crate::{
    control,
    emulate::Exception,
    walk::{Access, Paging},
};

const CR0_TS: u64 = 1 << 3;
const CR0_PG: u64 = 1 << 31;
const RFLAGS_NT: u64 = 1 << 14;
const RFLAGS_VM: u64 = 1 << 17;
const RFLAGS_AC: u64 = 1 << 18;
const RFLAGS_FIXED: u64 = 1 << 1;
/// The flags that a TSS can hold.
const RFLAGS_DEFINED: u64 = 0x003f_7fd5;
/// DR7: local breakpoints and LE, which end with the task.
const DR7_LOCAL: u64 = 0x155;
/// Error code: the event came from outside the program.
const EXTERNAL: u32 = 1;
/// Offset of the type's busy bit in a TSS descriptor.
const BUSY: u8 = 1 << 1;
/// Types of system descriptors.
const LDT: u8 = 2;
const TSS_16: u8 = 1;
const TSS_32: u8 = 9;

/// What a task switch did beyond the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The new task runs.
    Done,
    /// The new task is trapped before its first instruction: its TSS asks for it.
    Trap,
    /// An exception, of the old task or of the new one.
    Fault(Exception),
    /// The exception came in the delivery of a double fault.
    TripleFault,
}

/// The two formats of a TSS (SDM vol. 3A, figures 8-2 and 8-10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Small,
    Large,
}

/// Bytes of the larger TSS.
const TSS_BYTES: usize = 104;
/// Segment registers in the order of the TSS.
const SEGMENTS: [SegmentName; 6] = [
    SegmentName::Es,
    SegmentName::Cs,
    SegmentName::Ss,
    SegmentName::Ds,
    SegmentName::Fs,
    SegmentName::Gs,
];
/// Registers in the order of the TSS.
const GPRS: [Gpr; 8] = [
    Gpr::Rax,
    Gpr::Rcx,
    Gpr::Rdx,
    Gpr::Rbx,
    Gpr::Rsp,
    Gpr::Rbp,
    Gpr::Rsi,
    Gpr::Rdi,
];

impl Format {
    fn of(kind: u8) -> Option<Self> {
        match kind & !BUSY {
            TSS_16 => Some(Format::Small),
            TSS_32 => Some(Format::Large),
            _ => None,
        }
    }

    const fn bytes(self) -> usize {
        match self {
            Format::Small => 44,
            Format::Large => TSS_BYTES,
        }
    }

    /// Bytes of a register.
    const fn step(self) -> usize {
        match self {
            Format::Small => 2,
            Format::Large => 4,
        }
    }

    /// Offset of the instruction pointer, the first field that a switch away stores.
    const fn ip(self) -> usize {
        match self {
            Format::Small => 14,
            Format::Large => 32,
        }
    }

    /// How many segment registers there are: the smaller one has no FS and GS.
    const fn segments(self) -> usize {
        match self {
            Format::Small => 4,
            Format::Large => 6,
        }
    }
}

/// A TSS as far as a switch reads or writes it.
#[derive(Clone, Copy, Debug)]
struct Tss {
    format: Format,
    bytes: [u8; TSS_BYTES],
}

impl Tss {
    fn new(format: Format) -> Self {
        Tss {
            format,
            bytes: [0; TSS_BYTES],
        }
    }

    fn get(&self, offset: usize, bytes: usize) -> u32 {
        let mut word = [0; 4];
        if let (Some(to), Some(from)) = (
            word.get_mut(..bytes),
            self.bytes.get(offset..offset + bytes),
        ) {
            to.copy_from_slice(from);
        }
        u32::from_le_bytes(word)
    }

    fn set(&mut self, offset: usize, bytes: usize, value: u32) {
        let word = value.to_le_bytes();
        if let (Some(to), Some(from)) = (
            self.bytes.get_mut(offset..offset + bytes),
            word.get(..bytes),
        ) {
            to.copy_from_slice(from);
        }
    }

    /// The `index`th of instruction pointer, flags, registers, and segment selectors.
    fn register(&self, index: usize) -> u32 {
        let step = self.format.step();
        self.get(self.format.ip() + index * step, step)
    }

    fn set_register(&mut self, index: usize, value: u32) {
        let step = self.format.step();
        self.set(self.format.ip() + index * step, step, value);
    }

    fn selector(&self, index: usize) -> u16 {
        if index < self.format.segments() {
            self.register(FIRST_SEGMENT + index) as u16
        } else {
            0
        }
    }

    fn ldt(&self) -> u16 {
        match self.format {
            Format::Small => self.get(42, 2) as u16,
            Format::Large => self.get(96, 2) as u16,
        }
    }

    fn cr3(&self) -> Option<u32> {
        (self.format == Format::Large).then(|| self.get(28, 4))
    }

    fn traps(&self) -> bool {
        self.format == Format::Large && self.get(100, 2) & 1 != 0
    }

    /// The part that a switch away stores.
    fn stored(&self) -> (usize, &[u8]) {
        let first = self.format.ip();
        let end = first + (FIRST_SEGMENT + self.format.segments()) * self.format.step();
        (first, self.bytes.get(first..end).unwrap_or_default())
    }
}

/// Places of a TSS's registers, by [`Tss::register`].
const IP: usize = 0;
const FLAGS: usize = 1;
const FIRST_GPR: usize = 2;
const FIRST_SEGMENT: usize = 10;

/// A segment descriptor as it stands in its table.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    raw: u64,
    at: Gva,
}

impl Descriptor {
    fn rights(self) -> AccessRights {
        AccessRights::from_bits((self.raw >> 40) as u32 & 0xf0ff)
    }

    fn segment(self, selector: u16) -> Segment {
        let limit = (self.raw & 0xffff) as u32 | (self.raw >> 32) as u32 & 0xf_0000;
        let rights = self.rights();
        Segment {
            selector,
            base: self.raw >> 16 & 0xff_ffff | self.raw >> 56 << 24,
            limit: if rights.granularity() {
                limit << 12 | 0xfff
            } else {
                limit
            },
            // The L bit means nothing outside IA-32e mode, where there are no task switches.
            rights: rights.with_long(false),
        }
    }
}

/// Data, readable and writable, or code. Meaningful for S = 1.
const fn is_code(kind: u8) -> bool {
    kind & 8 != 0
}

const fn is_writable_data(kind: u8) -> bool {
    kind & 0b1010 == 0b0010
}

const fn is_readable(kind: u8) -> bool {
    !is_code(kind) || kind & 2 != 0
}

const fn is_conforming(kind: u8) -> bool {
    kind & 0b1100 == 0b1100
}

/// A segment register that holds nothing.
fn unusable(selector: u16) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: 0,
        rights: AccessRights::new().with_unusable(true),
    }
}

/// A segment of virtual-8086 mode.
fn segment_8086(selector: u16) -> Segment {
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

/// The exceptions of a switch: a vector and the selector at fault.
fn selector_fault(vector: u8, selector: u16, external: bool) -> Exception {
    let external = if external { EXTERNAL } else { 0 };
    Exception {
        vector,
        error_code: Some(u32::from(selector & !3) | external),
        cr2: None,
    }
}

const TS: u8 = 10;
const NP: u8 = 11;
const SS: u8 = 12;
const GP: u8 = 13;

/// One switch under way.
struct Switch<'a, V> {
    cpu: &'a mut V,
    context: control::Context<'a>,
    /// For the processor's own accesses: as privilege level 0, and EFLAGS.AC has no say.
    paging: Paging,
    external: bool,
}

/// Switches to the task that `request` names.
pub fn switch<V: VirtualCpu>(
    cpu: &mut V,
    context: control::Context<'_>,
    request: &TaskSwitch,
) -> Outcome {
    let external = matches!(
        request.event,
        Some(Event::Interrupt(_) | Event::Nmi | Event::Exception { .. })
    );
    let paging = system_paging(cpu, context.policy.physical_bits());
    let mut switch = Switch {
        cpu,
        context,
        paging,
        external,
    };
    match switch.run(request) {
        Ok(false) => Outcome::Done,
        Ok(true) => Outcome::Trap,
        Err(exception) => after(request.event, exception),
    }
}

/// What becomes of an exception in the delivery of an event (SDM vol. 3A, table 7-5).
pub(crate) fn after(event: Option<Event>, exception: Exception) -> Outcome {
    const DOUBLE_FAULT: u8 = 8;
    const PAGE_FAULT: u8 = 14;
    let contributory = |vector: u8| matches!(vector, 0 | TS | NP | SS | GP);
    let Some(Event::Exception { vector: first, .. }) = event else {
        return Outcome::Fault(exception);
    };
    let second = exception.vector;
    if first == DOUBLE_FAULT && (contributory(second) || second == PAGE_FAULT) {
        return Outcome::TripleFault;
    }
    let double = contributory(first) && contributory(second)
        || first == PAGE_FAULT && (contributory(second) || second == PAGE_FAULT);
    Outcome::Fault(if double {
        Exception {
            vector: DOUBLE_FAULT,
            error_code: Some(0),
            cr2: exception.cr2,
        }
    } else {
        exception
    })
}

/// For the processor's own accesses: as privilege level 0, and EFLAGS.AC has no say.
pub(crate) fn system_paging<V: VirtualCpu>(cpu: &V, physical_bits: u8) -> Paging {
    let mut paging = Paging::of(cpu, physical_bits);
    paging.cpl = 0;
    paging.rflags &= !RFLAGS_AC;
    paging
}

/// Reads or writes bytes at a linear address: first all of the translation, so that a fault comes before the first byte.
fn access(
    memory: &GuestMemory,
    paging: &Paging,
    at: Gva,
    bytes: &mut [u8],
    direction: Direction,
) -> Result<(), Exception> {
    let kind = match direction {
        Direction::Read => Access::Read,
        Direction::Write => Access::Write,
    };
    let start = at.0 & 0xffff_ffff;
    let first = ((PAGE_SIZE - start % PAGE_SIZE) as usize).min(bytes.len());
    let (head, tail) = bytes.split_at_mut(first);
    let low = paging.translate(memory, Gva(start), kind)?;
    let high = if tail.is_empty() {
        low
    } else {
        let next = start.wrapping_add(first as u64) & 0xffff_ffff;
        paging.translate(memory, Gva(next), kind)?
    };
    for (gpa, part) in [(low, head), (high, tail)] {
        match direction {
            // Outside RAM reads give ones and writes go nowhere.
            Direction::Read => {
                if memory.read(gpa, part).is_err() {
                    part.fill(0xff);
                }
            }
            Direction::Write => {
                let _outside_ram = memory.write(gpa, part);
            }
        }
    }
    Ok(())
}

impl<V: VirtualCpu> Switch<'_, V> {
    /// The switch itself. Returns whether the new task is to be trapped.
    fn run(&mut self, request: &TaskSwitch) -> Result<bool, Exception> {
        let returns = request.source == TaskSource::Iret;
        let nests = matches!(request.source, TaskSource::Call | TaskSource::Gate);
        let old_tr = self.cpu.segment(SegmentName::Tr);
        let old_format = Format::of(old_tr.rights.kind()).unwrap_or(Format::Large);

        let bad_vector = if returns { TS } else { GP };
        let selector = request.selector;
        let descriptor = self.global_descriptor(selector)?.ok_or(selector_fault(
            bad_vector,
            selector,
            self.external,
        ))?;
        let rights = descriptor.rights();
        let busy = rights.kind() & BUSY != 0;
        let format = Format::of(rights.kind())
            .filter(|_| !rights.code_or_data() && busy == returns)
            .ok_or(selector_fault(bad_vector, selector, self.external))?;
        if !rights.present() {
            return Err(selector_fault(NP, selector, self.external));
        }
        let mut tr = descriptor.segment(selector);
        if (tr.limit as usize) < format.bytes() - 1 {
            return Err(selector_fault(TS, selector, self.external));
        }

        // Whatever can fault in the old task is touched before anything changes.
        let mut tss = Tss::new(format);
        if let Some(bytes) = tss.bytes.get_mut(..format.bytes()) {
            access(
                self.context.memory,
                &self.paging,
                Gva(tr.base),
                bytes,
                Direction::Read,
            )?;
        }
        if nests {
            self.probe_write(Gva(tr.base))?;
        }
        let old = self.old_state(old_format, request);
        let (first, stored) = old.stored();
        let old_at = Gva(old_tr.base.wrapping_add(first as u64));
        let mut stored_bytes = [0; TSS_BYTES];
        let stored_bytes = stored_bytes
            .get_mut(..stored.len())
            .ok_or(Exception::GENERAL_PROTECTION)?;
        stored_bytes.copy_from_slice(stored);
        let old_descriptor = self.global_descriptor(old_tr.selector)?;
        if let Some(old_descriptor) = old_descriptor {
            self.probe_write(old_descriptor.at)?;
        }
        self.probe_write(descriptor.at)?;
        self.write(old_at, stored_bytes)?;

        if !nests && let Some(old_descriptor) = old_descriptor {
            self.set_busy(old_descriptor, false)?;
        }
        if nests {
            let link = old_tr.selector.to_le_bytes();
            self.write(Gva(tr.base), &mut { link })?;
            tss.set(0, 2, old_tr.selector.into());
        }
        if !returns {
            self.set_busy(descriptor, true)?;
        }
        tr.rights.set_kind(rights.kind() | BUSY);
        self.cpu.set_segment(SegmentName::Tr, tr);
        self.load(&tss, nests, request)
    }

    /// The old task's registers, with the instruction pointer behind the instruction that switched.
    fn old_state(&self, format: Format, request: &TaskSwitch) -> Tss {
        let mut tss = Tss::new(format);
        let next = self.cpu.rip().wrapping_add(request.length.into());
        let mut flags = self.cpu.rflags();
        if request.source == TaskSource::Iret {
            flags &= !RFLAGS_NT;
        }
        tss.set_register(IP, next as u32);
        tss.set_register(FLAGS, flags as u32);
        for (index, gpr) in GPRS.into_iter().enumerate() {
            tss.set_register(FIRST_GPR + index, self.cpu.gpr(gpr) as u32);
        }
        for (index, name) in SEGMENTS.into_iter().take(format.segments()).enumerate() {
            let selector = self.cpu.segment(name).selector;
            tss.set_register(FIRST_SEGMENT + index, selector.into());
        }
        tss
    }

    /// Loads the new task. From here on a fault is its own.
    fn load(&mut self, tss: &Tss, nests: bool, request: &TaskSwitch) -> Result<bool, Exception> {
        let cpu = &mut *self.cpu;
        let dr7 = cpu.dr7();
        if dr7 & DR7_LOCAL != 0 {
            cpu.set_dr7(dr7 & !DR7_LOCAL);
        }
        let mut flags = u64::from(tss.register(FLAGS)) & RFLAGS_DEFINED | RFLAGS_FIXED;
        if nests {
            flags |= RFLAGS_NT;
        }
        let virtual_8086 = flags & RFLAGS_VM != 0;
        for (index, gpr) in GPRS.into_iter().enumerate() {
            cpu.set_gpr(gpr, tss.register(FIRST_GPR + index).into());
        }
        cpu.set_rip(tss.register(IP).into());
        // Ends the shadow of STI and MOV SS.
        cpu.skip_instruction(Some(0));
        let ldt = tss.ldt();
        cpu.set_segment(SegmentName::Ldtr, unusable(ldt));
        let cr3 = tss.cr3().filter(|_| cpu.cr0() & CR0_PG != 0);
        let cr0 = cpu.cr0();
        cpu.set_cr0(cr0 | CR0_TS);
        if let Some(cr3) = cr3 {
            control::write_cr3(cpu, self.context, cr3.into())?;
        }
        self.paging = system_paging(self.cpu, self.context.policy.physical_bits());
        if virtual_8086 {
            self.cpu.set_rflags(flags);
            for (index, name) in SEGMENTS.into_iter().enumerate() {
                self.cpu
                    .set_segment(name, segment_8086(tss.selector(index)));
            }
            self.load_ldt(ldt)?;
        } else {
            self.leave_8086(flags);
            self.load_segments(tss, ldt)?;
        }
        if let Some(Event::Exception {
            error_code: Some(code),
            ..
        }) = request.event
        {
            self.push(code, tss.format)?;
        }
        let cs = self.cpu.segment(SegmentName::Cs);
        if tss.register(IP) > cs.limit {
            return Err(selector_fault(GP, 0, self.external));
        }
        Ok(tss.traps())
    }

    /// Sets the flags of a task that is not in virtual-8086 mode. If the old one was, its segments are no good
    /// for the new one, whose own may fault: until they are loaded it has flat ones.
    fn leave_8086(&mut self, flags: u64) {
        let was = self.cpu.rflags() & RFLAGS_VM != 0;
        self.cpu.set_rflags(flags);
        if !was {
            return;
        }
        let flat = Segment {
            selector: 0,
            base: 0,
            limit: u32::MAX,
            rights: AccessRights::new()
                .with_kind(0b1011)
                .with_code_or_data(true)
                .with_present(true)
                .with_default_big(true)
                .with_granularity(true),
        };
        let mut data = flat;
        data.rights.set_kind(0b0011);
        self.cpu.set_segment(SegmentName::Cs, flat);
        for name in SEGMENTS {
            match name {
                SegmentName::Cs => {}
                SegmentName::Ss => self.cpu.set_segment(name, data),
                _ => self.cpu.set_segment(name, unusable(0)),
            }
        }
    }

    fn load_ldt(&mut self, selector: u16) -> Result<(), Exception> {
        if selector & !3 == 0 {
            return Ok(());
        }
        let fault = selector_fault(TS, selector, self.external);
        let descriptor = self.global_descriptor(selector)?.ok_or(fault)?;
        let rights = descriptor.rights();
        if rights.code_or_data() || rights.kind() != LDT || !rights.present() {
            return Err(fault);
        }
        let segment = descriptor.segment(selector);
        self.cpu.set_segment(SegmentName::Ldtr, segment);
        Ok(())
    }

    /// Loads the LDT and the segments with the checks of SDM vol. 3A, table 8-1.
    fn load_segments(&mut self, tss: &Tss, ldt: u16) -> Result<(), Exception> {
        // All selectors first; what cannot be loaded must not be used.
        for (index, name) in SEGMENTS.into_iter().enumerate() {
            let selector = tss.selector(index);
            match name {
                SegmentName::Cs | SegmentName::Ss => {
                    let mut segment = self.cpu.segment(name);
                    segment.selector = selector;
                    self.cpu.set_segment(name, segment);
                }
                _ => self.cpu.set_segment(name, unusable(selector)),
            }
        }
        self.load_ldt(ldt)?;
        let code = tss.selector(1);
        let cpl = (code & 3) as u8;
        let cs = self.descriptor(code, TS)?;
        let rights = cs.rights();
        let kind = rights.kind();
        let privilege = if is_conforming(kind) {
            rights.dpl() <= cpl
        } else {
            rights.dpl() == cpl
        };
        if !rights.code_or_data() || !is_code(kind) || !privilege {
            return Err(selector_fault(TS, code, self.external));
        }
        if !rights.present() {
            return Err(selector_fault(NP, code, self.external));
        }
        let stack = tss.selector(2);
        let ss = self.descriptor(stack, TS)?;
        let rights = ss.rights();
        let privilege = rights.dpl() == cpl && (stack & 3) as u8 == cpl;
        if !rights.code_or_data() || !is_writable_data(rights.kind()) || !privilege {
            return Err(selector_fault(TS, stack, self.external));
        }
        if !rights.present() {
            return Err(selector_fault(SS, stack, self.external));
        }
        // Together, since a VM entry wants the two to agree.
        let cs = self.accessed(cs, code)?;
        let ss = self.accessed(ss, stack)?;
        self.cpu.set_segment(SegmentName::Cs, cs);
        self.cpu.set_segment(SegmentName::Ss, ss);
        for (index, name) in SEGMENTS.into_iter().enumerate() {
            if matches!(name, SegmentName::Cs | SegmentName::Ss) {
                continue;
            }
            let selector = tss.selector(index);
            if selector & !3 == 0 {
                continue;
            }
            let descriptor = self.descriptor(selector, TS)?;
            let rights = descriptor.rights();
            let kind = rights.kind();
            let privilege = is_conforming(kind) || rights.dpl() >= cpl.max((selector & 3) as u8);
            if !rights.code_or_data() || !is_readable(kind) || !privilege {
                return Err(selector_fault(TS, selector, self.external));
            }
            if !rights.present() {
                return Err(selector_fault(NP, selector, self.external));
            }
            let segment = self.accessed(descriptor, selector)?;
            self.cpu.set_segment(name, segment);
        }
        Ok(())
    }

    /// Pushes an error code onto the new task's stack.
    fn push(&mut self, code: u32, format: Format) -> Result<(), Exception> {
        let bytes = format.step();
        let ss = self.cpu.segment(SegmentName::Ss);
        let mask = if ss.rights.default_big() {
            0xffff_ffff
        } else {
            0xffff
        };
        let old = self.cpu.gpr(Gpr::Rsp);
        let offset = old.wrapping_sub(bytes as u64) & mask;
        let last = offset.wrapping_add(bytes as u64 - 1);
        let limit = u64::from(ss.limit);
        let expand_down = ss.rights.kind() & 0b1100 == 0b0100;
        let inside = if expand_down {
            offset > limit && last <= mask
        } else {
            last <= limit
        };
        if !inside {
            return Err(selector_fault(SS, 0, self.external));
        }
        let mut word = code.to_le_bytes();
        let part = word.get_mut(..bytes).ok_or(Exception::GENERAL_PROTECTION)?;
        self.write(Gva(ss.base.wrapping_add(offset)), part)?;
        self.cpu.set_gpr(Gpr::Rsp, old & !mask | offset);
        Ok(())
    }

    fn write(&self, at: Gva, bytes: &mut [u8]) -> Result<(), Exception> {
        access(
            self.context.memory,
            &self.paging,
            at,
            bytes,
            Direction::Write,
        )
    }

    fn probe_write(&self, at: Gva) -> Result<(), Exception> {
        let memory = self.context.memory;
        let at = Gva(at.0 & 0xffff_ffff);
        self.paging.translate(memory, at, Access::Write)?;
        Ok(())
    }

    /// The descriptor of a selector in a table; `None`: beyond its limit.
    fn descriptor_in(
        &self,
        table: DescriptorTable,
        limit: u32,
        selector: u16,
    ) -> Result<Option<Descriptor>, Exception> {
        let offset = u32::from(selector & !7);
        if offset + 7 > limit {
            return Ok(None);
        }
        let at = Gva(table.base.wrapping_add(offset.into()) & 0xffff_ffff);
        let mut raw = [0; 8];
        access(
            self.context.memory,
            &self.paging,
            at,
            &mut raw,
            Direction::Read,
        )?;
        let raw = u64::from_le_bytes(raw);
        Ok(Some(Descriptor { raw, at }))
    }

    /// A descriptor of the GDT; `None`: the selector is null, of the LDT, or beyond the limit.
    fn global_descriptor(&self, selector: u16) -> Result<Option<Descriptor>, Exception> {
        if selector & 4 != 0 || selector & !3 == 0 {
            return Ok(None);
        }
        let gdt = self.cpu.gdtr();
        self.descriptor_in(gdt, gdt.limit.into(), selector)
    }

    /// A descriptor of either table.
    fn descriptor(&self, selector: u16, vector: u8) -> Result<Descriptor, Exception> {
        let found = if selector & 4 == 0 {
            self.global_descriptor(selector)?
        } else {
            let ldt = self.cpu.segment(SegmentName::Ldtr);
            let table = DescriptorTable {
                base: ldt.base,
                limit: 0,
            };
            if ldt.rights.unusable() {
                None
            } else {
                self.descriptor_in(table, ldt.limit, selector)?
            }
        };
        found.ok_or(selector_fault(vector, selector, self.external))
    }

    /// Sets the accessed bit in the table, and gives what to load.
    fn accessed(&self, descriptor: Descriptor, selector: u16) -> Result<Segment, Exception> {
        const ACCESSED: u64 = 1 << 40;
        let accessed = Descriptor {
            raw: descriptor.raw | ACCESSED,
            ..descriptor
        };
        if accessed.raw != descriptor.raw {
            self.write(descriptor.at, &mut accessed.raw.to_le_bytes())?;
        }
        Ok(accessed.segment(selector))
    }

    /// Marks a TSS busy or available.
    fn set_busy(&self, descriptor: Descriptor, busy: bool) -> Result<(), Exception> {
        let bit = u64::from(BUSY) << 40;
        let raw = if busy {
            descriptor.raw | bit
        } else {
            descriptor.raw & !bit
        };
        self.write(descriptor.at, &mut raw.to_le_bytes())
    }
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;

//! Far calls and jumps through gates: call gates of 16, 32 and 64 bits, task gates and TSSs.
//!
//! A far transfer finds a system descriptor where code would be (SDM vol. 2A, CALL and JMP; vol. 3A, sections 6.8.3 to
//! 6.8.5 and 8.3). Call gates are carried out here, with the switch to an inner stack; a task switch is
//! left to the caller, its gate and privilege checked. Nothing is changed before the last check has passed.

use iced_x86::Mnemonic;
use mem::{Gva, Width};
use virt::{CpuMode, Gpr, Segment, SegmentName, TaskSource, TaskSwitch, VirtualCpu};

use super::{
    Exception, Platform,
    execute::{Run, Step, Stop},
    segment::{is_code, is_conforming, null_segment},
    system::{Entry, GENERAL, NOT_PRESENT, fault},
};

/// Vector of #TS.
const INVALID_TSS: u8 = 10;
/// Types of system descriptors (SDM vol. 3A, table 3-2).
const TSS_16: u8 = 1;
const CALL_GATE_16: u8 = 4;
const TASK_GATE: u8 = 5;
const TSS_32: u8 = 9;
const CALL_GATE_32: u8 = 12;
const BUSY: u8 = 2;
/// Parameters that a call gate copies, at most.
const MAX_PARAMETERS: usize = 31;

/// Where a call gate leads.
struct CallGate {
    selector: u16,
    offset: u64,
    parameters: usize,
    width: Width,
}

impl<V: VirtualCpu, P: Platform<V>> Run<'_, V, P> {
    /// CALL or JMP to a system descriptor.
    pub(super) fn through_gate(&mut self, selector: u16, entry: &Entry) -> Result<Step, Stop> {
        let rights = entry.rights();
        let long = self.in_long_mode();
        let kind = rights.kind();
        let is_task = matches!(kind & !BUSY, TSS_16 | TSS_32) || kind == TASK_GATE;
        let is_call = kind == CALL_GATE_32 || kind == CALL_GATE_16 && !long;
        let cpl = self.paging.cpl;
        let permitted = rights.dpl() >= cpl.max(selector as u8 & 3);
        if !permitted || !(is_call || is_task && !long) {
            return Err(fault(GENERAL, selector));
        }
        if is_task {
            return self.switch_task(selector, entry);
        }
        let gate = self.call_gate(selector, kind)?;
        if !rights.present() {
            return Err(fault(NOT_PRESENT, selector));
        }
        self.through_call_gate(&gate)
    }

    fn is_far_call(&self) -> bool {
        self.instruction.mnemonic() == Mnemonic::Call
    }

    /// A TSS or task gate: what remains is the switch itself.
    fn switch_task(&mut self, selector: u16, entry: &Entry) -> Result<Step, Stop> {
        let rights = entry.rights();
        let mut task = selector;
        if rights.kind() == TASK_GATE {
            if !rights.present() {
                return Err(fault(NOT_PRESENT, selector));
            }
            task = entry.gate_selector();
        }
        Ok(Step::Task(TaskSwitch {
            selector: task,
            source: if self.is_far_call() {
                TaskSource::Call
            } else {
                TaskSource::Jump
            },
            length: self.instruction.len() as u8,
            event: None,
        }))
    }

    /// IRET with NT: back to the task that the current TSS links to.
    pub(super) fn switch_to_linked_task(&mut self) -> Result<Step, Stop> {
        let tss = self.cpu.segment(SegmentName::Tr);
        let link = self.as_system(|run| run.load(Gva(tss.base), Width::Word))?;
        Ok(Step::Task(TaskSwitch {
            selector: link as u16,
            source: TaskSource::Iret,
            length: self.instruction.len() as u8,
            event: None,
        }))
    }

    /// The gate's fields; in IA-32e mode it has 16 bytes.
    fn call_gate(&mut self, selector: u16, kind: u8) -> Result<CallGate, Stop> {
        let long = self.in_long_mode();
        let entry = self.entry(selector, long)?;
        // The type of the upper half: zero.
        if entry.high >> 40 & 0x1f != 0 {
            return Err(fault(GENERAL, selector));
        }
        let low = entry.low & 0xffff;
        let (offset, parameters, width) = if long {
            let upper = entry.low >> 48 << 16 | entry.high << 32;
            (low | upper, 0, Width::Qword)
        } else if kind == CALL_GATE_32 {
            let upper = entry.low >> 48 << 16;
            (low | upper, entry.low >> 32 & 0x1f, Width::Dword)
        } else {
            (low, entry.low >> 32 & 0x1f, Width::Word)
        };
        Ok(CallGate {
            selector: entry.gate_selector(),
            offset,
            parameters: parameters as usize,
            width,
        })
    }

    fn through_call_gate(&mut self, gate: &CallGate) -> Result<Step, Stop> {
        if gate.selector & !3 == 0 {
            return Err(Stop::Fault(Exception::GENERAL_PROTECTION));
        }
        let cpl = self.paging.cpl;
        let code = self.entry(gate.selector, false)?;
        let rights = code.rights();
        let inwards = !is_conforming(rights) && rights.dpl() < cpl;
        let only_64_bit = self.in_long_mode() && (!rights.long() || rights.default_big());
        if !is_code(rights) || rights.dpl() > cpl || inwards && !self.is_far_call() || only_64_bit {
            return Err(fault(GENERAL, gate.selector));
        }
        let new_cpl = if inwards { rights.dpl() } else { cpl };
        let selector = gate.selector & !3 | u16::from(new_cpl);
        let cs = self.code_segment(&code, selector, gate.offset)?;
        if self.is_far_call() {
            let back = [
                self.cpu.segment(SegmentName::Cs).selector.into(),
                self.instruction.next_ip(),
            ];
            if inwards {
                self.call_inwards(gate, new_cpl, back)?;
            } else {
                let mode = self.mode;
                self.mode_of(&cs);
                let pushed = self.push_all(&back, gate.width);
                self.mode = mode;
                pushed?;
            }
        }
        self.cpu.set_segment(SegmentName::Cs, cs);
        Ok(Step::Jump(gate.offset))
    }

    /// The mode in which code of `cs` runs, as far as the stack is concerned.
    fn mode_of(&mut self, cs: &Segment) {
        if self.in_long_mode() && cs.rights.long() {
            self.mode = CpuMode::Long64;
        }
    }

    /// The stack of an inner level: the caller's stack pointer, parameters and place go there.
    fn call_inwards(&mut self, gate: &CallGate, cpl: u8, back: [u64; 2]) -> Result<(), Stop> {
        let mut items = [0; MAX_PARAMETERS + 4];
        let old_ss = self.cpu.segment(SegmentName::Ss);
        let old_rsp = self.cpu.gpr(Gpr::Rsp);
        let (ss, rsp) = self.inner_stack(cpl)?;
        let parameters = gate.parameters.min(MAX_PARAMETERS);
        items[0] = old_ss.selector.into();
        items[1] = old_rsp;
        for n in 0..parameters {
            items[1 + parameters - n] = self.stacked(n as u64, gate.width, 0)?;
        }
        items[2 + parameters..4 + parameters].copy_from_slice(&back);
        let (mode, paging) = (self.mode, self.paging);
        self.cpu.set_segment(SegmentName::Ss, ss);
        self.cpu.set_gpr(Gpr::Rsp, rsp);
        self.paging.cpl = cpl;
        if self.in_long_mode() {
            self.mode = CpuMode::Long64;
        }
        let pushed = self.push_all(&items[..4 + parameters], gate.width);
        (self.mode, self.paging) = (mode, paging);
        if pushed.is_err() {
            self.cpu.set_segment(SegmentName::Ss, old_ss);
            self.cpu.set_gpr(Gpr::Rsp, old_rsp);
        }
        pushed
    }

    /// SS and RSP that the TSS holds for a privilege level.
    fn inner_stack(&mut self, cpl: u8) -> Result<(Segment, u64), Stop> {
        let tss = self.cpu.segment(SegmentName::Tr);
        let small = tss.rights.kind() & !BUSY == TSS_16;
        let long = self.in_long_mode();
        let level = u64::from(cpl);
        let (offset, width) = match (long, small) {
            (true, _) => (4 + 8 * level, Width::Qword),
            (false, false) => (4 + 8 * level, Width::Dword),
            (false, true) => (2 + 4 * level, Width::Word),
        };
        let bytes = width.bytes() as u64;
        let end = offset + bytes + if long { 0 } else { 2 };
        if end > u64::from(tss.limit) + 1 {
            return Err(fault(INVALID_TSS, tss.selector));
        }
        let at = |offset| Gva(tss.base.wrapping_add(offset));
        let rsp = self.as_system(|run| run.load(at(offset), width))?;
        if long {
            return Ok((null_segment(cpl.into(), cpl), rsp));
        }
        let selector = self.as_system(|run| run.load(at(offset + bytes), Width::Word))? as u16;
        match self.stack_segment(selector, cpl, false) {
            // What is wrong with it is the TSS's fault.
            Err(Stop::Fault(e)) if e.vector == GENERAL => Err(fault(INVALID_TSS, selector)),
            other => Ok((other?, rsp)),
        }
    }
}

impl Entry {
    /// The selector in a gate.
    fn gate_selector(&self) -> u16 {
        (self.low >> 16) as u16
    }
}

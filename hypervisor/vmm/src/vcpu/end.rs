//! How a vCPU ends its VM: the reason in words, and its last state.

use alloc::{boxed::Box, format, string::String};

use devices::VcpuId;
use mem::Gpa;
use virt::{CpuState, Exit, SegmentName, VirtualCpu};

use super::{ExitCounters, Next, Vcpu};
use crate::{emulate, vm::EndReason};

impl<V: VirtualCpu> Vcpu<V> {
    pub(super) fn end(&mut self, kind: EndKind) -> Next {
        let dump = Box::new(Dump {
            vcpu: self.rest.id,
            state: self.hw.state(),
            counters: self.counters,
        });
        let reason = match kind {
            EndKind::TripleFault => EndReason::TripleFault(dump),
            kind => EndReason::Failure {
                what: kind.describe(),
                dump,
            },
        };
        self.rest.vm.end(reason);
        Next::Check
    }
}

/// Why this vCPU must end its VM.
pub(super) enum EndKind {
    TripleFault,
    Unsupported(&'static str),
    Misconfiguration(Gpa),
    EntryFailure { code: u64, why: String },
    UnknownExit { code: u64, info: u64 },
    Instruction(emulate::Bytes),
}

impl EndKind {
    fn describe(&self) -> String {
        match self {
            EndKind::TripleFault => String::from("triple fault"),
            EndKind::Unsupported(what) => format!("{what}, which Plinth does not emulate"),
            EndKind::Misconfiguration(gpa) => {
                format!("nested page tables are wrong for guest-physical {gpa}: a defect of Plinth")
            }
            EndKind::EntryFailure { code, why } => {
                format!("VM entry refused (code {code:#x}): a defect of Plinth\n{why}")
            }
            EndKind::UnknownExit { code, info } => {
                format!("unknown exit (code {code:#x}, information {info:#x})")
            }
            EndKind::Instruction(bytes) => format!(
                "an instruction on device memory that Plinth does not emulate: {:02x?}",
                bytes.as_slice()
            ),
        }
    }
}

/// The last state of the vCPU that ended its VM.
#[derive(Debug)]
pub struct Dump {
    /// Which vCPU.
    pub vcpu: VcpuId,
    /// Its registers.
    pub state: CpuState,
    /// Its exits so far.
    pub counters: ExitCounters,
}

impl core::fmt::Display for Dump {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let s = &self.state;
        let cs = s.segments[SegmentName::Cs as usize];
        let ss = s.segments[SegmentName::Ss as usize];
        writeln!(
            f,
            "vCPU {}: RIP {:04x}:{:016x}  RFLAGS {:08x}",
            self.vcpu.0, cs.selector, s.rip, s.rflags
        )?;
        const NAMES: [&str; 16] = [
            "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8 ", "R9 ", "R10", "R11",
            "R12", "R13", "R14", "R15",
        ];
        for row in 0..4 {
            for column in 0..4 {
                let n = row * 4 + column;
                write!(f, "  {} {:016x}", NAMES[n], s.gprs[n])?;
            }
            writeln!(f)?;
        }
        writeln!(
            f,
            "  CR0 {:08x}  CR2 {:016x}  CR3 {:016x}  CR4 {:08x}  EFER {:04x}",
            s.cr0, s.cr2, s.cr3, s.cr4, s.efer
        )?;
        writeln!(
            f,
            "  CS base {:x} limit {:x} rights {:05x}  SS {:04x} base {:x}  GDT {:x}+{:x}  IDT {:x}+{:x}",
            cs.base,
            cs.limit,
            cs.rights.into_bits(),
            ss.selector,
            ss.base,
            s.gdtr.base,
            s.gdtr.limit,
            s.idtr.base,
            s.idtr.limit
        )?;
        write!(f, "  exits:")?;
        for (name, count) in Exit::NAMES
            .iter()
            .zip(self.counters)
            .filter(|(_, n)| *n > 0)
        {
            write!(f, " {name} {count}")?;
        }
        Ok(())
    }
}

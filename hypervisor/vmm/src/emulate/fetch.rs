//! The bytes of the instruction at RIP, copied once.

use mem::{Gva, Width, guest::GuestMemory};
use virt::{CpuMode, SegmentName, VirtualCpu};

use super::{Bytes, Exception, Platform};
use crate::walk::{Access, Paging};

pub(super) fn linear(base: u64, mode: CpuMode, offset: u64) -> u64 {
    if mode == CpuMode::Long64 {
        base.wrapping_add(offset)
    } else {
        base.wrapping_add(offset) & 0xffff_ffff
    }
}

/// Copies up to 15 bytes at RIP, as far as they can be fetched.
pub(super) fn fetch<V: VirtualCpu, P: Platform<V>>(
    cpu: &mut V,
    memory: &GuestMemory,
    platform: &mut P,
    paging: &Paging,
    mode: CpuMode,
) -> Result<Bytes, Exception> {
    let mut out = Bytes {
        bytes: [0; 16],
        length: 0,
    };
    let assisted = cpu.instruction_bytes();
    if !assisted.is_empty() {
        let length = assisted.len().min(15);
        out.bytes[..length].copy_from_slice(&assisted[..length]);
        out.length = length as u8;
        return Ok(out);
    }
    let base = if mode == CpuMode::Long64 {
        0
    } else {
        cpu.segment(SegmentName::Cs).base
    };
    let start = linear(base, mode, cpu.rip());
    while out.length < 15 {
        let at = Gva(start.wrapping_add(u64::from(out.length)));
        let translated = paging.translate(memory, at, Access::Fetch);
        let gpa = match translated {
            Ok(gpa) => gpa,
            Err(fault) if out.length == 0 => return Err(fault.into()),
            Err(_) => break,
        };
        let rest = (mem::PAGE_SIZE - at.page_offset()).min(u64::from(15 - out.length)) as usize;
        let from = usize::from(out.length);
        if memory.read(gpa, &mut out.bytes[from..from + rest]).is_err() {
            // Code outside RAM: what the device there gives, or all-ones, which decode to #UD.
            for (n, byte) in (0..).zip(&mut out.bytes[from..from + rest]) {
                *byte = platform.mmio_read(cpu, gpa + n, Width::Byte) as u8;
            }
        }
        out.length += rest as u8;
    }
    Ok(out)
}

//! Memory: all RAM is there and keeps its bytes, nothing else is, page tables work.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::cpu::PageFaultCode;
use crate::interrupts::vector;
use crate::machine::{Host, Machine, SCRATCH_BYTES};
use crate::memory::{
    self, LARGE_PAGE, PAGE, USABLE, read8, read16, read32, read64, write8, write64,
};
use crate::paging::{self, Entry};
use crate::{checks, ensure, ensure_eq, probe, skip_if};

use super::{Verdict, scratch, trapped};

checks![
    map,
    fresh_is_zero,
    pattern,
    holes,
    rom_ignores_writes,
    address_lines,
    accessed_dirty,
    large_page_accessed_dirty,
    remap,
    alias,
    self_modifying_code,
    write_protect,
    atomics,
];

/// Regions do not overlap, and the usable ones are page-aligned but for the first.
fn map(machine: &Machine) -> Verdict {
    let regions = machine.handoff.map.regions();
    ensure!(!regions.is_empty(), "the loader gave no memory map");
    let usable: u64 = regions
        .iter()
        .filter(|r| r.kind == USABLE)
        .map(|r| r.length)
        .sum();
    // Of 4 MiB at least, less what a PC keeps below 1 MiB.
    ensure!(usable >= 3 << 20, "only {usable:#x} bytes of usable RAM");
    for (index, one) in regions.iter().enumerate() {
        ensure!(one.length > 0, "region {index} is empty");
        ensure!(
            one.base.checked_add(one.length).is_some(),
            "region {index} wraps around"
        );
        for other in &regions[..index] {
            let apart = one.end() <= other.base || other.end() <= one.base;
            ensure!(
                apart,
                "regions at {:#x} and {:#x} overlap",
                one.base,
                other.base
            );
        }
    }
    let (start, end) = memory::image();
    let inside = regions
        .iter()
        .any(|r| r.kind == USABLE && r.base <= start && end <= r.end());
    ensure!(inside, "this program at {start:#x} is not in usable RAM");
    Ok(())
}

/// Free stretches that are mapped one to one.
fn mapped_ranges(machine: &Machine) -> impl Iterator<Item = (u64, u64)> {
    let limit = machine.mapped_end;
    let window = (paging::WINDOW, paging::WINDOW + LARGE_PAGE);
    machine
        .handoff
        .map
        .free_ranges()
        .map(move |(start, end)| (start, end.min(limit)))
        .filter(move |&(start, end)| start < end && (end <= window.0 || start >= window.1))
}

/// Set once checks have written over RAM.
static WRITTEN: AtomicBool = AtomicBool::new(false);

/// RAM that nobody has written is zero: nothing of the host or of another guest shows.
fn fresh_is_zero(machine: &Machine) -> Verdict {
    /// Loaders and firmware leave things below.
    const FROM: u64 = 16 << 20;
    skip_if!(
        machine.host != Host::Plinth,
        "firmware ran in this RAM before"
    );
    skip_if!(WRITTEN.load(Relaxed), "earlier checks have written to RAM");
    let scratch = machine.scratch.unwrap_or(0);
    let mut pages = 0_u64;
    for (start, end) in mapped_ranges(machine) {
        for page in (start.max(FROM)..end).step_by(PAGE as usize) {
            if (scratch..scratch + SCRATCH_BYTES).contains(&page) {
                continue;
            }
            pages += 1;
            // Eight words, at places that differ from page to page.
            for index in 0..8 {
                let address = page + (page / PAGE + index * 64) % 512 * 8;
                ensure_eq!(read64(address), 0, "RAM at {address:#x}");
            }
        }
    }
    skip_if!(pages == 0, "less than 16 MiB of RAM");
    Ok(())
}

/// Every page keeps a value of its own, and its complement.
fn pattern(machine: &Machine) -> Verdict {
    const PAGES: u64 = 1 << 18;
    WRITTEN.store(true, Relaxed);
    let total: u64 = mapped_ranges(machine).map(|(start, end)| end - start).sum();
    let stride = (total / PAGES).next_multiple_of(PAGE).max(PAGE);
    let place = |page: u64| page + (page / PAGE).wrapping_mul(40) % PAGE / 8 * 8;
    for flip in [0, u64::MAX] {
        for (start, end) in mapped_ranges(machine) {
            for page in (start..end).step_by(stride as usize) {
                write64(place(page), page.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ flip);
            }
        }
        for (start, end) in mapped_ranges(machine) {
            for page in (start..end).step_by(stride as usize) {
                let wanted = page.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ flip;
                ensure_eq!(read64(place(page)), wanted, "RAM at {:#x}", place(page));
            }
        }
    }
    // The last byte of each stretch is there too.
    for (_, end) in mapped_ranges(machine) {
        write8(end - 1, 0xA5);
        ensure_eq!(read8(end - 1), 0xA5, "last byte before {end:#x}");
    }
    Ok(())
}

/// Addresses without memory read as ones at all widths and ignore writes.
fn holes(machine: &Machine) -> Verdict {
    let highest = (1_u64 << memory::physical_bits().clamp(32, 52)) - PAGE;
    let above_ram = (machine.handoff.map.top().max(1 << 32) + (1 << 30)).next_multiple_of(1 << 30);
    for hole in [above_ram, highest] {
        let flags = Entry::PRESENT | Entry::WRITABLE | Entry::NO_CACHE;
        let page = paging::map(0, hole, flags) + 0x100;
        let readings = [
            u64::from(read8(page)) | !0xFF,
            u64::from(read16(page)) | !0xFFFF,
            u64::from(read32(page)) | !0xFFFF_FFFF,
            read64(page),
        ];
        // QEMU (7.2) reads holes in memory as zero, not as a PC's all-ones.
        let lenient = machine.host == Host::Tcg && read64(page) == 0;
        if !lenient {
            for (width, reading) in [8, 16, 32, 64].into_iter().zip(readings) {
                ensure_eq!(reading, u64::MAX, "{width} bits at {hole:#x}");
            }
        }
        let before = read64(page);
        write64(page, 0x1234);
        ensure_eq!(read64(page), before, "{hole:#x} after a write");
        paging::unmap(0);
    }
    Ok(())
}

/// The last bytes below 4 GiB are firmware or nothing: never RAM.
fn rom_ignores_writes(_: &Machine) -> Verdict {
    const RESET_VECTOR: u64 = 0xFFFF_FFF0;
    let before = read64(RESET_VECTOR);
    write64(RESET_VECTOR, !before);
    ensure_eq!(
        read64(RESET_VECTOR),
        before,
        "{RESET_VECTOR:#x} after a write"
    );
    Ok(())
}

/// No address line is stuck, A20 included.
fn address_lines(machine: &Machine) -> Verdict {
    let base = scratch(machine)?;
    let top = base + SCRATCH_BYTES;
    write64(base, 0x5555);
    for line in (3..52).map(|line| 1_u64 << line) {
        let other = base ^ line;
        if (base..top).contains(&other) {
            write64(other, line);
        }
    }
    ensure_eq!(
        read64(base),
        0x5555,
        "{base:#x} after writes to its neighbours"
    );
    Ok(())
}

/// Accessed and dirty bits of a 4 KiB page.
fn accessed_dirty(machine: &Machine) -> Verdict {
    let status = Entry::ACCESSED | Entry::DIRTY;
    let page = paging::map(0, scratch(machine)?, Entry::PRESENT | Entry::WRITABLE);
    ensure!(
        !paging::flags(0).intersects(status),
        "set before the first access"
    );
    read8(page);
    ensure!(
        paging::flags(0) & status == Entry::ACCESSED,
        "after a read: {:?}",
        paging::flags(0)
    );
    write8(page, 1);
    ensure!(
        paging::flags(0) & status == status,
        "after a write: {:?}",
        paging::flags(0)
    );
    paging::unmap(0);
    Ok(())
}

/// Accessed and dirty bits of a 2 MiB page.
fn large_page_accessed_dirty(machine: &Machine) -> Verdict {
    let address = scratch(machine)? + 0x1000;
    let status = Entry::ACCESSED | Entry::DIRTY;
    ensure!(
        paging::large_page_flags(address).contains(Entry::LARGE),
        "not a large page"
    );
    paging::clear_large_page_flags(address);
    read8(address);
    let flags = paging::large_page_flags(address) & status;
    ensure!(flags == Entry::ACCESSED, "after a read: {flags:?}");
    write8(address, 1);
    let flags = paging::large_page_flags(address) & status;
    ensure!(flags == status, "after a write: {flags:?}");
    Ok(())
}

/// After INVLPG a page shows what it is mapped to now; after a write of CR3 all do.
fn remap(machine: &Machine) -> Verdict {
    let base = scratch(machine)?;
    write64(base, 0x1111);
    write64(base + PAGE, 0x2222);
    for turn in 0..16_u64 {
        let page = paging::map(0, base + turn % 2 * PAGE, Entry::PRESENT | Entry::WRITABLE);
        ensure_eq!(read64(page), 0x1111 * (turn % 2 + 1), "turn {turn}");
    }
    paging::unmap(0);
    Ok(())
}

/// Two addresses of one page, one through a large page and one through a small.
fn alias(machine: &Machine) -> Verdict {
    let base = scratch(machine)? + 5 * PAGE;
    let page = paging::map(0, base, Entry::PRESENT | Entry::WRITABLE);
    write64(page + 8, 0xABCD);
    ensure_eq!(read64(base + 8), 0xABCD, "by the large page");
    write64(base + 16, 0xDCBA);
    ensure_eq!(read64(page + 16), 0xDCBA, "by the small page");
    paging::unmap(0);
    Ok(())
}

/// Code that was just written is what runs, also when written through another address.
fn self_modifying_code(machine: &Machine) -> Verdict {
    let base = scratch(machine)?;
    let page = paging::map(0, base, Entry::PRESENT | Entry::WRITABLE);
    for (turn, writer) in [base, page, base, page].into_iter().enumerate() {
        // mov eax, imm32; ret
        let value = 0x1000 + turn as u32;
        memory::write_bytes(writer, &[0xB8]);
        memory::write_bytes(writer + 1, &value.to_le_bytes());
        memory::write_bytes(writer + 5, &[0xC3]);
        let got: u32;
        // SAFETY: the code only sets EAX. CPUID in between serializes; it would exit anyway.
        unsafe {
            asm!("mov rsi, rbx", "xor eax, eax", "cpuid", "mov rbx, rsi", "call {}",
                in(reg) base, out("eax") got, out("rcx") _, out("rdx") _, out("rsi") _);
        }
        ensure_eq!(got, value, "result of the code in turn {turn}");
    }
    paging::unmap(0);
    Ok(())
}

/// CR0.WP decides whether ring 0 may write to read-only pages.
fn write_protect(machine: &Machine) -> Verdict {
    use crate::cpu::{self, Cr0};
    let page = paging::map(0, scratch(machine)?, Entry::PRESENT);
    let cr0 = cpu::cr0();
    // SAFETY: writes to free RAM; the fault is caught, and CR0 is put back.
    let (free, caught) = unsafe {
        cpu::set_cr0(cr0 & !Cr0::WP.bits());
        let free = probe!("mov byte ptr [{}], 1"; in(reg) page);
        cpu::set_cr0(cr0 | Cr0::WP.bits());
        let caught = probe!("mov byte ptr [{}], 1"; in(reg) page);
        cpu::set_cr0(cr0);
        (free, caught)
    };
    paging::unmap(0);
    ensure!(free.is_none(), "write without WP is an exception");
    let caught = trapped(caught, "write with WP")?;
    let wanted = PageFaultCode::PRESENT | PageFaultCode::WRITE;
    let right = caught.vector == vector::PAGE_FAULT && caught.page_fault_code() == wanted;
    ensure!(right, "write with WP: {caught}");
    Ok(())
}

/// Locked operations, within a page and across two.
fn atomics(machine: &Machine) -> Verdict {
    let base = scratch(machine)? + PAGE;
    for address in [base, base - 3] {
        write64(address, 40);
        let old: u64;
        // SAFETY: free RAM.
        unsafe { asm!("lock xadd [{}], {}", in(reg) address, inout(reg) 2_u64 => old) };
        ensure_eq!(old, 40, "value before LOCK XADD at {address:#x}");
        ensure_eq!(read64(address), 42, "value after LOCK XADD at {address:#x}");
    }
    Ok(())
}

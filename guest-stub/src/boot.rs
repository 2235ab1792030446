//! What the loader hands over: registers, command line, memory map, RSDP.
//!
//! The entry code itself is `boot.s`. Everything is copied out of the loader's memory before
//! anything else writes to RAM.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::console::Text;
use crate::memory::{Map, Region, read_bytes, read8, read32, read64};

/// Filled by the entry code. In `.data`, because `.bss` is cleared after the first stores.
#[repr(C)]
pub struct EntryState {
    pub eax: AtomicU32,
    pub ebx: AtomicU32,
    pub eflags: AtomicU32,
    pub cr0: AtomicU32,
    pub cr4: AtomicU32,
    pub efer: AtomicU32,
}

/// The registers at entry.
#[unsafe(link_section = ".data.entry")]
pub static ENTRY: EntryState = EntryState {
    eax: AtomicU32::new(0),
    ebx: AtomicU32::new(0),
    eflags: AtomicU32::new(0),
    cr0: AtomicU32::new(0),
    cr4: AtomicU32::new(0),
    efer: AtomicU32::new(0),
};

global_asm!(include_str!("boot.s"), main = sym crate::main, entry = sym ENTRY);

/// EAX of a multiboot 1 loader.
const MULTIBOOT_LOADER: u32 = 0x2BAD_B002;
/// First word of PVH's start information.
const PVH_MAGIC: u32 = 0x336E_C578;
/// Most modules that are kept.
const MODULES: usize = 8;
/// Longest command line that is kept.
pub const COMMAND_LINE: usize = 512;

/// How this program was loaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    Multiboot,
    Pvh,
}

/// A file that the loader put into memory.
#[derive(Clone, Copy)]
pub struct Module {
    pub start: u64,
    pub bytes: u64,
    pub text: Text<64>,
    /// Sum of its bytes, each times its place from 1 on.
    pub sum: u64,
}

impl Module {
    fn read(start: u64, bytes: u64, text: u64) -> Self {
        let mut sum = 0u64;
        for offset in 0..bytes {
            let byte = u64::from(read8(start + offset));
            sum = sum.wrapping_add(byte.wrapping_mul(offset + 1));
        }
        Self {
            start,
            bytes,
            text: if text == 0 {
                Text::new()
            } else {
                text_at(text)
            },
            sum,
        }
    }
}

/// The loader's information, copied.
#[derive(Clone, Copy)]
pub struct Handoff {
    pub protocol: Protocol,
    pub command_line: Text<COMMAND_LINE>,
    pub map: Map,
    pub rsdp: Option<u64>,
    /// In the loader's order, from the first on.
    pub modules: [Option<Module>; MODULES],
}

/// Reads what the loader left; `None` if it speaks neither protocol.
pub fn handoff() -> Option<Handoff> {
    let information = u64::from(ENTRY.ebx.load(Relaxed));
    if ENTRY.eax.load(Relaxed) == MULTIBOOT_LOADER {
        Some(multiboot(information))
    } else if read32(information) == PVH_MAGIC {
        Some(pvh(information))
    } else {
        None
    }
}

/// Multiboot 0.6.96, section 3.3.
fn multiboot(information: u64) -> Handoff {
    const HAS_MEMORY: u32 = 1 << 0;
    const HAS_COMMAND_LINE: u32 = 1 << 2;
    const HAS_MODULES: u32 = 1 << 3;
    const HAS_MAP: u32 = 1 << 6;

    let flags = read32(information);
    let mut command_line = Text::new();
    if flags & HAS_COMMAND_LINE != 0 {
        command_line = text_at(read32(information + 16).into());
    }
    let mut map = Map::new();
    if flags & HAS_MAP != 0 {
        let mut entry = u64::from(read32(information + 48));
        let end = entry + u64::from(read32(information + 44));
        // An entry's size does not count the size field itself.
        while entry + 24 <= end {
            map.push(Region {
                base: read64(entry + 4),
                length: read64(entry + 12),
                kind: read32(entry + 20),
            });
            entry += u64::from(read32(entry)) + 4;
        }
    } else if flags & HAS_MEMORY != 0 {
        let lower = u64::from(read32(information + 4)) << 10;
        let upper = u64::from(read32(information + 8)) << 10;
        map.push(Region {
            base: 0,
            length: lower,
            kind: crate::memory::USABLE,
        });
        map.push(Region {
            base: 1 << 20,
            length: upper,
            kind: crate::memory::USABLE,
        });
    }
    let mut modules = [None; MODULES];
    if flags & HAS_MODULES != 0 {
        let count = read32(information + 20) as usize;
        let list = u64::from(read32(information + 24));
        for (n, module) in (0..).zip(modules.iter_mut().take(count)) {
            let word = |i: u64| u64::from(read32(list + 16 * n + 4 * i));
            *module = Some(Module::read(word(0), word(1) - word(0), word(2)));
        }
    }
    Handoff {
        modules,
        protocol: Protocol::Multiboot,
        command_line,
        map,
        rsdp: None,
    }
}

/// Xen's `hvm_start_info`, version 1.
fn pvh(information: u64) -> Handoff {
    let version = read32(information + 4);
    let command_line = match read64(information + 24) {
        0 => Text::new(),
        address => text_at(address),
    };
    let rsdp = Some(read64(information + 32)).filter(|&address| address != 0);
    let mut map = Map::new();
    if version >= 1 {
        let table = read64(information + 40);
        for index in 0..u64::from(read32(information + 48)).min(64) {
            let entry = table + index * 24;
            map.push(Region {
                base: read64(entry),
                length: read64(entry + 8),
                kind: read32(entry + 16),
            });
        }
    }
    let mut modules = [None; MODULES];
    let count = read32(information + 12) as usize;
    let list = read64(information + 16);
    for (n, module) in (0..).zip(modules.iter_mut().take(count)) {
        let word = |i: u64| read64(list + 32 * n + 8 * i);
        *module = Some(Module::read(word(0), word(1), word(2)));
    }
    Handoff {
        modules,
        protocol: Protocol::Pvh,
        command_line,
        map,
        rsdp,
    }
}

/// A zero-terminated text in memory.
fn text_at<const LENGTH: usize>(address: u64) -> Text<LENGTH> {
    let mut text = Text::new();
    for offset in 0..LENGTH as u64 {
        let mut byte = [0];
        read_bytes(address + offset, &mut byte);
        match byte {
            [0] => break,
            [byte] => text.push(byte),
        }
    }
    text
}

//! The first process of a Linux boot that is measured: tells the time, switches off.
//!
//! A static program of a hundred bytes that reads the TSC with its first instruction, writes
//! it to the console and powers the machine off by reboot(2). It stands in the initramfs
//! beside busybox and is named by `rdinit=`, so that all before it is as in any boot.

use crate::bench::figures::number;

/// Its path in the initramfs, without the leading slash.
pub const PATH: &str = "ticks";

/// Machine code, x86-64 Linux, position-independent.
const CODE: [u8; 0x76] = [
    0x0f, 0x31, // rdtsc
    0x48, 0xc1, 0xe2, 0x20, // shl rdx, 32
    0x48, 0x09, 0xd0, // or rax, rdx
    0x48, 0x8d, 0x1d, 0x80, 0x00, 0x00, 0x00, // lea rbx, [rip + TEXT's last digit]
    0xb9, 0x10, 0x00, 0x00, 0x00, // mov ecx, 16
    0x89, 0xc2, // digit: mov edx, eax
    0x83, 0xe2, 0x0f, // and edx, 15
    0x83, 0xc2, 0x30, // add edx, '0'
    0x83, 0xfa, 0x39, // cmp edx, '9'
    0x76, 0x03, // jbe over
    0x83, 0xc2, 0x27, // add edx, 'a' - '9' - 1
    0x88, 0x13, // over: mov [rbx], dl
    0x48, 0xff, 0xcb, // dec rbx
    0x48, 0xc1, 0xe8, 0x04, // shr rax, 4
    0xe2, 0xe5, // loop digit
    0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, 1: write
    0xbf, 0x01, 0x00, 0x00, 0x00, // mov edi, 1: standard output
    0x48, 0x8d, 0x35, 0x35, 0x00, 0x00, 0x00, // lea rsi, [rip + TEXT]
    0xba, 0x1c, 0x00, 0x00, 0x00, // mov edx, TEXT's length
    0x0f, 0x05, // syscall
    0xb8, 0x10, 0x00, 0x00, 0x00, // mov eax, 16: ioctl
    0xbf, 0x01, 0x00, 0x00, 0x00, // mov edi, 1
    0xbe, 0x09, 0x54, 0x00, 0x00, // mov esi, TCSBRK
    0xba, 0x01, 0x00, 0x00, 0x00, // mov edx, 1: wait until all is sent
    0x0f, 0x05, // syscall
    0xb8, 0xa9, 0x00, 0x00, 0x00, // mov eax, 169: reboot
    0xbf, 0xad, 0xde, 0xe1, 0xfe, // mov edi, LINUX_REBOOT_MAGIC1
    0xbe, 0x69, 0x19, 0x12, 0x28, // mov esi, LINUX_REBOOT_MAGIC2
    0xba, 0xdc, 0xfe, 0x21, 0x43, // mov edx, LINUX_REBOOT_CMD_POWER_OFF
    0x0f, 0x05, // syscall
    0xeb, 0xfe, // jmp here
];

/// What it writes, with sixteen digits in place of the dots; follows the code.
const TEXT: &[u8; 0x1c] = b"init: tsc=0................\n";

/// Where the program is loaded.
const BASE: u64 = 0x40_0000;
/// Bytes of the ELF header and one program header.
const HEADERS: u64 = 64 + 56;

/// The program, an ELF file.
pub fn program() -> Vec<u8> {
    let length = HEADERS + (CODE.len() + TEXT.len()) as u64;
    // ELF64, little-endian, version 1, System V.
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // ET_EXEC, EM_X86_64.
    file.extend([2u16, 62].iter().flat_map(|field| field.to_le_bytes()));
    file.extend(1u32.to_le_bytes());
    // Entry, program headers, no section headers.
    for field in [BASE + HEADERS, 64, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    // Sizes: this header, a program header and their count, section headers.
    for field in [64u16, 56, 1, 0, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    // PT_LOAD, readable, writable and executable: it writes its text.
    file.extend([1u32, 7].iter().flat_map(|field| field.to_le_bytes()));
    for field in [0, BASE, BASE, length, length, 0x1000] {
        file.extend(field.to_le_bytes());
    }
    file.extend(CODE);
    file.extend(TEXT);
    file
}

/// The guest's TSC at the program's first instruction, from the console's text.
pub fn parse(log: &str) -> Option<u64> {
    let after = log.split_once("init: tsc=")?.1;
    number(&format!("0x{}", after.lines().next()?.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use elf::{ElfBytes, endian::AnyEndian};

    #[test]
    fn the_program_is_an_elf_file_whose_entry_is_the_code() {
        let file = program();
        let elf = ElfBytes::<AnyEndian>::minimal_parse(&file).unwrap();
        let segment = elf.segments().unwrap().iter().next().unwrap();
        let at = (elf.ehdr.e_entry - segment.p_vaddr) as usize;
        assert_eq!(&file[at..at + 2], b"\x0f\x31");
        assert_eq!(segment.p_filesz, file.len() as u64);
        // LEA's displacements count from the next instruction.
        assert_eq!(&file[at + 0x10 + 0x80 - 16..][..17], &TEXT[10..27]);
        assert_eq!(&file[at + 0x41 + 0x35..], TEXT);
    }

    #[test]
    fn the_time_is_read_from_the_console() {
        assert_eq!(parse("x\ninit: tsc=00000000000001f40\n"), Some(8000));
        assert_eq!(parse("init: tsc=\n"), None);
    }
}

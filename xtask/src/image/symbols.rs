//! The kernel's functions by address, for the report of a host fault.

use std::fmt::Write;

use anyhow::Context;
use elf::{ElfBytes, abi, endian::AnyEndian};

/// Lines `<offset from the image's base, hexadecimal> <mangled name>` of all functions, by
/// offset. The base is where the lowest loaded segment begins.
///
/// # Errors
/// The bytes are no ELF file with segments and symbols.
pub fn table(elf: &[u8]) -> anyhow::Result<String> {
    let file = ElfBytes::<AnyEndian>::minimal_parse(elf).context("the kernel is no ELF file")?;
    let base = file
        .segments()
        .context("the kernel has no segments")?
        .iter()
        .filter(|segment| segment.p_type == abi::PT_LOAD)
        .map(|segment| segment.p_vaddr)
        .min()
        .context("the kernel loads nothing")?;
    let (symbols, names) = file
        .symbol_table()
        .context("the kernel's symbols are damaged")?
        .context("the kernel has no symbols")?;
    let mut functions = Vec::new();
    for symbol in symbols.iter() {
        if symbol.st_symtype() == abi::STT_FUNC && symbol.st_shndx != abi::SHN_UNDEF {
            let name = names.get(symbol.st_name as usize)?;
            functions.push((symbol.st_value.saturating_sub(base), name));
        }
    }
    functions.sort_unstable();
    // Functions with the same code share an address; one name is enough.
    functions.dedup_by_key(|(offset, _)| *offset);
    let mut text = String::new();
    for (offset, name) in functions {
        writeln!(text, "{offset:x} {name}").expect("a String takes any text");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_of_this_program_are_listed_in_order() {
        let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let text = table(&program).unwrap();
        let lines: Vec<(u64, &str)> = text
            .lines()
            .map(|line| line.split_once(' ').unwrap())
            .map(|(offset, name)| (u64::from_str_radix(offset, 16).unwrap(), name))
            .collect();
        assert!(lines.is_sorted_by(|a, b| a.0 < b.0));
        let known = "functions_of_this_program_are_listed_in_order";
        assert!(lines.iter().any(|(_, name)| name.contains(known)));
    }

    #[test]
    fn other_files_are_refused() {
        assert!(table(b"not an ELF file").is_err());
    }
}

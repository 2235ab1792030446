//! Names for code addresses, from a text file beside the stripped kernel.
//!
//! The file has one line per function, sorted by address: the offset from the start of the
//! image in hexadecimal, a space, and the linker's (mangled) name. It is searched in place;
//! nothing is parsed or allocated before a report needs it, and a damaged file only costs names.

use core::{fmt, str};

/// A symbol file.
#[derive(Clone, Copy, Debug)]
pub struct Symbols<'a> {
    text: &'a [u8],
}

/// The function that an address lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Symbol<'a> {
    /// The linker's name.
    pub mangled: &'a str,
    /// Bytes from the start of the function.
    pub offset: u64,
}

impl fmt::Display for Symbol<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:#}+{:#x}",
            rustc_demangle::demangle(self.mangled),
            self.offset
        )
    }
}

impl<'a> Symbols<'a> {
    /// No names at all.
    pub const NONE: Symbols<'static> = Symbols { text: &[] };

    /// Takes the contents of a symbol file.
    pub const fn new(text: &'a [u8]) -> Self {
        Symbols { text }
    }

    /// The last function that begins at or before `offset`, counted from the start of the image.
    pub fn lookup(&self, offset: u64) -> Option<Symbol<'a>> {
        // Invariant: the line at `low`, if it was looked at, begins at or before `offset`; those from `high` on begin after it.
        let (mut low, mut high) = (0, self.text.len());
        let mut found = None;
        while low < high {
            let start = self.line_start(low + (high - low) / 2).max(low);
            let end = self.line_end(start);
            let (address, name) = parse(&self.text[start..end])?;
            if address <= offset {
                found = Some((address, name));
                low = end + 1;
            } else {
                high = start;
            }
        }
        found.map(|(address, mangled)| Symbol {
            mangled,
            offset: offset - address,
        })
    }

    fn line_start(&self, position: usize) -> usize {
        self.text[..position]
            .iter()
            .rposition(|&byte| byte == b'\n')
            .map_or(0, |newline| newline + 1)
    }

    fn line_end(&self, position: usize) -> usize {
        self.text[position..]
            .iter()
            .position(|&byte| byte == b'\n')
            .map_or(self.text.len(), |length| position + length)
    }
}

fn parse(line: &[u8]) -> Option<(u64, &str)> {
    let (address, name) = str::from_utf8(line).ok()?.split_once(' ')?;
    Some((u64::from_str_radix(address, 16).ok()?, name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE: &str = "10 _ZN6kernel4boot17h0123456789abcdefE\n2f small\n1000 last\n";

    fn name(offset: u64) -> Option<(&'static str, u64)> {
        Symbols::new(FILE.as_bytes())
            .lookup(offset)
            .map(|s| (s.mangled, s.offset))
    }

    #[test]
    fn finds_the_function_around_an_address() {
        assert_eq!(name(0xf), None);
        assert_eq!(name(0x10), Some(("_ZN6kernel4boot17h0123456789abcdefE", 0)));
        assert_eq!(name(0x2e).unwrap().1, 0x1e);
        assert_eq!(name(0x2f), Some(("small", 0)));
        assert_eq!(name(0xfff), Some(("small", 0xfd0)));
        assert_eq!(name(0x123456), Some(("last", 0x122456)));
    }

    #[test]
    fn shows_readable_names() {
        let symbol = Symbols::new(FILE.as_bytes()).lookup(0x14).unwrap();
        assert_eq!(symbol.to_string(), "kernel::boot+0x4");
    }

    #[test]
    fn no_file_and_garbage_give_no_names() {
        assert_eq!(Symbols::NONE.lookup(5), None);
        assert_eq!(Symbols::new(b"no such format").lookup(5), None);
        assert_eq!(Symbols::new(b"\n\n\n").lookup(5), None);
        assert_eq!(Symbols::new(&[0xff; 40]).lookup(5), None);
    }

    proptest! {
        #[test]
        fn agrees_with_a_linear_search(mut addresses in prop::collection::vec(0u64..5000, 0..60), offset in 0u64..6000) {
            addresses.sort_unstable();
            addresses.dedup();
            let file: String = addresses.iter().map(|a| format!("{a:x} f{a}\n")).collect();
            let expected = addresses.iter().rev().find(|&&a| a <= offset).map(|a| (format!("f{a}"), offset - a));
            let found = Symbols::new(file.as_bytes()).lookup(offset).map(|s| (s.mangled.to_string(), s.offset));
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200), offset: u64) {
            let _ = Symbols::new(&bytes).lookup(offset);
        }
    }
}

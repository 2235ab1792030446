//! Names of the kernel's own functions, for fault reports.

use drivers::symbols::{Symbol, Symbols};
use spin::Once;

static SYMBOLS: Once<Symbols<'static>> = Once::new();

unsafe extern "C" {
    /// First byte of the image; the linker puts it there.
    static __executable_start: u8;
    /// First byte after the code; the linker puts it there.
    static etext: u8;
}

/// Takes the symbol file from the ramdisk.
pub fn init(file: &'static [u8]) {
    SYMBOLS.call_once(|| Symbols::new(file));
}

/// First byte of the kernel's image.
pub fn image_start() -> u64 {
    (&raw const __executable_start) as u64
}

/// Whether `address` may be code of the kernel.
pub fn is_code(address: u64) -> bool {
    (image_start()..(&raw const etext) as u64).contains(&address)
}

/// The function that `address` lies in, where a symbol file was found.
pub fn lookup(address: u64) -> Option<Symbol<'static>> {
    if !is_code(address) {
        return None;
    }
    SYMBOLS
        .get()
        .unwrap_or(&Symbols::NONE)
        .lookup(address - image_start())
}

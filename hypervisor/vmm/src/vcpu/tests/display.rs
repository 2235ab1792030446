//! A VM with a display: what it draws is found by whoever shows it.

use alloc::vec;

use super::*;
use crate::display::{DisplayKind, Picture, Text};

fn bench(kind: DisplayKind) -> Bench {
    let display = DisplaySpec {
        kind,
        ..DisplaySpec::default()
    };
    Bench::make(1, 0, None, display).expect("a VM")
}

const SCREEN: u64 = 0xb_8000;

#[test]
fn text_is_copied_from_the_guests_memory() {
    let bench = bench(DisplayKind::VgaText);
    let vm = bench.vcpu.vm();
    let mut text = Text::new();
    vm.memory
        .write(Gpa(SCREEN + 160), b"P\x1fl\x70")
        .expect("memory");
    assert_eq!(vm.picture(&mut text), Picture::Text);
    assert_eq!((text.columns, text.rows), (80, 25));
    assert_eq!(text.cells().len(), 2000);
    assert_eq!(text.cells()[80..82], [*b"P\x1f", *b"l\x70"]);
    assert_eq!(text.cursor, Some((0, 0)));
    // The first row is the last of the memory; the second its first.
    for (index, value) in [(0x0c, 0x3f), (0x0d, 0xb0), (0x0f, 0), (0x0e, 0)] {
        vm.ports.write(0x3d4, Width::Byte, index);
        vm.ports.write(0x3d5, Width::Byte, value);
    }
    let last = Gpa(SCREEN + 0x7ffe);
    vm.memory.write(last, b"L!").expect("memory");
    vm.picture(&mut text);
    assert_eq!(text.cells()[79], *b"L!");
    assert_eq!(text.cells()[160..162], [*b"P\x1f", *b"l\x70"]);
    assert_eq!(text.cursor, Some((1, 0)));
    // Graphics and darkness are said, and change no text.
    vm.ports.write(0x3c4, Width::Word, 0x2001);
    assert_eq!(vm.picture(&mut text), Picture::Dark);
}

#[test]
fn a_kernel_finds_the_screen_in_the_bios_data_area() {
    for (kind, columns) in [(DisplayKind::VgaText, 80), (DisplayKind::None, 0)] {
        let bench = bench(kind);
        let vm = bench.vcpu.vm();
        assert_eq!(vm.memory.read_u16(Gpa(0x44a)), Ok(columns));
        let there = vm.memory.is_writable(Gpa(SCREEN), 0x8000);
        assert_eq!(there, kind == DisplayKind::VgaText);
        assert!(!vm.memory.is_ram(Gpa(SCREEN)), "nobody's RAM");
    }
}

#[test]
fn a_frame_buffer_is_set_up_by_fw_cfg() {
    let bench = bench(DisplayKind::Ramfb);
    let vm = bench.vcpu.vm();
    let mut text = Text::new();
    assert_eq!(vm.picture(&mut text), Picture::None);
    // The only file, so the first key: select and write 28 bytes.
    let mut request = 0x20_0000u64.to_be_bytes().to_vec();
    for word in [u32::from_le_bytes(*b"XR24"), 0, 8, 2, 32] {
        request.extend_from_slice(&word.to_be_bytes());
    }
    let mut command = (0x20u32 << 16 | 0x18).to_be_bytes().to_vec();
    command.extend_from_slice(&28u32.to_be_bytes());
    command.extend_from_slice(&0x3000u64.to_be_bytes());
    vm.memory.write(Gpa(0x3000), &request).expect("RAM");
    vm.memory.write(Gpa(0x2000), &command).expect("RAM");
    vm.ports.write(0x518, Width::Dword, 0x2000u32.swap_bytes());
    let Picture::Pixels(buffer) = vm.picture(&mut text) else {
        panic!("no frame buffer");
    };
    assert_eq!((buffer.width, buffer.height), (8, 2));
    vm.memory.write(Gpa(0x20_0020), &[1, 2, 3, 4]).expect("RAM");
    let mut row = vec![0; 32];
    assert!(vm.read_pixels(&buffer, 1, &mut row));
    assert_eq!(row[..4], [1, 2, 3, 4]);
}

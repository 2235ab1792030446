use super::*;
use crate::testing::FakeClock;
use proptest::prelude::*;

struct Rig {
    ports: PortBus,
    vga: Arc<Vga>,
    clock: Arc<FakeClock>,
}

fn rig() -> Rig {
    let clock = FakeClock::new(CHARACTER_HZ);
    let vga = Vga::new(clock.clone());
    let mut ports = PortBus::new();
    vga.attach(&mut ports).unwrap();
    Rig { ports, vga, clock }
}

impl Rig {
    fn out(&self, port: u16, value: u8) {
        self.ports.write(port, Width::Byte, value.into());
    }

    fn inb(&self, port: u16) -> u8 {
        self.ports.read(port, Width::Byte) as u8
    }

    fn crtc(&self, index: u8, value: u8) {
        let word = u32::from(value) << 8 | u32::from(index);
        self.ports.write(CRTC, Width::Word, word);
    }

    fn attribute(&self, index: u8, value: u8) {
        self.inb(STATUS);
        self.out(ATTRIBUTE, index);
        self.out(ATTRIBUTE, value);
        self.out(ATTRIBUTE, 0x20);
    }

    fn text(&self) -> TextMode {
        match self.vga.scan() {
            Scan::Text(mode) => mode,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn it_starts_as_firmware_leaves_it() {
    let r = rig();
    let mode = r.text();
    assert_eq!((mode.columns, mode.rows), (80, 25));
    assert_eq!((mode.row_offset(0), mode.row_offset(24)), (0, 24 * 160));
    assert_eq!(mode.cursor(), Some((0, 0)));
    assert_eq!(mode.palette[0], 0);
    assert_eq!(mode.palette[7], 0xaa_aaaa);
    assert_eq!(mode.palette[6], 0xaa_5500, "brown, not dark yellow");
    assert_eq!(mode.palette[15], 0xff_ffff);
    assert_eq!(mode.background_mask, 7, "the eighth bit blinks");
    assert_eq!(r.inb(MISC_READ), 0x67);
}

#[test]
fn start_address_and_cursor_follow_the_crt_controller() {
    let r = rig();
    r.crtc(0x0c, 0x07);
    r.crtc(0x0d, 0xd0);
    r.crtc(0x0e, 0x08);
    r.crtc(0x0f, 0x21);
    let mode = r.text();
    assert_eq!(mode.row_offset(0), 2000 * 2);
    assert_eq!(mode.cursor(), Some((1, 1)));
    r.crtc(0x0e, 0);
    assert_eq!(r.text().cursor(), None, "above the screen");
    r.crtc(0x0e, 8);
    r.crtc(0x0a, 0x2d);
    assert_eq!(r.text().cursor(), None, "off");
    // The memory wraps around.
    r.crtc(0x0c, 0x3f);
    r.crtc(0x0d, 0xff);
    assert_eq!(r.text().row_offset(1), 79 * 2);
    assert_eq!(r.inb(CRTC), 0x0d);
    assert_eq!(r.inb(CRTC_DATA), 0xff);
}

#[test]
fn protected_timing_stays() {
    let r = rig();
    r.crtc(0x01, 0x27);
    assert_eq!(r.text().columns, 80);
    r.crtc(0x07, 0x00);
    r.out(CRTC, 7);
    assert_eq!(r.inb(CRTC_DATA), 0x0f, "but for one bit");
    r.crtc(0x11, 0x0e);
    r.crtc(0x01, 0x27);
    assert_eq!(r.text().columns, 40);
    r.crtc(0x09, 0x47);
    assert_eq!(r.text().rows, 50);
}

#[test]
fn the_attribute_port_takes_turns() {
    let r = rig();
    r.attribute(0x07, 0x3f);
    assert_eq!(r.text().palette[7], 0xff_ffff);
    r.inb(STATUS);
    r.out(ATTRIBUTE, 0x07);
    assert_eq!(r.inb(ATTRIBUTE_DATA), 0x3f);
    assert_eq!(r.vga.scan(), Scan::Dark, "the palette is the processor's");
    r.inb(STATUS);
    r.out(ATTRIBUTE, 0x20);
    assert_eq!(r.text().columns, 80);
    r.attribute(0x10, 0x04);
    assert_eq!(r.text().background_mask, 15);
    r.attribute(0x10, 0x01);
    assert_eq!(r.vga.scan(), Scan::Graphics);
    assert_eq!(r.inb(ATTRIBUTE), 0x20);
}

#[test]
fn colours_are_written_and_read_in_threes() {
    let r = rig();
    r.out(COLOUR_WRITE, 7);
    for part in [0x3f, 0xff, 0x00, 0x01] {
        r.out(COLOUR_DATA, part);
    }
    assert_eq!(r.text().palette[7], 0xff_ff00, "six bits each");
    assert_eq!((r.inb(COLOUR_WRITE), r.inb(COLOUR_READ)), (8, 0));
    r.out(COLOUR_READ, 7);
    let parts = [(); 4].map(|()| r.inb(COLOUR_DATA));
    assert_eq!(parts, [0x3f, 0x3f, 0x00, 0x01]);
    assert_eq!(r.inb(COLOUR_READ), 3);
    r.out(PIXEL_MASK, 0);
    assert_eq!(r.text().palette[7], 0);
}

#[test]
fn retrace_follows_time() {
    let r = rig();
    let at = |line: u64, character: u64| {
        r.clock.set(line * LINE_CHARACTERS + character);
        r.inb(STATUS)
    };
    assert_eq!(at(0, 0), 0);
    assert_eq!(at(0, 80), 1);
    assert_eq!(at(400, 0), 1);
    assert_eq!(at(412, 0), 9);
    assert_eq!(at(414, 0), 1);
    assert_eq!(at(449, 0), 0, "the next picture");
}

#[test]
fn a_dark_screen_and_absent_registers() {
    let r = rig();
    r.ports.write(SEQUENCER, Width::Word, 0x2001);
    assert_eq!(r.vga.scan(), Scan::Dark);
    assert_eq!(r.inb(0x3b4), 0xff, "no monochrome adapter");
    r.out(MISC_WRITE, 0);
    assert_eq!(r.inb(MISC_READ), 1, "nor can it become one");
    r.out(SEQUENCER, 7);
    assert_eq!(r.inb(SEQUENCER_DATA), 0);
    r.out(CRTC, 0x3f);
    r.out(CRTC_DATA, 1);
    assert_eq!(r.inb(CRTC_DATA), 0xff);
}

#[test]
fn every_character_has_a_printable_one() {
    for character in 0..=255u8 {
        assert!(matches!(ascii(character), b' '..=b'~'), "{character:#x}");
    }
    assert_eq!(
        [b'A', 0xb3, 0xcd, 0xc9, 0xdb, 0x81, 0xfb].map(ascii),
        *b"A|-+#uv"
    );
}

proptest! {
    #[test]
    fn whatever_is_set_the_screen_stays_in_its_memory(
        writes in proptest::collection::vec((0usize..3, 0u16..16, any::<u8>()), 0..300),
    ) {
        let r = rig();
        for (range, offset, value) in writes {
            let (base, count) = PORTS[range];
            r.inb(base + offset % count);
            r.out(base + offset % count, value);
        }
        if let Scan::Text(mode) = r.vga.scan() {
            prop_assert!((1..=MAX_COLUMNS).contains(&mode.columns));
            prop_assert!((1..=MAX_ROWS).contains(&mode.rows));
            for row in 0..mode.rows {
                prop_assert!(mode.row_offset(row) < TEXT_MEMORY.bytes as usize);
            }
            if let Some((row, column)) = mode.cursor() {
                prop_assert!(row < mode.rows && column < mode.columns);
            }
        }
    }
}

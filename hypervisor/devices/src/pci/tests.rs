//! Tests of the bus: configuration access, BARs, where they decode.

use super::*;
use proptest::prelude::*;
use spin::Mutex;

/// A function with BARs that remember what was written where.
struct Probe {
    config: Mutex<ConfigSpace>,
    writes: Mutex<Vec<(usize, u64, u64)>>,
}

impl Probe {
    fn new() -> Arc<Self> {
        let mut config = ConfigSpace::new(&FunctionId {
            vendor: 0x1af4,
            device: 0x1042,
            class: 1,
            subclass: 0,
            interface: 0,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        config.add_bar(0, BarKind::Io, 0x20).unwrap();
        config.add_bar(1, BarKind::Memory32, 0x1000).unwrap();
        let wide = BarKind::Memory64 { prefetchable: true };
        config.add_bar(4, wide, 0x4000).unwrap();
        Arc::new(Probe {
            config: Mutex::new(config),
            writes: Mutex::default(),
        })
    }
}

impl PciFunction for Probe {
    fn config_read(&self, offset: u16, width: Width) -> u32 {
        self.config.lock().read(offset, width)
    }

    fn config_write(&self, offset: u16, width: Width, value: u32) {
        self.config.lock().write(offset, width, value);
    }

    fn bars(&self) -> [Option<BarRange>; BARS] {
        self.config.lock().bars()
    }

    fn bar_read(&self, bar: usize, offset: u64, _width: Width) -> Result<u64, IoError> {
        Ok((bar as u64) << 16 | offset)
    }

    fn bar_write(&self, bar: usize, offset: u64, _width: Width, value: u64) -> Result<(), IoError> {
        self.writes.lock().push((bar, offset, value));
        Ok(())
    }
}

struct Setup {
    ports: PortBus,
    mmio: MmioBus,
    probe: Arc<Probe>,
    layout: PciLayout,
}

fn setup() -> Setup {
    let probe = Probe::new();
    let mut bus = PciBus::new();
    bus.insert(0, 0, HostBridge::new()).unwrap();
    bus.insert(3, 0, probe.clone()).unwrap();
    assert!(bus.insert(3, 0, probe.clone()).is_err());
    assert!(bus.insert(32, 0, probe.clone()).is_err());
    let (mut ports, mut mmio) = (PortBus::new(), MmioBus::new());
    let layout = PciLayout {
        mmio64: Some(1 << 36..1 << 37),
        ..PciLayout::default()
    };
    Arc::new(bus)
        .attach(&mut ports, &mut mmio, &layout)
        .unwrap();
    Setup {
        ports,
        mmio,
        probe,
        layout,
    }
}

impl Setup {
    fn select(&self, device: u8, register: u8) {
        let address = 1 << 31 | u32::from(device) << 11 | u32::from(register & 0xfc);
        self.ports.write(0xcf8, Width::Dword, address);
    }

    fn read(&self, device: u8, register: u8, width: Width) -> u32 {
        self.select(device, register);
        self.ports.read(0xcfc + u16::from(register & 3), width)
    }

    fn write(&self, device: u8, register: u8, width: Width, value: u32) {
        self.select(device, register);
        self.ports
            .write(0xcfc + u16::from(register & 3), width, value);
    }
}

/// Linux' arch/x86/pci/direct.c: pci_check_type1 and pci_sanity_check.
#[test]
fn linux_probe_of_mechanism_1() {
    let s = setup();
    s.ports.write(0xcfb, Width::Byte, 1);
    s.ports.write(0xcf8, Width::Dword, 0x8000_0000);
    assert_eq!(s.ports.read(0xcf8, Width::Dword), 0x8000_0000);
    assert_eq!(s.read(0, 0x0a, Width::Word), 0x0600);
    assert_eq!(s.read(0, 0x00, Width::Word), 0x8086);
    assert_eq!(s.read(1, 0x00, Width::Dword), u32::MAX);
    s.ports.write(0xcf8, Width::Dword, 0x8001_0000);
    assert_eq!(s.ports.read(0xcfc, Width::Dword), u32::MAX, "bus 1");
    s.ports.write(0xcf8, Width::Dword, 0);
    assert_eq!(s.ports.read(0xcfc, Width::Dword), u32::MAX, "not enabled");
}

#[test]
fn byte_writes_beside_the_address_register_do_not_disturb_it() {
    let s = setup();
    s.select(3, 8);
    s.ports.write(0xcf8, Width::Byte, 0);
    s.ports.write(0xcf9, Width::Byte, 6);
    assert_eq!(s.ports.read(0xcfc, Width::Byte), 1, "the revision");
}

#[test]
fn ecam_and_ports_reach_the_same_function() {
    let s = setup();
    let ecam = s.layout.ecam.unwrap() + (3 << 15);
    assert_eq!(s.mmio.read(ecam, Width::Dword), 0x1042_1af4);
    s.mmio.write(ecam + 0x3c, Width::Byte, 11);
    assert_eq!(s.read(3, 0x3c, Width::Byte), 11);
    assert_eq!(
        s.mmio.read(ecam + 0x100, Width::Dword),
        0,
        "no extended ones"
    );
    assert_eq!(s.mmio.read(ecam + (1 << 15), Width::Word), 0xffff);
    assert_eq!(s.mmio.read(ecam + 1, Width::Word), 0xffff, "unaligned");
}

#[test]
fn bars_decode_when_enabled_and_where_put() {
    let s = setup();
    let base = s.layout.mmio32.start + 0x10_0000;
    s.write(3, 0x14, Width::Dword, base as u32);
    assert_eq!(s.mmio.read(base + 8, Width::Dword), 0xffff_ffff);
    s.write(3, 0x04, Width::Word, 3);
    assert_eq!(s.mmio.read(base + 8, Width::Dword), 1 << 16 | 8);
    assert_eq!(
        s.mmio.read(base + 0xffc, Width::Qword),
        u64::MAX,
        "crosses the end"
    );
    assert_eq!(s.mmio.read(base + 0x1000, Width::Byte), 0xff);
    // I/O.
    s.write(3, 0x10, Width::Dword, 0xc040);
    s.ports.write(0xc044, Width::Word, 0x1234);
    // 64-bit, above 4 GiB.
    s.write(3, 0x20, Width::Dword, 0x8000);
    s.write(3, 0x24, Width::Dword, 0x10);
    s.mmio.write((1 << 36) + 0x8010, Width::Qword, 77);
    assert_eq!(*s.probe.writes.lock(), [(0, 4, 0x1234), (4, 0x10, 77)]);
    // Outside the windows nothing decodes.
    s.write(3, 0x14, Width::Dword, 0x10_0000);
    assert_eq!(s.mmio.read(0x10_0008, Width::Dword), 0xffff_ffff);
}

#[test]
fn sizing() {
    let s = setup();
    for (register, size) in [(0x10, 0xffff_ffe1), (0x14, 0xffff_f000), (0x18, 0)] {
        s.write(3, register, Width::Dword, u32::MAX);
        assert_eq!(s.read(3, register, Width::Dword), size);
    }
    s.write(3, 0x20, Width::Dword, u32::MAX);
    s.write(3, 0x24, Width::Dword, u32::MAX);
    assert_eq!(s.read(3, 0x20, Width::Dword), 0xffff_c00c);
    assert_eq!(s.read(3, 0x24, Width::Dword), u32::MAX);
}

#[test]
fn a_bus_is_assigned_as_firmware_does_it() {
    let mut bus = PciBus::new();
    bus.insert(0, 0, HostBridge::new()).unwrap();
    let probes = [Probe::new(), Probe::new()];
    for (device, probe) in (1..).zip(&probes) {
        bus.insert(device, 0, probe.clone()).unwrap();
        probe.config.lock().set_interrupt_pin(2);
    }
    let layout = PciLayout {
        mmio32: 0xc000_0000..0xc000_9000,
        ..PciLayout::default()
    };
    bus.assign(&layout, |device, pin| 10 * device + pin);
    let bases = |probe: &Probe| probe.bars().map(|bar| bar.map(|bar| bar.base));
    let first = [
        Some(0xc000),
        Some(0xc000_0000),
        None,
        None,
        Some(0xc000_4000),
        None,
    ];
    assert_eq!(bases(&probes[0]), first);
    // No room for the last of the second one: it decodes nothing.
    assert_eq!(bases(&probes[1]), [None; BARS]);
    assert_eq!(probes[0].config_read(0x3c, Width::Byte), 11);
    assert_eq!(probes[1].config_read(0x3c, Width::Byte), 21);
    assert_eq!(bus.memory.read().len(), 2);
}

proptest! {
    #[test]
    fn random_accesses_never_panic(
        steps in proptest::collection::vec((0u8..6, any::<u16>(), 0usize..4, any::<u32>()), 0..200),
    ) {
        let s = setup();
        for (kind, at, width, value) in steps {
            let width = [Width::Byte, Width::Word, Width::Dword, Width::Qword][width];
            let narrow = if width == Width::Qword { Width::Dword } else { width };
            let window = s.layout.mmio32.start + u64::from(value);
            match kind {
                0 => s.ports.write(0xcf8, Width::Dword, value | 0x8000_0000),
                1 => s.ports.write(0xcfc + at % 4, narrow, value),
                2 => { s.ports.read(0xcf8 + at % 8, narrow); }
                3 => s.mmio.write(s.layout.ecam.unwrap() + (3 << 15) + u64::from(at % 0x100), width, u64::from(value)),
                4 => { s.mmio.read(window, width); }
                _ => { s.ports.read(0xc000 | at, narrow); }
            }
        }
    }
}

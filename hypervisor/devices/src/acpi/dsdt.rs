//! The DSDT: the devices that no bus enumerates, and the PCI root, in AML.

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, IO, If, Memory32Fixed, Method,
    Name, Package, PackageBuilder, Path, ResourceTemplate, Return, Scope, Store,
};
use acpi_tables::{Aml, AmlSink};

use super::AcpiConfig;
use crate::hpet::HPET_BASE;
use crate::pci::{DEVICES, ECAM_BUS_LEN};
use crate::platform::{self, SerialPort};
use crate::pm;

/// A small IRQ descriptor without flags: an edge-triggered, active-high ISA line (ACPI 6.5, section 6.4.2.1).
struct IsaIrq(u8);

impl Aml for IsaIrq {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x22);
        sink.word(1 << (self.0 & 15));
    }
}

fn ports(base: u16, len: u8) -> IO {
    IO::new(base, base, 1, len)
}

fn name(name: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(name), value)
}

/// A device with `_HID`, perhaps `_UID`, and `_CRS`.
fn device(path: &str, hid: &str, uid: Option<u32>, resources: Vec<&dyn Aml>) -> Vec<u8> {
    let hid = name("_HID", &EISAName::new(hid));
    let uid = uid.map(|uid| name("_UID", &uid));
    let crs = name("_CRS", &ResourceTemplate::new(resources));
    let mut children: Vec<&dyn Aml> = vec![&hid];
    if let Some(uid) = &uid {
        children.push(uid);
    }
    children.push(&crs);
    bytes(&Device::new(Path::new(path), children))
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// Name of the interrupt model that the system told by `_PIC`: 0 is the 8259A pair (ACPI 6.5, section 5.8.1).
const PIC_MODEL: &str = "\\PICM";

/// Where the interrupt pins of all PCI slots lead, by number of the interrupt (section 6.2.13).
fn routes(interrupt: impl Fn(u8, u8) -> u32) -> PackageBuilder {
    let mut routes = PackageBuilder::new();
    for slot in 1..DEVICES {
        for pin in 0..4u8 {
            let address = u32::from(slot) << 16 | 0xffff;
            let number = interrupt(slot, pin);
            routes.add_element(&Package::new(vec![&address, &pin, &0u8, &number]));
        }
    }
    routes
}

/// The PCI root bridge with its windows and interrupt routing.
fn pci_root(config: &AcpiConfig<'_>) -> Vec<u8> {
    let pci = &config.pci;
    let uncacheable = AddressSpaceCacheable::NotCacheable;
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    let config_ports = ports(0xcf8, 8);
    let io = AddressSpace::new_io(
        pci.io.start as u16,
        pci.io.end.saturating_sub(1) as u16,
        None,
    );
    let low = AddressSpace::new_memory(
        uncacheable,
        true,
        pci.mmio32.start as u32,
        pci.mmio32.end.saturating_sub(1) as u32,
        None,
    );
    let high = pci.mmio64.as_ref().map(|window| {
        AddressSpace::new_memory(
            AddressSpaceCacheable::PreFetchable,
            true,
            window.start,
            window.end.saturating_sub(1),
            None,
        )
    });
    let mut resources: Vec<&dyn Aml> = vec![&bus, &config_ports, &io, &low];
    if let Some(high) = &high {
        resources.push(high);
    }

    let by_ioapic = routes(platform::pci_gsi);
    let by_pic = routes(|slot, pin| u32::from(platform::pci_irq(slot, pin)));
    bytes(&Device::new(
        Path::new("PCI0"),
        vec![
            &name("_HID", &EISAName::new("PNP0A08")),
            &name("_CID", &EISAName::new("PNP0A03")),
            &name("_UID", &0u8),
            &name("_SEG", &0u8),
            &name("_BBN", &0u8),
            &name("_CRS", &ResourceTemplate::new(resources)),
            &name("PRTA", &by_ioapic),
            &name("PRTP", &by_pic),
            &Method::new(
                Path::new("_PRT"),
                0,
                false,
                vec![
                    &If::new(
                        &Path::new(PIC_MODEL),
                        vec![&Return::new(&Path::new("PRTA"))],
                    ),
                    &Return::new(&Path::new("PRTP")),
                ],
            ),
        ],
    ))
}

/// The DSDT's body.
pub(super) fn aml(config: &AcpiConfig<'_>) -> Vec<u8> {
    let mut scope = pci_root(config);
    // Claims ports that no device below has, and the ECAM, without which Linux does not use it.
    let claimed = [
        ports(platform::PM_BASE, pm::PM_PORTS as u8),
        ports(platform::POST_PORT, 1),
        ports(0x92, 1),
    ];
    let mut claims: Vec<&dyn Aml> = claimed.iter().map(|ports| ports as &dyn Aml).collect();
    let ecam = config
        .pci
        .ecam
        .map(|ecam| Memory32Fixed::new(true, ecam as u32, ECAM_BUS_LEN as u32));
    if let Some(ecam) = &ecam {
        claims.push(ecam);
    }
    scope.extend(device("RES0", "PNP0C02", Some(0), claims));
    scope.extend(device(
        "PIC0",
        "PNP0000",
        None,
        vec![
            &ports(0x20, 2),
            &ports(0xa0, 2),
            &ports(0x4d0, 2),
            &IsaIrq(2),
        ],
    ));
    scope.extend(device(
        "TMR0",
        "PNP0100",
        None,
        vec![&ports(0x40, 4), &IsaIrq(0)],
    ));
    scope.extend(device(
        "RTC0",
        "PNP0B00",
        None,
        vec![&ports(0x70, 2), &IsaIrq(platform::RTC_IRQ)],
    ));
    scope.extend(device(
        "HPET",
        "PNP0103",
        None,
        vec![&Memory32Fixed::new(false, HPET_BASE as u32, 0x400)],
    ));
    if config.keyboard {
        scope.extend(device(
            "PS2K",
            "PNP0303",
            None,
            vec![
                &ports(0x60, 1),
                &ports(0x64, 1),
                &IsaIrq(platform::KEYBOARD_IRQ),
            ],
        ));
    }
    for (number, &SerialPort { port, irq }) in (1u32..=9).zip(config.serial_ports) {
        scope.extend(device(
            &format!("COM{number}"),
            "PNP0501",
            Some(number),
            vec![&ports(port, crate::uart::UART_PORTS as u8), &IsaIrq(irq)],
        ));
    }
    for (uid, _) in (0u32..0x1000).zip(config.apic_ids) {
        scope.extend(bytes(&Device::new(
            Path::new(&format!("C{uid:03X}")),
            vec![&name("_HID", &"ACPI0007"), &name("_UID", &uid)],
        )));
    }
    let mut body = bytes(&name(
        "_S5_",
        &Package::new(vec![&pm::SLEEP_TYPE_S5, &pm::SLEEP_TYPE_S5, &0u8, &0u8]),
    ));
    body.extend(bytes(&name(PIC_MODEL, &0u8)));
    body.extend(bytes(&Method::new(
        Path::new("_PIC"),
        1,
        false,
        vec![&Store::new(&Path::new(PIC_MODEL), &Arg(0))],
    )));
    body.extend(Scope::raw(Path::new("_SB_"), scope));
    body
}

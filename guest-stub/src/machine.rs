//! The machine as found: memory, ACPI, interrupt controllers, and who runs it.

use crate::acpi::Acpi;
use crate::apic::{self, IoApic, pic};
use crate::boot::Handoff;
use crate::cpu::{self, Cr4, Leaf1Ecx};
use crate::interrupts::{self, guarded};
use crate::memory::Map;
use crate::{paging, println, time};

/// Bytes of RAM that checks may use as they like.
pub const SCRATCH_BYTES: u64 = 4 << 20;
/// Vector of IRQ 0 of the PICs; the secondary's follow.
pub const PIC_VECTORS: u8 = 0x20;

/// Everything that checks need to know.
pub struct Machine {
    pub handoff: Handoff,
    pub acpi: Option<Acpi>,
    pub ioapic: Option<IoApic>,
    /// First address that is not mapped one to one.
    pub mapped_end: u64,
    /// Physical address of free RAM, large-page-aligned.
    pub scratch: Option<u64>,
    pub tsc_hz: u64,
    pub host: Host,
}

/// Who runs the machine, as far as its own signs tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Host {
    /// Plinth: everything it promises is checked.
    Plinth,
    /// QEMU's own emulation: deviates from processors here and there.
    Tcg,
    /// Bochs: strict about processors, loose about some devices.
    Bochs,
    /// Hardware, or another hypervisor.
    Other,
}

impl Host {
    fn find(acpi: Option<&Acpi>) -> Self {
        if signatures().any(|(_, signature)| signature.starts_with(b"Plinth")) {
            return Self::Plinth;
        }
        let oem = acpi
            .and_then(|acpi| acpi.table(b"FACP"))
            .map(|table| table.oem_id());
        if oem.is_some_and(|oem| oem.eq_ignore_ascii_case(b"PLINTH")) {
            return Self::Plinth;
        }
        if signatures().any(|(_, signature)| &signature == b"TCGTCGTCGTCG") {
            return Self::Tcg;
        }
        // QEMU names its tables so too, but shows a hypervisor.
        if oem.is_some_and(|oem| &oem == b"BOCHS ") && signatures().next().is_none() {
            return Self::Bochs;
        }
        Self::Other
    }
}

/// Hypervisor leaf groups: (first leaf, signature).
pub fn signatures() -> impl Iterator<Item = (u32, [u8; 12])> {
    let present = cpu::leaf1_ecx().contains(Leaf1Ecx::HYPERVISOR);
    (0..4)
        .map(|group| 0x4000_0000 + group * 0x100)
        .filter(move |&base| present && cpu::cpuid(base, 0).eax >> 16 == base >> 16)
        .map(|base| (base, cpu::hypervisor_signature(base)))
}

impl Machine {
    /// Looks the machine over. Sets up page tables; changes no device.
    pub fn find(handoff: Handoff) -> Self {
        let map: Map = handoff.map;
        let mapped_end = paging::init(map.top());
        let mut acpi = None;
        if let Err(trap) = guarded(|| acpi = Acpi::find(handoff.rsdp)) {
            println!("stub: the ACPI tables are damaged: {trap}");
        }
        let ioapic = acpi
            .and_then(|acpi| acpi.madt)
            .and_then(|madt| madt.ioapic)
            // SAFETY: the MADT says so; IOAPICs are below 4 GiB, where all is mapped.
            .map(|(address, _)| unsafe { IoApic::new(address) });
        // SAFETY: global pages and x87/SSE set-up are off after boot; these add error reporting
        // for x87 and permission to execute SSE, which this program's own code does not use.
        unsafe {
            cpu::set_cr0(
                (cpu::cr0() | (cpu::Cr0::MP | cpu::Cr0::NE).bits()) & !cpu::Cr0::EM.bits(),
            );
            cpu::set_cr4(cpu::cr4() | (Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::DE).bits());
        }
        Self {
            host: Host::find(acpi.as_ref()),
            handoff,
            ioapic,
            mapped_end,
            scratch: map.scratch(SCRATCH_BYTES),
            acpi,
            tsc_hz: 1,
        }
    }

    /// Brings all interrupt sources to rest: the state in which each check starts.
    pub fn settle(&self) {
        cpu::cli();
        // SAFETY: breakpoints off.
        unsafe { cpu::set_dr7(0x400) };
        time::pit_stop();
        pic::remap(PIC_VECTORS);
        apic::local().quiet();
        if let Some(ioapic) = self.ioapic {
            ioapic.quiet();
        }
        interrupts::clear_hooks();
    }

    /// Measures the TSC.
    pub fn calibrate(&mut self) {
        self.tsc_hz = time::measure_tsc_hz();
    }

    /// Whether CPUID shows x2APIC and it is usable here.
    pub fn x2apic(&self) -> bool {
        cpu::leaf1_ecx().contains(Leaf1Ecx::X2APIC)
    }
}

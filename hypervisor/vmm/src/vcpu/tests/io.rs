//! What a vCPU asks devices for is counted, for its scheduler.

use devices::ioapic::IOAPIC_BASE;

use super::*;
use crate::vcpu::ACCESS_BYTES;

#[test]
fn accesses_to_devices_are_counted_and_nothing_else() {
    let mut b = Bench::new();
    b.run([Exit::Cpuid, out(0x80), Exit::Cpuid, out(0x3f8)]);
    assert_eq!(b.vcpu.take_io_bytes(), 2 * ACCESS_BYTES);
    let Vcpu { hw, rest, .. } = &mut b.vcpu;
    rest.mmio_read(hw, Gpa(IOAPIC_BASE), Width::Dword);
    rest.mmio_write(hw, Gpa(IOAPIC_BASE), Width::Dword, 1);
    Platform::<FakeCpu>::port_read(rest, 0x3fd, Width::Byte);
    Platform::<FakeCpu>::port_write(rest, 0x80, Width::Byte, 0);
    // Its own local APIC is none.
    rest.mmio_read(hw, Gpa(0xfee0_0030), Width::Dword);
    assert_eq!(b.vcpu.take_io_bytes(), 4 * ACCESS_BYTES);
    assert_eq!(b.vcpu.take_io_bytes(), 0, "all is told");
}

//! A VM that boots firmware: reset vector, ROM, shadow, variable store.

use alloc::vec;

use super::*;
use crate::firmware::{NestedControl, Variables};
use mem::{GuestMemory, GuestRange};

const IMAGE_BYTES: usize = 0x4_0000;
const ROM: u64 = (1 << 32) - IMAGE_BYTES as u64;
const STORE_BYTES: usize = 0x1_0000;
const STORE: u64 = ROM - STORE_BYTES as u64;

/// Each byte says where it is.
fn image() -> Vec<u8> {
    (0..IMAGE_BYTES).map(|at| (at / 0x1000) as u8).collect()
}

/// What the nested tables were told.
#[derive(Default)]
struct Tables {
    refreshed: Mutex<Vec<GuestRange>>,
    flushes: AtomicU32,
}

impl NestedControl for Tables {
    fn refresh(&self, _memory: &GuestMemory, range: GuestRange) -> Result<(), String> {
        self.refreshed.lock().push(range);
        Ok(())
    }
    fn flush(&self) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
    }
}

fn boot(variables: &Arc<Variables>) -> (Bench, Arc<Tables>) {
    let image = image();
    let firmware = Firmware {
        image: &image,
        variables: Some(variables.clone()),
    };
    let bench = Bench::with_firmware(firmware).expect("a VM");
    let tables = Arc::new(Tables::default());
    bench.vcpu.vm().set_nested(tables.clone());
    (bench, tables)
}

fn store() -> Arc<Variables> {
    Variables::new(&vec![0xff; STORE_BYTES])
}

impl Bench {
    fn byte(&self, at: u64) -> Option<u8> {
        self.vcpu.vm().memory.read_u8(Gpa(at)).ok()
    }

    /// Has the guest store AL at an address, which exits.
    fn store_byte(&mut self, at: u64, value: u8) {
        // mov [eax], bl: in real mode with an address-size prefix.
        const CODE: [u8; 3] = [0x67, 0x88, 0x18];
        self.vcpu
            .vm()
            .memory
            .write(Gpa(0x1000), &CODE)
            .expect("RAM");
        let state = &mut self.vcpu.hw.state;
        *state = CpuState::reset();
        state.segments[SegmentName::Cs as usize].base = 0;
        state.segments[SegmentName::Ds as usize].limit = u32::MAX;
        state.rip = 0x1000;
        self.set(Gpr::Rax, at);
        self.set(Gpr::Rbx, u64::from(value));
        let fault = NestedPageFault {
            gpa: Gpa(at),
            gva: None,
            write: true,
            fetch: false,
            page_walk: false,
        };
        self.run([Exit::NestedPageFault(fault)]);
        assert_eq!(self.rip(), 0x1003, "the instruction is done");
        assert!(!self.vcpu.vm().is_ended());
    }

    fn pci_write(&self, register: u32, value: u32) {
        let ports = &self.vcpu.vm().ports;
        ports.write(0xcf8, Width::Dword, 1 << 31 | register & 0xfc);
        ports.write(0xcfc + (register & 3) as u16, Width::Byte, value);
    }
}

#[test]
fn the_reset_vector_is_in_the_rom_and_the_rom_cannot_be_written() {
    let (mut bench, _) = boot(&store());
    let state = &bench.vcpu.hw.state;
    let cs = state.segments[SegmentName::Cs as usize];
    assert_eq!(cs.base + state.rip, 0xffff_fff0);
    assert_eq!(bench.byte(0xffff_fff0), Some(0x3f));
    assert_eq!(bench.byte(ROM), Some(0));
    assert_eq!(bench.byte(0xe_0000), Some(0x20), "the last 128 KiB again");
    assert_eq!(bench.byte(0xf_ffff), Some(0x3f));
    assert_eq!(bench.byte(0xd_ffff), Some(0xff), "no more than those");
    assert_eq!(bench.byte(0xa_0000), None, "VGA memory is not RAM");
    for at in [0xffff_fff0, ROM, 0xf_0000] {
        let before = bench.byte(at);
        bench.store_byte(at, 0xaa);
        assert_eq!(bench.byte(at), before, "{at:#x}");
    }
}

#[test]
fn firmware_unlocks_its_shadow() {
    let (mut bench, tables) = boot(&store());
    // PAM0: the 64 KiB segment.
    bench.pci_write(0x59, 0x30);
    let segment = GuestRange {
        start: Gpa(0xf_0000),
        bytes: 0x1_0000,
    };
    assert_eq!(tables.refreshed.lock().split_off(0), [segment]);
    assert!(bench.vcpu.vm().memory.write_u8(Gpa(0xf_0000), 0x55).is_ok());
    assert!(
        bench
            .vcpu
            .vm()
            .memory
            .write_u8(Gpa(0xe_0000), 0x55)
            .is_err()
    );
    assert!(bench.kicks.0[0].load(Ordering::Relaxed) > 0, "it must look");
    bench.run([]);
    assert_eq!(
        tables.flushes.load(Ordering::Relaxed),
        1,
        "before it goes on"
    );
    bench.run([]);
    assert_eq!(tables.flushes.load(Ordering::Relaxed), 1, "once");
    bench.pci_write(0x59, 0x10);
    bench.store_byte(0xf_0000, 0xaa);
    assert_eq!(bench.byte(0xf_0000), Some(0x55), "locked again");
    assert_eq!(bench.byte(0xffff_0000), Some(0x30), "the ROM is as it was");
}

/// Reads and writes are governed apart (82441FX data sheet, section 3.2.18).
#[test]
fn reads_and_writes_of_the_shadow_go_where_the_registers_say() {
    let (mut bench, _) = boot(&store());
    let at = 0xf_1234;
    // Writes to RAM, reads from the ROM: nothing of it is seen yet.
    bench.pci_write(0x59, 0x20);
    bench.store_byte(at, 0x77);
    assert_eq!(bench.byte(at), Some(0x31));
    // Reads from RAM, which has what was written, and else nothing of the ROM.
    bench.pci_write(0x59, 0x10);
    assert_eq!(bench.byte(at), Some(0x77));
    assert_eq!(bench.byte(at + 1), Some(0));
    bench.store_byte(at, 0x78);
    assert_eq!(bench.byte(at), Some(0x77), "writes go nowhere");
    bench.pci_write(0x59, 0x30);
    assert!(bench.vcpu.vm().memory.write_u8(Gpa(at + 1), 0x79).is_ok());
    // The ROM again, and the RAM keeps what it has meanwhile.
    bench.pci_write(0x59, 0x00);
    bench.store_byte(at, 0x7a);
    assert_eq!(bench.byte(at), Some(0x31));
    bench.pci_write(0x59, 0x30);
    assert_eq!(
        (bench.byte(at), bench.byte(at + 1)),
        (Some(0x77), Some(0x79))
    );
    // Below the image there is no ROM.
    assert_eq!(bench.byte(0xc_0000), Some(0xff));
    bench.pci_write(0x5a, 0x03);
    assert_eq!(bench.byte(0xc_0000), Some(0));
    assert_eq!(bench.byte(0xc_4000), Some(0xff), "each segment for itself");
}

#[test]
fn a_fault_that_is_no_fault_any_more_runs_the_instruction_again() {
    let (mut bench, _) = boot(&store());
    bench.pci_write(0x59, 0x30);
    let rip = bench.rip();
    let fault = NestedPageFault {
        gpa: Gpa(0xf_0000),
        gva: None,
        write: true,
        fetch: false,
        page_walk: false,
    };
    bench.run([Exit::NestedPageFault(fault)]);
    assert_eq!(bench.rip(), rip);
    assert!(!bench.vcpu.vm().is_ended());
}

#[test]
fn variables_outlive_the_vm() {
    let kept = store();
    let (mut bench, tables) = boot(&kept);
    for (at, byte) in [(5, 0x10), (5, 0x0f)] {
        bench.store_byte(STORE + at, byte);
    }
    assert_eq!(bench.byte(STORE + 5), None, "reads give the status now");
    assert_eq!(bench.vcpu.vm().mmio.read(STORE, Width::Byte), 0x80);
    bench.store_byte(STORE, 0xff);
    assert_eq!(bench.byte(STORE + 5), Some(0x0f));
    assert_eq!(tables.refreshed.lock().len(), 2, "out of sight and back");
    drop(bench);
    let (bench, _) = boot(&kept);
    assert_eq!(bench.byte(STORE + 5), Some(0x0f));
    assert_eq!(bench.byte(STORE + 4), Some(0xff));
}

#[test]
fn a_rom_of_64_kib_shows_in_its_segment_only() {
    let image: Vec<u8> = (0..0x1_0000_u32).map(|n| (n >> 12) as u8).collect();
    let firmware = Firmware {
        image: &image,
        variables: None,
    };
    let bench = Bench::with_firmware(firmware).expect("a VM");
    assert_eq!(bench.byte(0xffff_0000), Some(0));
    assert_eq!(bench.byte(0xfffe_ffff), None);
    assert_eq!(bench.byte(0xf_0000), Some(0));
    assert_eq!(bench.byte(0xf_ffff), Some(0xf));
    assert_eq!(bench.byte(0xe_ffff), Some(0xff));
}

#[test]
fn sizes_that_no_chip_has_are_refused() {
    let bad = |image: usize, variables: usize| {
        let image = vec![0; image];
        let firmware = Firmware {
            image: &image,
            variables: (variables > 0).then(|| Variables::new(&vec![0; variables])),
        };
        Bench::with_firmware(firmware).err().expect("a bad size")
    };
    assert!(bad(0xf000, 0).contains("61440 bytes are no size of a firmware image"));
    assert!(bad(0x2_0001, 0).contains("no size of a firmware image"));
    assert!(bad(0x2_0000, 0x1001).contains("no size of a variable store"));
    assert!(bad(0xff_f000, 0x2000).contains("allowed: up to 16 MiB together"));
}

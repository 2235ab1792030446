//! The VMs that there are, running or not: what each is made of, how it is, and what there is of it.

use alloc::{string::String, sync::Arc, vec::Vec};
use core::sync::atomic::AtomicU64;

use manage::{
    bundle::Bundle,
    config::{ConsoleKind, DiskConfig, DisplayKind, MAX_VMS, VmConfig, VmSched},
    console::ConsoleId,
    lifecycle::Life,
};
use mem::Owner;
use storage::{Disk, ImageDisk};
use virt::Backend;
use vmm::firmware::{Firmware, Variables};

use super::life::Live;
use crate::{console, display, memory, sync::Lock};

/// Number of a VM, from 1: whose its frames are. That of a VM that was destroyed is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct VmNumber(pub(super) u16);

const _: () = assert!(MAX_VMS < Owner::MAX_VMS as usize);
/// A bit for each in `World::alarms`.
const _: () = assert!(MAX_VMS < u128::BITS as usize);

/// A file that a VM's kernel is given.
pub(super) struct BootModule {
    pub(super) data: &'static [u8],
    /// What the kernel is told of it.
    pub(super) text: String,
}

/// What a VM is made of, each time.
pub(super) struct Plan {
    pub(super) config: VmConfig,
    /// Empty where firmware finds its system itself.
    pub(super) kernel: &'static [u8],
    pub(super) modules: Vec<BootModule>,
    pub(super) firmware: Option<Firmware<'static>>,
    /// The ROM by which its firmware draws.
    pub(super) vga_rom: Option<&'static [u8]>,
    /// They outlive the VM: a guest that restarts finds what it has written.
    pub(super) disks: Vec<Arc<dyn Disk>>,
    /// Its console on the terminal, if it is configured to have one.
    pub(super) console: Option<ConsoleId>,
    /// Bytes typed that it had no room for.
    pub(super) lost_input: AtomicU64,
    /// How it is scheduled, as an operator may have changed it.
    pub(super) sched: Lock<VmSched>,
}

impl Plan {
    /// Bytes of the heap that the VM takes when it is made, at most.
    pub(super) fn heap_bytes(&self) -> u64 {
        const FIXED: u64 = 256 << 10;
        const OF_VCPU: u64 = 64 << 10;
        let offered = match self.firmware {
            // Firmware loads a copy of them.
            Some(_) => {
                let modules = self.modules.iter().map(|module| module.data.len());
                self.kernel.len() + modules.sum::<usize>()
            }
            None => 0,
        };
        FIXED + u64::from(self.config.vcpus) * OF_VCPU + offered as u64
    }

    /// The plan of a VM whose configuration was checked against this bundle. Its console is attached.
    pub(super) fn new(config: VmConfig, number: VmNumber, bundle: &Bundle<'static>) -> Self {
        let file = |path: &Option<String>| path.as_deref().and_then(|path| bundle.guest_file(path));
        let kernel = file(&config.boot.kernel).unwrap_or_default();
        let firmware = config.boot.firmware.as_ref().map(|firmware| Firmware {
            image: bundle.guest_file(&firmware.image).unwrap_or_default(),
            variables: file(&firmware.variables).map(Variables::new),
        });
        let module = |path: &str, text: &str| BootModule {
            data: bundle.guest_file(path).unwrap_or_default(),
            text: String::from(text),
        };
        let initrd = config.boot.initrd.iter().map(|path| module(path, path));
        let named = config.boot.modules.iter();
        let modules = initrd
            .chain(named.map(|m| module(m.path(), &m.text)))
            .collect();
        let disks = disks(&config, number, bundle);
        let vga_rom = config.boot.firmware.as_ref();
        let vga_rom = vga_rom.and_then(|firmware| file(&firmware.vga_rom));
        let has_console = config.console != ConsoleKind::None;
        let console = has_console
            .then(|| console::attach(&config.name, config.focus))
            .flatten();
        if config.display != DisplayKind::None {
            display::begin();
        }
        Plan {
            sched: Lock::new(config.sched.clone()),
            config,
            kernel,
            modules,
            firmware,
            vga_rom,
            disks,
            console,
            lost_input: AtomicU64::new(0),
        }
    }
}

/// The disks of a VM, with what was written to them: nothing yet.
fn disks(vm: &VmConfig, number: VmNumber, bundle: &Bundle<'static>) -> Vec<Arc<dyn Disk>> {
    let disk = |disk: &DiskConfig| -> Arc<dyn Disk> {
        let image = bundle.guest_file(&disk.image).unwrap_or_default();
        Arc::new(if disk.readonly {
            ImageDisk::read_only(&memory::HOST, image)
        } else {
            let owner = Owner::VmDisks(number.0);
            ImageDisk::writable(&memory::HOST, owner, image, disk.changes)
        })
    };
    vm.disks.iter().map(disk).collect()
}

/// A VM that there is, running or not.
pub(super) struct Slot<B: Backend> {
    pub(super) number: VmNumber,
    pub(super) plan: Arc<Plan>,
    pub(super) life: Life,
    /// What there is of it while it is made; taken out by the processor that takes it down.
    pub(super) live: Option<Live<B>>,
    /// A processor makes it, takes it down or removes it.
    pub(super) claimed: bool,
    /// Host TSC at which its wait, or its time to shut down, is over.
    pub(super) due: Option<u64>,
    /// Host time of its last start, in nanoseconds.
    pub(super) started_ns: u64,
    /// How it ended the last time, or why it could not be started.
    pub(super) last_end: Option<String>,
    /// Its watchdog ended its last run.
    pub(super) watchdog_fired: bool,
}

impl<B: Backend> Slot<B> {
    /// A VM of which there is nothing yet.
    pub(super) fn new(number: VmNumber, plan: Plan, life: Life) -> Self {
        Slot {
            number,
            plan: Arc::new(plan),
            life,
            live: None,
            claimed: false,
            due: None,
            started_ns: 0,
            last_end: None,
            watchdog_fired: false,
        }
    }

    /// Takes note of what the VM did by itself: its watchdog may have paused it.
    pub(super) fn sync(&mut self) {
        if self.live.as_ref().is_some_and(|live| live.vm.is_paused()) {
            self.life.paused_itself();
        }
    }
}

/// All VMs, in the order in which they were configured or created.
pub(super) struct Slots<B: Backend> {
    all: Vec<Slot<B>>,
    /// The number that was given last.
    last: u16,
}

impl<B: Backend> Slots<B> {
    /// These.
    pub(super) fn new(mut slots: Vec<Slot<B>>) -> Self {
        slots.reserve_exact(MAX_VMS.saturating_sub(slots.len()));
        let last = slots.last().map_or(0, |slot| slot.number.0);
        Slots { all: slots, last }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Slot<B>> {
        self.all.iter()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Slot<B>> {
        self.all.iter_mut()
    }

    /// The VM of this number. Whoever has its number asks while it exists.
    pub(super) fn get(&mut self, number: VmNumber) -> Option<&mut Slot<B>> {
        self.all.iter_mut().find(|slot| slot.number == number)
    }

    /// The VM of this name.
    pub(super) fn named(&mut self, name: &str) -> Option<&mut Slot<B>> {
        self.all
            .iter_mut()
            .find(|slot| slot.plan.config.name == name)
    }

    /// A number that no VM has, the one that nobody had for longest: what is still told of one that is gone, as in a trace, is not taken
    /// for another's. `None`: there are as many VMs as there can be.
    pub(super) fn free_number(&self) -> Option<VmNumber> {
        let after = self.last + 1..=MAX_VMS as u16;
        let mut free = after.chain(1..=self.last).map(VmNumber);
        free.find(|&number| self.all.iter().all(|slot| slot.number != number))
    }

    pub(super) fn push(&mut self, slot: Slot<B>) {
        self.last = slot.number.0;
        self.all.push(slot);
    }

    /// Takes a VM out.
    pub(super) fn remove(&mut self, number: VmNumber) -> Option<Slot<B>> {
        let index = self.all.iter().position(|slot| slot.number == number)?;
        Some(self.all.remove(index))
    }
}

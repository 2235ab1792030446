//! The host's physical memory as every layer above sees it: frames with an owner, and a window.
//!
//! One object implements [`HostMemory`] on the machine (the kernel's, over the frame
//! allocator and the boot loader's mapping of all physical memory), another in host tests.

use crate::{addr::Hpa, frames::FrameView};

/// A region of physical memory, as the firmware's map gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// First byte.
    pub start: Hpa,
    /// Length in bytes.
    pub bytes: u64,
}

/// Who a frame belongs to. Freeing under another owner's name is refused. VM numbers are
/// below [`Owner::MAX_VMS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The hypervisor itself: heap, stacks, per-CPU data, VMXON and host-save areas.
    Host,
    /// RAM of the VM with this number.
    VmRam(u16),
    /// Nested page tables, VMCS/VMCB, bitmaps of the VM with this number.
    VmTables(u16),
    /// Changed blocks of the disks of the VM with this number.
    VmDisks(u16),
}

impl Owner {
    /// VM numbers are below this.
    pub const MAX_VMS: u16 = 256;
}

/// No run of free frames of the wanted size and alignment is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfFrames {
    /// Frames that were asked for, 4 KiB each.
    pub frames: u64,
}

impl core::fmt::Display for OutOfFrames {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.frames {
            1 => write!(f, "no free frame left"),
            n => write!(
                f,
                "no {n} contiguous free frames left ({} KiB)",
                n.saturating_mul(4)
            ),
        }
    }
}

/// Allocation of and access to host-physical memory. Implementations are shared by all pCPUs.
///
/// Accesses outside installed RAM panic: callers pass only addresses that they got from
/// `allocate` (guests' addresses go through `GuestMemory`, which checks them).
pub trait HostMemory: Send + Sync {
    /// Takes `frames` contiguous, zeroed 4 KiB frames, aligned to `align` bytes (a power of two, at least 4096).
    ///
    /// # Errors
    /// `OutOfFrames` when no such run is free.
    fn allocate(&self, frames: u64, align: u64, owner: Owner) -> Result<Hpa, OutOfFrames>;

    /// Called between pieces of long work on memory, such as zeroing a guest's. No lock of this room is held then, and the
    /// caller may be stopped for long.
    fn breathe(&self) {}

    /// Gives back frames taken with `allocate`.
    ///
    /// # Panics
    /// When the frames are not all owned by `owner`: a double free or a mix-up between VMs.
    fn free(&self, base: Hpa, frames: u64, owner: Owner);

    /// A host pointer to `hpa`, valid to the end of its frame run. Making it is safe, using it is not.
    fn pointer(&self, hpa: Hpa) -> *mut u8;

    /// Copies `to.len()` bytes out of host-physical memory. 1, 2, 4 or 8 naturally aligned bytes are read in one access.
    fn read(&self, from: Hpa, to: &mut [u8]);

    /// Copies bytes into host-physical memory. 1, 2, 4 or 8 naturally aligned bytes are written in one access.
    fn write(&self, to: Hpa, from: &[u8]);

    /// Reads an aligned 64-bit word in one access (page-table entries).
    fn read_u64(&self, from: Hpa) -> u64;

    /// A view of these bytes, where they can be read without asking each time. The view does not own them.
    fn view(&self, _base: Hpa, _bytes: u64) -> Option<FrameView> {
        None
    }

    /// Writes an aligned 64-bit word in one access (page-table entries).
    fn write_u64(&self, to: Hpa, value: u64);

    /// Replaces a byte if it is still `old`, in one access. Returns whether it was.
    fn replace_u8(&self, at: Hpa, old: u8, new: u8) -> bool;
}

//! A pretend machine's memory for host tests: frames in a vector, with owners and poison.
//!
//! Stands in for `frames::Frames` wherever code takes a [`HostMemory`]. Physical addresses
//! start at [`FakeMemory::BASE`], not at 0, so that a mix-up of guest- and host-physical
//! addresses shows. Freed frames are filled with [`FakeMemory::POISON`]; those that held a guest's data must have been
//! zeroed before.

use alloc::{vec, vec::Vec};
use spin::Mutex;

use crate::addr::PAGE_SIZE;
use crate::{HostMemory, Hpa, OutOfFrames, Owner};

const ZEROES: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

struct Inner {
    bytes: Vec<u8>,
    owners: Vec<Option<Owner>>,
    /// No frame below this index is free.
    hint: usize,
}

/// Host memory in a vector.
pub struct FakeMemory {
    inner: Mutex<Inner>,
}

impl FakeMemory {
    /// Physical address of the first byte: 1 GiB.
    pub const BASE: Hpa = Hpa(1 << 30);
    /// What freed frames are filled with.
    pub const POISON: u8 = 0xdb;

    /// Memory of `bytes` bytes, rounded down to whole frames.
    pub fn new(bytes: u64) -> Self {
        let frames = usize::try_from(bytes / PAGE_SIZE).expect("fits the test machine");
        Self {
            inner: Mutex::new(Inner {
                bytes: vec![0; frames * PAGE_SIZE as usize],
                owners: vec![None; frames],
                hint: 0,
            }),
        }
    }

    /// Frames that `owner` has, 4 KiB each.
    pub fn used(&self, owner: Owner) -> u64 {
        let inner = self.inner.lock();
        inner.owners.iter().filter(|o| **o == Some(owner)).count() as u64
    }

    /// Frames that nobody has, 4 KiB each.
    pub fn free_frames(&self) -> u64 {
        self.inner
            .lock()
            .owners
            .iter()
            .filter(|o| o.is_none())
            .count() as u64
    }

    fn offset(hpa: Hpa) -> usize {
        assert!(hpa >= Self::BASE, "{hpa:?} is below the fake machine's RAM");
        (hpa - Self::BASE) as usize
    }
}

impl HostMemory for FakeMemory {
    fn allocate(&self, frames: u64, align: u64, owner: Owner) -> Result<Hpa, OutOfFrames> {
        assert!(align.is_power_of_two() && align >= PAGE_SIZE && frames > 0);
        let (count, step) = (frames as usize, (align / PAGE_SIZE) as usize);
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        let base_frame = (Self::BASE.0 / PAGE_SIZE) as usize;
        let mut first = (base_frame + inner.hint).next_multiple_of(step) - base_frame;
        while first + count <= inner.owners.len() {
            let run = &mut inner.owners[first..first + count];
            if let Some(taken) = run.iter().rposition(Option::is_some) {
                first = (base_frame + first + taken + 1).next_multiple_of(step) - base_frame;
                continue;
            }
            run.fill(Some(owner));
            let start = first * PAGE_SIZE as usize;
            inner.bytes[start..start + count * PAGE_SIZE as usize].fill(0);
            while inner.owners.get(inner.hint).is_some_and(Option::is_some) {
                inner.hint += 1;
            }
            return Ok(Self::BASE + start as u64);
        }
        Err(OutOfFrames { frames })
    }

    fn free(&self, base: Hpa, frames: u64, owner: Owner) {
        let first = Self::offset(base) / PAGE_SIZE as usize;
        let mut inner = self.inner.lock();
        let run = &mut inner.owners[first..first + frames as usize];
        assert!(
            run.iter().all(|o| *o == Some(owner)),
            "{frames} frames at {base:?} are not all owned by {owner:?}"
        );
        run.fill(None);
        inner.hint = inner.hint.min(first);
        let (start, len) = (Self::offset(base), frames as usize * PAGE_SIZE as usize);
        let bytes = &mut inner.bytes[start..start + len];
        let is_guests = matches!(owner, Owner::VmRam(_) | Owner::VmDisks(_));
        assert!(
            !is_guests || bytes.chunks(ZEROES.len()).all(|page| page == ZEROES),
            "frames of {owner:?} go back with what a guest left in them"
        );
        bytes.fill(Self::POISON);
    }

    fn pointer(&self, hpa: Hpa) -> *mut u8 {
        let offset = Self::offset(hpa);
        let mut inner = self.inner.lock();
        assert!(offset < inner.bytes.len(), "{hpa:?} is not RAM");
        inner.bytes.as_mut_ptr().wrapping_add(offset)
    }

    fn read(&self, from: Hpa, to: &mut [u8]) {
        let start = Self::offset(from);
        to.copy_from_slice(&self.inner.lock().bytes[start..start + to.len()]);
    }

    fn write(&self, to: Hpa, from: &[u8]) {
        let start = Self::offset(to);
        self.inner.lock().bytes[start..start + from.len()].copy_from_slice(from);
    }

    fn read_u64(&self, from: Hpa) -> u64 {
        assert!(from.is_aligned(8));
        let mut bytes = [0; 8];
        self.read(from, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn write_u64(&self, to: Hpa, value: u64) {
        assert!(to.is_aligned(8));
        self.write(to, &value.to_le_bytes());
    }

    fn replace_u8(&self, at: Hpa, old: u8, new: u8) -> bool {
        let byte = &mut self.inner.lock().bytes[Self::offset(at)];
        let same = *byte == old;
        if same {
            *byte = new;
        }
        same
    }
}

//! Requests from a guest's platform to whoever runs the VM: reset, power-off, end of a test; and whether it runs.

use core::sync::atomic::{AtomicU8, Ordering};

/// Which register asked for the reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetSource {
    /// Reset control register, port 0xCF9.
    ResetControl,
    /// Keyboard controller command 0xFE.
    KeyboardController,
    /// Fast reset, port 0x92 bit 0.
    SystemControlPortA,
}

/// What the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemRequest {
    /// Restart the VM.
    Reset(ResetSource),
    /// Soft-off: the guest entered ACPI S5.
    PowerOff,
    /// Suspend to RAM: the guest entered ACPI S3.
    Sleep,
    /// A test kernel is done, with this value.
    TestExit(u32),
    /// The watchdog was not fed in time.
    Watchdog,
}

/// Carries out the platform's requests. Called from a vCPU's exit, with no lock held.
pub trait SystemControl: Send + Sync {
    /// Notes the request; it takes effect when the VMM next looks, so this returns at once.
    fn request(&self, request: SystemRequest);
}

/// What keeps all vCPUs of a VM from running on: looked at before each entry, in one read.
#[derive(Debug, Default)]
pub struct RunState(AtomicU8);

impl RunState {
    /// The VM has ended.
    pub const ENDED: u8 = 1 << 0;
    /// Output waits for the terminal, of a device that cannot tell the guest to wait.
    pub const OUTPUT_WAITS: u8 = 1 << 1;
    /// The operator, or a watchdog, has paused the VM.
    pub const PAUSED: u8 = 1 << 2;
    /// The guest is in ACPI S3.
    pub const ASLEEP: u8 = 1 << 3;

    /// Nothing keeps the vCPUs from running.
    #[inline]
    pub fn runs(&self) -> bool {
        self.0.load(Ordering::Acquire) == 0
    }

    /// Whether this keeps them.
    #[inline]
    pub fn has(&self, what: u8) -> bool {
        self.0.load(Ordering::Acquire) & what != 0
    }

    /// Whether this keeps them, from now on.
    pub fn set(&self, what: u8, on: bool) {
        match on {
            true => self.0.fetch_or(what, Ordering::Release),
            false => self.0.fetch_and(!what, Ordering::Release),
        };
    }
}

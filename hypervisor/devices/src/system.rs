//! Requests from a guest's platform to whoever runs the VM: reset, power-off, end of a test.

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
    /// A test kernel is done, with this value.
    TestExit(u32),
}

/// Carries out the platform's requests. Called from a vCPU's exit, with no lock held.
pub trait SystemControl: Send + Sync {
    /// Notes the request; it takes effect when the VMM next looks, so this returns at once.
    fn request(&self, request: SystemRequest);
}

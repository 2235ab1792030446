//! What a vCPU's run loop needs of the pCPU that it runs on.

use alloc::string::String;

/// What the host's interrupts were about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Attention {
    /// The vCPU may run on.
    GoOn,
    /// The pCPU is needed for something else: the vCPU's slice is over.
    GiveWay,
}

/// The pCPU under a running vCPU. The kernel implements it; tests have their own.
pub trait Host {
    /// Host TSC, in ticks.
    fn now(&self) -> u64;
    /// Host TSC at which the vCPU's time on this pCPU is over. It may become earlier at any time.
    fn run_until(&self) -> u64;
    /// Has the pCPU interrupted no later than this host TSC.
    fn arm_timer(&mut self, host_tsc: u64);
    /// Host TSC until which this pCPU's own interrupts may wait for a guest's next exit: the guest
    /// is made to exit then. `u64::MAX` where a host interrupt makes it exit by itself.
    fn interrupts_wait_until(&self) -> u64;
    /// Lets pending host interrupts in. Called with interrupts disabled, returns so.
    fn take_interrupts(&mut self) -> Attention;
    /// An NMI made the guest exit: handles it as if it had come in host code.
    fn take_nmi(&mut self);
    /// A line for the host's log about what the guest in it did: at most a few per vCPU and kind
    /// (the caller limits them).
    fn note(&mut self, line: String);
}

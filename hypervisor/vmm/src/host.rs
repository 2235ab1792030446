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

/// Something that a run loop did, for a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traced {
    /// The guest is entered now.
    Entry,
    /// It has exited.
    Exit {
        /// [`Exit::index`](virt::Exit::index).
        kind: usize,
        /// The port, where it is port I/O; else 0.
        port: u16,
    },
    /// The guest gets this interrupt.
    Interrupt(u8),
    /// It gets an NMI.
    Nmi,
    /// The VM's devices did what they had put off.
    DeviceWork,
}

/// Whoever wants to know what a VM's watchdog has done that did not end the VM. Called in a vCPU's exit.
pub trait Alarm: Send + Sync {
    /// It was not fed, and did what it is configured to do.
    fn watchdog(&self);
}

/// The pCPU under a running vCPU. The kernel implements it; tests have their own.
pub trait Host {
    /// Whether it wants to be told by [`Host::trace`]. A run loop for a host that does not has no code for it.
    const TRACES: bool = false;

    /// The run loop did this, just now.
    fn trace(&mut self, what: Traced) {
        let _ = what;
    }

    /// Host TSC, in ticks.
    fn now(&self) -> u64;
    /// Host TSC at which the vCPU's time on this pCPU is over. It may become earlier at any time.
    fn run_until(&self) -> u64;
    /// Whether [`Host::run_until`] may be earlier than when it was last asked for. Asked before each entry.
    fn has_less_time(&self) -> bool;
    /// Time in which the vCPU was ready and did not run, since it was made and up to the beginning of this run, in nanoseconds.
    fn stolen_ns(&self) -> u64;
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

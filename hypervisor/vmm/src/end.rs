//! How a VM ends, and what else it or its watchdog can ask of whoever runs it.

use alloc::{boxed::Box, string::String, sync::Arc};
use core::fmt;

use devices::{
    VcpuId, debug_exit,
    lapic::{ApicBus, VcpuKick},
    system::{RunState, SystemControl, SystemRequest},
};
use spin::{Mutex, Once};

use crate::{host::Alarm, pause::PauseControl, vcpu::Dump};

/// What a watchdog does that was not fed in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchdogAction {
    /// Resets the VM.
    Reset,
    /// Powers it off.
    PowerOff,
    /// Pauses it.
    Pause,
    /// Sends all its vCPUs an NMI.
    Nmi,
    /// Nothing but to say so.
    Log,
}

/// A VM's watchdog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchdogSpec {
    /// What it does.
    pub action: WatchdogAction,
    /// It ended the VM's last run: the guest can see that.
    pub fired: bool,
}

/// How a VM ended.
#[derive(Debug)]
pub enum EndReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a restart, or somebody pressed the reset button.
    Reset,
    /// It was forced off from outside.
    Forced,
    /// It did not feed its watchdog, which reset it.
    WatchdogReset,
    /// It did not feed its watchdog, which powered it off.
    WatchdogPowerOff,
    /// A test kernel ended its machine with this value.
    TestExit(u32),
    /// Triple fault.
    TripleFault(Box<Dump>),
    /// The guest did what Plinth cannot carry out, or Plinth made a mistake.
    Failure {
        /// In words.
        what: String,
        /// The vCPU that met it.
        dump: Box<Dump>,
    },
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EndReason::PowerOff => f.write_str("powered off"),
            EndReason::Reset => f.write_str("reset"),
            EndReason::Forced => f.write_str("forced off"),
            EndReason::WatchdogReset => f.write_str("its watchdog was not fed: reset"),
            EndReason::WatchdogPowerOff => f.write_str("its watchdog was not fed: powered off"),
            EndReason::TestExit(value) => write!(
                f,
                "test ended with value {value:#x}, exit status {}",
                debug_exit::exit_status(*value)
            ),
            EndReason::TripleFault(dump) => write!(f, "triple fault\n{dump}"),
            EndReason::Failure { what, dump } => write!(f, "{what}\n{dump}"),
        }
    }
}

/// What an [`EndCell`] is made from.
pub(crate) struct EndConfig {
    pub(crate) vcpus: u16,
    pub(crate) kick: Arc<dyn VcpuKick>,
    /// Of the watchdog.
    pub(crate) action: Option<WatchdogAction>,
    pub(crate) alarm: Arc<dyn Alarm>,
    /// Whether somebody wakes it: firmware would have to, and none of ours does.
    pub(crate) can_sleep: bool,
}

/// Set once, by whoever ends the VM first; and all else that stops or wakes all vCPUs.
pub(crate) struct EndCell {
    state: Arc<RunState>,
    reason: Mutex<Option<EndReason>>,
    pauses: PauseControl,
    apic_bus: Once<Arc<ApicBus>>,
    config: EndConfig,
}

impl EndCell {
    /// For a VM that has not ended.
    pub(crate) fn new(config: EndConfig) -> Self {
        let state: Arc<RunState> = Arc::default();
        EndCell {
            pauses: PauseControl::new(state.clone(), config.vcpus),
            state,
            reason: Mutex::new(None),
            apic_bus: Once::new(),
            config,
        }
    }

    /// Says where NMIs are sent. Once, before the VM runs.
    pub(crate) fn set_apic_bus(&self, bus: Arc<ApicBus>) {
        self.apic_bus.call_once(|| bus);
    }

    pub(crate) fn state(&self) -> &Arc<RunState> {
        &self.state
    }

    pub(crate) fn pauses(&self) -> &PauseControl {
        &self.pauses
    }

    pub(crate) fn end(&self, reason: EndReason) {
        {
            let mut cell = self.reason.lock();
            if cell.is_some() {
                return;
            }
            *cell = Some(reason);
        }
        self.state.set(RunState::ENDED, true);
        self.kick_all();
    }

    pub(crate) fn take_reason(&self) -> Option<EndReason> {
        self.reason.lock().take()
    }

    pub(crate) fn kick(&self, vcpu: VcpuId) {
        self.config.kick.kick(vcpu);
    }

    /// Has every vCPU look up.
    fn kick_all(&self) {
        for vcpu in 0..u32::from(self.config.vcpus) {
            self.config.kick.kick(VcpuId(vcpu));
        }
    }

    /// Keeps the vCPUs from running. `false`: they are kept already, or the VM has ended.
    pub(crate) fn pause(&self) -> bool {
        let begun = !self.state.has(RunState::ENDED) && self.pauses.begin();
        if begun {
            self.kick_all();
        }
        begun
    }

    /// Lets them run on.
    pub(crate) fn resume(&self) {
        self.pauses.end();
        self.kick_all();
    }

    /// Sends a vCPU an NMI. `false`: there is no such vCPU.
    pub(crate) fn nmi(&self, vcpu: VcpuId) -> bool {
        let inbox = self.apic_bus.get().and_then(|bus| bus.inbox(vcpu));
        if inbox.is_some_and(|inbox| inbox.post_nmi()) {
            self.config.kick.kick(vcpu);
        }
        inbox.is_some()
    }

    /// The watchdog was not fed.
    fn watchdog(&self) {
        match self.config.action {
            Some(WatchdogAction::Reset) => return self.end(EndReason::WatchdogReset),
            Some(WatchdogAction::PowerOff) => return self.end(EndReason::WatchdogPowerOff),
            Some(WatchdogAction::Pause) => {
                self.pause();
            }
            Some(WatchdogAction::Nmi) => {
                for vcpu in 0..u32::from(self.config.vcpus) {
                    self.nmi(VcpuId(vcpu));
                }
            }
            Some(WatchdogAction::Log) | None => {}
        }
        self.config.alarm.watchdog();
    }
}

impl SystemControl for EndCell {
    fn request(&self, request: SystemRequest) {
        self.end(match request {
            SystemRequest::Reset(_) => EndReason::Reset,
            SystemRequest::PowerOff => EndReason::PowerOff,
            SystemRequest::TestExit(value) => EndReason::TestExit(value),
            SystemRequest::Watchdog => return self.watchdog(),
            SystemRequest::Sleep => {
                if self.config.can_sleep {
                    self.state.set(RunState::ASLEEP, true);
                    self.kick_all();
                }
                return;
            }
        });
    }
}

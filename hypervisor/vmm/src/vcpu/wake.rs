//! How a vCPU starts again with its VM's memory as it was: after an INIT of the boot processor, and after S3.

use devices::VcpuId;
use devices::lapic::{DeliveryMode, Destination, Message, Trigger};
use virt::{CpuState, VirtualCpu};

use super::{Activity, Pause, Vcpu};
use crate::{vm::EndReason, warm::WarmStart};

/// It looks after the devices' timers, too.
const BOOT_PROCESSOR: VcpuId = VcpuId(0);

impl<V: VirtualCpu> Vcpu<V> {
    /// Where the boot processor goes on after an INIT. Where firmware would start from the beginning, the VM is
    /// reset instead: there is nothing in its memory that would do that.
    pub(super) fn warm_state(&self, warm: &WarmStart) -> CpuState {
        let vm = &self.rest.vm;
        warm.warm_state(&vm.memory).unwrap_or_else(|| {
            vm.end(EndReason::Reset);
            CpuState::reset()
        })
    }

    /// The VM sleeps. The boot processor looks whether something wakes it, and then starts where the system has said;
    /// the others wait for a start-up IPI from there on. `None`: it is awake.
    #[cold]
    pub(super) fn asleep(&mut self) -> Option<Pause> {
        let id = self.rest.id;
        let vm = self.rest.vm.clone();
        let warm = vm.warm.as_ref()?;
        if id != BOOT_PROCESSOR {
            return Some(Pause::Idle { until: None });
        }
        let now = devices::time::Clock::now(&*vm.clock);
        vm.poll_timers(id, now);
        if !warm.wakes() {
            let until = vm.timer_deadline(id).map(|at| vm.clock.to_host(at));
            return Some(Pause::Idle { until });
        }
        let init = Message {
            destination: Destination::AllButSender,
            mode: DeliveryMode::Init,
            vector: 0,
            trigger: Trigger::Edge,
            assert: true,
        };
        vm.apic_bus.send(&init, Some(id));
        match warm.waking_state(&vm.memory) {
            Some(state) => {
                self.rest.apic.init();
                self.rest.nmi_pending = 0;
                self.hw.cancel_injection();
                self.hw.set_state(&state);
                self.activity = Activity::Running;
                None
            }
            None => {
                vm.end(EndReason::Reset);
                Some(Pause::Ended)
            }
        }
    }
}

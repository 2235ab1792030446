//! A paused VM: its vCPUs are kept from running, and how long all of them have been at rest is known.
//!
//! Whoever pauses does not wait: each vCPU comes to rest when it next looks, microseconds after its kick,
//! and counts itself. The last one's time is when the VM came to a standstill, and what has passed since
//! can be taken out of its time when it goes on. A pause that ends before all have come to rest has not
//! stopped the VM, and takes nothing out of its time.
//!
//! Invariant: once [`PauseControl::holds`] has said so, the vCPU does not enter the guest before the pause ends.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

use devices::system::RunState;
use spin::Mutex;

/// Which pause it is, in the upper half, and how many vCPUs have come to rest in it, in the lower.
const ONE_PAUSE: u64 = 1 << 32;

/// The pauses of one VM.
pub(crate) struct PauseControl {
    state: Arc<RunState>,
    /// In one word, so that a vCPU never counts in another pause than it has seen.
    at_rest: AtomicU64,
    /// Host TSC at which the last of them came to rest.
    since: AtomicU64,
    vcpus: u64,
    /// Held while a pause begins: the operator and a watchdog may want one at once.
    beginning: Mutex<()>,
}

impl PauseControl {
    /// A VM that is not paused.
    pub(crate) fn new(state: Arc<RunState>, vcpus: u16) -> Self {
        PauseControl {
            state,
            at_rest: AtomicU64::new(0),
            since: AtomicU64::new(0),
            vcpus: u64::from(vcpus),
            beginning: Mutex::new(()),
        }
    }

    /// Begins a pause; the vCPUs are to be kicked then. `false`: it is paused already.
    pub(crate) fn begin(&self) -> bool {
        let _beginning = self.beginning.lock();
        if self.state.has(RunState::PAUSED) {
            return false;
        }
        self.since.store(0, Ordering::Relaxed);
        let before = self.at_rest.load(Ordering::Relaxed);
        let next = (before / ONE_PAUSE + 1) * ONE_PAUSE;
        self.at_rest.store(next, Ordering::Release);
        self.state.set(RunState::PAUSED, true);
        true
    }

    /// Whether the VM is paused: then the calling vCPU has come to rest, at host TSC `now`. `seen` is the vCPU's own, 0 at first.
    pub(crate) fn holds(&self, seen: &mut u32, now: u64) -> bool {
        if !self.state.has(RunState::PAUSED) {
            return false;
        }
        let mut word = self.at_rest.load(Ordering::Acquire);
        while (word / ONE_PAUSE) as u32 != *seen {
            self.since.fetch_max(now, Ordering::Relaxed);
            match self.at_rest.compare_exchange_weak(
                word,
                word + 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => *seen = (word / ONE_PAUSE) as u32,
                Err(changed) => word = changed,
            }
        }
        true
    }

    /// How long, up to host TSC `now`, all vCPUs have been at rest; 0 if they are not, or it is not paused.
    pub(crate) fn still_for(&self, now: u64) -> u64 {
        let word = self.at_rest.load(Ordering::Acquire);
        if !self.state.has(RunState::PAUSED) || word % ONE_PAUSE < self.vcpus {
            return 0;
        }
        now.saturating_sub(self.since.load(Ordering::Relaxed))
    }

    /// Ends the pause; the vCPUs are to be kicked then.
    pub(crate) fn end(&self) {
        self.state.set(RunState::PAUSED, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control(vcpus: u16) -> PauseControl {
        PauseControl::new(Arc::default(), vcpus)
    }

    #[test]
    fn the_vm_stands_still_when_the_last_vcpu_rests() {
        let pause = control(2);
        let mut seen = [0; 2];
        assert!(!pause.holds(&mut seen[0], 5));
        assert!(pause.begin());
        assert!(!pause.begin(), "already");
        assert_eq!(pause.still_for(100), 0);
        assert!(pause.holds(&mut seen[0], 110));
        // A vCPU that is woken for something rests on, and counts once.
        assert!(pause.holds(&mut seen[0], 500));
        assert_eq!(pause.still_for(600), 0);
        assert!(pause.holds(&mut seen[1], 200));
        assert_eq!(pause.still_for(1_000), 800);
        pause.end();
        assert_eq!(pause.still_for(1_000), 0);
        assert!(!pause.holds(&mut seen[1], 1_000));
    }

    #[test]
    fn each_pause_is_counted_anew() {
        let pause = control(1);
        let mut seen = 0;
        for round in 1..10 {
            assert!(pause.begin());
            assert_eq!(pause.still_for(2_000 * round), 0, "round {round}");
            assert!(pause.holds(&mut seen, 1_000 * round));
            assert_eq!(pause.still_for(1_000 * round + 7), 7);
            pause.end();
        }
    }
}

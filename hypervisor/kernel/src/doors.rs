//! The operator's doors: where requests come in, and when they are served.
//!
//! A door (the shell, the control channel) collects what comes in, in bounded queues and at any time: an
//! interrupt handler may do that, with a guest running. [`ring`] says that there is something to do. The first processor's loop
//! then comes to [`serve`], with no lock held and no vCPU loaded, and each door may hand its requests to
//! [`Operate`] there, and nowhere else.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use manage::command::Operate;

use crate::{control, interrupts, operator, percpu, time};

/// Serves one door.
type Door = fn(&dyn Operate);

/// All doors.
const DOORS: &[Door] = &[
    operator::serve,
    control::serve,
    #[cfg(feature = "selftest")]
    crate::selftest::lifecycle::serve,
];

static RANG: AtomicBool = AtomicBool::new(false);
/// Host TSC at which the doors are to be served though nobody rings; `u64::MAX`: not for that.
static NEXT: AtomicU64 = AtomicU64::new(u64::MAX);

/// A door has something to do: the first processor serves the doors soon, even if it runs a guest.
pub fn ring() {
    RANG.store(true, Ordering::Release);
    if percpu::try_number().is_some_and(|number| number != 0)
        && let Some(first) = percpu::get(0)
    {
        interrupts::kick(first);
    }
}

/// As [`ring`], at this host TSC, for a door that shows something anew. To be said anew each time the doors are served.
#[cfg_attr(
    not(feature = "selftest"),
    expect(dead_code, reason = "for doors that look at the clock")
)]
pub fn ring_at(tsc: u64) {
    NEXT.fetch_min(tsc, Ordering::Relaxed);
}

/// Host TSC at which the doors are to be served, if there is one.
pub fn wake_up_at() -> Option<u64> {
    Some(NEXT.load(Ordering::Relaxed)).filter(|&at| at != u64::MAX)
}

/// Whether somebody rang: the first processor is not to halt, and not to run on with a guest.
pub fn is_waiting() -> bool {
    RANG.load(Ordering::Acquire) || wake_up_at().is_some_and(|at| at <= time::now_tsc())
}

/// Serves all doors if one has rung, with interrupts on; whether one has. The first processor's loop calls this.
pub fn serve(operate: &dyn Operate) -> bool {
    if !is_waiting() {
        return false;
    }
    RANG.store(false, Ordering::Relaxed);
    NEXT.store(u64::MAX, Ordering::Relaxed);
    // A table of many VMs, say, is long work.
    interrupts::open(|| DOORS.iter().for_each(|door| door(operate)));
    true
}

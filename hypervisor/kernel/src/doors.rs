//! The operator's doors: where requests come in, and when they are served.
//!
//! A door (the shell, the control channel) collects what comes in, in bounded queues and at any time: an
//! interrupt handler may do that, with a guest running. [`ring`] says that there is something to do. The first processor's loop
//! then comes to [`serve`], with no lock held and no vCPU loaded, and each door may hand its requests to
//! [`Operate`] there, and nowhere else.

use core::sync::atomic::{AtomicBool, Ordering};

use manage::command::Operate;

use crate::{control, interrupts, operator, percpu};

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

/// A door has something to do: the first processor serves the doors soon, even if it runs a guest.
pub fn ring() {
    RANG.store(true, Ordering::Release);
    if percpu::try_number().is_some_and(|number| number != 0)
        && let Some(first) = percpu::get(0)
    {
        interrupts::kick(first);
    }
}

/// Whether somebody rang: the first processor is not to halt, and not to run on with a guest.
pub fn is_waiting() -> bool {
    RANG.load(Ordering::Acquire)
}

/// Serves all doors if one has rung. The first processor's loop calls this.
pub fn serve(operate: &dyn Operate) {
    if !RANG.swap(false, Ordering::Acquire) {
        return;
    }
    for door in DOORS {
        door(operate);
    }
}

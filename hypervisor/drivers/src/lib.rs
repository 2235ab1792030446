//! Drivers of the host's own devices: console, timers, interrupt controllers, power.
//!
//! Devices are reached by port or by a window that the kernel maps. What needs no hardware
//! (log ring, text layout, table searches, calibration arithmetic) is kept apart from what
//! does, and is tested on the workstation. No driver allocates after its set-up, waits
//! without a bound, or takes a lock: the kernel decides about sharing.
//!
//! Unsafe: port and memory-mapped I/O, and firmware tables, cannot be reached in safe Rust.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod apic;
pub mod by_clock;
pub mod clock;
pub mod firmware;
pub mod ioapic;
pub mod line;
pub mod power;
pub mod ps2;
pub mod queue;
pub mod ring;
pub mod screen;
pub mod serial;
pub mod symbols;
pub mod wall_clock;

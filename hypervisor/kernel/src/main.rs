//! The bootable hypervisor: takes the machine over and wires the other crates together.
//!
//! [`boot`] brings memory, processors and interrupts up in one fixed order and then hands
//! over to [`run`]. The boot loader is `bootloader` 0.11; the program is a static PIE.
//!
//! Unsafe: descriptor tables, page tables, start-up of processors and device access are
//! what this crate is for.
#![no_std]
#![no_main]

extern crate alloc;

mod boot;
mod calibrate;
mod console;
mod control;
mod cpu;
mod display;
mod doors;
mod fault;
mod frame;
mod gdt;
mod idt;
mod interrupts;
mod journal;
mod log;
mod memory;
mod operator;
mod percpu;
mod power;
mod preflight;
mod run;
mod screen;
#[cfg(feature = "selftest")]
mod selftest;
mod smp;
mod symbols;
mod sync;
mod time;
mod trace;

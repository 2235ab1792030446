//! The bootable hypervisor: takes the machine over and wires the other crates together.
//!
//! [`boot`] brings the processors, memory and interrupts up in one fixed order and then
//! hands over to `run`. Everything the layers below leave open is a static of one of
//! these modules. The boot loader is `bootloader` 0.11; the program is a static PIE.
//!
//! Unsafe: descriptor tables, page tables, start-up of processors and device access are
//! what this crate is for.
#![no_std]
#![no_main]

extern crate alloc;

mod boot;
mod console;
mod cpu;
mod fault;
mod log;
mod memory;
mod power;
mod sync;
mod time;

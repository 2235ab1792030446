//! A VM: its memory map and devices, its vCPUs' run loops, and what happens on every exit.
//!
//! Hardware-free: the world switch is `virt::VirtualCpu`, the host is [`host::Host`], so
//! that the whole crate runs in host tests against fakes.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod bios_data;
pub mod breakpoint;
pub mod clock;
pub mod control;
pub mod cpuid;
mod disks;
pub mod display;
pub mod emulate;
mod end;
pub mod firmware;
pub mod host;
pub mod load;
pub mod msr;
mod pause;
mod shadow;
pub mod task;
pub mod vcpu;
pub mod vm;
pub mod walk;
mod warm;

#[cfg(test)]
mod fake;

//! What an operator says and sees: configuration, consoles, commands, metrics.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod bundle;
pub mod config;
pub mod console;

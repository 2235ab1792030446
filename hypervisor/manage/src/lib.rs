//! What an operator writes and sees: the configuration, the bundle that carries it, the commands, the consoles.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod bundle;
pub mod command;
pub mod config;
pub mod console;
pub mod follow;
pub mod grid;
pub mod journal;
pub mod lifecycle;
pub mod limit;
pub mod line_editor;
pub mod mirror;
pub mod restart;
pub mod shell;
pub mod table;
pub mod top;
pub mod trace;
pub mod wire;

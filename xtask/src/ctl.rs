//! `cargo xtask ctl`: plinthctl, on the machine that `cargo xtask run` started.

use std::{
    ffi::OsString,
    fs,
    io::{self, IsTerminal},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use plinthctl::Terminal;

use crate::{exit::Code, paths};

/// Operate the Plinth that `cargo xtask run` started: plinthctl with its address.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct Args {
    /// What plinthctl is to do; --help tells what there is.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Where `cargo xtask run` puts the control channel unless it is told otherwise.
pub fn default_socket() -> PathBuf {
    paths::target().join("plinth-control.sock")
}

/// Whether no machine listens there. What an ended one left is removed.
pub fn is_free(path: &Path) -> bool {
    if UnixStream::connect(path).is_ok() {
        return false;
    }
    // There may be none.
    let _ = fs::remove_file(path);
    true
}

/// Runs it. The exit code is plinthctl's.
pub fn run(args: &Args) -> Code {
    let said = args.arguments.iter().any(|argument| {
        let text = argument.to_string_lossy();
        text.starts_with("--connect") || text.starts_with("-c")
    });
    let mut arguments = vec![OsString::from("plinthctl")];
    if !said && std::env::var_os(plinthctl::ADDRESS_VARIABLE).is_none() {
        let mut address = OsString::from("--connect=unix:");
        address.push(default_socket());
        arguments.push(address);
    }
    arguments.extend(args.arguments.iter().cloned());
    let terminal = Terminal {
        out: &mut io::stdout(),
        errors: &mut io::stderr(),
        is_terminal: io::stdout().is_terminal(),
    };
    Code::Control(plinthctl::run(arguments, terminal).status())
}

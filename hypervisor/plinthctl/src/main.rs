//! `plinthctl`: operates a Plinth host from another machine, over its control channel.

use std::{
    io::{self, IsTerminal},
    process::ExitCode,
};

use plinthctl::Terminal;

fn main() -> ExitCode {
    let terminal = Terminal {
        out: &mut io::stdout(),
        errors: &mut io::stderr(),
        is_terminal: io::stdout().is_terminal(),
    };
    let exit = plinthctl::run(std::env::args_os(), terminal);
    ExitCode::from(exit.status())
}

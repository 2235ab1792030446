//! The shell, and guests' consoles as text, on the host's screen, steered by its keyboard.
//!
//! Until somebody types, the screen is the log's, or shows a guest's display (see [`display`]). Then it shows the
//! shell; the escape key and a key choose what else. A guest's console here reads along what the guest writes,
//! from the multiplexer's memory: it holds nobody up.
//!
//! Only the first processor comes here, from its loop, and draws a step at a time ([`drivers::screen`]).

use alloc::{boxed::Box, collections::VecDeque, format};
use core::sync::atomic::{AtomicBool, Ordering};

use drivers::{ps2::Decoder, screen::Cell};
use manage::{
    command::Operate,
    console::{ConsoleId, Input},
    grid::{self, Grid},
    journal::Door,
    shell::Action,
};

use super::{Session, Terminal, keyboard, no_console};
use crate::{console, display, doors, screen, sync::Lock, time};

/// Columns and rows of a console on the screen.
const COLUMNS: usize = 80;
const ROWS: usize = 25;
/// Bytes of a guest's output taken in at a time.
const BYTES_AT_ONCE: usize = 4096;
/// Typed input that waits for a guest; more is dropped.
const INPUTS: usize = 256;
/// Steps of drawing after a change: enough for the whole screen, of whatever size.
const STEPS: u32 = 64;
/// Between two steps, in microseconds.
const STEP_US: u64 = 5_000;
/// Between two looks at a guest's console, in microseconds.
const LOOK_US: u64 = 20_000;

/// A PC's colours in the order of ANSI's, as 0xRRGGBB.
const COLORS: [u32; 16] = [
    0x00_0000, 0xaa_0000, 0x00_aa00, 0xaa_5500, 0x00_00aa, 0xaa_00aa, 0x00_aaaa, 0xaa_aaaa,
    0x55_5555, 0xff_5555, 0x55_ff55, 0xff_ff55, 0x55_55ff, 0xff_55ff, 0x55_ffff, 0xff_ffff,
];

/// Characters that programs draw frames and bars with: in the PC's character set, and in ASCII.
const DRAWN: [(char, u8, u8); 15] = [
    ('\u{2500}', 0xc4, b'-'),
    ('\u{2502}', 0xb3, b'|'),
    ('\u{250c}', 0xda, b'+'),
    ('\u{2510}', 0xbf, b'+'),
    ('\u{2514}', 0xc0, b'+'),
    ('\u{2518}', 0xd9, b'+'),
    ('\u{251c}', 0xc3, b'+'),
    ('\u{2524}', 0xb4, b'+'),
    ('\u{252c}', 0xc2, b'+'),
    ('\u{2534}', 0xc1, b'+'),
    ('\u{253c}', 0xc5, b'+'),
    ('\u{2550}', 0xcd, b'='),
    ('\u{2551}', 0xba, b'|'),
    ('\u{2588}', 0xdb, b'#'),
    ('\u{2592}', 0xb1, b'#'),
];

/// The keys after the escape key.
const HELP: &str = "keys after the escape key:\n  \
    0, s  the shell             1..9  that guest's console\n  \
    n, p  next, previous guest  g     the log\n  \
    d     the guest's display, or the log\n  \
    q     power the host off\n";

/// What the screen shows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum View {
    /// The log, or a guest's display.
    Host,
    Shell,
    Console(ConsoleId),
}

struct Local {
    decoder: Decoder,
    escaped: bool,
    view: View,
    session: Session,
    shell: Grid,
    guest: Grid,
    /// Position in the output of the guest that is shown.
    position: u64,
    /// Steps of drawing to come.
    steps: u32,
    /// A byte for the shell that was typed and not read yet.
    byte: Option<u8>,
}

static LOCAL: Lock<Option<Box<Local>>> = Lock::new(None);
/// What was typed for others than the shell.
static TYPED: Lock<VecDeque<Input>> = Lock::new(VecDeque::new());
/// The screen shows the shell or a console: nobody else draws on it.
static OWNS: AtomicBool = AtomicBool::new(false);

/// Whether the screen shows the shell or a console: nobody else draws on it.
pub fn owns() -> bool {
    OWNS.load(Ordering::Relaxed)
}

/// The oldest input that was typed here for others than the shell.
pub fn read() -> Option<Input> {
    let mut typed = TYPED.lock();
    let input = typed.pop_front()?;
    if typed.is_empty() {
        // What was typed behind it waits for that.
        doors::ring();
    }
    Some(input)
}

/// The screen as the shell's terminal.
struct ScreenTerminal<'a> {
    grid: &'a mut Grid,
    byte: &'a mut Option<u8>,
    changed: bool,
}

impl Terminal for ScreenTerminal<'_> {
    fn read(&mut self) -> Option<u8> {
        self.byte.take()
    }

    fn write(&mut self, bytes: &[u8]) -> usize {
        self.changed |= !bytes.is_empty();
        self.grid.write(bytes);
        bytes.len()
    }
}

/// Takes what was typed, and draws a step. Host TSC at which it has more to do; `u64::MAX`: nothing.
pub(super) fn serve(operate: &dyn Operate) -> u64 {
    let kept = LOCAL.lock().take();
    let mut local = match kept {
        Some(local) => local,
        None if keyboard::is_idle() => return u64::MAX,
        None => Box::new(Local::new()),
    };
    // What was typed for others comes to them before what stands behind it has an effect.
    while !others_wait()
        && let Some(code) = keyboard::pop()
    {
        for &byte in local.decoder.feed(code).as_bytes() {
            local.key(byte, operate);
        }
    }
    let next = local.show(operate);
    *LOCAL.lock() = Some(local);
    next
}

/// Whether something that was typed for others has not come to them.
fn others_wait() -> bool {
    !TYPED.lock().is_empty()
}

fn type_for_others(input: Input) {
    let mut typed = TYPED.lock();
    if typed.len() < INPUTS {
        typed.push_back(input);
    }
    drop(typed);
    console::look_at_input();
}

impl Local {
    fn new() -> Self {
        TYPED.lock().reserve_exact(INPUTS);
        Local {
            decoder: Decoder::default(),
            escaped: false,
            view: View::Host,
            session: Session::new(),
            shell: Grid::new(COLUMNS, ROWS),
            guest: Grid::new(COLUMNS, ROWS),
            position: 0,
            steps: 0,
            byte: None,
        }
    }

    fn switch(&mut self, view: View) {
        if view == self.view {
            return;
        }
        self.view = view;
        self.steps = STEPS;
        OWNS.store(view != View::Host, Ordering::Relaxed);
        match view {
            View::Host => screen::uncover(),
            View::Shell => self.session.show(),
            View::Console(_) => {
                self.guest.reset();
                self.position = 0;
            }
        }
    }

    /// One byte that was typed.
    fn key(&mut self, byte: u8, operate: &dyn Operate) {
        let escape = console::escape();
        let escaped = core::mem::take(&mut self.escaped);
        if escaped && byte != escape {
            return self.command(byte, operate);
        }
        if !escaped && byte == escape {
            self.escaped = true;
            return;
        }
        match self.view {
            View::Host if screen::is_covered() => {
                type_for_others(Input::Guest(console::focus(), byte));
            }
            View::Console(id) => type_for_others(Input::Guest(id, byte)),
            View::Host | View::Shell => {
                self.switch(View::Shell);
                self.byte = Some(byte);
                self.serve_shell(operate);
            }
        }
    }

    /// The key after the escape key.
    fn command(&mut self, byte: u8, operate: &dyn Operate) {
        let here = match self.view {
            View::Console(id) => id,
            View::Host | View::Shell => ConsoleId::SHELL,
        };
        match byte {
            b'0' | b's' => self.switch(View::Shell),
            b'1'..=b'9' => self.show_console(ConsoleId(usize::from(byte - b'0')), operate),
            b'n' | b'p' => {
                if let Some(id) = console::neighbour(here, byte == b'n') {
                    self.show_console(id, operate);
                }
            }
            b'g' => self.switch(View::Host),
            b'd' => {
                display::toggle();
                self.switch(View::Host);
            }
            b'q' => type_for_others(Input::PowerOff(Door::ScreenKey)),
            _ => self.say(HELP, operate),
        }
    }

    fn show_console(&mut self, id: ConsoleId, operate: &dyn Operate) {
        match console::copy(id, 0, &mut []) {
            Some(_) => self.switch(View::Console(id)),
            None => self.say(&format!("error: there is no console {}\n", id.0), operate),
        }
    }

    /// Says something in the shell.
    fn say(&mut self, text: &str, operate: &dyn Operate) {
        self.switch(View::Shell);
        self.session.shell.complain(text);
        self.serve_shell(operate);
    }

    fn serve_shell(&mut self, operate: &dyn Operate) {
        let mut terminal = ScreenTerminal {
            grid: &mut self.shell,
            byte: &mut self.byte,
            changed: false,
        };
        self.session.shell.tick(time::ns(), operate);
        let action = self.session.serve(&mut terminal, operate);
        if terminal.changed {
            self.steps = STEPS;
        }
        match action {
            None => {}
            Some(Action::Leave) => self.switch(View::Host),
            Some(Action::Console(name)) => match console::find(&name) {
                Some(id) => self.switch(View::Console(id)),
                None => self.say(&no_console(&name), operate),
            },
        }
    }

    /// Takes in what the guest that is shown has written since. `false`: its console is gone.
    fn follow(&mut self, id: ConsoleId) -> bool {
        let mut buffer = [0; 256];
        for _ in 0..BYTES_AT_ONCE / buffer.len() {
            match console::copy(id, self.position, &mut buffer) {
                None => return false,
                Some((0, _)) => break,
                Some((count, position)) => {
                    self.guest.write(&buffer[..count]);
                    self.position = position;
                    self.steps = STEPS;
                }
            }
        }
        true
    }

    /// Draws a step. Host TSC of the next one.
    fn show(&mut self, operate: &dyn Operate) -> u64 {
        let grid = match self.view {
            View::Host => return u64::MAX,
            View::Shell => {
                self.serve_shell(operate);
                &self.shell
            }
            View::Console(id) => {
                if !self.follow(id) {
                    self.switch(View::Shell);
                }
                &self.guest
            }
        };
        if self.steps > 0 {
            self.steps -= 1;
            screen::paint_text(grid.columns(), grid.cells().map(cell));
        }
        let after = |us| time::now_tsc().saturating_add(time::us_to_ticks(us));
        match self.view {
            _ if self.steps > 0 => after(STEP_US),
            View::Host => u64::MAX,
            View::Shell => self.session.wake_up_at(),
            View::Console(_) => after(LOOK_US),
        }
    }
}

/// A cell as the screen draws it.
fn cell(cell: grid::Cell) -> Cell {
    let (code, letter) = match cell.character {
        c if c.is_ascii() => (c as u8, c as u8),
        other => DRAWN
            .iter()
            .find(|(drawn, ..)| *drawn == other)
            .map_or((b'?', b'?'), |&(_, code, letter)| (code, letter)),
    };
    Cell {
        code,
        letter,
        foreground: COLORS[usize::from(cell.colors.foreground & 0xf)],
        background: COLORS[usize::from(cell.colors.background & 0xf)],
        cursor: cell.cursor,
    }
}

//! Guests' displays: looked at now and then, and shown on the host's screen and on the terminal.
//!
//! The screen shows the display of the VM whose console the terminal shows; the escape key and `d` bring
//! the host's own screen back, and the display again. A VM whose console is its display is shown on the terminal as text, too.
//!
//! Only the first processor comes here, from its loop between slices, at most every [`EVERY_US`], and draws
//! no more than a step of [`drivers::screen`] and a few rows for the terminal; on a machine where that takes long it
//! comes less often, so that at most one part in [`SHARE`] of its time goes there. What a guest draws, and how often, costs
//! nobody more than that. Where no VM has a display, nothing happens.

use alloc::{boxed::Box, vec::Vec};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use devices::vga::ascii;
use drivers::screen::Cell;
use manage::{
    console::ConsoleId,
    mirror::{Letter, Mirror, Screen},
};
use vmm::{
    display::{Picture, Text},
    vm::Vm,
};

use crate::{console, operator, screen, sync::Lock, time};

/// Between two steps of drawing on the screen, in microseconds.
const EVERY_US: u64 = 10_000;
/// One step's time, and this many times as much until the next.
const SHARE: u64 = 20;
/// Between two looks at a screen of text for the terminal, in microseconds.
const TEXT_EVERY_US: u64 = 100_000;
/// What is shown of a VGA adapter's graphics.
const GRAPHICS: &[u8] = b"the guest shows graphics, and these are not shown here";
/// An attribute's background that makes a letter stand out: light grey.
const BRIGHT: u8 = 7;

/// Host TSC of the next step; never, if no VM has a display.
static NEXT: AtomicU64 = AtomicU64::new(u64::MAX);
/// Whether the screen is to show the guest's display, not the host's own.
static WANTED: AtomicBool = AtomicBool::new(true);
static SHOW: Lock<Option<Box<Show>>> = Lock::new(None);

/// What is needed to show a display.
struct Show {
    text: Text,
    letters: Vec<Letter>,
    mirror: Mirror,
    /// The console that the terminal showed alone the last time.
    alone: Option<ConsoleId>,
    /// Host TSC of the next look for the terminal.
    next_text: u64,
}

/// What is to be shown.
pub struct Target<'a> {
    /// The VM that has the focus, while it exists.
    pub vm: Option<&'a Vm>,
    /// Its console, if that is its display.
    pub console: Option<ConsoleId>,
}

/// A VM has a display: from now on it is looked at.
pub fn begin() {
    let mut show = SHOW.lock();
    if show.is_none() {
        *show = Some(Box::new(Show {
            text: Text::new(),
            letters: Vec::new(),
            mirror: Mirror::new(),
            alone: None,
            next_text: 0,
        }));
    }
    NEXT.store(0, Ordering::Relaxed);
}

/// Whether a step is due at this host TSC, which is now.
pub fn is_due(now: u64) -> bool {
    NEXT.load(Ordering::Relaxed) <= now
}

/// Host TSC at which the first processor, when it has nothing to do, has to come here.
pub fn wake_up_at() -> Option<u64> {
    Some(NEXT.load(Ordering::Relaxed)).filter(|&at| at != u64::MAX)
}

/// From the guest's display to the host's own screen, or back.
pub fn toggle() {
    WANTED.fetch_xor(true, Ordering::Relaxed);
}

/// Takes a step.
pub fn step(target: &Target<'_>) {
    let begun = time::now_tsc();
    if let Some(show) = SHOW.lock().as_mut() {
        show.step(target, begun);
    }
    let took = time::now_tsc().saturating_sub(begun);
    let pause = time::us_to_ticks(EVERY_US).max(took.saturating_mul(SHARE));
    NEXT.store(begun.saturating_add(pause), Ordering::Relaxed);
}

impl Show {
    fn step(&mut self, target: &Target<'_>, now: u64) {
        let alone = console::shown_alone();
        if core::mem::replace(&mut self.alone, alone) != alone {
            self.mirror.forget();
        }
        let picture = match target.vm {
            Some(vm) => vm.picture(&mut self.text),
            None => Picture::None,
        };
        // Else the screen shows the shell, or a console as text.
        if !operator::owns_screen() {
            if WANTED.load(Ordering::Relaxed) {
                self.paint(picture, target.vm);
            } else {
                screen::uncover();
            }
        }
        if let Some(console) = target.console.filter(|_| alone == target.console)
            && now >= self.next_text
        {
            self.next_text = now + time::us_to_ticks(TEXT_EVERY_US);
            self.send(picture, console);
        }
    }

    /// Draws a piece of the picture on the screen.
    fn paint(&self, picture: Picture, vm: Option<&Vm>) {
        match (picture, vm) {
            (Picture::Text, _) => {
                let text = &self.text;
                let cursor = text.cursor.map(|(row, column)| row * text.columns + column);
                let cells = text.cells().iter().enumerate();
                let cells = cells.map(|(n, &[code, attribute])| Cell {
                    code,
                    letter: ascii(code),
                    foreground: text.palette[usize::from(attribute & 0xf)],
                    background: text.palette[usize::from(attribute >> 4 & text.background_mask)],
                    cursor: cursor == Some(n),
                });
                screen::paint_text(text.columns, cells);
            }
            (Picture::Pixels(buffer), Some(vm)) => {
                screen::paint_pixels(buffer.width, buffer.height, |row, pixels| {
                    vm.read_pixels(&buffer, row, pixels)
                });
            }
            (Picture::Graphics, _) => {
                screen::paint_text(GRAPHICS.len(), GRAPHICS.iter().copied().map(message));
            }
            (Picture::Dark, _) => screen::paint_text(1, core::iter::once(message(b' '))),
            (Picture::None | Picture::Pixels(_), _) => screen::uncover(),
        }
    }

    /// Sends the picture's changes to the terminal.
    fn send(&mut self, picture: Picture, console: ConsoleId) {
        let plain = |&ascii: &u8| Letter {
            ascii,
            inverse: false,
        };
        self.letters.clear();
        let (columns, cursor) = match picture {
            Picture::Text => {
                let mask = self.text.background_mask;
                let letters = self.text.cells().iter().map(|&[code, attribute]| Letter {
                    ascii: ascii(code),
                    inverse: attribute >> 4 & mask & BRIGHT == BRIGHT,
                });
                self.letters.extend(letters);
                (self.text.columns, self.text.cursor)
            }
            Picture::Graphics => {
                self.letters.extend(GRAPHICS.iter().map(plain));
                (GRAPHICS.len(), None)
            }
            Picture::None | Picture::Dark | Picture::Pixels(_) => return,
        };
        let screen = Screen {
            columns,
            letters: &self.letters,
            cursor,
        };
        self.mirror
            .update(&screen, |bytes| console::guest_output(console, bytes));
    }
}

/// A letter of the host's own.
fn message(letter: u8) -> Cell {
    Cell {
        code: letter,
        letter,
        foreground: 0xaa_aaaa,
        background: 0,
        cursor: false,
    }
}

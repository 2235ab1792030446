//! Types what a guest of the catalogue needs to come up, where nobody sits at the terminal.

use crate::{
    emulator::{Cursor, Regex, Running},
    guests::Keys,
};

/// Waits for the guest's output, and answers.
pub struct Typist {
    /// What is still to be typed, the next one last.
    pending: Vec<(Regex, &'static str)>,
    seen: Cursor,
}

impl Typist {
    /// One that types these keys, in their order.
    pub fn new(keys: &[Keys]) -> Self {
        let regex = |text| Regex::new(text).expect("a test compiles the catalogue's patterns");
        Typist {
            pending: keys
                .iter()
                .rev()
                .map(|keys| (regex(keys.after), keys.text))
                .collect(),
            seen: Cursor::default(),
        }
    }

    /// Types the next keys if it is time. Returns whether all has been typed.
    pub fn is_done(&mut self, running: &Running) -> bool {
        let Some((after, text)) = self.pending.last() else {
            return true;
        };
        if running.search(after, &mut self.seen).is_some() {
            running.send(*text);
            self.pending.pop();
        }
        self.pending.is_empty()
    }
}

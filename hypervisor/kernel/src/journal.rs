//! The operator's actions in the log: each door's requests pass here, and what the escape key does by itself.
//!
//! The lines are for the log's ring and the screen, as other lines below warnings while VMs run: they stand in no guest's console
//! and in no answer of a shell. What they say, and how many there are, is decided by [`manage::journal`].

use alloc::{string::String, vec::Vec};

use manage::{
    command::{Answer, Failure, Operate, Request},
    journal::{Action, Door, Entry, Journal},
};

use crate::{info, sync::Lock, time};

static JOURNAL: Lock<Journal> = Lock::new(Journal::new());

/// Notes what came of a request that was made by this door, if it changes something.
pub fn note(door: Door, request: &Request, outcome: &Result<Answer, Failure>) {
    let Some(action) = Action::of(request) else {
        return;
    };
    let now_us = time::ns() / 1000;
    let admitted = JOURNAL.lock().admit(door, outcome.is_ok(), now_us);
    if let Some(left_out) = admitted {
        let entry = Entry {
            door,
            action,
            outcome,
            left_out,
        };
        info!("{entry}");
    }
}

/// The host, as a door has it: what is asked through it is noted.
pub struct Noted<'a> {
    /// Which door.
    pub door: Door,
    /// Who does what is asked.
    pub operate: &'a dyn Operate,
}

impl Operate for Noted<'_> {
    fn operate(&self, request: &Request) -> Result<Answer, Failure> {
        let outcome = self.operate.operate(request);
        note(self.door, request, &outcome);
        outcome
    }

    fn vm_names(&self) -> Vec<String> {
        self.operate.vm_names()
    }

    fn pool_names(&self) -> Vec<String> {
        self.operate.pool_names()
    }
}

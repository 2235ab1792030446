//! Fakes for the tests of this crate.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use spin::Mutex;

use crate::lapic::{Message, MessageSink};
use crate::line::InterruptSink;
use crate::system::{SystemControl, SystemRequest};
use crate::time::Clock;

/// A sink that records every change of level (repeated levels are dropped).
#[derive(Default)]
pub struct RecordingSink {
    log: Mutex<Vec<(u32, bool)>>,
    levels: Mutex<Vec<u32>>,
}

impl RecordingSink {
    /// What happened since the last call.
    pub fn take(&self) -> Vec<(u32, bool)> {
        core::mem::take(&mut self.log.lock())
    }

    /// Whether `input` is high now.
    pub fn is_high(&self, input: u32) -> bool {
        self.levels.lock().contains(&input)
    }
}

impl InterruptSink for RecordingSink {
    fn set_level(&self, input: u32, high: bool) {
        let mut levels = self.levels.lock();
        let was = levels.contains(&input);
        if was != high {
            levels.retain(|&i| i != input);
            if high {
                levels.push(input);
            }
            self.log.lock().push((input, high));
        }
    }
}

/// A clock that moves when told to.
pub struct FakeClock {
    now: AtomicU64,
    hz: u64,
}

impl FakeClock {
    /// A clock of `hz` at tick 0.
    pub fn new(hz: u64) -> Arc<Self> {
        Arc::new(FakeClock {
            now: AtomicU64::new(0),
            hz,
        })
    }

    /// Moves to tick `now`.
    pub fn set(&self, now: u64) {
        self.now.store(now, Ordering::Relaxed);
    }
}

impl Clock for FakeClock {
    fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    fn hz(&self) -> u64 {
        self.hz
    }
}

/// Records what the platform asks for.
#[derive(Default)]
pub struct Requests(Mutex<Vec<SystemRequest>>);

impl Requests {
    /// What was asked since the last call.
    pub fn take(&self) -> Vec<SystemRequest> {
        core::mem::take(&mut self.0.lock())
    }
}

impl SystemControl for Requests {
    fn request(&self, request: SystemRequest) {
        self.0.lock().push(request);
    }
}

/// Records interrupt messages.
#[derive(Default)]
pub struct Messages(Mutex<Vec<Message>>);

impl Messages {
    /// Vectors of the messages since the last call.
    pub fn vectors(&self) -> Vec<u8> {
        let messages = core::mem::take(&mut *self.0.lock());
        messages.iter().map(|m| m.vector).collect()
    }
}

impl MessageSink for Messages {
    fn deliver(&self, message: &Message) -> bool {
        self.0.lock().push(*message);
        true
    }
}

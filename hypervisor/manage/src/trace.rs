//! The trace: what each host processor did, as records of fixed size.
//!
//! A processor writes its own [`Ring`], and nobody else does; the oldest records make room for the
//! newest. [`perfetto`] turns what was read into a file that Perfetto and chrome://tracing show.
//!
//! A record is 16 bytes in a ring, and a short array of numbers on the wire (docs/CONTROL.md).

pub mod perfetto;
mod ring;

use bitfield_struct::bitfield;
use serde::{Deserialize, Serialize};

pub use ring::Ring;

/// What happened. The numbers are published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A guest is entered.
    Entry = 1,
    /// A guest has exited; the detail is the exit's number, and for port I/O the extra is the port.
    Exit = 2,
    /// An interrupt is injected; the detail is the vector, or [`INJECTED_NMI`].
    Inject = 3,
    /// A vCPU comes to run on this processor; the detail is [`OWN_TIMER`] if its own timer has readied it since it ran
    /// last, and the extra so many microseconds ago, 65,535 if it is more.
    SwitchIn = 4,
    /// It no longer does; the detail is a [`Why`].
    SwitchOut = 5,
    /// A vCPU is woken by this processor, other than by its own timer.
    Wake = 6,
    /// A device of the VM does work that it had put off.
    Device = 7,
    /// This processor's timer has expired.
    Timer = 8,
}

/// Detail of [`Kind::SwitchIn`] of one that its own timer has woken.
pub const OWN_TIMER: u16 = 1;

/// Detail of [`Kind::Inject`] for an NMI.
pub const INJECTED_NMI: u16 = 0x100;

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 8] = [
        Kind::Entry,
        Kind::Exit,
        Kind::Inject,
        Kind::SwitchIn,
        Kind::SwitchOut,
        Kind::Wake,
        Kind::Device,
        Kind::Timer,
    ];

    /// The kind of this number; `None`: a newer host's.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }
}

/// Why a vCPU left its processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Why {
    /// Its time is over, or the processor is needed for something else.
    SliceOver = 0,
    /// It has nothing to do.
    Idle = 1,
    /// Its VM has ended.
    Ended = 2,
    /// It gave up the rest of its time slice.
    Yielded = 3,
}

impl Why {
    /// In a word, for a number from a record; the words are published.
    pub fn name(number: u16) -> &'static str {
        match number {
            n if n == Why::SliceOver as u16 => "slice",
            n if n == Why::Idle as u16 => "idle",
            n if n == Why::Ended as u16 => "ended",
            n if n == Why::Yielded as u16 => "yield",
            _ => "other",
        }
    }
}

/// Something that happened on a host processor.
///
/// On the wire: `[ticks, kind, vm, vcpu, detail, extra]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Wire", into = "Wire")]
pub struct Record {
    /// When: host TSC in a ring, ticks since the record before on the wire.
    pub tsc: u64,
    /// [`Kind`], or the number of one that is not known here.
    pub kind: u8,
    /// Number of the VM; 0 where there is none.
    pub vm: u16,
    /// vCPU of that VM.
    pub vcpu: u8,
    /// By kind.
    pub detail: u16,
    /// By kind.
    pub extra: u16,
}

type Wire = (u64, u8, u16, u8, u16, u16);

impl From<Wire> for Record {
    fn from((tsc, kind, vm, vcpu, detail, extra): Wire) -> Self {
        Self {
            tsc,
            kind,
            vm,
            vcpu,
            detail,
            extra,
        }
    }
}

impl From<Record> for Wire {
    fn from(r: Record) -> Wire {
        (r.tsc, r.kind, r.vm, r.vcpu, r.detail, r.extra)
    }
}

impl Record {
    /// A record of something that concerns no VM.
    pub fn of_host(tsc: u64, kind: Kind) -> Self {
        Self::new(tsc, kind, (0, 0), 0)
    }

    /// A record about a vCPU: number of its VM, and its own.
    pub fn new(tsc: u64, kind: Kind, (vm, vcpu): (u16, u8), detail: u16) -> Self {
        Self {
            tsc,
            kind: kind as u8,
            vm,
            vcpu,
            detail,
            extra: 0,
        }
    }
}

/// All of a record but its time.
#[bitfield(u64)]
struct Packed {
    kind: u8,
    vcpu: u8,
    vm: u16,
    detail: u16,
    extra: u16,
}

impl Packed {
    fn of(r: &Record) -> Self {
        Packed::new()
            .with_kind(r.kind)
            .with_vcpu(r.vcpu)
            .with_vm(r.vm)
            .with_detail(r.detail)
            .with_extra(r.extra)
    }

    fn at(self, tsc: u64) -> Record {
        Record {
            tsc,
            kind: self.kind(),
            vm: self.vm(),
            vcpu: self.vcpu(),
            detail: self.detail(),
            extra: self.extra(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_record_has_the_published_form() {
        let record = Record {
            extra: 0x60,
            ..Record::new(1234, Kind::Exit, (1, 3), 2)
        };
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(text, "[1234,2,1,3,2,96]");
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
        assert!(serde_json::from_str::<Record>("[1,2,3]").is_err());
    }

    #[test]
    fn kinds_have_the_published_numbers() {
        for (kind, number) in Kind::ALL.into_iter().zip(1..) {
            assert_eq!(
                (kind as u8, Kind::from_number(number)),
                (number, Some(kind))
            );
        }
        assert_eq!(Kind::from_number(0), None);
        assert_eq!(Kind::from_number(9), None);
    }

    proptest! {
        #[test]
        fn packing_loses_nothing(wire: (u64, u8, u16, u8, u16, u16)) {
            let record = Record::from(wire);
            prop_assert_eq!(Packed::of(&record).at(record.tsc), record);
        }
    }
}

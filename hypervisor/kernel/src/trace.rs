//! The host's trace: a ring of records per processor, and who turns it on.
//!
//! Each processor writes its own ring. While no trace is recorded nothing is asked on the way of an exit: a
//! processor decides at the begin of a vCPU's slice which run loop it takes, with or without records of exits
//! ([`Host::TRACES`](vmm::host::Host::TRACES)). The rings take their memory when the first trace is started, and keep it.

use alloc::{string::String, vec::Vec};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use manage::{
    command::{
        Answer, Failure, FailureCode, MAX_TRACE_RECORDS, Request, TraceChunk, TraceDetails,
        TraceRing,
    },
    trace::{Kind, Record, Ring},
};
use spin::Once;
use virt::Exit;
use x86_64::instructions::interrupts::without_interrupts;

use crate::{memory, percpu, time};

/// Records of a processor: 128 KiB.
const RECORDS: usize = 8192;
const RECORD_BYTES: usize = 16;

static ON: AtomicBool = AtomicBool::new(false);
/// Exits and entries are recorded, too.
static EXITS: AtomicBool = AtomicBool::new(false);
/// Host TSC at the start.
static STARTED: AtomicU64 = AtomicU64::new(0);
/// By processor.
static RINGS: Once<Vec<Ring>> = Once::new();

/// Whether a trace is recorded.
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// Whether exits and entries belong to it.
pub fn has_exits() -> bool {
    EXITS.load(Ordering::Relaxed)
}

/// Notes what happened just now on the calling processor to this vCPU: its VM's number and its own. To be called only
/// while a trace is recorded ([`is_on`]).
pub fn record(kind: Kind, vcpu: (u16, u8), detail: u16, extra: u16) {
    // An interrupt handler records, too.
    without_interrupts(|| {
        let ring = RINGS
            .get()
            .and_then(|rings| rings.get(percpu::current().number));
        if let Some(ring) = ring {
            let record = Record::new(time::now_tsc(), kind, vcpu, detail);
            ring.push(&Record { extra, ..record });
        }
    });
}

/// Does what is asked about the trace. `vms` tells the VMs' numbers and names.
///
/// # Errors
/// It is refused.
pub fn operate(
    request: &Request,
    vms: impl FnOnce() -> Vec<(u16, String)>,
) -> Result<Answer, Failure> {
    let done = |text: &str| {
        let text = String::from(text);
        Ok(Answer::Done { text })
    };
    match request {
        Request::TraceStart { exits } => {
            start(exits.unwrap_or(true))?;
            done("trace: started")
        }
        Request::TraceStop {} => {
            ON.store(false, Ordering::Relaxed);
            done("trace: stopped")
        }
        Request::TraceShow {} => Ok(Answer::Trace { trace: show(vms()) }),
        Request::TraceRead { pcpu, from, count } => {
            let count = count.unwrap_or(MAX_TRACE_RECORDS).min(MAX_TRACE_RECORDS);
            let chunk = read(*pcpu, *from, count as usize)?;
            Ok(Answer::TraceRecords { chunk })
        }
        _ => {
            let text = "this is not about the trace";
            Err(Failure::new(FailureCode::Internal, text))
        }
    }
}

fn start(exits: bool) -> Result<(), Failure> {
    if RINGS.get().is_none() {
        let bytes = percpu::count() * RECORDS * RECORD_BYTES;
        let rings: Option<Vec<Ring>> = match memory::has_heap_for(bytes as u64) {
            true => (0..percpu::count()).map(|_| Ring::new(RECORDS)).collect(),
            false => None,
        };
        let Some(rings) = rings else {
            let text = "there is no memory for a trace";
            return Err(Failure::new(FailureCode::NoRoom, text));
        };
        RINGS.call_once(|| rings);
    }
    for ring in RINGS.get().into_iter().flatten() {
        ring.forget();
    }
    STARTED.store(time::now_tsc(), Ordering::Relaxed);
    EXITS.store(exits, Ordering::Relaxed);
    ON.store(true, Ordering::Relaxed);
    Ok(())
}

fn show(vms: Vec<(u16, String)>) -> TraceDetails {
    let rings = RINGS.get().map_or(&[][..], Vec::as_slice);
    let ring = |(pcpu, ring): (u32, &Ring)| {
        let (oldest, next) = ring.span();
        TraceRing { pcpu, oldest, next }
    };
    TraceDetails {
        on: is_on(),
        tsc_hz: time::hz(),
        started_tsc: STARTED.load(Ordering::Relaxed),
        capacity: rings.first().map_or(0, Ring::capacity),
        rings: (0..).zip(rings).map(ring).collect(),
        exits: Exit::NAMES.iter().copied().map(String::from).collect(),
        vms,
    }
}

fn read(pcpu: u32, from: u64, count: usize) -> Result<TraceChunk, Failure> {
    let ring = RINGS.get().and_then(|rings| rings.get(pcpu as usize));
    let Some(ring) = ring else {
        let text = match RINGS.get() {
            None => "no trace was started",
            Some(_) => "there is no such host processor",
        };
        return Err(Failure::new(FailureCode::NotFound, text));
    };
    let (first, mut records) = ring.read(from, count);
    let tsc = records.first().map_or(0, |record| record.tsc);
    let mut before = tsc;
    for record in &mut records {
        let now = record.tsc;
        record.tsc = now.wrapping_sub(before);
        before = now;
    }
    Ok(TraceChunk {
        pcpu,
        first,
        next: first + records.len() as u64,
        tsc,
        records,
    })
}

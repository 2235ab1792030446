//! `plinthctl trace`: reads the host's rings and writes a file for Perfetto.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use clap::ArgMatches;
use manage::{
    command::{Answer, Request, TraceChunk, TraceDetails},
    trace::{
        Record,
        perfetto::{self, Recorded},
    },
};

use crate::{Error, Exit, Terminal, client::Client, verbs::ask};

/// How long to leave the host alone when all that there is was read.
const PAUSE: Duration = Duration::from_millis(20);

/// What was read of one ring.
struct Ring {
    recorded: Recorded,
    /// Number of the next record to read.
    next: u64,
}

impl Ring {
    fn new(pcpu: u32) -> Self {
        let pieces = Vec::new();
        Ring {
            recorded: Recorded { pcpu, pieces },
            next: 0,
        }
    }

    /// Adds a piece. The times in it become the host's TSC.
    fn add(&mut self, chunk: TraceChunk) {
        let mut tsc = chunk.tsc;
        let records = chunk.records.into_iter().map(|record| {
            tsc = tsc.wrapping_add(record.tsc);
            Record { tsc, ..record }
        });
        let missing = chunk.first.saturating_sub(self.next);
        self.next = chunk.next;
        match self.recorded.pieces.last_mut() {
            Some((_, last)) if missing == 0 => last.extend(records),
            _ => self.recorded.pieces.push((missing, records.collect())),
        }
    }

    /// Reads a piece. Returns whether there was one.
    fn read(&mut self, client: &mut Client) -> Result<bool, Error> {
        let request = Request::TraceRead {
            pcpu: self.recorded.pcpu,
            from: self.next,
            count: None,
        };
        let Answer::TraceRecords { chunk } = ask(client, &request)? else {
            return Err(unexpected());
        };
        let some = !chunk.records.is_empty();
        if some {
            self.add(chunk);
        }
        Ok(some)
    }
}

fn unexpected() -> Error {
    Error::new(Exit::Protocol, "the host answers something else")
}

fn show(client: &mut Client) -> Result<TraceDetails, Error> {
    match ask(client, &Request::TraceShow {})? {
        Answer::Trace { trace } => Ok(trace),
        _ => Err(unexpected()),
    }
}

/// Records, unless what was recorded is wanted; reads; writes the file.
///
/// # Errors
/// No answer, a refusal, or the file cannot be written.
pub fn write(
    client: &mut Client,
    matches: &ArgMatches,
    terminal: &mut Terminal<'_>,
) -> Result<(), Error> {
    let output = matches
        .get_one::<String>("output")
        .map_or("-", String::as_str);
    let seconds = matches.get_one::<u32>("seconds").copied().unwrap_or(1);
    let recorded = matches.get_flag("recorded");
    if !recorded {
        let exits = matches.get_flag("no-exits").then_some(false);
        ask(client, &Request::TraceStart { exits })?;
    }
    let end = Instant::now() + Duration::from_secs(seconds.into());
    let begun = show(client)?;
    let mut rings: Vec<Ring> = begun.rings.iter().map(|r| Ring::new(r.pcpu)).collect();
    while !recorded && Instant::now() < end {
        let mut some = false;
        for ring in &mut rings {
            some |= ring.read(client)?;
        }
        if !some {
            thread::sleep(PAUSE.min(end.saturating_duration_since(Instant::now())));
        }
    }
    if !recorded {
        ask(client, &Request::TraceStop {})?;
    }
    // Of a trace that still grows, only what there is now.
    let details = show(client)?;
    for ring in &mut rings {
        let known = details.rings.iter().find(|r| r.pcpu == ring.recorded.pcpu);
        let last = known.map_or(0, |r| r.next);
        while ring.next < last && ring.read(client)? {}
    }
    let recorded: Vec<Recorded> = rings.into_iter().map(|ring| ring.recorded).collect();
    let count: usize = recorded
        .iter()
        .flat_map(|r| &r.pieces)
        .map(|p| p.1.len())
        .sum();
    let mut text = String::new();
    perfetto::write(&mut text, &details, &recorded)
        .map_err(|_| Error::new(Exit::File, "the trace could not be put into words"))?;
    if output == "-" {
        return terminal
            .out
            .write_all(text.as_bytes())
            .map_err(|e| Error::output(&e));
    }
    fs::write(output, text).map_err(|e| Error::new(Exit::File, format!("{output}: {e}")))?;
    writeln!(
        terminal.out,
        "{output}: {count} records of {} processors; open it at ui.perfetto.dev",
        recorded.len()
    )
    .map_err(|e| Error::output(&e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use manage::trace::Kind;

    #[test]
    fn pieces_are_joined_where_nothing_is_missing() {
        let chunk = |first: u64, tsc: u64, ticks: &[u64]| TraceChunk {
            pcpu: 0,
            first,
            next: first + ticks.len() as u64,
            tsc,
            records: ticks
                .iter()
                .map(|t| Record::of_host(*t, Kind::Timer))
                .collect(),
        };
        let mut ring = Ring::new(0);
        ring.add(chunk(2, 100, &[0, 5]));
        ring.add(chunk(4, 110, &[0]));
        ring.add(chunk(9, 200, &[0, 1]));
        let pieces: Vec<(u64, Vec<u64>)> = ring
            .recorded
            .pieces
            .iter()
            .map(|(missing, records)| (*missing, records.iter().map(|r| r.tsc).collect()))
            .collect();
        assert_eq!(pieces, [(2, vec![100, 105, 110]), (4, vec![200, 201])]);
        assert_eq!(ring.next, 11);
    }
}

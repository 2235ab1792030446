//! Linux' own x86 self-tests in a guest of Plinth and in one of the bare emulator: the same results.
//!
//! Some of them fail on QEMU's processors, so that a number says nothing; what they say there is the measure.

use std::{collections::BTreeMap, fmt::Write};

use anyhow::{Context, Result, ensure};
use regex::Regex;

use super::{
    rig::{Rig, Start},
    running::bring_up,
    session::Session,
    terminal::plain,
};
use crate::guests::{self, selftests::TESTS};

/// How each test ended: "ok", or "status 1".
type Results = BTreeMap<String, String>;

/// Runs them in both places, one after the other; the remark says how many were right.
///
/// # Errors
/// Plinth's guest did not run them all, or a test that is right on the bare emulator is not so under Plinth, or
/// fails in another way.
pub fn selftests(rig: &Rig, start: &Start) -> Result<String> {
    let guest = guests::by_name("linux-selftests")?;
    let limit = start.place.limits().boot + guest.patience(start.place.emulator());
    let results = |mut session: Session| -> Result<Results> {
        bring_up(&mut session, guest, limit)?;
        let all = results(&plain(&session.text()))?;
        ensure!(
            all.len() == TESTS.len(),
            "{} of {} tests said how they ended",
            all.len(),
            TESTS.len()
        );
        Ok(all)
    };
    let plinth = results(rig.boot_guest(start, guest, guest.vcpus)?).context("under Plinth")?;
    let bare = results(rig.boot_guest_bare(start, guest)?).context("on the bare emulator")?;
    let table = differences(&bare, &plinth);
    ensure!(table.is_empty(), "differences:\n{table}");
    let ok = plinth.values().filter(|result| *result == "ok").count();
    Ok(format!(
        "{ok} of {} ok, as on the bare emulator",
        plinth.len()
    ))
}

/// What the guest's script says of each test.
fn results(text: &str) -> Result<Results> {
    let line = Regex::new(r"(?m)^selftest (\S+): (ok|status \d+)\s*$")?;
    let each = line.captures_iter(text);
    Ok(each
        .map(|found| (found[1].to_owned(), found[2].to_owned()))
        .collect())
}

/// The tests that end otherwise under Plinth, as a table; a test that fails on the bare emulator only is none of
/// them.
fn differences(bare: &Results, plinth: &Results) -> String {
    let mut table = String::new();
    for (name, result) in plinth {
        let there = bare.get(name).map_or("nothing", String::as_str);
        if result != there && result != "ok" {
            writeln!(table, "{name:24} Plinth: {result:12} bare: {there}")
                .expect("a String takes any text");
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str =
        "selftest amx: status 1\n[FAIL]\tx\nselftest iopl: ok\r\nselftests: 1 of 2 ok\n";

    #[test]
    fn results_are_read_by_name() {
        let read = results(SAID).unwrap();
        assert_eq!(read.len(), 2);
        assert_eq!(
            (read["amx"].as_str(), read["iopl"].as_str()),
            ("status 1", "ok")
        );
    }

    #[test]
    fn only_what_is_worse_under_plinth_is_a_difference() {
        let bare = results(SAID).unwrap();
        assert_eq!(differences(&bare, &bare), "");
        let better = results("selftest amx: ok\nselftest iopl: ok\n").unwrap();
        assert_eq!(differences(&bare, &better), "");
        let worse = results("selftest amx: status 139\nselftest iopl: status 1\n").unwrap();
        let table = differences(&bare, &worse);
        assert_eq!(table.lines().count(), 2);
        assert!(
            table.contains("iopl") && table.contains("bare: ok"),
            "{table}"
        );
    }
}

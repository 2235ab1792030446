use super::*;
use alloc::{format, vec};
use proptest::prelude::*;

const LINUX: ConsoleId = ConsoleId(0);
const STUB: ConsoleId = ConsoleId(1);

fn mux() -> ConsoleMux {
    let mut mux = ConsoleMux::new(DEFAULT_ESCAPE);
    mux.attach("linux");
    mux.attach("stub");
    mux
}

/// All that goes out now.
fn shown(mux: &mut ConsoleMux, now_us: u64) -> String {
    let mut all = Vec::new();
    let mut buffer = [0; 16];
    loop {
        match mux.pull(&mut buffer, now_us) {
            0 => return String::from_utf8(all).unwrap(),
            count => all.extend_from_slice(&buffer[..count]),
        }
    }
}

fn typed(mux: &mut ConsoleMux, keys: &[u8]) -> (Vec<Input>, String) {
    let inputs = keys.iter().map(|&k| mux.input(k)).collect();
    (inputs, shown(mux, 0))
}

fn write(mux: &mut ConsoleMux, from: ConsoleId, text: &str) {
    assert_eq!(mux.output(from, text.as_bytes()), text.len());
}

#[test]
fn bytes_go_to_the_guest_in_focus() {
    let mut m = mux();
    let (inputs, _) = typed(&mut m, b"a\x1dnb");
    assert_eq!(inputs[0], Input::Guest(LINUX, b'a'));
    assert_eq!(inputs[3], Input::Guest(STUB, b'b'));
}

#[test]
fn missed_output_is_shown_on_a_line_of_its_own() {
    let mut m = mux();
    write(&mut m, LINUX, "~ # ");
    write(&mut m, STUB, "hello\r\n");
    assert_eq!(shown(&mut m, 0), "~ # ");
    let (_, text) = typed(&mut m, b"\x1d2");
    assert_eq!(text, "\r\n[plinth] console 2: stub\r\nhello\r\n");
    let (_, text) = typed(&mut m, b"\x1dp\x1dn");
    assert!(!text.contains("hello"), "shown once only: {text}");
}

#[test]
fn history_is_bounded_and_says_what_is_gone() {
    let mut m = mux();
    let flood = [b'x'; HISTORY_BYTES + 5];
    assert_eq!(m.output(STUB, &flood), flood.len(), "nobody waits for it");
    assert_eq!(m.pop_resumable(), None);
    let (_, text) = typed(&mut m, b"\x1dn");
    assert!(text.contains("(5 earlier bytes are gone)"), "{text}");
    assert_eq!(text.matches('x').count(), HISTORY_BYTES);
}

#[test]
fn escape_commands() {
    let mut m = mux();
    assert_eq!(typed(&mut m, b"\x1d\x1d").0[1], Input::Guest(LINUX, 0x1d));
    assert_eq!(typed(&mut m, b"\x1dq").0[1], Input::PowerOff);
    assert!(
        typed(&mut m, b"\x1d9")
            .1
            .contains("no console 9; there are 2")
    );
    assert!(typed(&mut m, b"\x1dl").1.contains("* 1  linux"));
    assert!(typed(&mut m, b"\x1d?").1.contains("power the host off"));
}

#[test]
fn another_escape_key_leaves_the_default_to_the_guest() {
    let mut m = ConsoleMux::new(0x01);
    m.attach("linux");
    m.attach("stub");
    assert_eq!(m.input(DEFAULT_ESCAPE), Input::Guest(LINUX, DEFAULT_ESCAPE));
    assert!(typed(&mut m, b"\x012").1.contains("console 2: stub"));
}

#[test]
fn a_guest_in_focus_is_held_up_and_told_when_to_go_on() {
    let mut m = mux();
    let flood = [b'x'; HISTORY_BYTES + 5];
    assert_eq!(m.output(LINUX, &flood), HISTORY_BYTES);
    assert_eq!(m.output(LINUX, b"y"), 0);
    assert_eq!(m.pop_resumable(), None, "there is no room yet");
    // The other one is not held up by that.
    write(&mut m, STUB, "hello");
    let mut buffer = [0; RESUME_BYTES];
    assert_eq!(m.pull(&mut buffer, 0), RESUME_BYTES);
    assert_eq!(m.pop_resumable(), Some(LINUX));
    assert_eq!(m.pop_resumable(), None, "told once");
    write(&mut m, LINUX, "y");
}

#[test]
fn a_guest_that_is_held_up_goes_on_when_it_is_not_shown_any_more() {
    let mut m = mux();
    let flood = [b'x'; HISTORY_BYTES + 5];
    assert!(m.output(LINUX, &flood) < flood.len());
    m.switch(STUB);
    assert_eq!(m.pop_resumable(), Some(LINUX));
    write(&mut m, LINUX, "y");
    // The switch is seen at once, however much the other had written.
    assert_eq!(shown(&mut m, 0), "[plinth] console 2: stub\r\n");
}

#[test]
fn host_lines_come_after_what_was_written_before_and_never_within_a_line() {
    let mut m = mux();
    write(&mut m, LINUX, "one\r\ntw");
    m.host_line(b"stub: powered off");
    write(&mut m, LINUX, "o\r\nthree");
    let text = shown(&mut m, 0);
    assert_eq!(text, "one\r\ntwo\r\n[plinth] stub: powered off\r\nthree");
}

#[test]
fn an_unfinished_line_holds_up_a_host_line_for_a_while_only() {
    let mut m = mux();
    write(&mut m, LINUX, "~ # ");
    m.host_line(b"first");
    m.host_line(b"second");
    assert_eq!(shown(&mut m, 1_000), "~ # ");
    assert_eq!(m.look_again_at(), Some(1_000 + PATIENCE_US));
    assert_eq!(shown(&mut m, 999 + PATIENCE_US), "");
    let late = shown(&mut m, 1_000 + PATIENCE_US);
    assert_eq!(late, "\r\n[plinth] first\r\n[plinth] second\r\n");
    assert_eq!(m.look_again_at(), None);
}

#[test]
fn what_the_guest_writes_meanwhile_starts_the_wait_anew() {
    let mut m = mux();
    write(&mut m, LINUX, "lo");
    m.host_line(b"line");
    assert_eq!(shown(&mut m, 0), "lo");
    write(&mut m, LINUX, "ng");
    assert_eq!(shown(&mut m, PATIENCE_US), "ng");
    write(&mut m, LINUX, "\n");
    assert_eq!(shown(&mut m, PATIENCE_US), "\n[plinth] line\r\n");
}

#[test]
fn an_endless_line_holds_up_a_host_line_for_a_while_only() {
    let mut m = mux();
    write(&mut m, LINUX, "begin ");
    m.host_line(b"at last");
    let endless = format!("{:>5000}", "x");
    write(&mut m, LINUX, &endless);
    let text = shown(&mut m, 0);
    let at = text.find("\r\n[plinth] at last\r\n").unwrap();
    assert!((LONGEST_LINE..2 * LONGEST_LINE).contains(&at), "{at}");
}

#[test]
fn a_machine_that_stops_waits_for_no_guest() {
    let mut m = mux();
    write(&mut m, LINUX, "~ # ");
    m.host_line(b"powering off");
    m.hurry();
    assert_eq!(shown(&mut m, 0), "~ # \r\n[plinth] powering off\r\n");
}

#[test]
fn answers_do_not_wait_and_keep_their_order() {
    let mut m = mux();
    write(&mut m, LINUX, &"x".repeat(HISTORY_BYTES));
    m.host_line(b"a");
    let (_, text) = typed(&mut m, b"\x1d2");
    assert_eq!(text, "[plinth] a\r\n[plinth] console 2: stub\r\n");
}

#[test]
fn host_lines_that_do_not_fit_are_counted() {
    let mut m = mux();
    for _ in 0..LINES + 3 {
        m.host_line(b"x");
    }
    assert_eq!(shown(&mut m, 0).lines().count(), LINES);
    m.host_line(b"y");
    assert_eq!(
        shown(&mut m, 0),
        "[plinth] 3 lines were left out here\r\n[plinth] y\r\n"
    );
}

#[derive(Clone, Debug)]
enum Step {
    Output(usize, Vec<u8>),
    HostLine(Vec<u8>),
    Key(u8),
    Pull(usize, u64),
    Resume,
}

fn step() -> impl Strategy<Value = Step> {
    let text = || prop::collection::vec(prop_oneof![Just(b'\n'), b'a'..=b'z'], 0..40);
    prop_oneof![
        (0usize..3, text()).prop_map(|(from, text)| Step::Output(from, text)),
        prop::collection::vec(b'A'..=b'Z', 1..9).prop_map(Step::HostLine),
        prop_oneof![Just(DEFAULT_ESCAPE), any::<u8>()].prop_map(Step::Key),
        (1usize..100, 0u64..300_000).prop_map(|(count, now)| Step::Pull(count, now)),
        Just(Step::Resume),
    ]
}

proptest! {
    /// Whatever comes: no panic, no memory beyond what was taken at first, and each line of the host's
    /// begins a line and is whole.
    #[test]
    fn host_lines_stay_whole_and_memory_bounded(steps in prop::collection::vec(step(), 0..200)) {
        let mut m = mux();
        let capacity = |m: &ConsoleMux| {
            let kept: usize = m.consoles.iter().map(|c| c.kept.capacity()).sum();
            (kept, m.lines.capacity(), m.text.capacity())
        };
        let before = capacity(&m);
        let mut out = Vec::new();
        for step in steps {
            match step {
                Step::Output(from, text) => {
                    let taken = m.output(ConsoleId(from), &text);
                    prop_assert!(taken == text.len() || from == m.focus().0);
                }
                Step::HostLine(text) => m.host_line(&text),
                Step::Key(key) => {
                    m.input(key);
                }
                Step::Pull(count, now) => {
                    let mut buffer = vec![0; count];
                    let count = m.pull(&mut buffer, now);
                    out.extend_from_slice(&buffer[..count]);
                }
                Step::Resume => {
                    m.pop_resumable();
                }
            }
        }
        out.extend(shown(&mut m, 1_000_000).bytes());
        out.extend(shown(&mut m, 2_000_000).bytes());
        prop_assert_eq!(capacity(&m), before);
        let text = String::from_utf8(out).unwrap();
        for (at, _) in text.match_indices("[plinth] ") {
            prop_assert!(at == 0 || text.as_bytes()[at - 1] == b'\n', "{}", text);
        }
        // Capitals are the host's, small letters a guest's or an answer's.
        for line in text.lines().filter(|line| !line.starts_with("[plinth] ")) {
            prop_assert!(!line.contains(|c: char| c.is_ascii_uppercase()), "{}", text);
        }
    }
}

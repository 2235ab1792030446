use super::*;
use alloc::{format, vec};
use proptest::prelude::*;

const LINUX: ConsoleId = ConsoleId(1);
const STUB: ConsoleId = ConsoleId(2);

fn mux() -> ConsoleMux {
    let mut mux = ConsoleMux::new(DEFAULT_ESCAPE);
    mux.attach(Prepared::new("linux"));
    mux.attach(Prepared::new("stub"));
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
    assert_eq!(
        typed(&mut m, b"\x1dq").0[1],
        Input::PowerOff(Door::SerialKey)
    );
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
    m.attach(Prepared::new("linux"));
    m.attach(Prepared::new("stub"));
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
    assert_eq!(m.look_again_at(), Some(1_000 + LINE_PATIENCE_US));
    assert_eq!(shown(&mut m, 999 + LINE_PATIENCE_US), "");
    let late = shown(&mut m, 1_000 + LINE_PATIENCE_US);
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
    assert_eq!(shown(&mut m, LINE_PATIENCE_US), "ng");
    write(&mut m, LINUX, "\n");
    assert_eq!(shown(&mut m, LINE_PATIENCE_US), "\n[plinth] line\r\n");
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

#[test]
fn the_shell_is_a_console_among_the_guests() {
    let mut m = mux();
    write(&mut m, LINUX, "~ # ");
    shown(&mut m, 0);
    let (inputs, text) = typed(&mut m, b"\x1d0x");
    assert_eq!(inputs[2], Input::Shell(b'x'));
    assert_eq!(text, "\r\n[plinth] console 0: shell\r\n");
    assert!(m.take_shell_disturbed() && !m.take_shell_disturbed());
    write(&mut m, ConsoleId::SHELL, "plinth> ");
    write(&mut m, LINUX, "later");
    m.host_line(b"stub: powered off");
    assert_eq!(shown(&mut m, 0), "plinth> ");
    assert_eq!(
        shown(&mut m, LINE_PATIENCE_US),
        "\r\n[plinth] stub: powered off\r\n"
    );
    assert!(m.take_shell_disturbed(), "its line is to be shown again");
    m.leave_shell();
    assert_eq!(shown(&mut m, 0), "[plinth] console 1: linux\r\nlater");
    assert_eq!(typed(&mut m, b"\x1dsy").0[2], Input::Shell(b'y'));
}

#[test]
fn whose_the_next_byte_is_is_known_before_it_is_read() {
    let mut m = mux();
    let keys = b"a\x1d0b\x1d\x1d\x1d1c\x1dad\x1dse\x1d";
    let mut told = Vec::new();
    for &key in keys {
        let for_shell = m.is_for_shell(key);
        assert_eq!(
            for_shell,
            matches!(m.input(key), Input::Shell(byte) if byte == key)
        );
        if for_shell {
            told.push(key);
        }
    }
    assert_eq!(told, b"b\x1de");
}

#[test]
fn the_next_console_is_a_guests() {
    let mut m = mux();
    for (key, wanted) in [
        (b'n', 2),
        (b'n', 1),
        (b'p', 2),
        (b'p', 1),
        (b's', 0),
        (b'p', 2),
        (b's', 0),
        (b'n', 1),
    ] {
        typed(&mut m, &[DEFAULT_ESCAPE, key]);
        assert_eq!(m.focus().0, wanted);
    }
    let mut none = ConsoleMux::new(DEFAULT_ESCAPE);
    assert!(
        typed(&mut none, b"\x1dn")
            .1
            .contains("no console 1; there are 0")
    );
}

#[test]
fn a_console_that_goes_leaves_its_number() {
    let mut m = mux();
    assert_eq!(m.find("stub"), Some(STUB));
    assert!(m.detach(LINUX).is_some() && m.detach(LINUX).is_none());
    let text = shown(&mut m, 0);
    assert_eq!(
        text,
        "[plinth] console 1: linux is gone\r\n[plinth] console 0: shell\r\n"
    );
    assert_eq!(m.output(LINUX, b"late"), 4, "nobody waits for it");
    m.leave_shell();
    assert_eq!(m.focus(), STUB);
    assert_eq!(m.attach(Prepared::new("new")), Some(LINUX));
    assert!(m.detach(ConsoleId::SHELL).is_none());
    for n in 2..MAX_VMS {
        assert_eq!(m.attach(Prepared::new("more")), Some(ConsoleId(n + 1)));
    }
    assert_eq!(m.attach(Prepared::new("too many")), None);
}

#[test]
fn what_a_guest_did_to_the_terminal_ends_with_the_switch() {
    let mut m = mux();
    write(&mut m, LINUX, "\x1b[31mred \x1b]0;open");
    shown(&mut m, 0);
    let (_, text) = typed(&mut m, b"\x1d2");
    let calm = String::from_utf8(CALM.to_vec()).unwrap();
    assert_eq!(text, format!("{calm}\r\n[plinth] console 2: stub\r\n"));
    let (_, text) = typed(&mut m, b"\x1d1");
    assert_eq!(text, "[plinth] console 1: linux\r\n", "once is enough");
}

#[test]
fn the_last_lines_can_be_shown_again() {
    let mut m = mux();
    write(&mut m, LINUX, "one\r\n~ # ");
    shown(&mut m, 0);
    let (_, text) = typed(&mut m, b"\x1dr");
    assert_eq!(text, "\r\n[plinth] once more: linux\r\none\r\n~ # ");
    write(&mut m, LINUX, &"0123456\r\n".repeat(400));
    shown(&mut m, 0);
    let (_, text) = typed(&mut m, b"\x1dr");
    let lines: Vec<_> = text.lines().skip(1).collect();
    assert!((200..=2048 / 9).contains(&lines.len()), "{}", lines.len());
    assert!(
        lines.iter().all(|line| *line == "0123456"),
        "from the beginning of a line"
    );
}

fn all() -> ConsoleMux {
    let mut m = mux();
    let (_, text) = typed(&mut m, b"\x1da");
    assert_eq!(
        text,
        "[plinth] all consoles; what is typed goes to linux\r\n"
    );
    m
}

#[test]
fn with_all_consoles_shown_lines_stay_whole_and_take_turns() {
    let mut m = all();
    write(&mut m, LINUX, "l1\r\nl2\r\nl3\r\nla");
    write(&mut m, STUB, "s1\r\n");
    m.host_line(b"from the host");
    write(&mut m, STUB, "s2\ns");
    let text = shown(&mut m, 0);
    assert_eq!(
        text,
        "[plinth] from the host\r\n[linux] l1\r\n[stub] s1\r\n[linux] l2\r\n[stub] s2\r\n[linux] l3\r\n"
    );
    write(&mut m, STUB, "tub\r\n");
    assert_eq!(shown(&mut m, 1), "[stub] stub\r\n");
    assert_eq!(typed(&mut m, b"x").0, [Input::Guest(LINUX, b'x')]);
}

#[test]
fn with_all_consoles_shown_unfinished_lines_come_after_a_pause() {
    let mut m = all();
    write(&mut m, LINUX, "~ # ");
    assert_eq!(shown(&mut m, 5), "");
    assert_eq!(m.look_again_at(), Some(5 + PATIENCE_US));
    assert_eq!(shown(&mut m, 5 + PATIENCE_US), "[linux] ~ # ");
    write(&mut m, LINUX, "ls");
    assert_eq!(
        shown(&mut m, 6 + PATIENCE_US),
        "ls",
        "the row is still its own"
    );
    write(&mut m, STUB, "hello\r\n");
    assert_eq!(shown(&mut m, 7 + PATIENCE_US), "\r\n[stub] hello\r\n");
    write(&mut m, LINUX, "\r\n");
    assert_eq!(shown(&mut m, 8 + PATIENCE_US), "[linux] \r\n");
}

#[test]
fn with_all_consoles_shown_a_flood_gets_no_more_than_its_turn() {
    let mut m = all();
    let flood = "f\r\n".repeat(HISTORY_BYTES / 3);
    assert!(m.output(LINUX, flood.as_bytes()) <= HISTORY_BYTES);
    assert_eq!(m.output(LINUX, b"more"), 1, "it is held up");
    write(&mut m, STUB, &"s\r\n".repeat(10));
    let text = shown(&mut m, 0);
    let rows: Vec<_> = text.lines().take(20).collect();
    assert_eq!(
        rows.iter().filter(|row| **row == "[stub] s").count(),
        10,
        "{rows:?}"
    );
    assert_eq!(m.pop_resumable(), Some(LINUX));
    // An endless line is cut, and the others go on.
    let endless = "x".repeat(HISTORY_BYTES);
    assert!(m.output(LINUX, endless.as_bytes()) > 0);
    write(&mut m, STUB, "s\r\n");
    let text = shown(&mut m, 0);
    let at = text.find("[stub] s").unwrap();
    assert!(at <= 2 * LONGEST_LINE, "{at}");
}

#[test]
fn with_all_consoles_shown_control_sequences_are_left_out() {
    let mut m = all();
    write(
        &mut m,
        LINUX,
        "\x1b[2J\x1b[Hgone\x1b]0;title\x07 \x1b[31mred\x1b[0m\r50 %\r\n",
    );
    assert_eq!(shown(&mut m, 0), "[linux] gone red\r\n[linux] 50 %\r\n");
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
    let text = || prop::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), b'a'..=b'z'], 0..40);
    prop_oneof![
        (0usize..3, text()).prop_map(|(from, text)| Step::Output(from, text)),
        prop::collection::vec(b'A'..=b'Z', 1..9).prop_map(Step::HostLine),
        prop_oneof![Just(DEFAULT_ESCAPE), any::<u8>(), Just(b'a')].prop_map(Step::Key),
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
            (m.piece.capacity(), m.lines.capacity(), m.text.capacity())
        };
        let before = capacity(&m);
        let mut out = Vec::new();
        for step in steps {
            match step {
                Step::Output(from, text) => {
                    let taken = m.output(ConsoleId(from), &text);
                    prop_assert!(taken == text.len() || m.is_shown(ConsoleId(from)));
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

proptest! {
    /// With all consoles shown, each line is one guest's or the host's, and what a guest wrote is there in its order.
    #[test]
    fn lines_of_several_guests_do_not_mix(steps in prop::collection::vec(step(), 0..100)) {
        let mut m = all();
        let mut out = Vec::new();
        let mut written = [const { Vec::new() }; 2];
        let mut now = 0;
        for step in steps {
            match step {
                Step::Output(from @ 1..=2, text) => {
                    let taken = m.output(ConsoleId(from), &text);
                    written[from - 1].extend_from_slice(&text[..taken]);
                }
                Step::HostLine(text) => m.host_line(&text),
                Step::Pull(count, later) => {
                    now += later;
                    let mut buffer = vec![0; count];
                    let count = m.pull(&mut buffer, now);
                    out.extend_from_slice(&buffer[..count]);
                }
                Step::Resume => {
                    m.pop_resumable();
                }
                Step::Output(..) | Step::Key(_) => {}
            }
        }
        for _ in 0..4 {
            now += LINE_PATIENCE_US;
            out.extend(shown(&mut m, now).bytes());
        }
        let text = String::from_utf8(out).unwrap();
        let mut found = [const { String::new() }; 2];
        for line in text.lines() {
            let (name, rest) = line.split_once("] ").unwrap_or_else(|| panic!("{line:?} in {text}"));
            match name {
                "[linux" => found[0] += rest,
                "[stub" => found[1] += rest,
                "[plinth" => prop_assert!(!rest.contains(|c: char| c.is_ascii_lowercase()) || rest.contains("left out")),
                other => panic!("{other:?} in {text}"),
            }
        }
        for (found, mut written) in found.into_iter().zip(written) {
            written.retain(|byte| byte.is_ascii_lowercase());
            prop_assert_eq!(found.as_bytes(), written, "{}", text);
        }
    }
}

#[test]
fn another_screen_reads_along_and_holds_nobody_up() {
    let mut m = mux();
    write(&mut m, STUB, "hello");
    let mut buffer = [0; 3];
    assert_eq!(m.copy(STUB, 0, &mut buffer), Some((3, 3)));
    assert_eq!(&buffer, b"hel");
    assert_eq!(m.copy(STUB, 3, &mut buffer), Some((2, 5)));
    assert_eq!(m.copy(STUB, 5, &mut buffer), Some((0, 5)));
    assert_eq!(m.copy(ConsoleId(7), 0, &mut buffer), None);
    write(&mut m, STUB, &"x".repeat(HISTORY_BYTES));
    assert_eq!(
        m.copy(STUB, 3, &mut buffer),
        Some((3, 8)),
        "what is gone is left out"
    );
    assert_eq!(m.name(STUB), Some("stub"));
}

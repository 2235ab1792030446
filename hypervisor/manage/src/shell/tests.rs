use super::*;
use crate::command::{Failure, FailureCode, Figures, HostStats, LogLine};
use proptest::prelude::*;
use std::cell::RefCell;

/// A host with two VMs that notes what it is asked.
#[derive(Default)]
struct Fake {
    asked: RefCell<Vec<Request>>,
}

impl Operate for Fake {
    fn operate(&self, request: &Request) -> Result<Answer, Failure> {
        self.asked.borrow_mut().push(request.clone());
        match request {
            Request::Stats { .. } => Ok(Answer::Stats {
                stats: HostStats {
                    at_ns: self.asked.borrow().len() as u64 * 1_000_000_000,
                    pcpus: Vec::new(),
                    vms: Vec::new(),
                    total: Figures::default(),
                    fairness_permille: 1000,
                },
            }),
            Request::Log { after, .. } => Ok(Answer::Log {
                lines: Vec::from([LogLine {
                    number: after.map_or(7, |after| after + 1),
                    at_ns: 0,
                    level: "info".into(),
                    text: format!("after {after:?}"),
                }]),
            }),
            Request::VmStart { .. } => {
                Err(Failure::new(FailureCode::WrongState, "web runs already"))
            }
            _ => Ok(Answer::Done {
                text: "done".into(),
            }),
        }
    }

    fn vm_names(&self) -> Vec<String> {
        ["web", "database"].map(String::from).into()
    }

    fn pool_names(&self) -> Vec<String> {
        ["default"].map(String::from).into()
    }
}

/// Types, and returns what the terminal shows and what the last byte made the door do.
fn typed(shell: &mut Shell, host: &Fake, text: &str) -> (String, Option<Action>) {
    let (mut shown, mut action) = (String::new(), None);
    for byte in text.bytes() {
        action = shell.input(byte, host);
        shown += &shell.take_output();
    }
    (shown, action)
}

#[test]
fn a_line_becomes_a_request_and_its_answer_text() {
    let (mut shell, host) = (Shell::new(), Fake::default());
    let (shown, action) = typed(&mut shell, &host, "vm pause web\r");
    assert_eq!(action, None);
    assert!(shown.contains("\r\ndone\r\n\rplinth> "), "{shown:?}");
    assert_eq!(
        *host.asked.borrow(),
        [Request::VmPause { vm: "web".into() }]
    );
    let (shown, _) = typed(&mut shell, &host, "vm start web\r");
    let wanted = "error: not in this state: web runs already\r\n";
    assert!(shown.contains(wanted), "{shown:?}");
}

#[test]
fn what_is_wrong_reaches_no_host() {
    let (mut shell, host) = (Shell::new(), Fake::default());
    for (line, wanted) in [
        ("vm puase web", "did you mean \"pause\"?"),
        (
            "vm pause wbe",
            "there is no VM \"wbe\": did you mean \"web\"?",
        ),
        ("vm pause somewhere", "vm list shows those that there are"),
        ("vm console wen", "there is no VM \"wen\""),
        ("stats wen", "there is no VM \"wen\""),
    ] {
        let (shown, action) = typed(&mut shell, &host, &format!("{line}\r"));
        assert!(shown.contains(wanted) && shown.contains("^^^"), "{shown:?}");
        assert_eq!(action, None);
    }
    assert!(host.asked.borrow().is_empty());
}

#[test]
fn the_door_is_told_to_go_elsewhere() {
    let (mut shell, host) = (Shell::new(), Fake::default());
    let (_, action) = typed(&mut shell, &host, "vm console web\r");
    assert_eq!(action, Some(Action::Console("web".into())));
    assert_eq!(typed(&mut shell, &host, "exit\r").1, Some(Action::Leave));
    assert_eq!(typed(&mut shell, &host, "\x04").1, Some(Action::Leave));
}

#[test]
fn tab_completes_and_then_lists() {
    let (mut shell, host) = (Shell::new(), Fake::default());
    typed(&mut shell, &host, "vm pa\tda\t\r");
    assert_eq!(
        *host.asked.borrow(),
        [Request::VmPause {
            vm: "database".into()
        }]
    );
    let (shown, _) = typed(&mut shell, &host, "vm re\t");
    assert!(shown.ends_with("vm res\x1b[K"), "{shown:?}");
    let (shown, _) = typed(&mut shell, &host, "\t");
    assert_eq!(shown, "\x07");
    let (shown, _) = typed(&mut shell, &host, "\t");
    assert!(shown.contains("\r\nreset   resume\r\n"), "{shown:?}");
    assert!(shown.ends_with("plinth> vm res\x1b[K"), "{shown:?}");
}

#[test]
fn the_live_view_goes_on_until_it_is_ended() {
    let (mut shell, host) = (Shell::new(), Fake::default());
    typed(&mut shell, &host, "top\r");
    assert_eq!(shell.wake_up_at(), Some(0));
    shell.tick(5, &host);
    let first = shell.take_output();
    assert!(first.contains("since the start"), "{first:?}");
    assert_eq!(shell.wake_up_at(), Some(5 + PERIOD_NS));
    shell.tick(6, &host);
    assert!(shell.take_output().is_empty(), "not yet");
    shell.tick(5 + PERIOD_NS, &host);
    assert!(shell.take_output().contains("sort cpu"));
    typed(&mut shell, &host, "w");
    shell.tick(6 + PERIOD_NS, &host);
    assert!(shell.take_output().contains("sort wait"));
    let (shown, _) = typed(&mut shell, &host, "q");
    assert!(shown.ends_with("plinth> \x1b[K"), "{shown:?}");
    assert_eq!(shell.wake_up_at(), None);
}

#[test]
fn help_is_there() {
    let (mut shell, host) = (Shell::new(), Fake::default());
    let (shown, _) = typed(&mut shell, &host, "help\r");
    assert!(shown.contains("inject nmi"), "{shown:?}");
    let (shown, _) = typed(&mut shell, &host, "help vm stop\r");
    assert!(shown.contains("vm stop VM [--timeout N]\r\n"), "{shown:?}");
}

proptest! {
    /// Whatever is typed: no panic, and each row that is shown begins where rows begin.
    #[test]
    fn any_bytes_do_no_harm(bytes in prop::collection::vec(
        prop_oneof![
            any::<u8>().prop_map(|b| Vec::from([b])),
            prop::sample::select(&["vm ", "top", "help ", "web", "\r", "\t", "\t\t", "--timeout ", "\x1b[A", "\x12", "q"])
                .prop_map(|word| word.as_bytes().to_vec()),
        ], 0..120))
    {
        let (mut shell, host) = (Shell::new(), Fake::default());
        shell.greet();
        let mut shown = shell.take_output();
        for (n, byte) in bytes.into_iter().flatten().enumerate() {
            shell.input(byte, &host);
            shell.tick(n as u64 * 1_000_000, &host);
            shown += &shell.take_output();
        }
        for (at, _) in shown.match_indices('\n') {
            prop_assert_eq!(shown.as_bytes()[at - 1], b'\r');
        }
    }
}

#[test]
fn the_log_is_followed_until_a_key_ends_it() {
    let (mut shell, host) = (Shell::new(), Fake::default());
    typed(&mut shell, &host, "log --follow --lines 1\r");
    let mut shown = String::new();
    for second in 1..=2 {
        assert!(shell.wake_up_at().is_some());
        shell.tick(second * follow::PERIOD_NS, &host);
        shown += &shell.take_output();
    }
    assert_eq!(
        shown,
        "[   0.000000] after None\r\n[   0.000000] after Some(7)\r\n"
    );
    // Not before its time; other keys change nothing.
    let (shown, _) = typed(&mut shell, &host, "xc");
    shell.tick(2 * follow::PERIOD_NS + 1, &host);
    assert_eq!(shown + &shell.take_output(), "");
    let (shown, _) = typed(&mut shell, &host, "q");
    assert!(shown.contains(PROMPT), "{shown:?}");
    assert_eq!(shell.wake_up_at(), None);
}

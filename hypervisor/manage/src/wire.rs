//! The control channel's lines: a request each way in, an answer each way out, as JSON.
//!
//! A program sends `{"id":1,"v":1,"verb":"vm-list"}` and a newline, and gets one line with the same `id` and
//! `ok` or `failure`; docs/CONTROL.md has every form. [`Channel`] is the host's end, without its hardware: bytes
//! go in as they come, a request is served when the owner has time for it, bytes go out as the line
//! takes them. [`Outgoing`] and [`Reply`] are the program's end.
//!
//! Invariants: what waits is bounded, whatever comes: one line of at most [`MAX_LINE`] bytes, one answer of at
//! most [`MAX_ANSWER`]. Input is taken only as far as it can be kept; what the owner cannot keep for the channel it
//! replaces by [`GAP`]. Damage of any kind ends with the next newline: a line that lost bytes is refused as a
//! whole, and the next one is read as if nothing had been.

mod channel;
#[cfg(test)]
mod manual;

use alloc::{boxed::Box, format, string::String};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::command::{Answer, Failure, FailureCode, Request, VERSION};

pub use channel::Channel;

/// Longest line that the host reads, in bytes without its newline.
pub const MAX_LINE: usize = 16 * 1024;
/// Longest line that the host sends, in bytes without its newline.
pub const MAX_ANSWER: usize = 1024 * 1024;
/// Stands for bytes that were lost on their way to [`Channel::receive`]. In UTF-8 there is no such byte, so that the line
/// in which it stands is refused.
pub const GAP: u8 = 0xff;
/// The verb that every version has: it asks for [`Hello`], and needs no `v`.
pub const HELLO: &str = "hello";

/// Deepest nesting of lists and objects in a line.
const MAX_DEPTH: usize = 16;
/// Longest word that a failure quotes as a verb, in bytes.
const LONGEST_VERB: usize = 32;
/// Longest message of a failure, in bytes: it may quote what was sent.
const MAX_MESSAGE: usize = 400;

/// Who is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The program's name: `plinth`.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Version of requests and answers that it speaks.
    pub v: u32,
    /// Longest line that it reads, in bytes.
    pub max_line: u32,
    /// Longest line that it sends, in bytes.
    pub max_answer: u32,
}

impl Hello {
    /// The words of a host of this version.
    pub fn new(version: &str) -> Self {
        Self {
            name: String::from("plinth"),
            version: String::from(version),
            v: VERSION,
            max_line: MAX_LINE as u32,
            max_answer: MAX_ANSWER as u32,
        }
    }
}

/// A line from the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The request's; absent where the line had none that could be read, and in the line with which the host
    /// announces itself.
    pub id: Option<u64>,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The request was done.
    Ok(Box<Answer>),
    /// It was refused.
    Failure(Failure),
    /// Who is there.
    Hello(Hello),
}

/// A request as a program sends it.
#[derive(Clone, Debug, Serialize)]
pub struct Outgoing<'a> {
    id: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    v: Option<u32>,
    #[serde(flatten)]
    what: What<'a>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
enum What<'a> {
    Request(&'a Request),
    Hello { verb: &'static str },
}

impl<'a> Outgoing<'a> {
    /// A request, to be answered with this number.
    pub fn request(id: u64, request: &'a Request) -> Self {
        Self {
            id,
            v: Some(VERSION),
            what: What::Request(request),
        }
    }

    /// The question who is there.
    pub fn hello(id: u64) -> Self {
        Self {
            id,
            v: None,
            what: What::Hello { verb: HELLO },
        }
    }

    /// The line, with its newline.
    ///
    /// # Errors
    /// It is longer than a host reads.
    pub fn line(&self) -> Result<String, Failure> {
        let mut text = serde_json::to_string(self).map_err(|e| internal(&e))?;
        if text.len() > MAX_LINE {
            let message = format!(
                "the request has {} bytes; a host reads up to {MAX_LINE}",
                text.len()
            );
            return Err(Failure::new(FailureCode::BadRequest, message));
        }
        text.push('\n');
        Ok(text)
    }
}

/// What a line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Asked {
    Hello,
    Request(Request),
}

/// Reads a line without its newline: the `id`, if there is a usable one, and what is asked.
fn parse(line: &[u8]) -> (Option<u64>, Result<Asked, Failure>) {
    let mut fields = match fields(line) {
        Ok(fields) => fields,
        Err(failure) => return (None, Err(failure)),
    };
    let id = match fields.remove("id") {
        Some(Value::Number(id)) if id.is_u64() => id.as_u64(),
        Some(_) => return (None, Err(bad("id: not a whole number from 0 to 2^64 - 1"))),
        None => return (None, Err(bad("id is missing: a number for the answer"))),
    };
    (id, asked(fields))
}

/// The object that a line is.
fn fields(line: &[u8]) -> Result<Map<String, Value>, Failure> {
    let text = core::str::from_utf8(line).map_err(|e| {
        bad(format!(
            "byte {} of the line is no UTF-8: it is damaged, or bytes of it were lost",
            e.valid_up_to()
        ))
    })?;
    if depth(text) > MAX_DEPTH {
        let text = format!("lists and objects lie deeper than {MAX_DEPTH} in each other");
        return Err(bad(text));
    }
    serde_json::from_str(text).map_err(|e| bad(format!("not a JSON object: {e}")))
}

fn asked(mut fields: Map<String, Value>) -> Result<Asked, Failure> {
    let version = fields.remove("v");
    if fields.get("verb").and_then(Value::as_str) == Some(HELLO) {
        return Ok(Asked::Hello);
    }
    match version {
        Some(v) if v.as_u64() == Some(VERSION.into()) => {}
        Some(v) => {
            let text = format!("v: {v} is not spoken here; this host speaks {VERSION}");
            return Err(failure(FailureCode::BadVersion, text));
        }
        None => {
            let text = format!("v is missing: this host speaks version {VERSION}");
            return Err(failure(FailureCode::BadVersion, text));
        }
    }
    let verb = match fields.get("verb") {
        Some(Value::String(verb)) if verb.len() <= LONGEST_VERB => format!("{verb}: "),
        _ => String::new(),
    };
    let request = serde_json::from_value(Value::Object(fields));
    request
        .map(Asked::Request)
        .map_err(|e| bad(format!("{verb}{e}")))
}

/// How deep brackets lie in each other. In what is no JSON this may be too much, never too little.
fn depth(text: &str) -> usize {
    let (mut depth, mut deepest) = (0usize, 0usize);
    let (mut in_string, mut escaped) = (false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

fn bad(text: impl Into<String>) -> Failure {
    failure(FailureCode::BadRequest, text)
}

fn internal(error: &dyn core::fmt::Display) -> Failure {
    failure(FailureCode::Internal, format!("{error}"))
}

/// A failure whose text is not longer than it may be.
fn failure(code: FailureCode, text: impl Into<String>) -> Failure {
    let mut text = text.into();
    if text.len() > MAX_MESSAGE {
        text.truncate(text.floor_char_boundary(MAX_MESSAGE));
        text.push_str(" ..");
    }
    Failure::new(code, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(line: &str) -> (Option<u64>, Option<FailureCode>) {
        let (id, asked) = parse(line.as_bytes());
        (id, asked.err().map(|failure| failure.code))
    }

    #[test]
    fn a_request_is_read_as_it_is_written() {
        let request = Request::VmStop {
            vm: "a".into(),
            timeout_s: Some(0),
        };
        let line = Outgoing::request(7, &request).line().unwrap();
        assert_eq!(
            line,
            "{\"id\":7,\"v\":1,\"verb\":\"vm-stop\",\"vm\":\"a\",\"timeout_s\":0}\n"
        );
        let (id, asked) = parse(line.trim_end().as_bytes());
        assert_eq!((id, asked), (Some(7), Ok(Asked::Request(request))));
        let line = Outgoing::hello(8).line().unwrap();
        assert_eq!(line, "{\"id\":8,\"verb\":\"hello\"}\n");
        assert_eq!(parse(line.as_bytes()), (Some(8), Ok(Asked::Hello)));
    }

    #[test]
    fn a_request_longer_than_a_host_reads_is_not_sent() {
        let request = Request::VmCreate {
            config: "x".repeat(MAX_LINE),
        };
        assert!(Outgoing::request(1, &request).line().is_err());
    }

    #[test]
    fn what_is_wrong_is_told_with_the_id_where_there_is_one() {
        use FailureCode::{BadRequest, BadVersion};
        for (line, id, wanted) in [
            ("", None, BadRequest),
            ("vm-list", None, BadRequest),
            ("[1,2]", None, BadRequest),
            ("{\"id\":1,\"v\":1,\"verb\":\"vm-list\"", None, BadRequest),
            (r#"{"v":1,"verb":"vm-list"}"#, None, BadRequest),
            (r#"{"id":-1,"v":1,"verb":"vm-list"}"#, None, BadRequest),
            (r#"{"id":"1","v":1,"verb":"vm-list"}"#, None, BadRequest),
            (r#"{"id":1.5,"v":1,"verb":"vm-list"}"#, None, BadRequest),
            (r#"{"id":1,"verb":"vm-list"}"#, Some(1), BadVersion),
            (r#"{"id":1,"v":2,"verb":"vm-list"}"#, Some(1), BadVersion),
            (r#"{"id":1,"v":"1","verb":"vm-list"}"#, Some(1), BadVersion),
            (r#"{"id":1,"v":1}"#, Some(1), BadRequest),
            (r#"{"id":1,"v":1,"verb":"vm-lst"}"#, Some(1), BadRequest),
            (r#"{"id":1,"v":1,"verb":"vm-show"}"#, Some(1), BadRequest),
            (
                r#"{"id":1,"v":1,"verb":"vm-show","vm":7}"#,
                Some(1),
                BadRequest,
            ),
            (
                r#"{"id":1,"v":1,"verb":"vm-list","x":1}"#,
                Some(1),
                BadRequest,
            ),
        ] {
            assert_eq!(code(line), (id, Some(wanted)), "{line}");
        }
    }

    #[test]
    fn deep_nesting_is_refused_before_it_is_read() {
        let deep = "[".repeat(MAX_LINE);
        assert_eq!(code(&deep), (None, Some(FailureCode::BadRequest)));
        assert_eq!(depth(r#"{"a":"[[[[\"[[","b":[{}]}"#), 3);
    }

    #[test]
    fn messages_stay_short_whatever_they_quote() {
        let verb = "\u{e9}".repeat(4000);
        let (_, asked) = parse(format!(r#"{{"id":1,"v":1,"verb":"{verb}"}}"#).as_bytes());
        let message = asked.unwrap_err().message;
        assert!(message.len() <= MAX_MESSAGE + 3 && message.ends_with(" .."));
    }

    #[test]
    fn replies_have_the_published_form() {
        for (text, reply) in [
            (
                r#"{"id":3,"ok":{"answer":"done","text":"a: starting"}}"#,
                Reply {
                    id: Some(3),
                    outcome: Outcome::Ok(Box::new(Answer::Done {
                        text: "a: starting".into(),
                    })),
                },
            ),
            (
                r#"{"id":null,"failure":{"code":"bad-request","message":"no"}}"#,
                Reply {
                    id: None,
                    outcome: Outcome::Failure(Failure::new(FailureCode::BadRequest, "no")),
                },
            ),
            (
                r#"{"id":0,"hello":{"name":"plinth","version":"0.1.0","v":1,"max_line":16384,"max_answer":1048576}}"#,
                Reply {
                    id: Some(0),
                    outcome: Outcome::Hello(Hello::new("0.1.0")),
                },
            ),
        ] {
            assert_eq!(serde_json::to_string(&reply).unwrap(), text);
            assert_eq!(serde_json::from_str::<Reply>(text).unwrap(), reply);
        }
    }
}

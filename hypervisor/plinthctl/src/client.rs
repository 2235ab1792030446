//! A conversation with a host: requests out, answers back.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use manage::{
    command::{Answer, Failure, FailureCode, Request, VERSION},
    wire::{Hello, MAX_ANSWER, Outcome, Outgoing, Reply},
};

use crate::{Error, Exit, address::Address, link::Link};

/// How long to wait for the answer to a hello before it is said again: a serial line may damage the first.
const HELLO_AGAIN: Duration = Duration::from_secs(2);

/// How long a request may go unanswered before its line is ended again: the newline may have been lost.
const END_AGAIN: Duration = Duration::from_secs(2);

/// How often a request is made again that came damaged: a busy host whose port holds 16 bytes may lose some of a long line many
/// times in a row.
const MOST_AGAIN: u32 = 100;

/// A host that has said who it is.
pub struct Client {
    link: Link,
    /// What has come and is no whole line yet.
    buffer: Vec<u8>,
    next_id: u64,
    timeout: Duration,
    /// Requests that were made again.
    again: u64,
}

impl Client {
    /// Connects, ends what another program may have left half said, and asks who is there.
    ///
    /// # Errors
    /// There is no connection; nobody answers in time; whoever does is no Plinth of this version.
    pub fn connect(address: &Address, timeout: Duration) -> Result<(Self, Hello), Error> {
        let mut client = Client {
            link: Link::open(address, timeout)?,
            buffer: Vec::new(),
            next_id: first_id(),
            timeout,
            again: 0,
        };
        let hello = client.hello()?;
        if hello.name != "plinth" || hello.v != VERSION {
            let text = format!(
                "{address}: this is {} {}, which speaks version {}; plinthctl {} speaks {VERSION}",
                hello.name,
                hello.version,
                hello.v,
                env!("CARGO_PKG_VERSION")
            );
            return Err(Error::new(Exit::Protocol, text));
        }
        Ok((client, hello))
    }

    fn hello(&mut self) -> Result<Hello, Error> {
        let deadline = Instant::now() + self.timeout;
        let first = self.next_id;
        loop {
            let line = Outgoing::hello(self.take_id()).line().map_err(refused)?;
            self.link.send(format!("\n{line}").as_bytes(), deadline)?;
            let again = deadline.min(Instant::now() + HELLO_AGAIN);
            loop {
                match self.reply(again) {
                    // What others asked, and what was left of their lines, comes first.
                    Ok(Reply {
                        id: Some(id),
                        outcome: Outcome::Hello(hello),
                    }) if (first..self.next_id).contains(&id) => return Ok(hello),
                    Ok(_) => {}
                    Err(error) if error.exit == Exit::Timeout && again < deadline => break,
                    Err(error) if error.exit == Exit::Timeout => {
                        let text = "nobody answers: is a Plinth with a control channel there, and \
                                    does nobody else use it?";
                        return Err(Error::new(Exit::Timeout, text));
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }

    /// Asks the host for something. The outer error: there was no answer; the inner one: it refused.
    ///
    /// A line that loses bytes on its way is refused without a number, and nothing of it is done: then it is said again.
    ///
    /// # Errors
    /// The connection ended, or the time passed.
    pub fn ask(&mut self, request: &Request) -> Result<Result<Answer, Failure>, Error> {
        let deadline = Instant::now() + self.timeout;
        let mut damaged = 0;
        loop {
            let id = self.take_id();
            let line = match Outgoing::request(id, request).line() {
                Ok(line) => line,
                Err(failure) => return Ok(Err(failure)),
            };
            self.link.send(line.as_bytes(), deadline)?;
            let reply = self.reply_to(id, deadline)?;
            return match reply.outcome {
                Outcome::Ok(answer) => Ok(Ok(*answer)),
                Outcome::Failure(failure)
                    if reply.id.is_none()
                        && failure.code == FailureCode::BadRequest
                        && damaged < MOST_AGAIN =>
                {
                    damaged += 1;
                    self.again += 1;
                    continue;
                }
                Outcome::Failure(failure) => Ok(Err(failure)),
                Outcome::Hello(_) if reply.id.is_none() => {
                    let text = "the host was started anew";
                    Err(Error::new(Exit::NoConnection, text))
                }
                Outcome::Hello(_) => {
                    let text = "the host answers a request with a hello";
                    Err(Error::new(Exit::Protocol, text))
                }
            };
        }
    }

    /// How often a request was made again, since its line had come damaged.
    pub fn made_again(&self) -> u64 {
        self.again
    }

    /// What comes back for request `id`. Nothing else is under way: what has no number is about it.
    fn reply_to(&mut self, id: u64, deadline: Instant) -> Result<Reply, Error> {
        loop {
            let again = deadline.min(Instant::now() + END_AGAIN);
            match self.reply(again) {
                Ok(reply) if reply.id.is_some_and(|other| other != id) => {}
                // A blank line means nothing, should the host only be slow.
                Err(error) if error.exit == Exit::Timeout && again < deadline => {
                    self.link.send(b"\n", deadline)?;
                }
                result => return result,
            }
        }
    }

    fn take_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// The next line that is a reply; others are what is left of lines that were cut.
    fn reply(&mut self, deadline: Instant) -> Result<Reply, Error> {
        let mut searched = 0;
        loop {
            let newline = self.buffer[searched..].iter().position(|&b| b == b'\n');
            if let Some(at) = newline {
                let line: Vec<u8> = self.buffer.drain(..=searched + at).collect();
                searched = 0;
                if let Ok(reply) = serde_json::from_slice(&line) {
                    return Ok(reply);
                }
                continue;
            }
            searched = self.buffer.len();
            if searched > MAX_ANSWER + 1 {
                let text = "what comes has no lines: this is no control channel";
                return Err(Error::new(Exit::Protocol, text));
            }
            self.link.receive(&mut self.buffer, deadline)?;
        }
    }
}

/// A number that no earlier program on this line has used for a request just now. JSON readers know numbers up
/// to 2^53.
fn first_id() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let us = now.map_or(0, |now| now.as_micros() as u64);
    (us % (1 << 42)) << 10
}

/// A refusal as an error.
pub fn refused(failure: Failure) -> Error {
    Error::new(Exit::Refused, manage::table::failure(&failure))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{BufRead, BufReader, Write},
        os::unix::net::{UnixListener, UnixStream},
        path::PathBuf,
        thread,
    };

    /// A host of which `answer` says what comes back for a line.
    fn host(name: &str, mut answer: impl FnMut(&str, &mut UnixStream) + Send + 'static) -> Address {
        let file = format!("plinthctl-{}-{name}", std::process::id());
        let path: PathBuf = std::env::temp_dir().join(file);
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let address = Address::Unix(path.clone());
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = std::fs::remove_file(path);
            let reader = BufReader::new(stream.try_clone().unwrap());
            for line in reader.lines().map_while(Result::ok) {
                if !line.is_empty() {
                    answer(&line, &mut stream);
                }
            }
        });
        address
    }

    fn id_of(line: &str) -> u64 {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        value["id"].as_u64().unwrap()
    }

    fn send(stream: &mut UnixStream, id: Option<u64>, outcome: Outcome) {
        let text = serde_json::to_string(&Reply { id, outcome }).unwrap();
        writeln!(stream, "{text}").unwrap();
    }

    const SOON: Duration = Duration::from_secs(30);

    #[test]
    fn what_others_left_is_passed_over() {
        let address = host("left", |line, stream| {
            if line.contains("hello") {
                stream
                    .write_all(b"half an ans\n\xff\xfe\n\n{\"id\":3}\n")
                    .unwrap();
                let failure = Failure::new(FailureCode::BadRequest, "half a line");
                send(stream, None, Outcome::Failure(failure));
                send(stream, Some(1), Outcome::Hello(Hello::new("other")));
                send(stream, Some(id_of(line)), Outcome::Hello(Hello::new("9")));
            } else {
                let done = |text: &str| Outcome::Ok(Box::new(Answer::Done { text: text.into() }));
                send(stream, Some(7), done("another's"));
                send(stream, Some(id_of(line)), done("ours"));
            }
        });
        let (mut client, hello) = Client::connect(&address, SOON).unwrap();
        assert_eq!(hello.version, "9");
        let answer = client.ask(&Request::VmList {}).unwrap().unwrap();
        assert_eq!(
            answer,
            Answer::Done {
                text: "ours".into()
            }
        );
    }

    #[test]
    fn a_damaged_request_is_a_refusal() {
        let address = host("damaged", |line, stream| {
            if line.contains("hello") {
                send(stream, Some(id_of(line)), Outcome::Hello(Hello::new("9")));
            } else {
                let failure = Failure::new(FailureCode::BadRequest, "bytes were lost");
                send(stream, None, Outcome::Failure(failure));
            }
        });
        let (mut client, _) = Client::connect(&address, SOON).unwrap();
        let failure = client.ask(&Request::VmList {}).unwrap().unwrap_err();
        assert_eq!(failure.code, FailureCode::BadRequest);
    }

    #[test]
    fn a_request_that_came_damaged_is_made_again() {
        let mut requests = 0;
        let address = host("again", move |line, stream| {
            if line.contains("hello") {
                send(stream, Some(id_of(line)), Outcome::Hello(Hello::new("9")));
                return;
            }
            requests += 1;
            let done = Answer::Done {
                text: requests.to_string(),
            };
            let failure = Failure::new(FailureCode::BadRequest, "bytes were lost");
            match requests {
                1 | 2 => send(stream, None, Outcome::Failure(failure)),
                _ => send(stream, Some(id_of(line)), Outcome::Ok(Box::new(done))),
            }
        });
        let (mut client, _) = Client::connect(&address, SOON).unwrap();
        let answer = client.ask(&Request::VmList {}).unwrap().unwrap();
        assert_eq!(answer, Answer::Done { text: "3".into() });
        assert_eq!(client.made_again(), 2);
    }

    #[test]
    fn each_kind_of_silence_has_its_status() {
        let connect = |address: &Address, ms| {
            let result = Client::connect(address, Duration::from_millis(ms));
            result.map(|_| ()).unwrap_err().exit
        };
        let mute = host("mute", |_, _| {});
        assert_eq!(connect(&mute, 50), Exit::Timeout);
        let gone = host("gone", |_, stream| {
            stream.shutdown(std::net::Shutdown::Both).unwrap();
        });
        assert_eq!(connect(&gone, 30_000), Exit::NoConnection);
        let nobody = Address::Unix("no/such/socket".into());
        assert_eq!(connect(&nobody, 50), Exit::NoConnection);
        let newer = host("newer", |line, stream| {
            let hello = Hello {
                v: VERSION + 1,
                ..Hello::new("9")
            };
            send(stream, Some(id_of(line)), Outcome::Hello(hello));
        });
        assert_eq!(connect(&newer, 30_000), Exit::Protocol);
    }
}

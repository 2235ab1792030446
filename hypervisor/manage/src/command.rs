//! What an operator can ask of the host, and what it answers.
//!
//! One command set behind every door: the shell on the host's console, and the control channel. A door
//! turns what it gets into a [`Request`], hands it to whoever implements [`Operate`], and shows the
//! [`Answer`] or [`Failure`] in its own form. The types are the wire's, too (JSON, docs/CONTROL.md): a name
//! that is published here keeps its meaning; what changes that raises [`VERSION`].
//!
//! Times are in nanoseconds, sizes in bytes, shares in thousandths, unless a name says otherwise.
//!
//! Invariant: a request is short work. What takes long (a start zeroes memory, a stop waits for the
//! guest) is begun, and the VM's [`VmState`] tells how far it is.

use alloc::{string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use crate::trace::Record;

/// Version of the requests and answers.
pub const VERSION: u32 = 1;

/// How long [`Request::VmStop`] waits for the guest before it is forced, unless it says: seconds.
pub const DEFAULT_STOP_TIMEOUT_S: u32 = 30;
/// Longest time to wait for a guest that is to stop, in seconds.
pub const MAX_STOP_TIMEOUT_S: u32 = 3600;

/// Most records of a trace in one answer.
pub const MAX_TRACE_RECORDS: u32 = 512;

/// Something to do or to tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// All VMs: [`Answer::Vms`].
    VmList {},
    /// One VM: [`Answer::Vm`].
    VmShow {
        /// Its name.
        vm: String,
    },
    /// Adds a VM, which is then off: [`Answer::Done`].
    VmCreate {
        /// One `[[vm]]` section of TOML. The files that it names are ones that the image carries.
        config: String,
    },
    /// Starts a VM that is off: [`Answer::Done`].
    VmStart {
        /// Its name.
        vm: String,
    },
    /// Presses the VM's power button; forces the VM off after the timeout: [`Answer::Done`].
    VmStop {
        /// Its name.
        vm: String,
        /// Seconds; [`DEFAULT_STOP_TIMEOUT_S`] if absent, at most [`MAX_STOP_TIMEOUT_S`]; 0: off at once.
        #[serde(default)]
        timeout_s: Option<u32>,
    },
    /// Keeps the VM's vCPUs from running: [`Answer::Done`].
    VmPause {
        /// Its name.
        vm: String,
    },
    /// Lets a paused VM run again: [`Answer::Done`].
    VmResume {
        /// Its name.
        vm: String,
    },
    /// Resets the VM's machine, as its reset button would: [`Answer::Done`].
    VmReset {
        /// Its name.
        vm: String,
    },
    /// Removes a VM and all that it has, its changes to disks as well. It has to be off, unless `force`:
    /// [`Answer::Done`].
    VmDestroy {
        /// Its name.
        vm: String,
        /// Forces it off first.
        #[serde(default)]
        force: bool,
    },
    /// Sends a vCPU a non-maskable interrupt: [`Answer::Done`].
    InjectNmi {
        /// The VM's name.
        vm: String,
        /// Which vCPU; 0 if absent.
        #[serde(default)]
        vcpu: Option<u16>,
    },
    /// The machine: [`Answer::Host`].
    HostShow {},
    /// Powers the machine off; VMs that run are not asked: [`Answer::Done`], and then no more.
    HostPowerOff {},
    /// The scheduler's pools and parameters: [`Answer::Sched`].
    SchedShow {},
    /// Changes a VM's scheduling; what is absent stays as it is: [`Answer::Done`].
    SchedSet {
        /// The VM's name.
        vm: String,
        /// What to change.
        change: SchedChange,
    },
    /// Changes a CPU pool; what is absent stays as it is: [`Answer::Done`].
    PoolSet {
        /// The pool's name.
        pool: String,
        /// Name of its policy.
        #[serde(default)]
        policy: Option<String>,
        /// Length of its time slices in microseconds, in [`SLICES_US`](crate::config::SLICES_US).
        #[serde(default)]
        slice_us: Option<u64>,
    },
    /// Figures of the host and its VMs since their start: [`Answer::Stats`].
    Stats {
        /// The name of the VM of which alone they are wanted.
        // Left out where there is none: hosts of this version began without it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vm: Option<String>,
    },
    /// The newest lines of the host's log: [`Answer::Log`].
    Log {
        /// Only lines after the one with this number.
        #[serde(default)]
        after: Option<u64>,
        /// At most so many; the newest.
        #[serde(default)]
        lines: Option<u32>,
    },
    /// Records from now on what the processors do, and forgets what was recorded before: [`Answer::Done`].
    TraceStart {
        /// Exits and entries of guests, too: by far the most records. True if absent.
        #[serde(default)]
        exits: Option<bool>,
    },
    /// Records no more; what was recorded can be read: [`Answer::Done`].
    TraceStop {},
    /// What there is of a trace, and the names that its records stand for: [`Answer::Trace`].
    TraceShow {},
    /// Records of one host processor: [`Answer::TraceRecords`].
    TraceRead {
        /// Which.
        pcpu: u32,
        /// Number of the first record that is wanted. If it is overwritten, the answer begins later.
        from: u64,
        /// At most so many; [`MAX_TRACE_RECORDS`] if absent, and at most.
        #[serde(default)]
        count: Option<u32>,
    },
}

/// New scheduling parameters of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(
    missing_docs,
    reason = "as in the configuration: docs/CONFIGURATION.md"
)]
pub struct SchedChange {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// Percent of one processor; 0: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cap: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u8>,
    /// Host processors on which its vCPUs may run; empty: all of its pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Vec<u32>>,
    /// Name of its CPU pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Budget and period that are kept for each vCPU, in microseconds; a budget of 0: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation_us: Option<(u64, u64)>,
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// It is done, or begun.
    Done {
        /// What happened, one line for people.
        text: String,
    },
    /// VMs, in the order in which they were configured.
    Vms {
        /// One each.
        vms: Vec<VmSummary>,
    },
    /// A VM.
    Vm {
        /// All about it.
        vm: VmDetails,
    },
    /// The machine.
    Host {
        /// All about it.
        host: HostDetails,
    },
    /// The scheduler.
    Sched {
        /// All about it.
        sched: SchedDetails,
    },
    /// Figures.
    Stats {
        /// All of them.
        stats: HostStats,
    },
    /// Log lines, oldest first.
    Log {
        /// One each.
        lines: Vec<LogLine>,
    },
    /// The trace.
    Trace {
        /// All about it.
        trace: TraceDetails,
    },
    /// A piece of the trace.
    TraceRecords {
        /// The piece.
        chunk: TraceChunk,
    },
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureCode {
    /// It cannot be understood: malformed, unknown verb, a value out of range.
    BadRequest,
    /// The request is of a version that the host does not speak.
    BadVersion,
    /// There is no VM, vCPU or file of that name.
    NotFound,
    /// There is one of that name already.
    Exists,
    /// The VM's state does not allow it.
    WrongState,
    /// The host lacks memory, room for one more VM, or processor time for a reservation.
    NoRoom,
    /// The host does something else just now: try again.
    Busy,
    /// The host failed; the message says how.
    Internal,
}

/// A refused request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of failure, for programs.
    pub code: FailureCode,
    /// What, where and what to do, for people.
    pub message: String,
}

impl Failure {
    /// A failure with its text.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { code, message }
    }
}

/// Whoever does what is asked.
pub trait Operate {
    /// Does or begins it.
    ///
    /// # Errors
    /// It is refused; nothing has changed.
    fn operate(&self, request: &Request) -> Result<Answer, Failure>;

    /// The names of all VMs, for completion.
    fn vm_names(&self) -> Vec<String>;

    /// The names of all CPU pools, for completion.
    fn pool_names(&self) -> Vec<String>;
}

/// How a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// It does not run and has no memory.
    Off,
    /// It is being made.
    Starting,
    /// It runs.
    Running,
    /// It is made, and its vCPUs are kept from running.
    Paused,
    /// Its power button was pressed.
    Stopping,
    /// It has ended and is being taken down.
    Ending,
    /// It has ended and starts again after a pause.
    Waiting,
}

/// A line of the list of VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSummary {
    /// Name.
    pub name: String,
    /// How it is.
    pub state: VmState,
    /// vCPUs.
    pub vcpus: u16,
    /// RAM.
    pub memory_bytes: u64,
    /// Time since its last start; 0 when it is off.
    pub uptime_ns: u64,
    /// CPU time of all its vCPUs since its last start.
    pub run_ns: u64,
    /// Starts since the host's, the first included.
    pub starts: u64,
    /// How its last run ended; absent if it has not ended yet.
    #[serde(default)]
    pub last_end: Option<String>,
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDetails {
    /// What the list says.
    #[serde(flatten)]
    pub summary: VmSummary,
    /// What it boots: the file, as configured.
    pub boot: String,
    /// Kernel command line; empty where there is none.
    pub cmdline: String,
    /// `never`, `on-failure` or `always`.
    pub restart: String,
    /// Disks, as configured.
    pub disks: Vec<String>,
    /// Scheduling parameters.
    pub sched: SchedParameters,
    /// One for each vCPU; empty when it is off.
    pub vcpu: Vec<VcpuStats>,
}

/// Scheduling parameters of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SchedParameters {
    /// Name of its CPU pool.
    pub pool: String,
    /// Weight.
    pub weight: u32,
    /// Percent of one processor for all its vCPUs together; 0: none.
    pub cap: u32,
    /// Priority; higher is more urgent.
    pub priority: u8,
    /// Host processors on which it may run; empty: all of its pool.
    pub affinity: Vec<u32>,
    /// Budget and period of its reservation per vCPU, in microseconds.
    pub reservation_us: Option<(u64, u64)>,
}

/// Figures of a vCPU since its VM's start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStats {
    /// Its number.
    pub vcpu: u16,
    /// Host processor on which it runs, or ran last.
    pub pcpu: u32,
    /// `running`, `waiting`, `blocked`, `paused` or `off`.
    pub state: String,
    /// Time on a processor.
    pub run_ns: u64,
    /// Time ready, waiting for a processor.
    pub wait_ns: u64,
    /// Of that, while its budget (a cap, a reservation) was used up.
    #[serde(default)]
    pub throttled_ns: u64,
    /// Mean time ready before each turn on a processor, without what it was throttled.
    #[serde(default)]
    pub average_wait_ns: u64,
    /// Wake-ups from which it came to run.
    pub wakeups: u64,
    /// Mean time from wake-up to run.
    pub response_ns: u64,
    /// 99 % of wake-ups came to run within so long; the bound of a power-of-two class.
    pub response_p99_ns: u64,
    /// Times it had done all that it had to do, and blocked: its throughput.
    #[serde(default)]
    pub bursts: u64,
    /// Times a processor ran it after another vCPU had run there.
    pub switches: u64,
    /// Times it came to run on another processor than before.
    pub migrations: u64,
    /// What it asked devices for: what disks moved, and 512 for each request and each access to a device.
    #[serde(default)]
    pub io_bytes: u64,
    /// Wake-ups by the time from wake-up to run: each with the longest such time of its class and their number. In what `vm-show`
    /// answers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub latency_ns: Vec<(u64, u64)>,
    /// Exits by kind; kinds without any are left out.
    pub exits: Vec<(String, u64)>,
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostDetails {
    /// Plinth's version.
    pub version: String,
    /// [`VERSION`].
    pub protocol: u32,
    /// `VT-x` or `AMD-V`.
    pub backend: String,
    /// The processor's name.
    pub processor: String,
    /// Host processors in use.
    pub pcpus: u32,
    /// TSC frequency in Hz.
    pub tsc_hz: u64,
    /// Time since Plinth's start.
    pub uptime_ns: u64,
    /// Memory that Plinth manages.
    pub memory_bytes: u64,
    /// Of that, free.
    pub memory_free_bytes: u64,
    /// Plinth's own heap in use.
    pub heap_bytes: u64,
}

/// The scheduler.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SchedDetails {
    /// CPU pools.
    pub pools: Vec<PoolDetails>,
    /// Parameters by VM.
    pub vms: Vec<(String, SchedParameters)>,
}

/// A CPU pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolDetails {
    /// Name.
    pub name: String,
    /// Policy.
    pub policy: String,
    /// Host processors.
    pub pcpus: Vec<u32>,
    /// Time slice in microseconds.
    pub slice_us: u64,
    /// What each of its processors keeps for reservations, in the order of `pcpus`.
    #[serde(default)]
    pub reserved_permille: Vec<u32>,
    /// The most that a processor keeps; 0: the policy keeps none.
    #[serde(default)]
    pub reservable_permille: u32,
}

/// Figures of the host, or of one VM alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStats {
    /// Time since Plinth's start, when the figures were taken.
    pub at_ns: u64,
    /// Host processors; none if one VM was asked about.
    pub pcpus: Vec<PcpuStats>,
    /// VMs that are not off, or the one that was asked about, however it is.
    pub vms: Vec<VmStats>,
    /// All their vCPUs together.
    #[serde(default)]
    pub total: Figures,
    /// How evenly vCPUs without reservations got what they were entitled to by their weights and by what they wanted, since their VMs'
    /// starts, in thousandths: 1000 is even ([`sched::fairness`]).
    pub fairness_permille: u32,
}

/// Figures of a host processor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PcpuStats {
    /// Its number.
    pub pcpu: u32,
    /// Time in which it ran vCPUs.
    pub busy_ns: u64,
    /// Time in which it was halted or looked for work.
    pub idle_ns: u64,
    /// Times it ran another vCPU than the one before; each is one of that vCPU's `switches`.
    pub switches: u64,
    /// vCPUs that wait for it.
    pub queued: u32,
}

/// Figures of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStats {
    /// What the list says.
    #[serde(flatten)]
    pub summary: VmSummary,
    /// Weight of each of its vCPUs; 0: they go by their reservation.
    #[serde(default)]
    pub weight: u32,
    /// Its vCPUs together.
    #[serde(default)]
    pub total: Figures,
    /// One for each vCPU.
    pub vcpu: Vec<VcpuStats>,
}

impl VmStats {
    /// What each vCPU that goes by its weight got, and would have liked. What a used-up budget kept it from is nothing that it was entitled to.
    pub fn parts(&self) -> impl Iterator<Item = sched::Part> {
        let by_weight = self.vcpu.iter().filter(|_| self.weight > 0);
        by_weight.map(|vcpu| sched::Part {
            weight: self.weight,
            run: vcpu.run_ns,
            wait: vcpu.wait_ns.saturating_sub(vcpu.throttled_ns),
        })
    }
}

/// Figures of several vCPUs together: a VM's, or the host's. Each as in [`VcpuStats`]; means are over all turns, or wake-ups.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "as in `VcpuStats`")]
pub struct Figures {
    pub run_ns: u64,
    pub wait_ns: u64,
    pub throttled_ns: u64,
    pub average_wait_ns: u64,
    pub wakeups: u64,
    pub response_ns: u64,
    pub response_p99_ns: u64,
    pub bursts: u64,
    pub switches: u64,
    pub io_bytes: u64,
    pub latency_ns: Vec<(u64, u64)>,
}

impl From<Figures> for VcpuStats {
    /// Of a vCPU of which nothing else is known.
    fn from(figures: Figures) -> Self {
        let Figures {
            run_ns,
            wait_ns,
            throttled_ns,
            average_wait_ns,
            wakeups,
            response_ns,
            response_p99_ns,
            bursts,
            switches,
            io_bytes,
            latency_ns,
        } = figures;
        VcpuStats {
            run_ns,
            wait_ns,
            throttled_ns,
            average_wait_ns,
            wakeups,
            response_ns,
            response_p99_ns,
            bursts,
            switches,
            io_bytes,
            latency_ns,
            ..VcpuStats::default()
        }
    }
}

/// A line of the host's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Its number, from 0 on.
    pub number: u64,
    /// Time since Plinth's start.
    pub at_ns: u64,
    /// `error`, `warn`, `info` or `debug`.
    pub level: String,
    /// The text.
    pub text: String,
}

/// The trace: a ring of records per host processor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceDetails {
    /// Whether it grows.
    pub on: bool,
    /// TSC ticks per second.
    pub tsc_hz: u64,
    /// Host TSC when it was started; 0 if it never was.
    pub started_tsc: u64,
    /// Records that a ring holds.
    pub capacity: u64,
    /// The rings; none if it never was started.
    pub rings: Vec<TraceRing>,
    /// Names of exits, by the number that a record has.
    pub exits: Vec<String>,
    /// VMs by the number that a record has.
    pub vms: Vec<(u16, String)>,
}

/// How far a ring has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceRing {
    /// Host processor.
    pub pcpu: u32,
    /// Number of the oldest record that it still has.
    pub oldest: u64,
    /// Number that its next record will have: records since the trace was started.
    pub next: u64,
}

/// Records of one host processor, in the order in which they were made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceChunk {
    /// Host processor.
    pub pcpu: u32,
    /// Number of the first record here.
    pub first: u64,
    /// Number of the first record behind these: where to read on.
    pub next: u64,
    /// Host TSC to which the first record's time is added; each later one's is added to the one before.
    pub tsc: u64,
    /// The records.
    pub records: Vec<Record>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_published_form() {
        for (text, request) in [
            (r#"{"verb":"vm-list"}"#, Request::VmList {}),
            (
                r#"{"verb":"vm-stop","vm":"a"}"#,
                Request::VmStop {
                    vm: "a".into(),
                    timeout_s: None,
                },
            ),
            (r#"{"verb":"stats"}"#, Request::Stats { vm: None }),
            (
                r#"{"verb":"stats","vm":"a"}"#,
                Request::Stats {
                    vm: Some("a".into()),
                },
            ),
            (
                r#"{"verb":"sched-set","vm":"a","change":{"weight":7}}"#,
                Request::SchedSet {
                    vm: "a".into(),
                    change: SchedChange {
                        weight: Some(7),
                        ..SchedChange::default()
                    },
                },
            ),
        ] {
            assert_eq!(serde_json::from_str::<Request>(text).unwrap(), request);
            let written = serde_json::to_string(&request).unwrap();
            assert_eq!(serde_json::from_str::<Request>(&written).unwrap(), request);
        }
        // As before there was a key for it.
        let all = serde_json::to_string(&Request::Stats { vm: None }).unwrap();
        assert_eq!(all, r#"{"verb":"stats"}"#);
        for text in [
            r#"{"verb":"vm-lst"}"#,
            r#"{"verb":"stats","vms":"a"}"#,
            r#"{"verb":"vm-show"}"#,
            r#"{"verb":"vm-show","vm":"a","more":1}"#,
            r#"{"verb":"sched-set","vm":"a","change":{"weigth":7}}"#,
            r#"{}"#,
        ] {
            assert!(serde_json::from_str::<Request>(text).is_err(), "{text}");
        }
    }
}

//! The protocol between vireod and vireo-vmm, one JSON document per line over a unix socket, shaped like QMP.
//!
//! *Start-up.* vireod creates the monitor's listening socket and a socket pair, starts `vireo-vmm --start-fd N` and sends
//! one [`VmConfig`] over the pair, with every file the machine needs as a passed descriptor; [`FdIndex`] is the place of
//! a descriptor in that message. vireo-vmm answers one [`StartReply`] over the same pair: the machine exists (paused or
//! running), or the reason why not. Then the pair is closed and the process opens nothing by path any more.
//!
//! *Afterwards* anyone who may connect to the monitor socket speaks [`Request`] and reads [`Message`]: a greeting, replies
//! in the order of the requests, events as they happen. Several peers may be connected; each gets every event.
//!
//! Both ends use this crate. Invariant: it knows no device and no XML.
#![forbid(unsafe_code)]

mod channel;
mod config;

pub use channel::{Channel, ChannelError, MAX_FDS, MAX_LINE_BYTES};
pub use config::{
    Accel, Boot, CacheMode, ChainLink, ClockMode, Console, ConsoleTarget, DetectZeroes, Discard, Disk, DiskBus,
    DiskErrorPolicy, DiskFormat, DiskIo, DiskThrottle, FdIndex, PowerAction, RateLimit, RateLimits, VmConfig,
};
use serde::{Deserialize, Serialize};

/// Version of this protocol; both ends must agree on the major number.
pub const PROTOCOL: (u32, u32) = (1, 0);

/// vireo-vmm's one answer over the start-up pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StartReply {
    /// The machine exists. `config.paused` decides whether it already runs.
    Ready {
        /// Which engine executes it (`Accel::Auto` resolved).
        accel: Accel,
    },
    /// It could not be built; the process exits. Texts as a person reads them, causes joined with ": ".
    Failed(Failure),
}

/// Why a machine could not be built or a command not carried out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of failure, for programs.
    pub class: FailureClass,
    /// One sentence with the object and what helps, for people.
    pub text: String,
}

/// Kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureClass {
    /// The configuration asks for something that does not exist or does not fit.
    Config,
    /// A disk image cannot be used.
    Image,
    /// The kernel, initrd or firmware cannot be loaded.
    Boot,
    /// The engine (KVM) does not work here.
    Engine,
    /// Memory or another host resource is missing.
    Resource,
    /// The command does not fit the machine's state.
    State,
    /// The command does not exist or its arguments do not parse.
    Command,
    /// A bug of ours.
    Internal,
}

/// One command to a running vireo-vmm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the peer, echoed in the reply.
    pub id: u64,
    /// What to do.
    #[serde(flatten)]
    pub command: Command,
}

/// The commands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "execute", content = "arguments", rename_all = "kebab-case")]
pub enum Command {
    /// Answers [`Reply::Status`].
    QueryStatus,
    /// Answers [`Reply::Stats`].
    QueryStats,
    /// Lets the vCPUs run. On a running machine: nothing happens, no event.
    Cont,
    /// Stops the vCPUs between two instructions. On a paused machine: nothing happens, no event.
    Stop,
    /// Presses the ACPI power button.
    SystemPowerdown,
    /// Resets the machine as the reset button does.
    SystemReset,
    /// A non-maskable interrupt to every vCPU.
    InjectNmi,
    /// Changes the size of a disk; what lies behind a new end is lost.
    ResizeDisk {
        /// Target name.
        target: String,
        /// The new size; a part of a sector counts as one.
        bytes: u64,
    },
    /// Changes the limits of a disk, and of those that share its new group.
    SetDiskThrottle {
        /// Target name.
        target: String,
        /// All limits: what is 0 here is unlimited afterwards.
        throttle: DiskThrottle,
    },
    /// Ends the process at once, caches flushed. The reply comes before the end.
    Quit,
}

/// What vireo-vmm sends over the monitor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Message {
    /// First line of every connection.
    Greeting {
        /// [`PROTOCOL`].
        protocol: (u32, u32),
        /// The domain's UUID, so that a peer can tell that it found the right process.
        uuid: String,
    },
    /// A command was carried out.
    Return {
        /// The request's id.
        id: u64,
        /// The answer.
        value: Reply,
    },
    /// A command was not carried out; nothing has changed.
    Error {
        /// The request's id; 0 where the request could not be read.
        id: u64,
        /// Why.
        error: Failure,
    },
    /// Something happened.
    Event(Event),
}

/// Answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Nothing to tell.
    Done,
    /// To [`Command::QueryStatus`].
    Status(Status),
    /// To [`Command::QueryStats`].
    Stats(Stats),
}

/// The machine's run state and how it came to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Running or not.
    pub state: RunState,
    /// Why it is in that state.
    pub reason: RunReason,
}

/// Run states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Built, not started yet.
    Prelaunch,
    /// vCPUs execute.
    Running,
    /// vCPUs stand.
    Paused,
    /// Powered off by the guest or crashed, kept because the action for it is `preserve`.
    Shutdown,
}

/// Why a run state holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunReason {
    /// Started.
    Booted,
    /// `stop` or `cont`.
    User,
    /// A disk could not be read or written and its policy is to stop.
    IoError,
    /// The engine met something it does not implement, or the guest reported a crash.
    Crashed,
    /// The guest powered off.
    GuestShutdown,
}

/// Counters since the start of the process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// CPU time of each vCPU thread.
    pub vcpus: Vec<VcpuStats>,
    /// One entry per disk, in the order of the configuration.
    pub disks: Vec<DiskStats>,
    /// Resident part of guest memory in KiB.
    pub ram_resident_kib: u64,
}

/// A vCPU's counters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VcpuStats {
    /// Host thread id.
    pub thread_id: u32,
    /// User and system time of the thread, in nanoseconds.
    pub cpu_ns: u64,
    /// Waiting in HLT now.
    pub halted: bool,
}

/// A disk's counters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DiskStats {
    /// Target name (`vda`).
    pub target: String,
    /// Requests completed.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Time spent in reads, in nanoseconds.
    pub read_ns: u64,
    /// Requests completed.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Time spent in writes, in nanoseconds.
    pub write_ns: u64,
    /// Requests completed.
    pub flushes: u64,
    /// Time spent in flushes, in nanoseconds.
    pub flush_ns: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Virtual size in bytes.
    pub capacity_bytes: u64,
    /// Bytes the top image takes on the host.
    pub allocation_bytes: u64,
    /// Length of the top image file in bytes.
    pub physical_bytes: u64,
}

/// Things that happen by themselves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case")]
pub enum Event {
    /// The vCPUs stand.
    Stopped {
        /// Why.
        reason: RunReason,
    },
    /// The vCPUs run again.
    Resumed,
    /// The machine was reset and goes on.
    Reset {
        /// By the guest (true) or by `system-reset`.
        guest: bool,
    },
    /// The guest has powered off (or reset, where that ends the machine); the process ends after this.
    Shutdown {
        /// What the guest did.
        cause: ShutdownCause,
    },
    /// A disk request failed.
    IoError {
        /// Target name of the disk (`vda`).
        target: String,
        /// `read`, `write` or `flush`.
        operation: String,
        /// `enospc` or empty.
        reason: String,
        /// The machine was paused because of it.
        paused: bool,
    },
    /// The guest or the engine crashed; the text is what is known about it.
    Crashed {
        /// For people.
        text: String,
    },
}

/// What ended a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownCause {
    /// ACPI S5.
    PowerOff,
    /// A reset, and the action for it is `destroy`.
    Reset,
    /// `quit`.
    Quit,
    /// A crash, and the action for it is `destroy`.
    Crash,
}

//! Why a machine could not be started or went down.

use std::error::Error;
use std::path::PathBuf;

use block::{BlockError, ThrottleError};
use hv_core::AccelError;
use machine::MachineError;
use monitor::{ChannelError, Failure, FailureClass};

use crate::run_args::ArgsError;
use crate::sandbox::SandboxError;

/// What can go wrong on the way to a running machine.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The command line.
    #[error(transparent)]
    Args(#[from] ArgsError),
    /// A file named on the command line.
    #[error("{path}: the {what} cannot be opened", path = path.display())]
    Open {
        /// kernel, initrd, statistics file
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The configuration did not arrive.
    #[error("the configuration cannot be received over descriptor {fd}")]
    Receive {
        /// Number given with `--start-fd`.
        fd: i32,
        /// Details.
        #[source]
        source: ChannelError,
    },
    /// The descriptor given with `--start-fd` is not open or no socket.
    #[error("descriptor {fd}, given with --start-fd, is not an open socket")]
    StartFd {
        /// The number.
        fd: i32,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// An index without a descriptor.
    #[error("the configuration refers to descriptor {index} for the {what}, but {count} were passed")]
    MissingFd {
        /// What it is for.
        what: &'static str,
        /// The index.
        index: u32,
        /// Descriptors passed.
        count: usize,
    },
    /// Unknown machine type.
    #[error("machine type '{name}' does not exist: there is {known}", known = machine::layout::MACHINE_TYPE)]
    MachineType {
        /// Asked for.
        name: String,
    },
    /// KVM was asked for and does not work here.
    #[error("KVM cannot be used here: {reason}")]
    KvmUnusable {
        /// What failed and what helps.
        reason: String,
    },
    /// A virtual clock counts instructions, which KVM does not.
    #[error("a virtual clock needs the software CPU: use accel 'soft'")]
    VirtualClockOnKvm,
    /// Virtual clock with more than one vCPU.
    #[error("a virtual clock needs exactly one vCPU, not {vcpus}")]
    VirtualClock {
        /// Asked for.
        vcpus: u32,
    },
    /// Serial port number.
    #[error("serial port {port} does not exist: there are 0 to 3")]
    SerialPort {
        /// Asked for.
        port: u8,
    },
    /// The same serial port twice.
    #[error("serial port {port} is given twice")]
    SerialTwice {
        /// Which.
        port: u8,
    },
    /// Serial number of a disk.
    #[error("disk '{target}': the serial number has {bytes} bytes; at most 20 are shown to a guest")]
    DiskSerial {
        /// Which disk.
        target: String,
        /// Length given.
        bytes: usize,
    },
    /// A command names a disk that is not there.
    #[error("there is no disk '{target}'")]
    NoDisk {
        /// The name.
        target: String,
    },
    /// A disk does not take another size.
    #[error("disk '{target}' cannot be resized")]
    Resize {
        /// Which disk.
        target: String,
        /// Details.
        #[source]
        source: BlockError,
    },
    /// An image.
    #[error("disk '{target}' cannot be used")]
    Disk {
        /// Which disk.
        target: String,
        /// Details.
        #[source]
        source: BlockError,
    },
    /// Queues of a disk.
    #[error("disk '{target}': {queues} queues of {size} requests; 1 to 16 of a power of 2 up to 1024 are possible")]
    DiskQueues {
        /// Which disk.
        target: String,
        /// Asked for.
        queues: u16,
        /// Asked for.
        size: u16,
    },
    /// Limits of a disk.
    #[error("limits of disk '{target}'")]
    Throttle {
        /// Which disk.
        target: String,
        /// What is wrong with them.
        source: ThrottleError,
    },
    /// The machine.
    #[error("the machine cannot be built")]
    Machine(#[from] MachineError),
    /// A vCPU does not take its initial state.
    #[error("vCPU {index} cannot be started")]
    Vcpu {
        /// Which.
        index: usize,
        /// Details.
        #[source]
        source: AccelError,
    },
    /// The sandbox.
    #[error("the process cannot be confined")]
    Sandbox(#[from] SandboxError),
    /// A call to the host.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
}

impl VmmError {
    /// Wraps a failed call to the host.
    pub fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> VmmError {
        move |source| VmmError::Host { what, source }
    }

    /// What kind of failure it is, for programs.
    pub fn class(&self) -> FailureClass {
        match self {
            VmmError::Args(_)
            | VmmError::Open { .. }
            | VmmError::Receive { .. }
            | VmmError::StartFd { .. }
            | VmmError::MissingFd { .. }
            | VmmError::MachineType { .. }
            | VmmError::VirtualClock { .. }
            | VmmError::SerialPort { .. }
            | VmmError::SerialTwice { .. }
            | VmmError::DiskQueues { .. }
            | VmmError::NoDisk { .. }
            | VmmError::Throttle { .. }
            | VmmError::DiskSerial { .. } => FailureClass::Config,
            VmmError::Disk { .. } | VmmError::Resize { .. } => FailureClass::Image,
            VmmError::KvmUnusable { .. } => FailureClass::Engine,
            VmmError::VirtualClockOnKvm => FailureClass::Config,
            VmmError::Machine(error) => match error {
                MachineError::Boot(_) => FailureClass::Boot,
                MachineError::Accel(_) => FailureClass::Engine,
                MachineError::Ram(_) | MachineError::Event { .. } => FailureClass::Resource,
                MachineError::MemorySize { .. }
                | MachineError::MemoryBeyond { .. }
                | MachineError::NoVcpu
                | MachineError::TooManyDevices { .. }
                | MachineError::WindowFull { .. } => FailureClass::Config,
            },
            VmmError::Vcpu { .. } => FailureClass::Engine,
            VmmError::Sandbox(_) | VmmError::Host { .. } => FailureClass::Resource,
        }
    }

    /// The answer to a failing start.
    pub fn failure(&self) -> Failure {
        Failure { class: self.class(), text: causes(self) }
    }
}

/// The message of `error` and of all that caused it, joined with ": ".
pub fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

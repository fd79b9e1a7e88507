//! Engines: how a machine is executed.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guest_ram::GuestRam;

use crate::{Clock, Doorbell, DoorbellError, Gpa, GuestNs, Msi, MsiSink};

/// What an engine can do on this host, found by trying it.
#[derive(Clone, Debug)]
pub struct AccelReport {
    /// `"soft"`, `"kvm"`, `"null"`.
    pub name: &'static str,
    /// `None`: usable. Otherwise a sentence that says what failed and what would help.
    pub refusal: Option<String>,
    /// Physical address bits a guest may use.
    pub physical_bits: u8,
    /// The most vCPUs one guest may have.
    pub max_vcpus: u32,
}

/// One level: vCPU `n` has APIC id `n`, and no two share a socket.
#[derive(Clone, Debug)]
pub struct Topology {
    /// Number of vCPUs, at least 1.
    pub vcpus: u32,
}

/// Why an engine could not build a machine or a vCPU.
#[derive(Debug, thiserror::Error)]
pub enum AccelError {
    /// The engine is not usable on this host; the text says why and what helps.
    #[error("{engine} cannot be used here: {reason}")]
    Unusable {
        /// Engine name.
        engine: &'static str,
        /// What failed.
        reason: String,
    },
    /// More vCPUs than the engine runs.
    #[error("{engine} runs at most {max} vCPUs, not {asked}: lower the vCPU count of the domain")]
    TooManyVcpus {
        /// Engine name.
        engine: &'static str,
        /// Limit.
        max: u32,
        /// Asked for.
        asked: u32,
    },
    /// A call to the host failed.
    #[error("{engine}: {call} failed")]
    Host {
        /// Engine name.
        engine: &'static str,
        /// System call or ioctl.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// State that the engine cannot represent.
    #[error("{engine} cannot take the CPU state: {what}")]
    State {
        /// Engine name.
        engine: &'static str,
        /// Which part.
        what: String,
    },
}

/// Makes machines. Two phases: [`Accel::probe`] and [`Accel::cpuid`] tell limits before [`Accel::build`] fixes them.
pub trait Accel {
    /// The machine-wide half.
    type Vm: Vm;
    /// One vCPU.
    type Vcpu: Vcpu;

    /// Finds out, by running a small guest, whether the engine works here.
    fn probe(&self) -> AccelReport;
    /// The CPUID leaves a guest sees, before per-vCPU leaves (APIC ids) are filled in.
    fn cpuid(&self) -> x86::CpuidTable;
    /// Builds the machine around `ram`. vCPUs start in the state of a power-on reset. Nothing remains after an error.
    fn build(
        &self,
        ram: GuestRam,
        topology: &Topology,
        cpuid: &x86::CpuidTable,
        clock: Clock,
    ) -> Result<VmParts<Self::Vm, Self::Vcpu>, AccelError>;
}

/// What [`Accel::build`] returns.
pub struct VmParts<M, C> {
    /// The machine-wide half, shared with devices.
    pub vm: Arc<M>,
    /// The vCPUs, index = APIC id; each moves to its own thread.
    pub vcpus: Vec<C>,
}

/// The machine-wide half of an engine. All calls are safe from any thread.
pub trait Vm: MsiSink + 'static {
    /// The IOAPIC's redirection of `pin` is now `route` (`None`: masked). Engines that must know which vectors are
    /// level-triggered (KVM reports the end of interrupt only for those) keep it; others ignore it.
    fn set_ioapic_route(&self, pin: u8, route: Option<Msi>);
    /// The 8259's INTR output, into LINT0 of vCPU 0: while high, the vCPU asks [`VcpuIo::pic_ack`] for a vector when it
    /// can take an interrupt.
    fn set_extint(&self, high: bool);
    /// Offers a doorbell, which then may be rung without a call of [`VcpuIo`]; the plain write path must ring it too.
    fn add_doorbell(&self, doorbell: &Doorbell) -> Result<(), DoorbellError>;
    /// Takes a doorbell back (a BAR moved, the device was reset). Unknown ones are ignored.
    fn remove_doorbell(&self, doorbell: &Doorbell);
}

/// What the machine answers to a vCPU, called on the vCPU's thread in the middle of an instruction.
pub trait VcpuIo {
    /// Port read of 1, 2 or 4 bytes.
    fn port_read(&self, port: u16, bytes: u8) -> u32;
    /// Port write of 1, 2 or 4 bytes.
    fn port_write(&self, port: u16, bytes: u8, value: u32);
    /// Read of 1, 2, 4 or 8 bytes, not crossing a page, where there is no RAM. A hole reads all ones.
    fn mmio_read(&self, gpa: Gpa, bytes: u8) -> u64;
    /// Write of 1, 2, 4 or 8 bytes, not crossing a page, where there is no RAM. Rings doorbells.
    fn mmio_write(&self, gpa: Gpa, bytes: u8, value: u64);
    /// Interrupt acknowledge cycle to the 8259 pair: the vector, `None` if the request has gone.
    fn pic_ack(&self) -> Option<u8>;
    /// A local APIC ended a level-triggered interrupt: broadcast to the IOAPIC.
    fn eoi(&self, vector: u8);
    /// Virtual clock only: guest time is `now`; runs what is due and says when the next deadline is. An access may arm
    /// an earlier deadline: the engine asks again after each one (one atomic load where nothing is due).
    fn run_due(&self, now: GuestNs) -> Option<GuestNs>;
}

/// Makes a vCPU leave the guest soon, from any thread.
pub trait Kick: Send + Sync {
    /// The vCPU checks its [`StopToken`] and pending work at its next instruction boundary, even if halted.
    fn kick(&self);
}

/// Asks a vCPU's `run` to return. Clones are the same token.
#[derive(Clone, Debug, Default)]
pub struct StopToken(Arc<AtomicBool>);

impl StopToken {
    /// Asks; pair it with [`Kick::kick`].
    pub fn stop(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
    /// Takes the request back before the next `run`.
    pub fn clear(&self) {
        self.0.store(false, Ordering::SeqCst);
    }
    /// Whether `run` should return.
    pub fn is_stopped(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Why [`Vcpu::run`] returned. HLT is not among them: a halted vCPU waits inside `run`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Halt {
    /// The stop token was set. The state is at an instruction boundary.
    Stop,
    /// A fault while delivering a double fault; real hardware would reset.
    TripleFault,
    /// A debug exception that a debugger asked for.
    Debug,
    /// The engine cannot go on: an instruction or a state it does not implement. Nothing is approximated in silence.
    InternalError(InternalError),
}

/// What an engine could not do, with the place in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InternalError {
    /// Guest instruction pointer.
    pub rip: u64,
    /// Instruction bytes there, as far as they could be read.
    pub bytes: Vec<u8>,
    /// What is missing.
    pub what: String,
}

impl fmt::Display for InternalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at rip {:#x}, bytes", self.what, self.rip)?;
        self.bytes.iter().try_for_each(|b| write!(f, " {b:02x}"))
    }
}

/// One virtual processor. Lives on its own thread.
pub trait Vcpu: Send + 'static {
    /// Executes the guest until something of [`Halt`] happens.
    fn run<I: VcpuIo>(&mut self, io: &I, stop: &StopToken) -> Halt;
    /// A handle that makes this vCPU look at its stop token.
    fn kicker(&self) -> Arc<dyn Kick>;
    /// The whole architectural state, at an instruction boundary.
    fn state(&mut self) -> Result<x86::State, AccelError>;
    /// Replaces the whole architectural state. After an error the old state stands.
    fn set_state(&mut self, state: &x86::State) -> Result<(), AccelError>;
    /// Guest instructions retired so far; `None` where the engine does not count.
    fn instructions(&self) -> Option<u64>;
}

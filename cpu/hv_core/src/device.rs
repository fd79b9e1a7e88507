//! What a device is to the machine, and what the machine lends to devices.

use std::sync::Arc;

use crate::{Gpa, GuestNs};

/// A device on the port I/O bus. Called with the device's lock held, for one access, on a vCPU thread.
pub trait PortDevice: Send {
    /// Reads `bytes` (1, 2 or 4) at `port`. Bits above `bytes` are ignored. A hole reads all ones.
    fn read(&mut self, port: u16, bytes: u8) -> u32;
    /// Writes the low `bytes` (1, 2 or 4) of `value` at `port`.
    fn write(&mut self, port: u16, bytes: u8, value: u32);
}

/// A device in memory space. Called with the device's lock held, for one access, on a vCPU thread.
pub trait MmioDevice: Send {
    /// Reads `bytes` (1, 2, 4 or 8) at `offset` from the start of the device's range.
    fn read(&mut self, offset: u64, bytes: u8) -> u64;
    /// Writes the low `bytes` (1, 2, 4 or 8) of `value` at `offset` from the start of the device's range.
    fn write(&mut self, offset: u64, bytes: u8, value: u64);
}

/// A device with deadlines. They follow from its registers, so there is no timer object to save.
pub trait TimedDevice: Send {
    /// When [`TimedDevice::on_due`] wants to be called next; `None` while nothing is armed.
    fn next_due(&self) -> Option<GuestNs>;
    /// Guest time has reached (or passed) what `next_due` said; `now` is the time to act on.
    fn on_due(&mut self, now: GuestNs);
}

/// A device that a machine reset puts back into its state after power-on, keeping what it was lent.
pub trait ResetDevice: Send {
    /// The reset line is active. vCPUs stand; output lines end up at their reset level.
    fn reset(&mut self);
}

/// Which bus a doorbell listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Port I/O; the address is the port.
    Port,
    /// Memory; the address is a guest-physical address.
    Memory,
}

/// What a doorbell does when rung. Called from a vCPU thread, with no device lock held; must not block.
pub trait Ring: Send + Sync {
    /// The guest wrote to the doorbell.
    fn ring(&self);
    /// An eventfd that does the same when written, for engines that ring without leaving the kernel.
    fn eventfd(&self) -> Option<std::os::fd::BorrowedFd<'_>>;
}

/// A guest write that starts a queue.
#[derive(Clone)]
pub struct Doorbell {
    /// The bus.
    pub space: Space,
    /// Guest address of the register ([`Space::Port`]: the port number).
    pub address: Gpa,
    /// Width of the write in bytes: 1, 2, 4 or 8; 0 rings on any width.
    pub bytes: u8,
    /// Ring only for this value; `None` rings for any.
    pub value: Option<u64>,
    /// What to ring.
    pub target: Arc<dyn Ring>,
}

/// Why a doorbell could not be offered to the engine. The plain write path rings it all the same.
#[derive(Debug, thiserror::Error)]
pub enum DoorbellError {
    /// The engine refused it.
    #[error("the engine refused a doorbell at {address}")]
    Refused {
        /// Where the doorbell was to be.
        address: Gpa,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// What a guest asks of its machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Reset through cf9, port 92, the keyboard controller, the ACPI reset register or a triple fault.
    Reset,
    /// ACPI S5.
    PowerOff,
    /// A write to the panic-event device: the guest says that it has crashed.
    Panicked,
    /// A device met an error its policy answers with a pause (disk full). The machine stops until resumed.
    IoErrorPause,
}

/// Where devices report power events. The first one wins until the lifecycle has acted on it.
pub trait Lifecycle: Send + Sync {
    /// Reports `event` from any thread; vCPUs stop at their next instruction boundary.
    fn request(&self, event: PowerEvent);
}

/// Why a saved state cannot be taken. Saved state is untrusted input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// A byte string has the wrong length.
    #[error("saved state: {field} has {got} bytes, not {want}")]
    Length {
        /// Device and field.
        field: &'static str,
        /// Expected.
        want: usize,
        /// Found.
        got: usize,
    },
    /// A value is outside what the device can hold.
    #[error("saved state: {field} holds {got}, which the device cannot")]
    Value {
        /// Device and field.
        field: &'static str,
        /// Found.
        got: u64,
    },
}

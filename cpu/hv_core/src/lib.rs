//! The contract between a machine and whatever executes its vCPUs.
//!
//! A machine (crate `machine`) knows devices; an engine (`hv_soft`, `hv_kvm`, `hv_null`) knows how to run instructions.
//! They meet here: the engine implements [`Accel`], [`Vm`] and [`Vcpu`]; the machine implements [`VcpuIo`], which the
//! engine *calls* for every port and memory access that is not RAM, in the middle of the instruction. Devices see
//! [`PortDevice`], [`MmioDevice`], [`IrqLine`], [`MsiSink`] and [`Clock`].
//!
//! Invariant: no device, no KVM and no file is known here.
#![forbid(unsafe_code)]

mod accel;
mod clock;
mod device;
mod disk;
mod irq;
mod work;

pub use accel::{
    Accel, AccelError, AccelReport, Halt, InternalError, Kick, StopToken, Topology, Vcpu, VcpuIo, Vm, VmParts,
};
pub use clock::{Clock, GuestNs};
pub use device::{
    Doorbell, DoorbellError, Lifecycle, MmioDevice, PortDevice, PowerEvent, ResetDevice, Ring, Space, StateError,
    TimedDevice,
};
pub use disk::{Begun, DiskBackend, DiskFault, GuestBuffer, Over, Transfer};
pub use guest_ram::Gpa;
pub use irq::{IrqLine, LineTarget, Msi, MsiSink, NoLine};
pub use work::{Interest, Work};

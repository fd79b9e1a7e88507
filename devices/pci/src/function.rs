//! What a PCI function is to the machine.

use std::sync::Arc;

use hv_core::{Doorbell, Space};
use parking_lot::Mutex;

/// A range that a function decodes now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// BAR index, or a number of the function's own for a window that is not a BAR.
    pub id: u8,
    /// Which bus.
    pub space: Space,
    /// First address or port.
    pub base: u64,
    /// Length, not 0; `base + bytes` does not overflow.
    pub bytes: u64,
}

/// A function on bus 0. Called with its lock held, for one access, on a vCPU thread.
pub trait PciFunction: Send {
    /// Reads 1, 2 or 4 bytes of configuration space, aligned; `offset` is below 256.
    fn config_read(&mut self, offset: u8, bytes: u8) -> u32;
    /// Writes 1, 2 or 4 bytes of configuration space, aligned. True: [`PciFunction::windows`] have changed.
    fn config_write(&mut self, offset: u8, bytes: u8, value: u32) -> bool;
    /// Adds the windows that are decoded now.
    fn windows(&self, windows: &mut Vec<Window>);
    /// Adds the doorbells inside those windows.
    fn doorbells(&self, _doorbells: &mut Vec<Doorbell>) {}
    /// Reads 1, 2, 4 or 8 bytes at `offset` of window `id`.
    fn window_read(&mut self, id: u8, offset: u64, bytes: u8) -> u64;
    /// Writes 1, 2, 4 or 8 bytes at `offset` of window `id`.
    fn window_write(&mut self, id: u8, offset: u64, bytes: u8, value: u64);
    /// Configuration space, for whoever assigns addresses before a guest runs.
    fn config(&mut self) -> &mut crate::ConfigSpace;
    /// The state after power-on; windows close.
    fn reset(&mut self);
}

/// A function as the machine holds it.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

//! The process of one virtual machine.
//!
//! It is told what to build either by vireod (`--start-fd`, [`start`]) or by its own command line (`run`, [`run_args`]);
//! both end in one [`monitor::VmConfig`] with open descriptors, and [`owner`] has the machine from there on.
//!
//! *Threads.* `main` owns the lifecycle and serves the monitor; `vcpuN` executes; `io0` runs queues, consoles and timers. What
//! other threads have to tell goes to `main` as a [`notes::Note`]; `main` stops the others before it changes the machine.
//!
//! *Errors* are one enum, [`error::VmmError`]; its class and text are what a failing start answers.
//!
//! Invariant: no XML and no RPC is known here; nothing is opened by path once the guest runs.
#![deny(unsafe_code)]

pub mod console;
pub mod disk;
pub mod engine;
pub mod error;
pub mod event;
pub mod heap;
pub mod host_probe;
pub mod io_thread;
pub mod lifecycle;
pub mod monitor_server;
pub mod notes;
pub mod owner;
pub mod random;
pub mod run_args;
pub mod sandbox;
pub mod setup;
pub mod signals;
pub mod start;
pub mod stats;
pub mod terminal;
pub mod throttling;
pub mod vcpu_thread;
pub mod words;

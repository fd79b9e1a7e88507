//! Real programs, real guests, an unmodified virsh.

mod console;
mod container;
mod demo_guest;
mod interfaces;
mod lifecycle;
mod refusals;
mod survival;

//! The daemon as its clients see it: driven by an unmodified virsh, by raw packets, and by being killed.

mod abuse;
mod consoles;
mod session;
mod survival;
mod virsh;

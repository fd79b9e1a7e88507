//! The daemon as its clients see it: driven by an unmodified virsh, by raw packets, and by being killed.

mod abuse;
mod activation;
mod bad_input;
mod consoles;
mod crowd;
mod killed_at_every_call;
mod session;
mod survival;
mod unprivileged;
mod virsh;
mod virsh_disks;
mod virsh_newer;

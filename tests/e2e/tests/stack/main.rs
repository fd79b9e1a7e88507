//! Real programs, real guests, an unmodified virsh.

mod survival;

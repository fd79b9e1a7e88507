//! Instruction handlers, one function per instruction form, monomorphised over operand width.

pub(crate) mod arith;
pub(crate) mod bits;
pub(crate) mod call_gate;
pub(crate) mod flow;
pub(crate) mod masked;
pub(crate) mod moves;
pub(crate) mod stack;
pub(crate) mod string;
pub(crate) mod system;
pub(crate) mod transfer;

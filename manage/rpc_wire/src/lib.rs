//! rpc_wire

//! hv_core

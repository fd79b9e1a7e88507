//! hv_soft

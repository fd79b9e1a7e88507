//! hv_null

//! hv_kvm

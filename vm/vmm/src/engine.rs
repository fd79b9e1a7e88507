//! The choice of an engine, made once at run time; what follows is generic over it.

use std::sync::Arc;

use hv_core::{Accel as _, AccelError};
use hv_kvm::KvmAccel;
use hv_soft::{SoftAccel, SoftConfig};
use monitor::{Accel, ClockMode, VmConfig};

use crate::error::VmmError;
use crate::event::Event;
use crate::notes::Notes;
use crate::owner::Owner;
use crate::setup::Setup;

/// A machine and what executes it.
pub struct Built {
    /// The machine.
    pub owner: Owner,
    /// The engine.
    pub accel: Accel,
}

/// Builds the machine on the engine that the configuration asks for.
pub fn build(config: &VmConfig, setup: Setup, notes: Arc<Notes>, signals: &'static Event) -> Result<Built, VmmError> {
    if let Some(accel) = choose_kvm(config)? {
        return Ok(Built { owner: Owner::build(&accel, config, setup, notes, signals)?, accel: Accel::Kvm });
    }
    let accel = SoftAccel::new(SoftConfig { block_cache_bytes: config.block_cache_bytes });
    Ok(Built { owner: Owner::build(&accel, config, setup, notes, signals)?, accel: Accel::Soft })
}

/// KVM, if it is asked for or, where any engine does, works.
fn choose_kvm(config: &VmConfig) -> Result<Option<KvmAccel>, VmmError> {
    let virtual_clock = config.clock == ClockMode::Virtual;
    match config.accel {
        Accel::Soft => Ok(None),
        Accel::Kvm if virtual_clock => Err(VmmError::VirtualClockOnKvm),
        Accel::Kvm => kvm().map(Some).map_err(|reason| VmmError::KvmUnusable { reason }),
        Accel::Auto => Ok(if virtual_clock { None } else { kvm().ok() }),
    }
}

/// KVM, opened and found to work; or the sentence that says why not.
pub fn kvm() -> Result<KvmAccel, String> {
    let accel = KvmAccel::open().map_err(|e| match e {
        AccelError::Unusable { reason, .. } => reason,
        other => other.to_string(),
    })?;
    match accel.probe().refusal {
        None => Ok(accel),
        Some(reason) => Err(reason),
    }
}

//! The choice of an engine, made once at run time; what follows is generic over it.

use std::sync::Arc;

use hv_soft::{SoftAccel, SoftConfig};
use monitor::{Accel, VmConfig};

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
    match config.accel {
        Accel::Kvm => Err(VmmError::KvmUnsupported),
        Accel::Auto | Accel::Soft => {
            let accel = SoftAccel::new(SoftConfig { block_cache_bytes: config.block_cache_bytes });
            Ok(Built { owner: Owner::build(&accel, config, setup, notes, signals)?, accel: Accel::Soft })
        }
    }
}

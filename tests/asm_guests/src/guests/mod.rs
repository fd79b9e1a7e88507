//! The guests.

mod modes;

use crate::suite::Guest;

/// All guests.
pub fn all() -> Vec<Guest> {
    modes::guests()
}

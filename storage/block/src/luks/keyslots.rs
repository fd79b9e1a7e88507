//! Changing the passphrases of a volume.
//!
//! A power cut at any write leaves every slot that was not meant to change as it was, and at least one passphrase that
//! opens the volume. A slot becomes active by one write of four bytes, after everything that it needs is on stable
//! storage; it becomes inactive by such a write before its key material is destroyed.

use image::luks::{KEY_SLOTS, KeySlot, SALT_BYTES, slot_offset};
use thiserror::Error;

use super::create::{SlotKey, new_slot};
use super::volume::{ALL_SLOTS, Volume};
use super::{LayerKey, Passphrase};
use crate::chain::ChainFile;
use crate::disk::ChainBackend;
use crate::error::BlockError;
use crate::random::fill_random;

/// What happens to the key slots of a volume.
#[derive(Clone, Debug)]
pub enum KeySlotChange {
    /// A passphrase is added.
    Activate {
        /// To this slot; `None`: to the first that is free.
        slot: Option<usize>,
        /// The new passphrase.
        passphrase: Passphrase,
        /// As [`super::LuksCreate::iter_time_ms`].
        iter_time_ms: u64,
    },
    /// Passphrases are removed.
    Deactivate {
        /// That of this slot.
        slot: Option<usize>,
        /// This one, wherever it fits; with `slot`, only if it fits there.
        passphrase: Option<Passphrase>,
    },
}

/// Why key slots are not changed. Nothing has changed then. The texts are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum KeySlotError {
    #[error("Invalid keyslot {slot} specified, must be between 0 and {}", KEY_SLOTS - 1)]
    NoSuchSlot { slot: usize },
    #[error("Can't add a keyslot - all keyslots are in use")]
    Full,
    #[error("Refusing to overwrite active keyslot {slot} - please erase it first")]
    InUse { slot: usize },
    #[error("Given keyslot {slot} doesn't contain the given old password for erase operation")]
    OtherPassphrase { slot: usize },
    // The blank at the end is QEMU's too.
    #[error("Given keyslot {slot} is already erased (inactive) ")]
    Inactive { slot: usize },
    #[error(
        "Attempt to erase the only active keyslot {slot} which will erase all the data in the image irreversibly - refusing operation"
    )]
    OnlySlot { slot: usize },
    #[error("No keyslots match given (old) password for erase operation")]
    NoMatch,
    #[error(
        "All the active keyslots match the (old) password that was given and erasing them will erase all the data in the image irreversibly - refusing operation"
    )]
    AllMatch,
    #[error(
        "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given"
    )]
    Unsaid,
}

/// Changes the key slots of a raw LUKS volume that `key` opens. `force` allows what loses a passphrase in use, or the
/// last one and with it the data.
pub fn change_key_slots(
    file: ChainFile,
    key: &LayerKey,
    change: &KeySlotChange,
    force: bool,
) -> Result<(), BlockError> {
    let layer = ChainBackend::from_file(file)?;
    let room = layer.file.len_bytes().map_err(|e| BlockError::io(&layer.path_label, crate::Action::Stat, e))?;
    let mut volume = Volume::read(&*layer.file, &layer.path_label, 0, room)?;
    let passphrase = super::needed(key, &layer.path_label, super::LUKS_KEY_PARAMETER)?;
    volume.change_slots(passphrase, change, force)
}

impl Volume<'_> {
    /// As [`change_key_slots`].
    pub(crate) fn change_slots(
        &mut self,
        passphrase: &Passphrase,
        change: &KeySlotChange,
        force: bool,
    ) -> Result<(), BlockError> {
        let unsealed = self.unseal(passphrase)?;
        match change {
            KeySlotChange::Activate { slot, passphrase, iter_time_ms } => {
                let slot = self.slot_to_fill(*slot, force)?;
                let key = SlotKey { passphrase, master_key: &unsealed.master_key, iter_time_ms: *iter_time_ms };
                self.activate(slot, key)
            }
            KeySlotChange::Deactivate { slot, passphrase } => {
                for slot in self.slots_to_erase(*slot, passphrase.as_ref(), force)? {
                    self.erase(slot)?;
                }
                Ok(())
            }
        }
    }

    fn refuse(&self, source: KeySlotError) -> BlockError {
        BlockError::KeySlot { path: self.path.to_owned(), source }
    }

    fn slot(&self, slot: usize) -> Result<&KeySlot, BlockError> {
        self.header.slots.get(slot).ok_or_else(|| self.refuse(KeySlotError::NoSuchSlot { slot }))
    }

    fn active(&self) -> Vec<usize> {
        self.header.slots.iter().enumerate().filter(|(_, slot)| slot.active).map(|(index, _)| index).collect()
    }

    fn free(&self) -> Option<usize> {
        self.header.slots.iter().position(|slot| !slot.active)
    }

    fn slot_to_fill(&self, wanted: Option<usize>, force: bool) -> Result<usize, BlockError> {
        let Some(slot) = wanted else { return self.free().ok_or_else(|| self.refuse(KeySlotError::Full)) };
        match self.slot(slot)?.active && !force {
            true => Err(self.refuse(KeySlotError::InUse { slot })),
            false => Ok(slot),
        }
    }

    fn slots_to_erase(
        &self,
        slot: Option<usize>,
        passphrase: Option<&Passphrase>,
        force: bool,
    ) -> Result<Vec<usize>, BlockError> {
        let active = self.active();
        match (slot, passphrase) {
            (None, None) => Err(self.refuse(KeySlotError::Unsaid)),
            (Some(slot), passphrase) => {
                let is_active = self.slot(slot)?.active;
                if let Some(passphrase) = passphrase
                    && self.try_slots(passphrase, &[slot])?.is_none()
                {
                    return Err(self.refuse(KeySlotError::OtherPassphrase { slot }));
                }
                if !force && !is_active {
                    return Err(self.refuse(KeySlotError::Inactive { slot }));
                }
                if !force && active == [slot] {
                    return Err(self.refuse(KeySlotError::OnlySlot { slot }));
                }
                Ok(vec![slot])
            }
            (None, Some(passphrase)) => {
                let mut fitting = Vec::new();
                for slot in ALL_SLOTS {
                    fitting.extend(self.try_slots(passphrase, &[slot])?.map(|unsealed| unsealed.slot));
                }
                match fitting.len() {
                    0 => Err(self.refuse(KeySlotError::NoMatch)),
                    all if all == active.len() && !force => Err(self.refuse(KeySlotError::AllMatch)),
                    _ => Ok(fitting),
                }
            }
        }
    }

    /// Gives a slot a passphrase. If it is the only active one, another one keeps the volume open meanwhile.
    fn activate(&mut self, slot: usize, key: SlotKey<'_>) -> Result<(), BlockError> {
        let meanwhile = if self.active() == [slot] { self.free() } else { None };
        if let Some(meanwhile) = meanwhile {
            self.fill(meanwhile, key)?;
        }
        if self.slot(slot)?.active {
            self.erase(slot)?;
        }
        self.fill(slot, key)?;
        meanwhile.map_or(Ok(()), |meanwhile| self.erase(meanwhile))
    }

    /// Fills a slot that is not active.
    fn fill(&mut self, slot: usize, key: SlotKey<'_>) -> Result<(), BlockError> {
        let (sealed, material) = new_slot(self.path, &self.header, self.slot(slot)?, key)?;
        self.write(sealed.material_offset(), &material)?;
        self.put(slot, KeySlot { active: false, ..sealed.clone() })?;
        self.barrier()?;
        self.put(slot, sealed)?;
        self.barrier()
    }

    /// Makes a slot inactive, and then destroys what it held.
    fn erase(&mut self, slot: usize) -> Result<(), BlockError> {
        let old = self.slot(slot)?.clone();
        self.put(slot, KeySlot { active: false, ..old.clone() })?;
        self.barrier()?;
        let mut random = vec![0; self.header.material_bytes()];
        fill_random(self.path, &mut random)?;
        self.write(old.material_offset(), &random)?;
        self.put(slot, KeySlot { active: false, iterations: 0, salt: [0; SALT_BYTES], ..old })?;
        self.barrier()
    }

    /// Writes what changes in the record of a slot; alone, its state is four bytes in one sector.
    fn put(&mut self, slot: usize, new: KeySlot) -> Result<(), BlockError> {
        let (old_bytes, new_bytes) = (self.slot(slot)?.to_bytes(), new.to_bytes());
        let same = |(old, new): &(&u8, &u8)| old == new;
        let first = old_bytes.iter().zip(&new_bytes).take_while(same).count();
        let behind = old_bytes.iter().zip(&new_bytes).rev().take_while(same).count();
        if let Some(changed) = new_bytes.get(first..new_bytes.len().saturating_sub(behind)) {
            self.write((slot_offset(slot) + first) as u64, changed)?;
        }
        if let Some(there) = self.header.slots.get_mut(slot) {
            *there = new;
        }
        Ok(())
    }
}

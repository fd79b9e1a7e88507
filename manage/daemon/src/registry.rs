//! All domains, by uuid, name and id, and the claims of those that are being made.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use parking_lot::{Mutex, RwLock};
use rpc_wire::DomainRef;
use uuid::Uuid;

use crate::domain::Domain;
use crate::error::DaemonError;

#[derive(Debug, Default)]
struct Maps {
    by_uuid: HashMap<Uuid, Arc<Domain>>,
    by_name: HashMap<Arc<str>, Arc<Domain>>,
}

#[derive(Debug, Default)]
struct Claims {
    names: HashSet<String>,
    uuids: HashSet<Uuid>,
}

/// The registry.
#[derive(Debug)]
pub struct Registry {
    maps: RwLock<Maps>,
    claims: Mutex<Claims>,
    next_id: AtomicI32,
}

/// A name and a uuid kept free of others until the domain is there or given up.
#[derive(Debug)]
pub struct Claim {
    registry: Arc<Registry>,
    name: String,
    uuid: Option<Uuid>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claims = self.registry.claims.lock();
        claims.names.remove(&self.name);
        if let Some(uuid) = self.uuid {
            claims.uuids.remove(&uuid);
        }
    }
}

impl Default for Registry {
    fn default() -> Registry {
        Registry { maps: RwLock::default(), claims: Mutex::default(), next_id: AtomicI32::new(1) }
    }
}

impl Registry {
    /// The domain that a client means: by uuid, because a name may be stale after a rename.
    pub fn find(&self, reference: &DomainRef) -> Result<Arc<Domain>, DaemonError> {
        let uuid = Uuid::from_bytes(reference.uuid);
        let found = self.maps.read().by_uuid.get(&uuid).cloned();
        found.ok_or_else(|| DaemonError::NoDomain { uuid, name: reference.name.lossy().into_owned() })
    }

    /// By uuid.
    pub fn by_uuid(&self, uuid: Uuid) -> Option<Arc<Domain>> {
        self.maps.read().by_uuid.get(&uuid).cloned()
    }

    /// By name.
    pub fn by_name(&self, name: &str) -> Option<Arc<Domain>> {
        self.maps.read().by_name.get(name).cloned()
    }

    /// By id, of a running domain.
    pub fn by_id(&self, id: i32) -> Option<Arc<Domain>> {
        // Ids are looked up by people and old tools, seldom; an index would have to be kept in step.
        self.maps.read().by_uuid.values().find(|domain| domain.snapshot().id() == id).cloned()
    }

    /// All domains, in no order.
    pub fn all(&self) -> Vec<Arc<Domain>> {
        self.maps.read().by_uuid.values().cloned().collect()
    }

    /// The id of the next start.
    pub fn next_id(&self) -> i32 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Ids up to `id` are taken by domains that ran before this daemon did.
    pub fn reserve_ids(&self, id: i32) {
        self.next_id.fetch_max(id.saturating_add(1), Ordering::Relaxed);
    }

    /// The existing domain a definition of `name` and `uuid` is for, or the right to make it.
    pub fn claim(self: &Arc<Self>, name: &str, uuid: Uuid) -> Result<Claimed, DaemonError> {
        let maps = self.maps.read();
        if let Some(existing) = maps.by_uuid.get(&uuid) {
            let found = existing.snapshot().name.to_string();
            return if found == name {
                Ok(Claimed::Existing(existing.clone()))
            } else {
                Err(DaemonError::UuidTaken { name: found, uuid })
            };
        }
        if let Some(other) = maps.by_name.get(name) {
            return Err(DaemonError::NameTaken { name: name.into(), uuid: other.uuid });
        }
        let mut claims = self.claims.lock();
        if claims.names.contains(name) || claims.uuids.contains(&uuid) {
            return Err(DaemonError::NameTaken { name: name.into(), uuid });
        }
        claims.names.insert(name.into());
        claims.uuids.insert(uuid);
        Ok(Claimed::New(Claim { registry: self.clone(), name: name.into(), uuid: Some(uuid) }))
    }

    /// The right to call an existing domain `name`.
    pub fn claim_name(self: &Arc<Self>, name: &str) -> Result<Claim, DaemonError> {
        let maps = self.maps.read();
        let mut claims = self.claims.lock();
        if maps.by_name.contains_key(name) || claims.names.contains(name) {
            return Err(DaemonError::RenameTarget { name: name.into() });
        }
        claims.names.insert(name.into());
        Ok(Claim { registry: self.clone(), name: name.into(), uuid: None })
    }

    /// Adds a domain under its name.
    pub fn insert(&self, domain: Arc<Domain>) {
        let mut maps = self.maps.write();
        maps.by_name.insert(domain.snapshot().name.clone(), domain.clone());
        maps.by_uuid.insert(domain.uuid, domain);
    }

    /// Removes a domain.
    pub fn remove(&self, domain: &Domain) {
        let mut maps = self.maps.write();
        maps.by_uuid.remove(&domain.uuid);
        maps.by_name.remove(&domain.snapshot().name);
    }

    /// Moves a domain to its new name; `publish` makes the new name visible in the same step.
    pub fn rename(&self, domain: &Arc<Domain>, new_name: Arc<str>, publish: impl FnOnce()) {
        let mut maps = self.maps.write();
        maps.by_name.remove(&domain.snapshot().name);
        maps.by_name.insert(new_name, domain.clone());
        publish();
    }
}

/// What a definition is for.
#[derive(Debug)]
pub enum Claimed {
    /// A domain that exists.
    Existing(Arc<Domain>),
    /// A new one.
    New(Claim),
}

//! Every verb, one file per family.

mod absent;
mod config;
mod console;
mod devices;
mod events;
mod host;
mod info;
mod life;
mod list;
mod own;
mod vcpus;

use crate::grammar::Verb;

/// The families' tables.
pub const FAMILIES: [&[Verb]; 10] = [
    life::VERBS,
    config::VERBS,
    console::VERBS,
    list::VERBS,
    info::VERBS,
    vcpus::VERBS,
    devices::VERBS,
    events::VERBS,
    host::VERBS,
    absent::VERBS,
];

/// All verbs.
pub fn all() -> impl Iterator<Item = &'static Verb> {
    FAMILIES.into_iter().chain([own::VERBS]).flatten()
}

/// The verb of a name.
pub fn find(name: &str) -> Option<&'static Verb> {
    all().find(|verb| verb.name == name)
}

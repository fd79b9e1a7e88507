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
mod not_built;
mod own;
mod vcpus;

use crate::failure::Failure;
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

/// Why there is no verb of a name.
pub fn unknown(name: &str) -> Failure {
    if not_built::NAMES.contains(&name) {
        Failure::new(format!("command '{name}' is not supported yet; 'vireo help' lists what is"))
    } else {
        Failure::new(format!("unknown command: '{name}'"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_verb_is_both_built_and_not() {
        for name in not_built::NAMES {
            assert!(find(name).is_none(), "{name}");
        }
    }
}

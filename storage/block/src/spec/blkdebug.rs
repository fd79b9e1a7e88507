//! Rules of blkdebug in a name: `inject-error.0.event=...`, or a list in JSON.

use super::{SpecError, tree};
use crate::blkdebug::{BlkdebugOptions, Limits, Section, rules_of};

/// What can be done to a node of QEMU's graph (`BlockPermission` in `qapi/block-core.json`).
const PERMISSIONS: [&str; 4] = ["consistent-read", "write", "write-unchanged", "resize"];

/// What a name says of a blkdebug layer, beside its file of rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlkdebugSpec {
    /// What it means.
    pub options: BlkdebugOptions,
    /// It takes a permission that a file opened for reading does not have.
    pub takes_write: bool,
    /// As it was given, with dotted names.
    pub(super) given: Vec<(String, String)>,
}

impl BlkdebugSpec {
    pub(super) fn is_empty(&self) -> bool {
        self.given.is_empty()
    }

    /// Takes its options out of those of a layer.
    pub(super) fn take(map: &mut tree::Map) -> Result<BlkdebugSpec, SpecError> {
        let mut spec = BlkdebugSpec::default();
        let mut sections = Vec::new();
        for section in Section::ALL {
            let name = section.name();
            let mut listed = match map.remove(name) {
                None => continue,
                Some(tree::Tree::Map(listed)) => listed,
                Some(_) => return Err(SpecError::Parameter(name.to_owned())),
            };
            for index in 0.. {
                let Some(one) = listed.remove(&index.to_string()) else { break };
                let tree::Tree::Map(options) = one else { return Err(SpecError::Parameter(format!("{name}.{index}"))) };
                let options = tree::flatten(options);
                let dotted = options.iter().map(|(option, value)| (format!("{name}.{index}.{option}"), value.clone()));
                spec.given.extend(dotted);
                sections.push((section, options));
            }
            if let Some(option) = listed.into_keys().next() {
                return Err(SpecError::Parameter(format!("{name}.{option}")));
            }
        }
        spec.options.rules = rules_of(&sections)?;
        let taken = take_permissions(map, "take-child-perms")?;
        spec.takes_write = taken.iter().any(|(_, permission)| permission.starts_with("write"));
        spec.given.extend(taken);
        spec.given.extend(take_permissions(map, "unshare-child-perms")?);
        let mut limits = [0; Limits::OPTIONS.len()];
        for (option, limit) in Limits::OPTIONS.into_iter().zip(&mut limits) {
            if let Some(text) = tree::take_leaf(map, option)? {
                *limit = tree::number(option, &text)?;
                spec.given.push((option.to_owned(), text));
            }
        }
        spec.options.limits = Limits::new(limits)?;
        Ok(spec)
    }
}

/// Takes a list of permissions, as dotted options. The locks of a file follow from how it is opened, whatever the list
/// says: nobody else shares the nodes of one process.
fn take_permissions(map: &mut tree::Map, name: &str) -> Result<Vec<(String, String)>, SpecError> {
    let listed = match map.remove(name) {
        None => return Ok(Vec::new()),
        Some(tree::Tree::Map(listed)) => listed,
        Some(_) => {
            return Err(SpecError::ProtocolOption { driver: "blkdebug".to_owned(), option: name.to_owned() });
        }
    };
    let wrong = |place: &str, expected| SpecError::Type { place: place.to_owned(), expected };
    let mut indices = Vec::new();
    for index in listed.keys() {
        indices.push(index.parse::<usize>().map_err(|_| wrong("<anonymous>", "array"))?);
    }
    if let Some(largest) = indices.iter().max().filter(|largest| **largest >= listed.len()) {
        return Err(SpecError::ListIndices { seen: listed.len(), largest: *largest });
    }
    let mut given = Vec::new();
    for (index, tree) in listed {
        match tree {
            tree::Tree::Leaf(text) if PERMISSIONS.contains(&text.as_str()) => {
                given.push((format!("{name}.{index}"), text));
            }
            tree::Tree::Leaf(found) => return Err(SpecError::Value { option: "null".to_owned(), found }),
            _ => return Err(wrong(&format!("[{index}]"), "string")),
        }
    }
    Ok(given)
}

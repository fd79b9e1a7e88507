//! Rules of blkdebug in a name: `inject-error.0.event=...`, or a list in JSON.

use super::{SpecError, tree};
use crate::blkdebug::{BlkdebugOptions, Section, rules_of};

/// Most bytes `max-transfer` may say.
const TRANSFER_MAX_BYTES: u64 = i32::MAX as u64;

/// What a name says of a blkdebug layer, beside its file of rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlkdebugSpec {
    /// What it means.
    pub options: BlkdebugOptions,
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
        if let Some(text) = tree::take_leaf(map, "max-transfer")? {
            let value = tree::number("max-transfer", &text)?;
            if value >= TRANSFER_MAX_BYTES {
                return Err(SpecError::Constraint { option: "max-transfer", value });
            }
            spec.options.max_transfer = Some(value);
            spec.given.push(("max-transfer".to_owned(), text));
        }
        Ok(spec)
    }
}

//! A domain definition: the tree and what was read from it, always in step.

use uuid::Uuid;

use crate::config::{self, DomainConfig};
use crate::disk_driver;
use crate::error::DomainXmlError;
use crate::iotune;
use crate::normalise;
use crate::order;
use crate::parse::parse_document;
use crate::support;
use crate::tree::Element;
use crate::write::to_document;

/// What libvirt calls the document in its errors.
const LABEL: &str = "domain_definition";
/// Children of the root whose content is the user's own and is kept byte for byte.
const VERBATIM: &[&str] = &["metadata"];

/// What a define needs to know besides the document.
pub struct DefineContext<'a> {
    /// Put into `<emulator>` where the document has none.
    pub emulator: &'a str,
    /// Gives random bytes for a new uuid or MAC address.
    pub random: &'a mut dyn FnMut() -> [u8; 16],
}

/// A definition in libvirt's shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainDefinition {
    pub(crate) root: Element,
    pub(crate) config: DomainConfig,
}

impl DomainDefinition {
    /// Reads what a client sent, fills in what libvirt's define fills in, and puts everything in its order. What cannot be
    /// built is not refused here: see [`DomainDefinition::check_buildable`].
    pub fn define(bytes: &[u8], context: &mut DefineContext<'_>) -> Result<DomainDefinition, DomainXmlError> {
        let mut root = parse(bytes)?;
        normalise::normalise(&mut root, context)?;
        let config = DomainConfig::read(&root)?;
        normalise::check_unique_targets(&config)?;
        disk_driver::check(&config)?;
        iotune::check(&config.disks)?;
        Ok(DomainDefinition { root, config })
    }

    /// Reads what [`DomainDefinition::to_xml`] wrote. Definitions of a stock libvirt are taken as they are too, so that
    /// they show up and can be edited.
    pub fn load(bytes: &[u8]) -> Result<DomainDefinition, DomainXmlError> {
        let root = parse(bytes)?;
        let config = DomainConfig::read(&root)?;
        Ok(DomainDefinition { root, config })
    }

    /// Name and uuid of a document, with no regard to the rest: enough to ask who may use it and whether it exists.
    pub fn identify(bytes: &[u8]) -> Result<(String, Option<Uuid>), DomainXmlError> {
        let root = parse(bytes)?;
        Ok((config::read_name(&root)?, config::read_uuid(&root)?))
    }

    /// Refuses, by name, whatever would have to be left out of the machine.
    pub fn check_buildable(&self) -> Result<(), DomainXmlError> {
        support::check(&self.root, &self.config)
    }

    /// Refuses elements that libvirt's format does not have, where a client asked for validation.
    pub fn check_schema(&self) -> Result<(), DomainXmlError> {
        let devices = self.root.get("devices");
        let os = self.root.get("os");
        let disks = devices.into_iter().flat_map(|devices| devices.all("disk"));
        let parents = [(Some(&self.root), order::DOMAIN), (devices, order::DEVICES), (os, order::OS)];
        let all = parents.into_iter().filter_map(|(parent, order)| Some((parent?, order)));
        for (parent, order) in all.chain(disks.map(|disk| (disk, order::DISK))) {
            if let Some(element) = order::unknown_child(parent, order) {
                return Err(DomainXmlError::ExtraElement { element, parent: parent.name.clone() });
            }
        }
        Ok(())
    }

    /// What was read.
    pub fn config(&self) -> &DomainConfig {
        &self.config
    }

    /// The tree.
    pub fn root(&self) -> &Element {
        &self.root
    }

    /// The document in libvirt's style, with a newline at the end.
    pub fn to_xml(&self) -> String {
        to_document(&self.root)
    }

    /// Gives the domain another name.
    pub fn rename(&mut self, name: &str) -> Result<(), DomainXmlError> {
        config::check_name(name)?;
        self.change(|root| root.get_or_add("name").set_text(name))
    }

    /// Gives the domain another uuid.
    pub fn set_uuid(&mut self, uuid: Uuid) -> Result<(), DomainXmlError> {
        self.change(|root| root.get_or_add("uuid").set_text(uuid.to_string()))
    }

    /// Changes the tree and reads it again; where that fails nothing has changed.
    pub(crate) fn change(&mut self, edit: impl FnOnce(&mut Element)) -> Result<(), DomainXmlError> {
        let mut root = self.root.clone();
        edit(&mut root);
        order::sort(&mut root, order::DOMAIN);
        self.config = DomainConfig::read(&root)?;
        self.root = root;
        Ok(())
    }
}

fn parse(bytes: &[u8]) -> Result<Element, DomainXmlError> {
    let root = parse_document(bytes, LABEL, VERBATIM)?;
    if root.name != "domain" {
        return Err(DomainXmlError::RootName { expected: "domain", found: root.name });
    }
    Ok(root)
}

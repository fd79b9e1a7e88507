//! `<metadata>`: elements of other people's namespaces, one per namespace, kept as they were written.

use crate::definition::DomainDefinition;
use crate::error::DomainXmlError;
use crate::parse::{SyntaxError, parse_document};
use crate::tree::{Element, Node};
use crate::write::to_compact;

impl DomainDefinition {
    /// The element of namespace `uri`, without its prefix, as libvirt returns it.
    pub fn metadata(&self, uri: &str) -> Option<String> {
        let metadata = self.metadata_tree().ok()?;
        let mut found = metadata.elements().find(|element| namespace_of(element) == Some(uri))?.clone();
        strip_prefix(&mut found, uri);
        Some(to_compact(&found))
    }

    /// Replaces the element of namespace `uri` by `document` under the prefix `key`, or removes it. Says whether there was
    /// one before.
    pub fn set_metadata(&mut self, uri: &str, key: &str, document: Option<&str>) -> Result<bool, DomainXmlError> {
        let mut metadata = self.metadata_tree()?;
        let before = metadata.children.len();
        metadata.children.retain(|node| match node {
            Node::Element(element) => namespace_of(element) != Some(uri),
            Node::Text(_) | Node::Verbatim(_) => true,
        });
        let existed = metadata.children.len() < before;
        if let Some(document) = document {
            let mut element = parse_document(document.as_bytes(), "metadata_xml", &[])?;
            add_prefix(&mut element, key);
            let declaration = (format!("xmlns:{key}"), uri.to_owned());
            element.attributes.retain(|(name, _)| *name != declaration.0);
            element.attributes.insert(0, declaration);
            metadata.push(element);
        }
        self.change(|root| {
            root.remove("metadata");
            if metadata.elements().next().is_some() {
                let mut holder = Element::new("metadata");
                holder.children.push(Node::Verbatim(to_verbatim(&metadata)));
                root.push(holder);
            }
        })?;
        Ok(existed)
    }

    fn metadata_tree(&self) -> Result<Element, SyntaxError> {
        let Some(metadata) = self.root.get("metadata") else { return Ok(Element::new("metadata")) };
        let raw: String = metadata
            .children
            .iter()
            .map(|node| match node {
                Node::Verbatim(raw) => raw.clone(),
                Node::Text(_) => String::new(),
                Node::Element(element) => to_compact(element),
            })
            .collect();
        parse_document(format!("<metadata>{raw}</metadata>").as_bytes(), "metadata_xml", &[])
    }
}

/// Namespace of an element whose declaration it carries itself.
fn namespace_of(element: &Element) -> Option<&str> {
    match element.name.split_once(':') {
        Some((prefix, _)) => element.attribute(&format!("xmlns:{prefix}")),
        None => element.attribute("xmlns"),
    }
}

fn strip_prefix(element: &mut Element, uri: &str) {
    let prefix = element.name.split_once(':').map(|(prefix, _)| prefix.to_owned());
    element.attributes.retain(|(name, value)| !(name.starts_with("xmlns") && value == uri));
    if let Some(prefix) = prefix {
        rename(element, &|name| name.strip_prefix(&format!("{prefix}:")).map(str::to_owned));
    }
}

fn add_prefix(element: &mut Element, key: &str) {
    rename(element, &|name| (!name.contains(':')).then(|| format!("{key}:{name}")));
}

/// Renames an element and everything below it; the depth is bounded by the parser.
fn rename(element: &mut Element, to: &dyn Fn(&str) -> Option<String>) {
    if let Some(name) = to(&element.name) {
        element.name = name;
    }
    for child in element.elements_mut() {
        rename(child, to);
    }
}

fn to_verbatim(metadata: &Element) -> String {
    let mut raw = String::new();
    for element in metadata.elements() {
        raw.push_str("\n    ");
        raw.push_str(&to_compact(element));
    }
    raw.push_str("\n  ");
    raw
}

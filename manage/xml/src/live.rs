//! The document of a running domain: the definition plus what the run added.

use crate::definition::DomainDefinition;
use crate::tree::{Element, Node};

/// A console's host end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LivePty {
    /// Alias of the device ([`crate::CharDevice::alias`]).
    pub alias: String,
    /// Path of the pseudo terminal a client may open.
    pub path: String,
}

/// What a run adds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveDetails {
    /// Domain id.
    pub id: i32,
    /// Pseudo terminals, by alias.
    pub ptys: Vec<LivePty>,
    /// Per disk in order, its backing files from top to bottom: format and path.
    pub backing: Vec<Vec<(String, String)>>,
}

impl DomainDefinition {
    /// The definition with `details` written into it.
    pub fn live(&self, details: &LiveDetails) -> DomainDefinition {
        let mut live = self.clone();
        let id = ("id".into(), details.id.to_string());
        live.root.attributes.insert(1.min(live.root.attributes.len()), id);
        if let Some(devices) = live.root.get_mut("devices") {
            add_details(devices, details);
        }
        live
    }
}

fn add_details(devices: &mut Element, details: &LiveDetails) {
    let pty = |alias: &str| details.ptys.iter().find(|pty| pty.alias == alias).map(|pty| pty.path.clone());
    let (mut disks, mut serials, mut consoles, mut nets, mut rngs) = (0, 0, 0, 0, 0);
    let next = |counter: &mut usize| {
        *counter += 1;
        *counter - 1
    };
    for device in devices.elements_mut() {
        let alias = match device.name.as_str() {
            "disk" => {
                let index = next(&mut disks);
                add_backing(device, details.backing.get(index).map_or(&[][..], Vec::as_slice));
                let bus = device.child_attribute("target", "bus").unwrap_or("virtio").to_owned();
                format!("{bus}-disk{index}")
            }
            "serial" => {
                let alias = format!("serial{}", next(&mut serials));
                add_pty(device, pty(&alias));
                alias
            }
            "console" => {
                let index = next(&mut consoles);
                let mirror = device.child_attribute("target", "type") != Some("virtio");
                // A mirror shows its serial port's alias and terminal.
                let alias = if mirror { "serial0".into() } else { format!("console{index}") };
                if let Some(path) = pty(&alias) {
                    device.set_attribute("tty", path);
                }
                add_pty(device, pty(&alias));
                alias
            }
            "interface" => format!("net{}", next(&mut nets)),
            "rng" => format!("rng{}", next(&mut rngs)),
            "controller" => controller_alias(device),
            _ => continue,
        };
        add_alias(device, &alias);
    }
}

fn controller_alias(controller: &Element) -> String {
    let kind = controller.attribute("type").unwrap_or_default();
    let index = controller.attribute("index").unwrap_or("0");
    match (kind, index) {
        ("pci", "0") => "pcie.0".into(),
        ("pci", index) => format!("pci.{index}"),
        (kind, "0") => kind.into(),
        (kind, index) => format!("{kind}{index}"),
    }
}

/// The alias stands before the address, or last.
fn add_alias(device: &mut Element, alias: &str) {
    let at = device.children.iter().position(|node| matches!(node, Node::Element(e) if e.name == "address"));
    let alias = Node::Element(Element::new("alias").with("name", alias));
    device.children.insert(at.unwrap_or(device.children.len()), alias);
}

fn add_pty(device: &mut Element, path: Option<String>) {
    let Some(path) = path else { return };
    device.remove("source");
    device.children.insert(0, Node::Element(Element::new("source").with("path", path)));
}

fn add_backing(disk: &mut Element, backing: &[(String, String)]) {
    disk.remove("backingStore");
    let mut chain = Element::new("backingStore");
    for (format, path) in backing.iter().rev() {
        chain = Element::new("backingStore")
            .with("type", "file")
            .child(Element::new("format").with("type", format))
            .child(Element::new("source").with("file", path))
            .child(chain);
    }
    let at = disk.children.iter().position(|node| matches!(node, Node::Element(e) if e.name == "source"));
    disk.children.insert(at.map_or(0, |at| at + 1), Node::Element(chain));
}

impl DomainDefinition {
    /// Alias and pseudo terminal of a running domain's console: of the one called `alias`, else of the first.
    pub fn console_pty(&self, alias: Option<&str>) -> Option<LivePty> {
        let devices = self.root.get("devices")?;
        let serials = devices.all("serial").chain(devices.all("console"));
        let mut ptys = serials.filter_map(|device| {
            let alias = device.child_attribute("alias", "name")?.to_owned();
            let path = device.child_attribute("source", "path")?.to_owned();
            Some(LivePty { alias, path })
        });
        ptys.find(|pty| alias.is_none_or(|alias| pty.alias == alias))
    }
}

//! What a define adds and changes, as libvirt does it: units, defaults, mirrored consoles, order. Only what the machine
//! has is added: no USB, SATA or balloon appears that a guest would look for in vain.

use std::collections::HashMap;

use uuid::Uuid;

use crate::config::{self, DomainConfig};
use crate::definition::DefineContext;
use crate::disk_driver;
use crate::error::DomainXmlError;
use crate::iotune::{self, IoTune};
use crate::order;
use crate::tree::{Element, Node};
use crate::units::memory_kib;

/// The machine type that `q35` stands for.
pub(crate) const MACHINE: &str = "vireo-q35-1";
/// The only architecture.
const ARCH: &str = "x86_64";

pub(crate) fn normalise(root: &mut Element, context: &mut DefineContext<'_>) -> Result<(), DomainXmlError> {
    let virt_type = config::read_type(root)?;
    // Attributes of a running domain's document mean nothing in a definition.
    root.attributes.retain(|(name, _)| name == "type" || name.starts_with("xmlns"));
    root.set_attribute("type", virt_type.as_str());
    config::read_name(root)?;
    normalise_uuid(root, context)?;
    if root.child_text("title").is_some_and(|title| title.contains('\n')) {
        return Err(DomainXmlError::TitleNewline);
    }
    normalise_memory(root)?;
    normalise_vcpu(root)?;
    normalise_os(root)?;
    for name in ["resource", "seclabel"] {
        // Written into documents of running domains by a stock libvirt.
        root.remove(name);
    }
    if root.get("clock").is_none() {
        root.push(Element::new("clock").with("offset", "utc"));
    }
    for (name, default) in [("on_poweroff", "destroy"), ("on_reboot", "restart"), ("on_crash", "destroy")] {
        if root.get(name).is_none() {
            root.push(Element::new(name).text_node(default));
        }
    }
    normalise_devices(root.get_or_add("devices"), context)?;
    drop_stray_text(root);
    order::sort(root, order::DOMAIN);
    Ok(())
}

/// Text beside child elements means nothing in this format; kept, it would grow with every definition. The depth is
/// bounded by the parser, and the content of `<metadata>` is not looked into.
fn drop_stray_text(element: &mut Element) {
    if element.elements().next().is_some() {
        element.children.retain(|node| !matches!(node, Node::Text(_)));
    }
    element.elements_mut().for_each(drop_stray_text);
}

fn normalise_uuid(root: &mut Element, context: &mut DefineContext<'_>) -> Result<(), DomainXmlError> {
    let uuid = match config::read_uuid(root)? {
        Some(uuid) => uuid,
        None => uuid::Builder::from_random_bytes((context.random)()).into_uuid(),
    };
    root.get_or_add("uuid").set_text(Uuid::to_string(&uuid));
    Ok(())
}

fn normalise_memory(root: &mut Element) -> Result<(), DomainXmlError> {
    let memory = root.get("memory").ok_or(DomainXmlError::NoMemory)?;
    let max = memory_kib(memory, "./memory[1]")?;
    if max == 0 {
        return Err(DomainXmlError::NoMemory);
    }
    let current = match root.get("currentMemory") {
        Some(element) => memory_kib(element, "./currentMemory[1]")?.min(max),
        None => max,
    };
    for (name, kib) in [("memory", max), ("currentMemory", if current == 0 { max } else { current })] {
        let element = root.get_or_add(name);
        element.set_attribute("unit", "KiB");
        element.set_text(kib.to_string());
    }
    Ok(())
}

fn normalise_vcpu(root: &mut Element) -> Result<(), DomainXmlError> {
    let (max, current) = config::read_vcpus(root)?;
    let vcpu = root.get_or_add("vcpu");
    if vcpu.attribute("placement").is_none() {
        vcpu.attributes.insert(0, ("placement".into(), "static".into()));
    }
    if current == max {
        vcpu.remove_attribute("current");
    }
    vcpu.set_text(max.to_string());
    Ok(())
}

fn normalise_os(root: &mut Element) -> Result<(), DomainXmlError> {
    let boots_by_device = root.get("devices").is_some_and(|devices| {
        devices.elements().any(|device| device.get("boot").is_some_and(|boot| boot.attribute("order").is_some()))
    });
    let os = root.get_mut("os").ok_or(DomainXmlError::NoOsType)?;
    let kind = os.get_mut("type").ok_or(DomainXmlError::NoOsType)?;
    let text = kind.text();
    if text.trim() != "hvm" {
        return Err(DomainXmlError::OsType { found: text.trim().into() });
    }
    let arch = kind.attribute("arch").unwrap_or(ARCH);
    if arch != ARCH {
        return Err(DomainXmlError::UnknownArch { found: arch.into() });
    }
    let machine = canonical_machine(kind.attribute("machine").unwrap_or("q35")).to_owned();
    kind.attributes = vec![("arch".into(), ARCH.into()), ("machine".into(), machine)];
    kind.set_text("hvm");
    if os.get("boot").is_none() && !boots_by_device {
        os.push(Element::new("boot").with("dev", "hd"));
    }
    order::sort(os, order::OS);
    Ok(())
}

/// The versioned name of a machine type. QEMU's q35 in all its versions is taken as a wish for a q35.
fn canonical_machine(machine: &str) -> &str {
    let is_q35 = machine == "q35" || machine.starts_with("pc-q35-");
    if is_q35 { MACHINE } else { machine }
}

fn normalise_devices(devices: &mut Element, context: &mut DefineContext<'_>) -> Result<(), DomainXmlError> {
    if devices.get("emulator").is_none() {
        devices.push(Element::new("emulator").text_node(context.emulator));
    }
    for device in devices.elements_mut() {
        device.remove("alias");
        match device.name.as_str() {
            "disk" => normalise_disk(device)?,
            "interface" => normalise_interface(device, context)?,
            "serial" | "console" => {
                device.remove_attribute("tty");
                if device.attribute("type").is_none_or(|kind| kind == "pty") {
                    device.set_attribute("type", "pty");
                    // The path belongs to a run of the domain, not to its definition.
                    device.remove("source");
                }
            }
            "rng" if device.attribute("model").is_none() => device.set_attribute("model", "virtio"),
            _ => {}
        }
    }
    normalise_consoles(devices);
    let has_root = |e: &Element| e.attribute("type") == Some("pci") && e.attribute("model") == Some("pcie-root");
    if !devices.all("controller").any(has_root) {
        let root = Element::new("controller").with("type", "pci").with("index", "0").with("model", "pcie-root");
        devices.push(root);
    }
    if devices.get("memballoon").is_none() {
        devices.push(Element::new("memballoon").with("model", "none"));
    }
    order::sort(devices, order::DEVICES);
    Ok(())
}

fn normalise_disk(disk: &mut Element) -> Result<(), DomainXmlError> {
    let kind = disk.attribute("type").unwrap_or("file").to_owned();
    let device = disk.attribute("device").unwrap_or("disk").to_owned();
    disk.remove_attribute("type");
    disk.remove_attribute("device");
    let rest = std::mem::take(&mut disk.attributes);
    disk.attributes = vec![("type".into(), kind), ("device".into(), device)];
    disk.attributes.extend(rest);
    disk.remove("backingStore");
    if let Some(source) = disk.get_mut("source") {
        source.remove_attribute("index");
    }
    let driver = disk.get_or_add("driver");
    for (at, name, default) in [(0, "name", "qemu"), (1, "type", "raw")] {
        if driver.attribute(name).is_none() {
            driver.attributes.insert(at.min(driver.attributes.len()), (name.into(), default.into()));
        }
    }
    disk_driver::normalise(driver);
    if let Some(target) = disk.get_mut("target")
        && let Some(bus) = target.attribute("dev").map(config::default_bus)
        && target.attribute("bus").is_none()
    {
        target.set_attribute("bus", bus);
    }
    if let Some(tune) = disk.get("iotune").map(IoTune::read).transpose()? {
        iotune::write(disk, &tune);
    }
    order::sort(disk, order::DISK);
    Ok(())
}

fn normalise_interface(interface: &mut Element, context: &mut DefineContext<'_>) -> Result<(), DomainXmlError> {
    match interface.child_attribute("mac", "address") {
        Some(mac) => check_mac(mac)?,
        None => {
            let [a, b, c, ..] = (context.random)();
            let mac = Element::new("mac").with("address", format!("52:54:00:{a:02x}:{b:02x}:{c:02x}"));
            interface.children.insert(0, Node::Element(mac));
        }
    }
    // Host device names of this kind are given anew at every start.
    if interface.child_attribute("target", "dev").is_some_and(|dev| dev.starts_with("vnet")) {
        interface.remove("target");
    }
    if interface.get("model").is_none() {
        interface.push(Element::new("model").with("type", "virtio"));
    }
    Ok(())
}

fn check_mac(mac: &str) -> Result<(), DomainXmlError> {
    let bad = || DomainXmlError::BadMac { mac: mac.into() };
    let bytes: Vec<u8> = mac
        .split(':')
        .map(|part| if part.len() <= 2 { u8::from_str_radix(part, 16).map_err(|_| bad()) } else { Err(bad()) })
        .collect::<Result<_, _>>()?;
    match bytes.as_slice() {
        [first, _, _, _, _, _] if first & 1 == 1 => Err(DomainXmlError::MulticastMac { mac: mac.into() }),
        [_, _, _, _, _, _] => Ok(()),
        _ => Err(bad()),
    }
}

/// The first console and the first serial port are two views of one device: whichever is missing is made from the other.
fn normalise_consoles(devices: &mut Element) {
    let is_mirror = |e: &Element| !matches!(e.child_attribute("target", "type"), Some(kind) if kind != "serial");
    let first = devices.get("console").filter(|console| is_mirror(console)).cloned();
    if devices.get("serial").is_none() {
        let Some(console) = &first else { return };
        let mut serial = Element { name: "serial".into(), ..console.clone() };
        serial.remove("target");
        devices.push(serial);
    }
    for (index, serial) in devices.elements_mut().filter(|element| element.name == "serial").enumerate() {
        let target = serial.get_or_add("target");
        if target.attribute("type").is_none() {
            target.attributes.insert(0, ("type".into(), "isa-serial".into()));
        }
        if target.attribute("port").is_none() {
            target.set_attribute("port", index.to_string());
        }
        if target.get("model").is_none() {
            target.push(Element::new("model").with("name", "isa-serial"));
        }
    }
    let Some(mirrored) = devices.get("serial").cloned() else { return };
    let port = mirrored.child_attribute("target", "port").unwrap_or("0").to_owned();
    let mut console = Element { name: "console".into(), ..mirrored };
    console.remove("target");
    console.remove("address");
    console.push(Element::new("target").with("type", "serial").with("port", port));
    if first.is_some() {
        if let Some(old) = devices.get_mut("console") {
            *old = console;
        }
    } else {
        let at = devices.children.iter().position(|node| matches!(node, Node::Element(e) if e.name == "console"));
        devices.children.insert(at.unwrap_or(devices.children.len()), Node::Element(console));
    }
}

/// Refuses two disks with one name.
pub(crate) fn check_unique_targets(config: &DomainConfig) -> Result<(), DomainXmlError> {
    let mut seen: HashMap<&str, &str> = HashMap::new();
    for disk in &config.disks {
        if let Some(first) = seen.insert(&disk.target, disk.source.display()) {
            return Err(DomainXmlError::DuplicateTarget {
                target: disk.target.clone(),
                first: first.into(),
                second: disk.source.display().into(),
            });
        }
    }
    Ok(())
}

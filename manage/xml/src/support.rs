//! What is refused by name, because leaving it out in silence would give the guest another machine than was asked for.

use crate::config::{CharSource, ClockOffset, CpuMode, Disk, DiskSource, DomainConfig, SerialTarget, VirtType};
use crate::disk_driver::{DiskDriver, QUEUE_SIZE_MAX, QUEUES_MAX};
use crate::error::DomainXmlError;
use crate::tree::Element;

/// Devices that are not built, with what to do instead.
const DEVICES: &[(&str, &str)] = &[
    ("filesystem", "share files over the network instead"),
    ("hostdev", "host devices cannot be passed to a guest"),
    ("redirdev", "USB redirection does not exist"),
    ("smartcard", "remove the element"),
    ("parallel", "use a serial port"),
    ("channel", "there is no virtio-serial bus; guest agents cannot be reached"),
    ("tpm", "remove the element"),
    ("graphics", "there is no display; use the serial console"),
    ("sound", "remove the element"),
    ("hub", "there is no USB"),
    ("watchdog", "remove the element"),
    ("panic", "remove the element"),
    ("shmem", "remove the element"),
    ("memory", "memory devices cannot be added; raise <memory>"),
    ("iommu", "remove the element"),
    ("vsock", "remove the element"),
    ("crypto", "remove the element"),
    ("pstore", "remove the element"),
    ("lease", "remove the element"),
    ("nvram", "remove the element"),
];

/// Children of `<domain>` that are not built.
const DOMAIN: &[(&str, &str)] = &[
    ("launchSecurity", "memory encryption does not exist"),
    ("maxMemory", "memory cannot grow while the guest runs; raise <memory>"),
    ("genid", "remove the element"),
    ("sysinfo", "the guest's SMBIOS cannot be set"),
    ("idmap", "it belongs to containers"),
    ("bootloader", "give <kernel> in <os>"),
    ("keywrap", "it belongs to s390"),
    ("throttlegroups", "give <iotune> with a <group_name> in each disk"),
];

/// Refuses what the machine would have to have and has not.
pub(crate) fn check(root: &Element, config: &DomainConfig) -> Result<(), DomainXmlError> {
    check_children(root, DOMAIN)?;
    let os = root.get("os");
    for (name, help) in [
        ("loader", "there is no firmware; give <kernel>"),
        ("nvram", "there is no firmware; give <kernel>"),
        ("dtb", "it belongs to ARM"),
        ("init", "it belongs to containers"),
    ] {
        if os.is_some_and(|os| os.get(name).is_some()) {
            return Err(DomainXmlError::ElementNotBuilt { element: name.into(), help });
        }
    }
    if let Some(firmware) = os.and_then(|os| os.attribute("firmware")) {
        return not_built("firmware", firmware, "there is none yet; give <kernel> in <os>");
    }
    check_cpu(root, config)?;
    check_machine(root, config)?;
    if let Some(devices) = root.get("devices") {
        check_children(devices, DEVICES)?;
        check_devices(devices)?;
    }
    check_config(config)
}

fn not_built<T>(what: &'static str, found: &str, help: &'static str) -> Result<T, DomainXmlError> {
    Err(DomainXmlError::NotBuilt { what, found: found.into(), help })
}

fn check_children(parent: &Element, table: &[(&str, &'static str)]) -> Result<(), DomainXmlError> {
    for child in parent.elements() {
        if let Some((_, help)) = table.iter().find(|(name, _)| *name == child.name) {
            return Err(DomainXmlError::ElementNotBuilt { element: child.name.clone(), help });
        }
    }
    Ok(())
}

fn check_cpu(root: &Element, config: &DomainConfig) -> Result<(), DomainXmlError> {
    let Some(cpu) = root.get("cpu") else { return Ok(()) };
    for name in ["numa", "cache"] {
        if cpu.get(name).is_some() {
            let help = "remove it from <cpu>: the guest sees one node and the host's caches";
            return Err(DomainXmlError::ElementNotBuilt { element: name.into(), help });
        }
    }
    match (config.cpu, config.virt_type) {
        (Some(CpuMode::Custom), _) => {
            let model = cpu.child_text("model").unwrap_or_default();
            not_built("CPU model", &model, "use <cpu mode='maximum'/>")
        }
        (Some(CpuMode::HostPassthrough), VirtType::Qemu) => {
            not_built("CPU mode of a qemu domain", "host-passthrough", "use <cpu mode='maximum'/>")
        }
        (Some(CpuMode::HostModel), VirtType::Qemu) => {
            not_built("CPU mode of a qemu domain", "host-model", "use <cpu mode='maximum'/>")
        }
        _ => match cpu.get("feature").and_then(|feature| feature.attribute("name")) {
            Some(feature) => not_built("CPU feature switch", feature, "use <cpu mode='maximum'/> alone"),
            None => Ok(()),
        },
    }
}

fn check_machine(root: &Element, config: &DomainConfig) -> Result<(), DomainXmlError> {
    if config.os.machine != super::normalise::MACHINE {
        return not_built("machine type", &config.os.machine, "use q35");
    }
    if config.clock == ClockOffset::Other {
        let found = root.child_attribute("clock", "offset").unwrap_or_default();
        return not_built("clock offset", found, "use utc or localtime");
    }
    Ok(())
}

/// Elements of `<devices>` that exist in a form we have and forms we do not.
fn check_devices(devices: &Element) -> Result<(), DomainXmlError> {
    for device in devices.elements() {
        let kind = device.attribute("type").unwrap_or_default();
        let model = device.attribute("model").unwrap_or_default();
        match device.name.as_str() {
            "input" if device.attribute("bus") != Some("ps2") => {
                return not_built("input device", kind, "there is no USB; remove it");
            }
            "audio" if kind != "none" => return not_built("audio backend", kind, "use type 'none'"),
            "video" if device.child_attribute("model", "type") != Some("none") => {
                let found = device.child_attribute("model", "type").unwrap_or("default");
                return not_built("video model", found, "there is no display; use the serial console");
            }
            "controller" if kind == "scsi" && model != "none" => {
                return not_built("controller", kind, "put disks on virtio or nvme");
            }
            "rng" => {
                let backend = device.child_attribute("backend", "model").unwrap_or("random");
                if !matches!(backend, "random" | "builtin") {
                    return not_built("random number source", backend, "use random");
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn check_driver(disk: &Disk) -> Result<(), DomainXmlError> {
    let DiskDriver { name, queues, queue_size, not_built: missing, .. } = &disk.driver;
    if let Some(name) = name.as_deref().filter(|name| *name != "qemu") {
        return not_built("disk driver", name, "use qemu");
    }
    if let Some((attribute, value)) = missing {
        return not_built(attribute, value, "remove the attribute from <driver>");
    }
    if *queues > QUEUES_MAX {
        return not_built("number of disk queues", &queues.to_string(), "at most 16");
    }
    if *queue_size > 0 && (!queue_size.is_power_of_two() || !(2..=QUEUE_SIZE_MAX).contains(queue_size)) {
        return not_built("disk queue_size", &queue_size.to_string(), "it must be a power of 2, at most 1024");
    }
    Ok(())
}

fn check_config(config: &DomainConfig) -> Result<(), DomainXmlError> {
    for disk in &config.disks {
        if disk.device != "disk" {
            return not_built("disk device", &disk.device, "only device='disk' exists");
        }
        if !matches!(disk.bus.as_str(), "virtio" | "nvme") {
            return not_built("disk bus", &disk.bus, "use virtio or nvme");
        }
        if !matches!(disk.format.as_str(), "raw" | "qcow2") {
            return not_built("image format", &disk.format, "use raw or qcow2");
        }
        match &disk.source {
            DiskSource::File(_) | DiskSource::Block(_) => {}
            DiskSource::Volume { pool, .. } => {
                return not_built("disk in storage pool", pool, "give the volume's path with type='file'");
            }
            DiskSource::Empty => return not_built("disk without a source", &disk.target, "add <source file='…'/>"),
            DiskSource::Other(kind) => return not_built("disk type", kind, "use file or block"),
        }
        check_driver(disk)?;
        if disk.serial.as_ref().is_some_and(|serial| serial.len() > 20) {
            return not_built("disk serial number", &disk.target, "at most 20 bytes");
        }
    }
    for device in &config.char_devices {
        if let CharSource::Other(kind) = &device.source {
            return not_built("character device type", kind, "use pty");
        }
        if let SerialTarget::Serial(port @ 4..) = device.target {
            return not_built("serial port", &port.to_string(), "use 0 to 3");
        }
    }
    Ok(())
}

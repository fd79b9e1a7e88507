//! The order libvirt writes elements in, which is also the list of elements it knows.

use crate::tree::{Element, Node};

/// Children of `<domain>`.
#[rustfmt::skip]
pub(crate) const DOMAIN: &[&str] = &[
    "name", "uuid", "hwuuid", "genid", "title", "description", "metadata", "maxMemory", "memory", "currentMemory",
    "blkiotune", "memtune", "memoryBacking", "vcpu", "vcpus", "iothreads", "iothreadids", "defaultiothread", "cputune",
    "numatune", "resource", "sysinfo", "bootloader", "bootloader_args", "os", "idmap", "throttlegroups", "features",
    "cpu", "clock", "on_poweroff", "on_reboot", "on_crash", "on_lockfailure", "pm", "perf", "keywrap", "devices",
    "seclabel", "launchSecurity",
];

/// Children of `<devices>`.
#[rustfmt::skip]
pub(crate) const DEVICES: &[&str] = &[
    "emulator", "disk", "controller", "lease", "filesystem", "interface", "smartcard", "serial", "parallel", "console",
    "channel", "input", "tpm", "graphics", "sound", "audio", "video", "hostdev", "redirdev", "redirfilter", "hub",
    "watchdog", "memballoon", "rng", "nvram", "panic", "shmem", "memory", "iommu", "vsock", "crypto", "pstore",
];

/// Children of `<disk>`.
#[rustfmt::skip]
pub(crate) const DISK: &[&str] = &[
    "driver", "auth", "source", "backingStore", "mirror", "target", "iotune", "throttlefilters", "readonly",
    "shareable", "transient", "serial", "wwn", "vendor", "product", "encryption", "boot", "alias", "address",
];

/// Children of `<os>`.
#[rustfmt::skip]
pub(crate) const OS: &[&str] = &[
    "type", "init", "initarg", "firmware", "loader", "nvram", "kernel", "initrd", "cmdline", "dtb", "acpi", "boot",
    "bootmenu", "bios", "smbios",
];

/// Sorts the children of `element` into `order`. Elements of one name keep their order; unknown ones come last.
pub(crate) fn sort(element: &mut Element, order: &[&str]) {
    element.children.sort_by_key(|node| match node {
        Node::Element(child) => order.iter().position(|name| *name == child.name).unwrap_or(order.len()),
        Node::Text(_) | Node::Verbatim(_) => 0,
    });
}

/// First child of `element` that is not in `order`. Elements of foreign namespaces pass.
pub(crate) fn unknown_child(element: &Element, order: &[&str]) -> Option<String> {
    let known = |name: &str| order.contains(&name) || name.contains(':');
    element.elements().find(|child| !known(&child.name)).map(|child| child.name.clone())
}

//! The documents that tell clients what this host and its guests can be.

use std::path::Path;

use xml::{Element, VirtType};

use crate::drivers::connect::VCPUS_MAX;
use crate::host;

/// The versioned machine type.
const MACHINE: &str = "vireo-q35-1";
/// Names it is known by.
const MACHINES: [&str; 2] = ["q35", MACHINE];

/// Whether a domain may name this machine type.
pub fn is_machine(name: &str) -> bool {
    MACHINES.contains(&name) || name.starts_with("pc-q35-")
}

fn text(name: &str, value: impl Into<String>) -> Element {
    Element::new(name).text_node(value)
}

fn supported(name: &str, yes: bool) -> Element {
    Element::new(name).with("supported", if yes { "yes" } else { "no" })
}

fn choices(name: &str, values: &[&str]) -> Element {
    let mut element = Element::new("enum").with("name", name);
    values.iter().for_each(|value| element.push(text("value", *value)));
    element
}

/// `<capabilities>`: the host and what can run on it.
pub fn host(kvm: bool, vmm: &Path) -> Element {
    let topology = host::topology();
    let cpu = Element::new("cpu")
        .child(text("arch", topology.arch.as_str()))
        .child(
            Element::new("topology")
                .with("sockets", topology.sockets.to_string())
                .with("dies", "1")
                .with("cores", topology.cores.to_string())
                .with("threads", topology.threads.to_string()),
        )
        .child(Element::new("pages").with("unit", "KiB").with("size", "4"));
    let mut cells = Element::new("cells").with("num", topology.cells.len().to_string());
    for (id, cpus) in &topology.cells {
        cells.push(cell(*id, cpus));
    }
    let host = Element::new("host")
        .child(cpu)
        .child(Element::new("power_management"))
        .child(Element::new("iommu").with("support", "no"))
        .child(Element::new("topology").child(cells));
    Element::new("capabilities").child(host).child(guest(kvm, vmm))
}

fn cell(id: u32, cpus: &[u32]) -> Element {
    let memory = host::cell_memory(id).unwrap_or_default();
    let mut list = Element::new("cpus").with("num", cpus.len().to_string());
    for cpu in cpus {
        list.push(Element::new("cpu").with("id", cpu.to_string()));
    }
    Element::new("cell")
        .with("id", id.to_string())
        .child(text("memory", memory.total_kib.to_string()).with("unit", "KiB"))
        .child(text("pages", (memory.total_kib / 4).to_string()).with("unit", "KiB").with("size", "4"))
        .child(list)
}

fn guest(kvm: bool, vmm: &Path) -> Element {
    let vcpus = VCPUS_MAX.to_string();
    let mut arch = Element::new("arch")
        .with("name", "x86_64")
        .child(text("wordsize", "64"))
        .child(text("emulator", vmm.to_string_lossy()))
        // The first one is what clients take that do not know better.
        .child(text("machine", "q35").with("canonical", MACHINE).with("maxCpus", vcpus.as_str()))
        .child(text("machine", MACHINE).with("maxCpus", vcpus.as_str()))
        .child(Element::new("domain").with("type", VirtType::Qemu.as_str()));
    if kvm {
        arch.push(Element::new("domain").with("type", VirtType::Kvm.as_str()));
    }
    let features = Element::new("features")
        .child(Element::new("acpi").with("default", "on").with("toggle", "no"))
        .child(Element::new("apic").with("default", "on").with("toggle", "no"));
    Element::new("guest").child(text("os_type", "hvm")).child(arch).child(features)
}

/// `<domainCapabilities>`: what a domain of a type may have.
pub fn domain(virt_type: VirtType, vmm: &Path) -> Element {
    let disk = supported("disk", true)
        .child(choices("diskDevice", &["disk"]))
        .child(choices("bus", &["virtio", "nvme"]))
        .child(choices("model", &["virtio", "virtio-non-transitional"]));
    let rng = supported("rng", true)
        .child(choices("model", &["virtio", "virtio-non-transitional"]))
        .child(choices("backendModel", &["random", "builtin"]));
    let devices = Element::new("devices")
        .child(disk)
        // Clients that find no word about displays assume one.
        .child(supported("graphics", false))
        .child(supported("video", false))
        .child(supported("hostdev", false))
        .child(rng)
        .child(supported("filesystem", false))
        .child(supported("tpm", false))
        .child(supported("redirdev", false))
        .child(supported("channel", false))
        .child(supported("panic", false));
    let os = supported("os", true).child(choices("firmware", &[])).child(supported("loader", false));
    Element::new("domainCapabilities")
        .child(text("path", vmm.to_string_lossy()))
        .child(text("domain", virt_type.as_str()))
        .child(text("machine", MACHINE))
        .child(text("arch", "x86_64"))
        .child(Element::new("vcpu").with("max", VCPUS_MAX.to_string()))
        .child(supported("iothreads", false))
        .child(os)
        .child(cpu(virt_type))
        .child(supported("memoryBacking", false))
        .child(devices)
        .child(
            Element::new("features")
                .child(supported("gic", false))
                .child(supported("vmcoreinfo", false))
                .child(supported("genid", false))
                .child(supported("backingStoreInput", false))
                .child(supported("backup", false))
                .child(supported("async-teardown", false))
                .child(supported("sev", false)),
        )
}

fn cpu(virt_type: VirtType) -> Element {
    let mode = |name: &str, yes: bool| {
        Element::new("mode").with("name", name).with("supported", if yes { "yes" } else { "no" })
    };
    Element::new("cpu")
        .child(mode("host-passthrough", virt_type == VirtType::Kvm))
        .child(mode("maximum", true))
        .child(mode("host-model", false))
        .child(mode("custom", false))
}

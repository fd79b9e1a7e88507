//! Changes to a definition that have calls of their own.

use crate::config::LifecycleAction;
use crate::definition::DomainDefinition;
use crate::error::DomainXmlError;
use crate::iotune::{self, IoTune};
use crate::order;
use crate::tree::Element;

/// Which number of vCPUs is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuCount {
    /// At boot.
    Current,
    /// The most there may be.
    Maximum,
}

/// Events with an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LifecycleEvent {
    /// Power-off by the guest.
    Poweroff,
    /// Reset by the guest.
    Reboot,
    /// A crash.
    Crash,
}

impl DomainDefinition {
    /// Sets the memory at boot, in KiB; what the guest is to use shrinks with it.
    pub fn set_max_memory_kib(&mut self, kib: u64) -> Result<(), DomainXmlError> {
        let current = self.config.current_memory_kib.min(kib);
        self.change(|root| {
            set_memory(root, "memory", kib);
            set_memory(root, "currentMemory", current);
        })
    }

    /// Sets the memory the guest is to use, in KiB.
    pub fn set_current_memory_kib(&mut self, kib: u64) -> Result<(), DomainXmlError> {
        self.change(|root| set_memory(root, "currentMemory", kib))
    }

    /// Sets a number of vCPUs. A lower maximum takes the current number along.
    pub fn set_vcpus(&mut self, which: VcpuCount, count: u32) -> Result<(), DomainXmlError> {
        let (max, current) = match which {
            VcpuCount::Current => (self.config.max_vcpus, count),
            VcpuCount::Maximum => (count, self.config.vcpus.min(count)),
        };
        self.change(|root| {
            let vcpu = root.get_or_add("vcpu");
            if current == max {
                vcpu.remove_attribute("current");
            } else {
                vcpu.set_attribute("current", current.to_string());
            }
            vcpu.set_text(max.to_string());
        })
    }

    /// Sets what happens at a power event.
    pub fn set_lifecycle(&mut self, event: LifecycleEvent, action: LifecycleAction) -> Result<(), DomainXmlError> {
        let name = match event {
            LifecycleEvent::Poweroff => "on_poweroff",
            LifecycleEvent::Reboot => "on_reboot",
            LifecycleEvent::Crash => "on_crash",
        };
        self.change(|root| root.get_or_add(name).set_text(action.as_str()))
    }

    /// Gives disks, by target, other limits.
    pub fn set_io_tune(&mut self, targets: &[String], tune: &IoTune) -> Result<(), DomainXmlError> {
        self.change(|root| {
            for disk in root.get_or_add("devices").elements_mut().filter(|device| device.name == "disk") {
                let target = disk.child_attribute("target", "dev").unwrap_or_default();
                if targets.iter().any(|wanted| wanted == target) {
                    iotune::write(disk, tune);
                    order::sort(disk, order::DISK);
                }
            }
        })
    }

    /// Removes what only a client that may write gets to see: passwords of displays.
    pub fn remove_secrets(&mut self) -> Result<(), DomainXmlError> {
        self.change(|root| {
            if let Some(devices) = root.get_mut("devices") {
                for graphics in devices.elements_mut().filter(|device| device.name == "graphics") {
                    graphics.remove_attribute("passwd");
                }
            }
        })
    }

    /// The title or the description; `None` where there is none.
    pub fn text_of(&self, element: &str) -> Option<String> {
        self.root.get(element).map(Element::text)
    }

    /// Sets or (with `None` or nothing) removes the title or the description.
    pub fn set_text_of(&mut self, element: &str, text: Option<&str>) -> Result<(), DomainXmlError> {
        if element == "title" && text.is_some_and(|text| text.contains('\n')) {
            return Err(DomainXmlError::TitleNewline);
        }
        self.change(|root| match text {
            Some(text) if !text.is_empty() => root.get_or_add(element).set_text(text),
            _ => drop(root.remove(element)),
        })
    }
}

fn set_memory(root: &mut Element, name: &str, kib: u64) {
    let element = root.get_or_add(name);
    element.set_attribute("unit", "KiB");
    element.set_text(kib.to_string());
}

//! The typed view: what a machine, a listing or a statistic needs of a domain's XML.

use uuid::Uuid;

use crate::disk_driver::{self, DiskDriver};
use crate::error::DomainXmlError;
use crate::iotune::IoTune;
use crate::tree::Element;
use crate::units::memory_kib;

/// `type` of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VirtType {
    /// The software CPU.
    Qemu,
    /// KVM.
    Kvm,
}

impl VirtType {
    /// As the attribute spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            VirtType::Qemu => "qemu",
            VirtType::Kvm => "kvm",
        }
    }
}

/// `mode` of `<cpu>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuMode {
    /// Everything the engine has.
    Maximum,
    /// The host's CPU (KVM).
    HostPassthrough,
    /// The host's CPU, by name (KVM).
    HostModel,
    /// A named model.
    Custom,
}

/// What happens at a power event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LifecycleAction {
    /// The domain ends.
    Destroy,
    /// It is reset.
    Restart,
    /// It stays, stopped.
    Preserve,
}

impl LifecycleAction {
    pub(crate) fn parse(text: &str) -> Option<LifecycleAction> {
        match text {
            "destroy" => Some(LifecycleAction::Destroy),
            "restart" | "rename-restart" => Some(LifecycleAction::Restart),
            "preserve" => Some(LifecycleAction::Preserve),
            _ => None,
        }
    }

    /// As the element spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            LifecycleAction::Destroy => "destroy",
            LifecycleAction::Restart => "restart",
            LifecycleAction::Preserve => "preserve",
        }
    }
}

/// `<clock offset=…>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockOffset {
    /// The RTC shows UTC.
    Utc,
    /// It shows local time.
    Localtime,
    /// Something else.
    Other,
}

/// `<os>`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Os {
    /// Machine type.
    pub machine: String,
    /// Kernel to boot directly.
    pub kernel: Option<String>,
    /// Its initial ram disk.
    pub initrd: Option<String>,
    /// Its command line.
    pub cmdline: String,
}

/// What a disk is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskSource {
    /// A file.
    File(String),
    /// A block device.
    Block(String),
    /// A volume of a pool.
    Volume {
        /// Pool.
        pool: String,
        /// Volume.
        volume: String,
    },
    /// Nothing: an empty drive.
    Empty,
    /// A type that is not interpreted.
    Other(String),
}

impl DiskSource {
    /// What a person would call it.
    pub fn display(&self) -> &str {
        match self {
            DiskSource::File(path) | DiskSource::Block(path) => path,
            DiskSource::Volume { volume, .. } => volume,
            DiskSource::Empty => "",
            DiskSource::Other(kind) => kind,
        }
    }

    /// Path on the host, where there is one.
    pub fn path(&self) -> Option<&str> {
        match self {
            DiskSource::File(path) | DiskSource::Block(path) => Some(path),
            DiskSource::Volume { .. } | DiskSource::Empty | DiskSource::Other(_) => None,
        }
    }
}

/// `<disk>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// `disk`, `cdrom`, `floppy`, `lun`.
    pub device: String,
    /// What it is made of.
    pub source: DiskSource,
    /// Image format (`raw`, `qcow2`, …).
    pub format: String,
    /// Target name.
    pub target: String,
    /// Bus.
    pub bus: String,
    /// The guest may not write.
    pub read_only: bool,
    /// Other guests may write the same image.
    pub shareable: bool,
    /// Serial number shown to the guest.
    pub serial: Option<String>,
    /// `cache`, where given.
    pub cache: Option<String>,
    /// `discard`, where given.
    pub discard: Option<String>,
    /// `error_policy`, where given.
    pub error_policy: Option<String>,
    /// `rerror_policy`, where given.
    pub read_error_policy: Option<String>,
    /// What else `<driver>` says.
    pub driver: DiskDriver,
    /// `<iotune>`.
    pub iotune: IoTune,
}

/// `<interface>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// `network`, `bridge`, `user`, …
    pub kind: String,
    /// Network or bridge.
    pub source: Option<String>,
    /// Host device, on a running domain.
    pub target: Option<String>,
}

/// Host end of a character device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CharSource {
    /// A pseudo terminal.
    Pty,
    /// A type that is not built.
    Other(String),
}

/// Guest end of a character device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SerialTarget {
    /// A 16550A, by port 0 to 3.
    Serial(u8),
    /// virtio-console.
    Virtio,
}

/// `<serial>`, or a `<console>` that is no mirror of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CharDevice {
    /// Host end.
    pub source: CharSource,
    /// Guest end.
    pub target: SerialTarget,
    /// `<log file=…>`.
    pub log: Option<String>,
    /// The log is continued rather than begun anew.
    pub log_append: bool,
    /// Alias on a running domain: `serial0`, `console1`.
    pub alias: String,
}

/// A domain's interpreted content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainConfig {
    /// Engine.
    pub virt_type: VirtType,
    /// Name.
    pub name: String,
    /// UUID.
    pub uuid: Uuid,
    /// Memory at boot, in KiB.
    pub memory_kib: u64,
    /// Memory the guest is to use, in KiB.
    pub current_memory_kib: u64,
    /// Most vCPUs.
    pub max_vcpus: u32,
    /// vCPUs at boot.
    pub vcpus: u32,
    /// Boot.
    pub os: Os,
    /// `<cpu mode=…>`, where given.
    pub cpu: Option<CpuMode>,
    /// RTC.
    pub clock: ClockOffset,
    /// When the guest powers off.
    pub on_poweroff: LifecycleAction,
    /// When it resets.
    pub on_reboot: LifecycleAction,
    /// When it crashes.
    pub on_crash: LifecycleAction,
    /// Disks in order.
    pub disks: Vec<Disk>,
    /// Network interfaces in order.
    pub interfaces: Vec<Interface>,
    /// Serial ports and consoles in order.
    pub char_devices: Vec<CharDevice>,
    /// There is a random number device.
    pub rng: bool,
    /// Numbers of the threads that disks may be given to.
    pub iothreads: Vec<u32>,
}

static EMPTY: Element = Element { name: String::new(), attributes: Vec::new(), children: Vec::new() };

impl DomainConfig {
    /// Reads a tree that has been brought into shape. Errors are the same as a define's.
    pub(crate) fn read(root: &Element) -> Result<DomainConfig, DomainXmlError> {
        let devices = root.get("devices").unwrap_or(&EMPTY);
        let memory = root.get("memory").ok_or(DomainXmlError::NoMemory)?;
        let memory_kib_ = memory_kib(memory, "./memory[1]")?;
        let current = root.get("currentMemory").map(|element| memory_kib(element, "./currentMemory[1]")).transpose()?;
        let (max_vcpus, vcpus) = read_vcpus(root)?;
        Ok(DomainConfig {
            virt_type: read_type(root)?,
            name: read_name(root)?,
            uuid: read_uuid(root)?.unwrap_or_default(),
            memory_kib: memory_kib_,
            current_memory_kib: current.unwrap_or(memory_kib_).min(memory_kib_),
            max_vcpus,
            vcpus,
            os: read_os(root)?,
            cpu: root.get("cpu").map(read_cpu),
            clock: match root.child_attribute("clock", "offset") {
                None | Some("utc") => ClockOffset::Utc,
                Some("localtime") => ClockOffset::Localtime,
                Some(_) => ClockOffset::Other,
            },
            on_poweroff: read_action(root, "on_poweroff", LifecycleAction::Destroy)?,
            on_reboot: read_action(root, "on_reboot", LifecycleAction::Restart)?,
            on_crash: read_action(root, "on_crash", LifecycleAction::Destroy)?,
            disks: devices.all("disk").map(read_disk).collect::<Result<_, _>>()?,
            interfaces: devices.all("interface").map(read_interface).collect(),
            char_devices: read_char_devices(devices),
            rng: devices.get("rng").is_some(),
            iothreads: disk_driver::read_iothreads(root)?,
        })
    }
}

pub(crate) fn read_type(root: &Element) -> Result<VirtType, DomainXmlError> {
    match root.attribute("type") {
        Some("qemu") => Ok(VirtType::Qemu),
        Some("kvm") => Ok(VirtType::Kvm),
        Some(found) => Err(DomainXmlError::InvalidType { found: found.into() }),
        None => Err(DomainXmlError::NoType),
    }
}

/// Longest name: it becomes a file name with a suffix.
const NAME_BYTES_MAX: usize = 200;

/// Checks a domain's name.
pub(crate) fn check_name(name: &str) -> Result<(), DomainXmlError> {
    if name.is_empty() {
        return Err(DomainXmlError::NoName);
    }
    if name.contains('/') {
        return Err(DomainXmlError::SlashInName { name: name.into() });
    }
    if name.chars().any(char::is_control) {
        return Err(DomainXmlError::ControlInName { name: name.escape_debug().to_string() });
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(DomainXmlError::NameTooLong { bytes: name.len(), limit: NAME_BYTES_MAX });
    }
    // `.` and `..` cannot be file names of their own, with a suffix they can.
    Ok(())
}

pub(crate) fn read_name(root: &Element) -> Result<String, DomainXmlError> {
    let name = root.get("name").map(Element::text).unwrap_or_default();
    check_name(&name)?;
    Ok(name)
}

pub(crate) fn read_uuid(root: &Element) -> Result<Option<Uuid>, DomainXmlError> {
    let Some(text) = root.child_text("uuid") else { return Ok(None) };
    let uuid = Uuid::parse_str(&text).map_err(|_| DomainXmlError::MalformedUuid)?;
    let bytes = uuid.as_bytes();
    // libvirt refuses a uuid whose bytes are all the same: nobody's identity is that.
    if bytes.iter().all(|byte| *byte == bytes[0]) {
        return Err(DomainXmlError::MalformedUuid);
    }
    Ok(Some(uuid))
}

/// Maximum and current number of vCPUs.
pub(crate) fn read_vcpus(root: &Element) -> Result<(u32, u32), DomainXmlError> {
    let Some(vcpu) = root.get("vcpu") else { return Ok((1, 1)) };
    let max: u32 = vcpu.text().trim().parse().map_err(|_| DomainXmlError::VcpusNotInteger)?;
    let current = match vcpu.attribute("current") {
        None => max,
        Some(text) => {
            text.parse().map_err(|_| DomainXmlError::BadValue { path: "./vcpu/@current", value: text.into() })?
        }
    };
    if max == 0 || current == 0 {
        return Err(DomainXmlError::NoVcpus);
    }
    if current > max {
        return Err(DomainXmlError::VcpusBelowCurrent { max, current });
    }
    Ok((max, current))
}

fn read_os(root: &Element) -> Result<Os, DomainXmlError> {
    let os = root.get("os").ok_or(DomainXmlError::NoOsType)?;
    let kind = os.get("type").ok_or(DomainXmlError::NoOsType)?;
    let path = |name| os.child_text(name).filter(|text| !text.is_empty());
    Ok(Os {
        machine: kind.attribute("machine").unwrap_or_default().into(),
        kernel: path("kernel"),
        initrd: path("initrd"),
        cmdline: os.get("cmdline").map(Element::text).unwrap_or_default(),
    })
}

fn read_cpu(cpu: &Element) -> CpuMode {
    match cpu.attribute("mode") {
        Some("maximum") => CpuMode::Maximum,
        Some("host-passthrough") => CpuMode::HostPassthrough,
        Some("host-model") => CpuMode::HostModel,
        _ if cpu.get("model").is_some() => CpuMode::Custom,
        _ => CpuMode::Maximum,
    }
}

fn read_action(
    root: &Element,
    name: &'static str,
    default: LifecycleAction,
) -> Result<LifecycleAction, DomainXmlError> {
    let Some(text) = root.child_text(name) else { return Ok(default) };
    LifecycleAction::parse(&text).ok_or(DomainXmlError::NotBuilt {
        what: name,
        found: text,
        help: "use destroy, restart or preserve",
    })
}

fn read_disk(disk: &Element) -> Result<Disk, DomainXmlError> {
    let source = read_disk_source(disk);
    let target = disk.child_attribute("target", "dev").unwrap_or_default();
    if target.is_empty() {
        return Err(DomainXmlError::NoTarget { source_name: source.display().into() });
    }
    let driver = |name| disk.child_attribute("driver", name).map(str::to_owned);
    Ok(Disk {
        device: disk.attribute("device").unwrap_or("disk").into(),
        format: driver("type").unwrap_or_else(|| "raw".into()),
        target: target.into(),
        bus: disk.child_attribute("target", "bus").unwrap_or_else(|| default_bus(target)).into(),
        read_only: disk.get("readonly").is_some(),
        shareable: disk.get("shareable").is_some(),
        serial: disk.child_text("serial").filter(|text| !text.is_empty()),
        cache: driver("cache"),
        discard: driver("discard"),
        error_policy: driver("error_policy"),
        read_error_policy: driver("rerror_policy"),
        driver: DiskDriver::read(disk.get("driver").unwrap_or(&EMPTY))?,
        iotune: disk.get("iotune").map(IoTune::read).transpose()?.unwrap_or_default(),
        source,
    })
}

fn read_disk_source(disk: &Element) -> DiskSource {
    let kind = disk.attribute("type").unwrap_or("file");
    let Some(source) = disk.get("source") else { return DiskSource::Empty };
    let attribute = |name| source.attribute(name).unwrap_or_default().to_owned();
    match kind {
        "file" if source.attribute("file").is_none() => DiskSource::Empty,
        "file" => DiskSource::File(attribute("file")),
        "block" => DiskSource::Block(attribute("dev")),
        "volume" => DiskSource::Volume { pool: attribute("pool"), volume: attribute("volume") },
        other => DiskSource::Other(other.into()),
    }
}

/// The bus that a target's name stands for.
pub(crate) fn default_bus(target: &str) -> &'static str {
    match target.get(..2) {
        Some("vd") => "virtio",
        Some("nv") => "nvme",
        Some("sd") => "scsi",
        Some("hd") => "ide",
        Some("fd") => "fdc",
        _ => "virtio",
    }
}

fn read_interface(interface: &Element) -> Interface {
    let kind = interface.attribute("type").unwrap_or("user");
    let source = interface.get("source").and_then(|source| match kind {
        "network" => source.attribute("network"),
        "bridge" => source.attribute("bridge"),
        _ => source.attribute("dev"),
    });
    Interface {
        kind: kind.into(),
        source: source.map(str::to_owned),
        target: interface.child_attribute("target", "dev").map(str::to_owned),
    }
}

fn read_char_devices(devices: &Element) -> Vec<CharDevice> {
    let serials = devices.all("serial").enumerate().map(|(index, serial)| {
        let port = serial.child_attribute("target", "port").and_then(|port| port.parse().ok());
        let target = SerialTarget::Serial(port.unwrap_or(index.min(255) as u8));
        read_char(serial, target, format!("serial{index}"))
    });
    let consoles = devices.all("console").enumerate().filter_map(|(index, console)| {
        let virtio = console.child_attribute("target", "type") == Some("virtio");
        virtio.then(|| read_char(console, SerialTarget::Virtio, format!("console{index}")))
    });
    serials.chain(consoles).collect()
}

fn read_char(device: &Element, target: SerialTarget, alias: String) -> CharDevice {
    let kind = device.attribute("type").unwrap_or("pty");
    CharDevice {
        source: if kind == "pty" { CharSource::Pty } else { CharSource::Other(kind.into()) },
        target,
        log: device.child_attribute("log", "file").map(str::to_owned),
        log_append: device.child_attribute("log", "append") == Some("on"),
        alias,
    }
}

//! What can be wrong with a domain's XML. Texts are libvirt's where libvirt has the case.

use crate::parse::SyntaxError;

/// Classes of errors; the daemon gives each its libvirt number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XmlErrorKind {
    /// Not well formed.
    Syntax,
    /// Well formed, but not a domain.
    Content,
    /// Rejected because validation was asked for.
    Schema,
    /// The name is missing.
    NoName,
    /// A disk has no target.
    NoTarget,
    /// An operating system type nobody has.
    OsType,
    /// A value out of its range.
    InvalidArgument,
    /// What libvirt calls an internal error.
    Internal,
    /// Legal, and not something that is built.
    Unsupported,
    /// An argument that is out of reach.
    ArgumentUnsupported,
}

/// An error in a domain's XML.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // fields are named after what the text says about them
pub enum DomainXmlError {
    #[error("{0}")]
    Syntax(#[from] SyntaxError),
    #[error("XML error: expecting root element of '{expected}', not '{found}'")]
    RootName { expected: &'static str, found: String },
    #[error("XML error: missing domain type attribute")]
    NoType,
    #[error("unsupported configuration: invalid domain type {found}")]
    InvalidType { found: String },
    #[error("missing name information")]
    NoName,
    #[error("XML error: name {name} cannot contain '/'")]
    SlashInName { name: String },
    #[error("XML error: name of {bytes} bytes is longer than {limit}")]
    NameTooLong { bytes: usize, limit: usize },
    #[error("XML error: name '{name}' contains a control character")]
    ControlInName { name: String },
    #[error("internal error: malformed uuid element")]
    MalformedUuid,
    #[error("XML error: Memory size must be specified via <memory> or in the <numa> configuration")]
    NoMemory,
    #[error("XML error: Invalid value '{value}' for element or attribute '{path}'")]
    BadValue { path: &'static str, value: String },
    #[error("invalid argument: unknown suffix '{suffix}'")]
    UnknownSuffix { suffix: String },
    #[error("XML error: maximum vcpus count must be an integer")]
    VcpusNotInteger,
    #[error("XML error: invalid maximum number of vCPUs '0'")]
    NoVcpus,
    #[error("XML error: maxvcpus must not be less than current vcpus ({max} < {current})")]
    VcpusBelowCurrent { max: u32, current: u32 },
    #[error("XML error: an os <type> must be specified")]
    NoOsType,
    #[error("unknown OS type {found}")]
    OsType { found: String },
    #[error("unsupported configuration: Unknown architecture {found}")]
    UnknownArch { found: String },
    #[error("unsupported configuration: {what} '{found}' is not supported: {help}")]
    NotBuilt { what: &'static str, found: String, help: &'static str },
    #[error("unsupported configuration: <{element}> is not supported yet: {help}")]
    ElementNotBuilt { element: String, help: &'static str },
    #[error("missing target information for device {source_name}")]
    NoTarget { source_name: String },
    #[error("XML error: target '{target}' duplicated for disk sources '{first}' and '{second}'")]
    DuplicateTarget { target: String, first: String, second: String },
    #[error("XML error: unable to parse mac address '{mac}'")]
    BadMac { mac: String },
    #[error("XML error: expected unicast mac address, found multicast '{mac}'")]
    MulticastMac { mac: String },
    #[error("XML error: Invalid value for attribute '{attribute}' in element 'driver': '{found}'.{expected}")]
    DriverAttribute { attribute: &'static str, found: String, expected: &'static str },
    #[error("XML error: Invalid value for attribute 'iothread' in element 'driver': Zero is not permitted")]
    IoThreadZero,
    #[error("unsupported configuration: io='native' needs either no disk cache or directsync cache mode")]
    NativeNeedsDirect,
    #[error("unsupported configuration: Invalid disk read error policy: '{found}'")]
    ReadErrorPolicy { found: String },
    #[error("unsupported configuration: queues attribute in disk driver element is only supported by virtio-blk")]
    QueuesNeedVirtio,
    #[error("unsupported configuration: Disk iothread '{id}' not defined in iothreadid")]
    NoIoThread { id: u32 },
    #[error("XML error: disk iotune field '{field}' must be an integer")]
    IoTuneNumber { field: String },
    #[error("XML error: total and read/write {family} cannot be set at the same time")]
    IoTuneExclusive { family: &'static str },
    #[error("argument unsupported: block I/O throttle limit must be no more than 1000000000000000 using QEMU")]
    IoTuneTooLarge,
    #[error("unsupported configuration: group_name can be configured only together with settings")]
    IoTuneGroupAlone,
    #[error("unsupported configuration: different iotunes for disks {first} and {second}")]
    IoTuneDiffers { first: String, second: String },
    #[error("XML error: title can't contain newlines")]
    TitleNewline,
    #[error("XML document failed to validate against schema: Extra element {element} in interleave of {parent}")]
    ExtraElement { element: String, parent: String },
}

/// The class of an error.
pub(crate) fn kind(error: &DomainXmlError) -> XmlErrorKind {
    use DomainXmlError as E;
    use XmlErrorKind as K;
    match error {
        E::Syntax(_) => K::Syntax,
        E::RootName { .. }
        | E::NoType
        | E::SlashInName { .. }
        | E::NameTooLong { .. }
        | E::ControlInName { .. }
        | E::NoMemory
        | E::BadValue { .. }
        | E::VcpusNotInteger
        | E::NoVcpus
        | E::VcpusBelowCurrent { .. }
        | E::NoOsType
        | E::DuplicateTarget { .. }
        | E::BadMac { .. }
        | E::MulticastMac { .. }
        | E::DriverAttribute { .. }
        | E::IoThreadZero
        | E::IoTuneNumber { .. }
        | E::IoTuneExclusive { .. }
        | E::TitleNewline => K::Content,
        E::NoName => K::NoName,
        E::NoTarget { .. } => K::NoTarget,
        E::OsType { .. } => K::OsType,
        E::UnknownSuffix { .. } => K::InvalidArgument,
        E::MalformedUuid => K::Internal,
        E::IoTuneTooLarge => K::ArgumentUnsupported,
        E::NativeNeedsDirect | E::ReadErrorPolicy { .. } | E::QueuesNeedVirtio | E::NoIoThread { .. } => K::Unsupported,
        E::IoTuneGroupAlone | E::IoTuneDiffers { .. } => K::Unsupported,
        E::InvalidType { .. } | E::UnknownArch { .. } | E::NotBuilt { .. } | E::ElementNotBuilt { .. } => {
            K::Unsupported
        }
        E::ExtraElement { .. } => K::Schema,
    }
}

//! Everything a client can be told went wrong, and the one table that gives each its libvirt code, domain and wording.
//!
//! Scripts match on the codes and test suites on the texts, so both are libvirt's wherever libvirt has the case. A new
//! error does not compile until [`DaemonError::number`] knows it, and the whole table is a golden test.

use std::io;
use std::path::PathBuf;

use monitor::{Failure, FailureClass};
use rpc_wire::ErrorCode as Code;
use rpc_wire::ErrorDomain as Origin;
use rpc_wire::{ErrorBody, XdrError};
use uuid::Uuid;
use xml::{DomainXmlError, XmlErrorKind};

/// A refused call.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // fields are named after what the text says about them
pub enum DaemonError {
    // The protocol.
    #[error("unknown procedure: {number}")]
    UnknownProcedure { number: u32 },
    #[error("Cannot find program {program} version {version}")]
    UnknownProgram { program: u32, version: u32 },
    #[error("Unable to decode message payload: {0}")]
    Payload(#[from] XdrError),
    #[error("a call cannot have status {status}")]
    CallStatus { status: u32 },
    #[error("the connection has not been opened")]
    NotOpened,
    #[error("serial {serial} has an open stream already, or too many streams are open")]
    StreamBusy { serial: u32 },
    #[error("this stream was not opened for holes")]
    UnexpectedHole,
    #[error("this function is not supported by the connection driver: {api}")]
    NotSupported { api: &'static str },
    #[error("operation forbidden: read only access prevents {api}")]
    ReadOnly { api: &'static str },
    #[error("access denied: user {uid} may not use this daemon, which serves user {owner}")]
    WrongUser { uid: u32, owner: u32 },
    #[error("invalid argument: unsupported flags (0x{flags:x}) in function {api}")]
    UnsupportedFlags { flags: u32, api: &'static str },
    #[error("operation forbidden: {api} with secure flag")]
    SecureReadOnly { api: &'static str },
    #[error("invalid argument: {argument} in {api} must not be {found}")]
    BadArgument { argument: &'static str, found: i64, api: &'static str },

    // Connecting.
    #[error("no connection driver available for {uri}")]
    NoDriver { uri: String },
    #[error("internal error: unexpected {scheme} URI path '{path}', try {scheme}:///{expected}")]
    UriPath { scheme: String, path: String, expected: &'static str },
    #[error("unsupported event ID {event_id}")]
    UnknownEvent { event_id: i32 },
    #[error("internal error: domain event callback {callback_id} not registered")]
    NoCallback { callback_id: i32 },

    #[error("resource busy: a client may hold {limit} event registrations")]
    TooManyCallbacks { limit: usize },

    // Finding domains.
    #[error("Domain not found: no domain with matching name '{name}'")]
    NoDomainNamed { name: String },
    #[error("Domain not found: no domain with matching uuid '{uuid}'")]
    NoDomainWithUuid { uuid: Uuid },
    #[error("Domain not found: no domain with matching uuid '{uuid}' ({name})")]
    NoDomain { uuid: Uuid, name: String },
    #[error("Domain not found: no domain with matching id {id}")]
    NoDomainWithId { id: i32 },

    #[error("Too many domains '{count}' for limit '{limit}'")]
    TooManyDomains { count: usize, limit: usize },

    // Definitions.
    #[error("{0}")]
    Xml(#[from] DomainXmlError),
    #[error("operation failed: domain '{name}' already exists with uuid {uuid}")]
    NameTaken { name: String, uuid: Uuid },
    #[error("operation failed: domain '{name}' is already defined with uuid {uuid}")]
    UuidTaken { name: String, uuid: Uuid },
    #[error("Requested operation is not valid: domain is already active as '{name}'")]
    AlreadyActive { name: String },
    #[error("Requested operation is not valid: domain with name '{name}' already exists")]
    RenameTarget { name: String },
    #[error("Requested operation is not valid: cannot rename active domain")]
    RenameActive,
    #[error("Requested operation is not valid: cannot rename a transient domain")]
    RenameTransient,
    #[error("invalid argument: new name of domain '{name}' is missing, empty or contains '/'")]
    RenameInvalid { name: String },
    #[error("Requested operation is not valid: cannot set autostart for transient domain")]
    AutostartTransient,
    #[error("Requested operation is not valid: cannot undefine transient domain")]
    UndefineTransient,
    #[error("Requested operation is not valid: transient domains do not have any persistent config")]
    NoPersistentConfig,
    #[error("invalid argument: Flags 'VIR_DOMAIN_AFFECT_LIVE' and 'VIR_DOMAIN_AFFECT_CONFIG' are mutually exclusive")]
    BothAffected,
    #[error("metadata not found: Requested metadata element is not present")]
    NoMetadata,
    #[error("invalid argument: {detail}")]
    MetadataInvalid { detail: &'static str },
    #[error(
        "invalid argument: requested vcpus is greater than max allowable vcpus for the persistent domain: {wanted} > {max}"
    )]
    TooManyVcpus { wanted: u32, max: u32 },
    #[error("invalid argument: cannot set memory higher than max memory ({wanted} KiB > {max} KiB)")]
    TooMuchMemory { wanted: u64, max: u64 },
    #[error(
        "Operation not supported: {what} of a running domain cannot be changed; use --config and restart the domain"
    )]
    LiveChange { what: &'static str },
    #[error("invalid argument: invalid path {path} not assigned to domain")]
    NoSuchDisk { path: String },
    #[error("invalid argument: disk '{path}' was not found in the domain config")]
    DiskNotInConfig { path: String },
    #[error("invalid argument: disk '{path}' not found in domain")]
    DiskNotInDomain { path: String },
    #[error("numerical overflow: size must be less than {limit}")]
    SizeOverflow { limit: u64 },
    #[error("invalid argument: disk '{target}' has no block device whose capacity it could take")]
    ResizeToCapacity { target: String },
    #[error("Failed to open file '{path}': {source}")]
    ImageOpen { path: PathBuf, source: io::Error },
    #[error("invalid argument: parameter '{field}' not supported")]
    UnknownParameter { field: String },
    #[error("invalid argument: invalid type '{found}' for parameter '{field}', expected '{expected}'")]
    ParameterType { field: String, found: &'static str, expected: &'static str },
    #[error("invalid argument: total and read/write of {family} cannot be set at the same time")]
    IoTuneExclusive { family: &'static str },
    #[error("argument unsupported: block I/O throttle limit value must be no more than {limit}")]
    IoTuneTooLarge { limit: u64 },
    #[error("unsupported configuration: cannot reset '{field}' when '{field}_max' is set")]
    IoTuneReset { field: &'static str },
    #[error("unsupported configuration: value '{field}_max' cannot be smaller than '{field}'")]
    IoTuneBurstBelow { field: &'static str },
    #[error("invalid argument: invalid path, '{device}' is not a known interface")]
    NoSuchInterface { device: String },

    // Running.
    #[error("Requested operation is not valid: domain is not running")]
    NotRunning,
    #[error("Requested operation is not valid: domain is already running")]
    AlreadyRunning,
    #[error("unsupported configuration: {detail}")]
    Unsupported { detail: String },
    #[error("unsupported configuration: domain type 'kvm' does not work on this host: {reason}")]
    KvmUnusable { reason: String },
    #[error("Network not found: no network with matching name '{name}'")]
    NoNetwork { name: String },
    #[error("Cannot access storage file '{path}': {source}")]
    StorageFile { path: PathBuf, source: io::Error },
    #[error("Cannot access storage file '{path}': it is a directory, a disk needs an image file or a block device")]
    StorageDirectory { path: PathBuf },
    #[error("Cannot access backing file '{path}' of storage file '{parent}': {source}")]
    BackingFile { path: PathBuf, parent: PathBuf, source: io::Error },
    #[error("invalid argument: the backing files of '{path}' form a loop or are too many; 'qemu-img info' shows each")]
    BackingLoop { path: PathBuf },
    #[error("internal error: {detail}")]
    ImageFormat { detail: String },
    #[error(
        "resource busy: image '{path}' is in use: another disk or process writes it, or reads it while this one would write"
    )]
    ImageInUse { path: PathBuf },
    #[error(
        "unsupported configuration: the domain wants {wanted_kib} KiB of memory and this host has {host_kib} KiB; lower <memory>"
    )]
    HostMemory { wanted_kib: u64, host_kib: u64 },
    #[error(
        "unsupported configuration: Maximum CPUs greater than specified machine type limit {limit}: the domain wants {wanted}; \
         lower <vcpu>"
    )]
    HostVcpus { wanted: u32, limit: u32 },
    #[error("unable to open {what} '{path}': {source}")]
    BootFile { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{}{}", failure_prefix(.0.class), .0.text)]
    Vmm(Failure),
    #[error("internal error: vireo-vmm ended {when}{}", said(.last_words))]
    VmmEnded { when: &'static str, last_words: String },
    #[error("unable to run {program}: {source}; --vmm names the program")]
    VmmProgram { program: PathBuf, source: io::Error },
    #[error("Timed out during operation: vireo-vmm of domain '{name}' has not answered within {seconds} s")]
    VmmSilent { name: String, seconds: u64 },
    #[error("internal error: monitor of domain '{name}': {detail}")]
    Monitor { name: String, detail: String },
    #[error("argument unsupported: QEMU guest agent is not configured")]
    NoAgent,
    #[error("internal error: cannot find console device '{alias}'")]
    NoConsole { alias: String },
    #[error("operation failed: Active console session exists for this domain")]
    ConsoleBusy,
    #[error("unable to open console '{path}': {source}")]
    ConsoleOpen { path: PathBuf, source: io::Error },

    #[error("unsupported configuration: Stats types bits 0x{groups:x} are not supported by this daemon")]
    StatsGroups { groups: u32 },
    #[error("Operation not supported: CPU time is not kept per host CPU; --total shows the sum")]
    PerCpuStats,

    // The host.
    #[error("unsupported configuration: Host SMBIOS information is not available")]
    NoSmbios,
    #[error("invalid argument: {detail}")]
    HostArgument { detail: String },
    #[error("unable to {action} {path}: {source}")]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("internal error: the owner of domain '{name}' has ended")]
    OwnerGone { name: String },
}

/// How last words go on after "ended".
pub fn said(last_words: &str) -> String {
    if last_words.is_empty() { " without a word".into() } else { format!(": {last_words}") }
}

fn failure_prefix(class: FailureClass) -> &'static str {
    match class {
        FailureClass::Config | FailureClass::Engine => "unsupported configuration: ",
        FailureClass::Image | FailureClass::Boot | FailureClass::Internal | FailureClass::Command => "internal error: ",
        FailureClass::Resource => "out of memory: ",
        FailureClass::State => "Requested operation is not valid: ",
    }
}

impl DaemonError {
    /// Code and domain of libvirt.
    #[rustfmt::skip] // one row per error
    pub fn number(&self) -> (Code, Origin) {
        use DaemonError as E;
        match self {
            E::UnknownProcedure { .. } => (Code::Rpc, Origin::Rpc),
            E::UnknownProgram { .. } => (Code::Rpc, Origin::Rpc),
            E::Payload(_) => (Code::Rpc, Origin::Rpc),
            E::CallStatus { .. } => (Code::Rpc, Origin::Rpc),
            E::NotOpened => (Code::InternalError, Origin::Rpc),
            E::StreamBusy { .. } => (Code::Rpc, Origin::Streams),
            E::UnexpectedHole => (Code::Rpc, Origin::Streams),
            E::NotSupported { .. } => (Code::NoSupport, Origin::Qemu),
            E::ReadOnly { .. } => (Code::OperationDenied, Origin::Domain),
            E::WrongUser { .. } => (Code::AccessDenied, Origin::Rpc),
            E::UnsupportedFlags { .. } => (Code::InvalidArg, Origin::Qemu),
            E::SecureReadOnly { .. } => (Code::OperationDenied, Origin::Domain),
            E::BadArgument { .. } => (Code::InvalidArg, Origin::Qemu),
            E::NoDriver { .. } => (Code::NoConnect, Origin::None),
            E::UriPath { .. } => (Code::InternalError, Origin::Qemu),
            E::UnknownEvent { .. } => (Code::InternalError, Origin::Rpc),
            E::NoCallback { .. } => (Code::InternalError, Origin::Rpc),
            E::TooManyCallbacks { .. } => (Code::ResourceBusy, Origin::Rpc),
            E::NoDomainNamed { .. } => (Code::NoDomain, Origin::Qemu),
            E::NoDomainWithUuid { .. } => (Code::NoDomain, Origin::Qemu),
            E::NoDomain { .. } => (Code::NoDomain, Origin::Qemu),
            E::NoDomainWithId { .. } => (Code::NoDomain, Origin::Qemu),
            E::TooManyDomains { .. } => (Code::Rpc, Origin::Rpc),
            E::Xml(error) => xml_number(error.kind()),
            E::NameTaken { .. } => (Code::OperationFailed, Origin::Domain),
            E::UuidTaken { .. } => (Code::OperationFailed, Origin::Domain),
            E::AlreadyActive { .. } => (Code::OperationInvalid, Origin::Domain),
            E::RenameTarget { .. } => (Code::OperationInvalid, Origin::Domain),
            E::RenameActive => (Code::OperationInvalid, Origin::Qemu),
            E::RenameTransient => (Code::OperationInvalid, Origin::Qemu),
            E::RenameInvalid { .. } => (Code::InvalidArg, Origin::Domain),
            E::AutostartTransient => (Code::OperationInvalid, Origin::Qemu),
            E::UndefineTransient => (Code::OperationInvalid, Origin::Qemu),
            E::NoPersistentConfig => (Code::OperationInvalid, Origin::Domain),
            E::BothAffected => (Code::InvalidArg, Origin::Qemu),
            E::NoMetadata => (Code::NoDomainMetadata, Origin::Domain),
            E::MetadataInvalid { .. } => (Code::InvalidArg, Origin::Domain),
            E::TooManyVcpus { .. } => (Code::InvalidArg, Origin::Qemu),
            E::TooMuchMemory { .. } => (Code::InvalidArg, Origin::Qemu),
            E::LiveChange { .. } => (Code::OperationUnsupported, Origin::Qemu),
            E::NoSuchDisk { .. } => (Code::InvalidArg, Origin::Qemu),
            E::DiskNotInConfig { .. } => (Code::InvalidArg, Origin::Qemu),
            E::DiskNotInDomain { .. } => (Code::InvalidArg, Origin::Qemu),
            E::SizeOverflow { .. } => (Code::Overflow, Origin::Qemu),
            E::ResizeToCapacity { .. } => (Code::InvalidArg, Origin::Qemu),
            E::ImageOpen { .. } => (Code::SystemError, Origin::Qemu),
            E::UnknownParameter { .. } => (Code::InvalidArg, Origin::None),
            E::ParameterType { .. } => (Code::InvalidArg, Origin::None),
            E::IoTuneExclusive { .. } => (Code::InvalidArg, Origin::Qemu),
            E::IoTuneTooLarge { .. } => (Code::ArgumentUnsupported, Origin::Qemu),
            E::IoTuneReset { .. } => (Code::ConfigUnsupported, Origin::Qemu),
            E::IoTuneBurstBelow { .. } => (Code::ConfigUnsupported, Origin::Qemu),
            E::NoSuchInterface { .. } => (Code::InvalidArg, Origin::Qemu),
            E::NotRunning => (Code::OperationInvalid, Origin::Qemu),
            E::AlreadyRunning => (Code::OperationInvalid, Origin::Qemu),
            E::Unsupported { .. } => (Code::ConfigUnsupported, Origin::Qemu),
            E::KvmUnusable { .. } => (Code::ConfigUnsupported, Origin::Qemu),
            E::NoNetwork { .. } => (Code::NoNetwork, Origin::Network),
            E::StorageFile { .. } => (Code::SystemError, Origin::Storage),
            E::StorageDirectory { .. } => (Code::SystemError, Origin::Storage),
            E::BackingFile { .. } => (Code::SystemError, Origin::Storage),
            E::BackingLoop { .. } => (Code::InvalidArg, Origin::Storage),
            E::ImageFormat { .. } => (Code::InternalError, Origin::Storage),
            E::ImageInUse { .. } => (Code::ResourceBusy, Origin::Storage),
            E::HostMemory { .. } => (Code::ConfigUnsupported, Origin::Qemu),
            E::HostVcpus { .. } => (Code::ConfigUnsupported, Origin::Qemu),
            E::BootFile { .. } => (Code::SystemError, Origin::Qemu),
            E::Vmm(failure) => failure_number(failure.class),
            E::VmmEnded { .. } => (Code::InternalError, Origin::Qemu),
            E::VmmProgram { .. } => (Code::SystemError, Origin::Qemu),
            E::VmmSilent { .. } => (Code::OperationTimeout, Origin::Qemu),
            E::Monitor { .. } => (Code::InternalError, Origin::Qemu),
            E::NoAgent => (Code::ArgumentUnsupported, Origin::Qemu),
            E::NoConsole { .. } => (Code::InternalError, Origin::Qemu),
            E::ConsoleBusy => (Code::OperationFailed, Origin::Qemu),
            E::ConsoleOpen { .. } => (Code::SystemError, Origin::Qemu),
            E::StatsGroups { .. } => (Code::ArgumentUnsupported, Origin::Qemu),
            E::PerCpuStats => (Code::OperationUnsupported, Origin::Qemu),
            E::NoSmbios => (Code::ConfigUnsupported, Origin::Qemu),
            E::HostArgument { .. } => (Code::InvalidArg, Origin::None),
            E::File { .. } => (Code::SystemError, Origin::Qemu),
            E::OwnerGone { .. } => (Code::InternalError, Origin::Qemu),
        }
    }

    /// The body of the refusal.
    pub fn body(&self) -> ErrorBody {
        let (code, domain) = self.number();
        ErrorBody::new(code, domain, &text(self))
    }
}

/// The whole text; operating system errors as libvirt prints them, without their number.
fn text(error: &DaemonError) -> String {
    let mut text = error.to_string();
    if let (Some(start), true) = (text.rfind(" (os error "), text.contains("os error")) {
        let end = text[start..].find(')').map_or(text.len(), |length| start + length + 1);
        text.replace_range(start..end, "");
    }
    text
}

fn xml_number(kind: XmlErrorKind) -> (Code, Origin) {
    match kind {
        XmlErrorKind::Syntax => (Code::XmlDetail, Origin::Domain),
        XmlErrorKind::Content => (Code::XmlError, Origin::Domain),
        XmlErrorKind::Schema => (Code::XmlInvalidSchema, Origin::Xml),
        XmlErrorKind::NoName => (Code::NoName, Origin::Domain),
        XmlErrorKind::NoTarget => (Code::NoTarget, Origin::Domain),
        XmlErrorKind::OsType => (Code::OsType, Origin::Domain),
        XmlErrorKind::InvalidArgument => (Code::InvalidArg, Origin::Domain),
        XmlErrorKind::Internal => (Code::InternalError, Origin::Domain),
        XmlErrorKind::Unsupported => (Code::ConfigUnsupported, Origin::Domain),
        XmlErrorKind::ArgumentUnsupported => (Code::ArgumentUnsupported, Origin::Domain),
    }
}

fn failure_number(class: FailureClass) -> (Code, Origin) {
    match class {
        FailureClass::Config | FailureClass::Engine => (Code::ConfigUnsupported, Origin::Qemu),
        FailureClass::Image => (Code::InternalError, Origin::Storage),
        FailureClass::Boot | FailureClass::Internal | FailureClass::Command => (Code::InternalError, Origin::Qemu),
        FailureClass::Resource => (Code::NoMemory, Origin::Qemu),
        FailureClass::State => (Code::OperationInvalid, Origin::Qemu),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::mem::discriminant;
    use std::path::Path;

    /// One of every variant.
    #[rustfmt::skip] // one row per error
    fn samples() -> Vec<DaemonError> {
        use DaemonError as E;
        let name = || "vm1".to_owned();
        let path = || PathBuf::from("/dir/file");
        let denied = || io::Error::from_raw_os_error(13);
        let uuid = Uuid::from_u128(0x1111_1111_2222_3333_4444_5555_5555_5555);
        let api = "virDomainX";
        vec![
            E::UnknownProcedure { number: 999 },
            E::UnknownProgram { program: 7, version: 1 },
            E::Payload(XdrError::Short { missing: 4 }),
            E::CallStatus { status: 2 },
            E::NotOpened,
            E::StreamBusy { serial: 3 },
            E::UnexpectedHole,
            E::NotSupported { api },
            E::ReadOnly { api },
            E::WrongUser { uid: 1000, owner: 1001 },
            E::UnsupportedFlags { flags: 0x80, api },
            E::SecureReadOnly { api },
            E::BadArgument { argument: "nvcpus", found: 0, api },
            E::NoDriver { uri: "foo:///system".into() },
            E::UriPath { scheme: "qemu".into(), path: "/nosuch".into(), expected: "system" },
            E::UnknownEvent { event_id: 99 },
            E::NoCallback { callback_id: 5 },
            E::TooManyCallbacks { limit: 1024 },
            E::NoDomainNamed { name: name() },
            E::NoDomainWithUuid { uuid },
            E::NoDomain { uuid, name: name() },
            E::NoDomainWithId { id: 7 },
            E::TooManyDomains { count: 20000, limit: 16384 },
            E::Xml(DomainXmlError::NoName),
            E::NameTaken { name: name(), uuid },
            E::UuidTaken { name: name(), uuid },
            E::AlreadyActive { name: name() },
            E::RenameTarget { name: name() },
            E::RenameActive,
            E::RenameTransient,
            E::RenameInvalid { name: name() },
            E::AutostartTransient,
            E::UndefineTransient,
            E::NoPersistentConfig,
            E::BothAffected,
            E::NoMetadata,
            E::MetadataInvalid { detail: "the namespace uri is missing" },
            E::TooManyVcpus { wanted: 3, max: 2 },
            E::TooMuchMemory { wanted: 2048, max: 1024 },
            E::LiveChange { what: "the memory" },
            E::NoSuchDisk { path: "vdz".into() },
            E::NoSuchInterface { device: "vnet0".into() },
            E::NotRunning,
            E::AlreadyRunning,
            E::Unsupported { detail: "this and that".into() },
            E::KvmUnusable { reason: "no /dev/kvm".into() },
            E::NoNetwork { name: "default".into() },
            E::StorageFile { path: path(), source: denied() },
            E::StorageDirectory { path: path() },
            E::BackingFile { path: path(), parent: "/dir/top".into(), source: denied() },
            E::BackingLoop { path: path() },
            E::ImageFormat { detail: "/dir/file: is neither".into() },
            E::ImageInUse { path: path() },
            E::HostMemory { wanted_kib: 2048, host_kib: 1024 },
            E::HostVcpus { wanted: 4, limit: 1 },
            E::BootFile { what: "kernel", path: path(), source: denied() },
            E::Vmm(Failure { class: FailureClass::Image, text: "a broken image".into() }),
            E::VmmEnded { when: "before the machine was built", last_words: "out of luck".into() },
            E::VmmProgram { program: path(), source: denied() },
            E::VmmSilent { name: name(), seconds: 10 },
            E::Monitor { name: name(), detail: "no greeting".into() },
            E::NoAgent,
            E::NoConsole { alias: "serial0".into() },
            E::ConsoleBusy,
            E::ConsoleOpen { path: path(), source: denied() },
            E::StatsGroups { groups: 0x40 },
            E::PerCpuStats,
            E::NoSmbios,
            E::HostArgument { detail: "there is no CPU 9".into() },
            E::File { action: "read", path: path(), source: denied() },
            E::OwnerGone { name: name() },
        ]
    }

    /// One of every variant about disks.
    #[rustfmt::skip] // one row per error
    fn disk_samples() -> Vec<DaemonError> {
        use DaemonError as E;
        let path = || PathBuf::from("/dir/file");
        let denied = || io::Error::from_raw_os_error(13);
        vec![
            E::DiskNotInConfig { path: "vdz".into() },
            E::DiskNotInDomain { path: "vdz".into() },
            E::SizeOverflow { limit: 18_014_398_509_481_983 },
            E::ResizeToCapacity { target: "vda".into() },
            E::ImageOpen { path: path(), source: denied() },
            E::UnknownParameter { field: "speed".into() },
            E::ParameterType { field: "group_name".into(), found: "int", expected: "string" },
            E::IoTuneExclusive { family: "bytes_sec" },
            E::IoTuneTooLarge { limit: 1_000_000_000_000_000 },
            E::IoTuneReset { field: "read_iops_sec" },
            E::IoTuneBurstBelow { field: "read_iops_sec" },
        ]
    }

    #[test]
    fn every_error_has_its_number_domain_and_wording() {
        let mut samples = samples();
        samples.extend(disk_samples());
        let kinds: HashSet<_> = samples.iter().map(discriminant).collect();
        let rows = include_str!("error.rs").lines().filter(|line| line.starts_with("            E::")).count();
        // Each variant has a row in the table and a row among the samples.
        assert_eq!(kinds.len() * 2, rows);
        let table: String = samples
            .iter()
            .map(|error| {
                let body = error.body();
                format!("{:>3} {:>2}  {}\n", body.code, body.domain, body.message.unwrap_or_default().lossy())
            })
            .collect();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/errors.txt");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, &table).unwrap();
        }
        assert_eq!(table, std::fs::read_to_string(&path).unwrap_or_default(), "UPDATE=1 rewrites the table");
    }

    #[test]
    fn failures_of_a_machine_have_numbers_by_their_class() {
        for (class, code) in [
            (FailureClass::Config, 67),
            (FailureClass::Engine, 67),
            (FailureClass::Image, 1),
            (FailureClass::Boot, 1),
            (FailureClass::Resource, 2),
            (FailureClass::State, 55),
            (FailureClass::Command, 1),
            (FailureClass::Internal, 1),
        ] {
            let error = DaemonError::Vmm(Failure { class, text: String::new() });
            assert_eq!(error.number().0.number(), code, "{class:?}");
        }
    }
}

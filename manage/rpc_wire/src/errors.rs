//! Error numbers and the body of a failed reply.
//!
//! Codes and domains are the protocol's (libvirt 11.3: 114 codes, 73 domains); they are never renumbered, and clients
//! match on them. Which of our errors has which number is the daemon's business.

use crate::types::{DomainRef, NetworkRef};
use crate::xdr::{XStr, xdr_struct};

macro_rules! numbers {
    ($(#[$meta:meta])* $name:ident { $($variant:ident = $number:literal,)* }) => {
        $(#[$meta])*
        #[allow(missing_docs)] // the protocol's own names
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(i32)]
        pub enum $name { $($variant = $number),* }
        impl $name {
            /// The variant with this number.
            pub fn from_number(number: i32) -> Option<$name> {
                match number { $($number => Some($name::$variant),)* _ => None }
            }
            /// The number on the wire.
            pub fn number(self) -> i32 {
                self as i32
            }
        }
    };
}

#[rustfmt::skip]
numbers! {
/// What went wrong (`code` of an error).
ErrorCode {
    Ok = 0, InternalError = 1, NoMemory = 2, NoSupport = 3, UnknownHost = 4, NoConnect = 5, InvalidConn = 6,
    InvalidDomain = 7, InvalidArg = 8, OperationFailed = 9, GetFailed = 10, PostFailed = 11, HttpError = 12,
    SexprSerial = 13, NoXen = 14, XenCall = 15, OsType = 16, NoKernel = 17, NoRoot = 18, NoSource = 19,
    NoTarget = 20, NoName = 21, NoOs = 22, NoDevice = 23, NoXenstore = 24, DriverFull = 25, CallFailed = 26,
    XmlError = 27, DomExist = 28, OperationDenied = 29, OpenFailed = 30, ReadFailed = 31, ParseFailed = 32,
    ConfSyntax = 33, WriteFailed = 34, XmlDetail = 35, InvalidNetwork = 36, NetworkExist = 37, SystemError = 38,
    Rpc = 39, GnutlsError = 40, WarnNoNetwork = 41, NoDomain = 42, NoNetwork = 43, InvalidMac = 44, AuthFailed = 45,
    InvalidStoragePool = 46, InvalidStorageVol = 47, WarnNoStorage = 48, NoStoragePool = 49, NoStorageVol = 50,
    WarnNoNode = 51, InvalidNodeDevice = 52, NoNodeDevice = 53, NoSecurityModel = 54, OperationInvalid = 55,
    WarnNoInterface = 56, NoInterface = 57, InvalidInterface = 58, MultipleInterfaces = 59, WarnNoNwfilter = 60,
    InvalidNwfilter = 61, NoNwfilter = 62, BuildFirewall = 63, WarnNoSecret = 64, InvalidSecret = 65, NoSecret = 66,
    ConfigUnsupported = 67, OperationTimeout = 68, MigratePersistFailed = 69, HookScriptFailed = 70,
    InvalidDomainSnapshot = 71, NoDomainSnapshot = 72, InvalidStream = 73, ArgumentUnsupported = 74,
    StorageProbeFailed = 75, StoragePoolBuilt = 76, SnapshotRevertRisky = 77, OperationAborted = 78,
    AuthCancelled = 79, NoDomainMetadata = 80, MigrateUnsafe = 81, Overflow = 82, BlockCopyActive = 83,
    OperationUnsupported = 84, Ssh = 85, AgentUnresponsive = 86, ResourceBusy = 87, AccessDenied = 88,
    DbusService = 89, StorageVolExist = 90, CpuIncompatible = 91, XmlInvalidSchema = 92, MigrateFinishOk = 93,
    AuthUnavailable = 94, NoServer = 95, NoClient = 96, AgentUnsynced = 97, Libssh = 98, DeviceMissing = 99,
    InvalidNwfilterBinding = 100, NoNwfilterBinding = 101, InvalidDomainCheckpoint = 102, NoDomainCheckpoint = 103,
    NoDomainBackup = 104, InvalidNetworkPort = 105, NetworkPortExist = 106, NoNetworkPort = 107, NoHostname = 108,
    CheckpointInconsistent = 109, MultipleDomains = 110, NoNetworkMetadata = 111, AgentCommandTimeout = 112,
    AgentCommandFailed = 113,
}}

#[rustfmt::skip]
numbers! {
/// Which part of the server says so (`domain` of an error).
ErrorDomain {
    None = 0, Xen = 1, Xend = 2, Xenstore = 3, Sexpr = 4, Xml = 5, Dom = 6, Rpc = 7, Proxy = 8, Conf = 9, Qemu = 10,
    Net = 11, Test = 12, Remote = 13, Openvz = 14, Xenxm = 15, StatsLinux = 16, Lxc = 17, Storage = 18,
    Network = 19, Domain = 20, Uml = 21, Nodedev = 22, XenInotify = 23, Security = 24, Vbox = 25, Interface = 26,
    One = 27, Esx = 28, Phyp = 29, Secret = 30, Cpu = 31, Xenapi = 32, Nwfilter = 33, Hook = 34,
    DomainSnapshot = 35, Audit = 36, Sysinfo = 37, Streams = 38, Vmware = 39, Event = 40, Libxl = 41, Locking = 42,
    Hyperv = 43, Capabilities = 44, Uri = 45, Auth = 46, Dbus = 47, Parallels = 48, Device = 49, Ssh = 50,
    Lockspace = 51, Initctl = 52, Identity = 53, Cgroup = 54, Access = 55, Systemd = 56, Bhyve = 57, Crypto = 58,
    Firewall = 59, Polkit = 60, Thread = 61, Admin = 62, Logging = 63, Xenxl = 64, Perf = 65, Libssh = 66,
    Resctrl = 67, Firewalld = 68, DomainCheckpoint = 69, Tpm = 70, Bpf = 71, Ch = 72,
}}

/// `level` of every error a server sends.
pub const LEVEL_ERROR: i32 = 2;

xdr_struct! {
    /// Payload of a reply or stream packet with status ERROR. `message` is the whole text, `str1` the format it came
    /// from, `str2` the detail alone.
    pub struct ErrorBody {
        code: i32, domain: i32, message: Option<XStr>, level: i32, dom: Option<DomainRef>, str1: Option<XStr>,
        str2: Option<XStr>, str3: Option<XStr>, int1: i32, int2: i32, net: Option<NetworkRef>,
    }
}

impl ErrorBody {
    /// An error with a text and nothing else, shaped as the C server shapes it.
    pub fn new(code: ErrorCode, domain: ErrorDomain, message: &str) -> ErrorBody {
        ErrorBody {
            code: code.number(),
            domain: domain.number(),
            message: Some(message.into()),
            level: LEVEL_ERROR,
            dom: None,
            str1: Some("%s".into()),
            str2: Some(message.into()),
            str3: None,
            int1: -1,
            int2: -1,
            net: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xdr::to_bytes;

    #[test]
    fn numbers_are_those_of_the_public_header() {
        for (code, number) in [
            (ErrorCode::Ok, 0),
            (ErrorCode::InternalError, 1),
            (ErrorCode::NoSupport, 3),
            (ErrorCode::XmlError, 27),
            (ErrorCode::OperationDenied, 29),
            (ErrorCode::NoDomain, 42),
            (ErrorCode::OperationInvalid, 55),
            (ErrorCode::ConfigUnsupported, 67),
            (ErrorCode::NoDomainMetadata, 80),
            (ErrorCode::AgentCommandFailed, 113),
        ] {
            assert_eq!((code.number(), ErrorCode::from_number(number)), (number, Some(code)));
        }
        for (domain, number) in [(ErrorDomain::Rpc, 7), (ErrorDomain::Qemu, 10), (ErrorDomain::Domain, 20)] {
            assert_eq!((domain.number(), ErrorDomain::from_number(number)), (number, Some(domain)));
        }
        assert_eq!((0..500).filter_map(ErrorCode::from_number).count(), 114);
        assert_eq!((0..500).filter_map(ErrorDomain::from_number).count(), 73);
    }

    #[test]
    fn an_error_body_ends_with_two_minus_ones_and_no_network() {
        let bytes = to_bytes(&ErrorBody::new(ErrorCode::NoDomain, ErrorDomain::Qemu, "x"));
        assert_eq!(bytes[..8], [0, 0, 0, 42, 0, 0, 0, 10]);
        assert_eq!(bytes[bytes.len() - 12..], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    }
}

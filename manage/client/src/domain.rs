//! Calls about domains.

use rpc_wire::remote::*;
use rpc_wire::xdr::List;
use rpc_wire::{DomainRef, ErrorCode, TypedParam};

use crate::connection::{Connection, StreamId};
use crate::error::ClientError;

/// Which condition of a domain a call reads or changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Affect {
    /// The present one: live when it runs.
    #[default]
    Current,
    /// The running machine.
    Live,
    /// The definition.
    Config,
    /// Both.
    Both,
}

impl Affect {
    /// libvirt's flags.
    pub fn flags(self) -> u32 {
        match self {
            Affect::Current => 0,
            Affect::Live => 1,
            Affect::Config => 2,
            Affect::Both => 3,
        }
    }
}

/// Basic figures of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainInfo {
    /// `virDomainState`.
    pub state: u32,
    /// Memory at boot in KiB.
    pub max_memory_kib: u64,
    /// Memory in use in KiB.
    pub memory_kib: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// CPU time of the machine in nanoseconds.
    pub cpu_time_ns: u64,
}

/// Statistics of one domain.
#[derive(Clone, Debug, PartialEq)]
pub struct DomainStats {
    /// The domain.
    pub domain: DomainRef,
    /// Names and values, in the daemon's order.
    pub params: Vec<TypedParam>,
}

/// How a domain is named by a person: what the lookups try, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Number, uuid, name.
    Any,
    /// uuid, name.
    UuidOrName,
}

/// The texts that a domain carries for people and programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metadata<'a> {
    /// Description.
    Description,
    /// Title.
    Title,
    /// The element of a namespace.
    Element(&'a str),
}

impl<'a> Metadata<'a> {
    fn parts(self) -> (i32, Option<&'a str>) {
        match self {
            Metadata::Description => (0, None),
            Metadata::Title => (1, None),
            Metadata::Element(uri) => (2, Some(uri)),
        }
    }
}

/// Calls that take a domain and flags, or a domain alone, and return nothing.
macro_rules! commands {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $ty:ty),*) = $proc:ident;)*) => {
        impl Connection {$(
            $(#[$doc])*
            pub fn $name(&mut self, domain: &DomainRef $(, $arg: $ty)*) -> Result<(), ClientError> {
                self.call::<$proc::Proc>(&$proc::Args { dom: domain.clone() $(, $arg)* }).map(drop)
            }
        )*}
    };
}

commands! {
    /// Forgets the definition.
    undefine(flags: u32) = domain_undefine_flags;
    /// Stops the vCPUs.
    suspend() = domain_suspend;
    /// Lets them run.
    resume() = domain_resume;
    /// Presses the power button; flags name the ways allowed.
    shutdown(flags: u32) = domain_shutdown_flags;
    /// Presses it and starts again.
    reboot(flags: u32) = domain_reboot;
    /// Presses the reset button.
    reset(flags: u32) = domain_reset;
    /// Stops the machine; flag 1 never kills it.
    destroy(flags: u32) = domain_destroy_flags;
    /// Interrupts every vCPU.
    inject_nmi(flags: u32) = domain_inject_nmi;
    /// Sets memory in KiB.
    set_memory(memory: u64, flags: u32) = domain_set_memory_flags;
    /// Sets the number of vCPUs.
    set_vcpus(nvcpus: u32, flags: u32) = domain_set_vcpus_flags;
    /// Sets what happens at a power event.
    set_lifecycle_action(kind: u32, action: u32, flags: u32) = domain_set_lifecycle_action;
}

/// Calls that take a domain and return one field of the reply.
macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $proc:ident, $reply:ident => $value:expr;)*) => {
        impl Connection {$(
            $(#[$doc])*
            pub fn $name(&mut self, domain: &DomainRef $(, $arg: $ty)*) -> Result<$ret, ClientError> {
                let $reply = self.call::<$proc::Proc>(&$proc::Args { dom: domain.clone() $(, $arg)* })?;
                Ok($value)
            }
        )*}
    };
}

getters! {
    /// Kind of guest: `hvm`.
    os_type() -> String = domain_get_os_type, reply => reply.kind.lossy().into_owned();
    /// Basic figures.
    info() -> DomainInfo = domain_get_info, reply => DomainInfo {
        state: reply.state,
        max_memory_kib: reply.max_mem,
        memory_kib: reply.memory,
        vcpus: reply.nr_virt_cpu,
        cpu_time_ns: reply.cpu_time,
    };
    /// State and reason.
    state(flags: u32) -> (i32, i32) = domain_get_state, reply => (reply.state, reply.reason);
    /// State of the way to the machine: 0 is well; and the detail.
    control_info(flags: u32) -> (u32, u32) = domain_get_control_info, reply => (reply.state, reply.details);
    /// Whether it has a definition.
    is_persistent() -> bool = domain_is_persistent, reply => reply.persistent != 0;
    /// Whether it runs.
    is_active() -> bool = domain_is_active, reply => reply.active != 0;
    /// Whether it starts by itself.
    autostart() -> bool = domain_get_autostart, reply => reply.autostart != 0;
    /// Whether a saved state is kept for it.
    has_managed_save(flags: u32) -> bool = domain_has_managed_save_image, reply => reply.result != 0;
    /// The document.
    xml(flags: u32) -> String = domain_get_xml_desc, reply => reply.xml.lossy().into_owned();
    /// A number of vCPUs.
    vcpus(flags: u32) -> i32 = domain_get_vcpus_flags, reply => reply.num;
    /// Running vCPUs and their affinities.
    vcpu_info(maxinfo: i32, maplen: i32) -> (Vec<VcpuInfo>, Vec<u8>) = domain_get_vcpus,
        reply => (reply.info.0, reply.cpumaps.0);
    /// Affinities of vCPUs.
    vcpu_pins(ncpumaps: i32, maplen: i32, flags: u32) -> (i32, Vec<u8>) = domain_get_vcpu_pin_info,
        reply => (reply.num, reply.cpumaps.0);
    /// Affinity of the rest of the machine.
    emulator_pin(maplen: i32, flags: u32) -> Vec<u8> = domain_get_emulator_pin_info, reply => reply.cpumaps.0;
    /// Warnings about it.
    messages(flags: u32) -> Vec<String> = domain_get_messages,
        reply => reply.msgs.0.iter().map(|text| text.lossy().into_owned()).collect();
    /// Kind of the job that runs: 0 is none.
    job(flags: u32) -> i32 = domain_get_job_stats, reply => reply.kind;
    /// Failed disks: target and number of the error.
    disk_errors(maxerrors: u32, flags: u32) -> (i32, Vec<(String, i32)>) = domain_get_disk_errors, reply => (
        reply.nerrors,
        reply.errors.0.iter().map(|error| (error.disk.lossy().into_owned(), error.error)).collect(),
    );
    /// Memory figures by tag.
    memory_stats(max_stats: u32, flags: u32) -> Vec<(i32, u64)> = domain_memory_stats,
        reply => reply.stats.0.iter().map(|stat| (stat.tag, stat.val)).collect();
    /// CPU time, in two steps: with 0 parameters the reply is their number.
    cpu_stats(nparams: u32, start_cpu: i32, ncpus: u32, flags: u32) -> (i32, Vec<TypedParam>) = domain_get_cpu_stats,
        reply => (reply.nparams, reply.params.0);
    /// Addresses of interfaces.
    interface_addresses(source: u32, flags: u32) -> Vec<DomainInterface> = domain_interface_addresses,
        reply => reply.ifaces.0;
}

impl Connection {
    /// Domains that pass the filters in `flags`.
    pub fn list(&mut self, flags: u32) -> Result<Vec<DomainRef>, ClientError> {
        let args = connect_list_all_domains::Args { need_results: 1, flags };
        Ok(self.call::<connect_list_all_domains::Proc>(&args)?.domains.0)
    }

    /// Statistics of the given domains, or of all that pass the filters in `flags`.
    pub fn stats(&mut self, domains: &[DomainRef], groups: u32, flags: u32) -> Result<Vec<DomainStats>, ClientError> {
        let args = connect_get_all_domain_stats::Args { doms: List(domains.to_vec()), stats: groups, flags };
        let records = self.call::<connect_get_all_domain_stats::Proc>(&args)?.ret_stats.0;
        Ok(records.into_iter().map(|record| DomainStats { domain: record.dom, params: record.params.0 }).collect())
    }

    /// The domain that a person means by a word.
    pub fn lookup(&mut self, word: &str, how: Lookup) -> Result<DomainRef, ClientError> {
        let number = word.parse().ok().filter(|id| *id >= 0 && how == Lookup::Any);
        if let Some(id) = number {
            match self.call::<domain_lookup_by_id::Proc>(&domain_lookup_by_id::Args { id }) {
                Err(error) if error.code() == Some(ErrorCode::NoDomain) => {}
                other => return other.map(|reply| reply.dom),
            }
        }
        if let Some(uuid) = parse_uuid(word) {
            match self.call::<domain_lookup_by_uuid::Proc>(&domain_lookup_by_uuid::Args { uuid }) {
                Err(error) if error.code() == Some(ErrorCode::NoDomain) => {}
                other => return other.map(|reply| reply.dom),
            }
        }
        let args = domain_lookup_by_name::Args { name: word.into() };
        Ok(self.call::<domain_lookup_by_name::Proc>(&args)?.dom)
    }

    /// Defines a domain.
    pub fn define(&mut self, xml: &str, flags: u32) -> Result<DomainRef, ClientError> {
        let args = domain_define_xml_flags::Args { xml: xml.into(), flags };
        Ok(self.call::<domain_define_xml_flags::Proc>(&args)?.dom)
    }

    /// Runs a domain that is forgotten when it ends.
    pub fn create(&mut self, xml: &str, flags: u32) -> Result<DomainRef, ClientError> {
        let args = domain_create_xml::Args { xml_desc: xml.into(), flags };
        Ok(self.call::<domain_create_xml::Proc>(&args)?.dom)
    }

    /// Runs a defined domain.
    pub fn start(&mut self, domain: &DomainRef, flags: u32) -> Result<DomainRef, ClientError> {
        let args = domain_create_with_flags::Args { dom: domain.clone(), flags };
        Ok(self.call::<domain_create_with_flags::Proc>(&args)?.dom)
    }

    /// Marks a domain to start by itself, or not.
    pub fn set_autostart(&mut self, domain: &DomainRef, autostart: bool) -> Result<(), ClientError> {
        let args = domain_set_autostart::Args { dom: domain.clone(), autostart: autostart.into() };
        self.call::<domain_set_autostart::Proc>(&args).map(drop)
    }

    /// Gives a domain another name.
    pub fn rename(&mut self, domain: &DomainRef, name: &str) -> Result<(), ClientError> {
        let args = domain_rename::Args { dom: domain.clone(), new_name: Some(name.into()), flags: 0 };
        self.call::<domain_rename::Proc>(&args).map(drop)
    }

    /// A text of a domain; `None` where it has none.
    pub fn metadata(
        &mut self,
        domain: &DomainRef,
        which: Metadata<'_>,
        affect: Affect,
    ) -> Result<Option<String>, ClientError> {
        let (kind, uri) = which.parts();
        let args =
            domain_get_metadata::Args { dom: domain.clone(), kind, uri: uri.map(Into::into), flags: affect.flags() };
        match self.call::<domain_get_metadata::Proc>(&args) {
            Ok(reply) => Ok(Some(reply.metadata.lossy().into_owned())),
            Err(error) if error.code() == Some(ErrorCode::NoDomainMetadata) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets or (with `None`) removes a text; `key` is the prefix of an element's namespace.
    pub fn set_metadata(
        &mut self,
        domain: &DomainRef,
        which: Metadata<'_>,
        text: Option<&str>,
        key: Option<&str>,
        affect: Affect,
    ) -> Result<(), ClientError> {
        let (kind, uri) = which.parts();
        let args = domain_set_metadata::Args {
            dom: domain.clone(),
            kind,
            metadata: text.map(Into::into),
            key: key.map(Into::into),
            uri: uri.map(Into::into),
            flags: affect.flags(),
        };
        self.call::<domain_set_metadata::Proc>(&args).map(drop)
    }

    /// Allocation, capacity and physical size of a disk, in bytes.
    pub fn block_info(&mut self, domain: &DomainRef, path: &str) -> Result<(u64, u64, u64), ClientError> {
        let args = domain_get_block_info::Args { dom: domain.clone(), path: path.into(), flags: 0 };
        let reply = self.call::<domain_get_block_info::Proc>(&args)?;
        Ok((reply.allocation, reply.capacity, reply.physical))
    }

    /// Counters of a disk, or of all where `path` is empty.
    pub fn block_stats(&mut self, domain: &DomainRef, path: &str) -> Result<Vec<TypedParam>, ClientError> {
        let args =
            |nparams| domain_block_stats_flags::Args { dom: domain.clone(), path: path.into(), nparams, flags: 0 };
        let nparams = self.call::<domain_block_stats_flags::Proc>(&args(0))?.nparams;
        Ok(self.call::<domain_block_stats_flags::Proc>(&args(nparams))?.params.0)
    }

    /// Opens a console: the one called `device`, else the first. Flag 1 takes it from whoever has it.
    pub fn open_console(
        &mut self,
        domain: &DomainRef,
        device: Option<&str>,
        flags: u32,
    ) -> Result<StreamId, ClientError> {
        let args = domain_open_console::Args { dom: domain.clone(), dev_name: device.map(Into::into), flags };
        self.open_stream::<domain_open_console::Proc>(&args)
    }
}

/// 32 hexadecimal digits, hyphens wherever.
fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u32> = text.chars().filter(|c| *c != '-').map(|c| c.to_digit(16)).collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits.chunks_exact(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect();
    if digits.len() == 32 { bytes.try_into().ok() } else { None }
}

/// Text form of a domain's uuid.
pub fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_read_as_people_write_them() {
        let uuid = [0x11, 0x11, 0x11, 0x11, 0x22, 0x22, 0x33, 0x33, 0x44, 0x44, 0x55, 0x55, 0x55, 0x55, 0x55, 0x5f];
        for text in ["11111111-2222-3333-4444-55555555555f", "1111111122223333444455555555555F"] {
            assert_eq!(parse_uuid(text), Some(uuid));
        }
        assert_eq!(uuid_text(&uuid), "11111111-2222-3333-4444-55555555555f");
        for text in ["", "vm1", "11111111-2222-3333-4444-5555555555", "é1111111-2222-3333-4444-55555555555"] {
            assert_eq!(parse_uuid(text), None, "{text}");
        }
    }
}

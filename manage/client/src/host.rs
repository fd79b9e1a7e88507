//! Calls about the host and the daemon.

use rpc_wire::remote::*;

use crate::connection::Connection;
use crate::error::ClientError;

/// Versions, as `major * 1000000 + minor * 1000 + release`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// What the daemon calls its hypervisor.
    pub hypervisor: String,
    /// Its version.
    pub hypervisor_version: u64,
    /// Release of libvirt whose behaviour the daemon follows.
    pub library_version: u64,
}

/// The host's processors and memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// Machine name.
    pub model: String,
    /// Memory in KiB.
    pub memory_kib: u64,
    /// CPUs that run.
    pub cpus: i32,
    /// Their clock.
    pub mhz: i32,
    /// NUMA nodes.
    pub nodes: i32,
    /// Sockets per node.
    pub sockets: i32,
    /// Cores per socket.
    pub cores: i32,
    /// Threads per core.
    pub threads: i32,
}

fn named(stats: Vec<rpc_wire::types::NodeStat>) -> Vec<(String, u64)> {
    stats.into_iter().map(|stat| (stat.field.lossy().into_owned(), stat.value)).collect()
}

impl Connection {
    /// Versions.
    pub fn version(&mut self) -> Result<Version, ClientError> {
        Ok(Version {
            hypervisor: self.call::<connect_get_type::Proc>(&connect_get_type::Args {})?.kind.lossy().into_owned(),
            hypervisor_version: self
                .call::<connect_get_version::Proc>(&connect_get_version::Args {})?
                .hypervisor_version,
            library_version: self
                .call::<connect_get_lib_version::Proc>(&connect_get_lib_version::Args {})?
                .library_version,
        })
    }

    /// Name of the host.
    pub fn hostname(&mut self) -> Result<String, ClientError> {
        Ok(self.call::<connect_get_hostname::Proc>(&connect_get_hostname::Args {})?.hostname.lossy().into_owned())
    }

    /// SMBIOS of the host, as XML.
    pub fn sysinfo(&mut self) -> Result<String, ClientError> {
        Ok(self
            .call::<connect_get_sysinfo::Proc>(&connect_get_sysinfo::Args { flags: 0 })?
            .sysinfo
            .lossy()
            .into_owned())
    }

    /// What the host can do, as XML.
    pub fn capabilities(&mut self) -> Result<String, ClientError> {
        let reply = self.call::<connect_get_capabilities::Proc>(&connect_get_capabilities::Args {})?;
        Ok(reply.capabilities.lossy().into_owned())
    }

    /// What a domain can have, as XML.
    pub fn domain_capabilities(
        &mut self,
        emulator: Option<&str>,
        arch: Option<&str>,
        machine: Option<&str>,
        virt_type: Option<&str>,
    ) -> Result<String, ClientError> {
        let args = connect_get_domain_capabilities::Args {
            emulatorbin: emulator.map(Into::into),
            arch: arch.map(Into::into),
            machine: machine.map(Into::into),
            virttype: virt_type.map(Into::into),
            flags: 0,
        };
        Ok(self.call::<connect_get_domain_capabilities::Proc>(&args)?.capabilities.lossy().into_owned())
    }

    /// Most vCPUs of a domain of a type.
    pub fn max_vcpus(&mut self, kind: Option<&str>) -> Result<i32, ClientError> {
        let args = connect_get_max_vcpus::Args { kind: kind.map(Into::into) };
        Ok(self.call::<connect_get_max_vcpus::Proc>(&args)?.max_vcpus)
    }

    /// Processors and memory.
    pub fn node_info(&mut self) -> Result<NodeInfo, ClientError> {
        let reply = self.call::<node_get_info::Proc>(&node_get_info::Args {})?;
        Ok(NodeInfo {
            model: String::from_utf8_lossy(&reply.model.0).into_owned(),
            memory_kib: reply.memory,
            cpus: reply.cpus,
            mhz: reply.mhz,
            nodes: reply.nodes,
            sockets: reply.sockets,
            cores: reply.cores,
            threads: reply.threads,
        })
    }

    /// Times of one CPU, or of all (-1), in nanoseconds.
    pub fn node_cpu_stats(&mut self, cpu: i32) -> Result<Vec<(String, u64)>, ClientError> {
        let mut args = node_get_cpu_stats::Args { cpu_num: cpu, nparams: 0, flags: 0 };
        args.nparams = self.call::<node_get_cpu_stats::Proc>(&args)?.nparams;
        Ok(named(self.call::<node_get_cpu_stats::Proc>(&args)?.params.0))
    }

    /// Memory of one cell, or of all (-1), in KiB.
    pub fn node_memory_stats(&mut self, cell: i32) -> Result<Vec<(String, u64)>, ClientError> {
        let mut args = node_get_memory_stats::Args { cell_num: cell, nparams: 0, flags: 0 };
        args.nparams = self.call::<node_get_memory_stats::Proc>(&args)?.nparams;
        Ok(named(self.call::<node_get_memory_stats::Proc>(&args)?.params.0))
    }

    /// Free memory of the host in bytes.
    pub fn node_free_memory(&mut self) -> Result<u64, ClientError> {
        Ok(self.call::<node_get_free_memory::Proc>(&node_get_free_memory::Args {})?.free_mem)
    }

    /// Free memory of cells in bytes, from `start`.
    pub fn node_cells_free_memory(&mut self, start: i32, count: i32) -> Result<Vec<u64>, ClientError> {
        let args = node_get_cells_free_memory::Args { start_cell: start, maxcells: count };
        Ok(self.call::<node_get_cells_free_memory::Proc>(&args)?.cells.0)
    }

    /// CPUs present, CPUs online, and a bitmap of the latter.
    pub fn node_cpu_map(&mut self) -> Result<(i32, u32, Vec<u8>), ClientError> {
        let args = node_get_cpu_map::Args { need_map: 1, need_online: 1, flags: 0 };
        let reply = self.call::<node_get_cpu_map::Proc>(&args)?;
        Ok((reply.ret, reply.online, reply.cpumap.0))
    }

    /// Model of the security driver and its domain of interpretation; both empty where there is none.
    pub fn security_model(&mut self) -> Result<(String, String), ClientError> {
        let reply = self.call::<node_get_security_model::Proc>(&node_get_security_model::Args {})?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((text(&reply.model.0), text(&reply.doi.0)))
    }
}

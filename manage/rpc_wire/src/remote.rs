//! The calls of the REMOTE program that have types here: one row each, `name = number { arguments } => { reply };`.
//!
//! A row defines a module with `Args`, `Reply` and `Proc`, which ties them to the number. Field order is the wire's. A
//! procedure without a row is known by name ([`crate::procs`]) and answered as not supported.

use crate::types::*;
use crate::xdr::{CharArray, CharList, List, Opaque, XStr, xdr_struct};

xdr_struct! {
    /// State of one virtual CPU: `state` 0 offline, 1 running, 2 blocked; `cpu_time` in ns; `cpu` -1 when unknown.
    pub struct VcpuInfo { number: u32, state: i32, cpu_time: u64, cpu: i32 }
    /// Statistics of one domain.
    pub struct StatsRecord { dom: DomainRef, params: List<TypedParam, STATS_PARAMS_MAX> }
    /// A balloon statistic; sizes in KiB.
    pub struct MemoryStat { tag: i32, val: u64 }
    /// A disk that failed: 1 unspecified, 2 no space.
    pub struct DiskError { disk: XStr, error: i32 }
    /// A guest interface and its addresses.
    pub struct DomainInterface { name: XStr, hwaddr: Option<XStr>, addrs: List<IpAddr, 2048> }
    /// An address: `kind` 0 IPv4, 1 IPv6.
    pub struct IpAddr { kind: i32, addr: XStr, prefix: u32 }
    /// A security label.
    pub struct SecurityLabel { label: CharList<4097>, enforcing: i32 }
    /// An I/O thread and the host CPUs it may use.
    pub struct IothreadInfo { iothread_id: u32, cpumap: Opaque<CPUMAP_MAX> }
}

macro_rules! calls {
    ($($name:ident = $number:literal { $($arg:ident: $argty:ty),* $(,)? } => { $($ret:ident: $retty:ty),* $(,)? };)*) => {$(
        #[doc = concat!("Procedure ", stringify!($number), ".")]
        pub mod $name {
            #[allow(unused_imports)]
            use super::*;
            xdr_struct! {
                /// Payload of the call.
                pub struct Args { $($arg: $argty),* }
                /// Payload of the reply.
                pub struct Reply { $($ret: $retty),* }
            }
            /// Ties number and payloads together.
            #[derive(Clone, Copy, Debug)]
            pub struct Proc;
            impl crate::Call for Proc {
                const PROGRAM: u32 = crate::frame::REMOTE_PROGRAM;
                const NUMBER: u32 = $number;
                type Args = Args;
                type Reply = Reply;
            }
        }
    )*
        /// Numbers of all calls that have types, with their names: tests compare them with the table.
        pub const TYPED: &[(u32, &str)] = &[$(($number, stringify!($name))),*];
    };
}

#[rustfmt::skip] // a call per row
calls! {
auth_list = 66 {} => { types: List<i32, 20> };
    connect_open = 1 { name: Option<XStr>, flags: u32 } => {};
    connect_close = 2 {} => {};
    connect_supports_feature = 60 { feature: i32 } => { supported: i32 };
    connect_get_type = 3 {} => { kind: XStr };
    connect_get_version = 4 {} => { hypervisor_version: u64 };
    connect_get_lib_version = 157 {} => { library_version: u64 };
    connect_get_hostname = 59 {} => { hostname: XStr };
    connect_get_uri = 110 {} => { uri: XStr };
    connect_get_sysinfo = 203 { flags: u32 } => { sysinfo: XStr };
    connect_get_max_vcpus = 5 { kind: Option<XStr> } => { max_vcpus: i32 };
    connect_get_capabilities = 7 {} => { capabilities: XStr };
    connect_get_domain_capabilities = 342 { emulatorbin: Option<XStr>, arch: Option<XStr>, machine: Option<XStr>,
        virttype: Option<XStr>, flags: u32 } => { capabilities: XStr };
    connect_get_cpu_model_names = 312 { arch: XStr, need_results: i32, flags: u32 } => { models: List<XStr, 8192>,
        ret: i32 };
    connect_is_secure = 149 {} => { secure: i32 };
    connect_register_close_callback = 360 {} => {};
    connect_unregister_close_callback = 361 {} => {};
    node_get_info = 6 {} => { model: CharArray<32>, memory: u64, cpus: i32, mhz: i32, nodes: i32, sockets: i32,
        cores: i32, threads: i32 };
    node_get_cpu_stats = 227 { cpu_num: i32, nparams: i32, flags: u32 } => { params: List<NodeStat, 16>,
        nparams: i32 };
    node_get_memory_stats = 228 { nparams: i32, cell_num: i32, flags: u32 } => { params: List<NodeStat, 16>,
        nparams: i32 };
    node_get_cells_free_memory = 101 { start_cell: i32, maxcells: i32 } => { cells: List<u64, 1024> };
    node_get_free_memory = 102 {} => { free_mem: u64 };
    node_get_cpu_map = 293 { need_map: i32, need_online: i32, flags: u32 } => { cpumap: Opaque<CPUMAP_MAX>,
        online: u32, ret: i32 };
    node_get_free_pages = 340 { pages: List<u32, 1024>, start_cell: i32, cell_count: u32,
        flags: u32 } => { counts: List<u64, 1024> };
    node_get_security_model = 122 {} => { model: CharList<257>, doi: CharList<257> };
    connect_num_of_domains = 51 {} => { num: i32 };
    connect_list_domains = 37 { maxids: i32 } => { ids: List<i32, OBJECT_LIST_MAX> };
    connect_num_of_defined_domains = 25 {} => { num: i32 };
    connect_list_defined_domains = 21 { maxnames: i32 } => { names: List<XStr, OBJECT_LIST_MAX> };
    connect_list_all_domains = 273 { need_results: i32, flags: u32 } => { domains: List<DomainRef, OBJECT_LIST_MAX>,
        ret: u32 };
    connect_get_all_domain_stats = 344 { doms: List<DomainRef, OBJECT_LIST_MAX>, stats: u32,
        flags: u32 } => { ret_stats: List<StatsRecord, OBJECT_LIST_MAX> };
    domain_lookup_by_id = 22 { id: i32 } => { dom: DomainRef };
    domain_lookup_by_uuid = 24 { uuid: [u8; 16] } => { dom: DomainRef };
    domain_lookup_by_name = 23 { name: XStr } => { dom: DomainRef };
    domain_get_os_type = 19 { dom: DomainRef } => { kind: XStr };
    domain_get_info = 16 { dom: DomainRef } => { state: u32, max_mem: u64, memory: u64, nr_virt_cpu: u32,
        cpu_time: u64 };
    domain_get_state = 212 { dom: DomainRef, flags: u32 } => { state: i32, reason: i32 };
    domain_get_control_info = 229 { dom: DomainRef, flags: u32 } => { state: u32, details: u32, state_time: u64 };
    domain_is_active = 150 { dom: DomainRef } => { active: i32 };
    domain_is_persistent = 151 { dom: DomainRef } => { persistent: i32 };
    domain_is_updated = 202 { dom: DomainRef } => { updated: i32 };
    domain_get_autostart = 15 { dom: DomainRef } => { autostart: i32 };
    domain_set_autostart = 29 { dom: DomainRef, autostart: i32 } => {};
    domain_get_autostart_once = 449 { dom: DomainRef } => { autostart: i32 };
    domain_set_autostart_once = 450 { dom: DomainRef, autostart: i32 } => {};
    domain_get_max_memory = 17 { dom: DomainRef } => { memory: u64 };
    domain_get_max_vcpus = 18 { dom: DomainRef } => { num: i32 };
    domain_get_xml_desc = 14 { dom: DomainRef, flags: u32 } => { xml: XStr };
    domain_get_vcpus = 20 { dom: DomainRef, maxinfo: i32, maplen: i32 } => { info: List<VcpuInfo, OBJECT_LIST_MAX>,
        cpumaps: Opaque<CPUMAPS_MAX> };
    domain_get_vcpus_flags = 200 { dom: DomainRef, flags: u32 } => { num: i32 };
    domain_get_vcpu_pin_info = 230 { dom: DomainRef, ncpumaps: i32, maplen: i32,
        flags: u32 } => { cpumaps: Opaque<CPUMAPS_MAX>, num: i32 };
    domain_get_emulator_pin_info = 280 { dom: DomainRef, maplen: i32, flags: u32 } => { cpumaps: Opaque<CPUMAPS_MAX>,
        ret: i32 };
    domain_get_iothread_info = 351 { dom: DomainRef, flags: u32 } => { info: List<IothreadInfo, OBJECT_LIST_MAX>,
        ret: u32 };
    domain_get_security_label = 121 { dom: DomainRef } => { label: CharList<4097>, enforcing: i32 };
    domain_get_security_label_list = 278 { dom: DomainRef } => { labels: List<SecurityLabel, PARAMS_MAX>, ret: i32 };
    domain_get_messages = 426 { dom: DomainRef, flags: u32 } => { msgs: List<XStr, 2048> };
    domain_has_managed_save_image = 183 { dom: DomainRef, flags: u32 } => { result: i32 };
    domain_get_scheduler_type = 56 { dom: DomainRef } => { kind: XStr, nparams: i32 };
    domain_get_job_info = 163 { dom: DomainRef } => { kind: i32, time_elapsed: u64, time_remaining: u64,
        data_total: u64, data_processed: u64, data_remaining: u64, mem_total: u64, mem_processed: u64,
        mem_remaining: u64, file_total: u64, file_processed: u64, file_remaining: u64 };
    domain_get_job_stats = 298 { dom: DomainRef, flags: u32 } => { kind: i32, params: List<TypedParam, PARAMS_MAX> };
    domain_get_disk_errors = 263 { dom: DomainRef, maxerrors: u32, flags: u32 } => { errors: List<DiskError, 256>,
        nerrors: i32 };
    domain_get_cpu_stats = 262 { dom: DomainRef, nparams: u32, start_cpu: i32, ncpus: u32,
        flags: u32 } => { params: List<TypedParam, 2048>, nparams: i32 };
    domain_get_metadata = 265 { dom: DomainRef, kind: i32, uri: Option<XStr>, flags: u32 } => { metadata: XStr };
    domain_set_metadata = 264 { dom: DomainRef, kind: i32, metadata: Option<XStr>, key: Option<XStr>,
        uri: Option<XStr>, flags: u32 } => {};
    domain_get_block_info = 194 { dom: DomainRef, path: XStr, flags: u32 } => { allocation: u64, capacity: u64,
        physical: u64 };
    domain_block_stats = 64 { dom: DomainRef, path: XStr } => { rd_req: i64, rd_bytes: i64, wr_req: i64,
        wr_bytes: i64, errs: i64 };
    domain_block_stats_flags = 243 { dom: DomainRef, path: XStr, nparams: i32,
        flags: u32 } => { params: List<TypedParam, 16>, nparams: i32 };
    domain_block_resize = 251 { dom: DomainRef, disk: XStr, size: u64, flags: u32 } => {};
    domain_set_block_io_tune = 252 { dom: DomainRef, disk: XStr, params: List<TypedParam, 32>, flags: u32 } => {};
    domain_get_block_io_tune = 253 { dom: DomainRef, disk: Option<XStr>, nparams: i32,
        flags: u32 } => { params: List<TypedParam, 32>, nparams: i32 };
    domain_interface_stats = 65 { dom: DomainRef, device: XStr } => { rx_bytes: i64, rx_packets: i64, rx_errs: i64,
        rx_drop: i64, tx_bytes: i64, tx_packets: i64, tx_errs: i64, tx_drop: i64 };
    domain_memory_stats = 159 { dom: DomainRef, max_stats: u32, flags: u32 } => { stats: List<MemoryStat, 1024> };
    domain_interface_addresses = 353 { dom: DomainRef, source: u32, flags: u32 } => { ifaces: List<DomainInterface,
        2048> };
    domain_create_xml = 10 { xml_desc: XStr, flags: u32 } => { dom: DomainRef };
    domain_define_xml = 11 { xml: XStr } => { dom: DomainRef };
    domain_define_xml_flags = 350 { xml: XStr, flags: u32 } => { dom: DomainRef };
    domain_undefine = 35 { dom: DomainRef } => {};
    domain_undefine_flags = 231 { dom: DomainRef, flags: u32 } => {};
    domain_create = 9 { dom: DomainRef } => {};
    domain_create_with_flags = 196 { dom: DomainRef, flags: u32 } => { dom: DomainRef };
    domain_suspend = 34 { dom: DomainRef } => {};
    domain_resume = 28 { dom: DomainRef } => {};
    domain_shutdown = 33 { dom: DomainRef } => {};
    domain_shutdown_flags = 258 { dom: DomainRef, flags: u32 } => {};
    domain_reboot = 27 { dom: DomainRef, flags: u32 } => {};
    domain_reset = 245 { dom: DomainRef, flags: u32 } => {};
    domain_destroy = 12 { dom: DomainRef } => {};
    domain_destroy_flags = 234 { dom: DomainRef, flags: u32 } => {};
    domain_rename = 358 { dom: DomainRef, new_name: Option<XStr>, flags: u32 } => { retcode: i32 };
    domain_open_console = 201 { dom: DomainRef, dev_name: Option<XStr>, flags: u32 } => {};
    domain_inject_nmi = 210 { dom: DomainRef, flags: u32 } => {};
    domain_set_memory = 31 { dom: DomainRef, memory: u64 } => {};
    domain_set_max_memory = 30 { dom: DomainRef, memory: u64 } => {};
    domain_set_memory_flags = 204 { dom: DomainRef, memory: u64, flags: u32 } => {};
    domain_set_vcpus = 32 { dom: DomainRef, nvcpus: u32 } => {};
    domain_set_vcpus_flags = 199 { dom: DomainRef, nvcpus: u32, flags: u32 } => {};
    domain_set_lifecycle_action = 390 { dom: DomainRef, kind: u32, action: u32, flags: u32 } => {};
    domain_list_all_snapshots = 274 { dom: DomainRef, need_results: i32,
        flags: u32 } => { snapshots: List<SnapshotRef, OBJECT_LIST_MAX>, ret: i32 };
    domain_list_all_checkpoints = 413 { dom: DomainRef, need_results: i32,
        flags: u32 } => { checkpoints: List<CheckpointRef, OBJECT_LIST_MAX>, ret: i32 };
    domain_snapshot_num = 187 { dom: DomainRef, flags: u32 } => { num: i32 };
    domain_snapshot_list_names = 188 { dom: DomainRef, maxnames: i32, flags: u32 } => { names: List<XStr,
        OBJECT_LIST_MAX> };
    domain_has_current_snapshot = 190 { dom: DomainRef, flags: u32 } => { result: i32 };
    connect_domain_event_register = 105 {} => { cb_registered: i32 };
    connect_domain_event_deregister = 106 {} => { cb_registered: i32 };
    connect_domain_event_register_any = 167 { event_id: i32 } => {};
    connect_domain_event_deregister_any = 168 { event_id: i32 } => {};
    connect_domain_event_callback_register_any = 316 { event_id: i32,
        dom: Option<DomainRef> } => { callback_id: i32 };
    connect_domain_event_callback_deregister_any = 317 { callback_id: i32 } => {};
    connect_network_event_register_any = 313 { event_id: i32, net: Option<NetworkRef> } => { callback_id: i32 };
    connect_network_event_deregister_any = 314 { callback_id: i32 } => {};
    connect_storage_pool_event_register_any = 368 { event_id: i32,
        pool: Option<StoragePoolRef> } => { callback_id: i32 };
    connect_storage_pool_event_deregister_any = 369 { callback_id: i32 } => {};
    connect_node_device_event_register_any = 374 { event_id: i32,
        dev: Option<NodeDeviceRef> } => { callback_id: i32 };
    connect_node_device_event_deregister_any = 375 { callback_id: i32 } => {};
    connect_secret_event_register_any = 380 { event_id: i32, secret: Option<SecretRef> } => { callback_id: i32 };
    connect_secret_event_deregister_any = 381 { callback_id: i32 } => {};
    connect_list_all_networks = 283 { need_results: i32, flags: u32 } => { nets: List<NetworkRef, OBJECT_LIST_MAX>,
        ret: u32 };
    connect_list_all_storage_pools = 281 { need_results: i32, flags: u32 } => { pools: List<StoragePoolRef,
        OBJECT_LIST_MAX>, ret: u32 };
    connect_list_all_interfaces = 284 { need_results: i32, flags: u32 } => { ifaces: List<InterfaceRef,
        OBJECT_LIST_MAX>, ret: u32 };
    connect_list_all_node_devices = 285 { need_results: i32, flags: u32 } => { devices: List<NodeDeviceRef,
        NODE_DEVICE_LIST_MAX>, ret: u32 };
    connect_list_all_nwfilters = 286 { need_results: i32, flags: u32 } => { filters: List<NwfilterRef,
        OBJECT_LIST_MAX>, ret: u32 };
    connect_list_all_nwfilter_bindings = 401 { need_results: i32,
        flags: u32 } => { bindings: List<NwfilterBindingRef, OBJECT_LIST_MAX>, ret: u32 };
    connect_list_all_secrets = 287 { need_results: i32, flags: u32 } => { secrets: List<SecretRef, OBJECT_LIST_MAX>,
        ret: u32 };
    connect_num_of_networks = 52 {} => { num: i32 };
    connect_list_networks = 38 { maxnames: i32 } => { names: List<XStr, OBJECT_LIST_MAX> };
    connect_num_of_defined_networks = 50 {} => { num: i32 };
    connect_list_defined_networks = 36 { maxnames: i32 } => { names: List<XStr, OBJECT_LIST_MAX> };
    connect_num_of_storage_pools = 71 {} => { num: i32 };
    connect_list_storage_pools = 72 { maxnames: i32 } => { names: List<XStr, OBJECT_LIST_MAX> };
    connect_num_of_defined_storage_pools = 73 {} => { num: i32 };
    connect_list_defined_storage_pools = 74 { maxnames: i32 } => { names: List<XStr, OBJECT_LIST_MAX> };
    connect_num_of_interfaces = 126 {} => { num: i32 };
    connect_list_interfaces = 127 { maxnames: i32 } => { names: List<XStr, OBJECT_LIST_MAX> };
    connect_num_of_defined_interfaces = 137 {} => { num: i32 };
    connect_list_defined_interfaces = 138 { maxnames: i32 } => { names: List<XStr, OBJECT_LIST_MAX> };
    connect_num_of_nwfilters = 178 {} => { num: i32 };
    connect_list_nwfilters = 179 { maxnames: i32 } => { names: List<XStr, OBJECT_LIST_MAX> };
    connect_num_of_secrets = 139 {} => { num: i32 };
    connect_list_secrets = 140 { maxuuids: i32 } => { uuids: List<XStr, OBJECT_LIST_MAX> };
    node_num_of_devices = 111 { cap: Option<XStr>, flags: u32 } => { num: i32 };
    node_list_devices = 112 { cap: Option<XStr>, maxnames: i32, flags: u32 } => { names: List<XStr,
        NODE_DEVICE_LIST_MAX> };
    network_lookup_by_name = 46 { name: XStr } => { net: NetworkRef };
    network_lookup_by_uuid = 47 { uuid: [u8; 16] } => { net: NetworkRef };
    storage_pool_lookup_by_name = 84 { name: XStr } => { pool: StoragePoolRef };
    storage_pool_lookup_by_uuid = 85 { uuid: [u8; 16] } => { pool: StoragePoolRef };
    storage_vol_lookup_by_path = 97 { path: XStr } => { vol: StorageVolRef };
    storage_vol_lookup_by_key = 96 { key: XStr } => { vol: StorageVolRef };
    interface_lookup_by_name = 128 { name: XStr } => { iface: InterfaceRef };
    node_device_lookup_by_name = 113 { name: XStr } => { dev: NodeDeviceRef };
    nwfilter_lookup_by_name = 175 { name: XStr } => { nwfilter: NwfilterRef };
    nwfilter_lookup_by_uuid = 176 { uuid: [u8; 16] } => { nwfilter: NwfilterRef };
    secret_lookup_by_uuid = 141 { uuid: [u8; 16] } => { secret: SecretRef };
    secret_lookup_by_usage = 147 { usage_type: i32, usage_id: XStr } => { secret: SecretRef };
    nwfilter_binding_lookup_by_port_dev = 397 { name: XStr } => { nwfilter: NwfilterBindingRef };
    domain_snapshot_lookup_by_name = 189 { dom: DomainRef, name: XStr, flags: u32 } => { snap: SnapshotRef };
    domain_checkpoint_lookup_by_name = 415 { dom: DomainRef, name: XStr,
        flags: u32 } => { checkpoint: CheckpointRef };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xdr::{from_bytes, to_bytes};

    #[test]
    fn names_and_numbers_agree_with_the_procedure_table() {
        for (number, name) in TYPED {
            assert_eq!(crate::procs::remote(*number).map(|row| row.name.to_lowercase()), Some(name.to_string()));
        }
    }

    #[test]
    fn node_info_takes_a_word_per_character_of_its_model() {
        let reply = node_get_info::Reply {
            model: CharArray(b"x86_64".to_vec()),
            memory: 1,
            cpus: 2,
            mhz: 3,
            nodes: 4,
            sockets: 5,
            cores: 6,
            threads: 7,
        };
        let bytes = to_bytes(&reply);
        // 188 bytes on the wire, of them 28 are length word and header.
        assert_eq!(bytes.len(), 188 - 28);
        assert_eq!(from_bytes(&bytes), Ok(reply));
    }

    #[test]
    fn hostile_arguments_are_refused_or_read_whole() {
        let mut seed = 1u64;
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize
        };
        for _ in 0..5_000 {
            let bytes: Vec<u8> = (0..next() % 96).map(|_| if next() % 3 == 0 { next() as u8 } else { 0 }).collect();
            if let Ok(args) = from_bytes::<connect_get_all_domain_stats::Args>(&bytes) {
                assert_eq!(to_bytes(&args).len(), bytes.len());
            }
            let _ = from_bytes::<domain_set_metadata::Args>(&bytes);
            let _ = from_bytes::<node_get_security_model::Reply>(&bytes);
            let _ = from_bytes::<crate::ErrorBody>(&bytes);
        }
    }
}

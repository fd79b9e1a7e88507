//! Families of objects that are not built yet: networks, pools, interfaces, node devices, filters, secrets, snapshots,
//! checkpoints. Their lists are empty and their events can be waited for, so that clients degrade as they do against other
//! drivers; their other calls have no handler and are answered as not supported.

use rpc_wire::remote::*;
use rpc_wire::xdr::List;

use crate::dispatch::Ctx;
use crate::error::DaemonError;

macro_rules! empty_list {
    ($($name:ident, $proc:ident, $field:ident;)*) => {$(
        pub fn $name(_: &Ctx, _: $proc::Args) -> Result<$proc::Reply, DaemonError> {
            Ok($proc::Reply { $field: List::default(), ret: 0 })
        }
    )*};
}

empty_list! {
    list_all_networks, connect_list_all_networks, nets;
    list_all_storage_pools, connect_list_all_storage_pools, pools;
    list_all_interfaces, connect_list_all_interfaces, ifaces;
    list_all_node_devices, connect_list_all_node_devices, devices;
    list_all_nwfilters, connect_list_all_nwfilters, filters;
    list_all_nwfilter_bindings, connect_list_all_nwfilter_bindings, bindings;
    list_all_secrets, connect_list_all_secrets, secrets;
}

macro_rules! none_of {
    ($($name:ident, $proc:ident;)*) => {$(
        pub fn $name(_: &Ctx, _: $proc::Args) -> Result<$proc::Reply, DaemonError> {
            Ok($proc::Reply { num: 0 })
        }
    )*};
}

none_of! {
    num_of_networks, connect_num_of_networks;
    num_of_defined_networks, connect_num_of_defined_networks;
    num_of_storage_pools, connect_num_of_storage_pools;
    num_of_defined_storage_pools, connect_num_of_defined_storage_pools;
    num_of_interfaces, connect_num_of_interfaces;
    num_of_defined_interfaces, connect_num_of_defined_interfaces;
    num_of_nwfilters, connect_num_of_nwfilters;
    num_of_secrets, connect_num_of_secrets;
    node_num_of_devices, node_num_of_devices;
}

macro_rules! no_names {
    ($($name:ident, $proc:ident, $field:ident;)*) => {$(
        pub fn $name(_: &Ctx, _: $proc::Args) -> Result<$proc::Reply, DaemonError> {
            Ok($proc::Reply { $field: List::default() })
        }
    )*};
}

no_names! {
    list_networks, connect_list_networks, names;
    list_defined_networks, connect_list_defined_networks, names;
    list_storage_pools, connect_list_storage_pools, names;
    list_defined_storage_pools, connect_list_defined_storage_pools, names;
    list_interfaces, connect_list_interfaces, names;
    list_defined_interfaces, connect_list_defined_interfaces, names;
    list_nwfilters, connect_list_nwfilters, names;
    list_secrets, connect_list_secrets, uuids;
    node_list_devices, node_list_devices, names;
}

/// Nothing of these families ever happens, so a registration is a number and nothing more.
macro_rules! silent_events {
    ($($register:ident, $register_proc:ident, $deregister:ident, $deregister_proc:ident;)*) => {$(
        pub fn $register(_: &Ctx, args: $register_proc::Args) -> Result<$register_proc::Reply, DaemonError> {
            Ok($register_proc::Reply { callback_id: args.event_id })
        }
        pub fn $deregister(_: &Ctx, _: $deregister_proc::Args) -> Result<$deregister_proc::Reply, DaemonError> {
            Ok($deregister_proc::Reply {})
        }
    )*};
}

silent_events! {
    network_event_register, connect_network_event_register_any,
    network_event_deregister, connect_network_event_deregister_any;
    storage_pool_event_register, connect_storage_pool_event_register_any,
    storage_pool_event_deregister, connect_storage_pool_event_deregister_any;
    node_device_event_register, connect_node_device_event_register_any,
    node_device_event_deregister, connect_node_device_event_deregister_any;
    secret_event_register, connect_secret_event_register_any,
    secret_event_deregister, connect_secret_event_deregister_any;
}

/// The snapshots of a domain that exists.
pub fn list_all_snapshots(
    ctx: &Ctx,
    args: domain_list_all_snapshots::Args,
) -> Result<domain_list_all_snapshots::Reply, DaemonError> {
    ctx.daemon.registry.find(&args.dom)?;
    Ok(domain_list_all_snapshots::Reply { snapshots: List::default(), ret: 0 })
}

/// The checkpoints of a domain that exists.
pub fn list_all_checkpoints(
    ctx: &Ctx,
    args: domain_list_all_checkpoints::Args,
) -> Result<domain_list_all_checkpoints::Reply, DaemonError> {
    ctx.daemon.registry.find(&args.dom)?;
    Ok(domain_list_all_checkpoints::Reply { checkpoints: List::default(), ret: 0 })
}

/// How many snapshots a domain has.
pub fn snapshot_num(ctx: &Ctx, args: domain_snapshot_num::Args) -> Result<domain_snapshot_num::Reply, DaemonError> {
    ctx.daemon.registry.find(&args.dom)?;
    Ok(domain_snapshot_num::Reply { num: 0 })
}

/// Their names.
pub fn snapshot_list_names(
    ctx: &Ctx,
    args: domain_snapshot_list_names::Args,
) -> Result<domain_snapshot_list_names::Reply, DaemonError> {
    ctx.daemon.registry.find(&args.dom)?;
    Ok(domain_snapshot_list_names::Reply { names: List::default() })
}

/// Whether one is current.
pub fn has_current_snapshot(
    ctx: &Ctx,
    args: domain_has_current_snapshot::Args,
) -> Result<domain_has_current_snapshot::Reply, DaemonError> {
    ctx.daemon.registry.find(&args.dom)?;
    Ok(domain_has_current_snapshot::Reply { result: 0 })
}

//! From a call's number to its handler. Authorisation comes first: before the arguments, let alone any XML, are read.

use std::future::Future;
use std::sync::Arc;

use rpc_wire::frame::{Frame, Header, QEMU_PROGRAM, REMOTE_PROGRAM, Status, frame_of};
use rpc_wire::procs::{self, Access, Flow, Procedure};
use rpc_wire::xdr::{Decoder, from_bytes};
use rpc_wire::{Call, Xdr, qemu, remote};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::drivers::{absent, connect, console, domain_config, domain_info, domain_list, domain_run, node, subscribe};
use crate::drivers::{block_tune, domain_devices, stats};
use crate::error::DaemonError;
use crate::options::Mode;

/// What a handler needs of the world.
#[derive(Clone, Debug)]
pub struct Ctx {
    /// The daemon.
    pub daemon: Arc<Daemon>,
    /// Who asks.
    pub client: Arc<Client>,
    /// The call's header.
    pub header: Header,
    /// Name of the public C function, for refusals.
    pub api: &'static str,
}

impl Ctx {
    /// Refuses flags outside `known`.
    pub fn check_flags(&self, flags: u32, known: u32) -> Result<(), DaemonError> {
        if flags & !known == 0 {
            Ok(())
        } else {
            Err(DaemonError::UnsupportedFlags { flags: flags & !known, api: self.api })
        }
    }

    /// Answers at once.
    fn now<P: Call>(
        &self,
        payload: &[u8],
        handler: impl FnOnce(&Ctx, P::Args) -> Result<P::Reply, DaemonError>,
    ) -> Result<(), DaemonError> {
        let reply = handler(self, from_bytes(payload)?)?;
        self.client.reply(self.header, &reply);
        Ok(())
    }

    /// Answers when it is done, while the connection goes on.
    fn later<P, F>(
        &self,
        payload: &[u8],
        handler: impl FnOnce(Ctx, P::Args) -> F + Send + 'static,
    ) -> Result<(), DaemonError>
    where
        P: Call<Args: Send + 'static>,
        F: Future<Output = Result<P::Reply, DaemonError>> + Send + 'static,
    {
        let args: P::Args = from_bytes(payload)?;
        let ctx = self.clone();
        self.client.begin_call();
        tokio::spawn(async move {
            let (client, header) = (ctx.client.clone(), ctx.header);
            match handler(ctx, args).await {
                Ok(reply) => client.reply(header, &reply),
                Err(error) => client.reply_error(header, &error.body()),
            }
            client.end_call();
        });
        Ok(())
    }
}

/// Takes a call; every call gets exactly one answer.
pub fn call(daemon: &Arc<Daemon>, client: &Arc<Client>, frame: Frame) {
    let header = frame.header;
    if let Err(error) = route(daemon, client, &frame) {
        client.reply_error(header, &error.body());
    }
}

/// A hole in a stream that was not opened for holes ends the stream.
pub fn refuse_hole(client: &Client, header: Header) {
    if client.close_stream(header.serial) {
        client.send(frame_of(header.stream(Status::Error), &DaemonError::UnexpectedHole.body()));
    }
}

fn route(daemon: &Arc<Daemon>, client: &Arc<Client>, frame: &Frame) -> Result<(), DaemonError> {
    let Header { program, version, procedure: number, status, .. } = frame.header;
    if status != Status::Ok {
        return Err(DaemonError::CallStatus { status: status as u32 });
    }
    let row = match (program, version) {
        (REMOTE_PROGRAM, 1) => procs::remote(number),
        (QEMU_PROGRAM, 1) => procs::qemu(number),
        _ => return Err(DaemonError::UnknownProgram { program, version }),
    };
    let row = row.filter(|row| row.flow != Flow::Event).ok_or(DaemonError::UnknownProcedure { number })?;
    authorise(daemon, client, program, row)?;
    let ctx = Ctx { daemon: daemon.clone(), client: client.clone(), header: frame.header, api: row.api };
    let handled = if program == REMOTE_PROGRAM {
        remote_call(&ctx, number, &frame.payload)
            .or_else(|| disk_call(&ctx, number, &frame.payload))
            .or_else(|| absent_call(&ctx, number, &frame.payload))
    } else {
        qemu_call(&ctx, number, &frame.payload)
    };
    handled
        .or_else(|| agent_call(&ctx, program, number, &frame.payload))
        .unwrap_or(Err(DaemonError::NotSupported { api: row.api }))
}

/// Calls that make sense before CONNECT_OPEN: authentication, features, open and close.
const BEFORE_OPEN: [u32; 4] = [66, 60, 1, 2];

fn authorise(daemon: &Daemon, client: &Client, program: u32, row: &Procedure) -> Result<(), DaemonError> {
    let owner = rustix::process::geteuid().as_raw();
    // A session belongs to its user. The system daemon's writable socket is open to its group by its file mode.
    if daemon.mode == Mode::Session && client.peer.uid != owner && client.peer.uid != 0 {
        return Err(DaemonError::WrongUser { uid: client.peer.uid, owner });
    }
    let early = program == REMOTE_PROGRAM && BEFORE_OPEN.contains(&row.number);
    if !client.is_opened() && !early {
        return Err(DaemonError::NotOpened);
    }
    if row.access == Access::Write && client.is_read_only() {
        return Err(DaemonError::ReadOnly { api: row.api });
    }
    Ok(())
}

macro_rules! routes {
    ($ctx:ident, $number:ident, $payload:ident, now { $($now:ident => $now_fn:path,)* } later { $($later:ident => $later_fn:path,)* }) => {
        match $number {
            $(<remote::$now::Proc as Call>::NUMBER => Some($ctx.now::<remote::$now::Proc>($payload, $now_fn)),)*
            $(<remote::$later::Proc as Call>::NUMBER => Some($ctx.later::<remote::$later::Proc, _>($payload, $later_fn)),)*
            _ => None,
        }
    };
}

/// The calls that are served. One row each: a long table, no logic.
#[rustfmt::skip]
fn remote_call(ctx: &Ctx, number: u32, payload: &[u8]) -> Option<Result<(), DaemonError>> {
    routes!(ctx, number, payload,
    now {
        auth_list => connect::auth_list,
        connect_open => connect::open,
        connect_close => connect::close,
        connect_supports_feature => connect::supports_feature,
        connect_get_type => connect::get_type,
        connect_get_version => connect::get_version,
        connect_get_lib_version => connect::get_lib_version,
        connect_get_hostname => connect::get_hostname,
        connect_get_uri => connect::get_uri,
        connect_get_sysinfo => connect::get_sysinfo,
        connect_get_max_vcpus => connect::get_max_vcpus,
        connect_get_cpu_model_names => connect::get_cpu_model_names,
        connect_is_secure => connect::is_secure,
        connect_register_close_callback => connect::register_close_callback,
        connect_unregister_close_callback => connect::unregister_close_callback,
        node_get_info => node::get_info,
        node_get_cpu_stats => node::get_cpu_stats,
        node_get_memory_stats => node::get_memory_stats,
        node_get_cells_free_memory => node::get_cells_free_memory,
        node_get_free_memory => node::get_free_memory,
        node_get_cpu_map => node::get_cpu_map,
        node_get_free_pages => node::get_free_pages,
        node_get_security_model => node::get_security_model,
        connect_num_of_domains => domain_list::num_of_domains,
        connect_list_domains => domain_list::list_domains,
        connect_num_of_defined_domains => domain_list::num_of_defined_domains,
        connect_list_defined_domains => domain_list::list_defined_domains,
        connect_list_all_domains => domain_list::list_all_domains,
        domain_lookup_by_id => domain_list::lookup_by_id,
        domain_lookup_by_uuid => domain_list::lookup_by_uuid,
        domain_lookup_by_name => domain_list::lookup_by_name,
        domain_get_os_type => domain_info::get_os_type,
        domain_get_info => domain_info::get_info,
        domain_get_state => domain_info::get_state,
        domain_get_control_info => domain_info::get_control_info,
        domain_is_active => domain_info::is_active,
        domain_is_persistent => domain_info::is_persistent,
        domain_is_updated => domain_info::is_updated,
        domain_get_autostart => domain_info::get_autostart,
        domain_get_autostart_once => domain_info::get_autostart_once,
        domain_get_max_memory => domain_info::get_max_memory,
        domain_get_max_vcpus => domain_info::get_max_vcpus,
        domain_get_xml_desc => domain_info::get_xml_desc,
        domain_get_vcpus_flags => domain_info::get_vcpus_flags,
        domain_get_vcpu_pin_info => domain_info::get_vcpu_pin_info,
        domain_get_emulator_pin_info => domain_info::get_emulator_pin_info,
        domain_get_iothread_info => domain_info::get_iothread_info,
        domain_get_security_label => domain_info::get_security_label,
        domain_get_security_label_list => domain_info::get_security_label_list,
        domain_get_messages => domain_info::get_messages,
        domain_has_managed_save_image => domain_info::has_managed_save_image,
        domain_get_job_info => domain_info::get_job_info,
        domain_get_job_stats => domain_info::get_job_stats,
        domain_get_metadata => domain_config::get_metadata,
        domain_interface_stats => domain_devices::interface_stats,
        domain_interface_addresses => domain_devices::interface_addresses,
        domain_list_all_snapshots => absent::list_all_snapshots,
        domain_list_all_checkpoints => absent::list_all_checkpoints,
        domain_snapshot_num => absent::snapshot_num,
        domain_snapshot_list_names => absent::snapshot_list_names,
        domain_has_current_snapshot => absent::has_current_snapshot,
        domain_open_console => console::open_console,
        connect_domain_event_register => subscribe::event_register,
        connect_domain_event_deregister => subscribe::event_deregister,
        connect_domain_event_register_any => subscribe::event_register_any,
        connect_domain_event_deregister_any => subscribe::event_deregister_any,
        connect_domain_event_callback_register_any => subscribe::callback_register_any,
        connect_domain_event_callback_deregister_any => subscribe::callback_deregister_any,
    }
    later {
        connect_get_capabilities => connect::get_capabilities,
        connect_get_domain_capabilities => connect::get_domain_capabilities,
        connect_get_all_domain_stats => stats::get_all_domain_stats,
        domain_get_vcpus => stats::get_vcpus,
        domain_get_cpu_stats => stats::get_cpu_stats,
        domain_memory_stats => stats::memory_stats,
        domain_create_xml => domain_run::create_xml,
        domain_define_xml => domain_config::define_xml,
        domain_define_xml_flags => domain_config::define_xml_flags,
        domain_undefine => domain_config::undefine,
        domain_undefine_flags => domain_config::undefine_flags,
        domain_set_autostart => domain_config::set_autostart,
        domain_rename => domain_config::rename,
        domain_set_metadata => domain_config::set_metadata,
        domain_set_memory => domain_config::set_memory,
        domain_set_max_memory => domain_config::set_max_memory,
        domain_set_memory_flags => domain_config::set_memory_flags,
        domain_set_vcpus => domain_config::set_vcpus,
        domain_set_vcpus_flags => domain_config::set_vcpus_flags,
        domain_set_lifecycle_action => domain_config::set_lifecycle_action,
        domain_create => domain_run::create,
        domain_create_with_flags => domain_run::create_with_flags,
        domain_suspend => domain_run::suspend,
        domain_resume => domain_run::resume,
        domain_shutdown => domain_run::shutdown,
        domain_shutdown_flags => domain_run::shutdown_flags,
        domain_reboot => domain_run::reboot,
        domain_reset => domain_run::reset,
        domain_destroy => domain_run::destroy,
        domain_destroy_flags => domain_run::destroy_flags,
        domain_inject_nmi => domain_run::inject_nmi,
    })
}

/// Calls about one disk.
#[rustfmt::skip]
fn disk_call(ctx: &Ctx, number: u32, payload: &[u8]) -> Option<Result<(), DaemonError>> {
    routes!(ctx, number, payload,
    now {
        domain_get_block_io_tune => block_tune::get_block_io_tune,
        domain_get_disk_errors => domain_devices::get_disk_errors,
    }
    later {
        domain_get_block_info => domain_devices::get_block_info,
        domain_block_stats => domain_devices::block_stats,
        domain_block_resize => domain_devices::block_resize,
        domain_block_stats_flags => domain_devices::block_stats_flags,
        domain_set_block_io_tune => block_tune::set_block_io_tune,
    })
}

/// Families that come later: their lists are empty, their events can be waited for.
#[rustfmt::skip]
fn absent_call(ctx: &Ctx, number: u32, payload: &[u8]) -> Option<Result<(), DaemonError>> {
    routes!(ctx, number, payload,
    now {
        connect_list_all_networks => absent::list_all_networks,
        connect_list_all_storage_pools => absent::list_all_storage_pools,
        connect_list_all_interfaces => absent::list_all_interfaces,
        connect_list_all_node_devices => absent::list_all_node_devices,
        connect_list_all_nwfilters => absent::list_all_nwfilters,
        connect_list_all_nwfilter_bindings => absent::list_all_nwfilter_bindings,
        connect_list_all_secrets => absent::list_all_secrets,
        connect_num_of_networks => absent::num_of_networks,
        connect_list_networks => absent::list_networks,
        connect_num_of_defined_networks => absent::num_of_defined_networks,
        connect_list_defined_networks => absent::list_defined_networks,
        connect_num_of_storage_pools => absent::num_of_storage_pools,
        connect_list_storage_pools => absent::list_storage_pools,
        connect_num_of_defined_storage_pools => absent::num_of_defined_storage_pools,
        connect_list_defined_storage_pools => absent::list_defined_storage_pools,
        connect_num_of_interfaces => absent::num_of_interfaces,
        connect_list_interfaces => absent::list_interfaces,
        connect_num_of_defined_interfaces => absent::num_of_defined_interfaces,
        connect_list_defined_interfaces => absent::list_defined_interfaces,
        connect_num_of_nwfilters => absent::num_of_nwfilters,
        connect_list_nwfilters => absent::list_nwfilters,
        connect_num_of_secrets => absent::num_of_secrets,
        connect_list_secrets => absent::list_secrets,
        node_num_of_devices => absent::node_num_of_devices,
        node_list_devices => absent::node_list_devices,
        connect_network_event_register_any => absent::network_event_register,
        connect_network_event_deregister_any => absent::network_event_deregister,
        connect_storage_pool_event_register_any => absent::storage_pool_event_register,
        connect_storage_pool_event_deregister_any => absent::storage_pool_event_deregister,
        connect_node_device_event_register_any => absent::node_device_event_register,
        connect_node_device_event_deregister_any => absent::node_device_event_deregister,
        connect_secret_event_register_any => absent::secret_event_register,
        connect_secret_event_deregister_any => absent::secret_event_deregister,
    }
    later {})
}

/// Calls that a guest's agent would answer: file systems, host name, time, users, keys, vcpus as the guest sees them.
const AGENT_CALLS: [u32; 12] = [277, 294, 335, 336, 337, 338, 349, 357, 371, 418, 424, 425];

/// No guest has an agent, and no channel for one. Like every domain call these begin with the domain.
fn agent_call(ctx: &Ctx, program: u32, number: u32, payload: &[u8]) -> Option<Result<(), DaemonError>> {
    if program != REMOTE_PROGRAM || !AGENT_CALLS.contains(&number) {
        return None;
    }
    let answer = rpc_wire::DomainRef::decode(&mut Decoder::new(payload)).map_err(DaemonError::from).and_then(|dom| {
        let running = ctx.daemon.registry.find(&dom)?.snapshot().live.is_some();
        Err(if running { DaemonError::NoAgent } else { DaemonError::NotRunning })
    });
    Some(answer)
}

fn qemu_call(ctx: &Ctx, number: u32, payload: &[u8]) -> Option<Result<(), DaemonError>> {
    let answer = match number {
        qemu::EVENT_REGISTER => from_bytes(payload).map_err(DaemonError::from).and_then(|args| {
            let callback_id = ctx.daemon.events.register_monitor(&ctx.client, &args)?;
            ctx.client.reply(ctx.header, &qemu::EventCallback { callback_id });
            Ok(())
        }),
        qemu::EVENT_DEREGISTER => {
            from_bytes(payload).map_err(DaemonError::from).and_then(|args: qemu::EventCallback| {
                ctx.daemon.events.deregister_monitor(&ctx.client, args.callback_id)?;
                ctx.client.reply(ctx.header, &());
                Ok(())
            })
        }
        _ => return None,
    };
    Some(answer)
}

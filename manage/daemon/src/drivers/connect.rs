//! Opening a connection, and what can be asked about the connection and the hypervisor as a whole.

use rpc_wire::remote::*;
use rpc_wire::xdr::{List, XStr};

use crate::dispatch::Ctx;
use crate::drivers::capabilities;
use crate::error::DaemonError;
use crate::host;
use crate::options::Mode;

/// Reported hypervisor version, as `major * 1000000 + minor * 1000 + release`: tools gate features on QEMU's numbers.
const HYPERVISOR_VERSION: u64 = 10_000_002;
/// Reported library version: the libvirt release whose protocol and behaviour are followed.
const LIBRARY_VERSION: u64 = 11_003_000;
/// CONNECT_OPEN flag: read only.
const OPEN_READ_ONLY: u32 = 1;
/// CONNECT_OPEN flags that steer the client's library and are passed on: no aliases, a daemon was to be started.
const OPEN_CLIENTS_OWN: u32 = 2 | 4;
/// Feature a client asks for to start keepalive.
const FEATURE_KEEPALIVE: i32 = 10;
/// Features that are there: typed strings (9), keepalive (10), event callbacks (14), close callbacks (15), network
/// update order (16).
const FEATURES: [i32; 5] = [9, FEATURE_KEEPALIVE, 14, 15, 16];
/// AUTH_LIST type: none. Who may connect is decided by the socket.
const AUTH_NONE: i32 = 0;
/// Most vCPUs of a machine.
pub const VCPUS_MAX: i32 = 1;

pub fn auth_list(_: &Ctx, _: auth_list::Args) -> Result<auth_list::Reply, DaemonError> {
    Ok(auth_list::Reply { types: List(vec![AUTH_NONE]) })
}

pub fn open(ctx: &Ctx, args: connect_open::Args) -> Result<connect_open::Reply, DaemonError> {
    ctx.check_flags(args.flags, OPEN_READ_ONLY | OPEN_CLIENTS_OWN)?;
    if let Some(name) = args.name.as_ref().filter(|name| !name.0.is_empty()) {
        check_uri(ctx, &name.lossy())?;
    }
    if args.flags & OPEN_READ_ONLY != 0 {
        ctx.client.drop_write_access();
    }
    ctx.client.set_opened(true);
    Ok(connect_open::Reply {})
}

/// Accepts `qemu:///system` or `qemu:///session`, whichever this daemon is.
fn check_uri(ctx: &Ctx, uri: &str) -> Result<(), DaemonError> {
    let no_driver = || DaemonError::NoDriver { uri: uri.into() };
    let (scheme, rest) = uri.split_once("://").ok_or_else(no_driver)?;
    let scheme = scheme.split('+').next().unwrap_or(scheme);
    if !matches!(scheme, "qemu" | "vireo") {
        return Err(no_driver());
    }
    let path = rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/");
    let path = path.split(['?', '#']).next().unwrap_or(path);
    let expected = mode_name(ctx.daemon.mode);
    let either = ctx.daemon.rooted && matches!(path, "/system" | "/session");
    if either || path.strip_prefix('/') == Some(expected) {
        return Ok(());
    }
    Err(DaemonError::UriPath { scheme: scheme.into(), path: path.into(), expected })
}

fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::System => "system",
        Mode::Session => "session",
    }
}

pub fn close(ctx: &Ctx, _: connect_close::Args) -> Result<connect_close::Reply, DaemonError> {
    ctx.client.set_opened(false);
    ctx.daemon.events.forget_client(ctx.client.id);
    Ok(connect_close::Reply {})
}

pub fn supports_feature(
    ctx: &Ctx,
    args: connect_supports_feature::Args,
) -> Result<connect_supports_feature::Reply, DaemonError> {
    if args.feature == FEATURE_KEEPALIVE {
        ctx.client.enable_keepalive();
    }
    Ok(connect_supports_feature::Reply { supported: i32::from(FEATURES.contains(&args.feature)) })
}

pub fn get_type(_: &Ctx, _: connect_get_type::Args) -> Result<connect_get_type::Reply, DaemonError> {
    Ok(connect_get_type::Reply { kind: "QEMU".into() })
}

pub fn get_version(_: &Ctx, _: connect_get_version::Args) -> Result<connect_get_version::Reply, DaemonError> {
    Ok(connect_get_version::Reply { hypervisor_version: HYPERVISOR_VERSION })
}

pub fn get_lib_version(
    _: &Ctx,
    _: connect_get_lib_version::Args,
) -> Result<connect_get_lib_version::Reply, DaemonError> {
    Ok(connect_get_lib_version::Reply { library_version: LIBRARY_VERSION })
}

pub fn get_hostname(_: &Ctx, _: connect_get_hostname::Args) -> Result<connect_get_hostname::Reply, DaemonError> {
    Ok(connect_get_hostname::Reply { hostname: host::hostname().into() })
}

pub fn get_uri(ctx: &Ctx, _: connect_get_uri::Args) -> Result<connect_get_uri::Reply, DaemonError> {
    Ok(connect_get_uri::Reply { uri: format!("qemu:///{}", mode_name(ctx.daemon.mode)).into() })
}

pub fn get_sysinfo(_: &Ctx, _: connect_get_sysinfo::Args) -> Result<connect_get_sysinfo::Reply, DaemonError> {
    Err(DaemonError::NoSmbios)
}

pub fn get_max_vcpus(_: &Ctx, _: connect_get_max_vcpus::Args) -> Result<connect_get_max_vcpus::Reply, DaemonError> {
    Ok(connect_get_max_vcpus::Reply { max_vcpus: VCPUS_MAX })
}

/// There are no named models: a guest has everything its engine has.
pub fn get_cpu_model_names(
    _: &Ctx,
    _: connect_get_cpu_model_names::Args,
) -> Result<connect_get_cpu_model_names::Reply, DaemonError> {
    Ok(connect_get_cpu_model_names::Reply { models: List::default(), ret: 0 })
}

pub fn is_secure(_: &Ctx, _: connect_is_secure::Args) -> Result<connect_is_secure::Reply, DaemonError> {
    Ok(connect_is_secure::Reply { secure: 1 })
}

/// The callback tells of the end of our connection to the hypervisor, which is this process.
pub fn register_close_callback(
    _: &Ctx,
    _: connect_register_close_callback::Args,
) -> Result<connect_register_close_callback::Reply, DaemonError> {
    Ok(connect_register_close_callback::Reply {})
}

pub fn unregister_close_callback(
    _: &Ctx,
    _: connect_unregister_close_callback::Args,
) -> Result<connect_unregister_close_callback::Reply, DaemonError> {
    Ok(connect_unregister_close_callback::Reply {})
}

pub async fn get_capabilities(
    ctx: Ctx,
    _: connect_get_capabilities::Args,
) -> Result<connect_get_capabilities::Reply, DaemonError> {
    let kvm = ctx.daemon.kvm().await.usable;
    let document = xml::to_document(&capabilities::host(kvm, &ctx.daemon.vmm));
    Ok(connect_get_capabilities::Reply { capabilities: document.into() })
}

pub async fn get_domain_capabilities(
    ctx: Ctx,
    args: connect_get_domain_capabilities::Args,
) -> Result<connect_get_domain_capabilities::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0b111)?;
    let text = |value: &Option<XStr>| value.as_ref().map(|value| value.lossy().into_owned());
    let arch = text(&args.arch);
    if let Some(arch) = arch.filter(|arch| arch != "x86_64") {
        return Err(DaemonError::HostArgument {
            detail: format!("architecture '{arch}' does not exist here, use x86_64"),
        });
    }
    if let Some(machine) = text(&args.machine).filter(|machine| !capabilities::is_machine(machine)) {
        return Err(DaemonError::HostArgument { detail: format!("machine type '{machine}' does not exist, use q35") });
    }
    let kvm = ctx.daemon.kvm().await;
    let virt_type = match text(&args.virttype).as_deref() {
        None if kvm.usable => xml::VirtType::Kvm,
        None | Some("qemu") => xml::VirtType::Qemu,
        Some("kvm") => {
            ctx.daemon.check_engine(xml::VirtType::Kvm).await?;
            xml::VirtType::Kvm
        }
        Some(other) => {
            return Err(DaemonError::HostArgument { detail: format!("unknown virttype: {other}; use qemu or kvm") });
        }
    };
    let document = xml::to_document(&capabilities::domain(virt_type, &ctx.daemon.vmm));
    Ok(connect_get_domain_capabilities::Reply { capabilities: document.into() })
}

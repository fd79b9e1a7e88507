//! Changing definitions.

use std::sync::Arc;

use rpc_wire::DomainRef;
use rpc_wire::remote::*;
use rpc_wire::xdr::XStr;
use xml::{DefineContext, DomainDefinition, LifecycleAction, LifecycleEvent, VcpuCount};

use crate::daemon::Daemon;
use crate::dispatch::Ctx;
use crate::domain::{Domain, Snapshot};
use crate::drivers::domain_info::affected;
use crate::error::DaemonError;
use crate::events::DomainEvent;
use crate::owner::{self, AFFECT_CONFIG, AFFECT_LIVE, Command, Edit};
use crate::registry::Claimed;

/// Define and create flag of their own each: check against the format.
const DEFINE_VALIDATE: u32 = 1;
/// Memory and vcpu flag: the maximum.
const MAXIMUM: u32 = 4;
/// vcpu flag: through the guest's agent.
const VCPU_GUEST: u32 = 8;
/// vcpu flag: vcpus that can be unplugged.
const VCPU_HOTPLUGGABLE: u32 = 16;

/// Reads a client's document as a definition.
pub fn read_definition(ctx: &Ctx, document: &XStr, validate: bool) -> Result<DomainDefinition, DaemonError> {
    let emulator = ctx.daemon.vmm.to_string_lossy();
    let mut context = DefineContext { emulator: &emulator, random: &mut Daemon::random };
    let (name, uuid) = DomainDefinition::identify(&document.0)?;
    let mut definition = DomainDefinition::define(&document.0, &mut context)?;
    if validate {
        definition.check_schema()?;
    }
    // A document without a uuid is a new domain; where its name is taken, the refusal names the holder's uuid.
    if uuid.is_none()
        && let Some(holder) = ctx.daemon.registry.by_name(&name)
    {
        return Err(DaemonError::NameTaken { name, uuid: holder.uuid });
    }
    if uuid.is_none() {
        definition.set_uuid(uuid::Builder::from_random_bytes(Daemon::random()).into_uuid())?;
    }
    definition.check_buildable()?;
    Ok(definition)
}

pub async fn define_xml(ctx: Ctx, args: domain_define_xml::Args) -> Result<domain_define_xml::Reply, DaemonError> {
    Ok(domain_define_xml::Reply { dom: define(&ctx, &args.xml, false).await? })
}

pub async fn define_xml_flags(
    ctx: Ctx,
    args: domain_define_xml_flags::Args,
) -> Result<domain_define_xml_flags::Reply, DaemonError> {
    ctx.check_flags(args.flags, DEFINE_VALIDATE)?;
    Ok(domain_define_xml_flags::Reply { dom: define(&ctx, &args.xml, args.flags & DEFINE_VALIDATE != 0).await? })
}

async fn define(ctx: &Ctx, document: &XStr, validate: bool) -> Result<DomainRef, DaemonError> {
    let definition = read_definition(ctx, document, validate)?;
    let (name, uuid) = (definition.config().name.clone(), definition.config().uuid);
    let command = Command::Define(Box::new(definition));
    let domain = match ctx.daemon.registry.claim(&name, uuid)? {
        Claimed::Existing(domain) => {
            owner::ask(&ctx.daemon, &domain, command).await?;
            domain
        }
        Claimed::New(claim) => {
            let domain = Arc::new(Domain::new(uuid, Snapshot::unborn(&name)));
            owner::ask(&ctx.daemon, &domain, command).await?;
            ctx.daemon.registry.insert(domain.clone());
            drop(claim);
            domain
        }
    };
    Ok(domain.reference())
}

pub async fn undefine(ctx: Ctx, args: domain_undefine::Args) -> Result<domain_undefine::Reply, DaemonError> {
    let domain = ctx.daemon.registry.find(&args.dom)?;
    owner::ask(&ctx.daemon, &domain, Command::Undefine).await?;
    Ok(domain_undefine::Reply {})
}

/// The flags speak of things that no domain has: saved states, snapshots, NVRAM, TPM states, checkpoints.
pub async fn undefine_flags(
    ctx: Ctx,
    args: domain_undefine_flags::Args,
) -> Result<domain_undefine_flags::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0x7f)?;
    let domain = ctx.daemon.registry.find(&args.dom)?;
    owner::ask(&ctx.daemon, &domain, Command::Undefine).await?;
    Ok(domain_undefine_flags::Reply {})
}

pub async fn set_autostart(
    ctx: Ctx,
    args: domain_set_autostart::Args,
) -> Result<domain_set_autostart::Reply, DaemonError> {
    let domain = ctx.daemon.registry.find(&args.dom)?;
    owner::ask(&ctx.daemon, &domain, Command::SetAutostart(args.autostart != 0)).await?;
    Ok(domain_set_autostart::Reply {})
}

pub async fn rename(ctx: Ctx, args: domain_rename::Args) -> Result<domain_rename::Reply, DaemonError> {
    ctx.check_flags(args.flags, 0)?;
    let domain = ctx.daemon.registry.find(&args.dom)?;
    let name = args.new_name.map(|name| name.lossy().into_owned()).unwrap_or_default();
    if name.is_empty() || name.contains('/') {
        return Err(DaemonError::RenameInvalid { name: domain.snapshot().name.to_string() });
    }
    owner::ask(&ctx.daemon, &domain, Command::Rename(name)).await?;
    Ok(domain_rename::Reply { retcode: 0 })
}

/// What metadata calls speak of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MetadataKind {
    Description = 0,
    Title = 1,
    Element = 2,
}

impl MetadataKind {
    fn from_number(number: i32) -> Result<MetadataKind, DaemonError> {
        match number {
            0 => Ok(MetadataKind::Description),
            1 => Ok(MetadataKind::Title),
            2 => Ok(MetadataKind::Element),
            _ => Err(DaemonError::MetadataInvalid { detail: "unknown metadata type" }),
        }
    }

    fn element(self) -> &'static str {
        match self {
            MetadataKind::Description => "description",
            MetadataKind::Title => "title",
            MetadataKind::Element => "metadata",
        }
    }
}

fn text(value: &Option<XStr>) -> Option<String> {
    value.as_ref().map(|value| value.lossy().into_owned())
}

pub fn get_metadata(ctx: &Ctx, args: domain_get_metadata::Args) -> Result<domain_get_metadata::Reply, DaemonError> {
    ctx.check_flags(args.flags, AFFECT_LIVE | AFFECT_CONFIG)?;
    let kind = MetadataKind::from_number(args.kind)?;
    let snapshot = ctx.daemon.registry.find(&args.dom)?.snapshot();
    let xml = &affected(&snapshot, args.flags)?.xml;
    // A listing with titles asks this of every domain, and few have any.
    if !xml.contains(kind.element()) {
        return Err(DaemonError::NoMetadata);
    }
    let definition = DomainDefinition::load(xml.as_bytes())?;
    let found = match kind {
        MetadataKind::Element => {
            let uri = text(&args.uri).ok_or(DaemonError::MetadataInvalid { detail: "the namespace uri is missing" })?;
            definition.metadata(&uri)
        }
        MetadataKind::Description | MetadataKind::Title => definition.text_of(kind.element()),
    };
    Ok(domain_get_metadata::Reply { metadata: found.ok_or(DaemonError::NoMetadata)?.into() })
}

pub async fn set_metadata(
    ctx: Ctx,
    args: domain_set_metadata::Args,
) -> Result<domain_set_metadata::Reply, DaemonError> {
    ctx.check_flags(args.flags, AFFECT_LIVE | AFFECT_CONFIG)?;
    let kind = MetadataKind::from_number(args.kind)?;
    let (document, key, uri) = (text(&args.metadata), text(&args.key), text(&args.uri));
    if kind == MetadataKind::Element {
        if uri.as_deref().is_none_or(str::is_empty) {
            return Err(DaemonError::MetadataInvalid { detail: "the namespace uri is missing" });
        }
        if document.is_some() && key.as_deref().is_none_or(|key| !is_prefix(key)) {
            return Err(DaemonError::MetadataInvalid { detail: "the key is missing or no XML name" });
        }
    }
    let namespace = uri.clone();
    let change = move |definition: &mut DomainDefinition| {
        match kind {
            MetadataKind::Element => {
                let (uri, key) = (uri.as_deref().unwrap_or_default(), key.as_deref().unwrap_or_default());
                definition.set_metadata(uri, key, document.as_deref())?;
            }
            MetadataKind::Description | MetadataKind::Title => {
                definition.set_text_of(kind.element(), document.as_deref())?;
            }
        }
        Ok(())
    };
    let uri = if kind == MetadataKind::Element { namespace } else { None };
    let event = Some(DomainEvent::Metadata { kind: kind as i32, uri });
    edit(&ctx, &args.dom, Edit { affect: args.flags, change: Box::new(change), not_live: None, event, machine: None })
        .await?;
    Ok(domain_set_metadata::Reply {})
}

/// A namespace prefix we would write: letters, digits, `_`, `-`, not starting with a digit or hyphen.
fn is_prefix(key: &str) -> bool {
    let first = key.chars().next().is_some_and(|first| first.is_alphabetic() || first == '_');
    first && key.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '.'))
}

async fn edit(ctx: &Ctx, dom: &DomainRef, edit: Edit) -> Result<(), DaemonError> {
    let domain = ctx.daemon.registry.find(dom)?;
    owner::ask(&ctx.daemon, &domain, Command::Edit(edit)).await
}

async fn change_memory(ctx: &Ctx, dom: &DomainRef, kib: u64, flags: u32) -> Result<(), DaemonError> {
    if kib == 0 {
        return Err(DaemonError::BadArgument { argument: "memory", found: 0, api: ctx.api });
    }
    let maximum = flags & MAXIMUM != 0;
    let change = move |definition: &mut DomainDefinition| {
        if maximum {
            return Ok(definition.set_max_memory_kib(kib)?);
        }
        let max = definition.config().memory_kib;
        if kib > max {
            return Err(DaemonError::TooMuchMemory { wanted: kib, max });
        }
        Ok(definition.set_current_memory_kib(kib)?)
    };
    let affect = flags & (AFFECT_LIVE | AFFECT_CONFIG);
    edit(ctx, dom, Edit { affect, change: Box::new(change), not_live: Some("the memory"), event: None, machine: None })
        .await
}

pub async fn set_memory(ctx: Ctx, args: domain_set_memory::Args) -> Result<domain_set_memory::Reply, DaemonError> {
    change_memory(&ctx, &args.dom, args.memory, AFFECT_LIVE).await?;
    Ok(domain_set_memory::Reply {})
}

pub async fn set_max_memory(
    ctx: Ctx,
    args: domain_set_max_memory::Args,
) -> Result<domain_set_max_memory::Reply, DaemonError> {
    change_memory(&ctx, &args.dom, args.memory, MAXIMUM).await?;
    Ok(domain_set_max_memory::Reply {})
}

pub async fn set_memory_flags(
    ctx: Ctx,
    args: domain_set_memory_flags::Args,
) -> Result<domain_set_memory_flags::Reply, DaemonError> {
    ctx.check_flags(args.flags, AFFECT_LIVE | AFFECT_CONFIG | MAXIMUM)?;
    change_memory(&ctx, &args.dom, args.memory, args.flags).await?;
    Ok(domain_set_memory_flags::Reply {})
}

async fn change_vcpus(ctx: &Ctx, dom: &DomainRef, count: u32, flags: u32) -> Result<(), DaemonError> {
    if count == 0 {
        return Err(DaemonError::BadArgument { argument: "nvcpus", found: 0, api: ctx.api });
    }
    if flags & VCPU_GUEST != 0 {
        return Err(DaemonError::NoAgent);
    }
    let which = if flags & MAXIMUM != 0 { VcpuCount::Maximum } else { VcpuCount::Current };
    let change = move |definition: &mut DomainDefinition| {
        let max = definition.config().max_vcpus;
        if which == VcpuCount::Current && count > max {
            return Err(DaemonError::TooManyVcpus { wanted: count, max });
        }
        Ok(definition.set_vcpus(which, count)?)
    };
    let affect = flags & (AFFECT_LIVE | AFFECT_CONFIG);
    edit(
        ctx,
        dom,
        Edit { affect, change: Box::new(change), not_live: Some("the number of vCPUs"), event: None, machine: None },
    )
    .await
}

pub async fn set_vcpus(ctx: Ctx, args: domain_set_vcpus::Args) -> Result<domain_set_vcpus::Reply, DaemonError> {
    change_vcpus(&ctx, &args.dom, args.nvcpus, AFFECT_LIVE).await?;
    Ok(domain_set_vcpus::Reply {})
}

pub async fn set_vcpus_flags(
    ctx: Ctx,
    args: domain_set_vcpus_flags::Args,
) -> Result<domain_set_vcpus_flags::Reply, DaemonError> {
    ctx.check_flags(args.flags, AFFECT_LIVE | AFFECT_CONFIG | MAXIMUM | VCPU_GUEST | VCPU_HOTPLUGGABLE)?;
    change_vcpus(&ctx, &args.dom, args.nvcpus, args.flags).await?;
    Ok(domain_set_vcpus_flags::Reply {})
}

pub async fn set_lifecycle_action(
    ctx: Ctx,
    args: domain_set_lifecycle_action::Args,
) -> Result<domain_set_lifecycle_action::Reply, DaemonError> {
    ctx.check_flags(args.flags, AFFECT_LIVE | AFFECT_CONFIG)?;
    let event = match args.kind {
        0 => LifecycleEvent::Poweroff,
        1 => LifecycleEvent::Reboot,
        2 => LifecycleEvent::Crash,
        found => return Err(DaemonError::BadArgument { argument: "type", found: found.into(), api: ctx.api }),
    };
    let action = match args.action {
        0 => LifecycleAction::Destroy,
        1 | 2 => LifecycleAction::Restart,
        3 => LifecycleAction::Preserve,
        _ => {
            let detail = "core dumps of guests do not exist yet; use destroy, restart or preserve".into();
            return Err(DaemonError::Unsupported { detail });
        }
    };
    let change = move |definition: &mut DomainDefinition| Ok(definition.set_lifecycle(event, action)?);
    let not_live = Some("the action for a power event");
    edit(&ctx, &args.dom, Edit { affect: args.flags, change: Box::new(change), not_live, event: None, machine: None })
        .await?;
    Ok(domain_set_lifecycle_action::Reply {})
}

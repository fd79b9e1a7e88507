//! Limits of disks: what `virsh blkdeviotune` shows and sets.

use monitor::{Command as MonitorCommand, DiskThrottle, RateLimit, RateLimits};
use rpc_wire::remote::*;
use rpc_wire::xdr::List;
use rpc_wire::{ParamValue, TypedParam};
use xml::{Disk, DomainConfig, DomainDefinition, IO_TUNE_GROUP, IO_TUNE_LIMITS, IO_TUNE_MAX, IoTune};

use crate::dispatch::Ctx;
use crate::drivers::domain_info::{affected, snapshot};
use crate::error::DaemonError;
use crate::events::DomainEvent;
use crate::owner::{self, AFFECT_CONFIG, AFFECT_LIVE, Command, Edit, MachineChange};

/// Typed parameter flag: the client takes strings.
const STRINGS: u32 = 4;

/// What a call sets.
#[derive(Clone, Debug, Default)]
struct Wanted {
    numbers: Vec<(String, u64)>,
    group: Option<String>,
}

fn find<'a>(config: &'a DomainConfig, path: &str) -> Option<&'a Disk> {
    config.disks.iter().find(|disk| disk.target == path || disk.source.path() == Some(path))
}

/// The limits as vireo-vmm takes them.
pub fn throttle(tune: &IoTune) -> DiskThrottle {
    let limit =
        |at: usize| RateLimit { rate: tune.rates[at], burst_rate: tune.bursts[at], burst_s: tune.burst_lengths[at] };
    DiskThrottle {
        group: tune.group.clone(),
        bytes: RateLimits { total: limit(0), read: limit(1), write: limit(2) },
        requests: RateLimits { total: limit(3), read: limit(4), write: limit(5) },
        request_bytes: tune.request_bytes,
    }
}

pub fn get_block_io_tune(
    ctx: &Ctx,
    args: domain_get_block_io_tune::Args,
) -> Result<domain_get_block_io_tune::Reply, DaemonError> {
    ctx.check_flags(args.flags, AFFECT_LIVE | AFFECT_CONFIG | STRINGS)?;
    let snapshot = snapshot(ctx, &args.dom)?;
    let config = &affected(&snapshot, args.flags)?.config;
    let live = snapshot.live.is_some() && args.flags & AFFECT_CONFIG == 0;
    // Who asks for the number only names no disk.
    let tune = match &args.disk {
        Some(path) if args.nparams != 0 => {
            let path = path.lossy();
            let missing = || match live {
                true => DaemonError::DiskNotInDomain { path: path.clone().into_owned() },
                false => DaemonError::DiskNotInConfig { path: path.clone().into_owned() },
            };
            in_force(&find(config, &path).ok_or_else(missing)?.iotune, live)
        }
        _ => IoTune::default(),
    };
    let number = |(name, value): (String, u64)| TypedParam::new(name, ParamValue::Ullong(value));
    let mut params: Vec<TypedParam> = tune.numbers().into_iter().map(number).collect();
    if args.flags & STRINGS != 0 {
        let group = ParamValue::String(tune.group.as_deref().unwrap_or_default().into());
        let lengths = params.len() - IO_TUNE_LIMITS.len();
        params.insert(lengths, TypedParam::new(IO_TUNE_GROUP, group));
    }
    let nparams = params.len() as i32;
    params.truncate(usize::try_from(args.nparams).unwrap_or(0));
    Ok(domain_get_block_io_tune::Reply { params: List(params), nparams })
}

/// Limits as a running machine keeps them: a burst lasts a second where nothing else is said.
fn in_force(tune: &IoTune, live: bool) -> IoTune {
    let mut tune = tune.clone();
    for (length, burst) in tune.burst_lengths.iter_mut().zip(tune.bursts).filter(|(_, burst)| live && *burst > 0) {
        *length = (*length).max(u64::from(burst > 0));
    }
    tune
}

pub async fn set_block_io_tune(
    ctx: Ctx,
    args: domain_set_block_io_tune::Args,
) -> Result<domain_set_block_io_tune::Reply, DaemonError> {
    ctx.check_flags(args.flags, AFFECT_LIVE | AFFECT_CONFIG)?;
    let wanted = wanted(&args.params.0)?;
    let path = args.disk.lossy().into_owned();
    let domain = ctx.daemon.registry.find(&args.dom)?;
    let target = domain.snapshot().current().and_then(|now| Some(find(&now.config, &path)?.target.clone()));
    let event = DomainEvent::Tunable { params: told(&target.unwrap_or_else(|| path.clone()), &wanted) };
    let named = path.clone();
    let change = move |definition: &mut DomainDefinition| change_limits(definition, &named, &wanted);
    let command = move |config: &DomainConfig| {
        let disk = find(config, &path).ok_or_else(|| DaemonError::DiskNotInConfig { path: path.clone() })?;
        check_bursts(&disk.iotune)?;
        Ok(MonitorCommand::SetDiskThrottle { target: disk.target.clone(), throttle: throttle(&disk.iotune) })
    };
    let machine = Some(MachineChange { command: Box::new(command), event: Some(event) });
    let edit = Edit { affect: args.flags, change: Box::new(change), not_live: None, event: None, machine };
    owner::ask(&ctx.daemon, &domain, Command::Edit(edit)).await?;
    Ok(domain_set_block_io_tune::Reply {})
}

/// Reads what a call sets, in libvirt's order of refusals.
fn wanted(params: &[TypedParam]) -> Result<Wanted, DaemonError> {
    let mut wanted = Wanted::default();
    let mut set = IoTune::default();
    for TypedParam { field, value } in params {
        let name = field.lossy().into_owned();
        let (found, expected) = match value {
            ParamValue::String(group) if name == IO_TUNE_GROUP => {
                wanted.group = Some(group.lossy().into_owned());
                continue;
            }
            ParamValue::Ullong(number) if set.set(&name, *number) => {
                wanted.numbers.push((name, *number));
                continue;
            }
            _ if name == IO_TUNE_GROUP => (type_name(value), "string"),
            _ if set.set(&name, 0) => (type_name(value), "ullong"),
            _ => return Err(DaemonError::UnknownParameter { field: name }),
        };
        return Err(DaemonError::ParameterType { field: name, found, expected });
    }
    if wanted.numbers.iter().any(|(_, value)| *value > IO_TUNE_MAX) {
        return Err(DaemonError::IoTuneTooLarge { limit: IO_TUNE_MAX });
    }
    match set.exclusive() {
        Some(family) => Err(DaemonError::IoTuneExclusive { family }),
        None => Ok(wanted),
    }
}

fn type_name(value: &ParamValue) -> &'static str {
    match value {
        ParamValue::Int(_) => "int",
        ParamValue::Uint(_) => "uint",
        ParamValue::Llong(_) => "llong",
        ParamValue::Ullong(_) => "ullong",
        ParamValue::Double(_) => "double",
        ParamValue::Boolean(_) => "boolean",
        ParamValue::String(_) => "string",
    }
}

/// What listeners are told.
fn told(target: &str, wanted: &Wanted) -> Vec<TypedParam> {
    let disk = TypedParam::new("blkdeviotune.disk", ParamValue::String(target.into()));
    let named =
        |(name, value): &(String, u64)| TypedParam::new(format!("blkdeviotune.{name}"), ParamValue::Ullong(*value));
    let group = wanted
        .group
        .as_deref()
        .map(|group| TypedParam::new(format!("blkdeviotune.{IO_TUNE_GROUP}"), ParamValue::String(group.into())));
    std::iter::once(disk).chain(wanted.numbers.iter().map(named)).chain(group).collect()
}

/// Changes the limits of a disk and of those that share them. A disk that joins a group begins with the group's limits.
fn change_limits(definition: &mut DomainDefinition, path: &str, wanted: &Wanted) -> Result<(), DaemonError> {
    let config = definition.config();
    let disk = find(config, path).ok_or_else(|| DaemonError::DiskNotInConfig { path: path.into() })?;
    let of_group = |group: &String| config.disks.iter().find(|disk| disk.iotune.group.as_ref() == Some(group));
    let old = wanted.group.as_ref().and_then(of_group).map_or(&disk.iotune, |member| &member.iotune);
    let new = old.changed(&wanted.numbers, wanted.group.as_deref());
    let shares = |other: &&Disk| other.target == disk.target || new.group.is_some() && other.iotune.group == new.group;
    let targets: Vec<String> = config.disks.iter().filter(shares).map(|disk| disk.target.clone()).collect();
    Ok(definition.set_io_tune(&targets, &new)?)
}

/// A running machine refuses bursts without or below the limit they belong to.
fn check_bursts(tune: &IoTune) -> Result<(), DaemonError> {
    for (field, (rate, burst)) in IO_TUNE_LIMITS.into_iter().zip(tune.rates.into_iter().zip(tune.bursts)) {
        if burst > 0 && rate == 0 {
            return Err(DaemonError::IoTuneReset { field });
        }
        if burst > 0 && burst < rate {
            return Err(DaemonError::IoTuneBurstBelow { field });
        }
    }
    Ok(())
}

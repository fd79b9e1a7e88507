//! Changing definitions.

use client::{Affect, DomainRef, Metadata};
use serde_json::json;

use crate::editor;
use crate::failure::{Failure, WhileDoing};
use crate::grammar::{Args, DOMAIN, Done, Group, Kind, Opt, Verb, flag, named, need, option};
use crate::shell::Shell;

const fn verb(
    name: &'static str,
    summary: &'static str,
    options: &'static [Opt],
    run: fn(&mut Shell, &Args) -> Done,
) -> Verb {
    Verb { name, group: Group::Domain, summary, options, shows: false, run }
}

const CONFIG: Opt = flag("config", "at the next start");
const LIVE: Opt = flag("live", "of the running domain");
const CURRENT: Opt = flag("current", "of whichever there is");

const DESC: &[Opt] = &[
    DOMAIN,
    LIVE,
    CONFIG,
    CURRENT,
    flag("title", "the title rather than the description"),
    flag("edit", "in an editor"),
    option("new-desc", Kind::Words, "the new text"),
];
const METADATA: &[Opt] = &[
    DOMAIN,
    need("uri", Kind::Text, "namespace of the element"),
    LIVE,
    CONFIG,
    CURRENT,
    flag("edit", "in an editor"),
    named("key", Kind::Text, "prefix of the namespace"),
    named("set", Kind::Text, "the new element"),
    flag("remove", "remove the element"),
];
const SETVCPUS: &[Opt] = &[
    DOMAIN,
    need("count", Kind::Number, "how many"),
    flag("maximum", "the most there may be"),
    CONFIG,
    LIVE,
    CURRENT,
    flag("guest", "through the guest's agent"),
    flag("hotpluggable", "such that they can be taken away again"),
];
const LIFECYCLE: &[Opt] = &[
    DOMAIN,
    need("type", Kind::Text, "poweroff, reboot or crash"),
    need("action", Kind::Text, "destroy, restart, rename-restart or preserve"),
    CONFIG,
    LIVE,
    CURRENT,
];

pub const VERBS: &[Verb] = &[
    verb(
        "edit",
        "change a definition in an editor",
        &[DOMAIN, flag("skip-validate", "take elements that the format does not have")],
        edit,
    ),
    verb(
        "setmem",
        "set the memory in use",
        &[DOMAIN, need("size", Kind::Size, "KiB, or with a unit"), CONFIG, LIVE, CURRENT],
        setmem,
    ),
    verb(
        "setmaxmem",
        "set the memory at boot",
        &[DOMAIN, need("size", Kind::Size, "KiB, or with a unit"), CONFIG, LIVE, CURRENT],
        setmaxmem,
    ),
    verb("setvcpus", "set the number of vCPUs", SETVCPUS, setvcpus),
    verb("set-lifecycle-action", "set what happens at a power event", LIFECYCLE, set_lifecycle_action),
    Verb { shows: true, ..verb("desc", "show or set the description or title", DESC, desc) },
    Verb { shows: true, ..verb("metadata", "show or set an element of a namespace", METADATA, metadata) },
];

/// Which condition the switches mean.
pub fn affect(args: &Args) -> Result<Affect, Failure> {
    let (live, config, current) = (args.has("live"), args.has("config"), args.has("current"));
    if current && (live || config) {
        let other = if live { "live" } else { "config" };
        return Err(Failure::new(format!("Options --current and --{other} are mutually exclusive")));
    }
    Ok(match (live, config) {
        (true, true) => Affect::Both,
        (true, false) => Affect::Live,
        (false, true) => Affect::Config,
        (false, false) => Affect::Current,
    })
}

fn edit(shell: &mut Shell, args: &Args) -> Done {
    const SECURE_INACTIVE: u32 = 1 | 2;
    let domain = shell.domain(args)?;
    let name = domain.name.lossy().into_owned();
    let before = shell.connection()?.xml(&domain, SECURE_INACTIVE)?;
    let mut text = before.clone();
    loop {
        text = editor::edit(&text)?;
        if text == before {
            shell.remark(format!("Domain '{name}' XML configuration not changed.\n"));
            return Ok(());
        }
        let now = shell.connection()?.xml(&domain, SECURE_INACTIVE)?;
        if now != before {
            return Err(Failure::new("The XML configuration was changed by another user"));
        }
        let flags = u32::from(!args.has("skip-validate"));
        match shell.connection()?.define(&text, flags) {
            Ok(defined) => {
                let name = defined.name.lossy().into_owned();
                shell.remark(format!("Domain '{name}' XML configuration edited.\n"));
                return Ok(());
            }
            Err(error) => {
                shell.report(&Failure::from(error));
                if !editor::again()? {
                    return Err(Failure::new("Failed."));
                }
            }
        }
    }
}

fn setmem(shell: &mut Shell, args: &Args) -> Done {
    let kib = args.kib("size")?.unwrap_or_default();
    let domain = shell.domain(args)?;
    // Without a word about which, the running domain is meant.
    let affect = affect(args)?;
    let affect = if affect == Affect::Current && !args.has("current") { Affect::Live } else { affect };
    Ok(shell.connection()?.set_memory(&domain, kib, affect.flags())?)
}

fn setmaxmem(shell: &mut Shell, args: &Args) -> Done {
    const MAXIMUM: u32 = 4;
    let kib = args.kib("size")?.unwrap_or_default();
    let domain = shell.domain(args)?;
    let flags = affect(args)?.flags() | MAXIMUM;
    shell.connection()?.set_memory(&domain, kib, flags).while_doing(|| "Unable to change MaxMemorySize".into())
}

fn setvcpus(shell: &mut Shell, args: &Args) -> Done {
    let count = args.number("count")?.unwrap_or_default();
    if count == 0 {
        return Err(Failure::new("Can't set 0 processors for a VM"));
    }
    let domain = shell.domain(args)?;
    let mut flags = affect(args)?.flags();
    if flags == 0 && !args.has("current") && !args.has("guest") {
        flags = Affect::Live.flags();
    }
    for (name, flag) in [("maximum", 4), ("guest", 8), ("hotpluggable", 16)] {
        if args.has(name) {
            flags |= flag;
        }
    }
    Ok(shell.connection()?.set_vcpus(&domain, count, flags)?)
}

fn set_lifecycle_action(shell: &mut Shell, args: &Args) -> Done {
    let position = |names: &[&str], word: &str| names.iter().position(|name| *name == word).map(|at| at as u32);
    let (kind, action) = (args.need("type"), args.need("action"));
    let kind_number = position(&["poweroff", "reboot", "crash"], kind);
    let actions = ["destroy", "restart", "rename-restart", "preserve", "coredump-destroy", "coredump-restart"];
    let action_number = position(&actions, action);
    let kind = kind_number.ok_or_else(|| Failure::new(format!("Invalid lifecycle type '{kind}'.")))?;
    let action = action_number.ok_or_else(|| Failure::new(format!("Invalid lifecycle action '{action}'.")))?;
    let flags = affect(args)?.flags();
    let domain = shell.domain(args)?;
    let set = shell.connection()?.set_lifecycle_action(&domain, kind, action, flags);
    set.while_doing(|| "Unable to change lifecycle action.".into())
}

fn desc(shell: &mut Shell, args: &Args) -> Done {
    let (which, what) =
        if args.has("title") { (Metadata::Title, "title") } else { (Metadata::Description, "description") };
    let affect = affect(args)?;
    let domain = shell.domain(args)?;
    let name = domain.name.lossy().into_owned();
    let words = args.words("new-desc");
    let old = shell.connection()?.metadata(&domain, which, affect)?;
    if words.is_empty() && !args.has("edit") {
        if shell.json {
            shell.show(&json!({ what: old }));
        } else {
            shell.say(old.unwrap_or_else(|| format!("No {what} for domain: {name}")));
        }
        return Ok(());
    }
    let mut new = words.join(" ");
    if args.has("edit") {
        let before = if words.is_empty() { old.unwrap_or_default() } else { new };
        new = editor::edit(&before)?.trim_end_matches('\n').to_owned();
        if new == before {
            shell.remark(format!("Domain's {what} not changed\n"));
            return Ok(());
        }
    }
    let set = shell.connection()?.set_metadata(&domain, which, Some(&new), None, affect);
    set.while_doing(|| format!("Failed to set new domain {what}"))?;
    shell.remark(format!("Domain {what} updated successfully"));
    Ok(())
}

fn metadata(shell: &mut Shell, args: &Args) -> Done {
    let affect = affect(args)?;
    let domain = shell.domain(args)?;
    let which = Metadata::Element(args.need("uri"));
    let chosen = [args.has("edit"), args.has("set"), args.has("remove")].iter().filter(|chosen| **chosen).count();
    if chosen > 1 {
        return Err(Failure::new("Options --edit, --set and --remove are mutually exclusive"));
    }
    if (args.has("edit") || args.has("set")) && !args.has("key") {
        return Err(Failure::new("namespace key is required when modifying metadata"));
    }
    if args.has("remove") {
        shell.connection()?.set_metadata(&domain, which, None, None, affect)?;
        shell.remark("Metadata removed\n");
        return Ok(());
    }
    if let Some(text) = args.text("set") {
        shell.connection()?.set_metadata(&domain, which, Some(text), args.text("key"), affect)?;
        shell.remark("Metadata modified\n");
        return Ok(());
    }
    let found = shell.connection()?.metadata(&domain, which, affect)?;
    if args.has("edit") {
        return edit_metadata(shell, args, &domain, found.unwrap_or_else(|| "\n".into()));
    }
    let missing = || Failure::new("metadata not found: Requested metadata element is not present");
    let text = found.ok_or_else(missing)?;
    if shell.json {
        shell.show(&json!({ "metadata": text }));
    } else {
        shell.say(text + "\n");
    }
    Ok(())
}

fn edit_metadata(shell: &mut Shell, args: &Args, domain: &DomainRef, before: String) -> Done {
    let text = editor::edit(&before)?;
    if text == before {
        shell.remark("Metadata not changed\n");
        return Ok(());
    }
    let which = Metadata::Element(args.need("uri"));
    shell.connection()?.set_metadata(domain, which, Some(&text), args.text("key"), affect(args)?)?;
    shell.remark("Metadata modified\n");
    Ok(())
}

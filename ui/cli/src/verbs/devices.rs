//! Disks, interfaces, consoles and displays of a domain.

use client::DomainRef;
use serde_json::{Map, Value, json};
use xml::Element;

use crate::columns::table;
use crate::failure::{Failure, WhileDoing};
use crate::grammar::{Args, DOMAIN, Done, Group, Kind, Opt, Verb, flag, need, option};
use crate::shell::Shell;
use crate::verbs::list::{param_json, param_text};

const fn verb(
    name: &'static str,
    summary: &'static str,
    options: &'static [Opt],
    run: fn(&mut Shell, &Args) -> Done,
) -> Verb {
    Verb { name, group: Group::Monitor, summary, options, shows: true, run }
}

const INACTIVE: Opt = flag("inactive", "as the definition says rather than the run");
const DEVICE: Opt = option("device", Kind::Text, "target or path of a disk");
const HUMAN: Opt = flag("human", "for people");
const ADDRESSES: &[Opt] = &[
    DOMAIN,
    option("interface", Kind::Text, "one interface"),
    flag("full", "repeat name and MAC on every line"),
    option("source", Kind::Text, "who is asked: lease, agent or arp"),
];
const DISPLAY: &[Opt] = &[
    DOMAIN,
    flag("include-password", "with the password"),
    option("type", Kind::Text, "vnc, spice, rdp or dbus"),
    flag("all", "every display"),
];

pub const VERBS: &[Verb] = &[
    verb("domblklist", "disks of a domain", &[DOMAIN, INACTIVE, flag("details", "with type and device")], domblklist),
    verb("domblkinfo", "size of a disk", &[DOMAIN, DEVICE, HUMAN, flag("all", "of every disk")], domblkinfo),
    verb("domblkstat", "counters of a disk", &[DOMAIN, DEVICE, HUMAN], domblkstat),
    verb("domblkerror", "disks that failed", &[DOMAIN], domblkerror),
    verb("domiflist", "interfaces of a domain", &[DOMAIN, INACTIVE], domiflist),
    verb(
        "domifstat",
        "counters of an interface",
        &[DOMAIN, need("interface", Kind::Text, "host device or MAC")],
        domifstat,
    ),
    verb("domifaddr", "addresses of interfaces", ADDRESSES, domifaddr),
    verb("ttyconsole", "terminal of a running domain's console", &[DOMAIN], ttyconsole),
    verb("domdisplay", "URI of a display", DISPLAY, domdisplay),
    verb("vncdisplay", "VNC display", &[DOMAIN], vncdisplay),
];

const XML_INACTIVE: u32 = 2;

/// The document of a domain as a tree.
pub fn document(shell: &mut Shell, domain: &DomainRef, inactive: bool) -> Result<Element, Failure> {
    let flags = if inactive { XML_INACTIVE } else { 0 };
    let text = shell.connection()?.xml(domain, flags)?;
    xml::parse_document(text.as_bytes(), "domain_definition", &["metadata"]).map_err(|e| Failure::new(e.to_string()))
}

fn devices<'a>(root: &'a Element, name: &'a str) -> impl Iterator<Item = &'a Element> {
    root.get("devices").into_iter().flat_map(move |devices| devices.all(name))
}

struct DiskRow {
    kind: String,
    device: String,
    target: String,
    source: Option<String>,
}

fn disks(root: &Element) -> Vec<DiskRow> {
    let row = |disk: &Element| {
        let source = disk.get("source").and_then(|source| {
            let attribute = |name| source.attribute(name).map(str::to_owned);
            ["file", "dev", "dir", "volume", "name"].into_iter().find_map(attribute)
        });
        DiskRow {
            kind: disk.attribute("type").unwrap_or("file").into(),
            device: disk.attribute("device").unwrap_or("disk").into(),
            target: disk.child_attribute("target", "dev").unwrap_or_default().into(),
            source,
        }
    };
    devices(root, "disk").map(row).collect()
}

fn domblklist(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let root = document(shell, &domain, args.has("inactive"))?;
    let disks = disks(&root);
    if shell.json {
        let list = disks.iter().map(
            |disk| json!({ "type": disk.kind, "device": disk.device, "target": disk.target, "source": disk.source }),
        );
        shell.show(&Value::Array(list.collect()));
        return Ok(());
    }
    let details = args.has("details");
    let rows: Vec<Vec<String>> = disks
        .into_iter()
        .map(|disk| {
            let source = disk.source.unwrap_or_else(|| "-".into());
            if details { vec![disk.kind, disk.device, disk.target, source] } else { vec![disk.target, source] }
        })
        .collect();
    let heading: &[&str] = if details { &["Type", "Device", "Target", "Source"] } else { &["Target", "Source"] };
    let text = table(heading, &rows, shell.quiet);
    shell.say(text);
    Ok(())
}

/// Bytes with a unit.
fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.3} {}", UNITS[unit])
}

fn domblkinfo(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let show = |bytes: u64| if args.has("human") { human(bytes) } else { bytes.to_string() };
    if !args.has("all") {
        let device =
            args.text("device").ok_or_else(|| Failure::new("command 'domblkinfo' requires <device> option"))?;
        let (allocation, capacity, physical) = shell.connection()?.block_info(&domain, device)?;
        if shell.json {
            shell.show(&json!({ "capacity": capacity, "allocation": allocation, "physical": physical }));
            return Ok(());
        }
        for (label, value) in [("Capacity:", capacity), ("Allocation:", allocation), ("Physical:", physical)] {
            shell.say(format!("{label:<15} {}\n", show(value)));
        }
        return Ok(());
    }
    let root = document(shell, &domain, false)?;
    let mut found = Vec::new();
    for disk in disks(&root) {
        let sizes = match &disk.source {
            Some(_) => Some(shell.connection()?.block_info(&domain, &disk.target)?),
            None => None,
        };
        found.push((disk.target, sizes));
    }
    if shell.json {
        let list = found.iter().map(|(target, sizes)| {
            let (allocation, capacity, physical) = (sizes.map(|s| s.0), sizes.map(|s| s.1), sizes.map(|s| s.2));
            json!({ "target": target, "capacity": capacity, "allocation": allocation, "physical": physical })
        });
        shell.show(&Value::Array(list.collect()));
        return Ok(());
    }
    let cell = |value: Option<u64>| value.map_or_else(|| "-".into(), show);
    let row = |(target, sizes): (String, Option<(u64, u64, u64)>)| {
        vec![target, cell(sizes.map(|s| s.1)), cell(sizes.map(|s| s.0)), cell(sizes.map(|s| s.2))]
    };
    let rows: Vec<_> = found.into_iter().map(row).collect();
    let text = table(&["Target", "Capacity", "Allocation", "Physical"], &rows, shell.quiet);
    shell.say(text);
    Ok(())
}

/// Parameters of a disk's counters: the protocol's name, virsh's, and words for people.
const COUNTERS: [(&str, &str, &str); 8] = [
    ("rd_operations", "rd_req", "number of read operations:"),
    ("rd_bytes", "rd_bytes", "number of bytes read:"),
    ("wr_operations", "wr_req", "number of write operations:"),
    ("wr_bytes", "wr_bytes", "number of bytes written:"),
    ("flush_operations", "flush_operations", "number of flush operations:"),
    ("rd_total_times", "rd_total_times", "total duration of reads (ns):"),
    ("wr_total_times", "wr_total_times", "total duration of writes (ns):"),
    ("flush_total_times", "flush_total_times", "total duration of flushes (ns):"),
];

fn domblkstat(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let device = args.text("device").unwrap_or_default();
    let params = shell.connection()?.block_stats(&domain, device);
    let params = match device {
        "" => params?,
        device => params.while_doing(|| {
            format!("Failed to get block stats for domain '{}' device '{device}'", domain.name.lossy())
        })?,
    };
    let value = |field: &str| params.iter().find(|param| param.field.lossy() == field).map(|param| &param.value);
    if shell.json {
        let found =
            COUNTERS.iter().filter_map(|(field, short, _)| Some(((*short).to_owned(), param_json(value(field)?))));
        shell.show(&Value::Object(found.collect()));
        return Ok(());
    }
    if args.has("human") {
        shell.say(format!("Device: {device}\n"));
    }
    for (field, short, words) in COUNTERS {
        let Some(value) = value(field).map(param_text) else { continue };
        if args.has("human") {
            shell.say(format!(" {words:<31} {value}\n"));
        } else {
            shell.say(format!("{device} {short} {value}\n"));
        }
    }
    Ok(())
}

fn domblkerror(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let connection = shell.connection()?;
    let (most, _) = connection.disk_errors(&domain, 0, 0)?;
    let errors = if most > 0 { connection.disk_errors(&domain, most as u32, 0)?.1 } else { Vec::new() };
    let word = |error: i32| match error {
        0 => "no error",
        2 => "no space",
        _ => "unspecified error",
    };
    if shell.json {
        let found = errors.iter().map(|(disk, error)| (disk.clone(), word(*error).into()));
        shell.show(&Value::Object(found.collect()));
    } else if errors.is_empty() {
        shell.say("No errors found\n");
    }
    if !shell.json {
        for (disk, error) in errors {
            shell.say(format!("{disk}: {}\n", word(error)));
        }
    }
    Ok(())
}

fn domiflist(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let root = document(shell, &domain, args.has("inactive"))?;
    let row = |interface: &Element| {
        let kind = interface.attribute("type").unwrap_or_default();
        let source = interface
            .get("source")
            .and_then(|source| source.attribute(if kind == "direct" || kind == "vhostuser" { "dev" } else { kind }));
        [
            interface.child_attribute("target", "dev").map(str::to_owned),
            Some(kind.to_owned()),
            source.map(str::to_owned),
            interface.child_attribute("model", "type").map(str::to_owned),
            interface.child_attribute("mac", "address").map(str::to_owned),
        ]
    };
    let rows: Vec<_> = devices(&root, "interface").map(row).collect();
    if shell.json {
        let list = rows.iter().map(|[name, kind, source, model, mac]| {
            json!({ "interface": name, "type": kind, "source": source, "model": model, "mac": mac })
        });
        shell.show(&Value::Array(list.collect()));
        return Ok(());
    }
    let dash = |cell: Option<String>| cell.unwrap_or_else(|| "-".into());
    let rows: Vec<Vec<String>> = rows.into_iter().map(|cells| cells.map(dash).to_vec()).collect();
    let text = table(&["Interface", "Type", "Source", "Model", "MAC"], &rows, shell.quiet);
    shell.say(text);
    Ok(())
}

fn domifstat(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let device = args.need("interface");
    let call = client::remote::domain_interface_stats::Args { dom: domain, device: device.into() };
    let stats = shell.connection()?.call::<client::remote::domain_interface_stats::Proc>(&call);
    let stats = stats.while_doing(|| format!("Failed to get interface stats {} {device}", args.need("domain")))?;
    let values = [
        ("rx_bytes", stats.rx_bytes),
        ("rx_packets", stats.rx_packets),
        ("rx_errs", stats.rx_errs),
        ("rx_drop", stats.rx_drop),
        ("tx_bytes", stats.tx_bytes),
        ("tx_packets", stats.tx_packets),
        ("tx_errs", stats.tx_errs),
        ("tx_drop", stats.tx_drop),
    ];
    // A counter that is not kept reads as a negative number.
    let known = values.iter().filter(|(_, value)| *value >= 0);
    if shell.json {
        let object: Map<String, Value> = known.map(|(name, value)| ((*name).to_owned(), (*value).into())).collect();
        shell.show(&Value::Object(object));
    } else {
        known.for_each(|(name, value)| shell.say(format!("{device} {name} {value}\n")));
    }
    Ok(())
}

fn domifaddr(shell: &mut Shell, args: &Args) -> Done {
    let source = match args.text("source") {
        None | Some("lease") => 0,
        Some("agent") => 1,
        Some("arp") => 2,
        Some(other) => return Err(Failure::new(format!("Unknown data source '{other}'"))),
    };
    let domain = shell.domain(args)?;
    let found = shell.connection()?.interface_addresses(&domain, source, 0);
    let found = found.while_doing(|| "Failed to query for interfaces addresses".into())?;
    let wanted = |name: &str| args.text("interface").is_none_or(|wanted| wanted == name);
    let mut rows = Vec::new();
    for interface in &found {
        let name = interface.name.lossy().into_owned();
        let mac = interface.hwaddr.as_ref().map(|mac| mac.lossy().into_owned()).unwrap_or_default();
        for address in interface.addrs.0.iter().filter(|_| wanted(&name)) {
            let kind = if address.kind == 0 { "ipv4" } else { "ipv6" };
            rows.push((name.clone(), mac.clone(), kind, format!("{}/{}", address.addr.lossy(), address.prefix)));
        }
    }
    if shell.json {
        let list = rows.iter().map(
            |(name, mac, kind, address)| json!({ "interface": name, "mac": mac, "protocol": kind, "address": address }),
        );
        shell.show(&Value::Array(list.collect()));
        return Ok(());
    }
    shell.remark(format!(
        " {:<10} {:<20} {:<8}     {}\n{}\n",
        "Name",
        "MAC address",
        "Protocol",
        "Address",
        "-".repeat(79)
    ));
    for (name, mac, kind, address) in rows {
        shell.say(format!(" {name:<10} {mac:<17}    {kind:<12} {address}\n"));
    }
    Ok(())
}

fn ttyconsole(shell: &mut Shell, args: &Args) -> Done {
    let domain = shell.domain(args)?;
    let root = document(shell, &domain, false)?;
    let tty = devices(&root, "console").find_map(|console| console.attribute("tty")).map(str::to_owned);
    match (tty, shell.json) {
        (tty, true) => shell.show(&json!({ "tty": tty })),
        (Some(tty), false) => shell.say(tty + "\n"),
        (None, false) => {}
    }
    Ok(())
}

/// Guests have no displays yet; what is asked for is looked for all the same, so that the answer is about this domain.
fn graphics(shell: &mut Shell, args: &Args) -> Result<Option<(String, String)>, Failure> {
    let domain = shell.domain(args)?;
    if domain.id < 0 {
        return Err(Failure::new("Domain is not running"));
    }
    let root = document(shell, &domain, false)?;
    let found = devices(&root, "graphics").find_map(|graphics| {
        let port = graphics.attribute("port").filter(|port| *port != "-1")?;
        Some((graphics.attribute("type")?.to_owned(), port.to_owned()))
    });
    Ok(found)
}

fn domdisplay(shell: &mut Shell, args: &Args) -> Done {
    let (kind, port) = graphics(shell, args)?.ok_or_else(|| Failure::new("No graphical display found"))?;
    let uri = match (kind.as_str(), port.parse::<i64>()) {
        ("vnc", Ok(port)) => format!("vnc://127.0.0.1:{}", port - 5900),
        _ => format!("{kind}://127.0.0.1:{port}"),
    };
    if shell.json {
        shell.show(&json!({ "uri": uri }));
    } else {
        shell.say(uri + "\n");
    }
    Ok(())
}

fn vncdisplay(shell: &mut Shell, args: &Args) -> Done {
    let none = || Failure::new("Failed to get VNC port. Is this domain using VNC?");
    let (_, port) = graphics(shell, args)?.filter(|(kind, _)| kind == "vnc").ok_or_else(none)?;
    let port: i64 = port.parse().map_err(|_| none())?;
    shell.say(format!("127.0.0.1:{}\n", port - 5900));
    Ok(())
}

//! `<driver>` of a disk: how its image is used, and by which threads.

use crate::config::DomainConfig;
use crate::error::DomainXmlError;
use crate::tree::Element;

/// Attributes in libvirt's order.
#[rustfmt::skip]
const ORDER: &[&str] = &[
    "name", "type", "cache", "error_policy", "rerror_policy", "io", "ioeventfd", "event_idx", "copy_on_read", "discard",
    "iothread", "detect_zeroes", "discard_no_unref", "queues", "queue_size",
];

/// Words that an attribute may have.
#[rustfmt::skip]
const WORDS: &[(&str, &[&str])] = &[
    ("cache", &["default", "none", "writethrough", "writeback", "directsync", "unsafe"]),
    ("error_policy", &["default", "stop", "report", "ignore", "enospace"]),
    ("rerror_policy", &["default", "stop", "report", "ignore", "enospace"]),
    ("io", &["default", "native", "threads", "io_uring"]),
    ("discard", &["default", "unmap", "ignore"]),
    ("detect_zeroes", &["default", "off", "on", "unmap"]),
    ("copy_on_read", &["default", "on", "off"]),
    ("ioeventfd", &["default", "on", "off"]),
    ("event_idx", &["default", "on", "off"]),
];

/// What libvirt adds where a number is wanted.
const NUMBER: &str = " Expected non-negative integer value";
/// The most requests that one queue holds.
pub(crate) const QUEUE_SIZE_MAX: u32 = 1024;
/// The most queues of one disk.
pub(crate) const QUEUES_MAX: u32 = 16;

/// The rest of `<driver>`, beside the attributes that [`crate::Disk`] has by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskDriver {
    /// `name`, where given.
    pub name: Option<String>,
    /// `io`, where given: `native`, `threads` or `io_uring`.
    pub io: Option<String>,
    /// `detect_zeroes`, where given: `off`, `on` or `unmap`.
    pub detect_zeroes: Option<String>,
    /// Queues; 0: as many as the machine gives by itself.
    pub queues: u32,
    /// Requests that a queue holds; 0: as many as the machine gives by itself.
    pub queue_size: u32,
    /// The thread that the disk is given to.
    pub iothread: Option<u32>,
    /// Attributes that are set and not built: name and value.
    pub not_built: Option<(&'static str, String)>,
}

/// The value of an attribute that is not the default in words.
fn given<'a>(driver: &'a Element, name: &str) -> Option<&'a str> {
    driver.attribute(name).filter(|value| *value != "default")
}

fn number(driver: &Element, attribute: &'static str) -> Result<u32, DomainXmlError> {
    let Some(text) = driver.attribute(attribute) else { return Ok(0) };
    text.parse().map_err(|_| DomainXmlError::DriverAttribute { attribute, found: text.into(), expected: NUMBER })
}

impl DiskDriver {
    pub(crate) fn read(driver: &Element) -> Result<DiskDriver, DomainXmlError> {
        for (attribute, words) in WORDS {
            if let Some(found) = driver.attribute(attribute).filter(|found| !words.contains(found)) {
                let found = found.to_owned();
                return Err(DomainXmlError::DriverAttribute { attribute, found, expected: "" });
            }
        }
        let iothread = match number(driver, "iothread")? {
            0 if driver.attribute("iothread").is_some() => return Err(DomainXmlError::IoThreadZero),
            0 => None,
            id => Some(id),
        };
        let text = |name| given(driver, name).map(str::to_owned);
        // Each of these would make another disk than was asked for.
        let not_built = [("copy_on_read", "on"), ("ioeventfd", "off"), ("event_idx", "off")];
        let not_built = not_built.into_iter().find(|(name, value)| driver.attribute(name) == Some(*value));
        Ok(DiskDriver {
            name: text("name"),
            io: text("io"),
            detect_zeroes: text("detect_zeroes"),
            queues: number(driver, "queues")?,
            queue_size: number(driver, "queue_size")?,
            iothread,
            not_built: not_built.map(|(name, value)| (name, value.to_owned())),
        })
    }
}

/// Puts attributes into libvirt's order and leaves out what says nothing.
pub(crate) fn normalise(driver: &mut Element) {
    driver.attributes.retain(|(name, value)| match name.as_str() {
        "queues" | "queue_size" => value != "0",
        name => value != "default" || !WORDS.iter().any(|(word, _)| *word == name),
    });
    let place = |name: &str| ORDER.iter().position(|known| *known == name).unwrap_or(ORDER.len());
    driver.attributes.sort_by_key(|(name, _)| place(name));
}

/// Numbers of `<iothreads>`: those that `<iothreadids>` gives, and the smallest others up to their count.
pub(crate) fn read_iothreads(root: &Element) -> Result<Vec<u32>, DomainXmlError> {
    const MAX: u32 = 64;
    let bad = |text: &str| DomainXmlError::BadValue { path: "./iothreads[1]", value: text.into() };
    let text = root.child_text("iothreads").unwrap_or_default();
    let count = if text.trim().is_empty() { Ok(0) } else { text.trim().parse::<u32>() };
    let count = count.ok().filter(|count| *count <= MAX).ok_or_else(|| bad(&text))?;
    let mut ids = Vec::new();
    for thread in root.get("iothreadids").into_iter().flat_map(Element::elements) {
        let id = thread.attribute("id").and_then(|id| id.parse().ok()).filter(|id| (1..=MAX).contains(id));
        let id: u32 = id.ok_or_else(|| bad(thread.attribute("id").unwrap_or_default()))?;
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    let free =
        (1..).filter(|id| !ids.contains(id)).take((count as usize).saturating_sub(ids.len())).collect::<Vec<u32>>();
    ids.extend(free);
    Ok(ids)
}

/// What libvirt refuses in a definition as a whole.
pub(crate) fn check(config: &DomainConfig) -> Result<(), DomainXmlError> {
    for disk in &config.disks {
        let direct = matches!(disk.cache.as_deref(), Some("none" | "directsync"));
        if disk.driver.io.as_deref() == Some("native") && !direct {
            return Err(DomainXmlError::NativeNeedsDirect);
        }
        if disk.read_error_policy.as_deref() == Some("enospace") {
            return Err(DomainXmlError::ReadErrorPolicy { found: "enospace".into() });
        }
        if (disk.driver.queues > 0 || disk.driver.queue_size > 0) && disk.bus != "virtio" {
            return Err(DomainXmlError::QueuesNeedVirtio);
        }
        if let Some(id) = disk.driver.iothread.filter(|id| !config.iothreads.contains(id)) {
            return Err(DomainXmlError::NoIoThread { id });
        }
    }
    Ok(())
}

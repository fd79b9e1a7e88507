//! `<iotune>` of a disk: what it may move, as `virsh blkdeviotune` reads and sets it.

use crate::error::DomainXmlError;
use crate::tree::Element;

/// The limits by name: bytes and then requests per second. Each has a burst (`_max`) and its length (`_max_length`).
pub const IO_TUNE_LIMITS: [&str; 6] =
    ["total_bytes_sec", "read_bytes_sec", "write_bytes_sec", "total_iops_sec", "read_iops_sec", "write_iops_sec"];
/// The field that says how large one request is.
pub const IO_TUNE_SIZE: &str = "size_iops_sec";
/// The field that names a group.
pub const IO_TUNE_GROUP: &str = "group_name";
/// The largest value of any field.
pub const IO_TUNE_MAX: u64 = 1_000_000_000_000_000;

/// Limits of a disk; 0 is none. The arrays are in the order of [`IO_TUNE_LIMITS`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoTune {
    /// Per second.
    pub rates: [u64; 6],
    /// Per second in a burst (`_max`).
    pub bursts: [u64; 6],
    /// Bytes of a request that count as one.
    pub request_bytes: u64,
    /// Disks of a group share the limits.
    pub group: Option<String>,
    /// Seconds that a burst may last (`_max_length`).
    pub burst_lengths: [u64; 6],
}

/// Fields that replace one another: who sets the total takes back what was set by direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Rates(bool),
    Bursts(bool),
    Lengths(bool),
    RequestBytes,
}

/// Which field a name means: its family and its place in it.
fn place(name: &str) -> Option<(Family, usize)> {
    if name == IO_TUNE_SIZE {
        return Some((Family::RequestBytes, 0));
    }
    let (base, family) = match (name.strip_suffix("_max_length"), name.strip_suffix("_max")) {
        (Some(base), _) => (base, Family::Lengths as fn(bool) -> Family),
        (None, Some(base)) => (base, Family::Bursts as fn(bool) -> Family),
        (None, None) => (name, Family::Rates as fn(bool) -> Family),
    };
    let index = IO_TUNE_LIMITS.iter().position(|limit| *limit == base)?;
    Some((family(index >= 3), index))
}

/// The part of six fields that is about bytes, or about requests.
fn half(values: &mut [u64; 6], requests: bool) -> &mut [u64] {
    let (bytes, iops) = values.split_at_mut(3);
    if requests { iops } else { bytes }
}

impl IoTune {
    fn family(&mut self, family: Family) -> &mut [u64] {
        match family {
            Family::Rates(requests) => half(&mut self.rates, requests),
            Family::Bursts(requests) => half(&mut self.bursts, requests),
            Family::Lengths(requests) => half(&mut self.burst_lengths, requests),
            Family::RequestBytes => std::slice::from_mut(&mut self.request_bytes),
        }
    }

    /// Sets the field of a name; false: there is none.
    pub fn set(&mut self, name: &str, value: u64) -> bool {
        let Some((family, index)) = place(name) else { return false };
        let index = if family == Family::RequestBytes { 0 } else { index % 3 };
        self.family(family).get_mut(index).map(|field| *field = value).is_some()
    }

    /// All numbers with their names, in the order of the document; the group stands before the first of the lengths.
    pub fn numbers(&self) -> Vec<(String, u64)> {
        let named = |suffix: &'static str, values: [u64; 6]| {
            IO_TUNE_LIMITS.iter().zip(values).map(move |(name, value)| (format!("{name}{suffix}"), value))
        };
        let size = std::iter::once((IO_TUNE_SIZE.to_owned(), self.request_bytes));
        let rates = named("", self.rates).chain(named("_max", self.bursts));
        rates.chain(size).chain(named("_max_length", self.burst_lengths)).collect()
    }

    /// Whether any number is set.
    pub fn has_any(&self) -> bool {
        self.numbers().iter().any(|(_, value)| *value != 0)
    }

    /// These limits after a call that sets `fields` and perhaps the group: a family of which one field is set is replaced,
    /// the others stay. Without a number the group goes.
    pub fn changed(&self, fields: &[(String, u64)], group: Option<&str>) -> IoTune {
        let mut new = self.clone();
        for (family, _) in fields.iter().filter_map(|(name, _)| place(name)) {
            new.family(family).fill(0);
        }
        for (name, value) in fields {
            new.set(name, *value);
        }
        let group = group.map(str::to_owned).or(new.group.take());
        new.group = group.filter(|_| new.has_any());
        new
    }

    /// The family (`bytes_sec`, `iops_sec_max`, …) in which a total and a direction are set.
    pub fn exclusive(&self) -> Option<&'static str> {
        let both =
            |values: [u64; 6], at: usize| values.get(at..at + 3).is_some_and(|v| v[0] != 0 && (v[1] != 0 || v[2] != 0));
        let cases = [
            (self.rates, 0, "bytes_sec"),
            (self.rates, 3, "iops_sec"),
            (self.bursts, 0, "bytes_sec_max"),
            (self.bursts, 3, "iops_sec_max"),
        ];
        cases.into_iter().find(|(values, at, _)| both(*values, *at)).map(|(_, _, name)| name)
    }

    pub(crate) fn read(iotune: &Element) -> Result<IoTune, DomainXmlError> {
        let mut read = IoTune::default();
        for (field, _) in IoTune::default().numbers() {
            let Some(text) = iotune.child_text(&field) else { continue };
            // As libxml2 reads numbers, nothing is 0 and a sign makes no number.
            let value = if text.trim().is_empty() { Ok(0) } else { text.trim().parse() };
            let value = value.map_err(|_| DomainXmlError::IoTuneNumber { field: field.clone() })?;
            read.set(&field, value);
        }
        read.group = iotune.child_text(IO_TUNE_GROUP).filter(|name| !name.is_empty());
        if let Some(family) = read.exclusive() {
            return Err(DomainXmlError::IoTuneExclusive { family });
        }
        Ok(read)
    }

    /// The element, without the fields that are 0; `None` when there is nothing in it.
    pub(crate) fn element(&self) -> Option<Element> {
        let mut iotune = Element::new("iotune");
        for (field, value) in self.numbers().iter().filter(|(_, value)| *value != 0) {
            iotune.push(Element::new(field).text_node(value.to_string()));
        }
        if let Some(group) = &self.group {
            let at = iotune.elements().position(|field| field.name.ends_with("_max_length"));
            let group = crate::tree::Node::Element(Element::new(IO_TUNE_GROUP).text_node(group));
            iotune.children.insert(at.unwrap_or(iotune.children.len()), group);
        }
        (!iotune.children.is_empty()).then_some(iotune)
    }
}

/// Writes `tune` into a disk in place of what is there.
pub(crate) fn write(disk: &mut Element, tune: &IoTune) {
    disk.remove("iotune");
    if let Some(iotune) = tune.element() {
        disk.push(iotune);
    }
}

/// Refuses what the limits of one disk, or of disks that share them, cannot be.
pub(crate) fn check(disks: &[crate::config::Disk]) -> Result<(), DomainXmlError> {
    for (index, disk) in disks.iter().enumerate() {
        let tune = &disk.iotune;
        if tune.numbers().iter().any(|(_, value)| *value > IO_TUNE_MAX) {
            return Err(DomainXmlError::IoTuneTooLarge);
        }
        let Some(group) = &tune.group else { continue };
        if !tune.has_any() {
            return Err(DomainXmlError::IoTuneGroupAlone);
        }
        let same_group = disks.iter().take(index).find(|other| other.iotune.group.as_ref() == Some(group));
        if let Some(other) = same_group.filter(|other| other.iotune != *tune) {
            let (first, second) = (other.target.clone(), disk.target.clone());
            return Err(DomainXmlError::IoTuneDiffers { first, second });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse::parse_document;
    use crate::write::to_compact;

    fn tune(fields: &[(&str, u64)]) -> IoTune {
        let mut tune = IoTune::default();
        for (name, value) in fields {
            assert!(tune.set(name, *value), "{name}");
        }
        tune
    }

    #[test]
    fn the_document_keeps_libvirts_order_and_leaves_zeroes_out() {
        let source = "<iotune><write_bytes_sec_max_length>5</write_bytes_sec_max_length><total_bytes_sec>0</total_bytes_sec>\
                      <group_name>grp</group_name><size_iops_sec>4096</size_iops_sec><total_iops_sec>100</total_iops_sec>\
                      <write_bytes_sec_max>3000000</write_bytes_sec_max><write_bytes_sec>1000000</write_bytes_sec></iotune>";
        let read = IoTune::read(&parse_document(source.as_bytes(), "x", &[]).unwrap()).unwrap();
        // As a stock libvirt writes it.
        let expected = "<iotune><write_bytes_sec>1000000</write_bytes_sec><total_iops_sec>100</total_iops_sec>\
                        <write_bytes_sec_max>3000000</write_bytes_sec_max><size_iops_sec>4096</size_iops_sec>\
                        <group_name>grp</group_name><write_bytes_sec_max_length>5</write_bytes_sec_max_length></iotune>";
        assert_eq!(to_compact(&read.element().unwrap()), expected);
        assert_eq!(IoTune::default().element(), None);
    }

    #[test]
    fn a_call_replaces_the_families_that_it_names() {
        let set = |old: &[(&str, u64)], fields: &[(&str, u64)]| {
            let fields: Vec<_> = fields.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
            tune(old).changed(&fields, None)
        };
        // Each as a stock libvirtd with QEMU answered.
        let both = [("read_bytes_sec", 5), ("total_iops_sec", 9)];
        assert_eq!(set(&both, &[("write_bytes_sec", 7)]), tune(&[("write_bytes_sec", 7), ("total_iops_sec", 9)]));
        assert_eq!(set(&both, &[("total_bytes_sec", 0)]), tune(&[("total_iops_sec", 9)]));
        let bursts = [("total_iops_sec", 9), ("total_iops_sec_max", 20), ("total_iops_sec_max_length", 3)];
        assert_eq!(set(&bursts, &[("size_iops_sec", 512)]).burst_lengths, tune(&bursts).burst_lengths);
        assert_eq!(set(&bursts, &[("read_iops_sec_max", 1)]).bursts, [0, 0, 0, 0, 1, 0]);
        let grouped = IoTune { group: Some("g".into()), ..tune(&both) };
        assert_eq!(grouped.changed(&[("size_iops_sec".into(), 1)], None).group.as_deref(), Some("g"));
        let zeroes = [("total_bytes_sec".into(), 0), ("total_iops_sec".into(), 0)];
        assert_eq!(grouped.changed(&zeroes, None), IoTune::default());
        assert!(!IoTune::default().set("total_bytes_sec_min", 1));
    }
}

//! The descriptor of an OVA: which files hold which disks, and how large these are. DSP0243, "Open Virtualization Format
//! Specification", 1.1: "References element" and "DiskSection".

use quick_xml::events::{BytesStart, Event};
use quick_xml::{Reader, XmlVersion};

use super::OvaError;

/// Longest descriptor, in bytes.
pub const DESCRIPTOR_MAX_BYTES: u64 = 4 << 20;
/// Most files, and most disks, of a descriptor.
const ENTRIES_MAX: usize = 256;
/// Deepest nesting of elements.
const DEPTH_MAX: usize = 64;

/// A `File` of the references.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct File {
    /// `id`, by which disks refer to it.
    pub id: String,
    /// `href`: the name of the member.
    pub href: String,
    /// `compression`: empty or `identity`: none.
    pub compression: String,
    /// It is split into pieces.
    pub is_split: bool,
}

/// A `Disk` of the disk section.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Disk {
    /// `diskId`.
    pub id: String,
    /// `fileRef`: the file that holds it; empty: the disk is blank.
    pub file_id: String,
    /// Size of the disk in bytes.
    pub capacity_bytes: u64,
    /// `format`: a URI.
    pub format: String,
}

/// What a descriptor says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Its files.
    pub files: Vec<File>,
    /// Its disks, in the order in which they are listed.
    pub disks: Vec<Disk>,
}

/// Reads a descriptor. No entity but those of XML itself is known, and a document type is refused.
pub fn parse<E>(text: &str) -> Result<Descriptor, OvaError<E>> {
    let mut found = Descriptor::default();
    let mut reader = Reader::from_str(text);
    let mut depth = 0usize;
    loop {
        let event = reader
            .read_event()
            .map_err(|error| OvaError::Xml { at: reader.error_position(), reason: error.to_string() })?;
        match event {
            Event::Eof => return Ok(found),
            Event::DocType(_) => return Err(OvaError::DocumentType),
            Event::Start(element) => {
                depth += 1;
                if depth > DEPTH_MAX {
                    return Err(OvaError::TooDeep { max: DEPTH_MAX });
                }
                found.take(&element)?;
            }
            Event::Empty(element) => found.take(&element)?,
            Event::End(_) => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
}

impl Descriptor {
    fn take<E>(&mut self, element: &BytesStart<'_>) -> Result<(), OvaError<E>> {
        match element.local_name().as_ref() {
            "File" => {
                let mut file = File::default();
                each_attribute(element, |name, value| match name {
                    "id" => file.id = value,
                    "href" => file.href = value,
                    "compression" => file.compression = value,
                    "chunkSize" => file.is_split = true,
                    _ => {}
                })?;
                push(&mut self.files, file)
            }
            "Disk" => self.take_disk(element),
            _ => Ok(()),
        }
    }

    fn take_disk<E>(&mut self, element: &BytesStart<'_>) -> Result<(), OvaError<E>> {
        let mut disk = Disk::default();
        let (mut capacity, mut units) = (String::new(), String::new());
        each_attribute(element, |name, value| match name {
            "diskId" => disk.id = value,
            "fileRef" => disk.file_id = value,
            "format" => disk.format = value,
            "capacity" => capacity = value,
            "capacityAllocationUnits" => units = value,
            _ => {}
        })?;
        let bytes =
            capacity.trim().parse::<u64>().ok().zip(unit_bytes(&units)).and_then(|(n, unit)| n.checked_mul(unit));
        match bytes {
            Some(bytes) => disk.capacity_bytes = bytes,
            None => return Err(OvaError::Capacity { disk: disk.id, capacity, units }),
        }
        push(&mut self.disks, disk)
    }

    /// The file of an identifier.
    pub fn file(&self, id: &str) -> Option<&File> {
        self.files.iter().find(|file| file.id == id)
    }
}

fn push<T, E>(list: &mut Vec<T>, entry: T) -> Result<(), OvaError<E>> {
    if list.len() >= ENTRIES_MAX {
        return Err(OvaError::TooManyEntries { max: ENTRIES_MAX });
    }
    list.push(entry);
    Ok(())
}

/// Calls `each` with the name, without its prefix, and the value of every attribute.
fn each_attribute<E>(element: &BytesStart<'_>, mut each: impl FnMut(&str, String)) -> Result<(), OvaError<E>> {
    let refused = |reason: String| OvaError::Attribute { element: element.name().as_ref().to_owned(), reason };
    for attribute in element.attributes() {
        let attribute = attribute.map_err(|error| refused(error.to_string()))?;
        let value = attribute.normalized_value(XmlVersion::Implicit1_0).map_err(|error| refused(error.to_string()))?;
        each(attribute.key.local_name().as_ref(), value.into_owned());
    }
    Ok(())
}

/// Bytes of a unit: `byte * 2^20` and the like (DSP0004, "Programmatic Units"), and the words of version 0.9.
fn unit_bytes(units: &str) -> Option<u64> {
    let text: String = units.chars().filter(|c| !c.is_whitespace()).collect::<String>().to_ascii_lowercase();
    match text.as_str() {
        "" | "byte" | "bytes" => return Some(1),
        "kilobytes" => return Some(1 << 10),
        "megabytes" => return Some(1 << 20),
        "gigabytes" => return Some(1 << 30),
        "terabytes" => return Some(1 << 40),
        _ => {}
    }
    let factor = text.strip_prefix("byte*").or_else(|| text.strip_prefix("bytes*"))?;
    match factor.split_once('^') {
        Some((base, exponent)) => base.parse::<u64>().ok()?.checked_pow(exponent.parse().ok()?),
        None => factor.parse().ok(),
    }
}

/// What a new descriptor tells of.
#[derive(Clone, Debug)]
pub struct NewMachine<'a> {
    /// Name of the machine.
    pub name: &'a str,
    /// Name of the member with the disk.
    pub disk_name: &'a str,
    /// Length of that member.
    pub disk_file_bytes: u64,
    /// Size of the disk.
    pub capacity_bytes: u64,
}

/// A descriptor of a machine with one disk behind a SCSI controller, one processor and 1 GiB of memory, for whoever
/// imports it to change. The names are plain: letters, digits, dots, dashes and underscores.
pub fn describe(new: &NewMachine<'_>) -> String {
    let NewMachine { name, disk_name, disk_file_bytes, capacity_bytes } = new;
    let item = |lines: &[(&str, String)]| {
        let fields: String =
            lines.iter().map(|(key, value)| format!("        <rasd:{key}>{value}</rasd:{key}>\n")).collect();
        format!("      <Item>\n{fields}      </Item>\n")
    };
    let text = |value: &str| value.to_owned();
    let items = [
        item(&[
            ("Caption", text("1 virtual CPU")),
            ("InstanceID", text("1")),
            ("ResourceType", text("3")),
            ("VirtualQuantity", text("1")),
        ]),
        item(&[
            ("AllocationUnits", text("byte * 2^20")),
            ("Caption", text("1024 MB of memory")),
            ("InstanceID", text("2")),
            ("ResourceType", text("4")),
            ("VirtualQuantity", text("1024")),
        ]),
        item(&[
            ("Address", text("0")),
            ("Caption", text("SCSI controller 0")),
            ("InstanceID", text("3")),
            ("ResourceSubType", text("lsilogic")),
            ("ResourceType", text("6")),
        ]),
        item(&[
            ("AddressOnParent", text("0")),
            ("Caption", text("disk 1")),
            ("HostResource", text("ovf:/disk/vmdisk1")),
            ("InstanceID", text("4")),
            ("Parent", text("3")),
            ("ResourceType", text("17")),
        ]),
    ]
    .concat();
    format!(
        r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope ovf:version="1.0" xml:lang="en-US" xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
  <References>
    <File ovf:id="file1" ovf:href="{disk_name}" ovf:size="{disk_file_bytes}"/>
  </References>
  <DiskSection>
    <Info>Disks of the machine</Info>
    <Disk ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:capacity="{capacity_bytes}" ovf:capacityAllocationUnits="byte" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
  </DiskSection>
  <VirtualSystem ovf:id="{name}">
    <Info>A virtual machine</Info>
    <Name>{name}</Name>
    <OperatingSystemSection ovf:id="102">
      <Info>The operating system</Info>
      <Description>Other 64-bit</Description>
    </OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>Virtual hardware</Info>
      <System>
        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>
        <vssd:InstanceID>0</vssd:InstanceID>
        <vssd:VirtualSystemIdentifier>{name}</vssd:VirtualSystemIdentifier>
        <vssd:VirtualSystemType>vmx-07</vssd:VirtualSystemType>
      </System>
{items}    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacities_have_units() {
        for (units, want) in [
            ("", Some(1)),
            ("byte", Some(1)),
            ("byte * 2^20", Some(1 << 20)),
            ("byte*2^30", Some(1 << 30)),
            ("byte * 10^6", Some(1_000_000)),
            ("byte * 1024", Some(1024)),
            ("MegaBytes", Some(1 << 20)),
            ("byte * 2^64", None),
            ("byte * 2^999999999999", None),
            ("furlong", None),
        ] {
            assert_eq!(unit_bytes(units), want, "{units}");
        }
    }

    #[test]
    fn descriptors_name_files_and_disks() {
        let text = r#"<?xml version="1.0"?><e:Envelope xmlns:e="x" xmlns:o="x"><!-- Disk --><References>
            <o:File o:href="a&amp;b.vmdk" o:id="f1" o:size="7"/><File ovf:id="f2" ovf:href="c.vmdk.gz" ovf:compression="gzip"></File>
            <File ovf:id="f3" ovf:href="d" ovf:chunkSize="9"/></References><DiskSection>
            <Disk ovf:capacity="2" ovf:capacityAllocationUnits="byte * 2^30" ovf:diskId="d1" ovf:fileRef="f1" ovf:format="u"/>
            <Disk ovf:capacity="5" ovf:diskId="d2"/></DiskSection></e:Envelope>"#;
        let found = parse::<()>(text).unwrap();
        let file = |id: &str, href: &str, compression: &str, is_split| File {
            id: id.to_owned(),
            href: href.to_owned(),
            compression: compression.to_owned(),
            is_split,
        };
        assert_eq!(
            found.files,
            [file("f1", "a&b.vmdk", "", false), file("f2", "c.vmdk.gz", "gzip", false), file("f3", "d", "", true)]
        );
        let capacities: Vec<(&str, u64)> =
            found.disks.iter().map(|disk| (disk.id.as_str(), disk.capacity_bytes)).collect();
        assert_eq!(capacities, [("d1", 2 << 30), ("d2", 5)]);
        assert_eq!(found.file("f2").map(|file| file.href.as_str()), Some("c.vmdk.gz"));
        let new = NewMachine { name: "vm", disk_name: "vm-disk1.vmdk", disk_file_bytes: 99, capacity_bytes: 1 << 30 };
        let ours = parse::<()>(&describe(&new)).unwrap();
        assert_eq!((ours.files[0].href.as_str(), ours.disks[0].capacity_bytes), ("vm-disk1.vmdk", 1 << 30));
    }

    #[test]
    fn hostile_descriptors_are_refused() {
        let bomb = "<!DOCTYPE x [<!ENTITY a \"aaaa\"><!ENTITY b \"&a;&a;\">]><Envelope>&b;</Envelope>";
        assert!(matches!(parse::<()>(bomb), Err(OvaError::DocumentType)));
        assert!(matches!(parse::<()>(&"<a>".repeat(65)), Err(OvaError::TooDeep { .. })));
        assert!(matches!(parse::<()>(&"<File/>".repeat(257)), Err(OvaError::TooManyEntries { .. })));
        assert!(matches!(parse::<()>("<File id=\"&x;\"/>"), Err(OvaError::Attribute { .. })));
        assert!(matches!(parse::<()>("<a></b>"), Err(OvaError::Xml { .. })));
        for capacity in ["", "-1", "1e9", "99999999999999999999"] {
            let disk = format!("<Disk capacity=\"{capacity}\"/>");
            assert!(matches!(parse::<()>(&disk), Err(OvaError::Capacity { .. })), "{capacity}");
        }
        let large = "<Disk capacity=\"99999999999\" capacityAllocationUnits=\"byte * 2^40\"/>";
        assert!(matches!(parse::<()>(large), Err(OvaError::Capacity { .. })));
    }
}

//! OVA files: a tar archive with the descriptor of a virtual machine (OVF), digests and disks. DMTF DSP0243.
//!
//! Disks stay where they are: [`open`] says which part of the archive holds which, and a reader reads it there.

pub mod manifest;
pub mod ovf;
pub mod tar;

use std::fmt::Debug;

use thiserror::Error;

pub use tar::{Member, PROBE_BYTES, ReadAt, probe};

/// Why an archive is refused. Names of members are what the archive says.
#[derive(Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum OvaError<E> {
    #[error("the archive cannot be read")]
    Read(E),
    #[error("no tar header at {at}")]
    NoTar { at: u64 },
    #[error("the checksum of the header at {at} is wrong; the archive is damaged")]
    Checksum { at: u64 },
    #[error("the {field} field of the header at {at} is no number")]
    Number { at: u64, field: &'static str },
    #[error(
        "member '{name}' has {bytes} bytes at {offset}, past the end of the archive ({file_bytes} bytes); it was truncated"
    )]
    CutOff { name: String, offset: u64, bytes: u64, file_bytes: u64 },
    #[error("the extended header at {at} has {bytes} bytes; at most {max} are read")]
    LongExtension { at: u64, bytes: u64, max: u64 },
    #[error("the name of the member at {at} has {bytes} bytes; at most {max} are allowed")]
    LongName { at: u64, bytes: usize, max: usize },
    #[error("the archive has more than {max} members")]
    TooManyMembers { max: usize },
    #[error("member '{name}' is of type '{kind}', which is not supported; pack the archive anew without sparse files")]
    SpecialMember { name: String, kind: char },
    #[error("the archive has no descriptor (.ovf)")]
    NoDescriptor,
    #[error("member '{name}' has {bytes} bytes; at most {max} are read")]
    LongMember { name: String, bytes: u64, max: u64 },
    #[error("member '{name}' is not UTF-8 text")]
    NotText { name: String },
    #[error("line {line} of the manifest is not 'ALGORITHM(FILE)= DIGEST' with SHA1, SHA256 or SHA512")]
    ManifestLine { line: usize },
    #[error("the manifest names '{name}', which is not in the archive")]
    ManifestMember { name: String },
    #[error("the descriptor is no XML at byte {at}: {reason}")]
    Xml { at: u64, reason: String },
    #[error("the descriptor has a document type; it must not")]
    DocumentType,
    #[error("the descriptor nests elements more than {max} deep")]
    TooDeep { max: usize },
    #[error("the descriptor lists more than {max} files or disks")]
    TooManyEntries { max: usize },
    #[error("an attribute of <{element}> cannot be read: {reason}")]
    Attribute { element: String, reason: String },
    #[error(
        "disk '{disk}' has the capacity '{capacity}' in units of '{units}', which is no number of bytes below 2^64"
    )]
    Capacity { disk: String, capacity: String, units: String },
    #[error("disk '{disk}' is in the file '{file}', which the descriptor does not list")]
    NoFile { disk: String, file: String },
    #[error("disk '{disk}' is in the file '{name}', which is not in the archive")]
    NoMember { disk: String, name: String },
}

impl<E> OvaError<E> {
    fn from_text(fault: tar::HeaderFault) -> OvaError<E> {
        match fault {
            tar::HeaderFault::NoTar { at } => OvaError::NoTar { at },
            tar::HeaderFault::Checksum { at } => OvaError::Checksum { at },
            tar::HeaderFault::Number { at, field } => OvaError::Number { at, field },
        }
    }
}

/// A disk in an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OvaDisk {
    /// Its identifier in the descriptor.
    pub id: String,
    /// Its size, as the descriptor says.
    pub capacity_bytes: u64,
    /// What it is stored as: a URI.
    pub format: String,
    /// The member that holds it.
    pub member: Member,
    /// How that is compressed or split, in the descriptor's words; `None`: it can be read where it is.
    pub packed: Option<String>,
}

/// What an archive holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ova {
    /// Its files, in order.
    pub members: Vec<Member>,
    /// Its disks with contents, in the descriptor's order.
    pub disks: Vec<OvaDisk>,
    /// Digests of its files; empty without a manifest.
    pub digests: Vec<manifest::Digest>,
}

/// Reads the headers, the descriptor and the manifest of an archive.
pub fn open<E: Debug>(file_bytes: u64, read: &mut ReadAt<'_, E>) -> Result<Ova, OvaError<E>> {
    let members = tar::members(file_bytes, read)?;
    let descriptor = members.iter().find(|member| tar::is_descriptor(&member.name)).ok_or(OvaError::NoDescriptor)?;
    let text = read_text(descriptor, ovf::DESCRIPTOR_MAX_BYTES, read)?;
    let parsed = ovf::parse(&text)?;
    let mut disks = Vec::new();
    for disk in &parsed.disks {
        // A blank disk has no file.
        if disk.file_id.is_empty() {
            continue;
        }
        let file = parsed.file(&disk.file_id);
        let file = file.ok_or_else(|| OvaError::NoFile { disk: disk.id.clone(), file: disk.file_id.clone() })?;
        let member = find(&members, &file.href);
        let member = member.ok_or_else(|| OvaError::NoMember { disk: disk.id.clone(), name: file.href.clone() })?;
        let packed = match (file.compression.as_str(), file.is_split) {
            (_, true) => Some("split into chunks".to_owned()),
            ("" | "identity", false) => tar::has_suffix(&member.name, ".gz").then(|| "gzip".to_owned()),
            (other, false) => Some(other.to_owned()),
        };
        disks.push(OvaDisk {
            id: disk.id.clone(),
            capacity_bytes: disk.capacity_bytes,
            format: disk.format.clone(),
            member: member.clone(),
            packed,
        });
    }
    let digests = match members.iter().find(|member| tar::has_suffix(&member.name, ".mf")) {
        Some(member) => manifest::parse(&read_text(member, manifest::MANIFEST_MAX_BYTES, read)?)?,
        None => Vec::new(),
    };
    Ok(Ova { members, disks, digests })
}

/// The member of a name; `./` before it does not count.
pub fn find<'m>(members: &'m [Member], name: &str) -> Option<&'m Member> {
    let bare = |name: &str| name.strip_prefix("./").unwrap_or(name).to_owned();
    let name = bare(name);
    members.iter().find(|member| bare(&member.name) == name)
}

fn read_text<E>(member: &Member, max: u64, read: &mut ReadAt<'_, E>) -> Result<String, OvaError<E>> {
    let Member { name, offset, bytes } = member;
    if *bytes > max {
        return Err(OvaError::LongMember { name: name.clone(), bytes: *bytes, max });
    }
    let mut text = vec![0; *bytes as usize];
    read(*offset, &mut text).map_err(OvaError::Read)?;
    String::from_utf8(text).map_err(|_| OvaError::NotText { name: name.clone() })
}

//! OVA files: their disks are read where they are in the archive, and `convert -O ova` writes one with one disk.

mod write;

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use block::ova::manifest::{Algorithm, Digest};
use block::ova::{self, Member, Ova, OvaDisk};
use block::spec::{BackingSpec, FileSpec, ImageSpec};
use block::{Format, PROBE_BYTES, probe};
use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Sha256, Sha512};

use crate::error::{ImgError, OvaFault};
use crate::facts::Facts;
use crate::getopt::Parsed;
use crate::size::human;

pub use write::Writer;

/// Bytes read at a time for a digest.
const PIECE_BYTES: usize = 1 << 20;

/// An archive with what it says about itself.
pub struct Archive {
    /// Where it is.
    pub path: PathBuf,
    /// Its contents.
    pub ova: Ova,
    file: File,
}

/// The archive that the only file of a command line is: by `-f ova`, or by its first bytes when no format is given.
pub fn of(parsed: &Parsed) -> Result<Option<Archive>, ImgError> {
    match parsed.has("image-opts") {
        true => Ok(None),
        false => at(parsed.one_file()?, parsed.value("format")?),
    }
}

/// The archive at a name, if it is one.
pub fn at(name: &OsStr, format: Option<&str>) -> Result<Option<Archive>, ImgError> {
    let declared = format == Some("ova");
    if format.is_some() && !declared {
        return Ok(None);
    }
    let path = match ImageSpec::parse(name).map(|spec| spec.file) {
        Ok(FileSpec::Path(path)) => path,
        _ => return Ok(None),
    };
    // Whatever cannot be looked at is nobody's archive, unless it was declared one.
    let is_archive = declared || (path.is_file() && starts_as_archive(&path));
    if is_archive { Archive::open(path).map(Some) } else { Ok(None) }
}

fn starts_as_archive(path: &Path) -> bool {
    let mut first = [0; ova::PROBE_BYTES];
    let read = File::open(path).and_then(|file| file.read_at(&mut first, 0));
    read.is_ok_and(|got| ova::probe(first.get(..got).unwrap_or_default()))
}

impl Archive {
    fn open(path: PathBuf) -> Result<Archive, ImgError> {
        let host = |source| ImgError::OpenHost { name: path.display().to_string(), source };
        if path.is_dir() {
            return Err(host(io::ErrorKind::IsADirectory.into()));
        }
        let file = File::open(&path).map_err(host)?;
        let bytes = file.metadata().map_err(host)?.len();
        let found = ova::open(bytes, &mut |offset, out: &mut [u8]| file.read_exact_at(out, offset));
        let name = path.display().to_string();
        let ova = found.map_err(|source| ImgError::Ova { name, fault: OvaFault::Archive(source) })?;
        Ok(Archive { path, ova, file })
    }

    fn refused(&self, fault: OvaFault) -> ImgError {
        ImgError::Ova { name: self.path.display().to_string(), fault }
    }

    /// The only disk, as an image whose bytes are a part of the archive.
    pub fn image(&self) -> Result<ImageSpec, ImgError> {
        match self.ova.disks.as_slice() {
            [] => Err(self.refused(OvaFault::NoDisk)),
            [disk] => self.spec_of(disk),
            all => {
                let names: Result<Vec<String>, ImgError> =
                    all.iter().map(|disk| Ok(self.spec_of(disk)?.to_string())).collect();
                Err(self.refused(OvaFault::ManyDisks { names: names?.join("\n") }))
            }
        }
    }

    /// The image of a disk. Nothing below it is opened: an archive brings all it has.
    fn spec_of(&self, disk: &OvaDisk) -> Result<ImageSpec, ImgError> {
        let Member { name, offset, bytes } = &disk.member;
        if let Some(how) = &disk.packed {
            return Err(self.refused(OvaFault::Packed { member: name.clone(), how: how.clone() }));
        }
        let format = self.format_of(&disk.member)?;
        let mut spec = ImageSpec::path(&self.path, Some(format));
        spec.file = FileSpec::Slice { below: Box::new(spec.file), offset: *offset, size: Some(*bytes) };
        if format == Format::Qcow2 {
            spec.backing = BackingSpec::None;
        }
        spec.read_only = Some(true);
        Ok(spec)
    }

    fn format_of(&self, member: &Member) -> Result<Format, ImgError> {
        let mut first = vec![0; member.bytes.min(PROBE_BYTES as u64) as usize];
        self.read(member.offset, &mut first)?;
        probe(&first).map_err(|source| self.refused(OvaFault::Unread { member: member.name.clone(), source }))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ImgError> {
        let read = self.file.read_exact_at(out, offset);
        read.map_err(|source| ImgError::OpenHost { name: self.path.display().to_string(), source })
    }

    /// Holds every file that the manifest names against its digest. Without a manifest there is nothing to hold.
    pub fn verify(&self) -> Result<(), ImgError> {
        for digest in &self.ova.digests {
            let Digest { algorithm, name, value } = digest;
            let member = ova::find(&self.ova.members, name);
            let member = member.ok_or_else(|| self.refused(OvaFault::NotThere { member: name.clone() }))?;
            let found = match algorithm {
                Algorithm::Sha1 => self.digest::<Sha1>(member)?,
                Algorithm::Sha256 => self.digest::<Sha256>(member)?,
                Algorithm::Sha512 => self.digest::<Sha512>(member)?,
            };
            if &found != value {
                return Err(self.refused(OvaFault::Digest { member: name.clone() }));
            }
        }
        Ok(())
    }

    fn digest<D: sha2::Digest>(&self, member: &Member) -> Result<Vec<u8>, ImgError> {
        let mut hasher = D::new();
        let mut room = vec![0; PIECE_BYTES.min(member.bytes as usize)];
        let mut done = 0;
        while done < member.bytes {
            let piece = room.get_mut(..(member.bytes - done).min(PIECE_BYTES as u64) as usize).unwrap_or_default();
            self.read(member.offset + done, piece)?;
            hasher.update(&*piece);
            done += piece.len() as u64;
        }
        Ok(hasher.finalize().to_vec())
    }

    /// Size of its disks together, and space the archive takes.
    fn sizes(&self) -> Result<(u64, u64), ImgError> {
        use std::os::unix::fs::MetadataExt;
        let meta = self.file.metadata();
        let meta = meta.map_err(|source| ImgError::OpenHost { name: self.path.display().to_string(), source })?;
        let disks = self.ova.disks.iter().fold(0u64, |sum, disk| sum.saturating_add(disk.capacity_bytes));
        Ok((disks, meta.blocks().saturating_mul(512)))
    }

    /// What is in it, for people and programs.
    fn facts(&self) -> Facts {
        let members = self.ova.members.iter().map(|member| {
            Facts::Group(vec![
                ("filename", Facts::from(member.name.as_str())),
                ("offset", Facts::from(member.offset)),
                ("size", Facts::from(member.bytes)),
            ])
        });
        let disks = self.ova.disks.iter().map(|disk| {
            let mut facts = vec![
                ("id", Facts::from(disk.id.as_str())),
                ("filename", Facts::from(disk.member.name.as_str())),
                ("virtual-size", Facts::from(disk.capacity_bytes)),
            ];
            match (&disk.packed, self.spec_of(disk)) {
                (Some(how), _) => facts.push(("packed", Facts::from(how.as_str()))),
                (None, Ok(spec)) => {
                    facts.extend(spec.driver.map(|format| ("format", Facts::from(format.name()))));
                    facts.push(("image", Facts::from(spec.to_string().as_str())));
                }
                (None, Err(_)) => {}
            }
            Facts::Group(facts)
        });
        Facts::Group(vec![
            ("manifest", Facts::from(!self.ova.digests.is_empty())),
            ("members", Facts::List(members.collect())),
            ("disks", Facts::List(disks.collect())),
        ])
    }

    /// What `info` prints.
    pub fn to_text(&self) -> Result<String, ImgError> {
        let (disk_bytes, allocated) = self.sizes()?;
        Ok(format!(
            "image: {}\nfile format: ova\nvirtual size: {} ({disk_bytes} bytes)\ndisk size: {}\n\
             Format specific information:\n{}",
            self.path.display(),
            human(disk_bytes),
            human(allocated),
            self.facts().to_text(1)
        ))
    }

    /// What `info --output=json` prints.
    pub fn to_json(&self) -> Result<Value, ImgError> {
        let (disk_bytes, allocated) = self.sizes()?;
        Ok(json!({
            "filename": self.path.display().to_string(), "format": "ova", "virtual-size": disk_bytes,
            "actual-size": allocated, "dirty-flag": false, "children": [],
            "format-specific": {"type": "ova", "data": self.facts().to_json()},
        }))
    }

    /// What `tree` draws: the members, and which of them are disks.
    pub fn tree(&self) -> Result<String, ImgError> {
        let (disk_bytes, allocated) = self.sizes()?;
        let mut out =
            format!("{}  ova  {} disk, {} on the host\n", self.path.display(), human(disk_bytes), human(allocated));
        for member in &self.ova.members {
            let disk = self.ova.disks.iter().find(|disk| disk.member == *member);
            let what = match disk {
                None => String::new(),
                Some(OvaDisk { packed: Some(how), .. }) => format!("  disk, {how}"),
                Some(disk) => format!("  disk, {}, {}", self.format_of(member)?, human(disk.capacity_bytes)),
            };
            out += &format!("`- {}  {}{what}\n", member.name.escape_debug(), human(member.bytes));
        }
        Ok(out)
    }
}

//! Writing an archive in one pass: room for descriptor and manifest, then the disk; what is in the room is known, and
//! written, when the disk is.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use block::ova::ovf::{NewMachine, describe};
use block::ova::{manifest, tar};
use block::{
    AdapterType, CacheMode, ChainBackend, Disk, FileBackend, Format, HostFile, OpenOptions, ReadBufs, Subformat,
    VmdkOptions, Window, WriteBufs, create_vmdk, open_for_new,
};
use sha2::{Digest, Sha256};

use super::PIECE_BYTES;
use crate::error::MakeError;

/// Longest name of a machine, in bytes, so that names of members fit their headers.
const NAME_MAX_BYTES: usize = 60;
/// Bytes of a SHA-256.
const SHA256_BYTES: usize = 32;

/// An archive that is being written.
pub struct Writer {
    file: HostFile,
    machine: String,
    capacity_bytes: u64,
    /// Where the contents of the members start.
    descriptor_at: u64,
    manifest_at: u64,
    disk_at: u64,
    /// Length of the descriptor.
    descriptor_bytes: usize,
}

impl Writer {
    /// Starts an archive at a path and returns the disk in it, which takes compressed clusters in ascending order.
    pub fn create(path: &Path, capacity_bytes: u64, cache: CacheMode) -> Result<(Disk, Writer), MakeError> {
        let raw = open_for_new(path).map_err(MakeError::Block)?;
        let below = raw.try_clone().and_then(HostFile::new).map_err(MakeError::Host)?;
        let file = HostFile::new(raw).map_err(MakeError::Host)?;
        let mut writer = Writer {
            file,
            machine: machine_name(path),
            capacity_bytes,
            descriptor_at: tar::BLOCK_BYTES,
            manifest_at: 0,
            disk_at: 0,
            descriptor_bytes: 0,
        };
        // No length has more digits than the largest one.
        writer.descriptor_bytes = writer.descriptor(u64::MAX).len();
        let after = |start: u64, bytes: usize| (start + bytes as u64).next_multiple_of(tar::BLOCK_BYTES);
        writer.manifest_at = after(writer.descriptor_at, writer.descriptor_bytes) + tar::BLOCK_BYTES;
        writer.disk_at =
            after(writer.manifest_at, writer.manifest(&[0; SHA256_BYTES], &[0; SHA256_BYTES]).len()) + tar::BLOCK_BYTES;
        let disk_name = PathBuf::from(writer.disk_name());
        let window = Window::new(Box::new(below), writer.disk_at, None);
        let options = VmdkOptions {
            subformat: Subformat::StreamOptimized,
            adapter_type: AdapterType::LsiLogic,
            ..VmdkOptions::default()
        };
        create_vmdk(&window, &disk_name, capacity_bytes, &options).map_err(MakeError::Block)?;
        let layer = ChainBackend {
            file: Box::new(window),
            path_label: path.to_owned(),
            format: Format::Vmdk,
            extents: Vec::new(),
        };
        let options = OpenOptions { format: Format::Vmdk, cache, ..OpenOptions::default() };
        let disk = Disk::open_backends(vec![layer], &options).map_err(MakeError::Block)?;
        Ok((disk, writer))
    }

    fn disk_name(&self) -> String {
        format!("{}-disk1.vmdk", self.machine)
    }

    fn descriptor_name(&self) -> String {
        format!("{}.ovf", self.machine)
    }

    fn descriptor(&self, disk_file_bytes: u64) -> String {
        describe(&NewMachine {
            name: &self.machine,
            disk_name: &self.disk_name(),
            disk_file_bytes,
            capacity_bytes: self.capacity_bytes,
        })
    }

    fn manifest(&self, descriptor: &[u8], disk: &[u8]) -> String {
        manifest::line(&self.descriptor_name(), descriptor) + &manifest::line(&self.disk_name(), disk)
    }

    /// Writes everything around the disk, which is complete and closed.
    pub fn finish(self) -> Result<(), MakeError> {
        let end = self.file.len_bytes().map_err(MakeError::Host)?;
        let disk_bytes = end.saturating_sub(self.disk_at);
        let mut descriptor = self.descriptor(disk_bytes).into_bytes();
        // The room was made for the longest number.
        descriptor.resize(self.descriptor_bytes, b'\n');
        let digests = self.manifest(&Sha256::digest(&descriptor), &self.disk_digest(disk_bytes)?);
        let mtime_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let put =
            |at: u64, bytes: &[u8]| self.file.write_at(at, &WriteBufs::from_slice(bytes)).map_err(MakeError::Host);
        let header = |name: &str, bytes: u64| tar::header(name, bytes, mtime_s);
        put(self.descriptor_at - tar::BLOCK_BYTES, &header(&self.descriptor_name(), descriptor.len() as u64))?;
        put(self.descriptor_at, &descriptor)?;
        let manifest_name = format!("{}.mf", self.machine);
        put(self.manifest_at - tar::BLOCK_BYTES, &header(&manifest_name, digests.len() as u64))?;
        put(self.manifest_at, digests.as_bytes())?;
        put(self.disk_at - tar::BLOCK_BYTES, &header(&self.disk_name(), disk_bytes))?;
        // Two blocks of zeroes end an archive.
        let end = end.next_multiple_of(tar::BLOCK_BYTES) + 2 * tar::BLOCK_BYTES;
        self.file.set_len_bytes(end).map_err(MakeError::Host)
    }

    fn disk_digest(&self, bytes: u64) -> Result<Vec<u8>, MakeError> {
        let mut hasher = Sha256::new();
        let mut room = vec![0; PIECE_BYTES];
        let mut done = 0;
        while done < bytes {
            let piece = room.get_mut(..(bytes - done).min(PIECE_BYTES as u64) as usize).unwrap_or_default();
            self.file.read_at(self.disk_at + done, &ReadBufs::from_slice(piece)).map_err(MakeError::Host)?;
            hasher.update(&*piece);
            done += piece.len() as u64;
        }
        Ok(hasher.finalize().to_vec())
    }
}

/// A name for the machine and its files out of the archive's: letters, digits, dots, dashes, underscores.
fn machine_name(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() || ".-_".contains(c) { c } else { '_' };
    let name: String = stem.chars().take(NAME_MAX_BYTES).map(plain).collect();
    if name.trim_matches('.').is_empty() { "machine".to_owned() } else { name }
}

#[test]
fn names_are_plain() {
    for (path, want) in [("a/vm 1.ova", "vm_1"), ("é<&>.ova", "____"), ("...", "machine"), ("x", "x")] {
        assert_eq!(machine_name(Path::new(path)), want);
    }
}

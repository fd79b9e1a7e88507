//! `rebase`: another backing file.

use block::{BlockError, CacheMode, CopyOptions, Disk, ExtentKind, Format, PageBuf, Qcow2Image, beside};

use block::spec::BackingSpec;

use crate::Command;
use crate::convert::default_workers;
use crate::error::{ImgError, Rule};
use crate::getopt::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, Opt, PROGRESS, Parsed, QUIET, flag, opt};
use crate::open::{self, Access, Named};
use crate::progress::Progress;

/// `rebase`.
pub const COMMAND: Command = Command {
    name: "rebase",
    about: "Change the backing file of an image",
    operands: "FILENAME",
    options: OPTIONS,
    run,
};

const OPTIONS: &[Opt] = &[
    QUIET,
    PROGRESS,
    FORMAT,
    IMAGE_OPTS,
    opt('t', &["cache"], "CACHE", "cache mode of FILENAME (writeback)"),
    opt('b', &["backing"], "FILE|\"\"", "the new backing file; \"\" for none"),
    opt('F', &["backing-format"], "FMT", "format of the new backing file"),
    opt('T', &["backing-cache"], "CACHE", "cache mode of the backing files (writeback)"),
    flag('u', &["backing-unsafe"], "change the name only: the new file must hold what the old one held"),
    flag('c', &["compress"], "store compressed what is copied into the image"),
    FORCE_SHARE,
    OBJECT,
];

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    let file = parsed.one_file()?;
    let backing = parsed.value("backing")?;
    let name_only = parsed.has("backing-unsafe");
    if backing.is_none() && !name_only {
        return Err(ImgError::Needed {
            command: "rebase",
            what: "Must specify backing file (-b) or use unsafe mode (-u)",
        });
    }
    let cache = open::cache_named("destination ", parsed.value("cache")?, CacheMode::Writeback)?;
    let read_cache = open::cache_named("source ", parsed.value("backing-cache")?, CacheMode::Writeback)?;
    let named = Named::of(parsed, file, "format")?;
    // -U is for the files below; the image itself is written.
    let access = Access::write(cache);
    let new = New { name: backing.unwrap_or_default(), format: parsed.value("backing-format")? };
    if name_only {
        return rename(&named, access, &new);
    }
    let disk = open::disk(&named, access)?;
    let Some(image) = disk.qcow2() else { return Err(new.refused("Operation not supported")) };
    new.check_format()?;
    new.check(&image)?;
    let reading = Access { write: false, share: parsed.has("force-share"), cache: read_cache };
    let old_disk = open_old(&named, &image, reading)?;
    let new_disk = open_new(&named, &new, reading)?;
    if !new.name.is_empty() && new.format.is_none() {
        return Err(new.refused("backing format must be specified"));
    }
    let progress = Progress::of(parsed, None);
    let work = Work { disk: &disk, old: old_disk.as_ref(), new: new_disk.as_ref(), compress: parsed.has("compress") };
    let failed = |source| ImgError::Rebase { name: named.label.clone(), source };
    work.run(&progress).map_err(failed)?;
    // What the image took over is on the disk before it stops showing the old file.
    disk.flush().map_err(failed)?;
    new.put(&image)?;
    progress.end();
    Ok(0)
}

/// The new backing file, as it will be stored.
struct New<'a> {
    name: &'a str,
    format: Option<&'a str>,
}

impl New<'_> {
    fn refused(&self, reason: &'static str) -> ImgError {
        ImgError::Plain(Rule::Backing { name: self.name.to_owned(), reason })
    }

    fn check_format(&self) -> Result<(), ImgError> {
        let Some(format) = self.format else { return Ok(()) };
        format.parse::<Format>().map_err(|_| ImgError::Plain(Rule::FormatName(format.to_owned())))?;
        Ok(())
    }

    /// Asked before anything is copied.
    fn check(&self, image: &Qcow2Image) -> Result<(), ImgError> {
        let name = (!self.name.is_empty()).then_some(self.name);
        image.check_backing(name).map_err(|_| self.refused("Invalid argument"))
    }

    fn put(&self, image: &Qcow2Image) -> Result<(), ImgError> {
        let name = (!self.name.is_empty()).then_some(self.name);
        image.set_backing(name, name.and(self.format)).map_err(|source| ImgError::Failed {
            doing: format!("Could not change the backing file to '{}'", self.name),
            source,
        })
    }
}

/// `-u`: the name changes, and nothing is read.
fn rename(named: &Named, access: Access, new: &New<'_>) -> Result<u8, ImgError> {
    let top = open::top(named, access)?;
    new.check_format()?;
    if top.format != Format::Qcow2 {
        return Err(new.refused("Operation not supported"));
    }
    if !new.name.is_empty() && new.format.is_none() {
        return Err(new.refused("backing format must be specified"));
    }
    let image = open::qcow2(named, top, false)?;
    new.check(&image)?;
    new.put(&image)?;
    Ok(0)
}

/// What the image shows now where it holds nothing.
fn open_old(named: &Named, image: &Qcow2Image, access: Access) -> Result<Option<Disk>, ImgError> {
    let header = image.header();
    let Some(name) = header.backing_name else { return Ok(None) };
    let at = beside(named.plain_path()?, &name);
    let mut old = Named::new(at.as_os_str(), false, header.backing_format.as_deref())?.with(named.secrets.clone());
    if let BackingSpec::HeaderWithKey { key_secret, below } = &named.spec.backing {
        old.spec.key_secret = key_secret.clone();
        old.spec.backing = (**below).clone();
    }
    open::disk(&old, access).map(Some)
}

/// What it will show.
fn open_new(named: &Named, new: &New<'_>, access: Access) -> Result<Option<Disk>, ImgError> {
    if new.name.is_empty() {
        return Ok(None);
    }
    let at = beside(named.plain_path()?, new.name);
    let below = Named::new(at.as_os_str(), false, new.format)?.with(named.secrets.clone());
    open::disk(&below, access).map(Some).map_err(|error| match error {
        ImgError::Open { source, .. } => ImgError::NewBacking { name: new.name.to_owned(), source },
        other => other,
    })
}

/// Bytes looked at together at most; a multiple of every cluster size.
const PIECE_BYTES: u64 = 2 << 20;

/// Copies into an image what its old backing file shows through it and the new one would not.
struct Work<'a> {
    disk: &'a Disk,
    old: Option<&'a Disk>,
    new: Option<&'a Disk>,
    compress: bool,
}

impl Work<'_> {
    fn run(&self, progress: &Progress) -> Result<(), BlockError> {
        let size = self.disk.size_bytes();
        if let (Some(old), None) = (self.old, self.new)
            && old.size_bytes() <= size
        {
            return self.flatten(old, progress);
        }
        let (mut old, mut new) = (PageBuf::default(), PageBuf::default());
        let mut at = 0;
        while at < size {
            let found = self.disk.extent(at, size - at)?;
            let mut bytes = found.extent.bytes;
            if found.depth > 0 || found.extent.kind == ExtentKind::Below {
                // Neither file holds anything: what is far away is not walked in small steps.
                bytes = self.empty_run(at, bytes)?;
                if bytes == 0 {
                    bytes = found.extent.bytes.min(PIECE_BYTES - at % PIECE_BYTES);
                    self.take_over(at, bytes, &mut old, &mut new)?;
                }
            }
            at += bytes;
            progress.report(at, size);
        }
        Ok(())
    }

    /// With no new backing file, what is not zero is taken over as it is, and nothing needs a comparison.
    fn flatten(&self, old: &Disk, progress: &Progress) -> Result<(), BlockError> {
        let options = CopyOptions {
            workers: default_workers(),
            compressed: self.compress,
            // What stays unmapped reads as zeroes when the old file is gone.
            target_is_zero: true,
            // A block of zeroes in the data of the old file stays one; to look for it would cost more.
            sparse_bytes: 0,
            unmapped_only: true,
            ..CopyOptions::default()
        };
        block::copy(old, self.disk, &options, &|done, total| {
            progress.report(done, total);
            true
        })
    }

    /// How far from `at` on both files read as zeroes without being read.
    fn empty_run(&self, at: u64, bytes: u64) -> Result<u64, BlockError> {
        let mut bytes = bytes;
        for disk in [self.old, self.new].into_iter().flatten() {
            let inside = disk.size_bytes().saturating_sub(at).min(bytes);
            if inside == 0 {
                continue;
            }
            let extent = disk.extent(at, inside)?.extent;
            if extent.kind == ExtentKind::Data {
                return Ok(0);
            }
            // Past the end of a file everything is zeroes.
            bytes = if extent.bytes == inside { bytes } else { extent.bytes };
        }
        Ok(bytes)
    }

    fn take_over(&self, at: u64, bytes: u64, old: &mut PageBuf, new: &mut PageBuf) -> Result<(), BlockError> {
        read_padded(self.old, at, bytes, old)?;
        read_padded(self.new, at, bytes, new)?;
        if **old == **new {
            return Ok(());
        }
        let unit = self.disk.cluster_bytes().max(512);
        let mut start = 0;
        while start < bytes {
            // Whole clusters, counted from the start of the disk.
            let end = bytes.min(start + unit - (at + start) % unit);
            let part = |room: &'_ [u8]| room.get(start as usize..end as usize).map(<[u8]>::to_vec).unwrap_or_default();
            let held = part(old);
            if held != part(new) {
                self.write(at + start, &held)?;
            }
            start = end;
        }
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), BlockError> {
        let unit = self.disk.cluster_bytes().max(1);
        let whole = at.is_multiple_of(unit) && bytes.len() as u64 == unit;
        // Without a backing file an unmapped cluster is zeroes already, and stays unmapped: not enough for a file to come.
        if self.old.is_some() && bytes.iter().all(|byte| *byte == 0) {
            return self.disk.write_zeroes(at, bytes.len() as u64, true);
        }
        let mut packed = Vec::new();
        if self.compress && whole && self.disk.pack(bytes, &mut packed)? {
            return self.disk.write_packed(at, &packed, unit);
        }
        self.disk.write(at, bytes)
    }
}

/// Reads a part of a disk that may be shorter, or not there.
fn read_padded(disk: Option<&Disk>, at: u64, bytes: u64, room: &mut PageBuf) -> Result<(), BlockError> {
    room.set_len(bytes as usize);
    let inside = disk.map_or(0, |disk| disk.size_bytes().saturating_sub(at).min(bytes));
    room.get_mut(inside as usize..).unwrap_or_default().fill(0);
    let Some(disk) = disk else { return Ok(()) };
    match room.get_mut(..inside as usize) {
        Some(part) if inside > 0 => disk.read(at, part),
        _ => Ok(()),
    }
}

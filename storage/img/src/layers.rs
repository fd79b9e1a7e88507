//! Images whose name is more than a path: parts of files, disks inside images, backing files other than the header's.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::blkdebug::{Blkdebug, Breakpoints, read_rules};
use block::nbd::NbdFile;
use block::spec::{BackingSpec, FileSpec, ImageSpec, has_protocol};
use block::{
    BlockError, CHAIN_MAX, CacheMode, ChainBackend, Disk, FileBackend, Format, HostFile, LayerKey, OpenOptions,
    PROBE_BYTES, ReadBackend, ReadBufs, ReadOnly, Window, WriteBufs, beside, inspect_backend, open_alone, probe,
    use_direct_io,
};

use crate::error::{ImgError, Rule};
use crate::open::{Access, Named, key_of};
use crate::secret::Secrets;

/// Opens the disk that a name with layers stands for. With the names of the files of each layer, the top one first: the
/// image, then its extents.
pub fn disk_with_names(
    named: &Named,
    access: Access,
    options: OpenOptions,
) -> Result<(Disk, Vec<Vec<String>>), ImgError> {
    let mut opener = Opener::new(named, access);
    if access.write && named.spec.read_only == Some(true) {
        return Err(opener.rule(Rule::ReadOnly));
    }
    opener.add(&named.spec)?;
    let format = opener.layers.first().map_or(Format::Raw, |top| top.format);
    let keys = opener.keys;
    let options = OpenOptions { read_only: !access.write, format, cache: access.cache, keys, ..options };
    let layers = opener.layers;
    let names_of = |layer: &ChainBackend| file_names(&layer.path_label, layer.extents.iter().map(|(_, path)| path));
    let names = layers.iter().map(names_of).collect();
    let disk = Disk::open_backends(layers, &options);
    Ok((disk.map_err(|source| ImgError::Open { name: named.label.clone(), source })?, names))
}

/// The names of an image's own file and of its extents.
pub fn file_names<'a>(image: &'a PathBuf, extents: impl Iterator<Item = &'a PathBuf>) -> Vec<String> {
    std::iter::once(image).chain(extents).map(|path| path.display().to_string()).collect()
}

/// The format of the top layer: as declared, or as its first bytes say.
pub fn format_of(named: &Named) -> Result<Format, ImgError> {
    if let Some(format) = named.spec.driver {
        return Ok(format);
    }
    let access = Access { write: false, share: true, cache: CacheMode::Writeback };
    let opener = Opener::new(named, access);
    let (file, _) = opener.file(&named.spec.file)?;
    opener.format(&named.spec, &*file)
}

/// The top layer alone, for reading.
pub fn top(named: &Named) -> Result<ChainBackend, ImgError> {
    let access = Access { write: false, share: false, cache: CacheMode::Writeback };
    let opener = Opener::new(named, access);
    let (file, label) = opener.file(&named.spec.file)?;
    let format = opener.format(&named.spec, &*file)?;
    Ok(layer(file, label, format))
}

/// The innermost file of a name, if it is one of the host.
pub fn innermost(file: &FileSpec) -> Option<&Path> {
    match file {
        FileSpec::Path(path) => Some(path),
        FileSpec::Slice { below, .. } | FileSpec::Blkdebug { below, .. } => innermost(below),
        FileSpec::Image(image) => innermost(&image.file),
        FileSpec::Nbd(_) => None,
    }
}

/// How far into its file of the host the bytes of a name start; 0 where they are not in one as they are.
pub fn shift(file: &FileSpec) -> u64 {
    match file {
        FileSpec::Slice { below, offset, .. } => offset.saturating_add(shift(below)),
        _ => 0,
    }
}

/// What holds bytes, with the path that its messages name.
type OpenFile = (Box<dyn FileBackend>, PathBuf);

struct Opener<'a> {
    label: &'a str,
    secrets: &'a Secrets,
    access: Access,
    /// Every image down to here has a declared format.
    declared: bool,
    layers: Vec<ChainBackend>,
    /// What opens the encryption of each.
    keys: Vec<LayerKey>,
}

impl<'a> Opener<'a> {
    fn new(named: &'a Named, access: Access) -> Opener<'a> {
        let Named { label, secrets, .. } = named;
        Opener { label, secrets, access, declared: true, layers: Vec::new(), keys: Vec::new() }
    }
}

impl Opener<'_> {
    fn rule(&self, reason: Rule) -> ImgError {
        ImgError::OpenRule { name: self.label.to_owned(), reason }
    }

    fn failed(&self, source: BlockError) -> ImgError {
        ImgError::Open { name: self.label.to_owned(), source }
    }

    /// Adds an image and everything below it.
    fn add(&mut self, spec: &ImageSpec) -> Result<(), ImgError> {
        if self.layers.len() >= CHAIN_MAX {
            let path = PathBuf::from(self.label);
            return Err(self.failed(BlockError::TooDeep { path, max: CHAIN_MAX }));
        }
        let (file, label) = self.file(&spec.file)?;
        let format = self.format(spec, &*file)?;
        self.check_alignment(spec, format, &*file)?;
        self.declared &= spec.driver.is_some();
        let mut image = layer(file, label, format);
        if format == Format::Qcow2 {
            image.extents.extend(self.data_file(spec, &image)?);
        }
        self.keys.push(key_of(self.label, self.secrets, spec.key_secret.as_deref())?);
        let backing = match (&spec.backing, format) {
            (BackingSpec::FromHeader, Format::Qcow2) => self.named_in_header(&image)?,
            (BackingSpec::HeaderWithKey { key_secret, below }, Format::Qcow2) => {
                let named = self.named_in_header(&image)?;
                named.map(|named| ImageSpec { key_secret: key_secret.clone(), backing: (**below).clone(), ..named })
            }
            (BackingSpec::FromHeader | BackingSpec::HeaderWithKey { .. }, _) => None,
            (BackingSpec::None, Format::Qcow2) if self.named_in_header(&image)?.is_some() => {
                self.layers.push(image);
                // The image says that something is below it: nothing is.
                self.layers.push(layer(Box::new(ReadOnly(Nothing)), PathBuf::from("nothing"), Format::Raw));
                return Ok(());
            }
            (BackingSpec::None, _) => None,
            (BackingSpec::Image(below), _) => Some((**below).clone()),
        };
        self.layers.push(image);
        // What is below is read, and nobody changes it.
        self.access.write = false;
        match backing {
            Some(below) => self.add(&below),
            None => Ok(()),
        }
    }

    /// The last block of a raw image belongs to it: its file must not grow when that is written.
    fn check_alignment(&self, spec: &ImageSpec, format: Format, file: &dyn FileBackend) -> Result<(), ImgError> {
        let FileSpec::Blkdebug { own, .. } = &spec.file else { return Ok(()) };
        let sectors = file.len_bytes().map_err(|source| self.host(source))?.div_ceil(512);
        let is_whole = sectors.saturating_mul(512).is_multiple_of(own.options.limits.align());
        let grows = self.access.write && format == Format::Raw && !is_whole;
        if grows { Err(self.rule(Rule::Unaligned)) } else { Ok(()) }
    }

    fn format(&self, spec: &ImageSpec, file: &dyn FileBackend) -> Result<Format, ImgError> {
        if let Some(format) = spec.driver {
            return Ok(format);
        }
        let mut first = [0; PROBE_BYTES];
        let read = file.read_at(0, &ReadBufs::from_slice(&mut first));
        read.map_err(|source| self.rule(Rule::Probing(source)))?;
        probe(&first).map_err(|source| self.failed(BlockError::Unread { path: PathBuf::from(self.label), source }))
    }

    fn host(&self, source: io::Error) -> ImgError {
        ImgError::OpenHost { name: self.label.to_owned(), source }
    }

    /// The external data file: the one that was named, or with the consent that lies in a declared format, the one
    /// that the header names.
    fn data_file(&self, spec: &ImageSpec, image: &ChainBackend) -> Result<Option<OpenFile>, ImgError> {
        if let Some(file) = &spec.data_file {
            return self.file(file).map(Some);
        }
        let header = inspect_backend(image).map_err(|source| self.failed(source))?;
        let Some(data) = header.data_file else { return Ok(None) };
        let path = image.path_label.clone();
        let Some(name) = data.name.filter(|name| !name.is_empty() && innermost(&spec.file).is_some()) else {
            return Err(self.failed(BlockError::DataFileNotGiven { path }));
        };
        if !self.declared {
            return Err(self.failed(BlockError::DataFileConsent { path, name }));
        }
        if has_protocol(&name) {
            return Err(self.failed(BlockError::DataFileProtocol { path, name }));
        }
        self.file(&FileSpec::Path(PathBuf::from(name))).map(Some)
    }

    /// The backing file that a qcow2 header names.
    fn named_in_header(&self, image: &ChainBackend) -> Result<Option<ImageSpec>, ImgError> {
        let header = inspect_backend(image).map_err(|source| self.failed(source))?;
        let Some(name) = header.backing_name else { return Ok(None) };
        let refused = |source| ImgError::Spec { name: name.clone(), source };
        let mut below = ImageSpec::parse(std::ffi::OsStr::new(&name)).map_err(refused)?;
        if let FileSpec::Path(_) = below.file {
            below.file = FileSpec::Path(beside(&image.path_label, &name));
        }
        if let Some(format) = header.backing_format {
            let unknown = || self.rule(Rule::UnknownDriver(format.clone()));
            below.driver = Some(format.parse().map_err(|_| unknown())?);
        }
        Ok(Some(below))
    }

    /// Opens what holds the bytes, with the path that its messages name.
    fn file(&self, file: &FileSpec) -> Result<OpenFile, ImgError> {
        let Access { write, share, cache } = self.access;
        match file {
            FileSpec::Path(path) => {
                let top = open_alone(path, Some(Format::Raw), !write, !share);
                let top = top.map_err(|source| self.failed(source))?;
                if cache.is_direct() {
                    use_direct_io(&top.file).map_err(|_| self.rule(Rule::NoDirect))?;
                }
                let file = HostFile::new(top.file).map_err(|source| self.host(source))?;
                Ok((Box::new(file), path.clone()))
            }
            FileSpec::Slice { below, offset, size } => {
                let (below, label) = self.file(below)?;
                let have = below.len_bytes().map_err(|source| self.host(source))?;
                if *offset > have {
                    return Err(self.rule(Rule::SliceOffset { offset: *offset, have }));
                }
                let size = size.unwrap_or((have - offset) / 512 * 512);
                if offset.checked_add(size).is_none_or(|end| end > have) {
                    return Err(self.rule(Rule::SliceEnd { offset: *offset, size, have }));
                }
                Ok((Box::new(Window::new(below, *offset, Some(size))), label))
            }
            FileSpec::Image(image) => {
                let mut inner = Opener { layers: Vec::new(), keys: Vec::new(), ..*self };
                inner.add(image)?;
                let label = inner.layers.first().map(|top| top.path_label.clone()).unwrap_or_default();
                let format = inner.layers.first().map_or(Format::Raw, |top| top.format);
                let keys = inner.keys;
                let options = OpenOptions { read_only: !write, format, cache, keys, ..OpenOptions::default() };
                let disk = Disk::open_backends(inner.layers, &options).map_err(|source| self.failed(source))?;
                Ok((Box::new(DiskFile(disk)), label))
            }
            FileSpec::Nbd(spec) => {
                let creds = spec.tls.as_ref().and_then(|tls| tls.creds.as_deref());
                let creds = creds.map(|id| self.secrets.tls(id)).transpose().map_err(|rule| self.rule(rule))?;
                let tls = creds.map(|creds| creds.client()).transpose().map_err(|rule| self.rule(rule))?;
                let file = NbdFile::connect(spec, tls);
                let file = file.and_then(|file| if write { file.for_writing() } else { Ok(file) });
                let file = file.map_err(|source| self.failed(BlockError::Nbd(Box::new(source))))?;
                Ok((Box::new(file), PathBuf::from(spec.to_string())))
            }
            FileSpec::Blkdebug { own, .. } if own.takes_write && !write => Err(self.rule(Rule::ReadOnly)),
            FileSpec::Blkdebug { rules, own, below } => {
                let mut options = own.options.clone();
                if let Some(path) = rules {
                    let read = read_rules(path).map_err(|source| self.rule(Rule::RulesFile(source)))?;
                    options.rules.splice(0..0, read);
                }
                let (below, label) = self.file(below)?;
                Ok((Box::new(Blkdebug::new(below, options)), label))
            }
        }
    }
}

fn layer(file: Box<dyn FileBackend>, path_label: PathBuf, format: Format) -> ChainBackend {
    ChainBackend { file, path_label, format, extents: Vec::new() }
}

/// A file without a byte: reads past its end are zeroes.
struct Nothing;

impl ReadBackend for Nothing {
    fn read_at(&self, _: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        bufs.fill_zero();
        Ok(())
    }
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(0)
    }
    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(0)
    }
}

/// The disk of an image as a file.
struct DiskFile(Disk);

/// Bytes copied at a time between a disk and a caller's buffers.
const PIECE_BYTES: usize = 1 << 20;

fn as_io(error: BlockError) -> io::Error {
    io::Error::other(error)
}

impl FileBackend for DiskFile {
    fn read_at(&self, at: u64, bufs: &ReadBufs<'_>) -> io::Result<()> {
        let inside = usize::try_from(self.0.size_bytes().saturating_sub(at)).unwrap_or(usize::MAX).min(bufs.len());
        bufs.range(inside, bufs.len() - inside).fill_zero();
        let mut room = vec![0; inside.min(PIECE_BYTES)];
        let mut done = 0;
        while done < inside {
            let piece = room.get_mut(..(inside - done).min(PIECE_BYTES)).unwrap_or_default();
            self.0.read(at + done as u64, piece).map_err(as_io)?;
            bufs.range(done, piece.len()).copy_from(piece);
            done += piece.len();
        }
        Ok(())
    }
    fn write_at(&self, at: u64, bufs: &WriteBufs<'_>) -> io::Result<()> {
        let mut room = vec![0; bufs.len()];
        bufs.copy_to(&mut room);
        self.0.write(at, &room).map_err(as_io)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.flush().map_err(as_io)
    }
    fn punch_hole(&self, at: u64, bytes: u64) -> io::Result<()> {
        self.0.discard(at, bytes).map_err(as_io)
    }
    fn write_zeroes(&self, at: u64, bytes: u64, may_unmap: bool) -> io::Result<()> {
        self.0.write_zeroes(at, bytes, may_unmap).map_err(as_io)
    }
    fn breakpoints(&self) -> Option<Arc<Breakpoints>> {
        self.0.breakpoints().cloned()
    }
    fn extent(&self, at: u64, bytes: u64) -> io::Result<(u64, bool)> {
        let inside = self.0.size_bytes().saturating_sub(at).min(bytes);
        if inside == 0 {
            return Ok((bytes, false));
        }
        let found = self.0.extent(at, inside).map_err(as_io)?.extent;
        Ok((found.bytes, found.kind == block::ExtentKind::Data))
    }
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.size_bytes())
    }
    fn set_len_bytes(&self, bytes: u64) -> io::Result<()> {
        self.0.resize(bytes, true, block::Preallocation::Off).map_err(as_io)
    }
    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.0.counters().allocated_bytes)
    }
}

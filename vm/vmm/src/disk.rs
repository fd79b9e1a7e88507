//! Guest disks over the block engine, with the domain's answer to failures.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use block::{BlockError, ChainFile, Direction, Disk, ErrorKind, Format, OpenOptions, Preallocation, Ring};
use guest_ram::{Memory, PageMarks};
use hv_core::{Begun, DiskBackend, DiskFault, GuestBuffer, Over, Transfer};
use monitor::{CacheMode, DetectZeroes, Discard, DiskErrorPolicy, DiskFormat, DiskIo, DiskStats};

use crate::error::{VmmError, causes};
use crate::notes::{DiskNote, Note, Notes};
use crate::throttling::{DiskLimits, ThrottleGroups, Waiter};

/// A disk as everyone in the process sees it. Only its controller's thread does I/O while the machine runs.
pub struct SharedDisk {
    target: String,
    read_only: bool,
    /// A finished write may be lost until the next flush.
    write_cache: bool,
    disk: Disk,
    limits: DiskLimits,
    /// The top image, to ask the host about it.
    top: File,
    reads: Meter,
    writes: Meter,
    flushes: Meter,
    errors: AtomicU64,
}

/// How many requests, how many bytes, how long.
#[derive(Default)]
struct Meter {
    requests: AtomicU64,
    bytes: AtomicU64,
    ns: AtomicU64,
}

impl Meter {
    fn add(&self, bytes: u64, since: Instant) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.ns.fetch_add(since.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }
}

impl SharedDisk {
    /// Opens the chain of `config`; `files` are its images, top first.
    pub fn open(config: &monitor::Disk, files: Vec<OwnedFd>, groups: &ThrottleGroups) -> Result<SharedDisk, VmmError> {
        let failed = |source| VmmError::Disk { target: config.target.clone(), source };
        let host = |source| VmmError::Host { what: "duplicate a disk's descriptor", source };
        let format = |format| match format {
            DiskFormat::Raw => Format::Raw,
            DiskFormat::Qcow2 => Format::Qcow2,
        };
        let top_format = config.chain.first().map(|link| format(link.format)).ok_or(BlockError::EmptyChain);
        let top = files.first().ok_or(BlockError::EmptyChain).map_err(failed)?.try_clone().map_err(host)?;
        let chain: Vec<ChainFile> = config
            .chain
            .iter()
            .zip(files)
            .map(|(link, file)| ChainFile {
                file: file.into(),
                path_label: link.path.clone().into(),
                format: format(link.format),
                extents: Vec::new(),
            })
            .collect();
        let options = OpenOptions {
            read_only: config.read_only,
            format: top_format.map_err(failed)?,
            discard: match config.discard {
                Discard::Unmap => block::Discard::Unmap,
                Discard::Ignore => block::Discard::Ignore,
            },
            cache: match config.cache {
                CacheMode::Writeback => block::CacheMode::Writeback,
                CacheMode::None => block::CacheMode::None,
                CacheMode::Writethrough => block::CacheMode::Writethrough,
                CacheMode::DirectSync => block::CacheMode::DirectSync,
                CacheMode::Unsafe => block::CacheMode::Unsafe,
            },
            detect_zeroes: match config.detect_zeroes {
                DetectZeroes::Off => block::DetectZeroes::Off,
                DetectZeroes::On => block::DetectZeroes::On,
                DetectZeroes::Unmap => block::DetectZeroes::Unmap,
            },
            ..OpenOptions::default()
        };
        let wrong = |source| VmmError::Throttle { target: config.target.clone(), source };
        let limits = groups.limits(&config.throttle).map_err(wrong)?;
        let disk = Disk::open(chain, &options).map_err(failed)?;
        Ok(SharedDisk {
            target: config.target.clone(),
            read_only: config.read_only,
            write_cache: !options.cache.writes_through(),
            disk,
            limits,
            top: top.into(),
            reads: Meter::default(),
            writes: Meter::default(),
            flushes: Meter::default(),
            errors: AtomicU64::default(),
        })
    }

    /// Target name.
    pub fn target(&self) -> &str {
        &self.target
    }

    fn meter(&self, transfer: Transfer) -> &Meter {
        match transfer {
            Transfer::Read => &self.reads,
            Transfer::Write => &self.writes,
        }
    }

    /// What limits it.
    pub fn limits(&self) -> &DiskLimits {
        &self.limits
    }

    /// Changes its size; `to_bytes` is rounded up to whole sectors. Bytes behind a new end are lost. No request is under way.
    pub fn resize(&self, to_bytes: u64) -> Result<(), BlockError> {
        self.disk.resize(to_bytes, true, Preallocation::Off)
    }

    /// Puts everything on stable storage; before the process ends.
    pub fn flush(&self) -> Result<(), BlockError> {
        self.disk.flush()
    }

    /// Counters.
    pub fn stats(&self) -> DiskStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let metadata = self.top.metadata().ok();
        DiskStats {
            target: self.target.clone(),
            reads: of(&self.reads.requests),
            read_bytes: of(&self.reads.bytes),
            read_ns: of(&self.reads.ns),
            writes: of(&self.writes.requests),
            write_bytes: of(&self.writes.bytes),
            write_ns: of(&self.writes.ns),
            flushes: of(&self.flushes.requests),
            flush_ns: of(&self.flushes.ns),
            errors: of(&self.errors),
            capacity_bytes: self.disk.size_bytes(),
            allocation_bytes: metadata.as_ref().map_or(0, |m| m.blocks().saturating_mul(512)),
            physical_bytes: metadata.as_ref().map_or(0, MetadataExt::size),
        }
    }
}

/// The disk as its controller uses it.
pub struct DiskEnd {
    /// The disk.
    pub shared: Arc<SharedDisk>,
    /// Answer to failed writes, flushes and discards.
    pub on_write_error: DiskErrorPolicy,
    /// Answer to failed reads.
    pub on_read_error: DiskErrorPolicy,
    /// Where failures are told.
    pub notes: Arc<Notes>,
    /// How it waits for its limits.
    pub waiter: Waiter,
    /// Requests that go on by themselves.
    pub flights: Flights,
}

/// How many requests of one lane are under way at most; more are done one by one.
const RING_REQUESTS: u16 = 256;

/// The requests of a lane that the kernel works on.
#[derive(Default)]
pub struct Flights {
    io: DiskIo,
    /// There is none where the kernel has no io_uring or forbids it.
    ring: Option<Ring<PageMarks, Begin>>,
}

/// A request that is under way: the controller's name for it, and when it began.
type Begin = (u64, Instant);

impl Flights {
    /// None yet. With [`DiskIo::Threads`] no request ever goes on by itself.
    pub fn new(io: DiskIo) -> Flights {
        Flights { io, ..Flights::default() }
    }
}

/// The ring's queues are set up as the kernel wants them, so it takes what is handed over.
fn in_order(result: std::io::Result<()>) {
    if let Err(error) = result {
        panic!("the kernel takes no requests from a disk's ring any more: {error}");
    }
}

impl DiskEnd {
    fn answer(
        &self,
        result: Result<(), BlockError>,
        policy: DiskErrorPolicy,
        operation: &'static str,
    ) -> Result<(), DiskFault> {
        let Err(error) = result else { return Ok(()) };
        self.shared.errors.fetch_add(1, Ordering::Relaxed);
        // What the guest should not have asked is its own affair.
        if matches!(error.kind(), ErrorKind::OutOfRange | ErrorKind::ReadOnly) {
            return Err(DiskFault::Report);
        }
        let no_space = error.kind() == ErrorKind::NoSpace;
        let held = policy == DiskErrorPolicy::Stop || policy == DiskErrorPolicy::Enospace && no_space;
        let target = self.shared.target.clone();
        self.notes.leave(Note::Disk(DiskNote { target, operation, no_space, held, text: causes(&error) }));
        match policy {
            DiskErrorPolicy::Ignore => Ok(()),
            _ if held => Err(DiskFault::Hold),
            _ => Err(DiskFault::Report),
        }
    }
}

fn length(buffers: &[GuestBuffer<'_>]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
}

impl DiskBackend for DiskEnd {
    fn size_bytes(&self) -> u64 {
        self.shared.disk.size_bytes()
    }
    fn read_only(&self) -> bool {
        self.shared.read_only
    }
    fn write_cache(&self) -> bool {
        self.shared.write_cache
    }
    fn admit(&mut self, transfer: Transfer, bytes: u64) -> Result<(), DiskFault> {
        self.waiter.admit(&self.shared.limits, transfer, bytes)
    }
    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.waiter.fd())
    }
    fn attach(&mut self, memory: &Memory) {
        if self.flights.io == DiskIo::Threads {
            return;
        }
        self.flights.ring = Ring::new(RING_REQUESTS, memory.clone()).ok();
        if let Some(ring) = self.flights.ring.as_mut().filter(|_| self.flights.io == DiskIo::Ring) {
            ring.take_all();
        }
    }
    fn begin(&mut self, transfer: Transfer, offset: u64, buffers: &[GuestBuffer<'_>], tag: u64) -> Begun {
        let Some(ring) = &mut self.flights.ring else { return Begun::Refused };
        let start = Instant::now();
        let disk = &self.shared.disk;
        let begun = match transfer {
            Transfer::Read => ring.read(disk, offset, buffers, (tag, start)),
            Transfer::Write => ring.write(disk, offset, buffers, (tag, start)),
        };
        match begun {
            block::Begun::Done => {
                self.shared.meter(transfer).add(length(buffers), start);
                Begun::Done
            }
            block::Begun::UnderWay => Begun::UnderWay,
            block::Begun::Refused => Begun::Refused,
        }
    }
    fn submit(&mut self) {
        if let Some(ring) = &mut self.flights.ring {
            in_order(ring.submit());
        }
    }
    fn next_over(&mut self) -> Option<Over> {
        let over = self.flights.ring.as_mut()?.next_over(&self.shared.disk)?;
        let block::Over { tag: (tag, began), direction, bytes, good } = over;
        if good {
            let transfer = if direction == Direction::Read { Transfer::Read } else { Transfer::Write };
            self.shared.meter(transfer).add(bytes, began);
        }
        Some(Over { tag, good })
    }
    fn wait(&mut self) {
        if let Some(ring) = &mut self.flights.ring {
            in_order(ring.wait());
        }
    }
    fn over_fd(&self) -> Option<BorrowedFd<'_>> {
        self.flights.ring.as_ref().map(AsFd::as_fd)
    }
    fn read(&mut self, offset: u64, buffers: &[GuestBuffer<'_>]) -> Result<(), DiskFault> {
        let start = Instant::now();
        let result = self.shared.disk.read_at(offset, buffers);
        if result.is_ok() {
            self.shared.meter(Transfer::Read).add(length(buffers), start);
        }
        self.answer(result, self.on_read_error, "read")
    }
    fn write(&mut self, offset: u64, buffers: &[GuestBuffer<'_>]) -> Result<(), DiskFault> {
        let start = Instant::now();
        let result = self.shared.disk.write_at(offset, buffers);
        if result.is_ok() {
            self.shared.meter(Transfer::Write).add(length(buffers), start);
        }
        self.answer(result, self.on_write_error, "write")
    }
    fn flush(&mut self) -> Result<(), DiskFault> {
        let start = Instant::now();
        let result = self.shared.disk.flush();
        if result.is_ok() {
            self.shared.flushes.add(0, start);
        }
        self.answer(result, self.on_write_error, "flush")
    }
    fn discard(&mut self, offset: u64, bytes: u64) -> Result<(), DiskFault> {
        let result = self.shared.disk.discard(offset, bytes);
        self.answer(result, self.on_write_error, "discard")
    }
    fn write_zeroes(&mut self, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), DiskFault> {
        let start = Instant::now();
        let result = self.shared.disk.write_zeroes(offset, bytes, may_unmap);
        if result.is_ok() {
            self.shared.writes.add(bytes, start);
        }
        self.answer(result, self.on_write_error, "write")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use DiskErrorPolicy::{Enospace, Ignore, Report, Stop};
    use std::io::{Error, ErrorKind::StorageFull};

    fn end(notes: &Arc<Notes>) -> DiskEnd {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let link = monitor::ChainLink { file: monitor::FdIndex(0), path: "d.img".into(), format: DiskFormat::Raw };
        let config = monitor::Disk::new("vda", monitor::DiskBus::Virtio, vec![link]);
        let shared = Arc::new(SharedDisk::open(&config, vec![file.into()], &ThrottleGroups::default()).unwrap());
        let waiter = Waiter::new().unwrap();
        let flights = Flights::default();
        DiskEnd { shared, on_write_error: Enospace, on_read_error: Report, notes: notes.clone(), waiter, flights }
    }
    fn full() -> BlockError {
        BlockError::NoSpace { path: "d.img".into(), action: block::Action::Write, source: Error::from(StorageFull) }
    }
    fn broken() -> BlockError {
        let source = Error::from(std::io::ErrorKind::PermissionDenied);
        BlockError::Io { path: "d.img".into(), action: block::Action::Write, source }
    }

    #[test]
    fn the_policy_decides_how_a_failure_ends() {
        type Make = fn() -> BlockError;
        let cases: [(Make, DiskErrorPolicy, Result<(), DiskFault>, bool); 8] = [
            (full, Enospace, Err(DiskFault::Hold), true),
            (broken, Enospace, Err(DiskFault::Report), false),
            (full, Stop, Err(DiskFault::Hold), true),
            (broken, Stop, Err(DiskFault::Hold), true),
            (full, Report, Err(DiskFault::Report), false),
            (broken, Report, Err(DiskFault::Report), false),
            (full, Ignore, Ok(()), false),
            (broken, Ignore, Ok(()), false),
        ];
        let notes = Arc::new(Notes::new().unwrap());
        let end = end(&notes);
        for (error, policy, want, held) in cases {
            assert_eq!(end.answer(Err(error()), policy, "write"), want, "{policy:?} {}", error());
            let told: Vec<Note> = notes.take().into();
            let [Note::Disk(note)] = &told[..] else { panic!("{told:?}") };
            assert_eq!((note.held, note.operation, note.target.as_str()), (held, "write", "vda"));
            assert_eq!(note.no_space, error().kind() == ErrorKind::NoSpace);
        }
        assert_eq!(end.shared.stats().errors, 8);
    }

    #[test]
    fn what_the_guest_should_not_have_asked_is_told_to_it_alone() {
        let notes = Arc::new(Notes::new().unwrap());
        let mut end = end(&notes);
        end.on_write_error = Stop;
        assert_eq!(end.discard(4096, 512), Err(DiskFault::Report));
        assert!(notes.take().is_empty());
        assert_eq!((end.flush(), end.discard(0, 4096), end.size_bytes()), (Ok(()), Ok(()), 4096));
        assert_eq!((end.shared.stats().flushes, end.shared.stats().physical_bytes), (1, 4096));
    }
}

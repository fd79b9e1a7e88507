//! From a definition to the machine that vireo-vmm builds: every file opened here, passed as a descriptor.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use block::Format;
use monitor::{
    Accel, Boot, CacheMode, ChainLink, ClockMode, Console, ConsoleTarget, DetectZeroes, Discard, DiskBus,
    DiskErrorPolicy, DiskFormat, DiskIo, FdIndex, PowerAction, VmConfig,
};
use xml::{ClockOffset, DiskSource, DomainConfig, LifecycleAction, LivePty, SerialTarget, VirtType};

use crate::drivers::block_tune;
use crate::error::DaemonError;
use crate::image_chain::{self, OpenMode};
use crate::pty;

/// Bytes the software CPU may use for decoded blocks.
const BLOCK_CACHE_BYTES: u64 = 16 << 20;

/// A machine ready to be built.
#[derive(Debug)]
pub struct Machine {
    /// What vireo-vmm is told.
    pub config: VmConfig,
    /// The descriptors it refers to.
    pub fds: Vec<OwnedFd>,
    /// Consoles that clients may open.
    pub ptys: Vec<LivePty>,
    /// Their controlling sides once more, for the daemon to keep.
    pub controllers: Vec<OwnedFd>,
    /// Per disk, its backing files: format and path.
    pub backing: Vec<Vec<(String, String)>>,
}

struct Fds(Vec<OwnedFd>);

impl Fds {
    fn add(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        self.0.push(fd.into());
        FdIndex((self.0.len() - 1) as u32)
    }
}

/// Opens what `domain` names. `monitor` is the listening socket of its monitor.
pub fn build(domain: &DomainConfig, monitor: OwnedFd, paused: bool) -> Result<Machine, DaemonError> {
    let mut fds = Fds(Vec::new());
    if let Some(interface) = domain.interfaces.first() {
        return Err(match (interface.kind.as_str(), &interface.source) {
            ("network", Some(name)) => DaemonError::NoNetwork { name: name.clone() },
            (kind, _) => {
                let detail = format!("network interface of type '{kind}' cannot be attached yet; remove <interface>");
                DaemonError::Unsupported { detail }
            }
        });
    }
    let boot = open_boot(domain, &mut fds)?;
    let mut disks = Vec::new();
    let mut backing = Vec::new();
    let threads = IoThreads::new(domain);
    for disk in &domain.disks {
        let (opened, behind) = open_disk(disk, &mut fds)?;
        let (queues, queue_size) = (disk.driver.queues.clamp(1, 16) as u16, disk.driver.queue_size as u16);
        disks.push(monitor::Disk {
            queues,
            queue_size: if queue_size == 0 { opened.queue_size } else { queue_size },
            io_threads: threads.of(disk),
            ..opened
        });
        backing.push(behind);
    }
    let mut consoles = Vec::new();
    let mut ptys = Vec::new();
    let mut controllers = Vec::new();
    for device in &domain.char_devices {
        let (console, pty, controller) = open_console(device, &mut fds)?;
        controllers.push(controller);
        consoles.push(console);
        ptys.push(pty);
    }
    let config = VmConfig {
        name: domain.name.clone(),
        uuid: domain.uuid.to_string(),
        machine: domain.os.machine.clone(),
        accel: match domain.virt_type {
            VirtType::Qemu => Accel::Soft,
            VirtType::Kvm => Accel::Kvm,
        },
        memory_kib: domain.memory_kib,
        vcpus: domain.vcpus,
        boot,
        disks,
        consoles,
        rng: domain.rng,
        clock: ClockMode::Host,
        rtc_localtime: domain.clock == ClockOffset::Localtime,
        paused,
        on_poweroff: action(domain.on_poweroff),
        on_reboot: action(domain.on_reboot),
        on_crash: action(domain.on_crash),
        monitor: Some(fds.add(monitor)),
        sandbox: true,
        block_cache_bytes: BLOCK_CACHE_BYTES,
    };
    Ok(Machine { config, fds: fds.0, ptys, controllers, backing })
}

/// Which threads serve which disk. Disks without `iothread` share the first ones: one, or as many as the most queues of one
/// such disk keep busy on this host. Behind them comes a thread for each of `<iothreads>`.
struct IoThreads {
    shared: u16,
    own: Vec<u32>,
}

impl IoThreads {
    fn new(domain: &DomainConfig) -> IoThreads {
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32);
        let queues = domain.disks.iter().filter(|disk| disk.driver.iothread.is_none()).map(|disk| disk.driver.queues);
        let shared = queues.max().unwrap_or(1).clamp(1, cpus.min(16)) as u16;
        IoThreads { shared, own: domain.iothreads.clone() }
    }

    fn of(&self, disk: &xml::Disk) -> Vec<u16> {
        let place = disk.driver.iothread.and_then(|id| self.own.iter().position(|own| *own == id));
        match place {
            Some(place) => vec![self.shared + place as u16],
            None => (0..self.shared).collect(),
        }
    }
}

fn action(action: LifecycleAction) -> PowerAction {
    match action {
        LifecycleAction::Destroy => PowerAction::Destroy,
        LifecycleAction::Restart => PowerAction::Restart,
        LifecycleAction::Preserve => PowerAction::Preserve,
    }
}

fn open_boot(domain: &DomainConfig, fds: &mut Fds) -> Result<Boot, DaemonError> {
    let Some(kernel) = &domain.os.kernel else {
        let detail =
            "the domain has no <kernel>, and there is no firmware yet that could boot a disk; add <kernel> to <os>";
        return Err(DaemonError::Unsupported { detail: detail.into() });
    };
    let mut open = |what, path: &str| {
        let file = open_regular(path).map_err(|source| DaemonError::BootFile { what, path: path.into(), source })?;
        Ok::<_, DaemonError>(fds.add(file))
    };
    Ok(Boot::Kernel {
        kernel: open("kernel", kernel)?,
        initrd: domain.os.initrd.as_deref().map(|initrd| open("initrd", initrd)).transpose()?,
        cmdline: domain.os.cmdline.clone(),
    })
}

/// A pipe in a file's place is refused, and keeps nobody waiting for its other end.
fn open_regular(path: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is no regular file")) }
}

fn open_disk(disk: &xml::Disk, fds: &mut Fds) -> Result<(monitor::Disk, Vec<(String, String)>), DaemonError> {
    let (DiskSource::File(path) | DiskSource::Block(path)) = &disk.source else {
        let detail = format!("disk '{}' has no file or block device", disk.target);
        return Err(DaemonError::Unsupported { detail });
    };
    let direct = matches!(disk.cache.as_deref(), Some("none" | "directsync"));
    let mode = OpenMode { read_only: disk.read_only, direct, shared: disk.shareable };
    let images = image_chain::open(Path::new(path), image_chain::format_named(&disk.format), mode)?;
    let mut chain = Vec::new();
    let mut backing = Vec::new();
    for (index, image) in images.into_iter().enumerate() {
        let path = image.path_label.to_string_lossy().into_owned();
        let format = match image.format {
            Format::Raw => DiskFormat::Raw,
            Format::Qcow2 => DiskFormat::Qcow2,
            other => {
                let detail = format!("disk '{}' has an image of format '{other}'; convert it to qcow2", disk.target);
                return Err(DaemonError::Unsupported { detail });
            }
        };
        if index > 0 {
            backing.push((image.format.name().to_owned(), path.clone()));
        }
        chain.push(ChainLink { file: fds.add(image.file), path, format });
    }
    let on_write_error = error_policy(disk.error_policy.as_deref(), DiskErrorPolicy::Enospace)?;
    // What is said of writes goes for reads too, where it can.
    let reads = if on_write_error == DiskErrorPolicy::Enospace { DiskErrorPolicy::Report } else { on_write_error };
    let on_read_error = error_policy(disk.read_error_policy.as_deref(), reads)?;
    let bus = if disk.bus == "nvme" { DiskBus::Nvme } else { DiskBus::Virtio };
    let disk = monitor::Disk {
        read_only: disk.read_only,
        serial: disk.serial.clone(),
        cache: match disk.cache.as_deref() {
            Some("none") => CacheMode::None,
            Some("unsafe") => CacheMode::Unsafe,
            Some("writethrough") => CacheMode::Writethrough,
            Some("directsync") => CacheMode::DirectSync,
            _ => CacheMode::Writeback,
        },
        discard: if disk.discard.as_deref() == Some("unmap") { Discard::Unmap } else { Discard::Ignore },
        on_write_error,
        on_read_error,
        detect_zeroes: match disk.driver.detect_zeroes.as_deref() {
            Some("on") => DetectZeroes::On,
            Some("unmap") => DetectZeroes::Unmap,
            _ => DetectZeroes::Off,
        },
        io: match disk.driver.io.as_deref() {
            Some("threads") => DiskIo::Threads,
            Some("native" | "io_uring") => DiskIo::Ring,
            _ => DiskIo::Auto,
        },
        throttle: block_tune::throttle(&disk.iotune),
        ..monitor::Disk::new(disk.target.clone(), bus, chain)
    };
    Ok((disk, backing))
}

fn error_policy(text: Option<&str>, default: DiskErrorPolicy) -> Result<DiskErrorPolicy, DaemonError> {
    match text {
        None | Some("default") => Ok(default),
        Some("stop") => Ok(DiskErrorPolicy::Stop),
        Some("report") => Ok(DiskErrorPolicy::Report),
        Some("ignore") => Ok(DiskErrorPolicy::Ignore),
        Some("enospace") => Ok(DiskErrorPolicy::Enospace),
        Some(other) => {
            let detail = format!("disk error policy '{other}' does not exist; use stop, report, ignore or enospace");
            Err(DaemonError::Unsupported { detail })
        }
    }
}

fn open_console(device: &xml::CharDevice, fds: &mut Fds) -> Result<(Console, LivePty, OwnedFd), DaemonError> {
    let failed = |source| DaemonError::File { action: "make a pseudo terminal in", path: "/dev/ptmx".into(), source };
    let made = pty::open().map_err(failed)?;
    let kept = made.controller.try_clone().map_err(failed)?;
    let log = device.log.as_deref().map(|path| open_log(path, device.log_append)).transpose()?;
    let console = Console {
        target: match device.target {
            SerialTarget::Serial(port) => ConsoleTarget::Serial { port },
            SerialTarget::Virtio => ConsoleTarget::Virtio,
        },
        file: fds.add(made.controller),
        keep_open: Some(fds.add(made.terminal)),
        log: log.map(|file| fds.add(file)),
    };
    let path = made.path.to_string_lossy().into_owned();
    Ok((console, LivePty { alias: device.alias.clone(), path }, kept))
}

fn open_log(path: &str, append: bool) -> Result<File, DaemonError> {
    let mut options = OpenOptions::new();
    // Nonblocking, so that a pipe in the log's place cannot stop the daemon.
    options.create(true).mode(0o600).custom_flags(libc::O_NONBLOCK).append(append).write(true).truncate(!append);
    options.open(path).map_err(|source| DaemonError::File { action: "open console log", path: path.into(), source })
}

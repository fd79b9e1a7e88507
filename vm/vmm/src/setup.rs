//! From a configuration with open descriptors to the parts of a machine.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::SystemTime;

use chipset::serial::SerialSink;
use hv_core::{Clock, DiskBackend};
use machine::{BootSource, DeviceSpec, Entry, MachineConfig};
use monitor::{Boot, ClockMode, ConsoleTarget, DiskBus, DiskIo, FdIndex, VmConfig};
use virtio::BlkQueues;

use crate::console::{HostEnd, HostEndParts, SerialEnd, Slow, VirtioEnd, set_nonblocking};
use crate::disk::{DiskEnd, Flights, SharedDisk};
use crate::error::VmmError;
use crate::event::Event;
use crate::io_thread::SerialConsole;
use crate::notes::Notes;
use crate::random::{HostRandom, RepeatableRandom};
use crate::throttling::{ThrottleGroups, Waiter};

/// What the RTC of a repeatable machine shows at its start: 2026-01-01 00:00:00 UTC.
const REPEATABLE_UNIX_S: i64 = 1_767_225_600;
/// Most bytes of a disk's serial number that a guest sees. VIRTIO 5.2.6, NVME figure 247
const DISK_SERIAL_BYTES: usize = 20;

/// The most queues of a disk.
const MAX_QUEUES: u16 = 16;
/// The most requests that one of them holds.
const MAX_QUEUE_SIZE: u16 = 1024;

/// Descriptors that came with a configuration.
pub struct Files(pub Vec<OwnedFd>);

impl Files {
    fn get(&self, index: FdIndex, what: &'static str) -> Result<OwnedFd, VmmError> {
        let missing = VmmError::MissingFd { what, index: index.0, count: self.0.len() };
        let fd = self.0.get(index.0 as usize).ok_or(missing)?;
        fd.try_clone().map_err(VmmError::host("duplicate a descriptor"))
    }
    fn get_optional(&self, index: Option<FdIndex>, what: &'static str) -> Result<Option<OwnedFd>, VmmError> {
        index.map(|index| self.get(index, what)).transpose()
    }
}

/// The terminal of whoever started the process, as serial port 0.
pub struct OwnTerminal {
    /// Where input comes from.
    pub input: OwnedFd,
    /// Where output goes.
    pub output: OwnedFd,
    /// The key that leaves, where a person types.
    pub leave_key: Option<u8>,
}

/// The parts.
pub struct Setup {
    /// What the machine is built from.
    pub machine: MachineConfig,
    /// Disks, in the order of the configuration.
    pub disks: Vec<Arc<SharedDisk>>,
    /// Their limits.
    pub throttles: ThrottleGroups,
    /// Serial consoles.
    pub serial: Vec<SerialConsole>,
    /// All consoles.
    pub ends: Vec<Arc<HostEnd>>,
    /// The monitor's listening socket.
    pub monitor: Option<UnixListener>,
    /// Wakes the I/O thread.
    pub wake: Arc<Event>,
}

/// Opens images and consoles; nothing runs yet.
pub fn prepare(
    config: &VmConfig,
    files: &Files,
    terminal: Option<OwnTerminal>,
    notes: &Arc<Notes>,
) -> Result<Setup, VmmError> {
    if config.machine != machine::layout::MACHINE_TYPE && config.machine != "q35" {
        return Err(VmmError::MachineType { name: config.machine.clone() });
    }
    let repeatable = config.clock == ClockMode::Virtual;
    if repeatable && config.vcpus != 1 {
        return Err(VmmError::VirtualClock { vcpus: config.vcpus });
    }
    let wake = Arc::new(Event::new().map_err(VmmError::host("make an event descriptor"))?);
    let mut consoles = Consoles::new(wake.clone(), repeatable);
    if let Some(terminal) = terminal {
        consoles.add_terminal(terminal)?;
    }
    let mut devices = Vec::new();
    let mut disks = Vec::new();
    let throttles = ThrottleGroups::default();
    for disk in &config.disks {
        let (shared, spec) = open_disk(disk, files, notes, &throttles, repeatable)?;
        disks.push(shared);
        devices.push(spec);
    }
    for console in &config.consoles {
        devices.extend(consoles.add(console, files)?);
    }
    if config.rng {
        let source: Box<dyn virtio::RandomSource> =
            if repeatable { Box::new(RepeatableRandom::new()) } else { Box::new(HostRandom) };
        devices.push(DeviceSpec::VirtioRng { source });
    }
    let machine = MachineConfig {
        ram_bytes: config.memory_kib.saturating_mul(1024),
        vcpus: config.vcpus,
        clock: if repeatable { Clock::virtual_clock() } else { Clock::host() },
        unix_s: if repeatable { REPEATABLE_UNIX_S } else { rtc_start(config.rtc_localtime) },
        serial: consoles.sinks,
        debug_console: None,
        devices,
        boot: open_boot(&config.boot, files)?,
    };
    let monitor = files.get_optional(config.monitor, "monitor")?.map(UnixListener::from);
    Ok(Setup { machine, disks, throttles, serial: consoles.serial, ends: consoles.ends, monitor, wake })
}

/// Seconds since 1970, in UTC or as the host's clock on the wall shows them.
fn rtc_start(local: bool) -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64);
    if local { now + i64::from(jiff::ZonedDateTime::now().offset().seconds()) } else { now }
}

fn open_boot(boot: &Boot, files: &Files) -> Result<BootSource, VmmError> {
    let Boot::Kernel { kernel, initrd, cmdline } = boot;
    Ok(BootSource {
        kernel: files.get(*kernel, "kernel")?.into(),
        initrd: files.get_optional(*initrd, "initrd")?.map(Into::into),
        cmdline: cmdline.clone(),
        entry: Entry::Fastest,
    })
}

fn open_disk(
    disk: &monitor::Disk,
    files: &Files,
    notes: &Arc<Notes>,
    throttles: &ThrottleGroups,
    repeatable: bool,
) -> Result<(Arc<SharedDisk>, DeviceSpec), VmmError> {
    let target = || disk.target.clone();
    // Controllers of NVMe are told apart by their serial numbers, so there has to be one.
    let without = if disk.bus == DiskBus::Nvme { target() } else { String::new() };
    let serial = disk.serial.clone().unwrap_or(without);
    let sound = (1..=MAX_QUEUES).contains(&disk.queues)
        && (2..=MAX_QUEUE_SIZE).contains(&disk.queue_size)
        && disk.queue_size.is_power_of_two();
    if !sound {
        return Err(VmmError::DiskQueues { target: target(), queues: disk.queues, size: disk.queue_size });
    }
    if serial.len() > DISK_SERIAL_BYTES {
        return Err(VmmError::DiskSerial { target: target(), bytes: serial.len() });
    }
    let images: Result<Vec<OwnedFd>, VmmError> =
        disk.chain.iter().map(|link| files.get(link.file, "disk image")).collect();
    let shared = Arc::new(SharedDisk::open(disk, images?, throttles)?);
    let end = || -> Result<Box<dyn DiskBackend>, VmmError> {
        Ok(Box::new(DiskEnd {
            shared: shared.clone(),
            on_write_error: disk.on_write_error,
            on_read_error: disk.on_read_error,
            notes: notes.clone(),
            waiter: Waiter::new().map_err(VmmError::host("make a timer"))?,
            // What happens must be the same in every run on the virtual clock.
            flights: Flights::new(if repeatable { DiskIo::Threads } else { disk.io }),
        }))
    };
    let queues = BlkQueues { count: disk.queues, size: disk.queue_size };
    let spec = match disk.bus {
        DiskBus::Virtio => DeviceSpec::VirtioBlk {
            disk: end()?,
            more_lanes: (1..disk.queues.min(MAX_QUEUES)).map(|_| end()).collect::<Result<_, _>>()?,
            queues,
            serial,
        },
        DiskBus::Nvme => DeviceSpec::Nvme { disk: end()?, serial },
    };
    Ok((shared, spec))
}

struct Consoles {
    wake: Arc<Event>,
    repeatable: bool,
    sinks: [Option<Box<dyn SerialSink>>; 4],
    serial: Vec<SerialConsole>,
    ends: Vec<Arc<HostEnd>>,
}

impl Consoles {
    fn new(wake: Arc<Event>, repeatable: bool) -> Consoles {
        Consoles { wake, repeatable, sinks: [const { None }; 4], serial: Vec::new(), ends: Vec::new() }
    }

    fn add_terminal(&mut self, terminal: OwnTerminal) -> Result<(), VmmError> {
        let OwnTerminal { input, output, leave_key } = terminal;
        let slow = if self.repeatable { Slow::ThreadWaits } else { Slow::GuestWaits };
        let wake = self.wake.clone();
        let parts = HostEndParts { input: Some(input), output, keep_open: None, log: None, slow, wake };
        self.connect_serial(0, Arc::new(HostEnd::new(parts)), leave_key)
    }

    /// Returns the device to add for it, if it is on the PCI bus.
    fn add(&mut self, console: &monitor::Console, files: &Files) -> Result<Option<DeviceSpec>, VmmError> {
        let output = files.get(console.file, "console")?;
        set_nonblocking(&output).map_err(VmmError::host("make a console not block"))?;
        let parts = HostEndParts {
            input: Some(output.try_clone().map_err(VmmError::host("duplicate a descriptor"))?),
            output,
            keep_open: files.get_optional(console.keep_open, "console")?,
            log: files.get_optional(console.log, "console log")?,
            slow: if self.repeatable { Slow::ThreadWaits } else { Slow::KeepNewest },
            wake: self.wake.clone(),
        };
        let end = Arc::new(HostEnd::new(parts));
        match console.target {
            ConsoleTarget::Serial { port } => {
                self.connect_serial(port, end, None)?;
                Ok(None)
            }
            ConsoleTarget::Virtio => {
                self.ends.push(end.clone());
                Ok(Some(DeviceSpec::VirtioConsole { backend: Box::new(VirtioEnd(end)) }))
            }
        }
    }

    fn connect_serial(&mut self, port: u8, end: Arc<HostEnd>, leave_key: Option<u8>) -> Result<(), VmmError> {
        let number = usize::from(port);
        let sink = self.sinks.get_mut(number).ok_or(VmmError::SerialPort { port })?;
        if sink.is_some() {
            return Err(VmmError::SerialTwice { port });
        }
        *sink = Some(Box::new(SerialEnd(end.clone())));
        self.ends.push(end.clone());
        self.serial.push(SerialConsole { number, end, leave_key });
        Ok(())
    }
}

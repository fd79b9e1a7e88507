//! What a machine consists of, as vireod tells vireo-vmm.

use serde::{Deserialize, Serialize};

/// Index into the descriptors passed with the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdIndex(pub u32);

/// A whole machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Domain name, for messages.
    pub name: String,
    /// Domain UUID in text form; SMBIOS and the monitor's greeting carry it.
    pub uuid: String,
    /// Machine type: `vireo-q35-1`.
    pub machine: String,
    /// Which engine.
    pub accel: Accel,
    /// Guest memory in KiB, at least 32768.
    pub memory_kib: u64,
    /// Number of vCPUs, at least 1.
    pub vcpus: u32,
    /// What is booted.
    pub boot: Boot,
    /// In PCI slot order.
    pub disks: Vec<Disk>,
    /// Serial and virtio consoles.
    pub consoles: Vec<Console>,
    /// A virtio-rng device fed from the host's random numbers.
    pub rng: bool,
    /// Host time, or instructions retired.
    pub clock: ClockMode,
    /// The RTC shows local time rather than UTC.
    pub rtc_localtime: bool,
    /// Stay in `prelaunch` until `cont`.
    pub paused: bool,
    /// When the guest powers off.
    pub on_poweroff: PowerAction,
    /// When the guest resets.
    pub on_reboot: PowerAction,
    /// When the guest or the engine crashes.
    pub on_crash: PowerAction,
    /// Listening monitor socket; `None`: no monitor.
    pub monitor: Option<FdIndex>,
    /// Refuse system calls outside the sandbox by killing the process (true) or not sandbox at all (debugging only).
    pub sandbox: bool,
    /// Bytes that the software CPU may use for decoded blocks.
    pub block_cache_bytes: u64,
}

/// Engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// KVM where it works, else the software CPU.
    Auto,
    /// KVM or nothing. The descriptor of /dev/kvm is opened by vireo-vmm before its sandbox.
    Kvm,
    /// The software CPU.
    Soft,
}

/// What is booted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Boot {
    /// A Linux kernel (bzImage, or ELF with a PVH note) without firmware.
    Kernel {
        /// The kernel image.
        kernel: FdIndex,
        /// The initial ram disk.
        initrd: Option<FdIndex>,
        /// The kernel command line.
        cmdline: String,
    },
}

/// A disk and the chain of images behind it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Target name (`vda`), for messages and statistics.
    pub target: String,
    /// Which controller.
    pub bus: DiskBus,
    /// Top image first, then its backing files.
    pub chain: Vec<ChainLink>,
    /// The guest cannot write.
    pub read_only: bool,
    /// Shown to the guest; at most 20 bytes.
    pub serial: Option<String>,
    /// Host caching.
    pub cache: CacheMode,
    /// What a discard of the guest does.
    pub discard: Discard,
    /// Failed writes.
    pub on_write_error: DiskErrorPolicy,
    /// Failed reads.
    pub on_read_error: DiskErrorPolicy,
    /// What becomes of writes of zeroes.
    pub detect_zeroes: DetectZeroes,
    /// Queues of a virtio disk, 1 to 16.
    pub queues: u16,
    /// Requests that each holds: a power of two, 2 to 1024.
    pub queue_size: u16,
    /// Threads that serve the queues: queue `n` is served by number `n` modulo their count. 0 is the thread that every
    /// machine has, others are made. Never empty; an NVMe disk uses the first.
    pub io_threads: Vec<u16>,
    /// Who waits for its transfers.
    #[serde(default)]
    pub io: DiskIo,
    /// Limits on its transfers.
    #[serde(default)]
    pub throttle: DiskThrottle,
}

impl Disk {
    /// A writable disk with the defaults of a machine: write-back, discards passed on, pauses when the host's disk is full.
    pub fn new(target: impl Into<String>, bus: DiskBus, chain: Vec<ChainLink>) -> Disk {
        Disk {
            target: target.into(),
            bus,
            chain,
            read_only: false,
            serial: None,
            cache: CacheMode::Writeback,
            discard: Discard::Unmap,
            on_write_error: DiskErrorPolicy::Enospace,
            on_read_error: DiskErrorPolicy::Report,
            detect_zeroes: DetectZeroes::Off,
            queues: 1,
            queue_size: 512, // a transfer of 1 MiB in pages is one request
            io_threads: vec![0],
            io: DiskIo::Auto,
            throttle: DiskThrottle::default(),
        }
    }
}

/// Who waits for the transfers of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskIo {
    /// The kernel, with an io_uring, where that is cheaper: all but writes to the host's page cache.
    #[default]
    Auto,
    /// The threads of its queues, one transfer each at a time.
    Threads,
    /// The kernel, whatever it costs.
    Ring,
}

/// Limits on a disk's transfers; all zeroes: none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskThrottle {
    /// Disks with the same name here share the limits, which must be the same too.
    pub group: Option<String>,
    /// Bytes per second.
    pub bytes: RateLimits,
    /// Requests per second.
    pub requests: RateLimits,
    /// A request counts as one for every so many bytes of it; 0: as one.
    pub request_bytes: u64,
}

/// Limits for both directions together and for each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimits {
    /// Reads and writes together.
    pub total: RateLimit,
    /// Reads.
    pub read: RateLimit,
    /// Writes.
    pub write: RateLimit,
}

/// One limit; 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Per second, in the long run.
    pub rate: u64,
    /// Per second, in a burst.
    pub burst_rate: u64,
    /// Length of a burst in seconds.
    pub burst_s: u64,
}

/// One image file of a chain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChainLink {
    /// The open file.
    pub file: FdIndex,
    /// Where vireod found it, for messages only.
    pub path: String,
    /// Its format; never probed here.
    pub format: DiskFormat,
}

/// Image formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// Plain bytes.
    Raw,
    /// qcow2 version 2 or 3.
    Qcow2,
}

/// Controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBus {
    /// virtio-blk.
    Virtio,
    /// NVMe, one controller per disk.
    Nvme,
}

/// Host caching.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheMode {
    /// Page cache, flushes honoured.
    Writeback,
    /// O_DIRECT (the descriptor was opened so), flushes honoured.
    None,
    /// Page cache, each write flushed.
    Writethrough,
    /// O_DIRECT, each write flushed.
    DirectSync,
    /// Page cache, flushes ignored.
    Unsafe,
}

/// What a discard does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Discard {
    /// Gives space back to the host.
    Unmap,
    /// Nothing.
    Ignore,
}

/// What becomes of a write that holds only zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DetectZeroes {
    /// It is written.
    Off,
    /// The range reads as zeroes; its space stays.
    On,
    /// The same, and space may go back where discards give it back.
    Unmap,
}

/// Answer to a failed disk request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskErrorPolicy {
    /// Pause the machine; the request is tried again on `cont`.
    Stop,
    /// The guest sees the error.
    Report,
    /// The guest sees success.
    Ignore,
    /// Pause for a full disk, report anything else: libvirt's default for writes.
    Enospace,
}

/// A console: what the guest sees, and the host's end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// What the guest sees.
    pub target: ConsoleTarget,
    /// The host's end: a pty's controlling side, a socket, or a terminal. Read and written without blocking.
    pub file: FdIndex,
    /// Kept open so that a pty without a reader does not hang up: its other side.
    pub keep_open: Option<FdIndex>,
    /// Everything the guest prints is also appended here (`<log file=…>`).
    pub log: Option<FdIndex>,
}

/// Console hardware.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleTarget {
    /// 16550A at 0x3f8 (port 0) to 0x2e8 (port 3).
    Serial {
        /// 0 to 3.
        port: u8,
    },
    /// virtio-console.
    Virtio,
}

/// What guest time is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClockMode {
    /// The host's monotonic clock.
    Host,
    /// Instructions retired; software CPU only, one vCPU.
    Virtual,
}

/// What happens at a power event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PowerAction {
    /// The process ends.
    Destroy,
    /// The machine is reset and goes on.
    Restart,
    /// The machine stays, stopped.
    Preserve,
}
